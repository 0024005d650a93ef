"""One incarnation of a group on a Ray cluster: its placement, its actors and its processes, from spawn to burial.

Knows Ray's scheduling; knows nothing of tasks, events or when a group is to be replaced.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from helios_serve.config import ExecutorConfig, GivenDegrees, ModelConfig
from helios_serve.faults import FaultPlan
from helios_serve.types import ExecutorEvent, GoldenCheck, Role
from helios_serve.workers.ray_actors import HOST, REAPER
from helios_serve.workers.ray_wire import VERSION, Hello, HostSpec, Inbox

logger = logging.getLogger(__name__)

REAP_TIMEOUT_S = 2.0
"""Patience with a reaper, before Ray is asked to kill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a group stands: the same for all its incarnations."""

    group: str
    role: Role
    num_ranks: int
    degrees: GivenDegrees
    cpus: float
    gpus: float

    @property
    def needs(self) -> dict[str, float]:
        """What one process takes, as Ray counts it."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount > 0}


def seats(config: ExecutorConfig) -> list[Seat]:
    """All groups of a configuration."""
    plan: list[tuple[Role, int, int, float, float]] = [
        ("encoder", config.num_encoders, 1, config.cpus_per_encoder, config.gpus_per_encoder),
        ("dit", config.num_dit_groups, config.num_dit_ranks, config.cpus_per_rank, config.gpus_per_rank),
        ("vae", config.num_vaes, config.num_vae_ranks, config.cpus_per_vae, config.gpus_per_vae),
    ]
    return [
        Seat(group=f"{role}-{index}", role=role, num_ranks=num_ranks, degrees=config.degrees, cpus=cpus, gpus=gpus)
        for role, count, num_ranks, cpus, gpus in plan
        for index in range(count)
    ]


class Life:
    """The processes of one incarnation, by rank, and the coroutines that deal with them."""

    def __init__(self, seat: Seat, incarnation: int, emit: Callable[[ExecutorEvent], None]) -> None:
        self.seat, self.incarnation = seat, incarnation
        self.is_up = False
        self.golden: str | None = None
        self.num_checks = 0
        self.hosts: list[Any] = []
        self.hellos: tuple[Hello, ...] = ()
        self.inbox = Inbox(emit)
        self.work: set[asyncio.Task[None]] = set()
        self._placement: Any = None

    async def spawn(self, model: ModelConfig, cache_bytes: int, faults: FaultPlan) -> None:
        """Starts the processes; Ray waits for room as long as it must.

        Raises: RayError when one dies; RuntimeError for another version of the code on a node.
        """
        seat = self.seat
        if seat.role == "dit" or seat.num_ranks > 1:
            self._placement = placement_group([seat.needs] * seat.num_ranks, strategy="STRICT_PACK")
        for rank in range(seat.num_ranks):
            spec = HostSpec(
                model=model,
                group=seat.group,
                role=seat.role,
                rank=rank,
                num_ranks=seat.num_ranks,
                degrees=seat.degrees,
                num_threads=max(1, int(seat.cpus)),
                cache_bytes=cache_bytes,
                faults=faults,
            )
            host = HOST.options(num_cpus=seat.cpus, num_gpus=seat.gpus, scheduling_strategy=self._place(rank))
            self.hosts.append(host.remote(spec))
        self.hellos = tuple(await asyncio.gather(*(host.hello.remote() for host in self.hosts)))
        for hello in self.hellos:
            if hello.version != VERSION:
                raise RuntimeError(f"helios-serve {hello.version} on a node, {VERSION} here")

    async def load(self) -> str | None:
        """Loads all ranks, and lets them work; the golden digest of a DiT group.

        Raises: RayError when a rank dies or cannot load; RuntimeError when the ranks differ.
        """
        address = await self.hosts[0].meeting_point.remote()
        goldens = await asyncio.gather(*(host.load.remote(address) for host in self.hosts))
        if len(set(goldens)) > 1:
            raise RuntimeError(f"the ranks differ in their golden chunk: {goldens}")
        await asyncio.gather(*(host.start.remote() for host in self.hosts))
        self.golden = goldens[0]
        return self.golden

    async def recheck(self, timeout_s: float) -> GoldenCheck:
        """Has all ranks make the golden chunk again."""
        self.num_checks += 1
        group, expected = self.seat.group, self.golden
        try:
            async with asyncio.timeout(timeout_s):
                asked = [host.recheck.remote(self.num_checks, timeout_s) for host in self.hosts]
                found = await asyncio.gather(*asked)
        except TimeoutError:
            return GoldenCheck(group=group, expected=expected, found=None, problem=f"no answer within {timeout_s:g} s")
        except RayError as error:
            return GoldenCheck(group=group, expected=expected, found=None, problem=reason(error))
        if len(set(found)) > 1:
            return GoldenCheck(group=group, expected=expected, found=None, problem=f"the ranks differ: {found}")
        return GoldenCheck(group=group, expected=expected, found=found[0])

    def cancel(self) -> None:
        """Ends the coroutines: nothing more is heard of this incarnation."""
        for task in self.work:
            task.cancel()

    async def bury(self, reapers: Reapers) -> None:
        """Kills the processes, and gives back their room."""
        await reapers.kill(self.hellos)
        for host in self.hosts:
            ray.kill(host)
        if self._placement is not None:
            remove_placement_group(self._placement)

    def _place(self, rank: int) -> PlacementGroupSchedulingStrategy | str:
        if self._placement is None:
            return "DEFAULT"
        return PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)


class Reapers:
    """One reaper for each living node.

    Args:
        timeout_s: until a new one must answer.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._reapers: dict[str, Any] = {}

    async def meet(self, node_ids: Sequence[str]) -> None:
        """Gives every living node a reaper, and forgets nodes that are gone."""
        for gone in self._reapers.keys() - set(node_ids):
            del self._reapers[gone]
        for node_id in node_ids:
            if node_id in self._reapers:
                continue
            there = NodeAffinitySchedulingStrategy(node_id, soft=False)
            reaper = self._reapers[node_id] = REAPER.options(scheduling_strategy=there).remote()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await reaper.hello.remote()
            except (RayError, TimeoutError) as error:
                logger.warning("node %s has no reaper: %r", node_id, error)
                self._reapers.pop(node_id, None)

    async def kill(self, victims: Sequence[Hello]) -> None:
        """SIGKILLs processes, wherever they are; a reaper that does not answer is forgotten, and replaced later."""
        for node_id in {hello.node_id for hello in victims}:
            own = [hello.process for hello in victims if hello.node_id == node_id]
            try:
                async with asyncio.timeout(REAP_TIMEOUT_S):
                    await self._reapers[node_id].kill.remote(own)
            except (KeyError, RayError, TimeoutError) as error:
                logger.warning("no reaper killed %s: %r", own, error)
                self._reapers.pop(node_id, None)


def reason(error: Exception) -> str:
    """One of Ray's long explanations in a few words; what a worker raised as it was."""
    if isinstance(error, RayTaskError):
        return repr(error.cause)
    text = " ".join(str(error).split())
    _, found, detail = text.partition("Worker exit detail: ")
    return f"{type(error).__name__}: {(detail if found else text)[:160]}"
