"""Requests to strangers' addresses: where they may go, and what limits an answer. The receivers are real servers."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest

from helios_serve.api import outgoing as outgoing_module
from helios_serve.api.outgoing import Outgoing, OutgoingError, OutgoingPolicy, is_public, system_resolve

PRIVATE = OutgoingPolicy(allow_private=True)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One request as it came over the wire."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Receiver:
    """A server on loopback that notes every request and answers with what `answer` makes of it."""

    answer: Callable[[Seen], bytes] = lambda _: OK
    seen: list[Seen] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    port: int = 0
    serving: set[asyncio.Task[None]] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        """Its base URL while the block runs."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"
        finally:
            server.close()
            await asyncio.gather(*self.serving)
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._answer_one(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self.serving.discard(task)

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, target, _ = head.split(" ")
        self.seen.append(Seen(method=method, target=target, headers=headers, body=body))
        writer.write(self.answer(self.seen[-1]))
        await writer.drain()


def resolver(*answers: Sequence[str]) -> Callable[[str, int], object]:
    """Another answer at each call; the last one for ever."""
    left = list(answers)

    async def resolve(host: str, port: int) -> Sequence[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve


def refused(url: str, *, resolve: object = system_resolve, policy: OutgoingPolicy | None = None) -> OutgoingError:
    async def run() -> None:
        await Outgoing(policy, resolve=resolve).get(url, 100, max_redirects=3)  # type: ignore[arg-type]

    with pytest.raises(OutgoingError) as caught:
        asyncio.run(run())
    return caught.value


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/",
        "https://localhost/",
        "https://127.1/",
        "https://0x7f.1/",
        "https://2130706433/",
        "https://0177.0.0.1/",
        "https://0/",
        "https://[::1]/",
        "https://[::]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[::ffff:a9fe:a9fe]/",
        "https://[64:ff9b::7f00:1]/",
        "https://[64:ff9b:1::7f00:1]/",
        "https://[2002:7f00:1::]/",
        "https://[::127.0.0.1]/",
        "https://[fe80::1]/",
        "https://[fd00:ec2::254]/",
        "https://169.254.169.254/latest/meta-data/",
        "https://10.1.2.3/",
        "https://172.16.0.1/",
        "https://192.168.1.1/",
        "https://100.100.100.200/",
        "https://168.63.129.16/",
        "https://224.0.0.1/",
        "https://255.255.255.255/",
        "http://example.com/",
        "http://93.184.215.14/",
        "https://93.184.215.14:22/",
        "https://example.com:6379/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:70/_x",
        "ftp://example.com/",
        "data:text/plain,hello",
        "//example.com/",
        "/etc/passwd",
        "https:///x",
        "https://user:secret@example.com/",
        "https://example.com:99999/",
        "https://[::1/",
        "https://exa mple.com/",
        "https://" + "a" * 3000,
        "",
    ],
)
def test_addresses_that_are_not_asked(url: str) -> None:
    error = refused(url)
    assert error.reason == "forbidden", error.message
    assert (error.status, error.code, error.retryable) == (400, "media_url_forbidden", False)
    assert "secret" not in error.message


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.215.14", True),
        ("2606:4700::1111", True),
        ("::ffff:93.184.215.14", True),
        ("2002:5db8:d70e::1", True),
        ("64:ff9b::5db8:d70e", True),
        ("64:ff9b::a00:1", False),
        ("2001::1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("fec0::1", False),
        ("5f00::1", False),
        ("ff0e::1", False),
        ("198.18.0.1", False),
        ("203.0.113.1", False),
        ("192.88.99.1", False),
        ("240.0.0.1", False),
        ("0.0.0.0", False),
    ],
)
def test_public_addresses(address: str, expected: bool) -> None:
    assert is_public(ip_address(address)) is expected


def test_one_private_address_among_many_is_enough() -> None:
    error = refused("https://example.com/", resolve=resolver(["93.184.215.14", "10.0.0.1"]))
    assert error.reason == "forbidden"
    error = refused("https://example.com/", resolve=resolver(["2606:4700::1111", "::ffff:10.0.0.1"]))
    assert error.reason == "forbidden"


