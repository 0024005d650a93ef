"""The engine on an event loop with the real workers and a tiny checkpoint."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helios_serve.config import EngineConfig, ModelConfig
from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.errors import CapacityError, GenerationError, InvalidRequestError
from helios_serve.executors import cost_model
from helios_serve.faults import Fault, FaultPlan
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.model_executor.runner import Runner, StepResult
from helios_serve.offline import Helios
from helios_serve.telemetry import Metrics
from helios_serve.types import (
    Completed,
    DecodeTask,
    Event,
    ExecutorEvent,
    Failure,
    Frames,
    Progress,
    PromptChange,
    SamplingParams,
    Segment,
    SegmentReady,
    VideoRequest,
)
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.local_executor import LocalExecutor
from helios_serve.workers.vae import Pictures, VaeWorker

LIMIT_S = 120
PATIENT = EngineConfig(ttfc_target_s=60.0).patient()


def request(name: str, *, task: str = "t2v", service_class: str = "offline", **options: object) -> VideoRequest:
    fields: dict[str, object] = {"width": 64, "height": 64, "num_frames": 33, "fps": 24, "seed": 1}
    params = SamplingParams(**{**fields, "steps": (1, 1, 1), "guidance_scale": 1.0, **options})  # type: ignore[arg-type]
    count = {"t2v": 0, "i2v": 1, "v2v": 40}[task]
    size = count * params.height * params.width * 3
    media = Frames(
        data=bytes(i * 7 % 251 for i in range(size)), num_frames=count, height=params.height, width=params.width
    )
    return VideoRequest(
        request_id=name,
        prompts=(PromptChange(chunk=0, prompt=name),),
        params=params,
        image=media if task == "i2v" else None,
        video=media if task == "v2v" else None,
        service_class=service_class,  # type: ignore[arg-type]
    )


@dataclass
class Watch:
    """What the workers of a test did."""

    steps: list[StepResult] = field(default_factory=list)
    latents: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    events: list[ExecutorEvent] = field(default_factory=list)
    executor: LocalExecutor | None = None
    metrics: Metrics | None = None


class WatchedRunner(Runner):
    def __init__(self, model: HeliosModel, watch: Watch, faults: FaultPlan) -> None:
        super().__init__(model.transformer, model.rules, faults=faults)
        self._watch = watch

    def step(self, task_ids: Sequence[str] | None = None) -> StepResult:
        result = super().step(task_ids)
        self._watch.steps.append(result)
        return result


class WatchedVae(VaeWorker):
    def __init__(self, model: HeliosModel, watch: Watch, faults: FaultPlan) -> None:
        super().__init__(model.vae, faults)
        self._watch = watch

    def decode_pictures(self, task: DecodeTask, latents: Tensor) -> Pictures:
        self._watch.latents[task.request_id, task.chunk] = latents.clone()
        return super().decode_pictures(task, latents)


@pytest.fixture(scope="module")
def model(tiny_distilled: Path) -> HeliosModel:
    return load_model(ModelConfig(model=str(tiny_distilled)))


Test = Callable[[AsyncEngine, Watch], Awaitable[None]]


def live(model: HeliosModel, test: Test, config: EngineConfig = PATIENT, faults: FaultPlan | None = None) -> Watch:
    """Runs `test` on an engine with real workers; afterwards no tensor is held and no thread is left."""

    async def run() -> Watch:
        threads = {*threading.enumerate()}
        plan = FaultPlan() if faults is None else faults
        watch = Watch()
        executor = LocalExecutor(
            EncoderWorker(model.text_encoder, model.vae, faults=plan),
            WatchedRunner(model, watch, plan),
            WatchedVae(model, watch, plan),
        )
        watch.executor, watch.metrics = executor, Metrics("tiny")
        engine = AsyncEngine(executor, cost_model(model.config, "cpu", is_shared=True), config, watch.metrics)
        start = executor.start

        def recording(emit: Callable[[ExecutorEvent], None]) -> None:
            def both(event: ExecutorEvent) -> None:
                watch.events.append(event)
                emit(event)

            start(both)

        executor.start = recording  # type: ignore[method-assign]
        await engine.start()
        try:
            async with asyncio.timeout(LIMIT_S):
                await engine.wait_ready()
                await test(engine, watch)
        finally:
            await engine.close()
        assert executor._table.keys == ()
        left = {*threading.enumerate()} - threads
        assert not [thread for thread in left if thread.name.startswith("helios-")]
        return watch

    return asyncio.run(run())


async def collect(engine: AsyncEngine, video: VideoRequest) -> list[Event]:
    return [event async for event in engine.submit(video)]


def segments(events: list[Event]) -> list[Segment]:
    return [event.segment for event in events if isinstance(event, SegmentReady)]


MIXED = [
    request("a"),
    request("b", task="i2v", width=128, num_frames=40),
    request("c", task="v2v", steps=(2, 1, 2), num_frames=99),
    request("d", height=128, guidance_scale=5.0),
    request("e", amplify_first_chunk=True, num_frames=66),
    request("f", task="i2v", guidance_scale=2.0, num_frames=67, steps=(1, 2, 1)),
    request("g", num_frames=1),
    request("h", num_frames=132, skip_first_chunk=True, frame_policy="reference"),
]


def test_eight_mixed_requests_equal_their_solo_runs(model: HeliosModel, tiny_distilled: Path) -> None:
    async def test(engine: AsyncEngine, _watch: Watch) -> None:
        results = await asyncio.gather(*(collect(engine, video) for video in MIXED))
        for video, events in zip(MIXED, results, strict=True):
            params = video.params
            assert events[-1] == Completed(request_id=video.request_id)
            assert not any(isinstance(event, Completed | Failure) for event in events[:-1])
            made = segments(events)
            assert [one.chunk for one in made] == list(range(params.num_chunks))
            assert sum(one.num_frames for one in made) == params.num_output_frames
            cursors = [event.cursor for event in events if isinstance(event, Progress)]
            assert len(cursors) == params.total_steps
            assert all(one.next(params) == other for one, other in pairwise(cursors))
        assert engine.num_requests == 0

    watch = live(model, test, replace(PATIENT, batching="always"))
    assert max(max(result.pack_sizes) for result in watch.steps) >= 2  # how many depends on when each is encoded
    alone = Helios(str(tiny_distilled), device="cpu", dtype="float32")
    for video in MIXED:
        for chunk in alone.run(video):
            together = watch.latents[video.request_id, chunk.index]
            error = (together - chunk.latents).abs().max()
            assert error <= 2e-4, (video.request_id, chunk.index)
            assert (together - chunk.latents).norm() <= 2e-5 * chunk.latents.norm()


def test_decoding_overlaps_with_denoising_and_with_encoding_the_next_request(model: HeliosModel) -> None:
    """From the spans that the workers report."""

    async def test(engine: AsyncEngine, watch: Watch) -> None:
        first = asyncio.create_task(collect(engine, request("a", num_frames=330, width=128, steps=(2, 2, 2))))
        while len(watch.steps) < 8:
            await asyncio.sleep(0.002)
        await collect(engine, request("b", task="v2v", width=128, height=128))
        await first

    watch = live(model, test)
    phases = [
        p for event in watch.events for p in getattr(event, "phases", None) or [getattr(event, "phase", None)] if p
    ]
    spans = {
        name: [(p.started_s, p.ended_s) for p in phases if p.name == name]
        for name in ("chunk", "decode", "mux", "video_encode")
    }

    def overlap(one: str, other: str) -> int:
        return sum(any(s < end and e > start for s, e in spans[other]) for start, end in spans[one])

    assert len(spans["decode"]) == 11
    assert overlap("decode", "chunk") >= 5
    assert overlap("video_encode", "chunk") == 1


def test_a_client_that_leaves_stops_its_request_within_a_step(model: HeliosModel) -> None:
    async def test(engine: AsyncEngine, watch: Watch) -> None:
        stream = engine.submit(request("long", steps=(2000, 1, 1)))
        assert isinstance(await anext(stream), Progress)
        await stream.aclose()
        num_steps = len(watch.steps)
        done = await collect(engine, request("next"))
        assert done[-1] == Completed(request_id="next")
        late = [s for s in watch.steps[num_steps:] if any(task_id.startswith("long/") for task_id, _ in s.steps)]
        assert len(late) <= 2, "the one in flight, and at most one that had begun before the signal came"

    live(model, test)


def test_a_realtime_request_parks_an_offline_chunk(model: HeliosModel) -> None:
    """The parked chunk goes on where it was: no step is done twice, and its video is what it is alone."""
    offline = request("offline", steps=(40, 40, 40), num_frames=66)

    async def test(engine: AsyncEngine, watch: Watch) -> None:
        running = asyncio.create_task(collect(engine, offline))
        while len(watch.steps) < 20:
            await asyncio.sleep(0.002)
        events = await collect(engine, request("live", fps=1.0, service_class="realtime"))
        assert events[-1] == Completed(request_id="live")
        assert not running.done()
        assert isinstance((await running)[-1], Completed)

    watch = live(model, test, replace(PATIENT, batching="off"))
    assert any(type(event).__name__ == "Parked" for event in watch.events)
    done = [task_id for step in watch.steps for task_id, _ in step.steps if task_id.startswith("offline/")]
    assert len(done) == 240


def test_an_offline_request_is_served_while_a_stream_is_always_due(model: HeliosModel) -> None:
    """The stream plays a little slower than it is made, and is due until it is five chunks ahead; without ageing the
    offline request would wait for that."""

    async def test(engine: AsyncEngine, watch: Watch) -> None:
        measured = request("measured", steps=(8, 8, 8), num_frames=66)
        await collect(engine, measured)
        costs = engine._engine._model
        chunk_s = costs.timing(measured.params, 1, 1).occupied_s
        live_params = replace(measured.params, fps=33 * 0.8 / chunk_s, num_frames=33 * 60)
        stream = asyncio.create_task(
            collect(engine, replace(request("live", service_class="realtime"), params=live_params))
        )
        while not any(task_id.startswith("live/") for step in watch.steps for task_id, _ in step.steps):
            await asyncio.sleep(0.005)
        before = len(watch.steps)
        offline = await collect(engine, request("offline", steps=(8, 8, 8)))
        assert isinstance(offline[-1], Completed)
        during = [task_id for step in watch.steps[before:] for task_id, _ in step.steps]
        first = next(i for i, task_id in enumerate(during) if task_id.startswith("offline/"))
        assert 0.5 * 1.0 <= first * chunk_s / 24 <= 6.0, (
            "about a second of the stream's steps first, not its whole lead"
        )
        assert not stream.done()
        stream.cancel()

    live(model, test, replace(PATIENT, batching="off", age_after_s=1.0))


def test_two_tenants_share(model: HeliosModel) -> None:
    """Two tenants, one with far more to do: the other's requests do not wait for all of it."""
    many = [replace(request(f"many{index}", num_frames=66), tenant="many") for index in range(8)]
    few = [replace(request(f"few{index}", num_frames=66), tenant="few") for index in range(2)]

    async def test(engine: AsyncEngine, _watch: Watch) -> None:
        order: list[str] = []

        async def run(video: VideoRequest) -> None:
            await collect(engine, video)
            order.append(video.request_id)

        await asyncio.gather(*(run(video) for video in (*many, *few)))
        assert max(order.index("few0"), order.index("few1")) <= 6, order

    while_all_are_encoded = Fault(point="dit.step", action="sleep", seconds=2.0)
    live(model, test, replace(PATIENT, batching="off"), FaultPlan(while_all_are_encoded))


