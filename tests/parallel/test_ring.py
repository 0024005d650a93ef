"""One rank of a ring whose other ranks are tensors at hand: roundings, and sequences that are not everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from helios_serve import kernels
from helios_serve.kernels import Segments
from helios_serve.parallel.collectives import Axis, Transfer
from helios_serve.parallel.ring import ring_attend

HEADS, HEAD_DIM = 4, 16
SCALE = kernels.attention_scale(HEAD_DIM)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedAxis(Axis):
    """What this rank receives in each turn stands ready; what it sends is not looked at."""

    arriving: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    def rotate(self, sent: Tensor, received: Tensor) -> Transfer:
        keys, values = self.arriving.pop(0)
        received.fill_(torch.nan)
        received[0, : len(keys)], received[1, : len(values)] = keys, values
        return Transfer()


def attend_in_ring(q: Tensor, parts: list[tuple[Tensor, Tensor]], cus: list[tuple[int, ...]]) -> Tensor:
    """As rank 0 of a ring of `parts`; queries and the keys of each part are packed as `cus` says."""
    size = len(parts)
    axis = StagedAxis(ranks=tuple(range(size)), arriving=[parts[-turn] for turn in range(1, size)])
    blocks = tuple(Segments(cu_q=cus[0], cu_k=cu, scale=SCALE) for cu in cus)
    return ring_attend(q, *parts[0], blocks, axis)


def draw(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, HEADS, HEAD_DIM, dtype=torch.float64).to(dtype)


def test_parts_are_rounded_once_at_the_end() -> None:
    """In bfloat16 a ring of eight is nearly as near to the truth as one rank, though each part comes in bfloat16."""
    torch.manual_seed(3)
    q, k, v = (draw(8 * 64, torch.bfloat16) for _ in range(3))
    cu = (0, len(q))
    truth, _ = kernels.attend(q.double(), k.double(), v.double(), Segments(cu_q=cu, cu_k=cu, scale=SCALE))
    alone, _ = kernels.attend(q, k, v, Segments(cu_q=cu, cu_k=cu, scale=SCALE))
    parts = list(zip(k.split(64), v.split(64), strict=True))
    segments = tuple(Segments(cu_q=cu, cu_k=(0, 64), scale=SCALE) for _ in parts)
    axis = StagedAxis(ranks=tuple(range(8)), arriving=parts[:0:-1])
    ring = ring_attend(q, *parts[0], segments, axis)
    assert ring.dtype == torch.bfloat16

    def error(out: Tensor) -> float:
        return (out.double() - truth).norm().item()

    assert error(ring) <= 1.3 * error(alone)


@pytest.mark.parametrize(
    "cus",
    [
        [(0, 5, 9), (0, 5, 8), (0, 4, 8)],
        [(0, 5, 6), (0, 5, 5), (0, 0, 1)],  # a sequence has no keys on one rank, another none on the last but one
        [(0, 0, 4), (0, 2, 4), (0, 0, 3)],  # and here no queries
        [(0, 0, 0), (0, 2, 4), (0, 0, 3)],  # this rank holds nothing
    ],
)
def test_short_sequences_are_not_on_every_rank(cus: list[tuple[int, ...]]) -> None:
    torch.manual_seed(4)
    q = draw(cus[0][-1], torch.float64)
    parts = [(draw(cu[-1], torch.float64), draw(cu[-1], torch.float64)) for cu in cus]
    got = attend_in_ring(q, parts, cus)
    for index in range(2):
        own = slice(cus[0][index], cus[0][index + 1])
        keys, values = (
            torch.cat([part[which][cu[index] : cu[index + 1]] for part, cu in zip(parts, cus, strict=True)])
            for which in range(2)
        )
        logits = torch.einsum("qhd,khd->hqk", q[own], keys) * SCALE
        right = torch.einsum("hqk,khd->qhd", logits.softmax(-1), values)
        torch.testing.assert_close(got[own], right, rtol=0, atol=1e-13)