def test_a_name_without_an_address_has_failed() -> None:
    async def nothing(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    for resolve in (nothing, resolver([]), resolver(["not an address"])):
        error = refused("https://example.com/", resolve=resolve)
        assert (error.reason, error.code) == ("failed", "media_fetch_failed")


def test_a_name_is_resolved_once_and_its_first_meaning_holds() -> None:
    """Rebinding: the second answer would lead to a server that counts."""

    async def run() -> None:
        trap = Receiver()
        async with trap.running():
            calls = 0

            async def rebinding(host: str, port: int) -> Sequence[str]:
                nonlocal calls
                calls += 1
                return ["127.0.0.2"] if calls == 1 else ["127.0.0.1"]

            outgoing = Outgoing(PRIVATE, resolve=rebinding)
            with pytest.raises(OutgoingError) as caught:
                await outgoing.get(f"http://rebind.test:{trap.port}/", 100)
            assert caught.value.reason == "failed"
            assert (calls, trap.seen) == (1, [])
            assert await outgoing.get(f"http://rebind.test:{trap.port}/", 100) == b"hello"
            assert calls == 2

    asyncio.run(run())


def test_a_name_that_turns_private_is_refused_when_it_does() -> None:
    async def run() -> None:
        trap = Receiver()
        async with trap.running():
            outgoing = Outgoing(resolve=resolver(["127.0.0.1"]))  # type: ignore[arg-type]
            with pytest.raises(OutgoingError) as caught:
                await outgoing.get("https://rebind.test/", 100)
            assert caught.value.reason == "forbidden"
            assert trap.seen == []

    asyncio.run(run())


def test_the_next_address_is_tried_when_one_takes_no_connection() -> None:
    async def run() -> None:
        receiver = Receiver()
        async with receiver.running():
            outgoing = Outgoing(PRIVATE, resolve=resolver(["127.0.0.2", "127.0.0.1"]))  # type: ignore[arg-type]
            assert await outgoing.get(f"http://two.test:{receiver.port}/", 100) == b"hello"

    asyncio.run(run())


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def run() -> None:
        def answer(_: Seen) -> bytes:
            return b"HTTP/1.1 204 No Content\r\nset-cookie: a=b\r\n\r\n"

        receiver = Receiver(answer)
        async with receiver.running():
            outgoing = Outgoing(PRIVATE, resolve=resolver(["127.0.0.1"]))  # type: ignore[arg-type]
            url = f"http://Hooks.Test:{receiver.port}/path?q=1#part"
            for _ in range(2):
                assert await outgoing.post(url, b"{}", {"content-type": "application/json", "x-own": "1"}) == 204
        for seen in receiver.seen:
            assert (seen.method, seen.target, seen.body) == ("POST", "/path?q=1", b"{}")
            assert seen.headers["host"] == f"hooks.test:{receiver.port}"
            assert seen.headers["accept-encoding"] == "identity"
            assert (seen.headers["content-type"], seen.headers["x-own"]) == ("application/json", "1")
            assert "cookie" not in seen.headers
            assert "authorization" not in seen.headers

    asyncio.run(run())


def test_redirects_are_followed_only_on_request_and_checked_each_time() -> None:
    async def run() -> None:
        def answer(seen: Seen) -> bytes:
            hops = int(seen.target.rsplit("/", 1)[1])
            if hops == 0:
                return OK
            where = seen.target.split("/")[1]
            return f"HTTP/1.1 302 Found\r\nlocation: /{where}/{hops - 1}\r\n\r\n".encode()

        receiver = Receiver(answer)
        async with receiver.running() as base:
            outgoing = Outgoing(PRIVATE)
            assert await outgoing.get(f"{base}/a/3", 100, max_redirects=3) == b"hello"
            assert len(receiver.seen) == 4
            for hops, allowed in ((1, 0), (4, 3)):
                with pytest.raises(OutgoingError) as caught:
                    await outgoing.get(f"{base}/a/{hops}", 100, max_redirects=allowed)
                assert caught.value.reason == "failed"
            assert await outgoing.post(f"{base}/a/1", b"", {}) == 302

    asyncio.run(run())


@pytest.mark.parametrize(
    "place", ["http://inner.test/", "https://10.0.0.1/", "file:///etc/passwd", "gopher://x/", "//:x"]
)
def test_a_redirect_inside_is_refused(place: str) -> None:
    async def run() -> None:
        def answer(_: Seen) -> bytes:
            return f"HTTP/1.1 307 Temporary Redirect\r\nlocation: {place}\r\n\r\n".encode()

        receiver = Receiver(answer)
        async with receiver.running() as base:
            policy = OutgoingPolicy(allow_private=True, allowed_hosts=frozenset({"127.0.0.1"}))
            with pytest.raises(OutgoingError):
                await Outgoing(policy).get(f"{base}/", 100, max_redirects=3)
            assert len(receiver.seen) == 1

    asyncio.run(run())


def test_only_listed_hosts() -> None:
    policy = OutgoingPolicy(allowed_hosts=frozenset({"cdn.example", ".media.example"}))
    outgoing = Outgoing(policy)
    for url in ("https://cdn.example/a", "https://CDN.example./a", "https://a.media.example/b"):
        outgoing.check(url)
    for url in (
        "https://media.example/",
        "https://evilmedia.example/",
        "https://cdn.example.evil/",
        "https://93.184.215.14/",
    ):
        with pytest.raises(OutgoingError, match="not among the hosts"):
            outgoing.check(url)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2000\r\n\r\n" + b"x" * 2000, "more than 1000 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2000, "more than 1000 bytes"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n", "more than"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\nx", "encoding"),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 1\r\n\r\nx", "status 404"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "status 204"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhalf", "no answer"),
        (b"220 smtp.example ESMTP\r\n", "no answer"),
        (b"", "no answer"),
    ],
)
def test_answers_that_are_of_no_use(raw: bytes, problem: str) -> None:
    async def run() -> None:
        receiver = Receiver(lambda _: raw)
        async with receiver.running() as base:
            with pytest.raises(OutgoingError, match=problem) as caught:
                await Outgoing(PRIVATE).get(f"{base}/", 1000)
            assert caught.value.reason == "failed"

    asyncio.run(run())