def test_what_the_server_cannot_take_is_refused_with_a_time(model: HeliosModel) -> None:
    async def test(engine: AsyncEngine, _watch: Watch) -> None:
        with pytest.raises(InvalidRequestError, match="highest") as unsustainable:
            await anext(engine.submit(request("fast", fps=60.0, steps=(90, 90, 90), service_class="realtime")))
        assert unsustainable.value.code == "rate_not_sustainable"
        running = [asyncio.create_task(collect(engine, request(f"r{index}"))) for index in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(CapacityError) as full:
            await anext(engine.submit(request("third")))
        assert full.value.code == "capacity_exceeded"
        for events in await asyncio.gather(*running):
            assert isinstance(events[-1], Completed)
        assert isinstance((await collect(engine, request("third")))[-1], Completed)

    live(model, test, replace(PATIENT, max_requests=2))


@pytest.mark.parametrize(
    ("fault", "code", "made"),
    [
        (
            Fault(
                point="text.encode",
                action="raise",
                where={"request_id": "bad"},
                error=InvalidRequestError("unreadable", code="media_invalid"),
            ),
            "media_invalid",
            0,
        ),
        (
            Fault(point="dit.step", action="raise", where={"request_id": "bad", "chunk": 1}, times=99),
            "generation_failed",
            1,
        ),
        (
            Fault(point="dit.step", action="nan", where={"request_id": "bad", "chunk": 1}, times=99),
            "generation_failed",
            1,
        ),
        (Fault(point="vae.decode", action="raise", where={"request_id": "bad"}, times=99), "generation_failed", 0),
    ],
    ids=["bad input", "raises in a step", "not finite", "raises in a decode"],
)
def test_a_failure_ends_only_its_request(model: HeliosModel, fault: Fault, code: str, made: int) -> None:
    names = ["one", "bad", "other"]

    async def test(engine: AsyncEngine, _watch: Watch) -> None:
        results = await asyncio.gather(*(collect(engine, request(name, num_frames=66)) for name in names))
        for name, events in zip(names, results, strict=True):
            if name == "bad":
                assert isinstance(events[-1], Failure)
                assert events[-1].code == code
                assert len(segments(events)) == made
            else:
                assert events[-1] == Completed(request_id=name)
                assert len(segments(events)) == 2

    live(model, test, replace(PATIENT, batching="always"), FaultPlan(fault))


@pytest.mark.parametrize("point", ["dit.step", "vae.decode", "text.encode"])
def test_a_fault_that_passes_costs_a_retry_and_nothing_else(model: HeliosModel, point: str) -> None:
    video = request("one", num_frames=66)

    async def test(engine: AsyncEngine, watch: Watch) -> None:
        undisturbed = segments(await collect(engine, replace(video, request_id="other")))
        events = await collect(engine, video)
        assert events[-1] == Completed(request_id="one")
        assert [s.media for s in segments(events)] == [s.media for s in undisturbed]

    once = Fault(point=point, action="raise", where={"request_id": "one"})
    live(model, test, faults=FaultPlan(once))


def test_out_of_memory_in_a_pack_makes_it_smaller(model: HeliosModel) -> None:
    names = [f"r{index}" for index in range(6)]
    full = [
        Fault(
            point="dit.step",
            action="raise",
            where={"num_chunks": count},
            times=99,
            error=torch.OutOfMemoryError("full"),
        )
        for count in (3, 4, 5, 6)
    ]

    async def test(engine: AsyncEngine, _watch: Watch) -> None:
        for events in await asyncio.gather(*(collect(engine, request(name, num_frames=66)) for name in names)):
            assert isinstance(events[-1], Completed)

    watch = live(model, test, replace(PATIENT, batching="always"), FaultPlan(*full))
    assert any(type(event).__name__ == "PackLimit" for event in watch.events)
    assert max(max(result.pack_sizes, default=0) for result in watch.steps) == 2


def test_poisonous_content_is_refused(model: HeliosModel) -> None:
    """A poisoned request ends the local process; what remains to be seen here is that its content stays out."""

    async def test(engine: AsyncEngine, _watch: Watch) -> None:
        bad = request("bad")
        engine._engine._poison.add(bad, asyncio.get_running_loop().time())
        with pytest.raises(GenerationError, match="same content"):
            await anext(engine.submit(bad))
        assert isinstance((await collect(engine, request("good")))[-1], Completed)

    live(model, test)


def test_draining_ends_the_running_chunks_and_fails_the_rest(model: HeliosModel) -> None:
    names = [f"r{index}" for index in range(4)]

    async def test(engine: AsyncEngine, watch: Watch) -> None:
        running = [asyncio.create_task(collect(engine, request(name, num_frames=33 * 200))) for name in names]
        while len(watch.latents) < 4:
            await asyncio.sleep(0.005)
        began = asyncio.get_running_loop().time()
        await engine.close()
        assert asyncio.get_running_loop().time() - began <= PATIENT.drain_s
        for name, events in zip(names, await asyncio.gather(*running), strict=True):
            assert isinstance(events[-1], Failure)
            assert (events[-1].request_id, events[-1].code) == (name, "draining")
            made = segments(events)
            assert [one.chunk for one in made] == list(range(len(made)))
            started = {event.cursor.chunk for event in events if isinstance(event, Progress)}
            assert len(made) == len(started), "every chunk that had begun was delivered"

    live(model, test)


def test_draining_does_not_wait_for_a_long_chunk(model: HeliosModel) -> None:
    async def test(engine: AsyncEngine, watch: Watch) -> None:
        running = asyncio.create_task(collect(engine, request("slow", steps=(90, 90, 20_000))))
        while len(watch.steps) < 30:
            await asyncio.sleep(0.005)
        began = asyncio.get_running_loop().time()
        await engine.close()
        assert asyncio.get_running_loop().time() - began <= 2.0
        assert isinstance((await running)[-1], Failure)

    live(model, test, replace(PATIENT, drain_s=1.0))


def test_closing_at_once_ends_the_wait_of_an_earlier_close(model: HeliosModel) -> None:
    async def test(engine: AsyncEngine, watch: Watch) -> None:
        running = asyncio.create_task(collect(engine, request("slow", steps=(90, 90, 20_000))))
        while len(watch.steps) < 30:
            await asyncio.sleep(0.005)
        # as if the chunk were expected to end within the drain
        engine._engine._groups.abort_slower_than = lambda _: None  # type: ignore[method-assign]
        patient = asyncio.create_task(engine.close())
        await asyncio.sleep(0.3)
        assert not patient.done()
        began = asyncio.get_running_loop().time()
        await asyncio.gather(engine.close(at_once=True), patient)
        assert asyncio.get_running_loop().time() - began <= 3.0
        assert isinstance((await running)[-1], Failure)

    live(model, test, replace(PATIENT, drain_s=60.0))


def test_an_engine_that_does_not_run_refuses(model: HeliosModel) -> None:
    async def run() -> None:
        executor = LocalExecutor(
            EncoderWorker(model.text_encoder, model.vae),
            Runner(model.transformer, model.rules),
            VaeWorker(model.vae),
        )
        engine = AsyncEngine(executor, cost_model(model.config, "cpu", is_shared=True), PATIENT, Metrics("tiny"))
        assert not engine.is_ready()
        with pytest.raises(CapacityError):
            await anext(engine.submit(request("early")))

    asyncio.run(run())


def test_a_long_video_holds_no_more_tensors_than_a_short_one(model: HeliosModel) -> None:
    """Conditioning, the pinned chunk, three of the trail, and those that wait for the VAE."""

    async def test(engine: AsyncEngine, watch: Watch) -> None:
        assert watch.executor is not None
        async for event in engine.submit(request("a", num_frames=30 * 33)):
            if isinstance(event, SegmentReady):
                assert len(watch.executor._table.keys) <= 8

    live(model, test)


def test_metrics_move(model: HeliosModel) -> None:
    async def test(engine: AsyncEngine, _watch: Watch) -> None:
        await asyncio.gather(*(collect(engine, request(name, num_frames=66)) for name in "abc"))

    watch = live(model, test)
    assert watch.metrics is not None
    text = watch.metrics.render(openmetrics=False)[0].decode()
    rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    label = 'model_name="tiny"'
    assert float(rows[f'helios:request_success_total{{finished_reason="stop",{label}}}']) == 3
    assert float(rows[f"helios:frames_generated_total{{{label}}}"]) == 198
    assert float(rows[f'helios:phase_duration_seconds_count{{{label},phase="mux"}}']) == 6
    assert float(rows[f'helios:phase_duration_seconds_count{{{label},phase="text_encode"}}']) == 3
    assert float(rows[f'helios:denoise_step_seconds_count{{{label},stage="0"}}']) == 6
    assert float(rows[f'helios:worker_up{{{label},role="dit",worker="0"}}']) == 1
