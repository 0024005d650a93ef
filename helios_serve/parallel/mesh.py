"""How the ranks of a DiT group share a forward: pairs of guidance x ring x Ulysses.

Knows degrees, heads and nodes; knows nothing of tokens. Ranks are counted with Ulysses innermost, so that its exchanges
stay inside a node and only the ring crosses to another one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from helios_serve.parallel.collectives import ALONE, Axis, RankGroup, make_axis

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

    def check(self, num_ranks: int, num_heads: int) -> None:
        """Whether that many ranks can serve a model of that many heads so.

        Raises: ValueError saying which degrees would do.
        """
        if self.num_ranks != num_ranks:
            raise ValueError(
                f"cfg {self.cfg} x ring {self.ring} x ulysses {self.ulysses} = {self.num_ranks}: "
                f"must be the number of ranks, {num_ranks}"
            )
        if num_heads % self.ulysses:
            allowed = ", ".join(str(p) for p in range(1, num_ranks + 1) if num_heads % p == 0 and num_ranks % p == 0)
            raise ValueError(
                f"ulysses {self.ulysses}: must divide the {num_heads} heads; with {num_ranks} ranks one of {allowed}, "
                "and the rest is for ring"
            )


def choose_degrees(num_ranks: int, num_heads: int, ranks_per_node: int, *, is_guided: bool) -> Degrees:
    """The degrees that send the fewest bytes: guidance first, as its halves exchange nothing but results, then Ulysses
    as far as heads and the node allow, and the ring for what is left.

    Args:
        ranks_per_node: ranks that a fast link joins.
        is_guided: whether most requests have two sequences.
    """
    cfg = 2 if is_guided and num_ranks % 2 == 0 else 1
    rest = num_ranks // cfg
    ulysses = math.gcd(rest, num_heads)
    if num_ranks > ranks_per_node:
        ulysses = math.gcd(ulysses, ranks_per_node)
    return Degrees(cfg=cfg, ring=rest // ulysses, ulysses=ulysses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """This process's place on each axis. tokens: ring and ulysses taken together, over which tokens are sharded."""

    cfg: Axis = ALONE
    ring: Axis = ALONE
    ulysses: Axis = ALONE
    tokens: Axis = ALONE

    @property
    def num_ranks(self) -> int:
        return self.cfg.size * self.tokens.size


SOLO = Mesh()
"""The mesh of one rank, whose collectives are the identity."""


def build_mesh(ranks: RankGroup, degrees: Degrees, backend: str = "gloo") -> Mesh:
    """The mesh of a group; all of its ranks call this at the same time.

    Args:
        degrees: checked against the group's size.
        backend: gloo for CPU, nccl for GPUs, of which this process's must be the current device.
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
    return Mesh(**{name: make_axis(line, ranks.rank, backend, ranks.timeout_s) for name, line in lines.items()})
