"""The calls that are answered at once, over a real channel: every verb, paging, downloads, and how errors are told."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from helios_serve.api.auth import ANONYMOUS
from helios_serve.api.intake import Extension
from helios_serve.api.keys import KeyRing, new_key
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.api.video_files import VideoExpiredError
from helios_serve.errors import (
    CapacityError,
    ConflictError,
    HeliosError,
    InvalidRequestError,
    NotFoundError,
    QuotaError,
)
from helios_serve.store.errors import IdempotencyKeyReusedError, StorageFullError
from tests.api.grpc_fakes import FRAMES, Served, refused, run
from tests.api.session_fakes import Script, parsed_of


def test_a_job_from_its_making_to_its_deletion() -> None:
    async def scenario(served: Served) -> None:
        stub = served.stub
        created = (await stub.CreateVideo(pb.CreateVideoRequest(spec=served.spec(seed=7, fps=12)))).video
        assert created.status in (pb.VIDEO_STATUS_QUEUED, pb.VIDEO_STATUS_IN_PROGRESS)
        assert (created.width, created.height, created.seed, created.fps) == (64, 64, 7, 12)
        assert (created.num_frames, created.num_chunks, created.seconds) == (FRAMES, 3, FRAMES / 12)
        assert created.prompt == "a lake"
        assert created.url == ""
        assert not created.HasField("size_bytes")
        job = await served.service.ended(created.id)
        assert job.parsed.request.service_class == "offline"

        found = (await stub.GetVideo(pb.GetVideoRequest(id=created.id))).video
        assert (found.status, found.progress, found.chunks_done) == (pb.VIDEO_STATUS_COMPLETED, 100, 3)
        assert found.size_bytes == len(served.service.file(job))
        assert found.url.endswith(f"/v1/videos/{created.id}/content")
        assert found.mime_type.startswith('video/mp4; codecs="avc1.')
        assert not found.HasField("queue_position")
        assert not found.HasField("error")

        unchanged = (await stub.CancelVideo(pb.CancelVideoRequest(id=created.id))).video
        assert unchanged.status == pb.VIDEO_STATUS_COMPLETED
        deleted = await stub.DeleteVideo(pb.DeleteVideoRequest(id=created.id))
        assert (deleted.id, deleted.deleted) == (created.id, True)
        gone = await refused(stub.GetVideo(pb.GetVideoRequest(id=created.id)))
        assert (gone.code, gone.reason) == (grpc.StatusCode.NOT_FOUND, "video_not_found")
        assert gone.retry_s is None
        assert served.counted("GetVideo", "OK") == 1
        assert served.counted("GetVideo", "NOT_FOUND") == 1

    run(scenario)


def test_a_cancelled_job_says_so() -> None:
    async def scenario(served: Served) -> None:
        created = (await served.stub.CreateVideo(pb.CreateVideoRequest(spec=served.spec()))).video
        cancelled = (await served.stub.CancelVideo(pb.CancelVideoRequest(id=created.id))).video
        assert (cancelled.status, cancelled.error.code) == (pb.VIDEO_STATUS_CANCELLED, "cancelled")

    run(scenario, Script(chunk_s=0.5))


def test_pages_hold_every_job_once() -> None:
    async def scenario(served: Served) -> None:
        for _ in range(7):
            served.service.begin(parsed_of({"prompt": "a lake", "size": "64x64", "num_frames": 33}), ANONYMOUS)
        ids = [*served.service.jobs]
        for ascending, expected in ((True, ids), (False, ids[::-1])):
            found, token, num_pages = [], "", 0
            while num_pages == 0 or token:
                request = pb.ListVideosRequest(page_size=3, page_token=token, ascending=ascending)
                page = await served.stub.ListVideos(request)
                found += [video.id for video in page.videos]
                token, num_pages = page.next_page_token, num_pages + 1
            assert found == expected
            assert num_pages == 3
        done = await served.service.ended(ids[0])
        done.state = "expired"
        request = pb.ListVideosRequest(statuses=[pb.VIDEO_STATUS_EXPIRED])
        expired = (await served.stub.ListVideos(request)).videos
        assert [(video.id, video.error.code) for video in expired] == [(ids[0], "video_expired")]

    run(scenario)


def test_a_page_of_long_prompts_is_cut_to_one_message() -> None:
    async def scenario(served: Served) -> None:
        for _ in range(50):
            body = {"prompt": "\u00e9" * 32_000, "size": "64x64", "num_frames": 33}
            served.service.begin(parsed_of(body), ANONYMOUS)
        found, token, num_pages = set(), "", 0
        while num_pages == 0 or token:
            page = await served.stub.ListVideos(pb.ListVideosRequest(page_size=50, page_token=token))
            assert page.ByteSize() <= 1 << 20
            found |= {video.id for video in page.videos}
            token, num_pages = page.next_page_token, num_pages + 1
        assert found == {*served.service.jobs}
        assert num_pages == 4

    run(scenario, Script(queue_s=60))


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (pb.ListVideosRequest(page_size=101), "page_size"),
        (pb.ListVideosRequest(page_size=-1), "page_size"),
        (pb.ListVideosRequest(statuses=[pb.VIDEO_STATUS_FAILED, 99]), "statuses[1]"),
    ],
)
def test_pages_that_there_are_not(request_: pb.ListVideosRequest, path: str) -> None:
    async def scenario(served: Served) -> None:
        refusal = await refused(served.stub.ListVideos(request_))
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [path])

    run(scenario)


def test_a_download_comes_in_pieces_and_can_be_resumed() -> None:
    async def scenario(served: Served) -> None:
        video_id = await served.made()
        data = served.service.file(served.service.jobs[video_id])
        assert len(data) > 3 << 20

        pieces = [piece async for piece in served.stub.DownloadVideo(pb.DownloadVideoRequest(id=video_id))]
        assert b"".join(piece.data for piece in pieces) == data
        assert [piece.offset for piece in pieces] == [768 * 1024 * n for n in range(len(pieces))]
        assert all(len(piece.data) >= 256 << 10 and piece.ByteSize() <= 1 << 20 for piece in pieces[:-1])
        assert {piece.total_size for piece in pieces} == {len(data)}
        assert pieces[0].mime_type == "video/mp4"
        assert pieces[0].etag.startswith('"')
        assert not any(piece.mime_type or piece.etag for piece in pieces[1:])

        request = pb.DownloadVideoRequest(id=video_id, offset=1000, limit=2_000_000)
        part = [piece async for piece in served.stub.DownloadVideo(request)]
        assert b"".join(piece.data for piece in part) == data[1000:2_001_000]
        assert part[0].etag == pieces[0].etag
        request = pb.DownloadVideoRequest(id=video_id, offset=len(data))
        assert [piece.data async for piece in served.stub.DownloadVideo(request)] == [b""]
        request = pb.DownloadVideoRequest(id=video_id, offset=len(data) + 1)
        beyond = await refused(served.stub.DownloadVideo(request))
        assert (beyond.code, beyond.reason) == (grpc.StatusCode.OUT_OF_RANGE, "range_not_satisfiable")

        request = pb.DownloadVideoRequest(id=video_id, variant=pb.VARIANT_THUMBNAIL)
        (picture,) = [piece async for piece in served.stub.DownloadVideo(request)]
        assert (picture.data, picture.mime_type) == (f"thumbnail of {video_id}".encode(), "image/webp")
        for bad in ({"variant": 9}, {"offset": -1}, {"limit": -1}):
            refusal = await refused(served.stub.DownloadVideo(pb.DownloadVideoRequest(id=video_id, **bad)))
            assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [*bad])

    run(scenario, Script(padding_bytes=1_100_000))


def test_a_video_that_is_not_finished_has_no_content() -> None:
    async def scenario(served: Served) -> None:
        created = (await served.stub.CreateVideo(pb.CreateVideoRequest(spec=served.spec()))).video
        refusal = await refused(served.stub.DownloadVideo(pb.DownloadVideoRequest(id=created.id)))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "video_not_ready")

    run(scenario, Script(chunk_s=0.5))


def test_remix_and_extend() -> None:
    async def scenario(served: Served) -> None:
        stub, service = served.stub, served.service
        video_id = await served.made()
        spec = pb.VideoSpec(prompt="a storm")
        await stub.CreateVideo(pb.CreateVideoRequest(spec=spec, remix_video_id=video_id))
        assert service.log[-1] == ("remix", video_id, "a storm", "remix")
        spec = pb.VideoSpec(prompt="and night falls", seconds=2)
        await stub.CreateVideo(pb.CreateVideoRequest(spec=spec, extend_video_id=video_id))
        asked = Extension(prompt="and night falls", num_frames=None, seconds=2, max_frames=7260)
        assert service.log[-1] == ("extend", video_id, asked, "extend")

        refusals = {
            "spec.width": pb.CreateVideoRequest(spec=pb.VideoSpec(prompt="x", width=64), remix_video_id=video_id),
            "webhook_url": pb.CreateVideoRequest(
                spec=pb.VideoSpec(prompt="x"), extend_video_id=video_id, webhook_url="https://a.example"
            ),
            "extend_video_id": pb.CreateVideoRequest(remix_video_id=video_id, extend_video_id=video_id),
            "spec.prompt": pb.CreateVideoRequest(remix_video_id=video_id),
        }
        for path, request in refusals.items():
            refusal = await refused(stub.CreateVideo(request))
            assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [path])

    run(scenario)


def test_models() -> None:
    async def scenario(served: Served) -> None:
        (model,) = (await served.stub.ListModels(pb.ListModelsRequest())).models
        assert (model.id, model.variant, model.frames_per_chunk) == ("helios-distilled", "distilled", 33)
        assert (model.size_multiple, model.num_stages, [*model.default_steps]) == (64, 3, [2, 2, 2])
        assert [*model.recommended_sizes] == ["64x64", "128x64"]
        assert [*model.codecs] == [pb.CODEC_H264, pb.CODEC_VP9, pb.CODEC_AV1]
        assert model.created.seconds > 1_700_000_000

    run(scenario)


@pytest.mark.parametrize(
    ("error", "code", "retry_s"),
    [
        (InvalidRequestError("size: no", param="size"), "INVALID_ARGUMENT", None),
        (NotFoundError("no such video", param="id"), "NOT_FOUND", None),
        (VideoExpiredError("over"), "NOT_FOUND", None),
        (ConflictError("not yet"), "FAILED_PRECONDITION", None),
        (IdempotencyKeyReusedError("another request"), "ALREADY_EXISTS", None),
        (QuotaError("too much", retry_after_s=2.5), "RESOURCE_EXHAUSTED", 2.5),
        (StorageFullError("no space"), "RESOURCE_EXHAUSTED", 1.0),
        (CapacityError("full", retry_after_s=1000.0), "UNAVAILABLE", 120.0),
        (CapacityError("l\u00e4uft\nnicht", code="no_worker"), "UNAVAILABLE", 1.0),
    ],
)
def test_errors_have_their_status_and_details(error: HeliosError, code: str, retry_s: float | None) -> None:
    async def scenario(served: Served) -> None:
        served.service.error = error
        refusal = await refused(served.stub.CreateVideo(pb.CreateVideoRequest(spec=served.spec())))
        assert (refusal.code.name, refusal.reason, refusal.message) == (code, error.code, error.message)
        assert refusal.retry_s == retry_s
        assert refusal.retry_after_ms == (None if retry_s is None else str(round(1000 * retry_s)))
        async with asyncio.timeout(10):  # the client hears of it before it is counted
            while served.counted("CreateVideo", code) != 1:
                await asyncio.sleep(0.01)
        assert (await served.stub.ListModels(pb.ListModelsRequest())).models

    run(scenario)


@pytest.mark.parametrize("letter", ["a", "\u20ac", "\U0001f600"])
def test_a_long_message_reaches_a_client_of_default_limits(letter: str) -> None:
    """Clients refuse trailers at random between their soft and their hard limit."""
    error = CapacityError(letter * 5000, param=letter * 500, retry_after_s=12.5)

    async def scenario(served: Served) -> None:
        served.service.error = error
        headers = (("x-request-id", "r" * 128),)
        for _ in range(20):
            refusal = await refused(
                served.stub.CreateVideo(pb.CreateVideoRequest(spec=served.spec()), metadata=headers)
            )
            assert (refusal.code, refusal.retry_s) == (grpc.StatusCode.UNAVAILABLE, 12.5)
            assert refusal.message == letter * (1000 // len(letter.encode()))

    run(scenario)


def test_a_defect_is_told_without_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(served: Served) -> None:
        served.service.error = RuntimeError("secret detail")
        request = pb.CreateVideoRequest(spec=served.spec())
        refusal = await refused(served.stub.CreateVideo(request, metadata=(("x-request-id", "mine"),)))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "internal_error")
        assert "secret" not in refusal.message

    run(scenario)
    assert "secret detail" in caplog.text


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"width": 650}, "spec.width"),
        ({"num_frames": 9000}, "spec.num_frames"),
        ({"helios": pb.HeliosParams(steps=[2, 2])}, "spec.helios.steps"),
        ({"helios": pb.HeliosParams(guidance_scale=30)}, "spec.helios.guidance_scale"),
        ({"helios": pb.HeliosParams(profile=7)}, "spec.helios.profile"),
        (
            {"prompt": "", "prompts": [pb.PromptAt(prompt="a"), pb.PromptAt(prompt="b", chunk=6)]},
            "spec.prompts[1].chunk",
        ),
        ({"prompt": ""}, "spec.prompt"),
        ({"image": pb.Media(url="gopher:x")}, "spec.image"),
        ({"image": pb.Media(file_id="file_1")}, "spec.image.file_id"),
        ({"image": pb.Media(video_id="video_1")}, "spec.image.video_id"),
        ({"image": pb.Media(mime_type="image/png")}, "spec.image"),
        ({"video": pb.Media(video_id="video_1")}, "spec.video.video_id"),
        ({"output": pb.OutputOptions(crf=60)}, "spec.output.crf"),
        ({"output": pb.OutputOptions(codec=9)}, "spec.output.codec"),
        ({"output": pb.OutputOptions(container=9)}, "spec.output.container"),
        ({"queue_timeout": Duration(seconds=-1)}, "spec.queue_timeout"),
        ({"metadata": {"": "x"}}, "spec.metadata"),
        ({"fps": float("nan")}, "spec.fps"),
    ],
)
def test_a_refusal_names_the_field_of_the_message(fields: dict[str, object], path: str) -> None:
    async def scenario(served: Served) -> None:
        refusal = await refused(served.stub.CreateVideo(pb.CreateVideoRequest(spec=served.spec(**fields))))
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [path])
        assert not served.service.jobs

    run(scenario)


def test_what_lies_beside_the_spec_is_read_too() -> None:
    async def scenario(served: Served) -> None:
        request = pb.CreateVideoRequest(
            spec=served.spec(), webhook_url="https://a.example/hook", expires_after=Duration(seconds=7200)
        )
        created = (await served.stub.CreateVideo(request)).video
        parsed = served.service.jobs[created.id].parsed
        assert (parsed.webhook_url, parsed.expires_after_s) == ("https://a.example/hook", 7200)
        for path, bad in {
            "webhook_url": pb.CreateVideoRequest(spec=served.spec(), webhook_url="ftp://a.example"),
            "expires_after": pb.CreateVideoRequest(spec=served.spec(), expires_after=Duration(nanos=5)),
        }.items():
            assert (await refused(served.stub.CreateVideo(bad))).fields == [path]

    run(scenario)


def test_raw_frames_want_a_scope_and_are_not_stored() -> None:
    reader, reader_key = new_key(scopes=("generate",))
    raw, raw_key = new_key(scopes=("generate", "raw"))

    async def scenario(served: Served) -> None:
        spec = served.spec(output=pb.OutputOptions(container=pb.CONTAINER_RAW_RGB24))
        for key, code in ((reader, "PERMISSION_DENIED"), (raw, "INVALID_ARGUMENT")):
            metadata = (("authorization", f"Bearer {key}"),)
            refusal = await refused(served.stub.CreateVideo(pb.CreateVideoRequest(spec=spec), metadata=metadata))
            assert refusal.code.name == code
        metadata = (("authorization", f"Bearer {reader}"),)
        refusal = await refused(served.stub.Generate(pb.GenerateRequest(spec=spec), metadata=metadata))
        assert refusal.code.name == "PERMISSION_DENIED"

    run(scenario, keys=[KeyRing([reader_key, raw_key])])


def test_an_idempotency_key_finds_the_job_again() -> None:
    async def scenario(served: Served) -> None:
        request = pb.CreateVideoRequest(spec=served.spec())
        metadata = (("idempotency-key", "k1"),)
        first = await served.stub.CreateVideo(request, metadata=metadata)
        again = await served.stub.CreateVideo(request, metadata=metadata)
        assert first.video.id == again.video.id
        assert {origin.route for origin in served.service.origins} == {"create"}
        for key in ("", "k" * 256):
            refusal = await refused(served.stub.CreateVideo(request, metadata=(("idempotency-key", key),)))
            assert refusal.fields == ["idempotency-key"]

    run(scenario)
