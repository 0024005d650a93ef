"""What tests ask a started `vllm serve --omni`: files over HTTP, and sessions over WebSocket."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
from websockets.sync.client import ClientConnection, connect

from tests.runtimes.in_vllm.conftest import Server

LOSSLESS = {"video_codec_options": {"crf": "0", "preset": "ultrafast"}}


def post(server: Server, files: dict[str, Any] | None = None, **fields: Any) -> httpx.Response:
    data = {"prompt": "a fox", "size": "64x64", "seed": "7", "num_frames": "40", **fields}
    extra = {**LOSSLESS, **data.pop("extra_params", {})}
    return httpx.post(
        f"{server.url}/v1/videos/sync",
        data={**data, "extra_params": json.dumps(extra)},
        files=files or {"unused": ("", b"")},
        timeout=400,
    )


@dataclass(slots=True, kw_only=True)
class Session:
    """A session of `/v1/realtime/video`, and what it was sent. media: fMP4. said: all messages that are no media."""

    socket: ClientConnection
    media: bytes = b""
    said: list[dict[str, Any]] = field(default_factory=list)

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """What was said of each chunk."""
        return [said for said in self.said if said["type"] == "video.chunk_metadata" and said["kind"] == "media"]

    def start(self, prompt: str, **fields: Any) -> None:
        extra = {**LOSSLESS, **fields.pop("extra_params", {})}
        start = {"type": "session.start", "prompt": prompt, "size": "64x64", "seed": 7, "extra_params": extra}
        self.socket.send(json.dumps({**start, **fields}))

    def change_prompt(self, event_id: str, prompt: str) -> None:
        change = {"event_id": event_id, "event": {"prompt": prompt}, "transition_chunks": 0}
        self.socket.send(json.dumps({"type": "session.interaction", "interaction": change}))

    def hear(self) -> dict[str, Any] | None:
        """The next message; None for media, which is kept."""
        message = self.socket.recv(timeout=300)
        if isinstance(message, bytes):
            self.media += message
            return None
        said: dict[str, Any] = json.loads(message)
        assert said["type"] != "error", said
        self.said.append(said)
        return said

    def hear_all(self) -> None:
        """Listens until the session is done."""
        while (said := self.hear()) is None or said["type"] != "session.done":
            pass


def open_session(server: Server) -> ClientConnection:
    return connect(server.url.replace("http", "ws") + "/v1/realtime/video", max_size=None)


def play(server: Server, prompts: Sequence[str], **fields: Any) -> list[bytes]:
    """The videos of sessions that are all started before any is heard."""
    with ExitStack() as stack:
        sessions = [Session(socket=stack.enter_context(open_session(server))) for _ in prompts]
        for session, prompt in zip(sessions, prompts, strict=True):
            session.start(prompt, **fields)
        for session in sessions:
            session.hear_all()
        return [session.media for session in sessions]
