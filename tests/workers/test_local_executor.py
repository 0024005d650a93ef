"""The role threads with a tiny checkpoint, driven by hand: what is emitted, what is held, what goes first."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from helios_serve.config import ModelConfig
from helios_serve.errors import InvalidRequestError
from helios_serve.faults import Fault, FaultPlan
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.model_executor.runner import Runner
from helios_serve.types import (
    Aborted,
    Beat,
    ChunkTask,
    Decoded,
    DecodeTask,
    Encoded,
    EncodeTask,
    ExecutorEvent,
    Frames,
    GroupLost,
    GroupUp,
    Parked,
    StepDone,
    TaskDone,
    TaskFailed,
    TensorRef,
    VideoRequest,
)
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.local_executor import LocalExecutor, LocalSettings, TensorTable
from helios_serve.workers.vae import VaeWorker
from tests.workers.chunks import latents_of, request

WAIT_S = 30
ROLE_THREADS = ["helios-beat", "helios-dit", "helios-encoder", "helios-mux", "helios-vae"]
E = TypeVar("E")


class Driver:
    """An executor, the events that it emitted, and a little of what an engine does with them."""

    def __init__(self, model: HeliosModel, *faults: Fault, beat_s: float = 60.0) -> None:
        self.exits: list[int] = []
        self.events: queue.SimpleQueue[ExecutorEvent] = queue.SimpleQueue()
        plan = FaultPlan(*faults)
        self.executor = LocalExecutor(
            EncoderWorker(model.text_encoder, model.vae, faults=plan),
            Runner(model.transformer, model.rules, faults=plan),
            VaeWorker(model.vae, plan),
            LocalSettings(beat_s=beat_s, exit_process=self.exits.append, faults=plan),
        )
        self._num_tasks = 0

    def start(self) -> None:
        self.executor.start(self.events.put)
        self.ups = {up.group: up for up in (self.next(GroupUp) for _ in range(3))}

    def next(self, kind: type[E], task_id: str | None = None) -> E:
        """The next event of a kind (for one task); others are passed over."""
        deadline = time.monotonic() + WAIT_S
        while True:
            event = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            if isinstance(event, kind) and (task_id is None or event.task_id == task_id):  # type: ignore[attr-defined]
                return event

    def rest(self) -> list[ExecutorEvent]:
        """What was emitted and not yet taken."""
        events = []
        while not self.events.empty():
            events.append(self.events.get())
        return events

    def encode(self, video: VideoRequest) -> str:
        task_id = self._task_id(video.request_id)
        self.executor.submit("encoder-0", [EncodeTask(task_id=task_id, request=video)])
        return task_id

    def begin(self, video: VideoRequest) -> Encoded:
        return self.next(Encoded, self.encode(video))

    def chunk(self, video: VideoRequest, start: Encoded, made: list[TaskDone], parked: TensorRef | None = None) -> str:
        """Submits the chunk after `made`."""
        pinned = video.pinned_chunk(len(made))
        task_id = self._task_id(video.request_id)
        task = ChunkTask(
            task_id=task_id,
            request_id=video.request_id,
            chunk=len(made),
            conditioning=start.conditioning,
            trail=tuple(done.latents for done in made[-3:]),
            first=None if pinned is None else made[pinned].latents,
            generator_state=made[-1].generator_state if made else start.generator_state,
            parked=parked,
            predicted_s=1.0,
        )
        self.executor.submit("dit-0", [task])
        return task_id

    def decode(self, video: VideoRequest, chunk: int, latents: TensorRef, *, is_due: bool = False) -> str:
        task_id = self._task_id(video.request_id)
        task = DecodeTask(
            task_id=task_id,
            request_id=video.request_id,
            chunk=chunk,
            params=video.params,
            latents=latents,
            is_due=is_due,
        )
        self.executor.submit("vae-0", [task])
        return task_id

    @property
    def held(self) -> list[str]:
        """The kinds of what the table holds."""
        return sorted(key.rsplit(":", 1)[1] for key in self.executor._table.keys)

    def _task_id(self, name: str) -> str:
        self._num_tasks += 1
        return f"{name}.{self._num_tasks}"


@pytest.fixture(scope="module")
def model(tiny_distilled: Path) -> HeliosModel:
    return load_model(ModelConfig(model=str(tiny_distilled)))


@pytest.fixture
def drive(model: HeliosModel) -> Iterator[Callable[..., Driver]]:
    made = list[Driver]()

    def make(*faults: Fault, beat_s: float = 60.0) -> Driver:
        made.append(Driver(model, *faults, beat_s=beat_s))
        made[-1].start()
        return made[-1]

    yield make
    for driver in made:
        driver.executor.close(WAIT_S)
    assert role_threads() == []


@pytest.fixture
def driver(drive: Callable[..., Driver]) -> Iterator[Driver]:
    driver = drive()
    yield driver
    assert driver.exits == []


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def role_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in ROLE_THREADS]


def test_every_group_says_that_it_is_up(drive: Callable[..., Driver]) -> None:
    one, other = drive(), drive()
    assert {group: (up.role, up.num_ranks, up.incarnation) for group, up in one.ups.items()} == {
        "encoder-0": ("encoder", 1, 0),
        "dit-0": ("dit", 1, 0),
        "vae-0": ("vae", 1, 0),
    }
    assert one.ups["encoder-0"].golden is None
    assert one.ups["dit-0"].golden is not None
    assert one.ups["dit-0"].golden == other.ups["dit-0"].golden


def test_a_request_goes_through_all_roles(model: HeliosModel, driver: Driver) -> None:
    video = request("fox", num_frames=40)
    expected = latents_of(model, video)
    start = driver.begin(video)
    assert [phase.name for phase in start.phases] == ["text_encode"]
    assert start.conditioning.num_bytes > 19 * 8 * 8 * 16 * 4
    made = list[TaskDone]()
    for chunk in range(2):
        task_id = driver.chunk(video, start, made)
        for _ in range(3):
            step = driver.events.get(timeout=WAIT_S)
            assert isinstance(step, StepDone)
            assert (step.group, step.task_ids) == ("dit-0", (task_id,))
        done = driver.events.get(timeout=WAIT_S)
        assert isinstance(done, TaskDone)
        assert (done.task_id, done.phase.name) == (task_id, "chunk")
        assert done.latents.num_bytes == 16 * 9 * 8 * 8 * 4
        assert torch.equal(driver.executor._table.get(done.latents, Tensor), expected[chunk])
        made.append(done)
        decode_id = driver.decode(video, chunk, done.latents)
        decoded = driver.next(Decoded)
        assert decoded.task_id == decode_id
        assert [phase.name for phase in decoded.phases] == ["decode", "mux"]
        assert decoded.phases[0].ended_s <= decoded.phases[1].started_s
        assert len(bytes.fromhex(decoded.latents_digest)) == 16
        segment = decoded.segment
        assert (segment.chunk, segment.start_frame, segment.num_frames) == (chunk, 33 * chunk, (33, 7)[chunk])
        assert segment.init
        assert segment.media
    assert driver.held == ["conditioning", "latents", "latents"]
    driver.executor.drop([start.conditioning, *(done.latents for done in made)])
    assert driver.held == []


@pytest.mark.parametrize("kind", ["image", "video"])
def test_media_are_encoded_in_a_phase_of_their_own(driver: Driver, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    count = 1 if kind == "image" else 40
    frames = Frames(data=pixels[:count].tobytes(), num_frames=count, height=64, width=64)
    start = driver.begin(dataclasses.replace(request("fox"), **{kind: frames}))
    assert [phase.name for phase in start.phases] == ["text_encode", f"{kind}_encode"]
    assert start.phases[0].ended_s == start.phases[1].started_s < start.phases[1].ended_s


def test_decoding_overlaps_with_denoising_and_with_encoding(driver: Driver) -> None:
    """As an engine would: each finished chunk is decoded while the next one is made."""
    videos = {name: request(name, num_frames=165, steps=(3, 3, 3)) for name in ("fox", "owl")}
    spans = {"chunk": [], "decode": [], "mux": [], "text_encode": []}
    starts, made, names = {}, {name: [] for name in videos}, {}
    for name, video in videos.items():
        names[driver.encode(video)] = name
    num_decoded = 0
    while num_decoded < 10:
        event = driver.events.get(timeout=WAIT_S)
        if isinstance(event, Encoded):
            name = names[event.task_id]
            starts[name] = event
            names[driver.chunk(videos[name], event, [])] = name
            spans["text_encode"].extend(event.phases)
        elif isinstance(event, TaskDone):
            name = names[event.task_id]
            made[name].append(event)
            spans["chunk"].append(event.phase)
            driver.decode(videos[name], len(made[name]) - 1, event.latents)
            if len(made[name]) < 5:
                names[driver.chunk(videos[name], starts[name], made[name])] = name
        elif isinstance(event, Decoded):
            num_decoded += 1
            for phase in event.phases:
                spans[phase.name].append(phase)
        else:
            assert isinstance(event, StepDone)

    def overlaps(one: str, other: str) -> int:
        return sum(a.started_s < b.ended_s and b.started_s < a.ended_s for a in spans[one] for b in spans[other])

    assert overlaps("decode", "chunk") >= 5
    assert overlaps("mux", "chunk") >= 5


def test_chunks_that_join_share_forwards(driver: Driver) -> None:
    videos = [request(name, steps=(9, 9, 9)) for name in ("fox", "owl", "elk")]
    starts = [driver.begin(video) for video in videos]
    for video, start in zip(videos, starts, strict=True):
        driver.chunk(video, start, [])
    sizes, num_done = list[int](), 0
    while num_done < 3:
        event = driver.events.get(timeout=WAIT_S)
        if isinstance(event, StepDone):
            sizes.append(len(event.task_ids))
        num_done += isinstance(event, TaskDone)
    assert max(sizes) == 3


def test_park_and_resume(model: HeliosModel, driver: Driver) -> None:
    video = request("fox", steps=(9, 9, 9))
    start = driver.begin(video)
    task_id = driver.chunk(video, start, [])
    driver.next(StepDone)
    driver.executor.signal("dit-0", task_id, "park")
    parked = driver.next(Parked, task_id)
    assert parked.state.num_bytes > 0
    assert driver.held == ["conditioning", "parked"]
    driver.chunk(video, start, [], parked.state)
    done = driver.next(TaskDone)
    assert torch.equal(driver.executor._table.get(done.latents, Tensor), latents_of(model, video)[0])


def test_abort(driver: Driver) -> None:
    video = request("fox", steps=(400, 1, 1))
    start = driver.begin(video)
    task_id = driver.chunk(video, start, [])
    driver.next(StepDone)
    driver.executor.signal("dit-0", task_id, "abort")
    assert driver.next(Aborted).task_id == task_id
    assert driver.rest() == []
    assert driver.held == ["conditioning"]


@pytest.mark.parametrize("what", ["conditioning", "trail", "latents"])
def test_a_reference_that_was_dropped_fails_its_task(driver: Driver, what: str) -> None:
    video = request("fox", num_frames=66)
    start = driver.begin(video)
    driver.chunk(video, start, [])
    done = driver.next(TaskDone)
    driver.executor.drop([start.conditioning if what == "conditioning" else done.latents])
    driver.executor.drop([start.conditioning if what == "conditioning" else done.latents])
    if what == "latents":
        task_id = driver.decode(video, 0, done.latents, is_due=True)
    else:
        task_id = driver.chunk(video, start, [done])
    failed = driver.next(TaskFailed)
    assert (failed.task_id, failed.fault) == (task_id, "error")
    assert "was dropped" in failed.message
    driver.chunk(other := request("owl"), driver.begin(other), [])
    driver.next(TaskDone)  # the gate is open


def test_what_is_dropped_while_it_is_used_is_used_to_the_end(driver: Driver) -> None:
    video = request("fox", steps=(9, 9, 9))
    start = driver.begin(video)
    driver.chunk(video, start, [])
    driver.executor.drop([start.conditioning])
    done = driver.next(TaskDone)
    driver.decode(video, 0, done.latents)
    driver.executor.drop([done.latents])
    driver.next(Decoded)
    assert driver.held == []


OUTCOMES = [
    (InvalidRequestError("bad picture", code="media_invalid"), "request", "media_invalid", "bad picture"),
    (RuntimeError("out of luck"), "error", "generation_failed", "generation failed: RuntimeError: out of luck"),
    (torch.OutOfMemoryError("full"), "out_of_memory", "generation_failed", "generation failed: out of memory"),
]


@pytest.mark.parametrize(("error", "fault", "code", "message"), OUTCOMES)
@pytest.mark.parametrize("point", ["text.encode", "dit.step", "vae.decode"])
def test_a_failure_ends_its_task_alone(
    drive: Callable[..., Driver], point: str, error: Exception, fault: str, code: str, message: str
) -> None:
    driver = drive(Fault(point=point, action="raise", error=error, where={"request_id": "bad"}, times=99))
    failed = None
    for name in ("bad", "fox"):
        video = request(name)
        encode_id = driver.encode(video)
        start = driver.next(Encoded if (name, point) != ("bad", "text.encode") else TaskFailed, encode_id)
        if isinstance(start, TaskFailed):
            failed = start
            continue
        done = driver.next(
            TaskDone if (name, point) != ("bad", "dit.step") else TaskFailed, driver.chunk(video, start, [])
        )
        if isinstance(done, TaskFailed):
            failed = done
            continue
        end = driver.next(Decoded if name == "fox" else TaskFailed, driver.decode(video, 0, done.latents, is_due=True))
        failed = end if isinstance(end, TaskFailed) else failed
    assert failed is not None
    assert (failed.fault, failed.code) == (fault, code)
    assert failed.message.startswith(message)
    assert driver.exits == []
    assert driver.executor._decodes.task_ids == driver.executor._encodes.task_ids == ()


@pytest.mark.parametrize("point", ["text.encode", "vae.decode"])
def test_memory_that_comes_back_costs_nothing(drive: Callable[..., Driver], point: str) -> None:
    driver = drive(Fault(point=point, action="raise", error=torch.OutOfMemoryError("for once")))
    video = request("fox")
    start = driver.begin(video)
    driver.chunk(video, start, [])
    driver.decode(video, 0, driver.next(TaskDone).latents)
    driver.next(Decoded)


def test_prompts_that_embed_to_nan_fail_their_chunk_and_no_later_request(drive: Callable[..., Driver]) -> None:
    driver = drive(Fault(point="text.encode", action="nan"))
    for expected in (TaskFailed, TaskDone):
        video = request("fox")
        end = driver.next(expected, driver.chunk(video, driver.begin(video), []))
        assert not isinstance(end, TaskFailed) or end.fault == "nan"


class Slow:
    """Holds `VaeWorker`'s halves until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, half: str) -> None:
        self.is_here, self.may_go = threading.Event(), threading.Event()
        real = getattr(VaeWorker, half)

        def held(*arguments: object) -> object:
            self.is_here.set()
            assert self.may_go.wait(WAIT_S)
            return real(*arguments)

        monkeypatch.setattr(VaeWorker, half, held)


