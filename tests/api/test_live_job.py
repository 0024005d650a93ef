"""Waiting for news of a job that this process runs."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from unittest.mock import sentinel

import pytest

from helios_serve.api.live_job import LiveJob

IN_TIME_S = 10.0


def new_job() -> LiveJob:
    parts = sentinel
    return LiveJob(lease=parts.lease, spec=parts.spec, asked=parts.asked, request=parts.request, created_at=0.0, seq=1)


@pytest.mark.parametrize(
    ("news", "with_steps", "ends"),
    [("changed", True, True), ("changed", False, True), ("stepped", True, True), ("stepped", False, False)],
)
def test_steps_are_news_to_those_who_follow_them(news: str, *, with_steps: bool, ends: bool) -> None:
    async def wait() -> bool:
        job = new_job()
        version = job.version(with_steps=with_steps)
        waiting = asyncio.create_task(job.next_change(version, with_steps=with_steps))
        await asyncio.sleep(0)
        getattr(job, news)()
        for _ in range(3):
            await asyncio.sleep(0)
        has_ended = waiting.done()
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        return has_ended

    assert asyncio.run(wait()) is ends


def test_news_between_looking_and_waiting_is_not_missed() -> None:
    async def wait() -> None:
        job = new_job()
        version = job.version()
        job.stepped()
        await asyncio.wait_for(job.next_change(version), IN_TIME_S)

    asyncio.run(wait())


def test_all_who_wait_are_woken_at_once() -> None:
    async def wait() -> None:
        job = new_job()
        waiting = [asyncio.create_task(job.next_change(job.version())) for _ in range(5)]
        await asyncio.sleep(0)
        job.changed()
        await asyncio.wait_for(asyncio.gather(*waiting), IN_TIME_S)

    asyncio.run(wait())


def test_waiting_ends_at_its_limit_and_leaves_nothing() -> None:
    async def wait() -> None:
        job = new_job()
        await asyncio.wait_for(job.next_change(job.version(), limit_s=0.01), IN_TIME_S)
        leaving = asyncio.create_task(job.next_change(job.version(with_steps=False), with_steps=False))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait({leaving})
        assert leaving.cancelled()
        assert not job._until_step
        assert not job._until_change

    asyncio.run(wait())
