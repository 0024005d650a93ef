"""Encoder and VAE workers on several real ranks: histories, pixels and segments as one process makes them; and what a
rank that fails alone does to the others."""

from __future__ import annotations

from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helios_serve.config import ModelConfig
from helios_serve.faults import NO_FAULTS, Fault, FaultPlan
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.model_executor.vae_spread import join_columns
from helios_serve.parallel.collectives import ALONE, Axis, GroupBrokenError, RankGroup
from helios_serve.types import DecodeTask, Frames, PromptChange, SamplingParams, TensorRef, VideoRequest
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.vae import VaeWorker
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")
EXACT = 1e-5
WIDTHS = (64, 88)  # 8 and 11 latent columns


def request(name: str, *, num_given: int = 0, width: int = 64) -> VideoRequest:
    """t2v, i2v of one frame or v2v of more."""
    params = SamplingParams(
        width=width, height=64, num_frames=40, fps=24, seed=3, steps=(1, 1, 1), guidance_scale=1.0, crf=18
    )
    data = bytes(i * 7 % 251 for i in range(num_given * 64 * width * 3))
    media = Frames(data=data, num_frames=num_given, height=64, width=width)
    return VideoRequest(
        request_id=name,
        prompts=(PromptChange(chunk=0, prompt=name),),
        params=params,
        image=media if num_given == 1 else None,
        video=media if num_given > 1 else None,
    )


REQUESTS = (request("image", num_given=1, width=88), request("video", num_given=34), request("text"))


def latents_of(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(16, 9, 8, width // 8, generator=generator)


def decode_task(width: int, chunk: int = 0) -> DecodeTask:
    video = request(f"decoded-{width}", width=width)
    return DecodeTask(
        task_id=f"{width}/d{chunk}",
        request_id=video.request_id,
        chunk=chunk,
        params=video.params,
        latents=TensorRef(key="-"),
        is_due=False,
    )


Made = tuple[list[object], list[object]]


def work(model: HeliosModel, axis: Axis, rank: int) -> Made:
    """Of each request its history and generator; of each width the pixels, and on rank 0 the segment of chunk 1, which
    has seven frames. The segments in float64: a float32 that is rounded otherwise may become another byte."""
    encoder, vae = EncoderWorker(model.text_encoder, model.vae, axis=axis), VaeWorker(model.vae, axis=axis)
    encoded: list[object] = []
    for each in REQUESTS:
        result = encoder.encode(each)
        history = result.conditioning.history
        first = () if history.first is None else (history.first.numpy(),)
        encoded.append((history.frames.numpy(), *first, result.generator_state))
    decoded: list[object] = [vae.decode(latents_of(width)).numpy() for width in WIDTHS]
    model.vae.to(torch.float64)
    precise = VaeWorker(model.vae, axis=axis)
    for width in WIDTHS:
        task, latents = decode_task(width, 1), latents_of(width)
        if rank == 0:
            decoded.append(precise.run(task, latents).segment.media)
        else:
            precise.help_decode(task, latents)
    return encoded, decoded


def _rank(ranks: RankGroup, end: Connection, *, checkpoint: Path) -> None:
    model = load_model(ModelConfig(model=str(checkpoint)))
    end.send(work(model, join_columns(ranks, CPU), ranks.rank))


@pytest.mark.parametrize("size", [2, 4])
def test_workers_of_several_ranks_make_what_one_makes(size: int, tiny_distilled: Path, tmp_path: Path) -> None:
    expected_encoded, expected_decoded = work(load_model(ModelConfig(model=str(tiny_distilled))), ALONE, 0)
    answers = run_ranks(size, tmp_path, partial(_rank, checkpoint=tiny_distilled))
    for rank, ((encoded, decoded),) in enumerate(answers):  # type: ignore[misc]
        for ours, right in zip(encoded, expected_encoded, strict=True):
            assert ours[-1] == right[-1]  # what is drawn does not depend on ranks
            for tensor, other in zip(ours[:-1], right[:-1], strict=True):
                assert_close(tensor, other)
        for pixels, right_pixels in zip(decoded[: len(WIDTHS)], expected_decoded, strict=False):
            assert_close(pixels, right_pixels)
        assert decoded[len(WIDTHS) :] == (expected_decoded[len(WIDTHS) :] if rank == 0 else [])


def assert_close(ours: object, right: object) -> None:
    assert isinstance(ours, np.ndarray)
    assert isinstance(right, np.ndarray)
    assert ours.shape == right.shape
    assert np.abs(ours - right).max() < EXACT


def _narrow(ranks: RankGroup, end: Connection, *, checkpoint: Path) -> None:
    vae = VaeWorker(load_model(ModelConfig(model=str(checkpoint))).vae, axis=join_columns(ranks, CPU))
    end.send(vae.decode(latents_of(24)).numpy())


def test_a_picture_of_fewer_columns_than_ranks_is_decoded_by_each(tiny_distilled: Path, tmp_path: Path) -> None:
    vae = VaeWorker(load_model(ModelConfig(model=str(tiny_distilled))).vae)
    expected = vae.decode(latents_of(24)).numpy()
    for (found,) in run_ranks(4, tmp_path, partial(_narrow, checkpoint=tiny_distilled)):
        assert isinstance(found, np.ndarray)
        assert (found == expected).all()


def _one_fails(ranks: RankGroup, end: Connection, *, checkpoint: Path) -> None:
    error = torch.OutOfMemoryError("no room, says a test")
    no_room = FaultPlan(Fault(point="vae.decode", action="raise", error=error))
    model = load_model(ModelConfig(model=str(checkpoint)))
    vae = VaeWorker(model.vae, no_room if ranks.rank == 1 else NO_FAULTS, join_columns(ranks, CPU))
    with pytest.raises(GroupBrokenError) as broken:
        vae.help_decode(decode_task(64), latents_of(64))
    end.send(str(broken.value))


def test_a_rank_without_memory_does_not_begin_again_alone(tiny_distilled: Path, tmp_path: Path) -> None:
    """One time-out for the other, which waits in an exchange."""
    ((waited,), (failed,)) = run_ranks(2, tmp_path, partial(_one_fails, checkpoint=tiny_distilled), timeout_s=3.0)
    assert failed == "work shared by 2 ranks was not finished: no room, says a test"
    assert isinstance(waited, str)
    assert waited.startswith("work shared by 2 ranks was not finished: ")
