"""The runtime asks for no forward that this package's own engine would not do, and for none after a cancel."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from helios_serve.model_executor.packing import PackedBatch
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.types import Variant
from tests.conftest import MakeCheckpoint
from tests.runtimes.in_vllm.conftest import Frames, Server, StartServer
from tests.runtimes.in_vllm.omni import omni, sampling
from tests.runtimes.in_vllm.served import Session, open_session, play, post
from tests.runtimes.pictures import luma

LONG, FORWARDS = 1650, 300
"""Frames of a video that is not to be finished, and what it would take: 6 steps for each of 50 chunks."""
STEP_MODE = {"step_execution": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    variant: Variant
    fields: dict[str, Any]
    settings: dict[str, Any]


GUIDED = {"guidance_scale": 5.0}
CASES = {
    "guided": Case(variant="base", fields={**GUIDED, "steps": [3], "use_zero_init": False}, settings=STEP_MODE),
    "zero-init": Case(variant="base", fields={**GUIDED, "steps": [3], "use_zero_init": True}, settings={}),
    "guided pyramid": Case(variant="mid", fields={**GUIDED, "steps": [2, 1, 1]}, settings=STEP_MODE),
    "unguided": Case(variant="distilled", fields={}, settings={}),
}


@pytest.mark.parametrize("name", CASES)
def test_forwards_are_those_of_the_engine(
    name: str,
    make_checkpoint: MakeCheckpoint,
    native: Callable[..., list[Frames]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES[name]
    checkpoint = make_checkpoint(case.variant)
    sizes: list[int] = []
    forward = HeliosTransformer.forward

    def counted(transformer: HeliosTransformer, batch: PackedBatch, text: Any) -> Any:
        sizes.append(len(batch.grids))
        return forward(transformer, batch, text)

    monkeypatch.setattr(HeliosTransformer, "forward", counted)
    native(checkpoint, "a fox", num_frames=66, **case.fields)
    expected = list(sizes)
    assert expected
    with omni(checkpoint, **case.settings) as started:
        sizes.clear()
        started.generate("a fox", sampling(num_frames=66, extra_args=case.fields))
    assert sizes == expected


def _wait_for(server: Server, num_forwards: int) -> None:
    until = time.monotonic() + 120
    while server.num_forwards < num_forwards:
        assert time.monotonic() < until
        time.sleep(0.05)


def _settled(server: Server) -> int:
    """The forwards when none has come for two seconds."""
    count = -1
    while count != (now := server.num_forwards):
        count = now
        time.sleep(2)
    return count


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_job_that_is_deleted_ends_at_a_step(num_ranks: int, start_server: StartServer, tiny_distilled: Path) -> None:
    flags = () if num_ranks == 1 else ("--ulysses-degree", str(num_ranks))
    server = start_server(tiny_distilled, *flags)
    before = server.num_forwards
    fields = {"prompt": "a fox", "size": "64x64", "seed": "7", "num_frames": str(LONG)}
    job = httpx.post(f"{server.url}/v1/videos", data=fields, files={"unused": ("", b"")}, timeout=60).json()
    _wait_for(server, before + 4 * num_ranks)
    assert httpx.delete(f"{server.url}/v1/videos/{job['id']}", timeout=60).status_code == 200
    assert _settled(server) - before < num_ranks * FORWARDS / 2
    assert post(server).status_code == 200


def test_a_session_that_is_left_ends_at_a_step(streaming: Server) -> None:
    before = streaming.num_forwards
    with open_session(streaming) as socket:
        session = Session(socket=socket)
        session.start("a fox", num_frames=LONG)
        while not session.chunks:
            session.hear()
    assert _settled(streaming) - before < FORWARDS / 2
    (video,) = play(streaming, ["a dog"], num_frames=33)
    assert len(luma(video)) == 33
