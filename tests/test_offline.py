"""The library call: chunks as they are done, errors before work, and flat memory over a long video."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import helios_serve
from helios_serve.errors import CheckpointError, InvalidRequestError
from helios_serve.offline import Helios, VideoChunk

FRAME_BYTES = 64 * 64 * 3 * 4
"""One float32 frame of the videos below; a frame of latents is 4 KiB, a chunk of them 36 KiB."""

SMALL: dict[str, Any] = {"size": "64x64", "steps": [1, 1, 1], "seed": 1}


@pytest.fixture(scope="module")
def helios(tiny_distilled: Path) -> Helios:
    return Helios(tiny_distilled)


def test_the_package_offers_helios() -> None:
    assert helios_serve.Helios is Helios
    with pytest.raises(AttributeError, match="Helio_"):
        _ = helios_serve.Helio_


def test_chunks_come_as_they_are_done(helios: Helios) -> None:
    made = []
    for chunk in helios.generate("a fox", num_frames=80, **SMALL):
        assert helios._runner.active == ()
        made.append(chunk)
    assert [chunk.index for chunk in made] == [0, 1, 2]
    assert [chunk.start_frame for chunk in made] == [0, 33, 66]
    assert [tuple(chunk.frames.shape) for chunk in made] == [(33, 64, 64, 3), (33, 64, 64, 3), (14, 64, 64, 3)]
    assert {chunk.frames.dtype for chunk in made} == {np.dtype(np.uint8)}
    assert [tuple(chunk.pixels.shape) for chunk in made] == [(33, 3, 64, 64), (33, 3, 64, 64), (14, 3, 64, 64)]
    assert {tuple(chunk.latents.shape) for chunk in made} == {(16, 9, 8, 8)}
    assert all(chunk.pixels.dtype == torch.float32 and chunk.pixels.abs().max() <= 1 for chunk in made)
    expected = ((made[0].pixels * 0.5 + 0.5) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(made[0].frames - expected).max() <= 0.5 + 1e-3


def test_the_same_call_is_bit_identical_and_another_seed_is_not(helios: Helios) -> None:
    one, same, other = (
        torch.cat([chunk.latents for chunk in helios.generate("a fox", num_frames=66, **{**SMALL, "seed": seed})])
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert (one - other).abs().max() > 1e-2


def test_an_image_and_a_video_are_files(helios: Helios, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "first.png")
    np.save(tmp_path / "clip.npy", pixels)
    results = [
        next(helios.generate("a fox", num_frames=33, **SMALL, **media)).latents
        for media in ({}, {"image": str(tmp_path / "first.png")}, {"video": str(tmp_path / "clip.npy")})
    ]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[1], results[2])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "p", "colour": "red"}, "colour"),
        ({"prompt": "p", "size": "65x64"}, "size"),
        ({"prompt": "p", "num_frames": 0}, "num_frames"),
        ({"prompt": "p", "steps": [1]}, "steps"),
        ({"prompt": "p", "image": "/no/such.png"}, "image"),
        ({}, "prompt"),
    ],
)
def test_a_bad_field_is_refused_before_anything_is_made(helios: Helios, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        helios.generate(**fields)
    assert refused.value.param == param


def test_a_missing_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Helios(tmp_path / "nowhere")


def test_closing_the_iterator_frees_the_runner(helios: Helios) -> None:
    steps = []
    request = helios.parse({"prompt": "p", "num_frames": 99, **SMALL}).request
    chunks = helios.run(request, steps.append)
    next(chunks)
    chunks.close()
    assert len(steps) == 6  # a Distilled checkpoint amplifies the first chunk by default
    assert helios._runner.active == ()


def test_a_failed_step_is_raised_and_frees_the_runner(helios: Helios, monkeypatch: pytest.MonkeyPatch) -> None:
    from helios_serve.model_executor.batch import ChunkState

    with monkeypatch.context() as patch:
        patch.setattr(ChunkState, "advance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(helios.generate("p", num_frames=33, **SMALL))
    assert helios._runner.active == ()
    assert next(helios.generate("p", num_frames=33, **SMALL)).index == 0


# Memory


def tensor_bytes() -> int:
    """Bytes of all storages that a living tensor reaches, without those from before `measured_memory`."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


class _Allocations(TorchDispatchMode):
    """Follows every storage that an operation makes; `peak_bytes` is the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._num_bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **({} if kwargs is None else kwargs))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor):
                self._note(item.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        known = self._live.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._num_bytes += storage.nbytes()
        if self._num_bytes > self.peak_bytes:  # without the dead, it may not be a new peak
            self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}
            self._num_bytes = sum(num_bytes for _, num_bytes in self._live.values())
            self.peak_bytes = max(self.peak_bytes, self._num_bytes)


@contextmanager
def measured_memory() -> Iterator[None]:
    """Traces Python's memory, and keeps what is there already out of the collector's way."""
    gc.collect()
    gc.freeze()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()
        gc.unfreeze()


class Meter:
    """Memory after each chunk, and the most that was live while it was made."""

    def __init__(self) -> None:
        self.tensors: list[int] = []
        self.python: list[int] = []
        self.peaks: list[int] = []

    def run(self, chunks: Iterator[VideoChunk], *, keep: bool = False) -> None:
        """Consumes a video; `keep` does what must not happen inside."""
        kept = []
        done = False
        while not done:
            with _Allocations() as allocations:
                chunk = next(chunks, None)
            if chunk is None:
                done = True
                continue
            if keep:
                kept.append(chunk.latents)
            self.peaks.append(allocations.peak_bytes)
            del chunk, allocations
            self.tensors.append(tensor_bytes())
            self.python.append(tracemalloc.get_traced_memory()[0])


def test_a_long_video_holds_memory_flat(helios: Helios) -> None:
    meter = Meter()
    with measured_memory():
        meter.run(helios.generate("a fox", num_frames=20 * 33, **SMALL))
    assert len(meter.tensors) == 20
    latent_frame_bytes = 8 * 8 * 16 * 4  # from chunk 3 on, the last three chunks are held, and the pinned one
    assert max(meter.tensors[4:]) - meter.tensors[3] < latent_frame_bytes
    assert max(meter.peaks[5:]) - meter.peaks[4] < latent_frame_bytes
    assert max(meter.python[4:]) - meter.python[3] < FRAME_BYTES
    assert meter.peaks[4] > 33 * FRAME_BYTES


def test_the_meter_sees_latents_that_somebody_keeps(helios: Helios) -> None:
    meter = Meter()
    with measured_memory():
        meter.run(helios.generate("a fox", num_frames=6 * 33, **SMALL), keep=True)
    assert meter.tensors[5] - meter.tensors[3] >= 2 * 9 * 8 * 8 * 16 * 4
