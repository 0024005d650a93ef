"""The playground in Chromium: what a user sees while a video is made, and what reaches the server meanwhile."""

from __future__ import annotations

import re
from typing import Literal

import pytest

from helios_serve.api.playground import playground_files, playground_headers

from .conftest import Visit
from .fake_jobs import Behaviour
from .fake_server import FakeHelios

browser_test = pytest.mark.browser
NO_MEDIA_SOURCE = "delete globalThis.MediaSource; delete globalThis.ManagedMediaSource;"


def test_files_refer_only_to_each_other() -> None:
    files = playground_files()
    page = files["/"].body.decode()
    wanted = {f"/{path}" for path in re.findall(r'(?:src|href)="(playground/[^"]+)"', page)}
    for path, file in files.items():
        if path.endswith(".js"):
            wanted |= {f"/playground/{name}" for name in re.findall(r'from "\./([^"]+)"', file.body.decode())}
    assert wanted == set(files) - {"/"}
    outside = [(path, url) for path, file in files.items() for url in re.findall(rb"https?://[^\"\s]+", file.body)]
    assert {url for _, url in outside} == {b"http://www.w3.org/2000/svg"}


def test_page_needs_nothing_that_a_strict_policy_forbids() -> None:
    page = playground_files()["/"].body.decode()
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", page)
    policy = playground_headers()["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert (
        "media-src 'self' https://blobs.example blob:"
        in playground_headers(("https://blobs.example",))["content-security-policy"]
    )


@browser_test
def test_plays_while_it_is_made_and_shows_every_frame(visit: Visit, fake: FakeHelios) -> None:
    fake.behaviour.segment_seconds = 0.6
    visit.generate("a calm sea in the morning", 4.5)
    visit.wait("document.getElementById('stage').dataset.seen === 'true'")
    (job,) = fake.jobs.values()
    assert not job.is_over, "the first frame came only when the video was finished"
    assert re.fullmatch(r"\d\.\d\d s", visit.text("stat-first"))
    assert re.fullmatch(
        r"Chunk \d of 4 · stage \d of 3 · step \d of 2|Waiting for the first chunk", visit.text("progress")
    )
    visit.wait_state("done")
    visit.wait_end()
    assert visit.quality()[0] == 108
    visit.wait("document.getElementById('stat-dropped').innerText.includes('of 108')")
    assert float(visit.text("stat-generated").split()[0]) > 24
    assert visit.text("clock") == "4.5 / 4.5 s"
    assert visit.text("progress") == "Done, 108 frames"
    assert [message["segment"] for message in fake.messages("session.ack")][:2] == [0, 1]
    assert job.max_lead <= 2
    (start,) = fake.messages("session.start")
    assert (start["seconds"], start["size"], start["fps"], start["max_ahead_segments"]) == (4.5, "320x192", 24, 2)


@browser_test
def test_drops_no_frame(visit: Visit, fake: FakeHelios) -> None:
    """Chromium paints in software here, so another process on the cores can cost a frame: one of three runs counts."""
    for run in range(3):
        visit.generate("a calm sea in the morning", 4.5)
        visit.wait_sessions(fake, run + 1)
        visit.wait_state("done")
        visit.wait_end()
        decoded, dropped = visit.quality()
        assert decoded == 108
        if dropped == 0:
            break
    assert dropped == 0
    visit.wait("document.getElementById('stat-dropped').innerText === '0 of 108'")


@browser_test
def test_reads_the_codec_from_the_init_segment(visit: Visit, fake: FakeHelios) -> None:
    fake.behaviour.sends_mime_type = False
    visit.generate("a calm sea", 1)
    visit.wait_end()
    assert visit.quality()[0] == 24


