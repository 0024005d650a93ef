"""The engine's loop: its logic over a scripted executor, and the real executor with a tiny checkpoint under load."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from helios_serve.config import EngineConfig, ModelConfig
from helios_serve.engine.async_engine import MAX_UNDECODED_CHUNKS, AsyncEngine
from helios_serve.errors import CapacityError, InvalidRequestError
from helios_serve.model_executor.conditioning import Conditioning
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.model_executor.runner import Runner, StepResult
from helios_serve.types import (
    ChunkTask,
    Completed,
    Decoded,
    DecodeTask,
    Encoded,
    Event,
    ExecutorEvent,
    Failure,
    Frames,
    Progress,
    PromptChange,
    SamplingParams,
    Segment,
    SegmentReady,
    StepCursor,
    StepDone,
    TaskDone,
    TaskFailed,
    TensorRef,
    VideoRequest,
)
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.local_executor import LocalExecutor
from helios_serve.workers.vae import VaeWorker

LIMIT_S = 60


def request(name: str, *, task: str = "t2v", **options: object) -> VideoRequest:
    fields: dict[str, object] = {"width": 64, "height": 64, "num_frames": 33, "fps": 24, "seed": 1}
    params = SamplingParams(**{**fields, "steps": (1, 1, 1), "guidance_scale": 1.0, **options})  # type: ignore[arg-type]
    count = {"t2v": 0, "i2v": 1, "v2v": 40}[task]
    pixels = bytes(count * params.height * params.width * 3)
    media = Frames(data=pixels, num_frames=count, height=params.height, width=params.width)
    return VideoRequest(
        request_id=name,
        prompts=(PromptChange(chunk=0, prompt=name),),
        params=params,
        image=media if task == "i2v" else None,
        video=media if task == "v2v" else None,
    )


class ScriptedExecutor:
    """Does nothing by itself: it notes what it is asked, and the test answers."""

    def __init__(self) -> None:
        self.encodes: list[str] = []
        self.chunks: list[tuple[str, int]] = []
        self.tasks: list[ChunkTask] = []
        self.decodes: list[tuple[str, int]] = []
        self.released: list[str] = []
        self.num_closed = 0

    def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        self._emit = emit

    def encode(self, request: VideoRequest) -> None:
        self.encodes.append(request.request_id)

    def submit(self, task: ChunkTask) -> None:
        self.chunks.append((task.request_id, task.chunk))
        self.tasks.append(task)

    def decode(self, task: DecodeTask) -> None:
        self.decodes.append((task.request_id, task.chunk))

    def release(self, request_id: str) -> None:
        self.released.append(request_id)

    def close(self) -> None:
        self.num_closed += 1

    async def emit(self, *events: ExecutorEvent) -> None:
        """Emits from another thread, as workers do, and lets the loop handle it."""
        for event in events:
            await asyncio.to_thread(self._emit, event)
        await settle()

    async def encoded(self, name: str) -> None:
        await self.emit(
            Encoded(request_id=name, conditioning=TensorRef(key="cond"), continuation=TensorRef(key="start"))
        )

    async def chunk_done(self, name: str, chunk: int) -> None:
        latents, continuation = TensorRef(key=f"latents-{chunk}"), TensorRef(key=f"after-{chunk}")
        await self.emit(TaskDone(request_id=name, chunk=chunk, latents=latents, continuation=continuation))

    async def decoded(self, name: str, chunk: int) -> None:
        await self.emit(Decoded(segment=segment(name, chunk)))


def segment(name: str, chunk: int) -> Segment:
    return Segment(request_id=name, chunk=chunk, start_frame=33 * chunk, num_frames=33, init=b"i", media=b"m")


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Client:
    """Consumes the events of one request in a task."""

    def __init__(self, engine: AsyncEngine, video: VideoRequest) -> None:
        self.events: list[Event] = []
        self.stream: AsyncGenerator[Event, None] = engine.submit(video)
        self.task = asyncio.create_task(self._consume())

    async def _consume(self) -> None:
        async for event in self.stream:
            self.events.append(event)

    async def leave(self) -> None:
        """As a server does when its client has gone."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.stream.aclose()


def scripted(
    test: Callable[[AsyncEngine, ScriptedExecutor], Awaitable[None]], config: EngineConfig | None = None
) -> None:
    async def run() -> None:
        executor = ScriptedExecutor()
        engine = AsyncEngine(executor, EngineConfig() if config is None else config)
        await engine.start()
        await asyncio.wait_for(test(engine, executor), LIMIT_S)
        await engine.close()

    asyncio.run(run())


