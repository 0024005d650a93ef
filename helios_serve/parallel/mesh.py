"""How the ranks of a DiT group share a forward: pairs of guidance x ring x Ulysses.

Knows degrees, heads, nodes and links; knows nothing of tokens. Ranks are counted with Ulysses innermost, so that its
exchanges stay inside a node and only the ring crosses to another one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from helios_serve.config import FREE_DEGREES, GivenDegrees
from helios_serve.parallel.collectives import ALONE, Axis, RankGroup, make_axis
from helios_serve.parallel.links import ASSUMED_LINKS, Link, Links

CFG_DEGREES = (1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """Along each axis, over how many ranks a forward is shared.

    cfg: 2 gives the sequences of a pack, of which guidance makes two, to two halves of the group. ring: keys and values
    go around between so many ranks. ulysses: so many ranks exchange tokens for heads.
    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        if self.cfg not in CFG_DEGREES:
            raise ValueError(f"cfg {self.cfg}: must be 1 or 2, as guidance has two sequences")
        for name, degree in (("ring", self.ring), ("ulysses", self.ulysses)):
            if degree < 1:
                raise ValueError(f"{name} {degree}: must be at least 1")

    @property
    def num_ranks(self) -> int:
        return self.cfg * self.ring * self.ulysses

    @property
    def rows_sent(self) -> float:
        """What a rank sends in one layer for each token that it holds, as rows of the transformer's width."""
        return self.ulysses_rows + self.ring_rows

    @property
    def ulysses_rows(self) -> float:
        """Queries, keys, values and results, but for those that stay."""
        return 4 * (self.ulysses - 1) / self.ulysses

    @property
    def ring_rows(self) -> float:
        """Keys and values, to every other rank of the ring."""
        return 2.0 * (self.ring - 1)

    def __str__(self) -> str:
        return f"cfg {self.cfg} x ring {self.ring} x ulysses {self.ulysses}"

    def check(self, num_ranks: int, num_heads: int) -> None:
        """Whether that many ranks can serve a model of that many heads so.

        Raises: ValueError saying which degrees would do.
        """
        if self.num_ranks != num_ranks:
            raise ValueError(f"{self} = {self.num_ranks}: must be the number of ranks, {num_ranks}")
        if num_heads % self.ulysses:
            allowed = ", ".join(str(p) for p in range(1, num_ranks + 1) if num_heads % p == 0 and num_ranks % p == 0)
            raise ValueError(
                f"ulysses {self.ulysses}: must divide the {num_heads} heads; with {num_ranks} ranks one of {allowed}, "
                "and the rest is for ring"
            )


def choose_degrees(
    num_ranks: int,
    num_heads: int,
    ranks_per_node: int,
    *,
    is_guided: bool,
    given: GivenDegrees = FREE_DEGREES,
    links: Links = ASSUMED_LINKS,
) -> Degrees:
    """The degrees whose exchanges take the least time: guidance first, as its halves exchange nothing but results, then
    Ulysses as far as heads and the node allow, and the ring for what is left.

    Ulysses goes over slower links between nodes only if nothing else fits: attention waits for all that it sends, and
    for the ring only where that is slower than attention.

    Args:
        ranks_per_node: ranks that `links.inside` joins.
        is_guided: whether most requests have two sequences; else no half of the group is set aside unless it is given.
        given: wins over what would be chosen.

    Raises: ValueError when nothing fits that, with what fits.
    """
    fitting = possible_degrees(num_ranks, num_heads)
    wanted = [degrees for degrees in fitting if _is_as_given(degrees, given)]
    if not wanted:
        raise ValueError(
            f"{_told(given)}: do not fit {num_ranks} ranks and {num_heads} heads; what fits: "
            + "; ".join(str(degrees) for degrees in fitting)
        )

    def preference(degrees: Degrees) -> tuple[bool, bool, float, int]:
        is_over_nodes = links.is_slower_across and not _is_inside(degrees.ulysses, num_ranks, ranks_per_node)
        seconds = seconds_per_row_byte(degrees, ranks_per_node, links)
        return (degrees.cfg == 2 and not is_guided, is_over_nodes, seconds, -degrees.ulysses)

    return min(wanted, key=preference)