@browser_test
def test_prompt_changes_in_flight(visit: Visit, fake: FakeHelios) -> None:
    fake.behaviour.segment_seconds = 0.5
    visit.page.select_option("#length-unit", "open")
    visit.generate("a calm sea in the morning")
    visit.wait("document.getElementById('stage').dataset.seen === 'true'")
    visit.page.fill("#change-prompt", "the same sea in a storm")
    visit.page.press("#change-prompt", "Enter")
    row = visit.page.locator('#prompts [data-number="2"]')
    visit.page.wait_for_selector('#prompts [data-number="2"][data-state="queued"]')
    assert re.search(r"queued · from chunk \d", row.inner_text())
    assert visit.page.locator('#marks [data-number="2"]').get_attribute("data-state") == "queued"
    visit.page.wait_for_selector('#prompts [data-number="2"][data-state="applied"]')
    (job,) = fake.jobs.values()
    (change,) = job.changes
    assert change.prompt == "the same sea in a storm"
    assert change.chunk is not None
    frame = 33 * change.chunk
    assert f"applied · chunk {change.chunk + 1} · frame {frame} · {frame / 24:.1f} s" in row.inner_text()
    mark = visit.page.locator('#marks [data-number="2"]')
    assert (mark.get_attribute("data-state"), mark.get_attribute("data-frame")) == ("applied", str(frame))

    visit.page.fill("#change-prompt", "something forbidden")
    visit.page.click("#change button")
    visit.page.wait_for_selector('#prompts [data-number="3"][data-state="refused"]')
    assert "this prompt is refused" in visit.page.locator('#prompts [data-number="3"]').inner_text()
    assert visit.page.locator("#marks > *").count() == 1

    visit.page.click("#stop")
    visit.wait_state("stopped")
    assert visit.page.locator("#cells i").count() == len(job.media)


@browser_test
def test_pause_holds_generation_until_resume(visit: Visit, fake: FakeHelios) -> None:
    visit.generate("a calm sea", 6)
    visit.wait("document.getElementById('stage').dataset.seen === 'true'")
    visit.page.click("#pause")
    visit.wait_state("paused")
    assert visit.page.evaluate("document.getElementById('video').paused")
    visit.page.wait_for_timeout(600)
    (job,) = fake.jobs.values()
    made = len(job.media)
    visit.page.wait_for_timeout(800)
    assert len(job.media) == made < 5
    visit.page.click("#pause")
    visit.wait_state("done")
    assert sum(job.frames) == 144


@browser_test
def test_credit_waits_for_the_viewer_of_an_endless_video_only(visit: Visit, fake: FakeHelios) -> None:
    visit.page.select_option("#length-unit", "open")
    visit.generate("a calm sea")
    visit.wait("document.getElementById('stage').dataset.seen === 'true'")
    visit.page.click("#play")
    visit.page.wait_for_timeout(1500)
    (job,) = fake.jobs.values()
    assert len(job.media) - 1 - job.acked == 2
    visit.page.click("#stop")
    visit.wait_state("stopped")


@browser_test
def test_resumes_after_a_lost_socket(visit: Visit, fake: FakeHelios) -> None:
    fake.behaviour.cut_after_segment = 1
    visit.generate("a calm sea", 5)
    visit.wait_state("done")
    visit.wait_end()
    assert visit.quality()[0] == 120
    first, second = fake.messages("session.start")
    (job,) = fake.jobs.values()
    assert "resume" not in first
    assert second["resume"] == {"id": job.id, "after_segment": 1}


@browser_test
def test_plain_video_where_media_source_is_absent(visit: Visit, fake: FakeHelios) -> None:
    visit.page.add_init_script(NO_MEDIA_SOURCE)
    visit.page.reload()
    _generate_plain(visit, fake)
    assert fake.messages("session.start") == []


@browser_test
def test_plain_video_where_the_socket_fails(visit: Visit, fake: FakeHelios) -> None:
    fake.behaviour.has_websocket = False
    visit.expected = ("WebSocket connection to",)
    _generate_plain(visit, fake)