def test_a_request_is_encoded_denoised_and_decoded_chunk_by_chunk() -> None:
    async def test(engine: AsyncEngine, executor: ScriptedExecutor) -> None:
        client = Client(engine, request("a", num_frames=66))
        await settle()
        assert (executor.encodes, executor.chunks) == (["a"], [])
        await executor.encoded("a")
        assert executor.chunks == [("a", 0)]
        cursor = StepCursor(chunk=0)
        await executor.emit(StepDone(steps=(("a", cursor), ("unknown", cursor)), num_sequences=2, device_ms=2.5))
        await executor.chunk_done("a", 0)
        assert executor.chunks == [("a", 0), ("a", 1)]
        assert [task.continuation.key for task in executor.tasks] == ["start", "after-0"]
        assert {task.conditioning.key for task in executor.tasks} == {"cond"}
        await executor.decoded("a", 0)
        await executor.chunk_done("a", 1)
        assert executor.chunks == [("a", 0), ("a", 1)]
        assert executor.decodes == [("a", 0), ("a", 1)]
        assert executor.released == []
        await executor.decoded("a", 1)
        await client.task
        assert client.events == [
            Progress(request_id="a", cursor=cursor, device_ms=2.5),
            SegmentReady(segment=segment("a", 0)),
            SegmentReady(segment=segment("a", 1)),
            Completed(request_id="a"),
        ]
        assert executor.released == ["a"]
        assert engine.num_requests == 0

    scripted(test)


def test_at_most_max_pack_chunks_run_and_requests_take_turns() -> None:
    async def test(engine: AsyncEngine, executor: ScriptedExecutor) -> None:
        clients = [Client(engine, request(name, num_frames=99)) for name in "abc"]
        await settle()
        for name in "bca":
            await executor.encoded(name)
        assert executor.chunks == [("b", 0), ("c", 0)]
        await executor.chunk_done("b", 0)
        assert executor.chunks[2:] == [("a", 0)]
        await executor.chunk_done("c", 0)
        assert executor.chunks[3:] == [("b", 1)]
        await executor.chunk_done("a", 0)
        assert executor.chunks[4:] == [("c", 1)]
        for client in clients:
            await client.leave()

    scripted(test, EngineConfig(max_pack=2))


def test_a_request_does_not_run_ahead_of_its_decoder() -> None:
    async def test(engine: AsyncEngine, executor: ScriptedExecutor) -> None:
        client = Client(engine, request("a", num_frames=330))
        await settle()
        await executor.encoded("a")
        for chunk in range(MAX_UNDECODED_CHUNKS):
            await executor.chunk_done("a", chunk)
        assert executor.chunks[-1] == ("a", MAX_UNDECODED_CHUNKS - 1)
        await executor.decoded("a", 0)
        assert executor.chunks[-1] == ("a", MAX_UNDECODED_CHUNKS)
        await client.leave()

    scripted(test)


def test_a_failure_ends_its_request_and_frees_its_place() -> None:
    async def test(engine: AsyncEngine, executor: ScriptedExecutor) -> None:
        clients = {name: Client(engine, request(name)) for name in "ab"}
        await settle()
        for name in "ab":
            await executor.encoded(name)
        assert executor.chunks == [("a", 0)]
        await executor.emit(TaskFailed(request_id="a", code="media_invalid", message="bad"))
        await clients["a"].task
        assert clients["a"].events == [Failure(request_id="a", code="media_invalid", message="bad")]
        assert executor.released == ["a"]
        assert executor.chunks == [("a", 0), ("b", 0)]
        assert clients["b"].events == []
        await clients["b"].leave()

    scripted(test, EngineConfig(max_pack=1))


def test_late_events_of_a_request_that_left_are_ignored() -> None:
    async def test(engine: AsyncEngine, executor: ScriptedExecutor) -> None:
        gone, waiting = Client(engine, request("a")), Client(engine, request("b"))
        await settle()
        for name in "ab":
            await executor.encoded(name)
        await gone.leave()
        assert executor.released == ["a"]
        assert executor.chunks == [("a", 0), ("b", 0)]
        cursor = StepCursor(chunk=0)
        await executor.encoded("a")
        await executor.emit(StepDone(steps=(("a", cursor),), num_sequences=1, device_ms=1))
        await executor.chunk_done("a", 0)
        await executor.decoded("a", 0)
        await executor.emit(TaskFailed(request_id="a", code="x", message="y"))
        assert executor.decodes == []
        assert engine.num_requests == 1
        await executor.chunk_done("b", 0)
        await executor.decoded("b", 0)
        await waiting.task
        assert waiting.events[-1] == Completed(request_id="b")
        assert gone.events == []

    scripted(test, EngineConfig(max_pack=1))