@pytest.mark.parametrize(
    ("half", "is_due", "steps_go_on"),
    [("decode_pictures", True, False), ("decode_pictures", False, True), ("encode_pictures", True, True)],
)
def test_a_due_decode_goes_before_the_next_step(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, half: str, is_due: bool, steps_go_on: bool
) -> None:
    slow = Slow(monkeypatch, half)
    video, long = request("fox"), request("owl", steps=(4000, 1, 1))
    driver.chunk(video, driver.begin(video), [])
    done = driver.next(TaskDone)
    task_id = driver.chunk(long, driver.begin(long), [])
    driver.next(StepDone)
    decode_id = driver.decode(video, 0, done.latents, is_due=is_due)
    assert slow.is_here.wait(WAIT_S)
    time.sleep(0.1)
    driver.rest()  # steps before the boundary at which the decode was due
    time.sleep(0.2)
    events = driver.rest()
    assert all(isinstance(event, StepDone) for event in events)
    assert (len(events) > 2) == steps_go_on
    slow.may_go.set()
    driver.next(Decoded, decode_id)
    driver.next(StepDone)
    driver.executor.signal("dit-0", task_id, "abort")
    driver.next(Aborted)


def test_the_next_decode_starts_while_a_segment_is_encoded(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    video = request("fox")
    driver.chunk(video, driver.begin(video), [])
    latents = driver.next(TaskDone).latents
    slow = Slow(monkeypatch, "encode_pictures")
    first, second = (driver.decode(video, 0, latents) for _ in range(2))
    assert slow.is_here.wait(WAIT_S)
    wait_until(lambda: driver.executor._muxes.qsize() == 1)
    slow.may_go.set()
    one, two = driver.next(Decoded, first), driver.next(Decoded, second)
    assert two.phases[0].started_s < one.phases[1].ended_s
    assert one.segment == two.segment
    assert one.latents_digest == two.latents_digest


def test_beats_tell_progress_and_tasks(drive: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch) -> None:
    driver = drive(beat_s=0.02)
    beats = [driver.next(Beat) for _ in range(9)]
    assert Counter(beat.group for beat in beats).keys() == {"encoder-0", "dit-0", "vae-0"}
    assert all((beat.incarnation, beat.progress, beat.task_ids) == (0, 0, ()) for beat in beats)
    video = request("fox", steps=(400, 1, 1))
    start = driver.begin(video)
    task_id = driver.chunk(video, start, [])

    def next_beat(group: str) -> Beat:
        while (beat := driver.next(Beat)).group != group:
            pass
        return beat

    wait_until(lambda: next_beat("dit-0").task_ids == (task_id,))
    one = next_beat("dit-0")
    wait_until(lambda: next_beat("dit-0").progress > one.progress)
    assert next_beat("encoder-0").progress == 2
    driver.executor.signal("dit-0", task_id, "abort")
    wait_until(lambda: next_beat("dit-0").task_ids == ())
    video = request("owl")
    driver.chunk(video, driver.begin(video), [])
    latents = driver.next(TaskDone).latents
    slow = Slow(monkeypatch, "encode_pictures")
    decode_id = driver.decode(video, 0, latents)
    assert slow.is_here.wait(WAIT_S)
    assert next_beat("vae-0").task_ids == (decode_id,)
    slow.may_go.set()
    wait_until(lambda: next_beat("vae-0").task_ids == ())


def test_a_slow_beat_is_a_fault_of_its_own(drive: Callable[..., Driver]) -> None:
    """Beats come from one thread: one that is held up holds up the others, once."""
    started = time.monotonic()
    driver = drive(Fault(point="beat", action="sleep", seconds=0.5, where={"group": "dit-0"}), beat_s=0.02)
    while driver.next(Beat).group != "dit-0":
        pass
    assert time.monotonic() - started >= 0.5
    started = time.monotonic()
    while driver.next(Beat).group != "dit-0":
        pass
    assert time.monotonic() - started < 0.5


def test_condemning_a_group_ends_the_process(drive: Callable[..., Driver]) -> None:
    driver = drive()
    driver.executor.condemn("vae-0", "no progress for 61.0 s")
    lost = driver.next(GroupLost)
    assert (lost.group, lost.incarnation, lost.why) == ("vae-0", 0, "condemned: no progress for 61.0 s")
    assert driver.exits == [75]


@pytest.mark.parametrize("role", ["encoder", "dit", "vae"])
def test_a_role_thread_that_dies_ends_the_process(
    drive: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """Here from a device that is broken: no task can be answered on it any more."""
    points = {"encoder": "text.encode", "dit": "dit.step", "vae": "vae.decode"}
    driver = drive(Fault(point=points[role], action="raise", error=torch.AcceleratorError("launch failure"), times=9))
    video = request("fox")
    driver.encode(video)
    if role != "encoder":
        driver.chunk(video, driver.next(Encoded), [])
    if role == "vae":
        driver.decode(video, 0, driver.next(TaskDone).latents)
    lost = driver.next(GroupLost)
    assert (lost.group, lost.incarnation) == (f"{role}-0", 0)
    assert "launch failure" in lost.why
    wait_until(lambda: driver.exits == [75])


def test_a_golden_chunk_that_fails_ends_the_process(model: HeliosModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.transformer, "embed_history", lambda _: 1 / 0)
    driver = Driver(model)
    driver.executor.start(driver.events.put)
    assert driver.next(GroupLost).group == "dit-0"
    wait_until(lambda: driver.exits == [75])
    driver.executor.close(WAIT_S)


def test_close_ends_all_threads_in_the_middle_of_work(model: HeliosModel) -> None:
    assert role_threads() == []
    driver = Driver(model)
    driver.start()
    video = request("fox", steps=(400, 1, 1))
    driver.chunk(video, driver.begin(video), [])
    driver.next(StepDone)
    assert sorted(role_threads()) == ROLE_THREADS
    for _ in range(2):
        driver.executor.close(WAIT_S)
        assert role_threads() == []
    assert not any(isinstance(event, TaskDone | TaskFailed | GroupLost) for event in driver.rest())
    assert driver.held == []
    assert driver.exits == []


def test_close_does_not_wait_longer_than_it_is_told(model: HeliosModel, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(model)
    driver.start()
    video = request("fox")
    driver.chunk(video, driver.begin(video), [])
    latents = driver.next(TaskDone).latents
    slow = Slow(monkeypatch, "decode_pictures")
    driver.decode(video, 0, latents, is_due=True)
    assert slow.is_here.wait(WAIT_S)
    started = time.monotonic()
    driver.executor.close(0.2)
    assert time.monotonic() - started < 5
    assert role_threads() == ["helios-vae"]
    slow.may_go.set()
    driver.executor.close(WAIT_S)
    assert role_threads() == []
    assert driver.rest() == []


def test_close_before_start(model: HeliosModel) -> None:
    Driver(model).executor.close(1.0)


def test_a_long_video_holds_few_references(driver: Driver) -> None:
    video = request("fox", num_frames=20 * 33)
    start = driver.begin(video)
    made = list[TaskDone]()
    for chunk in range(20):
        driver.chunk(video, start, made)
        made.append(driver.next(TaskDone))
        driver.decode(video, chunk, made[-1].latents)
        driver.next(Decoded)
        if chunk >= 4:
            driver.executor.drop([made[chunk - 3].latents])
        assert len(driver.held) <= 6


def test_the_table_keeps_until_it_is_told() -> None:
    table, value = TensorTable(), torch.zeros(3)
    ref = table.put("fox:latents", value, (value, value))
    assert ref == TensorRef(key="fox:latents", num_bytes=24)
    assert table.get(ref, Tensor) is value
    table.drop([ref, ref])
    with pytest.raises(KeyError):
        table.get(ref, Tensor)
    table.put("fox:latents", value, ())
    table.clear()
    assert table.keys == ()
