"""What probes ask: whether the process lives, and whether its DiT groups still compute what they should.

Knows times and digests; knows no route. Whether requests are taken is the service's to say.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from helios_serve.types import GoldenCheck

MAX_SILENCE_S = 5.0
"""How old the last beat of the event loop, or of the engine, may be in a process that lives."""

LOOP_BEAT_S = 0.5
RECHECK_S = 30.0
"""Patience with the golden chunk of a group, whose step in flight ends first."""


class Pulse:
    """Whether this process lives. `beat` must run on its event loop; before it does, the loop is not judged.

    Args:
        engine_silent_s: seconds since the engine's task ran.
    """

    def __init__(
        self, engine_silent_s: Callable[[], float] = lambda: 0.0, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine_silent_s = engine_silent_s
        self._now = now
        self._beat_at: float | None = None

    async def beat(self) -> None:
        """Runs until it is cancelled."""
        while True:
            self._beat_at = self._now()
            await asyncio.sleep(LOOP_BEAT_S)

    def problems(self) -> list[str]:
        """Why the process should be started again; empty when it should not."""
        loop_s = 0.0 if self._beat_at is None else self._now() - self._beat_at
        ages = {"event loop": loop_s, "engine": self._engine_silent_s()}
        return [f"the {name} stood still for {age_s:.1f} s" for name, age_s in ages.items() if age_s >= MAX_SILENCE_S]


class GoldenProbe:
    """Has the golden chunks made again, one round at a time: who asks meanwhile gets the answer of the round that runs.

    Args:
        recheck: `Executor.recheck`; it is called on a thread.
    """

    def __init__(self, recheck: Callable[[float], Sequence[GoldenCheck]]) -> None:
        self._recheck = recheck
        self._round: asyncio.Task[Sequence[GoldenCheck]] | None = None

    async def checks(self) -> Sequence[GoldenCheck]:
        """One for each DiT group that is up."""
        if self._round is None or self._round.done():
            self._round = asyncio.create_task(asyncio.to_thread(self._recheck, RECHECK_S))
        return await asyncio.shield(self._round)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """What the open routes ask, beside the service."""

    pulse: Pulse = field(default_factory=Pulse)
    golden: GoldenProbe = field(default_factory=lambda: GoldenProbe(lambda _: ()))
