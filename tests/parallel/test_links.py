"""Which link joins the ranks of a node, by what torch says of its GPUs, and what it changes in the choice of
degrees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helios_serve.bench.rank_work import degrees_of
from helios_serve.config import GivenDegrees
from helios_serve.errors import InvalidRequestError
from helios_serve.parallel.links import (
    ASSUMED_LINKS,
    GLOO,
    HOST,
    NETWORK,
    PCIE,
    UNASKED,
    UNSEEN,
    Link,
    Links,
    TorchGpus,
    find_links,
    slowest_link,
)
from helios_serve.parallel.mesh import Degrees, choose_degrees, possible_degrees, seconds_per_row_byte
from tests.parallel.fake_gpus import FakeGpus

HEADS = 40
HOPPER = FakeGpus(count=8, nvlinks_each=18)


def speed(link: Link) -> float:
    assert link.gb_per_s is not None
    return link.gb_per_s


@pytest.mark.parametrize(
    ("gpus", "name", "gb_per_s"),
    [
        (HOPPER, "NVLink, 18 of them", 300),
        (FakeGpus(count=8, nvlinks_each=12), "NVLink, 12 of them", 200),  # A100
        (FakeGpus(count=8, nvlinks_each=18, gb_per_s=50.0), "NVLink, 18 of them", 600),  # B200
        (FakeGpus(count=4), PCIE.name, 25),
        (FakeGpus(count=4, nvlinks_each=None), UNASKED.name, 300),
    ],
)
def test_what_joins_gpus(gpus: FakeGpus, name: str, gb_per_s: float) -> None:
    link = slowest_link(gpus, gpus.count)
    assert link.name == name
    assert link.gb_per_s == pytest.approx(gb_per_s)


def test_the_slowest_pair_counts() -> None:
    bridged = FakeGpus(count=4, between={(0, 1): 12, (2, 3): 12})
    assert slowest_link(bridged, 2).name == "NVLink, 12 of them"
    assert slowest_link(bridged, 4) == PCIE
    assert slowest_link(replace(HOPPER, apart=frozenset({(6, 7)})), 8) == HOST
    assert slowest_link(replace(HOPPER, apart=frozenset({(6, 7)})), 6).name == "NVLink, 18 of them"


def test_gpus_that_are_not_seen_are_assumed_to_be_joined_by_nvlink() -> None:
    """A server on a node without GPUs, or a rank that sees its own alone."""
    assert slowest_link(FakeGpus(count=1), 8) == slowest_link(FakeGpus(count=0), 2) == UNSEEN
    assert "assumed" in str(UNSEEN)


def test_a_cpu_says_that_it_does_not_know() -> None:
    links = find_links("cpu", 4)
    assert links == Links(inside=GLOO, across=GLOO)
    assert str(links.inside) == "gloo, link speed not known"
    assert links.is_slower_across


def test_seconds_are_rows_over_the_link_that_carries_them() -> None:
    """Ulysses 8 inside a node and a ring of two between nodes, at 300 and 45 GB/s."""
    found = seconds_per_row_byte(Degrees(ring=2, ulysses=8), 8, ASSUMED_LINKS)
    assert found == pytest.approx(3.5 / 300e9 + 2 / 45e9)
    assert seconds_per_row_byte(Degrees(ulysses=8), 8, ASSUMED_LINKS) == pytest.approx(3.5 / 300e9)
    assert seconds_per_row_byte(Degrees(ulysses=8), 4, ASSUMED_LINKS) == pytest.approx(3.5 / 45e9)


@pytest.mark.parametrize("inside", [HOST, PCIE, UNSEEN, GLOO])
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 6, 8])
def test_on_one_node_the_order_is_that_of_the_bytes(inside: Link, num_ranks: int) -> None:
    links = Links(inside=inside, across=NETWORK)
    chosen = choose_degrees(num_ranks, HEADS, num_ranks, is_guided=False, links=links)
    ways = [each for each in possible_degrees(num_ranks, HEADS) if each.cfg == 1]
    assert chosen.rows_sent == min(each.rows_sent for each in ways)


def test_ulysses_leaves_its_node_only_for_a_link_that_is_as_fast() -> None:
    rack = Links(inside=UNSEEN, across=UNSEEN)
    assert choose_degrees(8, HEADS, 4, is_guided=False, links=rack) == Degrees(ulysses=8)
    assert choose_degrees(8, HEADS, 4, is_guided=False) == Degrees(ring=2, ulysses=4)
    unknown = Links(inside=GLOO, across=GLOO)
    assert choose_degrees(8, HEADS, 4, is_guided=False, links=unknown) == Degrees(ring=2, ulysses=4)


def test_the_benchmarks_take_numbers_and_auto() -> None:
    assert degrees_of("auto", "2", "auto") == GivenDegrees(ring=2)
    with pytest.raises(InvalidRequestError, match="ulysses two: must be a whole number or auto"):
        degrees_of("auto", "auto", "two")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_torch_knows_the_links_of_two_gpus() -> None:
    link = find_links("cuda", 2).inside
    assert link != UNSEEN
    assert speed(link) > 0
    assert TorchGpus().count >= 2
