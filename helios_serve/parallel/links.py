"""What joins the ranks of a group, and the speed that the choice of degrees takes it to have.

Knows what torch says of GPUs that this process sees; measures nothing. Kinds of link, their speeds and where these come
from are a table in docs/parallel.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import torch

NVLINK_SHARE = 2 / 3
"""Of what NVLink could carry, what an all-to-all gets: 300 of an H100's 450 GB/s. Assumed."""
_NVLINK_GB_PER_S, _BLACKWELL_NVLINK_GB_PER_S = 25.0, 50.0  # one link, one direction


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """gb_per_s: gigabytes per second that a rank sends while it receives as many; None if that is not known."""

    name: str
    gb_per_s: float | None

    def __str__(self) -> str:
        return self.name if self.gb_per_s is None else f"{self.name} ({self.gb_per_s:.0f} GB/s taken)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """inside: between ranks of a node, the slowest. across: between nodes."""

    inside: Link
    across: Link

    @property
    def is_slower_across(self) -> bool:
        """Whether nodes are farther from each other than ranks of a node, as they are if nobody knows."""
        inside, across = self.inside.gb_per_s, self.across.gb_per_s
        return inside is None or across is None or across < inside


GLOO = Link(name="gloo, link speed not known", gb_per_s=None)
NETWORK = Link(name="a network of 400 Gb/s for each GPU, assumed", gb_per_s=45.0)
PCIE = Link(name="PCI Express with peer access", gb_per_s=25.0)
HOST = Link(name="PCI Express through host memory", gb_per_s=12.0)
UNSEEN = Link(name="NVLink, assumed for GPUs that are not seen from here", gb_per_s=300.0)
UNASKED = Link(name="peer access, assumed to be NVLink, of which torch does not tell", gb_per_s=300.0)
ASSUMED_LINKS = Links(inside=UNSEEN, across=NETWORK)


class Gpus(Protocol):
    """The GPUs that this process sees, by number."""

    @property
    def count(self) -> int: ...

    def can_access(self, first: int, second: int) -> bool:
        """Whether each reads and writes the other's memory."""

    def nvlinks(self, first: int, second: int) -> int | None:
        """How many join them, by a switch or not; None if nobody can tell."""

    def nvlink_gb_per_s(self) -> float:
        """Of one link, in one direction."""


def find_links(device_type: str, num_ranks: int) -> Links:
    """The links of a node's first `num_ranks` devices: a rank has the device of its place on its node."""
    if device_type != "cuda":
        return Links(inside=GLOO, across=GLOO)
    return Links(inside=slowest_link(TorchGpus(), num_ranks), across=NETWORK)


def slowest_link(gpus: Gpus, num_ranks: int) -> Link:
    """Of those between any two of the first `num_ranks` GPUs."""
    if num_ranks > gpus.count or num_ranks < 2:
        return UNSEEN
    links = (_link(gpus, first, second) for first, second in combinations(range(num_ranks), 2))
    return min(links, key=lambda link: link.gb_per_s or 0.0)


def _link(gpus: Gpus, first: int, second: int) -> Link:
    if not gpus.can_access(first, second):
        return HOST
    count = gpus.nvlinks(first, second)
    if count is None:
        return UNASKED
    if count == 0:
        return PCIE
    return Link(name=f"NVLink, {count} of them", gb_per_s=NVLINK_SHARE * count * gpus.nvlink_gb_per_s())


class TorchGpus:
    """What torch says. It asks NVML through the driver, for which no package is needed."""

    def __init__(self) -> None:
        self._nvlinks = _nvlink_counts()

    @property
    def count(self) -> int:
        return torch.cuda.device_count()

    def can_access(self, first: int, second: int) -> bool:
        can_access = torch.cuda.can_device_access_peer
        return can_access(first, second) and can_access(second, first)

    def nvlinks(self, first: int, second: int) -> int | None:
        return None if self._nvlinks is None else self._nvlinks[first][second]

    def nvlink_gb_per_s(self) -> float:
        is_blackwell = torch.cuda.get_device_capability()[0] >= 10
        return _BLACKWELL_NVLINK_GB_PER_S if is_blackwell else _NVLINK_GB_PER_S


def _nvlink_counts() -> list[list[int]] | None:
    """Links between each two GPUs. Torch offers this to its own tests alone, and may stop to."""
    try:
        from torch._C._autograd import DeviceType
        from torch._C._distributed_c10d import _detect_dma_connectivity  # type: ignore[attr-defined]

        found: list[list[int]] = _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix
    except (ImportError, RuntimeError):
        return None
    return found
