"""`Omni(checkpoint)` for tests: starts it, asks it, and says what all its processes computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from vllm_omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from tests.runtimes.in_vllm.conftest import STARTS_WITHIN_S, Frames


@contextmanager
def omni(checkpoint: Path, **settings: Any) -> Iterator[Omni]:
    patience = {"stage_init_timeout": STARTS_WITHIN_S, "init_timeout": STARTS_WITHIN_S}
    started = Omni(str(checkpoint), **{"dtype": "float32", **patience, **settings})
    try:
        yield started
    finally:
        started.close()


def sampling(**fields: Any) -> OmniDiffusionSamplingParams:
    return OmniDiffusionSamplingParams(**{"height": 64, "width": 64, "num_frames": 40, "seed": 7, **fields})


def frames_of(output: Any) -> Frames:
    """[F, H, W, 3] uint8, whatever the backend returns: its own frames, or float32 in 0 to 1."""
    frames = np.concatenate([np.asarray(part)[0] for part in output.images])
    return frames if frames.dtype == np.uint8 else np.round(frames * 255).astype(np.uint8)


def prompt_of(output: Any) -> str:
    return output.prompt if isinstance(output.prompt, str) else output.prompt["prompt"]


def worst(frames: Frames, expected: Frames) -> int:
    """The largest difference of a colour value, 0 to 255."""
    assert frames.shape == expected.shape
    return int(np.abs(frames.astype(int) - expected).max())


def forwards(folder: Path) -> list[list[int]]:
    """The sequences in each forward of each process that had any; the folder is emptied."""
    found = []
    for path in sorted(folder.iterdir()):
        found.append([int(line) for line in path.read_text().split()])
        path.unlink()
    return found
