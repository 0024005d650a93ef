"""The executor of several processes and nodes: every worker is a Ray actor, every group of ranks a placement group.

One thread runs everything here, on an event loop of its own: it starts groups, passes tasks on, hears beats and deaths,
kills and replaces. Knows nothing of requests, scheduling or tensors; references are Ray objects that this process owns,
on its node, so that they outlive every worker.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from helios_serve.config import ExecutorConfig, ModelConfig
from helios_serve.faults import NO_FAULTS, FaultPlan
from helios_serve.types import (
    Beat,
    ChunkTask,
    DecodeTask,
    Encoded,
    ExecutorEvent,
    GoldenCheck,
    GroupLost,
    GroupUp,
    Parked,
    RoleTask,
    Signal,
    TaskDone,
    TaskFailed,
    TensorRef,
)
from helios_serve.workers.payload import num_bytes, pack, unpack
from helios_serve.workers.processes import Process
from helios_serve.workers.ray_cluster import EXIT_RESTART, Cluster, ControlWatch, living_nodes
from helios_serve.workers.ray_life import Life, Reapers, Seat, reason, seats
from helios_serve.workers.ray_wire import Batch
from helios_serve.workers.records import latents_of, record_of
from helios_serve.workers.respawn import RespawnConfig, RespawnPolicy

logger = logging.getLogger(__name__)


END_TIMEOUT_S = 5.0
"""Patience with the killing of workers when all ends; Ray ends what is left."""


class _Group:
    """One group through all its incarnations; `life` is the present one."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.incarnation = 0
        self.policy = RespawnPolicy(RespawnConfig())
        self.life: Life | None = None


