"""Following jobs to their end, for any number of viewers: what is new of a job that this process runs is known at once,
of others it is looked for. Knows views of jobs; starts and ends nothing."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from helios_serve.api.intake import draining
from helios_serve.api.job_runner import JobRunner
from helios_serve.api.job_view import JobViews
from helios_serve.api.jobs import Job, JobEnded, JobEvent
from helios_serve.api.live_job import LiveJob
from helios_serve.store import records

POLL_S = (0.1, 0.25)
"""How often a job is looked at that another process runs, at least and at most."""


class JobWatch:
    """One for each service. is_closing: the server ends, and with it all watching of jobs that it no longer runs."""

    def __init__(self, runner: JobRunner, views: JobViews) -> None:
        self._runner = runner
        self._views = views
        self.is_closing = False

    async def end(self, tenant: str, job_id: str) -> Job:
        """The job when it has ended.

        Raises: NotFoundError, also when it is deleted meanwhile; CapacityError when the server ends first.
        """
        job = await self._views.get(tenant, job_id)
        while not job.has_ended:
            live = self._runner.live(job_id)
            self._check_open(live)
            if live is None:
                await asyncio.sleep(random.uniform(*POLL_S))
            while live is not None and not live.has_ended:
                await live.next_change(live.version(with_steps=False), with_steps=False)
            job = await self._views.get_shared(tenant, job_id)
        return job

    async def events(self, tenant: str, job_id: str, start: int, *, with_steps: bool) -> AsyncGenerator[JobEvent, None]:
        """A job from segment `start` on, to its end. Without steps there are only its segments and its end.

        Raises: NotFoundError, also when it is deleted meanwhile; CapacityError when the server ends first.
        """
        async with aclosing(self.events_or_pauses(tenant, job_id, start, with_steps=with_steps)) as events:
            async for event in events:
                assert event is not None  # there are no pauses without pause_s
                yield event

    async def events_or_pauses(
        self, tenant: str, job_id: str, start: int, *, with_steps: bool = True, pause_s: float | None = None
    ) -> AsyncGenerator[JobEvent | None, None]:
        """`events`, and None whenever there was none for `pause_s`."""
        following, shown, told_s = start, None, time.monotonic()
        while True:
            live = self._runner.live(job_id)
            version = 0
            if live is not None:
                live.is_watched, version = True, live.version(with_steps=with_steps)
            standing = await self._views.standing(tenant, job_id)
            if following < standing.num_published:
                yield await self._views.published(standing, following)
                following, told_s = following + 1, time.monotonic()
                continue
            if standing.job.state in records.ENDED:
                yield JobEnded(job=await self._views.ended(standing))
                return
            self._check_open(live)
            if with_steps and (step := self._views.step(standing)) != shown:
                shown, told_s = step, time.monotonic()
                yield await self._views.progress(standing, step)
            if live is None:
                await asyncio.sleep(random.uniform(*POLL_S))
            else:
                limit_s = None if pause_s is None else told_s + pause_s - time.monotonic()
                await live.next_change(version, with_steps=with_steps, limit_s=limit_s)
            if pause_s is not None and time.monotonic() - told_s >= pause_s:
                told_s = time.monotonic()
                yield None

    def _check_open(self, live: LiveJob | None) -> None:
        """Raises CapacityError when nothing more will happen to a job in this process, because it ends."""
        if self.is_closing and (live is None or live.has_ended):
            raise draining()
