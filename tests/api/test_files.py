"""Uploads: what is taken, whose they are, how long they stay, and that the unmodified SDK reads the answers."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import av
import httpx2
import numpy as np
import openai
import pytest
from fastapi import FastAPI
from PIL import Image

from helios_serve.api.auth import Caller
from helios_serve.api.file_routes import FILES, file_router
from helios_serve.api.files import FILE_TTL_S, FileService, media_type_of, plain_name
from helios_serve.api.keys import DEFAULT_SCOPES, KeyLimits
from helios_serve.api.limits import Limiter
from helios_serve.errors import NotFoundError
from helios_serve.store import schema
from helios_serve.store.connect import StoreConfig, open_stores
from tests.api.test_http_access import BASE, World, assert_refused, calling, run, serve
from tests.store.test_jobs import shift

PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, kind)
    return out.getvalue()


def video(kind: str, codec: str, **options: str) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=kind, options=options) as container:
        stream: Any = container.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    stores = open_stores(StoreConfig(data_dir=tmp_path / "data"))
    yield World(stores)
    stores.close()


def files_of(world: World) -> FileService:
    stores = world.stores
    return FileService(stores.access, stores.blobs, stores.jobs, Limiter(clock=world.clock))


def app_of(world: World) -> FastAPI:
    large = {FILES: 64 * 2**20}
    return serve(world, file_router(files_of(world), world.access()), large=large)


@asynccontextmanager
async def sdk(app: FastAPI, bearer: str) -> Any:
    """The unmodified client of OpenAI."""
    transport = httpx2.ASGITransport(app=app, client=("127.0.0.1", 5))
    async with httpx2.AsyncClient(transport=transport, base_url=BASE) as http:
        yield openai.AsyncOpenAI(
            api_key=bearer.removeprefix("Bearer "), base_url=f"{BASE}/v1", http_client=http, max_retries=0
        )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (picture("PNG"), "image/png"),
        (picture("JPEG"), "image/jpeg"),
        (picture("WEBP"), "image/webp"),
        (video("mp4", "libx264"), "video/mp4"),
        (video("mp4", "libx264", movflags="frag_keyframe+empty_moov+default_base_moof"), "video/mp4"),
        (video("webm", "libvpx"), "video/webm"),
        (video("matroska", "libvpx"), None),
        (video("mov", "libx264"), None),
        (video("avi", "libx264"), None),
        (picture("GIF"), None),
        (picture("BMP"), None),
        (picture("AVIF"), None),
        (b"#EXTM3U\nhttp://10.0.0.1/", None),
        (b"\x89PNG", None),
        (b"\x00\x00\x00\x18ftyp", "video/mp4"),
        (b"RIFF\x00\x00\x00\x00WAVE", None),
        (b"", None),
    ],
)
def test_the_first_bytes_tell_the_type(data: bytes, expected: str | None) -> None:
    assert media_type_of(data) == expected


def test_names_are_shown_plainly() -> None:
    assert plain_name("a b.png") == "a b.png"
    assert plain_name("../../etc/passwd") == "passwd"
    assert plain_name("C:\\x\\y.png") == "y.png"
    assert plain_name("é\x00\n.png") == "é.png"
    assert plain_name("") == plain_name("a/") == "file"
    assert len(plain_name("x" * 1000)) == 255


def test_the_sdk_uploads_lists_reads_and_deletes(world: World) -> None:
    bearer = world.key("a")
    app = app_of(world)

    async def work() -> None:
        async with sdk(app, bearer) as client:
            data = picture("PNG")
            made = await client.files.create(file=("cat.png", data), purpose="vision")
            assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(data), "cat.png", "vision")
            assert made.status == "processed"
            assert made.id.startswith("file-")
            assert made.expires_at is not None
            assert abs(made.expires_at - made.created_at - FILE_TTL_S) <= 1
            assert await client.files.retrieve(made.id) == made
            short = await client.files.create(
                file=io.BytesIO(data), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
            )
            assert abs(short.expires_at - short.created_at - 3600) <= 1
            third = await client.files.create(file=data, purpose="vision")
            assert [one.id async for one in client.files.list(limit=1)] == [third.id, short.id, made.id]
            assert [one.id async for one in client.files.list(order="asc", limit=2)] == [made.id, short.id, third.id]
            gone = await client.files.delete(made.id)
            assert (gone.id, gone.object, gone.deleted) == (made.id, "file", True)
            with pytest.raises(openai.NotFoundError) as caught:
                await client.files.retrieve(made.id)
            assert caught.value.code == "file_not_found"

    run(work)


def test_heads_are_answered(world: World) -> None:
    bearer = world.key("a")
    app = app_of(world)

    async def work() -> None:
        async with calling(app, bearer) as client:
            made = await client.post(FILES, files={"file": ("x", picture("PNG"))}, data={"purpose": "vision"})
            for path in (FILES, f"{FILES}/{made.json()['id']}"):
                got, head = await client.get(path), await client.head(path)
                assert (got.status_code, head.status_code, head.content) == (200, 200, b"")
            assert_refused(await client.get(f"{FILES}/none"), 404, "file_not_found")

    run(work)


def test_another_tenants_file_is_not_found(world: World) -> None:
    mine, colleague, stranger = world.key("a"), world.key("a"), world.key("b")
    no_generate = world.key("a", scopes=["read"])
    app = app_of(world)

    async def work() -> None:
        async with calling(app) as client:
            form: Any = {"files": {"file": ("x", picture("PNG"))}, "data": {"purpose": "vision"}}
            made = await client.post(FILES, headers={"authorization": mine}, **form)
            path = f"{FILES}/{made.json()['id']}"
            for method in ("GET", "DELETE"):
                answer = await client.request(method, path, headers={"authorization": stranger})
                unknown = await client.request(method, f"{FILES}/file-0", headers={"authorization": stranger})
                assert_refused(answer, 404, "file_not_found")
                assert unknown.json()["error"]["code"] == "file_not_found"
            listed = await client.get(FILES, headers={"authorization": stranger})
            expected: Any = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
            assert listed.json() == expected
            after = await client.get(FILES, params={"after": made.json()["id"]}, headers={"authorization": stranger})
            assert after.status_code == 404
            assert (await client.get(path, headers={"authorization": colleague})).status_code == 200
            for call in (client.get(path), client.get(FILES), client.delete(path), client.post(FILES, **form)):
                assert_refused(await call, 401, "invalid_api_key")
            answer = await client.get(path, headers={"authorization": no_generate})
            assert_refused(answer, 403, "insufficient_scope")

    run(work)


def test_the_service_reads_for_the_owner_until_the_file_expires(world: World) -> None:
    files = files_of(world)
    owner = Caller(tenant="a", key_id="k", scopes=DEFAULT_SCOPES, limits=KeyLimits())
    other = Caller(tenant="b", key_id="k", scopes=DEFAULT_SCOPES, limits=KeyLimits())

    async def work() -> None:
        data = picture("WEBP")
        made = await files.create(owner, data, filename="x", purpose="vision")
        assert (made.content_type, made.num_bytes) == ("image/webp", len(data))
        assert await files.read(owner, made.id) == data
        with pytest.raises(NotFoundError):
            await files.read(other, made.id)
        shift(world.stores, schema.file, "expires_at", -FILE_TTL_S - 1)
        for call in (files.read(owner, made.id), files.get(owner, made.id)):
            with pytest.raises(NotFoundError) as caught:
                await call
            assert caught.value.code == "file_not_found"

    asyncio.run(work())


def test_uploads_that_are_refused(world: World) -> None:
    bearer = world.key("a")
    app = app_of(world)
    png = ("x.png", picture("PNG"))
    cases: list[tuple[dict[str, Any], int, str, str | None]] = [
        ({"files": {"file": png}}, 400, "missing_required_parameter", "purpose"),
        ({"files": {"file": png}, "data": {"purpose": "batch"}}, 400, "invalid_value", "purpose"),
        ({"files": {"file": ("x", b"text")}, "data": {"purpose": "vision"}}, 400, "media_invalid", "file"),
        ({"files": {"file": ("x", b"")}, "data": {"purpose": "vision"}}, 400, "media_invalid", "file"),
        ({"files": {"other": png}, "data": {"purpose": "vision"}}, 400, "unknown_parameter", "other"),
        ({"files": {"purpose": png}}, 400, "invalid_value", "purpose"),
        ({"files": {"file": png}, "data": {"purpose": "vision", "x": "1"}}, 400, "unknown_parameter", "x"),
        ({"files": [("file", png), ("file", png)]}, 400, "malformed_body", None),
        (
            {"files": {"file": ("x", PNG_HEAD + bytes(20 * 2**20))}, "data": {"purpose": "vision"}},
            400,
            "media_invalid",
            "file",
        ),
        ({"json": {"file": "x"}}, 415, "unsupported_media_type", None),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "malformed_body", None),
        (
            {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            400,
            "malformed_body",
            None,
        ),
        ({"content": bytes(64 * 2**20 + 1)}, 413, "body_too_large", None),
    ]
    for seconds in ("3599", "86401", "-1", "1e4", "9" * 30, ""):
        data = {"purpose": "vision", "expires_after[seconds]": seconds}
        param = "expires_after[seconds]" if not seconds.isdigit() or len(seconds) > 9 else "expires_after"
        cases.append(({"files": {"file": png}, "data": data}, 400, "invalid_value", param))
    anchored = {"purpose": "vision", "expires_after[anchor]": "now"}
    cases.append(({"files": {"file": png}, "data": anchored}, 400, "invalid_value", "expires_after[anchor]"))

    async def work() -> None:
        async with calling(app, bearer) as client:
            for request, status, code, param in cases:
                answer = await client.post(FILES, **request)
                assert_refused(answer, status, code)
                assert answer.json()["error"]["param"] == param, answer.text
                world.clock.now += 1
            text_file = b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n'
            kind = {"content-type": "multipart/form-data; boundary=b"}
            answer = await client.post(FILES, content=text_file, headers=kind)
            assert_refused(answer, 400, "invalid_value")
            assert (await client.get(FILES)).json()["data"] == []

    run(work)


def test_limits_of_the_key_hold_for_uploads(world: World) -> None:
    size = len(picture("PNG"))
    hourly = world.key("a", limits=KeyLimits(media_bytes_per_hour=2 * size))
    stored = world.key("b", limits=KeyLimits(max_stored_bytes=2 * size))
    app = app_of(world)

    async def work() -> None:
        for bearer, code in ((hourly, "rate_limit_exceeded"), (stored, "quota_exceeded")):
            async with calling(app, bearer) as client:
                form: Any = {"files": {"file": ("x", picture("PNG"))}, "data": {"purpose": "vision"}}
                for _ in range(2):
                    assert (await client.post(FILES, **form)).status_code == 200
                answer = await client.post(FILES, **form)
                assert_refused(answer, 429, code)
                assert int(answer.headers["retry-after"]) >= 1
                first = (await client.get(FILES)).json()["first_id"]
                assert (await client.delete(f"{FILES}/{first}")).status_code == 200
                assert (await client.post(FILES, **form)).status_code == (200 if bearer is stored else 429)
                world.clock.now += 3600
                assert (await client.post(FILES, **form)).status_code == (429 if bearer is stored else 200)

    run(work)


def test_wrong_pages_are_refused(world: World) -> None:
    bearer = world.key("a")
    app = app_of(world)

    async def work() -> None:
        async with calling(app, bearer) as client:
            for query, param in (("limit=0", "limit"), ("limit=101", "limit"), ("order=up", "order")):
                answer = await client.get(f"{FILES}?{query}")
                assert_refused(answer, 400, "invalid_value")
                assert answer.json()["error"]["param"] == param
            assert_refused(await client.get(f"{FILES}?purpose=vision"), 400, "unsupported_parameter")

    run(work)
