"""Takes pictures of the playground: `python -m tests.browser.screenshots FOLDER`, which must exist.

Writes one PNG per width, theme and moment, of a started server with the embedded checkpoint, which should have the
machine for itself; those of the docs are four of them. Debian's `system-ui` is DejaVu, so Inter stands in for it where
it is installed (apt-get install fonts-inter).
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from helios_serve.config import EMBEDDED_MODEL
from tests.faults.server_process import Server

from .conftest import Visit, chromium

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

_FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>
<include>/etc/fonts/fonts.conf</include>
<match target="pattern"><edit name="family" mode="assign" binding="strong"><string>Inter</string></edit></match>
</fontconfig>"""
_PROMPT = "a large red circle moving right fast on a blue background"
_CHANGES = (
    "a large yellow circle moving right fast on a blue background",
    "a large yellow circle moving up slowly on a blue background",
)
_THEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
_PAST = (
    ("a large green square moving left slowly on a black background", 1.375),
    ("a large orange circle moving up fast on a white background", 2.75),
    ("a large blue triangle moving right slowly on a yellow background", 1.375),
    ("a large purple circle moving down slowly on a green background", 2.75),
)


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        fonts = Path(scratch) / "fonts.conf"
        fonts.write_text(_FONTS)
        os.environ["FONTCONFIG_FILE"] = str(fonts)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = Server(EMBEDDED_MODEL, Path(scratch), port)
        server.start()
        try:
            with chromium(device_scale_factor=1) as context:
                _take(server, context, folder)
        finally:
            server.kill()


def _take(server: Server, context: BrowserContext, folder: Path) -> None:
    url = f"http://127.0.0.1:{server.port}"
    page = context.new_page()
    visit = Visit(page, url)
    page.goto(url)
    _shoot(page, folder / "empty.png")
    for prompt, seconds in _PAST:
        visit.generate(prompt, seconds, size=None)
        visit.wait_state("done")
    for width, height in ((1440, 1000), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        for theme in _THEMES:
            page.emulate_media(color_scheme=theme)
            page.goto(url)
            page.wait_for_timeout(500)
            _shoot(page, folder / f"playground-{width}-{theme}-idle.png")
            visit.generate(_PROMPT, 22, size=None)
            page.wait_for_selector('[data-seen="true"]')
            page.fill("#change-prompt", _CHANGES[0])
            page.click("#change button")
            page.wait_for_timeout(5200)
            page.fill("#change-prompt", _CHANGES[1])
            page.click("#change button")
            page.wait_for_timeout(350)
            _shoot(page, folder / f"playground-{width}-{theme}.png")
            page.click("#stop")
            visit.wait_state("stopped")
            _delete_newest(server)
    assert visit.complaints == [], visit.complaints


def _delete_newest(server: Server) -> None:
    listed = server.call("GET", "/v1/videos?limit=1")
    assert listed is not None
    server.call("DELETE", f"/v1/videos/{json.loads(listed)['data'][0]['id']}")


def _shoot(page: Page, path: Path) -> None:
    """The whole page; where that takes more than 300 KB, with 256 colours, dithered."""
    data = page.screenshot(full_page=True)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture.save(path, optimize=True)
    if path.stat().st_size > 300_000:
        palette = picture.quantize(256, Image.Quantize.MEDIANCUT)
        picture.quantize(256, palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
