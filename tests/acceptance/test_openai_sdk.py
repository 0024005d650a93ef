"""The unmodified OpenAI SDK makes, follows, lists, downloads, remixes, extends and deletes videos."""

from __future__ import annotations

import asyncio
import io
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from openai import AsyncOpenAI, NotFoundError, OpenAI, omit
from openai.types import Video
from PIL import Image

from tests.acceptance.conftest import KeyedServer
from tests.acceptance.live_server import TINY, LiveServer
from tests.acceptance.mp4_boxes import all_of, boxes, decode_times, sequence_numbers, times_s, timescale
from tests.acceptance.sdk import Wire, sdk_on

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
"""The SDK warns that OpenAI ends its own Videos API."""

PROMPT = "a red ball rolls over green grass"
SMALL: Any = {"size": cast(Any, "64x64"), "extra_body": {"num_frames": 33}}


def details(video: Video) -> dict[str, Any]:
    """What the server says beyond the SDK's types."""
    assert video.model_extra is not None
    found: dict[str, Any] = video.model_extra["helios"]
    return found


def test_create_takes_our_parameters(client: OpenAI) -> None:
    body = {"num_frames": 33, "seed": 5, "helios": {"steps": [1, 1, 1], "crf": 30}}
    video = client.videos.create(prompt=PROMPT, size=cast(Any, "64x64"), extra_body=body)
    assert (video.object, video.prompt, video.size) == ("video", PROMPT, "64x64")
    assert video.status in ("queued", "in_progress")
    assert (details(video)["seed"], details(video)["steps"], details(video)["num_frames"]) == (5, [1, 1, 1], 33)
    assert client.videos.poll(video.id).status == "completed"


def test_create_with_an_image_file(client: OpenAI, picture: Path) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, input_reference=picture, **SMALL)
    assert video.status == "completed", video.error
    other = client.videos.create_and_poll(prompt=PROMPT, input_reference=picture, **SMALL)
    assert details(other)["seed"] != details(video)["seed"]


@pytest.mark.parametrize("seconds", [7, "7"])
def test_create_with_seconds(client: OpenAI, seconds: object) -> None:
    video = client.videos.create(prompt=PROMPT, size=cast(Any, "64x64"), seconds=cast(Any, seconds))
    assert (video.seconds, details(video)["num_frames"]) == ("7", 168)
    client.videos.delete(video.id)


def test_create_and_poll_obeys_the_poll_header(server: LiveServer) -> None:
    wire = Wire()
    with sdk_on(wire, server) as client:
        video = client.videos.create_and_poll(prompt=PROMPT, size=cast(Any, "64x64"), extra_body={"num_frames": 330})
    assert (video.status, video.progress) == ("completed", 100)
    polls = wire.of("GET", f"/v1/videos/{video.id}")
    wait_s = int(polls[0].headers["openai-poll-after-ms"]) / 1000
    assert 0.25 <= wait_s <= 5
    gaps = [later.sent_s - sooner.sent_s for sooner, later in pairwise(polls)]
    assert gaps
    assert all(wait_s <= gap < wait_s + 1 for gap in gaps), (wait_s, gaps)
    assert "openai-poll-after-ms" not in polls[-1].headers


def test_delete_then_404(client: OpenAI) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, **SMALL)
    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (video.id, "video.deleted", True)
    for call in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        with pytest.raises(NotFoundError) as caught:
            call(video.id)
        assert caught.value.code == "video_not_found"


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_list_pages(keyed: KeyedServer, order: Any) -> None:
    """11 jobs with a limit of 3 are 11 items in 4 requests."""
    wire, bob = Wire(), keyed.bob
    while len(bob.http.get("/v1/videos?limit=100").json()["data"]) < 11:
        bob.cancel(bob.create(TINY))
    newest_first = [job["id"] for job in bob.http.get("/v1/videos?limit=100").json()["data"]]
    with sdk_on(wire, bob) as client:
        ids = [video.id for video in client.videos.list(limit=3, order=order)]
    assert ids == (newest_first if order == "desc" else newest_first[::-1])
    assert len(ids) == len(set(ids)) == 11
    assert len(wire.of("GET", "/v1/videos")) == 4


def test_content_in_all_variants(client: OpenAI, finished: str) -> None:
    video = client.videos.download_content(finished)
    assert video.response.headers["content-type"] == "video/mp4"
    assert f'filename="{finished}.mp4"' in video.response.headers["content-disposition"]
    assert len(times_s(video.read())) == 66
    assert [box.kind for box in boxes(video.content)][:2] == ["ftyp", "moov"], "not made for progressive playback"
    sizes = {"thumbnail": ("WEBP", (64, 64)), "spritesheet": ("JPEG", None), "last_frame": ("PNG", (64, 64))}
    for variant, (kind, size) in sizes.items():
        data = client.videos.download_content(finished, variant=cast(Any, variant)).read()
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == kind
            assert size is None or image.width / image.height == size[0] / size[1]


