"""A VAE worker of two real ranks, driven by hand: tasks that reach them in different orders, several at a time, come
out as one rank makes them."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from helios_serve.config import FREE_DEGREES, ModelConfig
from helios_serve.faults import NO_FAULTS
from helios_serve.model_executor.model import load_vae, open_checkpoint
from helios_serve.parallel.collectives import RankGroup
from helios_serve.types import Decoded, DecodeTask, TensorRef
from helios_serve.workers.payload import Payload, pack
from helios_serve.workers.ray_wire import HostSpec
from helios_serve.workers.vae import VaeWorker
from helios_serve.workers.vae_host import VaeHost
from tests.parallel.ranks import run_ranks
from tests.workers.chunks import request

WIDTHS = {"narrow": 64, "wide": 96, "again": 64, "late": 96, "last": 64}
"""Of each task; equal ones are of equal latents, and must give equal bytes."""
FEW = 1e-3


def task(name: str) -> DecodeTask:
    video = request(name, num_frames=66, width=WIDTHS[name])
    latents = TensorRef(key=f"latents-{WIDTHS[name]}")
    params = replace(video.params, num_frames=40)  # of the chunk, seven frames
    return DecodeTask(task_id=name, request_id=name, chunk=1, params=params, latents=latents, is_due=False)


def latents_of(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(16, 9, 8, width // 8, generator=generator)


def fetch(ref: TensorRef) -> Payload:
    return pack(latents_of(int(ref.key.partition("-")[2])))


def _host(ranks: RankGroup, end: Connection, *, checkpoint: Path, folder: Path) -> None:
    ranks.close()  # a host meets the others itself
    model = ModelConfig(model=str(checkpoint))
    spec = HostSpec(
        model=model,
        group="vae-0",
        role="vae",
        rank=ranks.rank,
        num_ranks=ranks.size,
        degrees=FREE_DEGREES,
        num_threads=1,
        cache_bytes=0,
        faults=NO_FAULTS,
    )
    host = VaeHost(spec, open_checkpoint(model), f"file://{folder}/hosts")
    host.start()
    names = random.Random(ranks.rank).sample(list(WIDTHS), len(WIDTHS))
    with ThreadPoolExecutor(len(names)) as pool:
        answers = dict(zip(names, pool.map(lambda name: host.run(task(name), fetch, "key")[0], names), strict=True))
    end.send((names, answers, host.progress, host.task_ids))
    if ranks.rank > 0:
        with suppress(RuntimeError):
            host.join()  # until rank 0 leaves


Answers = Mapping[str, Decoded]


@pytest.fixture(scope="module")
def answers(tiny_distilled: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Rank 0's."""
    folder = tmp_path_factory.mktemp("vae")
    body = partial(_host, checkpoint=tiny_distilled, folder=folder)
    (names, found, progress, running), (other_names, others, _, _) = (each[0] for each in run_ranks(2, folder, body))  # type: ignore[misc]
    assert names != other_names
    assert set(others.values()) == {None}
    assert (progress, running) == (len(WIDTHS), ())
    made: dict[str, Decoded] = found
    return made


def test_each_task_is_answered_with_its_own_pictures(answers: Answers, tiny_distilled: Path) -> None:
    vae = VaeWorker(load_vae(open_checkpoint(ModelConfig(model=str(tiny_distilled)))))
    for name, width in WIDTHS.items():
        alone = vae.run(task(name), latents_of(width))
        found = answers[name]
        assert (found.task_id, found.latents_digest) == (name, alone.latents_digest)
        assert [phase.name for phase in found.phases] == ["decode", "mux"]
        assert found.segment.init == alone.segment.init
        difference = np.abs(pictures(found) - pictures(alone))
        assert (difference > 2).mean() < FEW  # a byte that was rounded otherwise, after compression


def test_equal_latents_give_equal_bytes(answers: Answers) -> None:
    for width in (64, 96):
        same = {answers[name].segment.media for name, each in WIDTHS.items() if each == width}
        assert len(same) == 1


def pictures(answer: Decoded) -> np.ndarray:  # type: ignore[type-arg]
    """[T, H, W, 3] int16."""
    with av.open(io.BytesIO(answer.segment.init + answer.segment.media)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(np.int16)