def _generate_plain(visit: Visit, fake: FakeHelios) -> None:
    visit.generate("a calm sea", 3)
    visit.wait("document.getElementById('stage').dataset.seen === 'true'")
    assert visit.page.locator("#change").is_hidden()
    visit.wait_state("done")
    visit.wait_end()
    assert visit.quality()[0] == 72
    (job,) = fake.jobs.values()
    assert f"/v1/videos/{job.id}/stream" in fake.paths
    visit.page.click("#play")  # the progressive stream cannot be wound back: it plays the file
    visit.wait("document.getElementById('video').currentTime > 0.2 && !document.getElementById('video').ended")
    assert f"/v1/videos/{job.id}/content?variant=video" in fake.paths


@browser_test
def test_slower_generation_slows_playback(visit: Visit, fake: FakeHelios) -> None:
    fake.behaviour = Behaviour(segment_seconds=0.2, playback_rate=0.8)
    visit.generate("a calm sea", 3)
    visit.wait("document.getElementById('video').playbackRate === 0.8")
    visit.wait("document.getElementById('stat-playback').innerText.includes('0.80×')")
    visit.wait_state("done")


@browser_test
def test_the_prompt_field_shows_what_the_model_can_do(visit: Visit) -> None:
    visit.page.wait_for_selector('#size option[value="320x192"]', state="attached")
    assert visit.page.get_attribute("#prompt", "placeholder") == "a heron over a lake"


@browser_test
def test_errors_stand_next_to_their_field(visit: Visit, fake: FakeHelios) -> None:
    visit.page.click("#generate")
    assert visit.text("prompt-error") == "Say what the video should show."
    assert visit.page.evaluate("document.activeElement.id") == "prompt"
    visit.page.fill("#prompt", "a calm sea")
    assert visit.text("prompt-error") == ""

    visit.page.select_option("#size", "custom")
    visit.page.fill("#size-custom", "650x384")
    visit.page.click("#generate")
    visit.page.wait_for_selector("#size-error:not(:empty)")
    assert "both sides must be multiples of 64" in visit.text("size-error")
    assert visit.page.locator("#stage-error").is_hidden()
    visit.page.select_option("#size", "320x192")

    visit.page.click("#more summary")
    visit.page.locator("#steps input").nth(1).fill("0")
    visit.page.click("#more summary")
    visit.page.click("#generate")
    visit.page.wait_for_selector("#steps-error:not(:empty)")
    assert "needs 3 numbers, one per stage" in visit.text("steps-error")
    assert visit.page.locator("#steps input").nth(1).is_visible()
    visit.page.locator("#steps input").nth(1).fill("")

    visit.page.fill("#length", "soon")
    visit.page.click("#generate")
    assert visit.text("length-error") == "soon is not a number."
    visit.page.fill("#length", "1")

    visit.page.fill("#prompt", "a busy server")
    visit.page.click("#generate")
    visit.page.wait_for_selector("#stage-error:not(:empty)")
    assert visit.text("stage-error") == "the queue is full, try again in 20 s"
    assert visit.page.locator("#generate").inner_text() == "Generate"


@browser_test
def test_gallery(visit: Visit, fake: FakeHelios) -> None:
    page = visit.page
    visit.generate("a calm sea at dusk", 1)
    visit.wait_state("done")
    card = page.locator(".card")
    page.wait_for_selector('.card[data-status="completed"]')
    visit.wait("document.querySelector('.thumb img')?.naturalWidth > 0")
    assert "1 s · 320 × 192 · just now" in card.inner_text()

    page.reload()
    page.click(".thumb")
    visit.wait_end()
    assert visit.text("progress") == "24 frames, seed 42"
    (job,) = fake.jobs.values()
    with page.expect_download() as download:
        card.get_by_role("link", name="Download: a calm sea at dusk").click()
    assert download.value.suggested_filename == f"{job.id}.mp4"

    card.get_by_role("button", name="Use last frame").click()
    page.wait_for_selector("#preview-image:not([hidden])")
    assert visit.text("preview-name") == f"{job.id}-last.png"
    visit.generate("the sea after dusk", 1)
    visit.wait_sessions(fake, 2)
    visit.wait_state("done")
    assert fake.messages("session.start")[-1]["image"].startswith("data:image/png;base64,")
    page.click("#media-clear")

    page.get_by_role("button", name="Extend: a calm sea at dusk").click()
    assert page.locator("#size-field").is_hidden()
    visit.generate("a calm sea at dusk, going on", 1, size=None)
    page.wait_for_selector('.card[data-status="completed"] [aria-label="Play: a calm sea at dusk, going on"]')
    assert sorted(sum(job.frames) for job in fake.jobs.values()) == [24, 24, 48]

    delete = page.get_by_role("button", name="Delete: a calm sea at dusk", exact=True)
    delete.click()
    assert delete.inner_text() == "Delete?"
    delete.click()
    visit.wait("document.querySelectorAll('.card').length === 2")
    assert len(fake.jobs) == 2