def test_a_full_engine_refuses_and_takes_again() -> None:
    async def test(engine: AsyncEngine, executor: ScriptedExecutor) -> None:
        clients = [Client(engine, request(name)) for name in "ab"]
        await settle()
        with pytest.raises(CapacityError) as full:
            await anext(engine.submit(request("c")))
        assert (full.value.status, full.value.code) == (503, "capacity_exceeded")
        assert executor.encodes == ["a", "b"]
        await clients[0].leave()
        clients[0] = Client(engine, request("c"))
        await settle()
        assert executor.encodes == ["a", "b", "c"]
        for client in clients:
            await client.leave()
        assert engine.num_requests == 0

    scripted(test, EngineConfig(max_requests=2))


def test_an_engine_that_does_not_run_refuses() -> None:
    async def run() -> None:
        engine = AsyncEngine(ScriptedExecutor(), EngineConfig())
        assert not engine.is_ready()
        with pytest.raises(CapacityError) as stopped:
            await anext(engine.submit(request("a")))
        assert stopped.value.code == "no_worker"
        await engine.start()
        assert engine.is_ready()
        await engine.close()
        assert not engine.is_ready()
        with pytest.raises(CapacityError):
            await anext(engine.submit(request("a")))

    asyncio.run(run())


def test_close_fails_every_request_as_draining() -> None:
    async def run() -> None:
        executor = ScriptedExecutor()
        engine = AsyncEngine(executor, EngineConfig(max_pack=1))
        await engine.start()
        clients = [Client(engine, request(name)) for name in "abc"]
        await settle()
        await executor.encoded("a")
        await engine.close()
        await asyncio.gather(*(client.task for client in clients))
        assert [client.events[-1].code for client in clients] == ["draining"] * 3  # type: ignore[union-attr]
        assert executor.chunks == [("a", 0)], "a closed engine must not begin new chunks"
        assert executor.num_closed == 1
        assert engine.num_requests == 0

    asyncio.run(run())


# The real executor


