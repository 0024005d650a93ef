"""The engine over a real Ray cluster of two DiT groups, two VAE workers and an encoder: eight mixed requests make the
same videos as alone in one process, whoever is killed or frozen meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from helios_serve.config import EngineConfig, ExecutorConfig, ModelConfig
from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.executors import cost_model
from helios_serve.faults import Fault, FaultPlan
from helios_serve.model_executor.model import load_model
from helios_serve.offline import Helios
from helios_serve.telemetry import Metrics
from helios_serve.types import (
    Completed,
    Event,
    ExecutorEvent,
    Failure,
    Frames,
    GroupLost,
    GroupUp,
    Progress,
    PromptChange,
    SamplingParams,
    SegmentReady,
    VideoRequest,
)

pytest.importorskip("ray", reason="the package ray is missing")

from helios_serve.workers.ray_executor import RayExecutor

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray"), pytest.mark.timeout(400)]

CLUSTER = ExecutorConfig(
    num_encoders=1,
    num_dit_groups=2,
    num_vaes=2,
    cpus_per_encoder=0.5,
    cpus_per_rank=0.5,
    cpus_per_vae=0.5,
    object_store_bytes=256 << 20,
)
PATIENT = EngineConfig(ttfc_target_s=60.0, chunk_floor_s=60.0, encode_timeout_s=60.0, decode_timeout_s=60.0)
SLOW = FaultPlan(
    Fault(point="dit.step", action="sleep", times=10**9, seconds=0.05),
    Fault(point="vae.decode", action="sleep", times=10**9, seconds=0.2),
    Fault(point="text.encode", action="sleep", times=10**9, seconds=0.2),
)
"""Every piece of work takes long enough to be hit in its middle."""


def video(name: str, *, task: str = "t2v", **options: object) -> VideoRequest:
    fields: dict[str, object] = {"width": 64, "height": 64, "num_frames": 66, "fps": 24, "seed": 1}
    params = SamplingParams(**{**fields, "steps": (1, 1, 1), "guidance_scale": 1.0, **options})  # type: ignore[arg-type]
    count = {"t2v": 0, "i2v": 1, "v2v": 40}[task]
    data = bytes(i * 7 % 251 for i in range(count * params.height * params.width * 3))
    media = Frames(data=data, num_frames=count, height=params.height, width=params.width)
    return VideoRequest(
        request_id=name,
        prompts=(PromptChange(chunk=0, prompt=name),),
        params=params,
        image=media if task == "i2v" else None,
        video=media if task == "v2v" else None,
        is_strict=True,
    )


MIXED = [
    video("a"),
    video("b", task="i2v", width=128, num_frames=40),
    video("c", task="v2v", steps=(2, 1, 2), num_frames=99),
    video("d", height=128, guidance_scale=5.0, num_frames=33),
    video("e", amplify_first_chunk=True),
    video("f", task="i2v", guidance_scale=2.0, num_frames=67, steps=(1, 2, 1)),
    video("g", num_frames=1),
    video("h", num_frames=132, skip_first_chunk=True, frame_policy="reference"),
]


@dataclass
class Cluster:
    """The engine, its executor, and when each group was lost and came back."""

    engine: AsyncEngine
    executor: RayExecutor
    metrics: Metrics
    events: list[tuple[float, ExecutorEvent]] = field(default_factory=list)

    def pid(self, group: str) -> int:
        return self.executor.processes(group)[0].pid

    def at(self, kind: type[GroupLost] | type[GroupUp], group: str, since: float) -> float:
        return next(at for at, e in self.events if at > since and isinstance(e, kind) and e.group == group)

    @property
    def num_recomputed(self) -> float:
        text = self.metrics.render(openmetrics=False)[0].decode()
        return float(next(x for x in text.splitlines() if x.startswith("helios:chunks_recomputed_total")).split()[-1])

    async def back(self, group: str, since: float) -> float:
        while True:
            if any(at > since and isinstance(e, GroupUp) and e.group == group for at, e in self.events):
                return self.at(GroupUp, group, since)
            await asyncio.sleep(0.05)

    async def run(self, prefix: str, on_event: Callable[[Event], None] = lambda _: None) -> dict[str, list[bytes]]:
        """The eight requests at once; their segments by name."""

        async def one(request: VideoRequest) -> list[bytes]:
            made = []
            named = replace(request, request_id=f"{prefix}{request.request_id}")
            async for event in self.engine.submit(named):
                on_event(event)
                assert not isinstance(event, Failure), event
                if isinstance(event, SegmentReady):
                    assert event.segment.chunk == len(made)
                    made.append(event.segment.media)
            assert isinstance(event, Completed)
            return made

        results = await asyncio.gather(*(one(request) for request in MIXED))
        return dict(zip((request.request_id for request in MIXED), results, strict=True))


@asynccontextmanager
async def started(
    model: ModelConfig, config: ExecutorConfig, faults: FaultPlan, groups: tuple[str, ...]
) -> AsyncIterator[Cluster]:
    """The engine and its cluster, all groups up; closed afterwards."""
    executor = RayExecutor(model, config, faults)
    metrics = Metrics("tiny")
    costs = cost_model(load_model(model).config, "cpu", is_shared=False)
    cluster = Cluster(AsyncEngine(executor, costs, PATIENT, metrics), executor, metrics)
    start = executor.start

    def recording(emit: Callable[[ExecutorEvent], None]) -> None:
        def both(event: ExecutorEvent) -> None:
            cluster.events.append((time.monotonic(), event))
            emit(event)

        start(both)

    executor.start = recording  # type: ignore[method-assign]
    await cluster.engine.start()
    try:
        async with asyncio.timeout(500):
            await cluster.engine.wait_ready()
            for group in groups:
                await cluster.back(group, 0.0)
            yield cluster
    finally:
        await cluster.engine.close()


def alone(path: Path) -> dict[str, list[bytes]]:
    helios = Helios(str(path), device="cpu", dtype="float32")
    return {
        request.request_id: [helios.encode_segment(chunk, request.params).media for chunk in helios.run(request)]
        for request in MIXED
    }


def patience() -> float:
    """Times are stretched by how busy this machine is."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_whoever_dies_the_videos_are_the_same(tiny_distilled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = alone(tiny_distilled)
    model = ModelConfig(model=str(tiny_distilled))
    report: list[str] = []

    async def test(cluster: Cluster) -> None:
        assert await cluster.run("calm-") == expected
        assert cluster.num_recomputed == 0
        for group, number, needs in (
            ("dit-0", signal.SIGKILL, Progress),
            ("dit-1", signal.SIGSTOP, Progress),
            ("vae-0", signal.SIGKILL, SegmentReady),
            ("encoder-0", signal.SIGKILL, None),
        ):
            await strike(cluster, group, number, needs)

    async def strike(
        cluster: Cluster,
        group: str,
        number: signal.Signals,
        needs: type[Event] | None,  # type: ignore[valid-type]
    ) -> None:
        """Kills or freezes a group in the middle of the eight requests."""
        before, struck = cluster.num_recomputed, 0.0

        def on_event(event: Event) -> None:
            nonlocal struck
            if not struck and needs is not None and isinstance(event, needs):
                struck = time.monotonic()
                os.kill(cluster.pid(group), number)

        running = asyncio.create_task(cluster.run(f"{group}-", on_event))
        if needs is None:
            await asyncio.sleep(0.3)  # the first encoding is under way
            struck = time.monotonic()
            os.kill(cluster.pid(group), number)
        assert await running == expected
        assert struck > 0
        lost_s = cluster.at(GroupLost, group, struck) - struck
        back_s = await cluster.back(group, struck) - struck
        redone = cluster.num_recomputed - before
        report.append(f"{number.name} {group}: seen {lost_s:.2f} s, {redone:.0f} chunk redone, back {back_s:.1f} s")
        limit_s = 2.5 if number == signal.SIGSTOP else 0.5
        assert lost_s <= limit_s * patience()
        assert redone <= (1 if group.startswith("dit") else 0)

    async def run() -> None:
        async with started(model, CLUSTER, SLOW, ("dit-0", "dit-1", "vae-0", "vae-1", "encoder-0")) as cluster:
            await test(cluster)

    asyncio.run(run())
    with capsys.disabled():
        print("", *report, sep="\n  ")