class RayExecutor:
    """Runs encoders, DiT groups and VAE workers as Ray actors.

    Args:
        model: what the workers load; every node must find it under this name.
        config: how many there are, and where.
        faults: pickled into each worker.
        exit_process: ends this process at once, with a status; called when the cluster is gone.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: ExecutorConfig,
        faults: FaultPlan = NO_FAULTS,
        exit_process: Callable[[int], None] = os._exit,
    ) -> None:
        gpus = (config.gpus_per_encoder, config.gpus_per_rank, config.gpus_per_vae)
        if model.device == "cuda" and 0 in gpus:
            raise ValueError(f"device cuda: every role needs a share of a GPU, but they have {gpus}")
        self._model, self._config, self._faults, self._exit_process = model, config, faults, exit_process
        self._groups = {seat.group: _Group(seat) for seat in seats(config)}
        self._emit: Callable[[ExecutorEvent], None] = lambda _: None
        self._objects: dict[str, Any] = {}
        self._num_keys = 0
        self._put_numbers = itertools.count()
        self._reapers = Reapers(config.spawn_timeout_s)
        self._chores: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._closed = asyncio.Event()
        self._thread = threading.Thread(target=self._run_loop, name="helios-ray", daemon=True)

    def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        self._emit = emit
        self._thread.start()

    def submit(self, group: str, tasks: Sequence[RoleTask]) -> None:
        self._call(self._submit, group, tuple(tasks))

    def signal(self, group: str, task_id: str, op: Signal) -> None:
        self._call(self._signal, group, task_id, op)

    def condemn(self, group: str, why: str) -> None:
        self._call(self._condemn, group, why)

    def drop(self, refs: Sequence[TensorRef]) -> None:
        self._call(self._drop, tuple(refs))

    def read(self, ref: TensorRef) -> bytes:
        return record_of(unpack(ray.get(self._objects[ref.key])))

    def put(self, name: str, record: bytes) -> TensorRef:
        payload = pack(latents_of(record))
        key = f"{name}#put{next(self._put_numbers)}"
        self._objects[key] = ray.put(payload)
        return TensorRef(key=key, num_bytes=num_bytes(payload))

    def recheck(self, timeout_s: float) -> tuple[GoldenCheck, ...]:
        work = self._recheck(timeout_s)
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s + END_TIMEOUT_S)
        except (RuntimeError, TimeoutError, CancelledError):  # the loop is closed, or closes meanwhile
            work.close()
            return ()

    def close(self, drain_s: float) -> None:
        if self._thread.ident is None:
            self._loop.close()
            return
        self._call(self._closed.set)
        self._thread.join(drain_s)
        if self._thread.is_alive():
            logger.error("the Ray workers did not end within %.1f s", drain_s)

    def processes(self, group: str) -> tuple[Process, ...]:
        """The processes of a group's present incarnation, by rank. Any thread may ask."""
        life = self._groups[group].life
        return () if life is None else tuple(hello.process for hello in life.hellos)

    @property
    def num_objects(self) -> int:
        """References that were not dropped yet. Any thread may ask."""
        return len(self._objects)

    # Below, everything runs on the thread of the loop.

    def _call(self, work: Callable[..., None], *args: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: there is nobody left to ask
            self._loop.call_soon_threadsafe(work, *args)

    def _run_loop(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except Exception:
            logger.critical("the Ray executor failed; this process ends", exc_info=True)
            self._exit_process(EXIT_RESTART)
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        cluster = Cluster(self._config)
        self._node_id = cluster.node_id
        await self._reapers.meet(living_nodes())
        for group in self._groups.values():
            self._begin(group, 0.0)
        watch = ControlWatch(
            on_nodes=lambda nodes: self._call(self._chore, self._reapers.meet, nodes),
            on_lost=lambda: self._call(self._lose_all, "the Ray control service is gone"),
            on_end=lambda: self._give_up(cluster),
        )
        await self._closed.wait()
        watch.close()
        await self._end()
        cluster.close()

    def _give_up(self, cluster: Cluster) -> None:
        """Ends this process, and what a dead control service would leave behind. Called on another thread."""
        cluster.kill()
        self._exit_process(EXIT_RESTART)

    async def _end(self) -> None:
        """Kills all workers, and waits until that is done."""
        lives = [life for group in self._groups.values() if (life := group.life) is not None]
        for group in self._groups.values():
            group.life = None
        for life in lives:
            life.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                await asyncio.gather(*(life.bury(self._reapers) for life in lives), *self._chores)
        self._objects.clear()

    # Groups come up, live, and are lost.

    def _begin(self, group: _Group, delay_s: float) -> None:
        life = group.life = Life(group.seat, group.incarnation, self._emit)
        self._work(life, self._bring_up(group, life, delay_s))

    async def _bring_up(self, group: _Group, life: Life, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        try:
            async with asyncio.timeout(self._config.spawn_timeout_s):
                await life.spawn(self._model, self._config.cache_bytes, self._faults)
        except TimeoutError:
            # Nobody is at fault: the cluster has no room now, and may have later.
            logger.warning("no node has %s free for a process of %s; waiting", life.seat.needs, life.seat.group)
            self._replace(group, life, 0.0)
            return
        except (RayError, RuntimeError) as error:
            self._lose(group, life, f"it did not start: {reason(error)}")
            return
        try:
            async with asyncio.timeout(self._config.load_timeout_s):
                golden = await life.load()
        except (RayError, RuntimeError, TimeoutError) as error:
            self._lose(group, life, f"it did not load: {reason(error)}")
            return
        life.is_up = True
        for rank, host in enumerate(life.hosts):
            self._work(life, self._mourn(group, life, rank, host))
        self._work(life, self._hear_beats(group, life))
        self._emit(
            GroupUp(
                group=life.seat.group,
                role=life.seat.role,
                num_ranks=life.seat.num_ranks,
                incarnation=life.incarnation,
                golden=golden,
            )
        )

    async def _mourn(self, group: _Group, life: Life, rank: int, host: Any) -> None:
        """Waits for the end of a process. One dead rank is the end of its group."""
        try:
            await host.life.remote()
        except RayError as error:
            self._lose(group, life, f"rank {rank} is gone: {reason(error)}")

    async def _hear_beats(self, group: _Group, life: Life) -> None:
        """Asks all ranks for a beat, again and again; a group with a silent rank is silent."""
        while True:
            asked_s = time.monotonic()
            beats = [host.beat.remote() for host in life.hosts]
            try:
                replies = [await beats[0]]
                life.inbox.add(replies[0].batch)
                replies += [await beat for beat in beats[1:]]
            except RayError as error:
                self._lose(group, life, f"no beat: {reason(error)}")
                return
            self._emit(
                Beat(
                    group=group.seat.group,
                    incarnation=life.incarnation,
                    progress=min(reply.progress for reply in replies),
                    task_ids=replies[0].task_ids,
                )
            )
            await asyncio.sleep(max(0.0, asked_s + self._config.beat_s - time.monotonic()))

    def _condemn(self, name: str, why: str) -> None:
        group = self._groups[name]
        if group.life is not None and group.life.is_up:
            self._lose(group, group.life, why)

    def _lose_all(self, why: str) -> None:
        for group in self._groups.values():
            life, group.life = group.life, None
            if life is not None:
                life.cancel()
                self._say_lost(group, life, why)

    def _lose(self, group: _Group, life: Life, why: str) -> None:
        """Says that an incarnation is gone, then kills what is left of it and prepares the next one."""
        if life is not group.life:
            return
        self._say_lost(group, life, why)
        delay_s = group.policy.lost(time.monotonic())
        if delay_s is None:
            logger.error("group %s was lost too often and stays out; the last time: %s", group.seat.group, why)
        else:
            logger.warning("group %s is made anew in %.0f s: %s", group.seat.group, delay_s, why)
        self._replace(group, life, delay_s)

    def _replace(self, group: _Group, life: Life, delay_s: float | None) -> None:
        """Kills what is left of an incarnation; the next one does not wait for that, and None asks for none."""
        group.incarnation += 1
        group.life = None
        life.cancel()
        self._chore(life.bury, self._reapers)
        if delay_s is not None:
            self._begin(group, delay_s)

    def _say_lost(self, group: _Group, life: Life, why: str) -> None:
        if life.is_up:
            self._emit(GroupLost(group=group.seat.group, incarnation=life.incarnation, why=why))

    # Tasks and their objects.

    def _submit(self, name: str, tasks: Sequence[RoleTask]) -> None:
        group = self._groups[name]
        life = group.life
        if life is None or not life.is_up:
            return  # GroupLost was said
        for task in tasks:
            self._work(life, self._run(group, life, task))

    async def _run(self, group: _Group, life: Life, task: RoleTask) -> None:
        """Has a task done. Nothing is heard of it once the incarnation is over."""
        self._num_keys += 1
        key = f"{task.task_id}#{self._num_keys}"
        try:
            refs = {ref.key: self._objects[ref.key] for ref in _inputs(task)}
        except KeyError as error:
            message = f"generation failed: its input {error} was dropped"
            self._emit(TaskFailed(task_id=task.task_id, fault="error", code="generation_failed", message=message))
            return
        (head, body), *others = [host.run.remote(task, refs, key) for host in life.hosts]
        try:
            for other, _ in others:
                await other
            batch: Batch = await head
            if batch.events and isinstance(batch.events[-1], Encoded | TaskDone | Parked):
                self._objects[key] = await self._own(life, body)
        except RayError as error:
            # Even if its process lives: other ranks may run the task, and a lost batch would hold up those after it.
            self._lose(group, life, f"{task.task_id} had no answer: {reason(error)}")
        else:
            life.inbox.add(batch)

    async def _own(self, life: Life, body: Any) -> Any:
        """The result of a worker, on this node: it is read out here before anybody is told of it."""
        value = await body
        return body if life.hellos[0].node_id == self._node_id else ray.put(value)

    def _signal(self, name: str, task_id: str, op: Signal) -> None:
        life = self._groups[name].life
        if life is not None and life.is_up:
            life.hosts[0].signal.remote(task_id, op)

    async def _recheck(self, timeout_s: float) -> tuple[GoldenCheck, ...]:
        lives = [life for group in self._groups.values() if (life := group.life) is not None]
        asked = [life.recheck(timeout_s) for life in lives if life.is_up and life.seat.role == "dit"]
        return tuple(await asyncio.gather(*asked))

    def _drop(self, refs: Sequence[TensorRef]) -> None:
        for ref in refs:
            self._objects.pop(ref.key, None)

    # Coroutines, each with an owner.

    def _work(self, life: Life, work: Coroutine[Any, Any, None]) -> None:
        """Runs a coroutine that ends with an incarnation."""
        task = self._loop.create_task(work)
        life.work.add(task)
        task.add_done_callback(lambda done: self._done(done, life.work))

    def _chore(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        task = self._loop.create_task(work(*args))
        self._chores.add(task)
        task.add_done_callback(lambda done: self._done(done, self._chores))

    def _done(self, task: asyncio.Task[None], owner: set[asyncio.Task[None]]) -> None:
        owner.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("a defect in the Ray executor", exc_info=error)


def _inputs(task: RoleTask) -> tuple[TensorRef, ...]:
    if isinstance(task, ChunkTask):
        optional = (task.first, task.parked)
        return (task.conditioning, *task.trail, *(ref for ref in optional if ref is not None))
    if isinstance(task, DecodeTask):
        return (task.latents,)
    return () if task.conditioning is None else (task.conditioning,)
