"""Viewers of one job read the store together; each still sees everything, and soon what others did to the job."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helios_serve.api.auth import ANONYMOUS, Caller
from helios_serve.api.convert import Limits, parse_generation
from helios_serve.api.jobs import Job, JobEnded, JobEvent, JobProgress, JobSegment, Origin
from helios_serve.api.media_input import DataUriSource, Media
from helios_serve.api.service import VideoService
from helios_serve.api.shared_reads import InFlight, Recent, SegmentCache
from helios_serve.errors import NotFoundError
from tests.api.conftest import DISTILLED, FakeDecoder, FakeEngine, Parts, parts_of

NUM_VIEWERS = 50
NUM_CHUNKS = 6


class StoreReads:
    """How often the store was asked for each thing, from now on."""

    def __init__(self, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        chunks, blobs = parts.stores.chunks, parts.stores.blobs
        for owner, name in ((chunks, "standing"), (chunks, "chunk"), (chunks, "segments"), (blobs, "get")):
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        async def counted(*args: Any) -> Any:
            self.counts[name] += 1
            return await read(*args)

        return counted


def run(tmp_path: Path, engine: FakeEngine, scenario: Callable[[Parts], Coroutine[Any, Any, None]]) -> None:
    async def main(parts: Parts) -> None:
        async with asyncio.timeout(30):
            await parts.service.start()
            try:
                await scenario(parts)
            finally:
                await parts.service.close()

    with parts_of(engine, tmp_path) as parts:
        asyncio.run(main(parts))


async def create(service: VideoService, prompt: str = "p", num_chunks: int = NUM_CHUNKS) -> Job:
    media = Media(source=DataUriSource(), decoder=FakeDecoder())
    body = {"prompt": prompt, "num_frames": 33 * num_chunks}
    parsed = await asyncio.to_thread(parse_generation, body, DISTILLED, media, Limits())
    return (await service.create(ANONYMOUS, parsed, Origin(route="create"))).job


async def watched(service: VideoService, video_id: str, start: int = 0) -> list[JobEvent]:
    return [event async for event in service.watch(ANONYMOUS, video_id, start)]


def test_viewers_of_a_running_job_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads follow the segments, not the steps or the viewers."""

    async def scenario(parts: Parts) -> None:
        job = await create(parts.service)
        reads = StoreReads(parts, monkeypatch)
        seen = await asyncio.gather(*(watched(parts.service, job.id) for _ in range(NUM_VIEWERS)))
        for events in seen:
            segments = [event for event in events if isinstance(event, JobSegment)]
            assert [segment.index for segment in segments] == [*range(NUM_CHUNKS)]
            assert b"".join(segment.media for segment in segments) == b"".join(b"[p:%d]" % k for k in range(NUM_CHUNKS))
            assert [segment.is_last for segment in segments] == [False] * (NUM_CHUNKS - 1) + [True]
            assert isinstance(events[-1], JobEnded)
            assert sum(isinstance(event, JobProgress) for event in events) > NUM_CHUNKS
        # A segment is shown from memory when it is kept; only who comes or is behind then reads it.
        assert reads.counts["chunk"] <= NUM_CHUNKS // 2
        assert reads.counts["get"] <= NUM_CHUNKS
        assert reads.counts["standing"] <= NUM_CHUNKS + 10  # at the beginning and the end, and one each second

    run(tmp_path, FakeEngine(step_s=0.01), scenario)


def test_without_steps_there_are_segments_and_the_end(tmp_path: Path) -> None:
    async def scenario(parts: Parts) -> None:
        job = await create(parts.service)
        seen = [event async for event in parts.service.watch(ANONYMOUS, job.id, 2, with_steps=False)]
        assert [event.index for event in seen[:-1] if isinstance(event, JobSegment)] == [*range(2, NUM_CHUNKS)]
        assert len(seen) == NUM_CHUNKS - 1
        assert isinstance(seen[-1], JobEnded)

    run(tmp_path, FakeEngine(step_s=0.01), scenario)


def test_a_pause_is_told_while_nothing_happens(tmp_path: Path) -> None:
    async def scenario(parts: Parts) -> None:
        job = await create(parts.service, num_chunks=20)
        shown = parts.service.watch_or_pause(ANONYMOUS, job.id, pause_s=0.2)
        pauses = 0
        async with aclosing(shown):
            async for event in shown:
                pauses += event is None
                if pauses == 3:
                    break
        assert pauses == 3

    run(tmp_path, FakeEngine(step_s=1.0), scenario)


def test_waiting_reads_the_job_only_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(parts: Parts) -> None:
        job = await create(parts.service)
        reads = StoreReads(parts, monkeypatch)
        ended = await asyncio.gather(*(parts.service.wait(ANONYMOUS, job.id) for _ in range(NUM_VIEWERS)))
        assert {each.state for each in ended} == {"completed"}
        assert reads.counts["standing"] <= NUM_VIEWERS + 5  # each once to see that it is the caller's

    run(tmp_path, FakeEngine(step_s=0.01), scenario)


