"""Load on a server whose timing is known: what is measured is what was done, and every way to fail has its name."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from functools import partial

import httpx2
import pytest

from helios_serve.bench.arrivals import ClosedLoad, Load, OpenLoad
from helios_serve.bench.campaign import Campaign, Point, run_campaign
from helios_serve.bench.helios_target import HeliosTarget
from helios_serve.bench.load import Caller, drive
from helios_serve.bench.metrics import Slo, inter_segment_s, playback, summarize, time_to_first_segment_s
from helios_serve.bench.observed import Observed
from helios_serve.bench.openai_target import OpenAIVideosTarget
from helios_serve.bench.targets import Target
from helios_serve.bench.workload import Kind, Planned, Prompt, plan_requests
from helios_serve.errors import InvalidRequestError
from tests.bench.scripted_server import FRAMES, Script, ScriptedServer, serving

LATE_S = 0.5
"""What a busy machine may add."""
Speak = Callable[[httpx2.AsyncClient], Target]


def helios(client: httpx2.AsyncClient) -> Target:
    return HeliosTarget(client=client, poll_s=0.02, image=b"png", video=b"mp4")


def openai(client: httpx2.AsyncClient, **extra: str) -> Target:
    return OpenAIVideosTarget(client=client, poll_s=0.02, image=b"png", model="wan", extra=extra)


SSE, RAW, JOB = (Kind(via=via, num_frames=36) for via in ("sse", "raw", "jobs"))


class Counting:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.num_sent = self.num_frames = self.num_ended = 0

    def begin(self, title: str, num_requests: int) -> None:
        self.titles.append(f"{title}: {num_requests}")

    def sent(self) -> None:
        self.num_sent += 1

    def segment(self, num_frames: int) -> None:
        self.num_frames += num_frames

    def ended(self, seen: Observed) -> None:
        self.num_ended += 1


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedServer]:
    with serving() as scripted:
        yield scripted


@pytest.fixture
def server(running: ScriptedServer) -> ScriptedServer:
    running.script = Script()
    running.received, running.headers, running.cancelled, running.max_running = [], [], [], 0
    return running


def load_on(
    url: str, planned: list[Planned], load: Load, *, speak: Speak = helios, timeout_s: float = 5.0, **headers: str
) -> list[Observed]:
    async def run() -> list[Observed]:
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=timeout_s, trust_env=False) as client:
            caller = Caller(target=speak(client), timeout_s=timeout_s)
            return await drive(caller, planned, load, 1, Counting())

    return asyncio.run(run())


def one(server: ScriptedServer, kind: Kind, *, speak: Speak = helios, timeout_s: float = 5.0) -> Observed:
    planned = Planned(index=0, kind=kind, prompt="a fox", seed=7)
    (seen,) = load_on(server.url, [planned], ClosedLoad(concurrency=1), speak=speak, timeout_s=timeout_s)
    return seen


@pytest.mark.parametrize("kind", [SSE, RAW])
def test_a_stream_is_seen_as_it_was_sent(server: ScriptedServer, kind: Kind) -> None:
    server.script = Script(segments_s=(0.1, 0.2, 2.2), preroll_s=0.5)
    seen = one(server, kind)
    assert (seen.error, seen.num_frames, seen.num_chunks) == (None, 3 * FRAMES, 3)
    first_s = time_to_first_segment_s(seen)
    assert first_s is not None
    assert 0.1 <= first_s < 0.1 + LATE_S
    assert inter_segment_s(seen) == pytest.approx([0.1, 2.0], abs=LATE_S)
    assert 2.2 <= seen.ended_s - seen.due_s < 2.2 + LATE_S
    played = playback(seen, 0.0)  # half a second each: the first two last until 1.1, the third comes at 2.2
    assert played is not None
    assert played.num_underruns == 1
    assert played.stalled_s == pytest.approx(1.1, abs=LATE_S)
    if kind.via == "sse":
        assert (seen.video_id, seen.preroll_s, seen.warnings) == ("v1", 0.5, ("careful",))
        assert seen.server_timing_ms == {"queue_ms": 3, "total_ms": 250}
        assert seen.made_as == "64x64, steps 1,1,1, 24 fps"
    else:
        assert seen.preroll_s is None


def test_a_job_is_polled_and_downloaded(server: ScriptedServer) -> None:
    server.script = Script(job_s=0.3)
    seen = one(server, JOB)
    assert (seen.error, seen.num_frames, seen.num_chunks, seen.segments) == (None, 2 * FRAMES, None, ())
    assert 0.3 <= seen.ended_s - seen.due_s < 0.3 + LATE_S
    assert server.cancelled == []


@pytest.mark.parametrize(
    ("script", "kind", "code"),
    [
        (Script(status=429, body={"error": {"code": "quota_exceeded", "message": "m"}}), SSE, "quota_exceeded"),
        (Script(status=503, body={"error": {"code": "capacity_exceeded", "message": "m"}}), RAW, "capacity_exceeded"),
        (Script(status=429, body={"error": {"code": None, "message": "m"}}), JOB, "http_429"),
        (Script(status=422, body={"detail": [{"msg": "bad"}]}), JOB, "http_422"),
        (Script(status=502, body="<html>bad gateway</html>"), SSE, "http_502"),
        (Script(ending="broken"), SSE, "cut"),
        (Script(ending="broken"), RAW, "cut"),
        (Script(ending="silent"), SSE, "cut"),
        (Script(ending="half"), RAW, "cut"),
        (Script(ending="failed"), SSE, "generation_failed"),
        (Script(ending="failed", job_s=0), JOB, "moderation_blocked"),
        (Script(ending="empty", job_s=0), JOB, "empty_video"),
        (Script(segments_s=()), RAW, "empty_video"),
        (Script(ending="never", segments_s=(0.0,)), SSE, "timeout"),
        (Script(ending="never"), JOB, "timeout"),
    ],
)
def test_every_failure_has_a_code(server: ScriptedServer, script: Script, kind: Kind, code: str) -> None:
    server.script = script
    seen = one(server, kind, timeout_s=0.5 if script.ending == "never" else 5.0)
    assert (seen.error, seen.is_completed) == (code, False)
    if script.status != 200:
        assert seen.status == script.status
        assert seen.message
    summary = summarize([seen], Slo(limits={"e2e": 100}))
    assert (summary.errors, summary.num_completed, summary.good_share) == ({code: 1}, 0, 0.0)
    if (kind.via, code) == ("jobs", "timeout"):
        assert server.cancelled == [seen.video_id]


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    (seen,) = load_on(url, plan_requests([SSE], [Prompt(text="a fox")], 1, 0), ClosedLoad(concurrency=1))
    assert seen.error == "connect"


def test_open_load_comes_when_it_is_due_whatever_the_server_does(server: ScriptedServer) -> None:
    server.script = Script(segments_s=(1.5,))
    load = OpenLoad(rate=20.0)
    planned = plan_requests([SSE], [Prompt(text="a fox")], 12, 0)
    seen = load_on(server.url, planned, load)
    offsets = load.offsets(12, 1)
    assert [one_seen.due_s for one_seen in seen] == offsets
    assert all(0 <= one_seen.sent_s - one_seen.due_s < LATE_S for one_seen in seen)
    assert max(one_seen.sent_s for one_seen in seen) < min(one_seen.ended_s for one_seen in seen)
    assert server.max_running == 12
    times = [at_s for at_s, _ in server.received]
    assert [at_s - times[0] for at_s in times] == pytest.approx(offsets, abs=LATE_S)
    assert [fields["seed"] for _, fields in server.received] == [one_planned.seed for one_planned in planned]


def test_closed_load_keeps_its_number_in_flight(server: ScriptedServer) -> None:
    server.script = Script(segments_s=(0.1,))
    planned = plan_requests([SSE], [Prompt(text="a fox")], 9, 0)
    seen = load_on(server.url, planned, ClosedLoad(concurrency=3))
    assert [one_seen.planned for one_seen in seen] == planned
    assert server.max_running == 3
    assert 5 < summarize(seen, None).requests_per_s <= 3 / 0.1


def test_what_is_asked_of_helios(server: ScriptedServer) -> None:
    wanted = Kind(task="i2v", num_frames=66, size="128x64", steps=(2, 1, 1), fps=16)
    for kind in (wanted, SSE, Kind(via="jobs"), Kind(via="sse", service_class="offline"), Kind(via="raw", task="v2v")):
        assert one(server, kind).error is None
    full, plain, job, offline, video = (fields for _, fields in server.received)
    assert full == {
        "prompt": "a fox", "num_frames": 66, "fps": 16, "seed": 7, "size": "128x64", "stream": True,
        "helios": {"steps": [2, 1, 1]}, "image": "data:image/png;base64,cG5n",
    }  # fmt: skip
    assert "helios" not in plain
    assert (job["helios"], "stream" in job) == ({"service_class": "realtime"}, False)
    assert offline["helios"] == {"service_class": "offline"}
    assert video["video"] == "data:video/mp4;base64,bXA0"


def test_what_is_asked_of_another_server(server: ScriptedServer) -> None:
    for kind in (Kind(via="jobs", num_frames=48, size="832x480"), Kind(via="jobs", num_frames=48, task="i2v")):
        seen = one(server, kind, speak=partial(openai, num_inference_steps="4"))
        assert (seen.error, seen.num_frames) == (None, 2 * FRAMES)
    (_, text), (_, image) = server.received
    common = {"prompt": "a fox", "seconds": "2", "model": "wan", "num_inference_steps": "4"}
    assert text == {**common, "size": "832x480"}
    assert image == {**common, "input_reference": b"png"}


def campaign(load: Load, **more: object) -> Campaign:
    fields: dict[str, object] = {"kinds": (SSE,), "num_requests": 4, "num_warmup": 2, "num_repeats": 2, **more}
    return Campaign(prompts=(Prompt(text="a fox"),), loads=(load,), seed=0, **fields)  # type: ignore[arg-type]


def run(server: ScriptedServer, wanted: Campaign) -> tuple[list[Point], Counting]:
    points: list[Point] = []
    view = Counting()

    async def measured() -> None:
        async with httpx2.AsyncClient(base_url=server.url, trust_env=False) as client:
            await run_campaign(wanted, Caller(target=helios(client), timeout_s=5), view, points)

    asyncio.run(measured())
    return points, view


def test_warm_up_does_not_count_and_repeats_differ(server: ScriptedServer) -> None:
    server.script = Script(segments_s=(0.02,))
    (point,), view = run(server, campaign(OpenLoad(rate=40.0)))
    assert view.titles == ["warm-up: 2", "40 requests/s, repeat 1 of 2: 4", "40 requests/s, repeat 2 of 2: 4"]
    assert (view.num_sent, view.num_ended, view.num_frames) == (10, 10, 10 * FRAMES)
    assert len(server.received) == 10
    first, second = point.runs
    assert [seen.due_s for seen in first] != [seen.due_s for seen in second]
    assert [summary.num_completed for summary in point.summaries] == [4, 4]


def test_a_warm_up_that_fails_ends_it(server: ScriptedServer) -> None:
    server.script = Script(status=401, body={"error": {"code": "invalid_api_key", "message": "no such key"}})
    with pytest.raises(InvalidRequestError, match="invalid_api_key: no such key"):
        run(server, campaign(ClosedLoad(concurrency=1)))
    assert len(server.received) == 2


def test_a_mix_is_warmed_up_with_each_of_its_kinds(server: ScriptedServer) -> None:
    server.script = Script(segments_s=(0.02,))
    rare = Kind(via="raw", num_frames=12, weight=1e-9)
    run(server, campaign(ClosedLoad(concurrency=1), kinds=(SSE, rare), num_warmup=1, num_repeats=1))
    assert [fields["num_frames"] for _, fields in server.received[:2]] == [36, 12]


def test_a_run_can_have_a_length_in_seconds(server: ScriptedServer) -> None:
    server.script = Script(segments_s=(0.02,))
    load = OpenLoad(rate=20.0, burstiness=float("inf"))
    (point,), _ = run(server, campaign(load, duration_s=0.5, num_warmup=0, num_repeats=1))
    assert [seen.due_s for seen in point.runs[0]] == pytest.approx([index / 20 for index in range(10)])
    assert 0 < point.client_cpu_shares[0] < 1.5
