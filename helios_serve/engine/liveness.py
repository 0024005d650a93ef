"""Which groups are alive: judges their beats and the progress that these report.

Knows times and counters only; kills nothing and reads no clock. A late loop of our own is not held against anybody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LivenessConfig:
    """A group is silent after `num_beats` times `beat_s` without a beat; our loop is late by more than `lag_s`."""

    beat_s: float = 0.5
    num_beats: int = 4
    lag_s: float = 0.25

    @property
    def silent_s(self) -> float:
        return self.beat_s * self.num_beats


@dataclass(slots=True)
class _Pulse:
    last_beat: float
    progressed_at: float
    progress: int = 0
    is_busy: bool = False


class Liveness:
    """The pulses of all groups that are up."""

    def __init__(self, cfg: LivenessConfig) -> None:
        self._cfg = cfg
        self._pulses: dict[str, _Pulse] = {}
        self._last_tick: float | None = None

    def up(self, group: str, now: float) -> None:
        """A group came up; it has its first window from now."""
        self._pulses[group] = _Pulse(last_beat=now, progressed_at=now)

    def down(self, group: str) -> None:
        """A group is lost or condemned: it is not judged until it is up again."""
        self._pulses.pop(group, None)

    def beat(self, group: str, progress: int, is_busy: bool, now: float) -> None:
        """A group answered."""
        pulse = self._pulses.get(group)
        if pulse is None:
            return
        if progress != pulse.progress or not is_busy or not pulse.is_busy:
            pulse.progressed_at = now
        pulse.last_beat, pulse.progress, pulse.is_busy = now, progress, is_busy

    def progress_age_s(self, group: str, now: float) -> float:
        """Seconds since a busy group last moved; 0 for an idle or unknown one."""
        pulse = self._pulses.get(group)
        return now - pulse.progressed_at if pulse is not None and pulse.is_busy else 0.0

    def tick(self, now: float, interval_s: float, stuck_s: Callable[[str], float]) -> list[tuple[str, str]]:
        """(group, why) of those to condemn; call it every `interval_s`.

        Args:
            stuck_s: how long a busy group may stand still.
        """
        late = self._last_tick is not None and now - self._last_tick > interval_s + self._cfg.lag_s
        self._last_tick = now
        if late:
            for pulse in self._pulses.values():
                pulse.last_beat = pulse.progressed_at = now
            return []
        found = []
        for group, pulse in self._pulses.items():
            if now - pulse.last_beat > self._cfg.silent_s:
                found.append((group, f"silent for {now - pulse.last_beat:.1f} s"))
            elif pulse.is_busy and now - pulse.progressed_at > stuck_s(group):
                found.append((group, f"no progress for {now - pulse.progressed_at:.1f} s"))
        return found
