"""Everything that the engine may ask of the machine. No torch, no threads, no policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from helios_serve.types import ExecutorEvent, GoldenCheck, RoleTask, Signal, TensorRef


class Executor(Protocol):
    """The groups of all roles together. Except `read`, `put`, `recheck` and `close`, no call blocks; answers arrive
    through `emit`, from any thread.

    Every task that was submitted gets one answer (Encoded, TaskDone, Parked, Aborted, Decoded or TaskFailed), unless
    its group is lost. An answer's references stay readable until they are dropped, whatever happens to the group.
    """

    def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        """Starts the workers; each group says GroupUp when it can take tasks, and Beat from then on."""

    def submit(self, group: str, tasks: Sequence[RoleTask]) -> None:
        """Gives tasks of its role to a group; chunks join the running pack at its next step boundary."""

    def signal(self, group: str, task_id: str, op: Signal) -> None:
        """Parks or aborts a chunk at the group's next step boundary; one that ends before that is done as usual."""

    def condemn(self, group: str, why: str) -> None:
        """Kills a group and makes it anew; GroupLost follows at once."""

    def drop(self, refs: Sequence[TensorRef]) -> None:
        """Lets go of what these references stand for. A task of an ended request that still wanted to read them may
        fail, but answers all the same."""

    def read(self, ref: TensorRef) -> bytes:
        """The record of latents, or of a conditioning's starting history, fit to be kept; blocks, on any thread.

        Raises: KeyError when the reference was dropped.
        """

    def put(self, name: str, record: bytes) -> TensorRef:
        """Latents from their record, as `read` gave it; `name` makes the key. Blocks, on any thread.

        Raises: ValueError when it is no such record.
        """

    def recheck(self, timeout_s: float) -> tuple[GoldenCheck, ...]:
        """Has every DiT group that is up make its golden chunk again, at its next step boundary. Running chunks wait
        for that, and are as they would have been. Blocks, on any thread; one call at a time."""

    def close(self, drain_s: float) -> None:
        """Stops the workers and waits for them, at most `drain_s`; work in flight is lost."""
