"""The three role threads with a tiny checkpoint, driven by hand: what is emitted, what is held, what is let go."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from helios_serve.config import ModelConfig
from helios_serve.errors import InvalidRequestError
from helios_serve.model_executor.batch import ChunkState
from helios_serve.model_executor.conditioning import Conditioning
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.model_executor.runner import Runner
from helios_serve.types import (
    ChunkTask,
    Decoded,
    DecodeTask,
    Encoded,
    ExecutorEvent,
    PromptChange,
    SamplingParams,
    StepDone,
    TaskDone,
    TaskFailed,
    TensorRef,
    VideoRequest,
)
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.local_executor import LocalExecutor, TensorTable
from helios_serve.workers.vae import VaeWorker

WAIT_S = 30
E = TypeVar("E")


def request(name: str, *, num_frames: int = 33, steps: tuple[int, ...] = (1, 1, 1)) -> VideoRequest:
    params = SamplingParams(width=64, height=64, num_frames=num_frames, fps=24, seed=1, steps=steps, guidance_scale=1.0)
    return VideoRequest(request_id=name, prompts=(PromptChange(chunk=0, prompt=name),), params=params)


class Driver:
    """An executor and the events that it emitted."""

    def __init__(self, executor: LocalExecutor) -> None:
        self.executor = executor
        self.events: queue.SimpleQueue[ExecutorEvent] = queue.SimpleQueue()
        executor.start(self.events.put)

    def next(self, kind: type[E], name: str | None = None) -> E:
        """The next event of a kind (for one request); others are passed over."""
        deadline = time.monotonic() + WAIT_S
        while True:
            event = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            if isinstance(event, kind) and (name is None or event.request_id == name):  # type: ignore[attr-defined]
                return event

    def rest(self) -> list[ExecutorEvent]:
        """What was emitted and not yet taken."""
        events = []
        while not self.events.empty():
            events.append(self.events.get())
        return events

    def begin(self, video: VideoRequest) -> Encoded:
        self.executor.encode(video)
        return self.next(Encoded, video.request_id)

    def submit(self, start: Encoded | TaskDone, conditioning: TensorRef, chunk: int = 0) -> None:
        self.executor.submit(
            ChunkTask(
                request_id=start.request_id, chunk=chunk, conditioning=conditioning, continuation=start.continuation
            )
        )

    @property
    def num_held(self) -> int:
        return len(self.executor._table._held)


@pytest.fixture(scope="module")
def model(tiny_distilled: Path) -> HeliosModel:
    return load_model(ModelConfig(model=str(tiny_distilled)))


@pytest.fixture
def driver(model: HeliosModel) -> Iterator[Driver]:
    made = Driver(
        LocalExecutor(
            EncoderWorker(model.text_encoder, model.vae), Runner(model.transformer, model.rules), VaeWorker(model.vae)
        )
    )
    yield made
    made.executor.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def role_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("helios-")]


def test_a_request_goes_through_all_roles(driver: Driver) -> None:
    video = request("fox", num_frames=40)
    encoded = driver.begin(video)
    start: Encoded | TaskDone = encoded
    for chunk in range(2):
        driver.submit(start, encoded.conditioning, chunk)
        for stage in range(3):
            step = driver.events.get(timeout=WAIT_S)
            assert isinstance(step, StepDone)
            ((name, cursor),) = step.steps
            assert (name, cursor.chunk, cursor.stage, cursor.step) == ("fox", chunk, stage, 0)
            assert step.num_sequences == 1
            assert step.device_ms > 0
        done = driver.events.get(timeout=WAIT_S)
        assert isinstance(done, TaskDone)
        assert (done.request_id, done.chunk) == ("fox", chunk)
        driver.executor.decode(DecodeTask(request_id="fox", chunk=chunk, params=video.params, latents=done.latents))
        segment = driver.next(Decoded).segment
        assert (segment.chunk, segment.start_frame, segment.num_frames) == (chunk, 33 * chunk, (33, 7)[chunk])
        assert segment.init
        assert segment.media
        start = done
    assert set(driver.executor._table._held["fox"]) == {"conditioning", "continuation"}
    driver.executor.release("fox")
    assert driver.num_held == 0


def test_chunks_that_join_share_forwards(driver: Driver) -> None:
    encoded = [driver.begin(request(name, steps=(9, 9, 9))) for name in ("fox", "owl", "elk")]
    for one in encoded:
        driver.submit(one, one.conditioning)
    sizes = []
    for _ in encoded:
        while not isinstance(event := driver.events.get(timeout=WAIT_S), TaskDone):
            assert isinstance(event, StepDone)
            sizes.append(event.num_sequences)
    assert max(sizes) == 3


def test_release_stops_within_a_step_and_lets_go(driver: Driver) -> None:
    encoded = driver.begin(request("fox", steps=(400, 1, 1)))
    driver.submit(encoded, encoded.conditioning)
    driver.next(StepDone)
    driver.executor.release("fox")
    driver.rest()
    wait_until(lambda: not driver.executor._runner.active)
    late = driver.rest()
    assert len(late) <= 2  # the step in flight, and one that ended between release and rest
    assert all(isinstance(event, StepDone) for event in late)
    assert driver.num_held == 0
    assert driver.begin(request("owl"))


def test_a_released_request_leaves_nothing_behind_wherever_it_was(driver: Driver) -> None:
    encoded = driver.begin(request("fox"))
    driver.submit(encoded, encoded.conditioning)
    done = driver.next(TaskDone)
    driver.executor.release("fox")
    driver.executor.decode(DecodeTask(request_id="fox", chunk=0, params=request("fox").params, latents=done.latents))
    driver.submit(done, encoded.conditioning, 1)
    driver.begin(request("owl"))  # the queues are in order: the late work of "fox" has been passed over
    wait_until(lambda: driver.executor._joining.empty())
    assert driver.executor._runner.active == ()
    assert driver.rest() == []
    assert set(driver.executor._table._held) == {"owl"}


def test_a_request_released_while_it_waits_is_not_encoded(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, encoded = threading.Event(), list[str]()
    encode = driver.executor._encoder.encode

    def slow(video: VideoRequest) -> Conditioning:
        encoded.append(video.request_id)
        assert gate.wait(WAIT_S)
        return encode(video)

    monkeypatch.setattr(driver.executor._encoder, "encode", slow)
    for name in ("fox", "owl", "elk"):
        driver.executor.encode(request(name))
    driver.executor.release("fox")
    driver.executor.release("owl")
    gate.set()
    driver.next(Encoded, "elk")
    assert encoded == ["fox", "elk"]
    assert set(driver.executor._table._held) == {"elk"}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InvalidRequestError("bad picture", code="media_invalid"), "media_invalid", "bad picture"),
        (RuntimeError("out of luck"), "generation_failed", "generation failed: RuntimeError: out of luck"),
    ],
)
def test_an_encoder_failure_ends_that_request(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, message: str
) -> None:
    encode = driver.executor._encoder.encode

    def broken(video: VideoRequest) -> Conditioning:
        if video.request_id == "bad":
            raise error
        return encode(video)

    monkeypatch.setattr(driver.executor._encoder, "encode", broken)
    for name in ("bad", "fox"):
        driver.executor.encode(request(name))
    failed = driver.next(TaskFailed)
    assert (failed.request_id, failed.code, failed.message) == ("bad", code, message)
    driver.next(Encoded, "fox")


@pytest.mark.parametrize("method", ["sequences", "advance"])
def test_a_step_failure_ends_that_request_alone(driver: Driver, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Before the forward or after it, and even when a neighbour's chunk is finished by the same step."""
    real = {"sequences": ChunkState.sequences, "advance": ChunkState.advance}[method]

    def broken(state: ChunkState, *arguments: object) -> object:
        if state.input.request_id == "bad" and state.cursor.stage == 2:
            raise RuntimeError("out of luck")
        return real(state, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ChunkState, method, broken)
    gate = threading.Event()
    encoded = {name: driver.begin(request(name)) for name in ("fox", "bad", "owl")}
    run = driver.executor._join

    def gated(task: ChunkTask) -> None:
        gate.wait(WAIT_S)
        run(task)

    monkeypatch.setattr(driver.executor, "_join", gated)
    for one in encoded.values():
        driver.submit(one, one.conditioning)
    gate.set()
    ends: dict[str, ExecutorEvent] = {}
    num_steps = dict.fromkeys(encoded, 0)
    while len(ends) < 3:
        event = driver.events.get(timeout=WAIT_S)
        if isinstance(event, StepDone):
            for name, _ in event.steps:
                num_steps[name] += 1
        elif isinstance(event, TaskDone | TaskFailed):
            ends[event.request_id] = event
    assert {name: type(event) for name, event in ends.items()} == {"fox": TaskDone, "bad": TaskFailed, "owl": TaskDone}
    assert num_steps == {"fox": 3, "bad": 2, "owl": 3}
    assert driver.executor._runner.active == ()


