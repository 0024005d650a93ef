"""Faults at named points, for tests. The shipped plan does nothing; nothing at run time makes another.

Points: `text.encode`, `dit.step`, `vae.decode`, `beat`, `loop`, `blob.write`, `blob.fsync`, `db.commit`, `publish`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Action = Literal["sleep", "raise", "nan", "kill", "stop", "exit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens at a point: on the visits `skip` to `skip + times - 1` of those whose facts hold all of `where`.

    sleep: for `seconds`. raise: `error`. nan: the caller spoils its result. kill, stop: SIGKILL or SIGSTOP to this
    process. exit: with status 1, at once.
    """

    point: str
    action: Action
    where: Mapping[str, object] = field(default_factory=dict)
    skip: int = 0
    times: int = 1
    seconds: float = 0.0
    error: Exception | None = None


class FaultPlan:
    """Looks at each visited point for a fault to inject. Any thread may use it; it can be pickled before its first use.

    Args:
        faults: none by default.
    """

    def __init__(self, *faults: Fault) -> None:
        self._faults = faults
        self._visits = [0] * len(faults)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[FaultPlan], tuple[Fault, ...]]:
        return FaultPlan, self._faults

    def at(self, point: str, **facts: object) -> bool:
        """Visits a point; whether the caller shall spoil its result with NaN.

        Raises: the fault's error, for the action `raise`.
        """
        spoil = False
        for fault in self._due(point, facts):
            if fault.action == "nan":
                spoil = True
            else:
                _act(fault)
        return spoil

    def _due(self, point: str, facts: Mapping[str, object]) -> list[Fault]:
        due = []
        for index, fault in enumerate(self._faults):
            if fault.point != point or any(facts.get(key) != value for key, value in fault.where.items()):
                continue
            with self._lock:
                visit = self._visits[index]
                self._visits[index] += 1
            if fault.skip <= visit < fault.skip + fault.times:
                due.append(fault)
        return due


NO_FAULTS = FaultPlan()


def _act(fault: Fault) -> None:
    if fault.action == "sleep":
        time.sleep(fault.seconds)
    elif fault.action == "raise":
        raise fault.error if fault.error is not None else RuntimeError(f"injected at {fault.point}")
    elif fault.action == "exit":
        os._exit(1)
    else:
        os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)
