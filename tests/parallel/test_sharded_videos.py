"""Whole videos of tiny checkpoints, made by several ranks together: as one rank makes them, generators included."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helios_serve.config import ModelConfig
from helios_serve.model_executor.model import load_model
from helios_serve.model_executor.runner import Runner
from helios_serve.parallel.collectives import RankGroup
from helios_serve.parallel.mesh import SOLO, Degrees, Mesh, build_mesh
from helios_serve.types import Frames, PromptChange, SamplingParams, Variant, VideoRequest
from helios_serve.workers.encoder import EncoderWorker
from tests.conftest import MakeCheckpoint
from tests.parallel.ranks import run_ranks

MAX_ABS, MAX_RELATIVE = 2e-4, 2e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Requests that are packed together, and how ranks share them. Heads are four: three ranks must be a ring."""

    variant: Variant
    requests: tuple[dict[str, object], ...]
    degrees: tuple[Degrees, ...]
    amplify_history: bool = False


_BASE: tuple[dict[str, object], ...] = ({"width": 48, "height": 32, "steps": (2,), "guidance_scale": 5.0},)
_MID: tuple[dict[str, object], ...] = (
    {"steps": (2, 1, 1), "guidance_scale": 5.0},
    {"steps": (1, 2, 1), "guidance_scale": 2.0, "seed": 4},
)
_KEEPING: dict[str, object] = {"steps": (2, 1, 2), "approximations": ("history_reuse",)}
_DISTILLED: tuple[dict[str, object], ...] = (
    {"num_frames": 66, "amplify_first_chunk": True},
    {"width": 128, "seed": 7},
)
CASES = {
    "base-2": Case(variant="base", requests=_BASE, degrees=(Degrees(ulysses=2), Degrees(ring=2), Degrees(cfg=2))),
    "base-4": Case(variant="base", requests=_BASE, degrees=(Degrees(ulysses=4), Degrees(cfg=2, ring=2))),
    "mid-2": Case(variant="mid", requests=_MID, degrees=(Degrees(ulysses=2), Degrees(cfg=2))),
    "mid-4": Case(variant="mid", requests=_MID, degrees=(Degrees(cfg=2, ulysses=2),)),
    "distilled-2": Case(variant="distilled", requests=_DISTILLED, degrees=(Degrees(ulysses=2), Degrees(ring=2))),
    "history-kept-2": Case(
        variant="distilled",
        requests=({**_KEEPING, "num_frames": 66}, {**_KEEPING, "width": 128, "steps": (1, 2, 1), "seed": 7}),
        degrees=(Degrees(ulysses=2), Degrees(ring=2)),
    ),
    "distilled-3": Case(variant="distilled", requests=_DISTILLED[1:], degrees=(Degrees(ring=3),)),
    "distilled-4": Case(
        variant="distilled", requests=_DISTILLED, degrees=(Degrees(ring=2, ulysses=2), Degrees(ring=4))
    ),
    "guided-2": Case(
        variant="distilled",
        requests=({"guidance_scale": 3.0}, {"image": True, "seed": 9}),  # three sequences
        degrees=(Degrees(cfg=2), Degrees(ulysses=2)),
    ),
    "amplified-2": Case(
        variant="distilled",
        amplify_history=True,
        requests=_DISTILLED,
        degrees=(Degrees(ulysses=2), Degrees(ring=2)),
    ),
    "amplified-4": Case(
        variant="mid",
        amplify_history=True,
        requests=_MID[:1],
        degrees=(Degrees(cfg=2, ring=2), Degrees(ring=2, ulysses=2)),
    ),
}

Made = dict[str, tuple[Tensor, bytes]]


def make_videos(checkpoint: Path, case: Case, mesh: Mesh) -> Made:
    """The last chunk of each request, and its generator's state after it."""
    model = load_model(ModelConfig(model=str(checkpoint)))
    encoder = EncoderWorker(model.text_encoder, model.vae)
    runner = Runner(model.transformer, model.rules, mesh=mesh)
    made: Made = {}
    requests = {str(index): _request(str(index), options) for index, options in enumerate(case.requests)}
    encoded = {name: encoder.encode(request) for name, request in requests.items()}
    trails: dict[str, list[Tensor]] = {name: [] for name in requests}
    states = {name: each.generator_state for name, each in encoded.items()}
    waiting = list(requests)
    while waiting or runner.active:
        for name in waiting:
            conditioning, trail = encoded[name].conditioning, trails[name]
            history = conditioning.history.followed_by(trail, trail[0] if trail else None)
            runner.join(conditioning.chunk_input(name, name, len(trail), history, states[name]))
        waiting = []
        result = runner.step()
        assert not result.failed
        for chunk in result.finished:
            name = chunk.task_id
            trails[name].append(chunk.latents)
            states[name] = chunk.generator_state
            if len(trails[name]) < requests[name].params.num_chunks:
                waiting.append(name)
            else:
                made[name] = (chunk.latents, chunk.generator_state)
    return made


def _request(name: str, options: dict[str, object]) -> VideoRequest:
    fields: dict[str, object] = {"width": 64, "height": 64, "num_frames": 33, "fps": 24, "seed": 1}
    fields |= {"steps": (1, 1, 1), "guidance_scale": 1.0}
    chosen = {**fields, **options}
    has_image = chosen.pop("image", False)
    params = SamplingParams(**chosen)  # type: ignore[arg-type]
    pixels = bytes(index * 7 % 251 for index in range(params.height * params.width * 3))
    return VideoRequest(
        request_id=name,
        prompts=(PromptChange(chunk=0, prompt=f"a fox {name}"),),
        params=params,
        negative_prompt="blurry",
        image=Frames(data=pixels, num_frames=1, height=params.height, width=params.width) if has_image else None,
    )


def _make_each(ranks: RankGroup, end: Connection, *, checkpoint: Path, case: Case) -> None:
    for degrees in case.degrees:
        made = make_videos(checkpoint, case, build_mesh(ranks, degrees))
        end.send({name: (latents.numpy(), state) for name, (latents, state) in made.items()})


def assert_same(made: Made, expected: Made) -> None:
    """Within the limits of a whole video; generators to the bit."""
    assert made.keys() == expected.keys()
    for name, (right, right_state) in expected.items():
        latents, state = made[name]
        assert state == right_state
        difference = (latents - right).double()
        assert difference.abs().max() <= MAX_ABS
        assert difference.norm() / right.double().norm() <= MAX_RELATIVE


@pytest.mark.parametrize("name", list(CASES))
def test_a_video_does_not_depend_on_the_degree(name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    case = CASES[name]
    checkpoint = make_checkpoint(case.variant, amplify_history=case.amplify_history)
    expected = make_videos(checkpoint, case, SOLO)
    size = case.degrees[0].num_ranks
    answers = run_ranks(size, tmp_path, partial(_make_each, checkpoint=checkpoint, case=case))
    for degree in zip(*answers, strict=True):
        first, *others = [_tensors(made) for made in degree]
        assert_same(first, expected)
        for other in others:
            for request in expected:
                assert torch.equal(other[request][0], first[request][0])  # bit-identical on all ranks
                assert other[request][1] == first[request][1]


def _tensors(made: object) -> Made:
    assert isinstance(made, dict)
    return {name: (torch.from_numpy(latents), state) for name, (latents, state) in made.items()}
