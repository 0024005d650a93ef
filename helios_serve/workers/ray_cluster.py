"""Joins or starts a Ray cluster, and watches its control service.

Knows Ray's settings; knows nothing of groups or tasks.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from helios_serve.config import ExecutorConfig
from helios_serve.workers.processes import Process, command, descendants

logger = logging.getLogger(__name__)

EXIT_RESTART = 75
"""Exit status that asks the service manager for a new start."""

_TOKEN, _TOKEN_PATH, _AUTH_MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"


class Cluster:
    """The connection of this process to Ray. There is one at a time.

    `node_id` is the node of this process.
    """

    def __init__(self, config: ExecutorConfig) -> None:
        self._directory: str | None = None
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # Ray 2.60 announces that a later version changes this; actors without a GPU shall see none today too.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        namespace = f"helios-{secrets.token_hex(8)}"
        if config.address is None:
            self._start(config, namespace)
        else:
            self._join(config.address, namespace)
        self.node_id: str = ray.get_runtime_context().get_node_id()

    def close(self) -> None:
        """Leaves the cluster, and ends it if it was started here."""
        own = self._processes()
        ray.shutdown()
        _kill(own)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """Kills a cluster that was started here without asking it: its agents would wait for a dead control service.
        Ray may then end this process at any time. Its directory, with the logs, stays."""
        _kill(self._processes())

    def _processes(self) -> list[Process]:
        """Those of a cluster that was started here: the ones with its directory in their command, and all below."""
        if self._directory is None:
            return []
        below = descendants(os.getpid())
        roots = [process for process in below if self._directory in command(process.pid)]
        return [*roots, *(process for root in roots for process in descendants(root.pid))]

    def _start(self, config: ExecutorConfig, namespace: str) -> None:
        """A cluster on this machine, its directory open to this user only. Ray 2.60 turns token authentication on for
        one that it starts, unless RAY_AUTH_MODE says otherwise; without a token here it would write one to ~/.ray."""
        if _TOKEN not in os.environ and _TOKEN_PATH not in os.environ:
            os.environ[_TOKEN] = secrets.token_hex(32)
        room = shutil.disk_usage("/dev/shm").free
        if room < config.object_store_bytes:
            logger.warning(
                "/dev/shm has %d MiB free, the object store is to have %d: it will be slow, on disk",
                room >> 20,
                config.object_store_bytes >> 20,
            )
        self._directory = tempfile.mkdtemp(prefix="helios-ray-")
        ray.init(
            address="local",
            num_cpus=config.num_cpus,
            object_store_memory=config.object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace=namespace,
            _temp_dir=self._directory,
        )

    def _join(self, address: str, namespace: str) -> None:
        if os.environ.get(_AUTH_MODE) != "token":
            logger.warning(
                "%s is not `token`: whoever reaches the Ray cluster at %s can run code on it", _AUTH_MODE, address
            )
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace=namespace)


def _kill(processes: Sequence[Process]) -> None:
    for process in processes:
        process.kill()


def living_nodes() -> list[str]:
    """The ids of the cluster's nodes; waits for the control service."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["NodeID"] for node in nodes if node["Alive"]]


class ControlWatch:
    """Asks the control service (GCS) for its nodes again and again, from threads of its own.

    Without the control service calls go on for a minute, and then Ray ends this process; it is ended in order before.

    Args:
        on_nodes: takes the ids of the living nodes after each answer.
        on_lost: called once, after two questions in a row without an answer.
        on_end: called `grace_s` later.
    """

    def __init__(
        self,
        on_nodes: Callable[[Sequence[str]], None],
        on_lost: Callable[[], None],
        on_end: Callable[[], None],
        *,
        period_s: float = 5.0,
        timeout_s: float = 2.4,
        grace_s: float = 15.0,
    ) -> None:
        self._on_nodes, self._on_lost, self._on_end = on_nodes, on_lost, on_end
        self._period_s, self._timeout_s, self._grace_s = period_s, timeout_s, grace_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="helios-ray-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()

    def _watch(self) -> None:
        num_failures = 0
        while not self._closing.is_set():
            asked_s = time.monotonic()
            nodes = self._ask()
            if nodes is not None:
                num_failures = 0
                self._on_nodes(nodes)
                self._closing.wait(max(0.0, asked_s + self._period_s - time.monotonic()))
                continue
            num_failures += 1
            logger.warning("the Ray control service does not answer (%d)", num_failures)
            if num_failures == 2:
                break
        if self._closing.is_set():
            return
        logger.critical("the Ray control service is gone; this process ends in %.0f s", self._grace_s)
        self._on_lost()
        if not self._closing.wait(self._grace_s):
            self._on_end()

    def _ask(self) -> list[str] | None:
        """The ids of living nodes, or None without an answer in time."""
        found: list[str] = []
        answered = threading.Event()

        def ask() -> None:
            try:
                found.extend(living_nodes())
            except Exception as error:
                logger.warning("asking the Ray control service: %r", error)
                return
            answered.set()

        threading.Thread(target=ask, name="helios-ray-ask", daemon=True).start()
        return found if answered.wait(self._timeout_s) else None
