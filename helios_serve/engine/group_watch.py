"""Which groups are believed to be alive: beats and progress are taken in, silent, stuck and overdue ones are condemned.

Knows every role's groups; knows nothing of requests. The time is an argument of every call.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from helios_serve.config import EngineConfig
from helios_serve.engine.dit_groups import DitGroups
from helios_serve.engine.executor import Executor
from helios_serve.engine.liveness import Liveness, LivenessConfig
from helios_serve.engine.recorder import Recorder
from helios_serve.types import Beat, GroupLost, GroupUp, Role

logger = logging.getLogger(__name__)


class GroupWatch:
    """One for each engine."""

    def __init__(self, executor: Executor, dit_groups: DitGroups, config: EngineConfig, recorder: Recorder) -> None:
        self._executor = executor
        self._dit_groups = dit_groups
        self._config = config
        self._recorder = recorder
        self._liveness = Liveness(LivenessConfig())
        self._condemned: set[str] = set()
        self._roles: dict[str, Role] = {}

    def seen(self, event: GroupUp) -> None:
        """A group says that it is up; whether it may be used is yet to be judged."""
        self._roles[event.group] = event.role

    def up(self, event: GroupUp, now: float) -> None:
        """A group may be used; it is judged from now on."""
        self._liveness.up(event.group, now)
        self._recorder.up(event.role, event.group)

    def beat(self, event: Beat, now: float) -> None:
        self._liveness.beat(event.group, event.progress, bool(event.task_ids), now)

    def lost(self, event: GroupLost) -> Role | None:
        """A group is gone: its role, None for one that was never up."""
        role = self._roles.get(event.group)
        if role is not None:
            logger.warning("group %s is lost: %s", event.group, event.why)
            self._condemned.discard(event.group)
            self._liveness.down(event.group)
            self._recorder.lost(role, event.group)
        return role

    def tick(self, now: float, interval_s: float, overdue: Sequence[tuple[str, str]]) -> None:
        """Judges the groups; call it every `interval_s`.

        Args:
            overdue: (group, why) of encoders and VAE workers that take too long.
        """
        verdicts = [*self._liveness.tick(now, interval_s, self._stuck_s), *self._dit_groups.overdue(now), *overdue]
        for group, why in dict(verdicts).items():
            self.condemn(group, why)
        for group, role in self._roles.items():
            self._recorder.progress_age(role, group, self._liveness.progress_age_s(group, now))

    def condemn(self, group: str, why: str) -> None:
        """Has a group killed and made anew."""
        if group in self._condemned:  # its loss is on its way; the next incarnation must not be meant
            return
        logger.error("group %s is condemned: %s", group, why)
        self._condemned.add(group)
        self._liveness.down(group)
        self._executor.condemn(group, why)

    def _stuck_s(self, group: str) -> float:
        """How long a busy group may stand still."""
        role = self._roles[group]
        if role == "dit":
            return self._dit_groups.stuck_s(group)
        timeout = self._config.encode_timeout_s if role == "encoder" else self._config.decode_timeout_s
        return max(self._config.stuck_floor_s, timeout)
