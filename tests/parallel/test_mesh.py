"""Degrees that are refused, degrees that are chosen, and where each rank stands."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from helios_serve.parallel.collectives import RankGroup
from helios_serve.parallel.mesh import SOLO, Degrees, build_mesh, choose_degrees
from tests.parallel.ranks import run_ranks

HEADS = 40


@pytest.mark.parametrize("degree", [1, 2, 4, 5, 8, 10, 20])
def test_ulysses_takes_what_divides_the_heads(degree: int) -> None:
    Degrees(ulysses=degree).check(degree, HEADS)


@pytest.mark.parametrize("degree", [3, 6, 7, 16])
def test_ulysses_refuses_what_does_not(degree: int) -> None:
    with pytest.raises(ValueError, match=f"ulysses {degree}: must divide the 40 heads"):
        Degrees(ulysses=degree).check(degree, HEADS)
    Degrees(ring=degree).check(degree, HEADS)


def test_the_answer_says_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"with 16 ranks one of 1, 2, 4, 8, and the rest is for ring"):
        Degrees(ulysses=16).check(16, HEADS)


def test_degrees_multiply_to_the_number_of_ranks() -> None:
    with pytest.raises(ValueError, match=r"cfg 2 x ring 1 x ulysses 4 = 8: must be the number of ranks, 6"):
        Degrees(cfg=2, ulysses=4).check(6, HEADS)


@pytest.mark.parametrize(("name", "degree"), [("cfg", 3), ("cfg", 0), ("ring", 0), ("ulysses", -1)])
def test_a_degree_out_of_range_is_refused(name: str, degree: int) -> None:
    with pytest.raises(ValueError, match=f"{name} {degree}: must be"):
        Degrees(**{name: degree})


@pytest.mark.parametrize(
    ("num_ranks", "is_guided", "expected"),
    [
        (1, False, Degrees()),
        (1, True, Degrees()),
        (2, False, Degrees(ulysses=2)),
        (2, True, Degrees(cfg=2)),
        (3, True, Degrees(ring=3)),
        (4, True, Degrees(cfg=2, ulysses=2)),
        (5, False, Degrees(ulysses=5)),
        (6, False, Degrees(ring=3, ulysses=2)),
        (8, False, Degrees(ulysses=8)),
        (8, True, Degrees(cfg=2, ulysses=4)),
        (16, False, Degrees(ring=2, ulysses=8)),
        (16, True, Degrees(cfg=2, ulysses=8)),
        (20, False, Degrees(ring=5, ulysses=4)),
        (24, False, Degrees(ring=3, ulysses=8)),
    ],
)
def test_chosen_on_nodes_of_eight(num_ranks: int, is_guided: bool, expected: Degrees) -> None:
    chosen = choose_degrees(num_ranks, HEADS, 8, is_guided=is_guided)
    assert chosen == expected
    chosen.check(num_ranks, HEADS)


def test_one_rank_has_no_group() -> None:
    assert build_mesh(RankGroup(), Degrees()) is SOLO


def _where_everyone_stands(ranks: RankGroup, end: Connection) -> None:
    mesh = build_mesh(ranks, Degrees(cfg=2, ring=2, ulysses=2))
    for axis in (mesh.cfg, mesh.ring, mesh.ulysses, mesh.tokens):
        end.send((axis.rank, axis.ranks))


def test_ulysses_is_innermost(tmp_path: Path) -> None:
    for rank, (cfg, ring, ulysses, tokens) in enumerate(run_ranks(8, tmp_path, _where_everyone_stands)):
        assert cfg == (rank // 4, (rank % 4, rank % 4 + 4))
        assert ring == (rank // 2 % 2, (rank - rank // 2 % 2 * 2, rank - rank // 2 % 2 * 2 + 2))
        assert ulysses == (rank % 2, (rank - rank % 2, rank - rank % 2 + 1))
        half = rank // 4 * 4
        assert tokens == (rank % 4, tuple(range(half, half + 4)))