@pytest.mark.parametrize("verb", ["cancel", "delete"])
@pytest.mark.parametrize("is_here", [True, False], ids=["here", "elsewhere"])
def test_the_end_of_a_job_is_seen_soon(tmp_path: Path, verb: str, is_here: bool) -> None:
    """Elsewhere: only the row changes, and the next commit here is fenced."""

    async def scenario(parts: Parts) -> None:
        job = await create(parts.service, "slow", 20)
        viewers = [asyncio.create_task(watched(parts.service, job.id)) for _ in range(5)]
        waiter = asyncio.create_task(parts.service.wait(ANONYMOUS, job.id))
        await asyncio.sleep(0.5)
        started = asyncio.get_running_loop().time()
        if is_here:
            await getattr(parts.service, verb)(ANONYMOUS, job.id)
        else:
            await getattr(parts.stores.jobs, verb)(ANONYMOUS.tenant, job.id)
        ends = await asyncio.gather(*viewers, waiter, return_exceptions=True)
        assert asyncio.get_running_loop().time() - started < 1.5
        if verb == "delete":
            assert all(isinstance(end, NotFoundError) for end in ends)
        else:
            *lists, last = ends
            assert isinstance(last, Job)
            assert last.state == "cancelled"
            for events in lists:
                assert isinstance(events, list)
                assert events[-1].job.state == "cancelled"

    run(tmp_path, FakeEngine(), scenario)


def test_another_tenant_sees_nothing(tmp_path: Path) -> None:
    """Also not what is in memory because of the job's own viewers."""

    async def scenario(parts: Parts) -> None:
        job = await create(parts.service, "slow", 2)
        viewer = asyncio.create_task(watched(parts.service, job.id))
        await asyncio.sleep(0.2)
        with pytest.raises(NotFoundError):
            await parts.stores.chunks.standing("other", job.id)
        other = parts.service.watch(_caller("other"), job.id)
        with pytest.raises(NotFoundError):
            await anext(other)
        with pytest.raises(NotFoundError):
            await parts.service.wait(_caller("other"), job.id)
        await viewer

    run(tmp_path, FakeEngine(), scenario)


def _caller(tenant: str) -> Caller:
    return replace(ANONYMOUS, tenant=tenant)


def segment(index: int, num_bytes: int) -> JobSegment:
    return JobSegment(
        index=index,
        init=b"",
        media=bytes(num_bytes),
        start_frame=0,
        num_frames=33,
        fps=24.0,
        prompt="p",
        prompt_weight=1.0,
        is_last=False,
        generated_ms=0,
    )


def test_the_cache_is_bounded_by_bytes() -> None:
    cache = SegmentCache(100)
    for index in range(10):
        cache.add("a", segment(index, 30))
        assert cache.num_bytes <= 100
        cache.get("a", 0)  # the first one is in use
    assert [index for index in range(10) if cache.get("a", index) is not None] == [0, 8, 9]
    cache.add("a", segment(0, 50))
    assert cache.num_bytes <= 100
    cache.add("b", segment(0, 101))
    assert (cache.num_bytes, cache.get("b", 0)) == (0, None)


def test_the_cache_forgets_a_job() -> None:
    cache = SegmentCache(100)
    cache.add("a", segment(0, 30))
    cache.add("b", segment(0, 30))
    cache.forget("a")
    assert (cache.get("a", 0), cache.num_bytes) == (None, 30)


def test_a_read_outlives_who_began_it() -> None:
    async def scenario() -> None:
        reads: InFlight[str, int] = InFlight()
        is_open, num_reads = asyncio.Event(), 0

        async def read() -> int:
            nonlocal num_reads
            num_reads += 1
            await is_open.wait()
            return num_reads

        first = asyncio.create_task(reads.get("k", read))
        second = asyncio.create_task(reads.get("k", read))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        is_open.set()
        assert await second == 1
        assert await reads.get("k", read) == 2  # it is no cache

    asyncio.run(scenario())


def test_an_answer_counts_while_nothing_has_changed() -> None:
    async def scenario() -> None:
        recent: Recent[int] = Recent()
        num_reads = 0

        async def read() -> int:
            nonlocal num_reads
            num_reads += 1
            await asyncio.sleep(0.01)
            return num_reads

        async def ask(mark: int, max_age_s: float = 60.0) -> int:
            return await recent.get("t", "j", read, mark=mark, max_age_s=max_age_s)

        assert [await ask(1), await ask(1)] == [1, 1]
        assert await ask(2) == 2
        assert await ask(2, max_age_s=0.0) == 3
        recent.forget("t", "j")
        assert await ask(2) == 4
        early = asyncio.create_task(ask(3))
        await asyncio.sleep(0)
        assert await ask(4) == 6, "the answer was begun before the change"
        assert await early == 5

    asyncio.run(scenario())
