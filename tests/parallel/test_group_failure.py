"""One of two ranks runs out of memory where the other cannot see it: both end, meet again, and make the same chunk; no
file and no thread of the groups before is left."""

from __future__ import annotations

import gc
import os
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helios_serve.config import GivenDegrees, ModelConfig
from helios_serve.faults import NO_FAULTS, Fault, FaultPlan
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.model_executor.runner import Runner
from helios_serve.model_executor.spread import join_mesh
from helios_serve.parallel.collectives import GroupBrokenError, RankGroup, connect
from helios_serve.parallel.mesh import Mesh
from tests.parallel.ranks import run_ranks
from tests.workers.chunks import Video, assert_close, encode, latents_of, request

FOX = request("fox")
NUM_GROUPS = 4
DEGREES = {"ulysses": GivenDegrees(ulysses=2, head_groups=2), "ring": GivenDegrees(ring=2)}


def make_chunk(model: HeliosModel, video: Video, mesh: Mesh, faults: FaultPlan = NO_FAULTS) -> Tensor:
    """The only chunk of a video, [C, 9, h, w]."""
    runner, conditioning = Runner(model.transformer, model.rules, faults=faults, mesh=mesh), video.encoded.conditioning
    history = conditioning.history.followed_by((), None)
    runner.join(conditioning.chunk_input("task", "fox", 0, history, video.encoded.generator_state))
    while not (finished := runner.step().finished):
        pass
    return finished[0].latents


def no_room() -> FaultPlan:
    """In the middle of a chunk, and not cured by an empty cache."""
    error = torch.OutOfMemoryError("no room, says a test")
    return FaultPlan(Fault(point="dit.step", action="raise", where={"step": 1}, times=99, error=error))


def _make_and_fail(ranks: RankGroup, model: HeliosModel, video: Video, degrees: str) -> tuple[object, str]:
    mesh = join_mesh(ranks, model.config, torch.device("cpu"), DEGREES[degrees])
    latents = make_chunk(model, video, mesh).numpy()
    with pytest.raises(GroupBrokenError) as broken:
        make_chunk(model, video, mesh, no_room() if ranks.rank == 1 else NO_FAULTS)
    return latents, str(broken.value)


def _fail_and_meet_again(ranks: RankGroup, end: Connection, *, checkpoint: Path, folder: Path, degrees: str) -> None:
    model = load_model(ModelConfig(model=str(checkpoint)))
    video = encode(model, FOX)
    for group in range(NUM_GROUPS):
        made = _make_and_fail(ranks, model, video, degrees)
        gc.collect()  # the error holds its frames, and they hold the mesh
        ranks.close()
        end.send((*made, _count("fd"), _count("task")))
        ranks = connect(ranks.rank, ranks.size, f"file://{folder}/meeting-{group}", ranks.timeout_s)
    ranks.broadcast(None)


def _count(kind: str) -> int:
    """Open files, or threads, of this process."""
    return len(os.listdir(f"/proc/self/{kind}"))


@pytest.mark.parametrize("degrees", list(DEGREES))
def test_ranks_meet_again_after_a_failure(degrees: str, tiny_distilled: Path, tmp_path: Path) -> None:
    body = partial(_fail_and_meet_again, checkpoint=tiny_distilled, folder=tmp_path, degrees=degrees)
    answers = run_ranks(2, tmp_path, body)
    (expected,) = latents_of(load_model(ModelConfig(model=str(tiny_distilled))), FOX)
    for answer, said in zip(answers, ("a forward over 2 ranks was not finished", "one of 2 ranks is out"), strict=True):
        latents, messages, files, threads = zip(*answer, strict=True)
        assert len(latents) == NUM_GROUPS
        for each in latents:
            assert_close(torch.from_numpy(each), expected)
            assert (each == answers[0][0][0]).all()  # to the bit what the first group made
        assert all(message.startswith(said) for message in messages)
        assert len(set(files[1:])) == len(set(threads[1:])) == 1
