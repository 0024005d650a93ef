"""Degrees that are refused, degrees that are chosen, and where each rank stands."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from helios_serve.config import GivenDegrees
from helios_serve.parallel.collectives import RankGroup
from helios_serve.parallel.mesh import SOLO, Degrees, build_mesh, choose_degrees, possible_degrees
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


@pytest.mark.parametrize("is_guided", [False, True])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (GivenDegrees(ring=2, ulysses=4), Degrees(ring=2, ulysses=4)),
        (GivenDegrees(cfg=1, ulysses=4), Degrees(ring=2, ulysses=4)),
        (GivenDegrees(cfg=2), Degrees(cfg=2, ulysses=4)),
        (GivenDegrees(cfg=2, ulysses=2), Degrees(cfg=2, ring=2, ulysses=2)),
        (GivenDegrees(ring=8), Degrees(ring=8)),
        (GivenDegrees(ulysses=8), Degrees(ulysses=8)),
    ],
)
def test_what_is_given_is_kept(given: GivenDegrees, expected: Degrees, is_guided: bool) -> None:
    assert choose_degrees(8, HEADS, 8, is_guided=is_guided, given=given) == expected


def test_what_is_not_given_depends_on_guidance() -> None:
    given = GivenDegrees(ring=2)
    assert choose_degrees(8, HEADS, 8, is_guided=False, given=given) == Degrees(ring=2, ulysses=4)
    assert choose_degrees(8, HEADS, 8, is_guided=True, given=given) == Degrees(cfg=2, ring=2, ulysses=2)


@pytest.mark.parametrize(
    ("num_ranks", "given", "said"),
    [
        (6, GivenDegrees(ulysses=6), "ulysses 6: do not fit 6 ranks and 40 heads"),
        (4, GivenDegrees(ring=4, ulysses=2), "ring 4, ulysses 2: do not fit 4 ranks and 40 heads"),
        (3, GivenDegrees(cfg=2), "cfg 2: do not fit 3 ranks and 40 heads"),
    ],
)
def test_degrees_that_do_not_fit_are_answered_with_those_that_do(
    num_ranks: int, given: GivenDegrees, said: str
) -> None:
    with pytest.raises(ValueError, match=f"^{said}; what fits: ") as refusal:
        choose_degrees(num_ranks, HEADS, 8, is_guided=True, given=given)
    named = str(refusal.value).partition("what fits: ")[2].split("; ")
    assert named == [str(degrees) for degrees in possible_degrees(num_ranks, HEADS)]
    assert f"cfg 1 x ring {num_ranks} x ulysses 1" in named


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