def test_content_as_a_stream(client: OpenAI, finished: str, tmp_path: Path) -> None:
    with client.videos.with_streaming_response.download_content(finished) as answer:
        answer.stream_to_file(tmp_path / "video.mp4")
    assert (tmp_path / "video.mp4").read_bytes() == client.videos.download_content(finished).read()


def test_remix(client: OpenAI, finished: str) -> None:
    old = client.videos.retrieve(finished)
    new = client.videos.remix(finished, prompt="a green ball rolls over red grass")
    assert (new.remixed_from_video_id, new.prompt) == (finished, "a green ball rolls over red grass")
    assert (details(new)["seed"], details(new)["num_frames"], new.size) == (7, 66, old.size)
    new = client.videos.poll(new.id)
    assert (new.status, new.error) == ("completed", None)
    assert client.videos.download_content(new.id).read() != client.videos.download_content(finished).read()


def test_extend(server: LiveServer, client: OpenAI, finished: str) -> None:
    """The source's segments are there byte for byte, and time goes on where they end."""
    video = client.videos.extend(
        prompt="the ball stops", seconds=cast(Any, "2"), video=cast(Any, omit), extra_body={"video": {"id": finished}}
    )
    video = client.videos.poll(video.id)
    assert (video.status, video.seconds) == ("completed", "4.75")
    assert (details(video)["num_frames"], details(video)["extended_from_video_id"]) == (66 + 48, finished)
    assert len(times_s(client.videos.download_content(video.id).read())) == 66 + 48
    source = server.http.get(f"/v1/videos/{finished}/stream").content
    whole = server.http.get(f"/v1/videos/{video.id}/stream").content
    assert whole.startswith(source)
    starts = [start * timescale(whole) / 24 for start in (0, 33, 66, 99)]
    assert decode_times(whole) == starts
    assert sequence_numbers(whole) == [1, 2, 3, 4]
    assert times_s(whole) == pytest.approx([frame / 24 for frame in range(114)], abs=1e-4)


def test_extend_gives_back_frames_that_were_cut(server: LiveServer, client: OpenAI) -> None:
    body = {"num_frames": 50, "seed": 3}
    source = client.videos.create_and_poll(prompt=PROMPT, size=cast(Any, "64x64"), extra_body=body)
    extended = client.videos.extend(
        prompt="the ball stops",
        seconds=cast(Any, omit),
        video=cast(Any, omit),
        extra_body={"video": {"id": source.id}, "num_frames": 40},
    )
    extended = client.videos.poll(extended.id)
    whole = server.http.get(f"/v1/videos/{extended.id}/stream").content
    assert len(times_s(whole)) == details(extended)["num_frames"] == 90
    first, *_ = all_of("mdat", server.http.get(f"/v1/videos/{source.id}/stream").content)
    assert all_of("mdat", whole)[0] == first
    assert decode_times(whole) == [start * timescale(whole) / 24 for start in (0, 33, 66)]


def test_extend_a_file(server: LiveServer, client: OpenAI, finished: str, tmp_path: Path) -> None:
    """A video of another origin: its last whole chunks, encoded anew, then what is added."""
    path = tmp_path / "video.mp4"
    path.write_bytes(client.videos.download_content(finished).read())
    video = client.videos.extend(prompt="the ball stops", seconds=cast(Any, "2"), video=path)
    video = client.videos.poll(video.id)
    assert (video.status, video.error, video.size, video.seconds) == ("completed", None, "64x64", "4.75")
    assert details(video)["continued_frames"] == {"first": 0, "last": 65}
    assert details(video)["extended_from_video_id"] is None
    whole = server.http.get(f"/v1/videos/{video.id}/stream").content
    assert decode_times(whole) == [start * timescale(whole) / 24 for start in (0, 33, 66, 99)]
    assert times_s(whole) == pytest.approx([frame / 24 for frame in range(114)], abs=1e-4)


def test_every_call_of_the_async_client(server: LiveServer, picture: Path) -> None:
    async def calls() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
            videos = client.videos
            made = await videos.create_and_poll(prompt=PROMPT, input_reference=picture, **SMALL)
            assert made.status == "completed", made.error
            created = await videos.create(prompt=PROMPT, seconds=cast(Any, 1), size=cast(Any, "64x64"))
            assert (await videos.poll(created.id)).status == "completed"
            assert (await videos.retrieve(created.id)).seconds == "1"
            listed = [video.id async for video in videos.list(limit=100)]
            assert listed.index(created.id) < listed.index(made.id)
            content = await videos.download_content(made.id)
            assert len(times_s(content.read())) == 33
            async with videos.with_streaming_response.download_content(made.id) as answer:
                assert await answer.read() == content.content
            remixed = await videos.remix(made.id, prompt="another")
            assert remixed.remixed_from_video_id == made.id
            extended = await videos.extend(
                prompt="on", seconds=cast(Any, "1"), video=cast(Any, omit), extra_body={"video": {"id": made.id}}
            )
            assert details(await videos.poll(extended.id))["num_frames"] == 57
            assert (await videos.delete(made.id)).deleted
            with pytest.raises(NotFoundError):
                await videos.retrieve(made.id)

    asyncio.run(calls())
