"""A role in a process of its own: takes tasks with references to their inputs, answers with events and packed tensors.

Knows tasks, payloads and threads; knows nothing of the transport that calls it.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from helios_serve.model_executor.model import Checkpoint, open_checkpoint
from helios_serve.parallel.collectives import GroupBrokenError, RankGroup
from helios_serve.types import ExecutorEvent, RoleTask, Signal, TensorRef
from helios_serve.workers.failure import task_failed
from helios_serve.workers.payload import Payload
from helios_serve.workers.ray_wire import HostSpec, Outbox
from helios_serve.workers.shared_order import SharedOrder

T = TypeVar("T")
Fetch = Callable[[TensorRef], Payload]
"""Gets what a reference of the running task stands for."""

_FREE_MEMORY_S = 30.0
"""How long a worker waits until the one that it replaces has left their GPU."""


class Host(Protocol):
    """What a process of any role can do. `run` may be called by many threads at a time, the rest by any thread."""

    @property
    def golden(self) -> str | None: ...
    @property
    def progress(self) -> int: ...
    @property
    def task_ids(self) -> tuple[str, ...]: ...
    def start(self) -> None: ...
    def run(self, task: RoleTask, fetch: Fetch, key: str) -> tuple[ExecutorEvent | None, Payload | None]:
        """Does a task: the event that answers it, and what `key` in that event stands for."""

    def signal(self, task_id: str, op: Signal) -> None: ...
    def recheck(self, number: int, timeout_s: float) -> str:
        """The golden chunk's digest, made anew; of a DiT rank."""

    def join(self) -> None:
        """Waits until the process can do no more work, and raises the reason."""


def load_host(spec: HostSpec, outbox: Outbox, address: str) -> Host:
    """Loads what a role needs.

    Args:
        outbox: takes the events that answer no task.
        address: where the ranks of a group meet.

    Raises: CheckpointError for a checkpoint that cannot be served; RuntimeError when another rank does not come.
    """
    if spec.model.device == "cpu":
        torch.set_num_threads(spec.num_threads)
    checkpoint = open_checkpoint(spec.model)
    # A worker imports what its own role needs: a lost DiT rank is not to wait for the text encoder's libraries.
    if spec.role == "dit":
        from helios_serve.workers.dit_host import DitHost

        return DitHost(spec, checkpoint, outbox, address)
    if spec.role == "encoder":
        from helios_serve.workers.encoder_host import EncoderHost

        return EncoderHost(spec, checkpoint)
    from helios_serve.workers.vae_host import VaeHost

    return VaeHost(spec, checkpoint, address)


class PoolHost(ABC):
    """A role whose worker does one task after the other on its device. Of several ranks, which share each task, every
    one is given every task, and rank 0 answers.

    Args:
        ranks: this rank's place in its group.
    """

    golden = None

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._order = SharedOrder(ranks)
        self._thread = threading.Thread(target=self._run_order, name="helios-compute", daemon=True)
        self._ended: Exception | None = None
        self._lock = threading.Lock()
        self._task_ids: dict[str, None] = {}
        self._progress = 0

    @property
    def progress(self) -> int:
        return self._progress

    @property
    def task_ids(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._task_ids)

    def start(self) -> None:
        self._thread.start()

    def run(self, task: RoleTask, fetch: Fetch, key: str) -> tuple[ExecutorEvent | None, Payload | None]:
        with self._lock:
            self._task_ids[task.task_id] = None
        try:
            return self._do(task, fetch, key)
        except GroupBrokenError:
            raise
        except Exception as error:
            if self._ranks.rank > 0:
                raise  # rank 0 may count on this rank
            return task_failed(task.task_id, error), None
        finally:
            with self._lock:
                del self._task_ids[task.task_id]
                self._progress += 1

    def signal(self, task_id: str, op: Signal) -> None:
        raise AssertionError(f"{op} {task_id}: only chunks take signals")

    def recheck(self, number: int, timeout_s: float) -> str:
        raise AssertionError(f"check {number}: only DiT ranks have a golden chunk")

    def join(self) -> None:
        self._thread.join()
        raise RuntimeError(f"the work of rank {self._ranks.rank} ended: {self._ended!r}") from self._ended

    def _run_order(self) -> None:
        try:
            self._order.run()
        except Exception as error:
            self._ended = error

    def _compute(self, task: RoleTask, work: Callable[[], T]) -> T:
        """Does the part that needs the device, in its turn.

        Raises: what `work` raises; on one of several ranks, GroupBrokenError in its place.
        """
        return self._order.submit(task.task_id, work).result()

    @abstractmethod
    def _do(self, task: RoleTask, fetch: Fetch, key: str) -> tuple[ExecutorEvent | None, Payload | None]:
        """What `run` returns."""


def wait_for_memory(checkpoint: Checkpoint, *folders: str) -> None:
    """Waits until the GPU has room for the weights in `folders`: a killed predecessor may still hold it.

    Raises: torch.OutOfMemoryError when there is none after a while.
    """
    if checkpoint.device.type != "cuda":
        return
    files = (file for folder in folders for file in (checkpoint.path / folder).glob("*.safetensors"))
    needed = sum(file.stat().st_size for file in files)
    deadline = time.monotonic() + _FREE_MEMORY_S
    while (free := torch.cuda.mem_get_info(checkpoint.device)[0]) < needed:
        if time.monotonic() > deadline:
            raise torch.OutOfMemoryError(f"{needed} bytes of weights, but the GPU has {free} free")
        time.sleep(0.1)
