"""Media from addresses: a worker thread waits while the loop fetches; each failure has its code and names the field."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest

from helios_serve.api.media_fetch import Fetcher, UrlReader, url_reader
from helios_serve.api.media_input import DataUriSource
from helios_serve.api.outgoing import MAX_REDIRECTS, Outgoing, OutgoingError, OutgoingPolicy
from helios_serve.errors import InvalidRequestError

URL = "https://media.example/picture.png"


class FakeFetcher:
    """Answers with what it was given, and notes what it was asked and where it ran."""

    def __init__(self, answer: Callable[[], Awaitable[bytes]]) -> None:
        self.answer = answer
        self.asked: list[tuple[str, int, int]] = []
        self.threads: list[int] = []
        self.was_cancelled = False

    async def get(self, url: str, max_bytes: int, *, max_redirects: int) -> bytes:
        self.asked.append((url, max_bytes, max_redirects))
        self.threads.append(threading.get_ident())
        try:
            return await self.answer()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise


def read(fetcher: Fetcher, url: str = URL, max_bytes: int = 100, patience_s: float = 20.0) -> bytes:
    """What a thread reads while the loop of this one fetches."""

    async def run() -> bytes:
        reader = UrlReader(fetcher=fetcher, loop=asyncio.get_running_loop(), patience_s=patience_s)
        return await asyncio.to_thread(DataUriSource(urls=reader).read, url, "image", max_bytes)

    return asyncio.run(run())


def refused(fetcher: Fetcher, url: str = URL, **options: float) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        read(fetcher, url, **options)  # type: ignore[arg-type]
    assert caught.value.param == "image"
    assert caught.value.status == 400
    assert caught.value.message.startswith("image: ")
    return caught.value


def giving(body: bytes) -> FakeFetcher:
    async def answer() -> bytes:
        await asyncio.sleep(0.01)
        return body

    return FakeFetcher(answer)


def failing(error: Exception) -> FakeFetcher:
    async def answer() -> bytes:
        raise error

    return FakeFetcher(answer)


def test_the_loop_fetches_for_a_thread() -> None:
    fetcher = giving(b"picture")
    assert read(fetcher) == b"picture"
    assert fetcher.asked == [(URL, 100, MAX_REDIRECTS)]
    assert fetcher.threads == [threading.get_ident()]


def test_data_uris_are_not_fetched() -> None:
    fetcher = giving(b"picture")
    assert read(fetcher, "data:image/png;base64," + base64.b64encode(b"inline").decode()) == b"inline"
    assert fetcher.asked == []


def test_failures() -> None:
    error = refused(failing(OutgoingError("media.example: no answer", "failed")))
    assert (error.code, error.message) == ("media_fetch_failed", "image: media.example: no answer")
    error = refused(failing(OutgoingError("a.example: not among the hosts", "forbidden")))
    assert error.code == "media_url_forbidden"
    assert "media_url_hosts" in error.message


def test_more_bytes_than_asked_for() -> None:
    assert read(giving(bytes(100))) == bytes(100)
    assert refused(giving(bytes(101))).code == "media_invalid"


def test_a_fetch_that_does_not_end_is_cancelled() -> None:
    async def never() -> bytes:
        await asyncio.sleep(60)
        return b""

    fetcher = FakeFetcher(never)
    assert refused(fetcher, patience_s=0.1).code == "media_fetch_failed"
    assert fetcher.was_cancelled


def test_defects_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        read(failing(ZeroDivisionError()))


def test_a_real_fetch() -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\npicture")
        writer.close()

    async def run(max_bytes: int) -> bytes:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            fetcher = Outgoing(OutgoingPolicy(allow_private=True))
            reader = UrlReader(fetcher=fetcher, loop=asyncio.get_running_loop())
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/picture.png"
            return await asyncio.to_thread(reader.read, url, "image", max_bytes)

    assert asyncio.run(run(7)) == b"picture"
    with pytest.raises(InvalidRequestError, match="more than 6 bytes") as caught:
        asyncio.run(run(6))
    assert caught.value.code == "media_fetch_failed"


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example/x.png",
        "https://media.example.evil.example/x.png",
        "https://evilmedia.example/x.png",
        "https://media.example@evil.example/x.png",
        "http://media.example/x.png",
        "https://media.example:22/x.png",
        "file:///etc/passwd",
        "gopher://media.example/x",
        "https://127.0.0.1/x.png",
        "https://media.example/x.png",  # allowed, but its name leads into a private network
    ],
)
def test_hosts_outside_of_the_list_are_not_asked(url: str) -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        assert host == "media.example"
        return ["10.0.0.1"]

    fetcher = Outgoing(OutgoingPolicy(allowed_hosts=frozenset({"media.example"})), resolve=resolve)
    error = refused(fetcher, url)
    assert error.code == "media_url_forbidden"
    assert "media_url_hosts" in error.message


def test_without_hosts_nothing_is_fetched() -> None:
    async def run(hosts: frozenset[str]) -> UrlReader | None:
        return url_reader(hosts, asyncio.get_running_loop())

    assert asyncio.run(run(frozenset())) is None
    reader = asyncio.run(run(frozenset({"media.example"})))
    assert reader is not None
    with pytest.raises(InvalidRequestError, match="media_url_hosts is empty") as caught:
        DataUriSource().read(URL, "image", 100)
    assert caught.value.code == "media_url_forbidden"