def test_a_join_failure_ends_that_request_alone(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = driver.executor._runner._transformer.embed_history
    monkeypatch.setattr(driver.executor._runner._transformer, "embed_history", lambda _: 1 / 0)
    bad = driver.begin(request("bad"))
    driver.submit(bad, bad.conditioning)
    assert driver.next(TaskFailed).request_id == "bad"
    monkeypatch.setattr(driver.executor._runner._transformer, "embed_history", embed)
    fox = driver.begin(request("fox"))
    driver.submit(fox, fox.conditioning)
    assert driver.next(TaskDone).request_id == "fox"


def test_a_vae_failure_ends_that_request_alone(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    done = {}
    for name in ("bad", "fox"):
        encoded = driver.begin(request(name))
        driver.submit(encoded, encoded.conditioning)
        done[name] = driver.next(TaskDone)
    decode, calls = driver.executor._vae.decode, list[int]()

    def broken(latents: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of luck")
        return decode(latents)

    monkeypatch.setattr(driver.executor._vae, "decode", broken)
    for name, one in done.items():
        driver.executor.decode(DecodeTask(request_id=name, chunk=0, params=request(name).params, latents=one.latents))
    assert driver.next(TaskFailed).request_id == "bad"
    assert driver.next(Decoded).segment.request_id == "fox"


def test_close_ends_all_threads_in_the_middle_of_work(model: HeliosModel) -> None:
    assert role_threads() == []
    driver = Driver(
        LocalExecutor(
            EncoderWorker(model.text_encoder, model.vae), Runner(model.transformer, model.rules), VaeWorker(model.vae)
        )
    )
    encoded = driver.begin(request("fox", steps=(400, 1, 1)))
    driver.submit(encoded, encoded.conditioning)
    driver.next(StepDone)
    assert sorted(name.split("_")[0] for name in role_threads()) == ["helios-dit", "helios-encoder"]
    for _ in range(2):
        driver.executor.close()
        assert role_threads() == []
    assert not any(isinstance(event, TaskDone | TaskFailed) for event in driver.rest())


def test_close_before_start(model: HeliosModel) -> None:
    LocalExecutor(
        EncoderWorker(model.text_encoder, model.vae), Runner(model.transformer, model.rules), VaeWorker(model.vae)
    ).close()


def test_the_table_keeps_nothing_for_a_closed_request() -> None:
    table, value = TensorTable(), torch.zeros(1)
    table.open("fox")
    ref = table.put("fox", "latents", value)
    assert table.get("fox", ref) is value
    assert table.pop("fox", ref) is value
    assert table.get("fox", ref) is None
    assert table.pop("fox", ref) is None
    table.close("fox")
    table.close("fox")
    assert table.get("fox", table.put("fox", "latents", value)) is None
    assert not table.is_open("fox")
