"""When a group that was lost may be made anew, and when it has been lost too often. Knows times; starts nothing and
reads no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RespawnConfig:
    """The first respawn is immediate; the next ones wait `first_s`, then `factor` times as long each, at most `cap_s`.
    `max_losses` within `window_s` open the breaker."""

    first_s: float = 1.0
    factor: float = 4.0
    cap_s: float = 60.0
    max_losses: int = 5
    window_s: float = 600.0


class RespawnPolicy:
    """The recent losses of one group."""

    def __init__(self, config: RespawnConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque()
        self._is_open = False

    @property
    def is_open(self) -> bool:
        """Whether the breaker is open: the group stays out."""
        return self._is_open

    def lost(self, now: float) -> float | None:
        """Notes a loss: seconds until the group may be made anew, or None once it must stay out."""
        config = self._config
        while self._losses and now - self._losses[0] >= config.window_s:
            self._losses.popleft()
        self._losses.append(now)
        earlier = len(self._losses) - 1
        self._is_open = self._is_open or len(self._losses) >= config.max_losses
        if self._is_open:
            return None
        return 0.0 if earlier == 0 else min(config.cap_s, config.first_s * config.factor ** (earlier - 1))
