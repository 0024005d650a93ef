"""HLS in a `<video>` of Chromium, which has a player of its own: finished videos of any length, and growing ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.api.session_fakes import FakeJob, FakeService, Script
from tests.api.test_hls import begin, ended, serving

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

pytestmark = pytest.mark.browser

BEHIND = 3
"""Frames that Chromium may leave out while it waits for the next segment on a busy machine; the length shows that the
video was played to its end."""
WATCH = """async (url) => {
    const video = document.createElement("video");
    video.muted = true;
    const end = new Promise((resolve) => {
        video.addEventListener("ended", () => resolve("ended"));
        video.addEventListener("error", () => resolve(video.error.message));
        setTimeout(() => resolve(`stuck at ${video.currentTime}`), 20000);
    });
    video.src = url;
    document.body.append(video);
    video.play();
    const how = await end;
    return [how, video.getVideoPlaybackQuality().totalVideoFrames, video.duration];
}"""


@contextmanager
def running(script: Script, num_frames: int, *, is_finished: bool) -> Iterator[str]:
    """The address of a job's playlist."""
    found: list[str] = []
    started, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        service = FakeService(script)
        job: FakeJob = begin(service, num_frames=num_frames, fps=60)
        if is_finished:
            await ended(job)
        async with serving(service) as url:
            found.append(f"{url}/v1/videos/{job.id}/hls/index.m3u8?token=abc")
            started.set()
            await stop.wait()
        await service.close()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert started.wait(30)
    try:
        yield found[0]
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join()


def watch(browser: BrowserContext, url: str) -> list[object]:
    """How it ended, frames decoded, and the length in seconds."""
    page = browser.new_page()
    page.goto(url.partition("/v1/")[0] + "/openapi.json")  # any page of that origin
    answer: list[object] = page.evaluate(WATCH, url)
    page.close()
    return answer


@pytest.mark.parametrize("num_frames", [33, 66, 99, 340])
def test_chromium_plays_a_finished_video(browser: BrowserContext, num_frames: int) -> None:
    with running(Script(chunk_s=0.001), num_frames, is_finished=True) as url:
        how, frames, duration = watch(browser, url)
    assert how == "ended"
    assert frames == num_frames
    assert duration == pytest.approx(num_frames / 60, abs=0.02)


@pytest.mark.parametrize("num_frames", [33, 66, 99, 240])
def test_chromium_follows_a_growing_video(browser: BrowserContext, num_frames: int) -> None:
    with running(Script(chunk_s=0.4), num_frames, is_finished=False) as url:
        how, frames, duration = watch(browser, url)
    assert how == "ended"
    assert num_frames - BEHIND <= frames <= num_frames
    assert duration == pytest.approx(num_frames / 60, abs=0.02)
