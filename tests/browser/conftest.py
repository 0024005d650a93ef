"""A real Chromium and the contract fake; both are started once for all tests of the browser."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from .fake_server import FakeHelios, serving

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, ConsoleMessage, Page

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium(**options: Any) -> Iterator[BrowserContext]:
    """A context of Debian's Chromium with a user data directory of its own."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory(prefix="helios-chromium-") as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, args=ARGUMENTS, **options
        )
        try:
            yield context
        finally:
            context.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[BrowserContext]:
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -e '.[test]'")
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"{CHROMIUM} is not installed: apt-get install chromium")
    with chromium() as context:
        yield context


@pytest.fixture(scope="session")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHelios]:
    with serving(FakeHelios(tmp_path_factory.mktemp("fake"))) as fake:
        yield fake


@pytest.fixture
def fake(_running: FakeHelios) -> FakeHelios:
    _running.reset()
    return _running


class Visit:
    """One page, with all it said and asked for."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.expected: tuple[str, ...] = ()  # parts of complaints that the test provokes
        self.foreign: list[str] = []
        self._local = (origin, origin.replace("http", "ws"), f"blob:{origin}", "data:")
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._asked(request.url))
        page.on("websocket", lambda socket: self._asked(socket.url))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _asked(self, url: str) -> None:
        if not url.startswith(self._local):
            self.foreign.append(url)

    def text(self, name: str) -> str:
        return self.page.locator(f"#{name}").inner_text()

    def wait(self, expression: str, seconds: float = 20) -> None:
        """Polls from outside: the page's policy forbids the `eval` of `wait_for_function`."""
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, f"not within {seconds} s: {expression}\n{self.text('stage')}"
            self.page.wait_for_timeout(50)

    def wait_state(self, *states: str) -> None:
        """Waits until the stage is in one of these states; it must not fail on the way."""
        wanted = [*states, "failed"]
        self.wait(f"{wanted}.includes(document.getElementById('stage').dataset.state)", 30)
        assert self.page.locator("#stage").get_attribute("data-state") in states, self.text("stage")

    def quality(self) -> tuple[int, int]:
        """Frames decoded and dropped, as the browser counts them."""
        quality = "document.getElementById('video').getVideoPlaybackQuality()"
        decoded, dropped = self.page.evaluate(f"(q => [q.totalVideoFrames, q.droppedVideoFrames])({quality})")
        return decoded, dropped

    def wait_sessions(self, fake: FakeHelios, count: int) -> None:
        """Waits until `count` sessions were started since the test began."""
        deadline = time.monotonic() + 20
        while len(fake.messages("session.start")) < count:
            assert time.monotonic() < deadline, self.text("stage")
            self.page.wait_for_timeout(50)

    def wait_end(self) -> None:
        self.wait("document.getElementById('video').ended", 30)

    def generate(self, prompt: str, seconds: float | str | None = None, size: str | None = "320x192") -> None:
        self.page.fill("#prompt", prompt)
        if seconds is not None:
            self.page.fill("#length", str(seconds))
        if size is not None:
            self.page.select_option("#size", size)
        self.page.click("#generate")


@pytest.fixture
def visit(browser: BrowserContext, fake: FakeHelios) -> Iterator[Visit]:
    """The playground, opened afresh at desktop width; afterwards it has complained of nothing and asked nobody else."""
    page = browser.new_page()
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1440, "height": 900})
    visit = Visit(page, fake.url)
    page.goto(fake.url)
    yield visit
    page.close()
    assert [text for text in visit.complaints if not any(part in text for part in visit.expected)] == []
    assert visit.foreign == []
