"""What tests ask a started `sglang serve`: files over HTTP, and sessions over WebSocket."""

from __future__ import annotations

import time
from typing import Any

import httpx2 as httpx
import msgspec.msgpack
import numpy as np
from websockets.sync.client import connect

from tests.runtimes.in_sglang.conftest import Frames, Server

LOSSLESS = {"output_compression": 100}


def post(server: Server, **fields: Any) -> httpx.Response:
    body = {"prompt": "a fox", "size": "64x64", "seed": 7, "num_frames": 40, **LOSSLESS, **fields}
    return httpx.post(f"{server.url}/v1/videos", json=body, timeout=120)


def finished(server: Server, video_id: str) -> dict[str, Any]:
    until = time.monotonic() + 240
    while time.monotonic() < until:
        job: dict[str, Any] = httpx.get(f"{server.url}/v1/videos/{video_id}", timeout=60).json()
        if job["status"] in {"completed", "failed"}:
            return job
        time.sleep(0.2)
    raise TimeoutError(server.log.read_text()[-4000:])


def content(server: Server, answer: httpx.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    job = finished(server, answer.json()["id"])
    assert job["status"] == "completed", job
    return httpx.get(f"{server.url}/v1/videos/{job['id']}/content", timeout=60).content


def play(server: Server, first: dict[str, Any], changes: dict[int, Any]) -> tuple[list[Frames], list[int | None]]:
    """The chunks of a session, and the event that each shows. changes: what is sent when a chunk is there."""
    chunks: dict[int, list[bytes]] = {}
    events: dict[int, int | None] = {}
    start = {"type": "init", "prompt": "a fox", "size": "64x64", "seed": 7, "realtime_output_format": "raw", **first}
    with connect(server.url.replace("http", "ws") + "/v1/realtime_video/generate", max_size=None) as socket:
        socket.send(msgspec.msgpack.encode(start))
        header: dict[str, Any] = {}
        for message in socket:
            assert isinstance(message, bytes)
            if header.get("type") == "frame_batch_header":
                chunks.setdefault(header["chunk_index"], []).append(message)
                events[header["chunk_index"]] = header.get("event_id")
                header = {}
                continue
            header = msgspec.msgpack.decode(message)
            assert header["type"] != "error", header
            if header["type"] == "frame_batch":
                chunks.setdefault(header["chunk_index"], []).append(header["payload"])
                events[header["chunk_index"]] = header.get("event_id")
            if header["type"] == "chunk_stats" and header["chunk_index"] in changes:
                change = changes[header["chunk_index"]]
                event = {"type": "event", "kind": "prompt", "payload": change, "event_id": header["chunk_index"]}
                socket.send(msgspec.msgpack.encode(event))
    order = sorted(chunks)
    assert order == list(range(len(order)))
    pictures = [np.frombuffer(b"".join(chunks[index]), np.uint8).reshape(-1, 64, 64, 3) for index in order]
    return pictures, [events[index] for index in order]