def seconds_per_row_byte(degrees: Degrees, ranks_per_node: int, links: Links) -> float:
    """How long one layer's exchanges have the links, for each token that a rank holds and each byte of its row; where
    speeds are not known, in a unit of its own."""
    num_ranks, span = degrees.num_ranks, degrees.ulysses * degrees.ring
    ulysses = links.inside if _is_inside(degrees.ulysses, num_ranks, ranks_per_node) else links.across
    ring = links.inside if _is_inside(span, num_ranks, ranks_per_node) else links.across
    return degrees.ulysses_rows / _bytes_per_s(ulysses) + degrees.ring_rows / _bytes_per_s(ring)


def _is_inside(span: int, num_ranks: int, ranks_per_node: int) -> bool:
    """Whether no line of so many neighbouring ranks leaves its node."""
    return num_ranks <= ranks_per_node or ranks_per_node % span == 0


def _bytes_per_s(link: Link) -> float:
    return 1.0 if link.gb_per_s is None else 1e9 * link.gb_per_s


def possible_degrees(num_ranks: int, num_heads: int) -> tuple[Degrees, ...]:
    """All that so many ranks and heads allow."""
    return tuple(
        Degrees(cfg=cfg, ring=num_ranks // (cfg * ulysses), ulysses=ulysses)
        for cfg in CFG_DEGREES
        for ulysses in range(num_ranks, 0, -1)
        if num_ranks % (cfg * ulysses) == 0 and num_heads % ulysses == 0
    )


def _is_as_given(degrees: Degrees, given: GivenDegrees) -> bool:
    pairs = ((given.cfg, degrees.cfg), (given.ring, degrees.ring), (given.ulysses, degrees.ulysses))
    return all(wanted is None or wanted == degree for wanted, degree in pairs)


def _told(given: GivenDegrees) -> str:
    pairs = (("cfg", given.cfg), ("ring", given.ring), ("ulysses", given.ulysses))
    return ", ".join(f"{name} {degree}" for name, degree in pairs if degree is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """This process's place on each axis. tokens: ring and ulysses taken together, over which tokens are sharded.
    num_head_groups: in how many parts Ulysses exchanges the heads of a rank, so that they travel under attention."""

    cfg: Axis = ALONE
    ring: Axis = ALONE
    ulysses: Axis = ALONE
    tokens: Axis = ALONE
    num_head_groups: int = 1

    @property
    def num_ranks(self) -> int:
        return self.cfg.size * self.tokens.size

    def meet(self, device: torch.device) -> None:
        """Hears once from every rank on each axis, so that the first forward does not wait for links to be made.

        Raises: RuntimeError when a rank cannot be reached.
        """
        for axis in (self.cfg, self.ring, self.ulysses, self.tokens):
            axis.meet(device)


SOLO = Mesh()
"""The mesh of one rank, whose collectives are the identity."""


def build_mesh(ranks: RankGroup, degrees: Degrees, backend: str = "gloo", num_head_groups: int = 1) -> Mesh:
    """The mesh of a group; all of its ranks call this at the same time.

    Args:
        degrees: checked against the group's size.
        backend: gloo for CPU, nccl for GPUs, of which this process's must be the current device.
        num_head_groups: see `Mesh`.
    """
    assert degrees.num_ranks == ranks.size
    if ranks.size == 1:
        return SOLO
    ring, ulysses, size = degrees.ring, degrees.ulysses, ranks.size
    both = ring * ulysses
    lines = {
        "cfg": [range(place, size, both) for place in range(both)],
        "ring": [
            range(half + place, half + both, ulysses) for half in range(0, size, both) for place in range(ulysses)
        ],
        "ulysses": [range(start, start + ulysses) for start in range(0, size, ulysses)],
        "tokens": [range(half, half + both) for half in range(0, size, both)],
    }
    axes = {name: make_axis(line, ranks.rank, backend, ranks.timeout_s) for name, line in lines.items()}
    return Mesh(**axes, num_head_groups=num_head_groups)