class Spans:
    """When each step and each decode ran, and what fails on purpose."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, StepResult]] = []
        self.decodes: list[tuple[float, float]] = []
        self.failing_decodes = 0


class WatchedRunner(Runner):
    def __init__(self, model: HeliosModel, spans: Spans) -> None:
        super().__init__(model.transformer, model.rules)
        self.spans = spans

    def step(self, request_ids: Sequence[str] | None = None) -> StepResult:
        if request_ids is not None and "bad step" in request_ids:
            raise RuntimeError("a step went wrong")
        started = time.perf_counter()
        result = super().step(request_ids)
        self.spans.steps.append((started, time.perf_counter(), result))
        return result


class WatchedVae(VaeWorker):
    def __init__(self, model: HeliosModel, spans: Spans) -> None:
        super().__init__(model.vae)
        self.spans = spans

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        if self.spans.failing_decodes > 0:
            self.spans.failing_decodes -= 1
            raise RuntimeError("a decode went wrong")
        started = time.perf_counter()
        pixels = super().decode(latents)
        self.spans.decodes.append((started, time.perf_counter()))
        return pixels


class PickyEncoder(EncoderWorker):
    def encode(self, video: VideoRequest) -> Conditioning:
        if video.request_id == "bad encode":
            raise InvalidRequestError("unreadable", code="media_invalid")
        return super().encode(video)


@pytest.fixture(scope="module")
def model(tiny_distilled: Path) -> HeliosModel:
    return load_model(ModelConfig(model=str(tiny_distilled)))


def live(
    model: HeliosModel,
    test: Callable[[AsyncEngine, LocalExecutor, Spans], Awaitable[None]],
    config: EngineConfig | None = None,
) -> Spans:
    """Runs `test` on an engine with real workers; afterwards no tensor is held and no thread is left."""

    async def run() -> Spans:
        spans = Spans()
        executor = LocalExecutor(
            PickyEncoder(model.text_encoder, model.vae), WatchedRunner(model, spans), WatchedVae(model, spans)
        )
        engine = AsyncEngine(executor, EngineConfig() if config is None else config)
        await engine.start()
        try:
            await asyncio.wait_for(test(engine, executor, spans), LIMIT_S)
        finally:
            await engine.close()
        assert executor._table._held == {}
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("helios-")]
        return spans

    return asyncio.run(run())


async def collect(engine: AsyncEngine, video: VideoRequest) -> list[Event]:
    return [event async for event in engine.submit(video)]


def segments(events: list[Event]) -> list[Segment]:
    return [event.segment for event in events if isinstance(event, SegmentReady)]


def test_eight_mixed_requests_complete(model: HeliosModel) -> None:
    videos = [
        request("a"),
        request("b", task="i2v", width=128, num_frames=40),
        request("c", task="v2v", steps=(2, 1, 2), num_frames=99),
        request("d", height=128, guidance_scale=5.0),
        request("e", amplify_first_chunk=True, num_frames=66),
        request("f", task="i2v", guidance_scale=2.0, num_frames=67, steps=(1, 2, 1)),
        request("g", num_frames=1),
        request("h", num_frames=132, skip_first_chunk=True, frame_policy="reference"),
    ]

    async def test(engine: AsyncEngine, _executor: LocalExecutor, _spans: Spans) -> None:
        results = await asyncio.gather(*(collect(engine, video) for video in videos))
        for video, events in zip(videos, results, strict=True):
            params = video.params
            assert events[-1] == Completed(request_id=video.request_id)
            assert not any(isinstance(event, Completed | Failure) for event in events[:-1])
            made = segments(events)
            assert [one.chunk for one in made] == list(range(params.num_chunks))
            assert sum(one.num_frames for one in made) == params.num_output_frames
            assert {one.request_id for one in made} == {video.request_id}
            cursors = [event.cursor for event in events if isinstance(event, Progress)]
            assert len(cursors) == params.total_steps
            assert all(one.next(params) == other for one, other in pairwise(cursors))
        assert engine.num_requests == 0

    spans = live(model, test)
    assert max(result.num_sequences for *_, result in spans.steps) >= 4
    assert max(len(result.steps) for *_, result in spans.steps) <= 4


def test_decoding_overlaps_with_denoising_the_next_chunk(model: HeliosModel) -> None:
    async def test(engine: AsyncEngine, _executor: LocalExecutor, _spans: Spans) -> None:
        await collect(engine, request("a", num_frames=165, width=128, steps=(2, 2, 2)))

    spans = live(model, test)
    for chunk, (began, ended) in enumerate(spans.decodes[:-1]):
        following = [(s, e) for s, e, result in spans.steps if result.steps[0][1].chunk == chunk + 1]
        assert any(start < ended and end > began for start, end in following), f"chunk {chunk}"


def test_a_client_that_leaves_stops_its_request_within_a_step(model: HeliosModel) -> None:
    async def test(engine: AsyncEngine, executor: LocalExecutor, spans: Spans) -> None:
        stream = engine.submit(request("long", steps=(2000, 1, 1)))
        assert isinstance(await anext(stream), Progress)
        await stream.aclose()
        num_steps = len(spans.steps)
        assert executor._table._held == {}
        done = await collect(engine, request("next"))
        assert done[-1] == Completed(request_id="next")
        late = [result for *_, result in spans.steps[num_steps:] if any(name == "long" for name, _ in result.steps)]
        assert len(late) <= 1
        assert executor._runner.active == ()

    live(model, test)


@pytest.mark.parametrize(
    ("name", "code"),
    [("bad encode", "media_invalid"), ("bad step", "generation_failed"), ("bad decode", "generation_failed")],
)
def test_a_failure_ends_only_its_request(model: HeliosModel, name: str, code: str) -> None:
    async def test(engine: AsyncEngine, _executor: LocalExecutor, spans: Spans) -> None:
        if name == "bad decode":
            spans.failing_decodes = 1
            assert (await collect(engine, request(name)))[-1].code == code  # type: ignore[union-attr]
            names = ["good"]
        else:
            names = ["one", name, "other"]
        results = await asyncio.gather(*(collect(engine, request(one, num_frames=66)) for one in names))
        for one, events in zip(names, results, strict=True):
            if one == name:
                assert isinstance(events[-1], Failure)
                assert events[-1].code == code
                assert segments(events) == []
            else:
                assert events[-1] == Completed(request_id=one)
                assert len(segments(events)) == 2

    live(model, test)


def test_close_in_the_middle_of_work(model: HeliosModel) -> None:
    async def test(engine: AsyncEngine, _executor: LocalExecutor, spans: Spans) -> None:
        running = [asyncio.create_task(collect(engine, request(name, steps=(2000, 1, 1)))) for name in "abcdef"]
        while len(spans.steps) < 3:
            await asyncio.sleep(0.005)
        await engine.close()
        num_steps = len(spans.steps)
        for name, events in zip("abcdef", await asyncio.gather(*running), strict=True):
            assert isinstance(events[-1], Failure)
            assert (events[-1].request_id, events[-1].code) == (name, "draining")
        assert len(spans.steps) == num_steps

    live(model, test)


def test_a_long_video_holds_no_more_tensors_than_a_short_one(model: HeliosModel) -> None:
    """The table keeps the conditioning, the continuation, and the latents that wait for the VAE."""

    async def test(engine: AsyncEngine, executor: LocalExecutor, _spans: Spans) -> None:
        async for event in engine.submit(request("a", num_frames=20 * 33)):
            if isinstance(event, SegmentReady):
                held = executor._table._held["a"]
                latents = [key for key in held if key not in ("conditioning", "continuation")]
                assert len(latents) <= MAX_UNDECODED_CHUNKS

    live(model, test)