def test_a_body_of_exactly_the_limit() -> None:
    async def run() -> None:
        async with Receiver().running() as base:
            assert await Outgoing(PRIVATE).get(f"{base}/", 5) == b"hello"

    asyncio.run(run())


def test_the_time_limit_holds_for_a_server_that_never_stops_dripping() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
            while not writer.is_closing():
                writer.write(b"x")
                await asyncio.sleep(0.02)
        finally:
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            started_s = time.monotonic()
            with pytest.raises(OutgoingError, match=r"within 0\.3 s"):
                await Outgoing(PRIVATE).get(url, 100_000, timeout_s=0.3)
            assert time.monotonic() - started_s < 3

    asyncio.run(run())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a key and a certificate for hooks.test."""
    if shutil.which("openssl") is None:
        pytest.skip("the program openssl is missing")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=hooks.test"
    names = ["-addext", "subjectAltName=DNS:hooks.test", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True)
    path = folder / "both.pem"
    path.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return path


def _server_side(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_a_public_server_cannot_lead_inside(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 plays a public address here; everything else is what it is."""

    async def run() -> None:
        places: list[str] = []

        def answer(_: Seen) -> bytes:
            return f"HTTP/1.1 301 Moved\r\nlocation: {places[0]}\r\ncontent-length: 0\r\n\r\n".encode()

        async def resolve(host: str, port: int) -> Sequence[str]:
            return ["127.0.0.1"] if host == "hooks.test" else ["127.0.0.2"]

        receiver = Receiver(answer)
        async with receiver.running(_server_side(certificate)):
            monkeypatch.setattr(outgoing_module, "_HTTPS_PORT", receiver.port)
            monkeypatch.setattr(
                outgoing_module, "is_public", lambda found: str(found) == "127.0.0.1" or is_public(found)
            )
            outgoing = Outgoing(resolve=resolve, tls=ssl.create_default_context(cafile=certificate))
            for place in (
                "https://inner.test:{}/",
                "https://127.0.0.2:{}/",
                "https://[::1]:{}/",
                "http://hooks.test:{}/",
            ):
                places[:] = [place.format(receiver.port)]
                with pytest.raises(OutgoingError) as caught:
                    await outgoing.get(f"https://hooks.test:{receiver.port}/", 100, max_redirects=3)
                assert caught.value.reason == "forbidden", place
            assert [seen.headers["host"] for seen in receiver.seen] == [f"hooks.test:{receiver.port}"] * 4

    asyncio.run(run())


def test_private_receivers_may_be_allowed_and_public_ones_still_need_https() -> None:
    error = refused("http://example.com/", resolve=resolver(["93.184.215.14"]), policy=PRIVATE)
    assert error.reason == "forbidden"
    error = refused("https://example.com:8443/", resolve=resolver(["93.184.215.14"]), policy=PRIVATE)
    assert error.reason == "forbidden"


def test_certificates_are_checked_against_the_name_and_not_the_address(certificate: Path) -> None:
    async def run() -> None:
        names: list[str | None] = []
        server = _server_side(certificate)
        server.sni_callback = lambda _, name, __: names.append(name)
        trusting = ssl.create_default_context(cafile=certificate)
        receiver = Receiver()
        async with receiver.running(server):
            resolve = resolver(["127.0.0.1"])
            outgoing = Outgoing(PRIVATE, resolve=resolve, tls=trusting)  # type: ignore[arg-type]
            assert await outgoing.get(f"https://hooks.test:{receiver.port}/", 100) == b"hello"
            assert receiver.seen[0].headers["host"] == f"hooks.test:{receiver.port}"
            assert names == ["hooks.test"]
            for url, other in (
                (f"https://other.test:{receiver.port}/", outgoing),
                (f"https://127.0.0.1:{receiver.port}/", outgoing),
                (f"https://hooks.test:{receiver.port}/", Outgoing(PRIVATE, resolve=resolve)),  # type: ignore[arg-type]
            ):
                with pytest.raises(OutgoingError, match="certificate") as caught:
                    await other.get(url, 100)
                assert caught.value.reason == "failed"
            assert len(receiver.seen) == 1

    asyncio.run(run())
