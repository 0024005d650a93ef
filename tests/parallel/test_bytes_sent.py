"""What one layer of the 14B model sends, counted on tensors without memory, against the closed form and against the
published table of the performance specification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from helios_serve import kernels
from helios_serve.kernels import Segments, attention_scale
from helios_serve.parallel.collectives import Transfer
from helios_serve.parallel.context_parallel import attend_sharded, spread_segments
from helios_serve.parallel.mesh import Degrees, Mesh, possible_degrees
from helios_serve.parallel.shards import Lengths, gather, shard
from tests.parallel.counted import CountedAxis, counted_mesh, sent_by

HEADS, HEAD_DIM = 40, 128
DIM = HEADS * HEAD_DIM
NUM_HISTORY = 2400
NOISY = (540, 2160, 8640)
"""Current tokens of 9 latent frames at 640x384, by stage."""
META = torch.device("meta")


def one_layer(mesh: Mesh, lengths: Lengths) -> None:
    shards = shard(lengths, mesh.tokens.size)
    shape = (shards.num_rows(0), HEADS, HEAD_DIM)
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device=META) for _ in range(3))
    cu = shards.cu_rows(0, mesh.tokens.size)
    segments = Segments(cu_q=cu, cu_k=cu, scale=attention_scale(HEAD_DIM))
    out = attend_sharded(q, k, v, spread_segments(segments, shards, shards, mesh, META))
    assert out.shape == q.shape


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_ulysses_is_two_exchanges(degree: int, stage: int) -> None:
    mesh = counted_mesh(Degrees(ulysses=degree))
    one_layer(mesh, ((NUM_HISTORY, NOISY[stage]),))
    rows = -(-(NUM_HISTORY + NOISY[stage]) // degree)
    each = 2 * rows * DIM * (degree - 1) // degree  # one bf16 tensor
    assert sent_by(mesh.ulysses) == [3 * each, each]
    assert sent_by(mesh.ring) == []


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_a_ring_turns_once_less_than_it_has_ranks(degree: int, stage: int) -> None:
    mesh = counted_mesh(Degrees(ring=degree))
    one_layer(mesh, ((NUM_HISTORY, NOISY[stage]),))
    rows = -(-(NUM_HISTORY + NOISY[stage]) // degree)
    assert sent_by(mesh.ring) == [2 * 2 * rows * DIM] * (degree - 1)
    assert sent_by(mesh.ulysses) == []


@pytest.mark.parametrize(
    ("degree", "stage", "rows", "ulysses_mb", "ring_mb"),
    [
        (2, 2, 5520, 113.0, 113.0),
        (4, 2, 2760, 84.8, 169.6),
        (8, 0, 368, 13.2, 52.8),
        (8, 1, 570, 20.4, 81.7),
        (8, 2, 1380, 49.5, 197.8),
    ],
)
def test_bytes_are_those_of_the_table(degree: int, stage: int, rows: int, ulysses_mb: float, ring_mb: float) -> None:
    lengths = ((NUM_HISTORY, NOISY[stage]),)
    assert shard(lengths, degree).max_rows == rows
    by_ulysses, by_ring = counted_mesh(Degrees(ulysses=degree)), counted_mesh(Degrees(ring=degree))
    one_layer(by_ulysses, lengths)
    one_layer(by_ring, lengths)
    assert sum(sent_by(by_ulysses.ulysses)) / 1e6 == pytest.approx(ulysses_mb, abs=0.06)
    assert sum(sent_by(by_ring.ring)) / 1e6 == pytest.approx(ring_mb, abs=0.06)


def test_the_next_block_travels_while_this_one_is_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    attend, rotate = kernels.attend, CountedAxis.rotate

    def noted_attend(*given: Any) -> Any:
        happened.append("attend")
        return attend(*given)

    def noted_rotate(*given: Any) -> Transfer:
        happened.append("send")
        return rotate(*given)

    monkeypatch.setattr(kernels, "attend", noted_attend)
    monkeypatch.setattr(CountedAxis, "rotate", noted_rotate)
    monkeypatch.setattr(Transfer, "wait", lambda _: happened.append("wait"))
    one_layer(counted_mesh(Degrees(ring=3)), ((NUM_HISTORY, NOISY[0]),))
    assert happened == [*["send", "attend", "wait"] * 2, "attend"]


def test_heads_travel_while_others_are_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    attend, begin = kernels.attend, CountedAxis.begin_all_to_all

    def noted_attend(*args: Any) -> Any:
        happened.append(f"attend to {args[0].shape[1]}")
        return attend(*args)

    def noted_begin(*args: Any) -> Transfer:
        happened.append("send")
        return begin(*args)

    monkeypatch.setattr(kernels, "attend", noted_attend)
    monkeypatch.setattr(CountedAxis, "begin_all_to_all", noted_begin)
    monkeypatch.setattr(Transfer, "wait", lambda _: happened.append("wait"))
    mesh = replace(counted_mesh(Degrees(ulysses=8)), num_head_groups=2)
    one_layer(mesh, ((NUM_HISTORY, NOISY[0]),))
    first, second = (["wait", f"attend to {count}", "send"] for count in (2, 3))
    assert happened == ["send", "send", *first, *second, "wait", "wait"]
    assert sum(sent_by(mesh.ulysses)) == 4 * 2 * 368 * DIM * 7 // 8  # as many bytes as at once


def test_across_two_nodes_only_keys_and_values_of_own_heads_travel() -> None:
    mesh = counted_mesh(Degrees(ring=2, ulysses=8))
    one_layer(mesh, ((NUM_HISTORY, NOISY[2]),))
    rows = (NUM_HISTORY + NOISY[2]) // 16
    assert sum(sent_by(mesh.ulysses)) == 4 * 2 * rows * DIM * 7 // 8
    assert sent_by(mesh.ring) == [2 * 2 * 8 * rows * DIM // 8]


@pytest.mark.parametrize("degrees", [d for p in (1, 2, 4, 8, 16, 24) for d in possible_degrees(p, HEADS)], ids=str)
def test_degrees_are_chosen_by_what_is_sent(degrees: Degrees) -> None:
    num_rows = 120
    mesh = counted_mesh(degrees)
    one_layer(mesh, ((num_rows * degrees.ring * degrees.ulysses, 0),))
    sent = sum(sent_by(mesh.ulysses)) + sum(sent_by(mesh.ring))
    assert sent == degrees.rows_sent * num_rows * 2 * DIM


def test_a_pack_sends_no_more_than_its_sequences() -> None:
    pack: Lengths = tuple((NUM_HISTORY, NOISY[0]) for _ in range(4))
    mesh = counted_mesh(Degrees(ulysses=8))
    one_layer(mesh, pack)
    assert sum(sent_by(mesh.ulysses)) == 4 * 2 * (4 * (NUM_HISTORY + NOISY[0]) // 8) * DIM * 7 // 8


def test_results_are_small() -> None:
    """Flows of a whole stage 2 are less than a layer's exchange."""
    shards = shard(((NOISY[2],),), 8)
    axis = CountedAxis(ranks=tuple(range(8)))
    rows = torch.empty((shards.num_rows(0), 64), dtype=torch.bfloat16, device=META)
    assert gather(rows, shards, axis).shape == (NOISY[2], 64)
    assert axis.sent == [NOISY[2] // 8 * 64 * 2 * 7]
