"""Takes pictures of the playground: `python -m tests.browser.screenshots FOLDER`, which must exist.

Writes one PNG per width, theme and moment; those of the docs are two of them. Debian's `system-ui` is DejaVu, so Inter
stands in for it where it is installed (apt-get install fonts-inter).
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from .conftest import Visit, chromium
from .fake_jobs import Behaviour
from .fake_server import FakeHelios, serving

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

_FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>
<include>/etc/fonts/fonts.conf</include>
<match target="pattern"><edit name="family" mode="assign" binding="strong"><string>Inter</string></edit></match>
</fontconfig>"""
_PROMPT = "A lighthouse on a cliff in the morning, waves breaking below, slow aerial shot"
_THEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
_PAST = (
    ("Paper boats drift out at dusk, shallow focus, warm backlight", 1.375),
    ("A calm bay in the morning, mist lifting from the water", 2.75),
    ("Night swell under a full moon, long lens", 1.375),
    ("A storm front crosses the strait, handheld", 2.75),
)


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        fonts = Path(scratch) / "fonts.conf"
        fonts.write_text(_FONTS)
        os.environ["FONTCONFIG_FILE"] = str(fonts)
        with serving(FakeHelios(Path(scratch))) as fake, chromium(device_scale_factor=1) as context:
            _take(fake, context, folder)


def _take(fake: FakeHelios, context: BrowserContext, folder: Path) -> None:
    fake.behaviour = Behaviour(segment_seconds=0.05)
    page = context.new_page()
    visit = Visit(page, fake.url)
    for width, height in ((1440, 1000), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        for theme in _THEMES:
            page.emulate_media(color_scheme=theme)
            page.goto(fake.url)
            if not fake.jobs:
                _shoot(page, folder / "empty.png")
                for prompt, seconds in _PAST:
                    visit.generate(prompt, seconds, size=None)
                    visit.wait_state("done")
                page.reload()
            page.wait_for_timeout(500)
            _shoot(page, folder / f"playground-{width}-{theme}-idle.png")
            fake.behaviour = Behaviour(segment_seconds=1.0)
            visit.generate(_PROMPT, 11, size=None)
            page.wait_for_selector('[data-seen="true"]')
            page.fill("#change-prompt", "The same cliff at dusk, the lamp is lit")
            page.click("#change button")
            page.wait_for_timeout(5200)
            page.fill("#change-prompt", "A storm rolls in from the sea")
            page.click("#change button")
            page.wait_for_timeout(350)
            _shoot(page, folder / f"playground-{width}-{theme}.png")
            page.click("#stop")
            visit.wait_state("stopped")
            fake.jobs.pop(max(fake.jobs))
    assert visit.complaints == [], visit.complaints


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