@browser_test
def test_failed_job_says_why(visit: Visit, fake: FakeHelios) -> None:
    visit.page.add_init_script(NO_MEDIA_SOURCE)
    visit.page.reload()
    visit.generate("this will fail", 4)
    visit.page.wait_for_selector('#stage[data-state="failed"]')
    assert visit.text("stage-error") == "it went wrong"
    visit.page.wait_for_selector('.card[data-status="failed"]')


@browser_test
def test_asks_for_a_key_only_when_the_server_does(visit: Visit, fake: FakeHelios) -> None:
    page = visit.page
    assert page.locator("#access").is_hidden()
    visit.expected = ("401",)
    fake.behaviour.api_key = "hs_right"
    page.reload()
    page.wait_for_selector("#access:not([hidden])")
    page.fill("#access-key", "hs_wrong")
    page.press("#access-key", "Enter")
    page.wait_for_selector("#access-error:not(:empty)")
    assert visit.text("access-error") == "This API key is not known here."
    page.fill("#access-key", "hs_right")
    page.press("#access-key", "Enter")
    page.wait_for_selector("#access", state="hidden")
    visit.generate("a calm sea", 1)
    visit.wait_state("done")
    visit.wait("document.querySelector('.thumb img')?.naturalWidth > 0")
    assert "/v1/realtime/video?token=signed" in fake.paths
    assert not any("hs_right" in path for path in fake.paths)
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]


@browser_test
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_and_has_names_at_both_widths(
    visit: Visit, fake: FakeHelios, width: int, scheme: Literal["light", "dark"]
) -> None:
    page = visit.page
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    fake.behaviour.segment_seconds = 0.4
    visit.generate("a calm sea in the morning and quite a long description of everything that is in it", 3)
    visit.wait("document.getElementById('stage').dataset.seen === 'true'")
    page.click("#more summary")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    unnamed = page.evaluate(_UNNAMED)
    assert unnamed == []
    cut = page.evaluate(
        "[...document.querySelectorAll('button, .button')].filter(b => b.scrollWidth > b.clientWidth + 1).length"
    )
    assert cut == 0
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == {"light": "dark", "dark": "light"}[scheme]
    page.evaluate("localStorage.clear()")


@browser_test
def test_works_from_the_keyboard(visit: Visit, fake: FakeHelios) -> None:
    page = visit.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.focus("#prompt")
    page.keyboard.type("a calm sea")
    page.keyboard.press("Control+Enter")
    visit.wait_state("done")
    visit.wait_end()
    page.focus("#seek")
    page.keyboard.press("Home")
    visit.wait("document.getElementById('video').currentTime < 0.1")
    assert page.evaluate("document.getElementById('announce').textContent") == "The video is done."


# Visible controls without a name for screen readers.
_UNNAMED = """[...document.querySelectorAll("button, a, input, select, textarea, video")]
  .filter((e) => e.checkVisibility())
  .filter((e) => !e.getAttribute("aria-label") && !e.textContent.trim())
  .filter((e) => ![...(e.labels ?? [])].some((label) => label.textContent.trim()))
  .map((e) => e.outerHTML)"""
