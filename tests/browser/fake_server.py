"""A contract fake of the server: the HTTP and WebSocket API that the playground uses, with real fMP4 segments.

Knows the messages of the API and a pace; knows nothing of models. What a test wants to go wrong is in `Behaviour`.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from helios_serve.api.playground import playground_files, playground_headers
from helios_serve.types import FRAMES_PER_CHUNK
from helios_serve.workers.segment import progressive_mp4

from .fake_jobs import (
    ApiError,
    Behaviour,
    Change,
    Job,
    Json,
    encode,
    may_generate,
    picture,
    progress_of,
    prompts_at,
    segments_of,
    spec_of,
    tell,
)

NUM_STAGES = 3
TOKEN = "signed"


class FakeHelios:
    """The fake: `behaviour` may be changed at any time; `sent` holds every message of every client."""

    def __init__(self, data_dir: Path) -> None:
        self.behaviour = Behaviour()
        self.jobs: dict[str, Job] = {}
        self.sent: list[Json] = []
        self.paths: list[str] = []
        self.url = ""
        self._data_dir = data_dir
        self._tasks: set[asyncio.Task[None]] = set()

    def reset(self) -> None:
        self.behaviour = Behaviour()
        for job in self.jobs.values():
            job.is_stopped = True
        self.jobs = {}
        self.sent = []
        self.paths = []

    def messages(self, kind: str) -> list[Json]:
        return [message for message in self.sent if message["type"] == kind]

    def app(self) -> Starlette:
        video = "/v1/videos/{id}"
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/videos", self._create, methods=["POST"]),
            Route("/v1/videos", self._list),
            Route("/v1/videos/extensions", self._extend, methods=["POST"]),
            Route(video, self._delete, methods=["DELETE"]),
            Route(video, self._get),
            Route(f"{video}/cancel", self._cancel, methods=["POST"]),
            Route(f"{video}/content", self._content),
            Route(f"{video}/stream", self._stream),
            Route(f"{video}/events", self._events),
            Route("/v1/realtime/client_secrets", self._secret, methods=["POST"]),
            WebSocketRoute("/v1/realtime/video", self._session),
            *(Route(path, self._playground) for path in playground_files()),
        ]
        return Starlette(routes=routes, exception_handlers={ApiError: _error_answer, HTTPException: _not_found})

    # --- routes ---

    async def _playground(self, request: Request) -> Response:
        file = playground_files()[request.url.path]
        headers = playground_headers() | {"etag": file.etag}
        return Response(file.body, media_type=file.media_type, headers=headers)

    async def _models(self, request: Request) -> Response:
        self._admit(request)
        details = {
            "variant": self.behaviour.variant,
            "tasks": ["t2v", "i2v", "v2v"],
            "frames_per_chunk": FRAMES_PER_CHUNK,
            "size_multiple": 64,
            "num_stages": NUM_STAGES,
            "recommended_sizes": ["640x384", "320x192"],
            "max_pixels": 921_600,
            "max_frames": 7260,
            "default_fps": 24,
            "default_steps": [2, 2, 2],
            "example_prompt": "a heron over a lake",
            "codecs": ["h264", "vp9", "av1"],
            "measured_fps": None,
        }
        model = {"id": "helios-distilled", "object": "model", "created": 1, "owned_by": "helios", "helios": details}
        return JSONResponse({"object": "list", "data": [model]})

    async def _create(self, request: Request) -> Response:
        self._admit(request)
        job = self._new_job(await request.json())
        self._run(job)
        return JSONResponse(self._video(job))

    async def _extend(self, request: Request) -> Response:
        self._admit(request)
        body = await request.json()
        source = self._job(body["video"]["id"])
        size = f"{source.size[0]}x{source.size[1]}"
        added = self._new_job({**{k: v for k, v in body.items() if k != "video"}, "size": size, "fps": source.fps})
        assert source.num_frames is not None
        assert added.num_frames is not None
        added.num_frames += source.num_frames
        added.init, added.media, added.frames = source.init, list(source.media), list(source.frames)
        added.extended_from = source.id
        self._run(added)
        return JSONResponse(self._video(added))

    async def _list(self, request: Request) -> Response:
        self._admit(request)
        limit, after = int(request.query_params.get("limit", "20")), request.query_params.get("after")
        jobs = sorted(self.jobs.values(), key=lambda job: job.id, reverse=True)
        jobs = [job for job in jobs if after is None or job.id < after]
        data = [self._video(job) for job in jobs[:limit]]
        ids = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return JSONResponse({"object": "list", "data": data, **ids, "has_more": len(jobs) > limit})

    async def _get(self, request: Request) -> Response:
        self._admit(request)
        return JSONResponse(self._video(self._of(request)), headers={"openai-poll-after-ms": "250"})

    async def _delete(self, request: Request) -> Response:
        self._admit(request)
        job = self._of(request)
        job.is_stopped = True
        del self.jobs[job.id]
        return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})

    async def _cancel(self, request: Request) -> Response:
        self._admit(request)
        job = self._of(request)
        job.is_stopped = True
        async with job.changed:
            job.changed.notify_all()
        return JSONResponse(self._video(job))

    async def _content(self, request: Request) -> Response:
        self._admit(request)
        job, variant = self._of(request), request.query_params.get("variant", "video")
        if variant == "thumbnail":
            return Response(picture(job, 0, "WEBP"), media_type="image/webp")
        if job.status != "completed":
            raise ApiError(409, "video_not_ready", "the video is not finished")
        if variant == "last_frame":
            return Response(picture(job, sum(job.frames) - 1, "PNG"), media_type="image/png")
        path = self._data_dir / f"{job.id}-{len(job.media)}.mp4"
        if not path.exists():
            path.write_bytes(await asyncio.to_thread(progressive_mp4, job.init, job.media))
        return FileResponse(path, media_type="video/mp4", filename=f"{job.id}.mp4")

    async def _stream(self, request: Request) -> Response:
        self._admit(request)
        job = self._of(request)

        async def body() -> AsyncIterator[bytes]:
            async for segment in segments_of(job, 0):
                yield (job.init if segment == 0 else b"") + job.media[segment]

        headers = {"cache-control": "no-store", "accept-ranges": "none"}
        return StreamingResponse(body(), media_type="video/mp4", headers=headers)

    async def _events(self, request: Request) -> Response:
        self._admit(request)
        job = self._of(request)

        async def body() -> AsyncIterator[str]:
            async for segment in segments_of(job, 0):
                data = {"phase": "chunk", "chunk": segment, "num_chunks": job.num_chunks, "stage": 2, "step": 2}
                yield f"event: video_generation.progress\ndata: {json.dumps({**data, 'num_steps': 2})}\n\n"
            yield f"event: video_generation.completed\ndata: {json.dumps({'video': self._video(job)})}\n\n"

        return StreamingResponse(body(), media_type="text/event-stream")

    async def _secret(self, request: Request) -> Response:
        self._admit(request)
        return JSONResponse({"value": TOKEN, "expires_at": int(time.time()) + 600})

    # --- the session ---

    async def _session(self, socket: WebSocket) -> None:
        self.paths.append(str(socket.url).replace("ws://", "http://").removeprefix(self.url))
        if not self.behaviour.has_websocket:
            await socket.close()
            return
        await socket.accept()
        if self.behaviour.api_key is not None and socket.query_params.get("token") != TOKEN:
            await socket.close(1008, "This session needs a token.")
            return
        try:
            job, after = await self._open(socket)
        except ApiError as error:
            await socket.send_json(error.body | {"type": "error"})
            await socket.close(4400)
            return
        writer = asyncio.create_task(self._write(socket, job, after))
        try:
            while True:
                await self._client_message(job, socket, await socket.receive_json())
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            writer.cancel()
            if job.socket is socket:
                job.socket, job.is_connected = None, False

    async def _open(self, socket: WebSocket) -> tuple[Job, int]:
        start = await socket.receive_json()
        self.sent.append(start)
        assert start["type"] == "session.start"
        assert start["protocol"] == "helios.v1"
        resume = start.get("resume")
        if resume is None:
            job = self._new_job(start)
            job.max_ahead = start["max_ahead_segments"]
            self._run(job)
        else:
            job = self._job(resume["id"])
        job.socket, job.is_connected = socket, True
        config = {
            "fps": job.fps,
            "num_frames": job.num_frames,
            "seed": job.seed,
            "size": f"{job.size[0]}x{job.size[1]}",
        }
        message: Json = {"type": "video.start", "request_id": job.id, "format": "m4s", "config": config}
        message["mime_type"] = 'video/mp4; codecs="avc1.42c01e"' if self.behaviour.sends_mime_type else None
        message |= {"num_chunks": job.num_chunks, "recommended_playback_rate": job.playback_rate}
        await socket.send_json(message)
        return job, -1 if resume is None else resume["after_segment"]

    async def _write(self, socket: WebSocket, job: Job, after: int) -> None:
        async for segment in segments_of(job, after + 1):
            media = (job.init if segment == 0 else b"") + job.media[segment]
            start = job.start_frame(segment)
            started = [change.event_id for change in job.changes if change.chunk == segment]
            metadata = {
                "type": "video.chunk_metadata",
                "kind": "media",
                "transport_chunk_index": segment,
                "generation_chunk_index": segment,
                "num_frames": job.frames[segment],
                "byte_length": len(media),
                "started_event_ids": started,
                "active_event_ids": started,
                "completed_event_ids": [],
                "start_frame": start,
                "pts_seconds": start / job.fps,
                "duration": job.frames[segment] / job.fps,
                "prompt_weight": prompts_at(job, segment)[2],
            }
            async with job.sending:
                await socket.send_json(metadata)
                await socket.send_bytes(media)
            if self.behaviour.cut_after_segment == segment:
                self.behaviour.cut_after_segment = None
                await socket.close(1012)
                return
        done = {"type": "session.done", "chunks": len(job.media), "stopped": job.is_stopped, "video": self._video(job)}
        await socket.send_json(done)
        await socket.close(1000)

    async def _client_message(self, job: Job, socket: WebSocket, message: Json) -> None:
        self.sent.append(message)
        kind = message["type"]
        if kind == "session.interaction":
            await self._interaction(job, socket, message["interaction"])
        elif kind == "session.ping":
            await socket.send_json({"type": "session.pong"})
        async with job.changed:
            if kind == "session.ack":
                job.acked = max(job.acked, message["segment"])
            elif kind == "session.stop":
                job.is_stopped = True
            elif kind == "session.control":
                job.is_paused = message["action"] == "pause"
            job.changed.notify_all()
        if kind == "session.control":
            await socket.send_json({"type": "session.state", "state": "paused" if job.is_paused else "generating"})

    async def _interaction(self, job: Job, socket: WebSocket, interaction: Json) -> None:
        event_id, prompt = interaction["event_id"], interaction["event"]["prompt"]
        if "forbidden" in prompt:
            error = {"code": "invalid_value", "message": "this prompt is refused", "event_id": event_id}
            await socket.send_json({"type": "error", **error})
            return
        if all(change.event_id != event_id for change in job.changes):
            transition = interaction.get("transition_chunks", 2)
            job.changes.append(Change(event_id=event_id, prompt=prompt, transition_chunks=transition))
        receipt = {"event_id": event_id, "earliest_chunk": job.denoising + 1}
        await socket.send_json({"type": "session.interaction.queued", "request_id": job.id, **receipt})

    # --- generation ---

    def _run(self, job: Job) -> None:
        self.jobs[job.id] = job
        task = asyncio.create_task(self._generate(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _generate(self, job: Job) -> None:
        await asyncio.sleep(0.1)
        while not job.is_stopped and (job.num_frames is None or sum(job.frames) < job.num_frames):
            segment, start = len(job.media), sum(job.frames)
            async with job.changed:
                await job.changed.wait_for(lambda: job.is_stopped or may_generate(job))
            if job.is_stopped:
                break
            job.status, job.denoising = "in_progress", segment
            await self._apply(job, segment, start)
            left = FRAMES_PER_CHUNK if job.num_frames is None else job.num_frames - start
            count = min(FRAMES_PER_CHUNK, left)
            began = time.monotonic()
            encoding = asyncio.to_thread(encode, prompts_at(job, segment), spec_of(job), segment, start, count)
            (init, media), _ = await asyncio.gather(encoding, self._steps(job, segment, began))
            async with job.changed:
                job.init = job.init or init
                job.media.append(media)
                job.frames.append(count)
                job.max_lead = max(job.max_lead, len(job.media) - 1 - job.acked)
                if "fail" in job.prompt and segment == 1:
                    job.status, job.error = "failed", {"code": "generation_failed", "message": "it went wrong"}
                    job.changed.notify_all()
                    return
                job.changed.notify_all()
        async with job.changed:
            # A session that was stopped keeps what it has; a cancelled job does not.
            was_cancelled = job.is_stopped and job.max_ahead is None
            job.status = "failed" if was_cancelled else "completed"
            job.error = {"code": "cancelled", "message": "cancelled"} if was_cancelled else None
            job.num_frames = sum(job.frames) if job.is_stopped else job.num_frames
            job.changed.notify_all()

    async def _apply(self, job: Job, segment: int, start: int) -> None:
        waiting = [change for change in job.changes if change.chunk is None]
        if not waiting:
            return
        job.changes = [change for change in job.changes if change.chunk is not None] + [waiting[-1]]
        waiting[-1].chunk = segment
        receipt = {"event_id": waiting[-1].event_id, "chunk": segment, "start_frame": start}
        await tell(job, {"type": "session.interaction.applied", "request_id": job.id, **receipt})

    async def _steps(self, job: Job, segment: int, began: float) -> None:
        total = sum(job.steps)
        done = 0
        for stage, num_steps in enumerate(job.steps):
            for step in range(1, num_steps + 1):
                done += 1
                due = began + self.behaviour.segment_seconds * done / total
                await asyncio.sleep(max(0, due - time.monotonic()))
                place = {"chunk": segment, "num_chunks": job.num_chunks, "stage": stage}
                message = {
                    "phase": "chunk",
                    **place,
                    "step": step,
                    "num_steps": num_steps,
                    "progress": progress_of(job),
                }
                await tell(job, {"type": "video.progress", **message})

    # --- objects ---

    def _new_job(self, body: Json) -> Job:
        prompt, fps = body["prompt"], body.get("fps", 24)
        size = body.get("size", "640x384")
        if size == "auto":
            size = "640x384"
        width, height = (int(side) for side in size.split("x"))
        if width % 64 or height % 64:
            told = f"size {size}: both sides must be multiples of 64 for helios-distilled; nearest: 640x384, 704x384"
            raise ApiError(400, "invalid_value", told, "size")
        steps = body.get("helios", {}).get("steps", [2, 2, 2])
        if any(not 1 <= count <= 100 for count in steps):
            told = f"helios.steps {steps}: helios-distilled needs 3 numbers, one per stage, each 1 to 100"
            raise ApiError(400, "invalid_value", told, "helios.steps")
        if "busy" in prompt:
            raise ApiError(503, "capacity_exceeded", "the queue is full, try again in 20 s")
        num_frames = body.get("num_frames")
        if num_frames is None and "seconds" in body:
            num_frames = round(float(body["seconds"]) * fps)
        if num_frames is None and body.get("type") != "session.start":
            num_frames = 132
        return Job(
            id=f"video_{len(self.jobs):02d}{time.monotonic_ns():020d}",
            prompt=prompt,
            size=(width, height),
            fps=fps,
            num_frames=num_frames,
            seed=body.get("seed", 42),
            steps=steps,
            playback_rate=self.behaviour.playback_rate,
        )

    def _video(self, job: Job) -> Json:
        chunks, frames = job.num_chunks or len(job.media), job.num_frames or sum(job.frames)
        query = "" if self.behaviour.api_key is None else f"?token={TOKEN}"
        urls = {name: f"{self.url}/v1/videos/{job.id}/{name}{query}" for name in ("content", "stream", "events")}
        state = "cancelled" if job.error and job.error["code"] == "cancelled" else job.status
        details = {"state": state, "num_frames": frames, "num_chunks": chunks, "chunks_done": len(job.media)}
        details |= {"fps": job.fps, "seed": job.seed, "steps": job.steps, "queue_position": None, "eta_seconds": None}
        details |= {"urls": urls, "usage": {"num_frames": sum(job.frames)}, "warnings": job.warnings}
        details |= {"extended_from_video_id": job.extended_from}
        return {
            "id": job.id,
            "object": "video",
            "model": "helios-distilled",
            "status": job.status,
            "progress": progress_of(job),
            "created_at": job.created_at,
            "completed_at": job.created_at + 5 if job.is_over else None,
            "expires_at": job.created_at + 86_400,
            "prompt": job.prompt,
            "size": f"{job.size[0]}x{job.size[1]}",
            "seconds": f"{frames / job.fps:.3f}".rstrip("0").rstrip("."),
            "error": job.error,
            "remixed_from_video_id": None,
            "helios": details,
        }

    def _of(self, request: Request) -> Job:
        return self._job(request.path_params["id"])

    def _job(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise ApiError(404, "video_not_found", f"no video {job_id}")
        return self.jobs[job_id]

    def _admit(self, connection: HTTPConnection) -> None:
        query = f"?{connection.url.query}" if connection.url.query else ""
        self.paths.append(connection.url.path + query)
        key = self.behaviour.api_key
        allowed = (
            connection.headers.get("authorization") == f"Bearer {key}",
            connection.query_params.get("token") == TOKEN,
        )
        if key is not None and not any(allowed):
            raise ApiError(401, "invalid_api_key", "This API key is not known here.")


@contextmanager
def serving(fake: FakeHelios) -> Iterator[FakeHelios]:
    """The fake on a free loopback port; `fake.url` is its address."""
    config = uvicorn.Config(fake.app(), host="127.0.0.1", port=0, log_level="critical", ws="websockets-sansio")
    config.ws_per_message_deflate = False
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


async def _error_answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse({"error": error.body}, status_code=error.status)


async def _not_found(request: Request, error: Exception) -> Response:
    told = {"message": f"no route {request.url.path}", "type": "invalid_request_error", "param": None}
    return JSONResponse({"error": told | {"code": "route_not_found"}}, status_code=404)
