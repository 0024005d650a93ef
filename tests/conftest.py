"""Tiny checkpoints made once per session, one CPU thread, and an oracle that runs on every CPU."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: tests of kernels need no GPU

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helios_serve.model_executor.tiny_checkpoint import write_tiny_checkpoint

torch.set_num_threads(1)

MakeCheckpoint = Callable[..., Path]


def block_factor() -> Tensor:
    """The Cholesky factor of the reference's 4x4 block covariance at gamma = 1/3.

    In exact arithmetic its last diagonal entry is 0; in float32 it is rounding, which LAPACK finds differently on each
    processor, or refuses. 0x1.bb67aep-12 is the definition.
    """
    exact = [[1, 0, 0, 0], [-1 / 3, (8 / 9) ** 0.5, 0, 0], [-1 / 3, -((2 / 9) ** 0.5), (2 / 3) ** 0.5, 0]]
    return torch.tensor([*exact, [-1 / 3, -((2 / 9) ** 0.5), -((2 / 3) ** 0.5), float.fromhex("0x1.bb67aep-12")]])


@pytest.fixture(scope="session", autouse=True)
def portable_block_noise() -> Iterator[None]:
    """Gives the reference the same block factor on every machine."""
    factorise = torch.linalg.cholesky

    def portable(matrix: Tensor) -> Tensor:
        is_singular = matrix.shape == (4, 4) and bool(matrix.sum().abs() < 1e-5)
        return block_factor() if is_singular else factorise(matrix)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky", portable)
        yield


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """`make_checkpoint(variant, seed=..., amplify_history=...)` -> its directory, made once for equal arguments.

    Read-only: a test that changes a checkpoint copies it first.
    """
    made: dict[object, Path] = {}

    def make(variant: str, **options: object) -> Path:
        key = (variant, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint") / variant
            write_tiny_checkpoint(variant, made[key], **options)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_base(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("base")


@pytest.fixture(scope="session")
def tiny_mid(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("mid")


@pytest.fixture(scope="session")
def tiny_distilled(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("distilled")