def test_a_request_that_kills_its_worker_fails_alone(tiny_distilled: Path) -> None:
    """Matrix row 20: two workers die of it, then it is poison; the others finish and the groups come back."""
    model = ModelConfig(model=str(tiny_distilled))
    deadly = FaultPlan(Fault(point="dit.step", action="kill", where={"request_id": "deadly"}, times=99))

    async def run() -> None:
        executor = RayExecutor(model, replace(CLUSTER, num_vaes=1), deadly)
        config = load_model(model).config
        engine = AsyncEngine(executor, cost_model(config, "cpu", is_shared=False), PATIENT, Metrics("tiny"))
        await engine.start()

        async def ends(request: VideoRequest) -> Event:
            async for event in engine.submit(request):
                last = event
            return last

        try:
            async with asyncio.timeout(200):
                await engine.wait_ready()
                names = ("one", "deadly", "two")
                shared = [replace(video(name, num_frames=99), is_strict=False) for name in names]
                one, poison, two = await asyncio.gather(*(ends(request) for request in shared))
                assert isinstance(one, Completed)
                assert isinstance(two, Completed)
                assert isinstance(poison, Failure)
                assert poison.code == "request_poisoned"
                assert isinstance(await ends(video("after")), Completed)
        finally:
            await engine.close()

    asyncio.run(run())
