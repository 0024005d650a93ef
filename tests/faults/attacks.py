"""Requests that no client should send, made from the server's own OpenAPI document and a seed.

Knows how requests are wrong; knows no answer. Each of them is refused by a server that is as it should be.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.faults.raw_http import JSON, form_request, json_request, request

CREATE, GENERATE, FILES = "/v1/videos", "/v1/videos/generations", "/v1/files"
GOOD: Mapping[str, object] = {"prompt": "a fox", "num_frames": 33, "size": "64x64"}
IDS = (
    "video_01JD0000000000000000000000",
    "..%2f..%2fhelios.db",
    "%00",
    "%ff%fe",
    "video_" + "a" * 5000,
    "*",
    "'--",
    "🦊",
)
PRIVATE_URLS = (
    "https://127.0.0.1/x.png",
    "https://[::1]/x.png",
    "https://169.254.169.254/latest/meta-data/",
    "https://10.0.0.1/",
    "https://0x7f.1/",
    "https://2130706433/",
    "https://[::ffff:127.0.0.1]/",
    "https://localhost/x.png",
    "http://127.0.0.1/x.png",
    "file:///etc/passwd",
    "gopher://127.0.0.1:70/_x",
    "//127.0.0.1/",
    "https://user:secret@127.0.0.1/",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """may_be_cut: whether a closed connection is an answer, as the request never ends or cannot be parsed."""

    name: str
    data: bytes
    ends: bool = False
    may_be_cut: bool = False


Document = Mapping[str, Any]


def attacks(document: Document, seed: int, count: int) -> list[Attack]:
    """`count` of them, all kinds equally often."""
    rng = random.Random(seed)
    made = [KINDS[number % len(KINDS)](rng, document) for number in range(count)]
    rng.shuffle(made)
    return made


def _wrong_value(rng: random.Random, document: Document) -> Attack:
    """No field takes an object with this key, nor a list of lists."""
    fields = document["components"]["schemas"]["GenerationBody"]["properties"]
    name, wrong = rng.choice([*fields]), rng.choice([{"wrong": 1}, [["wrong"]], [{"wrong": [1]}]])
    return Attack(name=f"{name}: {wrong}", data=json_request("POST", _creating(rng), {**GOOD, name: wrong}))


def _wrong_option(rng: random.Random, document: Document) -> Attack:
    fields = document["components"]["schemas"]["HeliosParams"]["properties"]
    name, wrong = rng.choice([*fields]), rng.choice([{"wrong": 1}, [["wrong"]], "\0wrong"])
    body = {**GOOD, "helios": {name: wrong}}
    return Attack(name=f"helios.{name}: {wrong}", data=json_request("POST", _creating(rng), body))


def _out_of_range(rng: random.Random, document: Document) -> Attack:
    name, wrong = rng.choice(
        [
            ("num_frames", 10**30), ("num_frames", -1), ("fps", 1e300), ("seed", 2**64), ("size", "9" * 400 + "x64"),
            ("size", "64x64x64"), ("prompt", ""), ("prompt", "a" * 32_001), ("seconds", "1e999"), ("seconds", "٣x"),
            ("user", "u" * 257), ("metadata", {f"k{i}": "v" for i in range(17)}), ("n", 2), ("model", "../../etc"),
            ("output_format", "webm"), ("codec", "h265"), ("expires_after", -5), ("response_format", "raw"),
            ("prompts", [{"chunk": 5, "prompt": "x"}]), ("queue_timeout", -1), ("width", 64), ("helios", {"crf": 52}),
            ("helios", {"steps": [0, 0, 0]}), ("helios", {"steps": [10**9] * 3}), ("helios", {"guidance_scale": 1e9}),
        ]
    )  # fmt: skip
    return Attack(name=f"{name}: {str(wrong)[:40]}", data=json_request("POST", _creating(rng), {**GOOD, name: wrong}))


def _unknown_key(rng: random.Random, document: Document) -> Attack:
    key = rng.choice(["promt", "__class__", "$where", "a\0b", "k" * 10_000, "", "prompt ", "helios.crf"])
    path = rng.choice([CREATE, GENERATE, "/v1/videos/extensions", "/v1/webhook_endpoints"])
    return Attack(name=f"unknown {key[:20]!r}", data=json_request("POST", path, {**GOOD, key: rng.random()}))


def _not_json(rng: random.Random, document: Document) -> Attack:
    whole = json.dumps(GOOD).encode()
    name, body = rng.choice(
        [
            ("cut", whole[: rng.randrange(1, len(whole))]),
            ("empty", b""),
            ("same key twice", whole[:-1] + b',"prompt":"again"}'),
            ("NaN", b'{"prompt":"a","fps":NaN}'),
            ("more behind it", whole + whole),
            ("UTF-16", json.dumps(GOOD).encode("utf-16")[:-1]),
            ("not UTF-8", b'{"prompt":"\xff\xfe"}'),
            ("surrogate", b'{"prompt":"\\ud800"}'),
            ("long number", b'{"prompt":"a","seed":' + b"9" * 100_000 + b"}"),
            ("deep list", b"[" * 10**5 + b"]" * 10**5),
            ("deep object", b'{"helios":' * 10**5 + b"1" + b"}" * 10**5),
            ("deep field", b'{"prompt":"a","metadata":' + b"[" * 900 + b"]" * 900 + b"}"),
            ("bytes", rng.randbytes(rng.randrange(1, 4000))),
            ("scalar", b'"prompt"'),
        ]
    )
    return Attack(name=f"json {name}", data=request("POST", _creating(rng), body, {"Content-Type": JSON}))


def _content_type(rng: random.Random, document: Document) -> Attack:
    kind = rng.choice(
        ["text/plain", "", "application/xml", "application/x-protobuf", "multipart/form-data", "a" * 9000]
    )
    return Attack(
        name=f"type {kind[:20]}", data=request("POST", _creating(rng), b'{"prompt":"a"}', {"Content-Type": kind})
    )


def _method(rng: random.Random, document: Document) -> Attack:
    path = rng.choice([*document["paths"]])
    taken = {name.upper() for name in document["paths"][path]} | {"HEAD", "OPTIONS"}
    method = rng.choice([m for m in ("GET", "PUT", "PATCH", "DELETE", "POST", "TRACE", "PROPFIND") if m not in taken])
    return Attack(name=f"{method} {path}", data=request(method, _filled(rng, path)))


def _wrong_id(rng: random.Random, document: Document) -> Attack:
    """Guessed ids, and ways out of where ids are looked up."""
    path = rng.choice([path for path in document["paths"] if "_id}" in path])
    method = rng.choice([*document["paths"][path]]).upper()
    body = json.dumps({"prompt": "again"}).encode() if method == "POST" else b""
    return Attack(name=f"{method} {path}", data=request(method, _filled(rng, path), body, {"Content-Type": JSON}))


def _wrong_query(rng: random.Random, document: Document) -> Attack:
    query = rng.choice(
        ["limit=-1", "limit=1" + "0" * 30, "order=up", "status=%00", "limit=x", "after=nobody", "limit="]
    )
    return Attack(name=query, data=request("GET", f"{CREATE}?{query}"))


def _form(rng: random.Random, document: Document) -> Attack:
    many = {f"metadata[k{i}]": "v" for i in range(300)}
    name, data = rng.choice(
        [
            ("300 fields", form_request(_creating(rng), {"prompt": "a", **many})),
            ("depth 9", form_request(_creating(rng), {"prompt": "a", "helios" + "[a]" * 9: "1"})),
            ("no end", form_request(_creating(rng), {"prompt": "a", "n": "2"}, end="")),
            ("file for text", form_request(_creating(rng), {"prompt": b"\x89PNG"})),
            ("odd brackets", form_request(_creating(rng), {"prompt": "a", "helios[": "1", "]x[": "2"})),
            ("bytes as image", form_request(_creating(rng), {"prompt": "a", "input_reference": rng.randbytes(999)})),
            ("no file", form_request(FILES, {"purpose": "vision"})),
            ("file of bytes", form_request(FILES, {"purpose": "vision", "file": rng.randbytes(5000)})),
            ("bad number", form_request(_creating(rng), {"prompt": "a", "num_frames": "33.7x"})),
        ]
    )
    return Attack(name=f"form {name}", data=data)


def _media(rng: random.Random, document: Document) -> Attack:
    name, field, data = rng.choice(bombs())
    return Attack(name=name, data=form_request(_creating(rng), {**_text(GOOD), field: data}))


def _address(rng: random.Random, document: Document) -> Attack:
    """Names of hosts in `webhook_url` are resolved when it is called, not here."""
    field = rng.choice(["image_url", "video_url", "webhook_url"])
    named = ("https://localhost/x.png", "https://2130706433/", "https://0x7f.1/") if field == "webhook_url" else ()
    url = rng.choice([url for url in PRIVATE_URLS if url not in named])
    return Attack(name=f"{field} {url}", data=json_request("POST", _creating(rng), {**GOOD, field: url}))


def _too_large(rng: random.Random, document: Document) -> Attack:
    kind = {"Content-Type": JSON}
    if rng.random() < 0.5:
        announced = {**kind, "Content-Length": str(rng.randrange(65 << 20, 1 << 62))}
        return Attack(name="announces too much", data=request("POST", _creating(rng), b"", announced), may_be_cut=True)
    chunked = {**kind, "Transfer-Encoding": "chunked"}
    data = request("POST", "/v1/webhook_endpoints", b"", chunked).replace(b"Content-Length: 0\r\n", b"")
    piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
    return Attack(name="sends too much in chunks", data=data + piece * 20 + b"0\r\n\r\n", may_be_cut=True)


def _framing(rng: random.Random, document: Document) -> Attack:
    """Where two readers may see two requests, or none."""
    head = b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    hidden = b"0\r\n\r\nDELETE /v1/videos/x HTTP/1.1\r\nHost: x\r\n\r\n"
    name, data = rng.choice(
        [
            ("length and chunks", head + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n" + hidden),
            ("two lengths", head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{1234}"),
            ("unknown coding", head + b"Transfer-Encoding: xchunked\r\n\r\n" + hidden),
            ("space before colon", head + b"Transfer-Encoding : chunked\r\n\r\n" + hidden),
            ("negative length", head + b"Content-Length: -5\r\n\r\n"),
            ("signed length", head + b"Content-Length: +5\r\n\r\n12345"),
            ("endless length", head + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n"),
            ("bad chunk", head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n\r\n"),
            ("NUL in a header", head + b"X: a\0b\r\n\r\n"),
            ("line feeds alone", b"GET /version HTTP/1.1\nHost: 127.0.0.1\n\n"),
            ("HTTP/9.9", b"GET /version HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n"),
            ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            ("TLS", b"\x16\x03\x01\x02\x00\x01\x00" * 10),
            ("unknown method", b"FROB /version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
            ("long path", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
            ("body cut", head + b"Content-Length: 500\r\n\r\n{"),
            ("head cut", head[: rng.randrange(1, len(head))]),
            ("bad upgrade", b"GET /v1/realtime/video HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n"
             b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\n\r\n"),
        ]
    )  # fmt: skip
    return Attack(name=name, data=data, ends=True, may_be_cut=True)


def _header(rng: random.Random, document: Document) -> Attack:
    name, value = rng.choice(
        [
            ("Idempotency-Key", "k" * 256),
            ("Idempotency-Key", ""),
            ("Accept", "text/html"),
            ("Origin", "https://evil.example"),
            ("Host", "evil.example"),
        ]
    )
    return Attack(name=f"{name} {value[:20]}", data=json_request("POST", GENERATE, {**GOOD}, {name: value}))


KINDS: Sequence[Callable[[random.Random, Document], Attack]] = (
    _wrong_value, _wrong_option, _out_of_range, _unknown_key, _not_json, _content_type, _method, _wrong_id,
    _wrong_query, _form, _media, _address, _too_large, _framing, _header,
)  # fmt: skip


def _creating(rng: random.Random) -> str:
    return rng.choice([CREATE, GENERATE])


def _filled(rng: random.Random, path: str) -> str:
    for part in ("{video_id}", "{file_id}", "{endpoint_id}", "{delivery_id}", "{model_id}"):
        path = path.replace(part, rng.choice(IDS).encode().decode("latin-1"))
    return path.replace("{index}", str(rng.choice([0, -1, 10**20])))


def _text(body: Mapping[str, object]) -> dict[str, str | bytes]:
    return {name: str(value) for name, value in body.items()}


def bombs() -> list[tuple[str, str, bytes]]:
    """Name, field and content of files that claim or unpack to far more than they are."""
    ftyp = _box(b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41")
    text = (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))
    gif = b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b",;"
    return [
        ("png of 50,000 x 50,000", "input_reference", _png(50_000, 50_000, zlib.compress(bytes(1000)))),
        ("png that unpacks to nothing much", "input_reference", _png(5000, 5000, zlib.compress(bytes(1 << 20)))),
        ("png with a 64 MB text", "input_reference", _png(64, 64, b"", text)),
        ("webp of 16,384 x 16,384", "input_reference", _webp(16_384, 16_384)),
        ("gif of 65,535 x 65,535", "input_reference", gif),
        ("zip", "input_reference", b"PK\3\4" + zlib.compress(bytes(1 << 20))),
        ("mp4 of a billion frames", "video", ftyp + _box(b"moov", _track(10**9))),
        ("moov beyond the file", "video", ftyp + struct.pack(">I", 1 << 31) + b"moov" + bytes(100)),
        ("moov of no size", "video", ftyp + struct.pack(">I", 7) + b"moov" + bytes(100)),
        ("many boxes", "video", ftyp + _box(b"free") * 100_000),
        ("compressed moov", "video", ftyp + _box(b"moov", _box(b"cmov", _box(b"cmvd", zlib.compress(bytes(1 << 24)))))),
        ("playlist in an mp4", "video", ftyp + b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
        ("concat script in an mp4", "video", ftyp + b"ffconcat version 1.0\nfile /etc/passwd\n"),
    ]  # fmt: skip


def _box(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def _track(num_samples: int) -> bytes:
    """A track whose table says that all samples have one size."""
    sizes = _box(b"stsz", struct.pack(">III", 0, 1, num_samples))
    times = _box(b"stts", struct.pack(">IIII", 0, 1, num_samples, 1))
    return _box(b"trak", _box(b"mdia", _box(b"minf", _box(b"stbl", sizes + times))))


def _png(width: int, height: int, pixels: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), *extra, (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def _webp(width: int, height: int) -> bytes:
    body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"WEBPVP8X" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks
