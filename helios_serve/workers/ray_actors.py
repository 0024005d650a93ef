"""The actors of a Ray cluster: one `HostActor` for each worker process, one `Reaper` for each node.

Knows Ray's calls and threads. PyTorch and model code are loaded in an actor's process, never in the driver's, which
imports this file too.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray

from helios_serve.types import RoleTask, Signal, TensorRef
from helios_serve.workers.processes import Process, find_process
from helios_serve.workers.ray_wire import VERSION, Batch, BeatReply, Hello, HostSpec, Outbox

if TYPE_CHECKING:
    from helios_serve.workers.host import Host
    from helios_serve.workers.payload import Payload

logger = logging.getLogger(__name__)

MAX_TASKS = 64
"""Tasks that one actor takes at a time; each holds a thread that waits."""

FETCH_TIMEOUT_S = 20.0

_NO_RETRIES: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0}
"""Ray never starts an actor or a task again by itself: the engine decides, and deaths are told at once."""

_THREADS: dict[str, Any] = {"concurrency_groups": {"ctl": 1, "life": 1, "tasks": MAX_TASKS}}


class HostActor:
    """A worker process. Its methods run in four groups of threads: `load` and `start`; `ctl`, which answers while
    work runs; `life`; and `tasks`.
    """

    def __init__(self, spec: HostSpec) -> None:
        self._spec = spec
        self._outbox = Outbox()
        self._host: Host | None = None

    @ray.method(concurrency_group="ctl")
    def hello(self) -> Hello:
        process = find_process(os.getpid())
        assert process is not None
        node_id = ray.get_runtime_context().get_node_id()
        return Hello(process=process, node_id=node_id, version=VERSION)

    @ray.method(concurrency_group="ctl")
    def meeting_point(self) -> str:
        """An address on this node where the ranks of a group can meet."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"tcp://127.0.0.1:{probe.getsockname()[1]}"

    def load(self, address: str) -> str | None:
        """Gets ready to work; the golden digest of a DiT rank."""
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the ranks of a group share a node
        from helios_serve.workers.host import load_host

        # Payloads are shared with the object store, and nobody writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        host = load_host(self._spec, self._outbox, address)
        self._host = host
        return host.golden

    def start(self) -> None:
        """Begins to work, once all ranks are loaded."""
        self._ready().start()

    @ray.method(concurrency_group="life")
    def life(self) -> None:
        """Never returns: it fails when this process dies, or can do no more work."""
        self._ready().join()

    @ray.method(concurrency_group="ctl")
    def beat(self) -> BeatReply:
        host = self._ready()
        self._spec.faults.at("beat", group=self._spec.group, rank=self._spec.rank)
        return BeatReply(progress=host.progress, task_ids=host.task_ids, batch=self._outbox.take())

    @ray.method(concurrency_group="ctl")
    def signal(self, task_id: str, op: Signal) -> None:
        self._ready().signal(task_id, op)

    @ray.method(concurrency_group="tasks")
    def recheck(self, number: int, timeout_s: float) -> str:
        """The golden chunk's digest, made anew."""
        return self._ready().recheck(number, timeout_s)

    @ray.method(concurrency_group="tasks", num_returns=2)
    def run(self, task: RoleTask, refs: Mapping[str, Any], key: str) -> tuple[Batch, Payload | None]:
        """Does a task: the events up to its answer, and what `key` stands for in there.

        Args:
            refs: object references of the task's inputs, by the keys of their TensorRefs.
        """

        def fetch(ref: TensorRef) -> Payload:
            found: Payload = ray.get(refs[ref.key], timeout=FETCH_TIMEOUT_S)
            return found

        event, payload = self._ready().run(task, fetch, key)
        return self._outbox.take(*(() if event is None else (event,))), payload

    def _ready(self) -> Host:
        assert self._host is not None, "not loaded"
        return self._host


class Reaper:
    """Kills processes of its node. `ray.kill` cannot: it takes seconds for a stopped process."""

    def hello(self) -> None:
        """Answers once it can kill."""

    def kill(self, processes: Sequence[Process]) -> None:
        for process in processes:
            process.kill()


HOST: Any = ray.remote(**_NO_RETRIES, **_THREADS)(HostActor)
REAPER: Any = ray.remote(**_NO_RETRIES, num_cpus=0)(Reaper)
