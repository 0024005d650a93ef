"""The playground's own client, in Chromium, against the realtime route: what the page shows is what was sent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from helios_serve.api.playground import playground_files, playground_headers
from helios_serve.types import FRAMES_PER_CHUNK
from tests.api.session_fakes import FakeJob, FakeService, Script, Server, serving
from tests.browser.conftest import Visit

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

pytestmark = pytest.mark.browser

DETAILS = {
    "variant": "distilled",
    "tasks": ["t2v", "i2v", "v2v"],
    "frames_per_chunk": FRAMES_PER_CHUNK,
    "size_multiple": 64,
    "num_stages": 3,
    "recommended_sizes": ["64x64", "128x64"],
    "max_pixels": 921_600,
    "max_frames": 7260,
    "default_fps": 24,
    "default_steps": [2, 2, 2],
    "codecs": ["h264", "vp9", "av1"],
    "measured_fps": None,
}
MODEL = {"id": "helios-distilled", "object": "model", "created": 1, "owned_by": "helios", "helios": DETAILS}


def page_app() -> FastAPI:
    """The page, one model and an empty gallery."""
    app, headers = FastAPI(), playground_headers()

    def add(path: str, body: bytes, media_type: str) -> None:
        async def answer() -> Response:
            return Response(body, media_type=media_type, headers=headers)

        app.add_api_route(path, answer)

    for path, file in playground_files().items():
        add(path, file.body, file.media_type)

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [MODEL]})

    async def videos() -> Response:
        return JSONResponse({"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False})

    app.add_api_route("/v1/models", models)
    app.add_api_route("/v1/videos", videos)
    return app


class Running:
    """A server on a thread of its own."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self._loop = loop

    @property
    def job(self) -> FakeJob:
        return next(reversed(self.server.service.jobs.values()))

    def cut(self) -> None:
        """Ends every connection as a restarting server does, and goes on taking new ones."""

        async def cut() -> None:
            await self.server.route.restart()
            self.server.route._is_restarting = False

        asyncio.run_coroutine_threadsafe(cut(), self._loop).result()


@contextmanager
def running(script: Script) -> Iterator[Running]:
    started: threading.Event = threading.Event()
    found: list[Running] = []
    ended = asyncio.Event()

    async def main() -> None:
        async with serving(FakeService(script), app=page_app()) as server:
            found.append(Running(server, asyncio.get_running_loop()))
            started.set()
            await ended.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert started.wait(10)
    try:
        yield found[0]
    finally:
        found[0]._loop.call_soon_threadsafe(ended.set)
        thread.join()


@contextmanager
def visited(browser: BrowserContext, script: Script) -> Iterator[tuple[Visit, Running]]:
    """The page, which must complain of nothing."""
    with running(script) as server:
        page = browser.new_page()
        visit = Visit(page, f"http://{server.server.url}")
        page.goto(f"http://{server.server.url}")
        page.wait_for_selector("#size option[value='64x64']", state="attached")
        yield visit, server
        page.close()
        assert visit.complaints == []
        assert visit.foreign == []


def test_the_page_plays_a_session_to_its_end(browser: BrowserContext) -> None:
    with visited(browser, Script(chunk_s=0.2)) as (visit, server):
        visit.generate("a lake", seconds=4, size="64x64")
        visit.wait_state("done")
        visit.wait_end()
        assert visit.quality()[0] == 96
        assert server.job.max_ahead == 2
        assert "96 frames" in visit.text("stage")


def test_the_page_changes_the_prompt_pauses_and_stops(browser: BrowserContext) -> None:
    with visited(browser, Script(chunk_s=0.3)) as (visit, server):
        visit.page.select_option("#length-unit", "open")
        visit.generate("a lake", size="64x64")
        visit.wait_state("generating")
        visit.page.fill("#change-prompt", "a storm")
        visit.page.press("#change-prompt", "Enter")
        visit.wait("document.querySelector('#prompts [data-number=\"2\"]')?.dataset.state === 'applied'")
        assert [change.prompt for change in server.job.prompts] == ["a storm"]
        visit.page.click("#pause")
        visit.wait_state("paused")
        visit.page.click("#pause")
        visit.wait_state("generating")
        visit.page.click("#stop")
        visit.wait_state("stopped")
        assert server.job.is_stopped


def test_the_page_goes_on_after_a_restart(browser: BrowserContext) -> None:
    with visited(browser, Script(chunk_s=0.3)) as (visit, server):
        visit.generate("a lake", seconds=6, size="64x64")
        visit.wait("document.getElementById('video').currentTime > 0.5")
        server.cut()
        visit.wait_state("done")
        visit.wait_end()
        assert visit.quality()[0] == 144
        assert len(server.server.service.sessions) == 2


def test_the_page_shows_a_failure(browser: BrowserContext) -> None:
    from helios_serve.errors import GenerationError

    script = Script(chunk_s=0.1, fail_at=1, failure=GenerationError("the picture is not finite"))
    with visited(browser, script) as (visit, _):
        visit.generate("a lake", seconds=6, size="64x64")
        visit.wait("document.getElementById('stage').dataset.state === 'failed'")
        assert "the picture is not finite" in visit.text("stage")
