"""Answers over HTTP as every dialect here reads them: statuses, errors, broken connections, and jobs that are polled.

Knows OpenAI's shapes of errors and jobs, and how servers stray from them; knows nothing of streams.
"""

from __future__ import annotations

import asyncio
import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import httpx2

from helios_serve.bench.mp4 import frames_in_file
from helios_serve.bench.observed import Recording
from helios_serve.bench.targets import FailedError

_CANCEL_S = 5.0
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,200}")
_ENDED = frozenset({"completed", "failed", "cancelled", "canceled", "deleted", "expired", "error"})


@contextmanager
def failures_named() -> Iterator[None]:
    """Turns what httpx2 raises, and what reading a strange answer raises, into FailedError."""
    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise FailedError("connect", _text(error)) from error
    except httpx2.TimeoutException as error:
        raise FailedError("timeout", _text(error)) from error
    except httpx2.TransportError as error:
        raise FailedError("cut", _text(error)) from error
    except httpx2.RequestError as error:
        raise FailedError("unreadable_answer", _text(error)) from error
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise FailedError("unreadable_answer", repr(error)) from error


async def check(answer: httpx2.Response) -> None:
    """Raises: FailedError for every status from 300 on."""
    if answer.status_code < 300:
        return
    await answer.aread()
    try:
        body = json.loads(answer.content)
    except ValueError:
        body = None
    code, message = error_of(body.get("error") if isinstance(body, dict) else None)
    raise FailedError(code or f"http_{answer.status_code}", message or answer.text[:200], answer.status_code)


def error_of(error: object) -> tuple[str | None, str]:
    """Code and message. OpenAI's error is an object whose code may be null; some servers give a status, or a text."""
    if not isinstance(error, dict):
        return None, "" if error is None else str(error)
    code = error.get("code")
    return code if isinstance(code, str) else None, str(error.get("message") or "")


async def finish_job(client: httpx2.AsyncClient, request: httpx2.Request, poll_s: float, recording: Recording) -> None:
    """Creates a job, polls it and downloads its video. A job that is left unfinished is cancelled.

    Raises: FailedError, and what httpx2 raises.
    """
    created = await client.send(request)
    await check(created)
    job = _object(created)
    video_id = job.get("id")
    if not isinstance(video_id, str) or _ID.fullmatch(video_id) is None:
        raise FailedError("unreadable_answer", "a created job has no id", created.status_code)
    recording.video_id = video_id
    path = f"/v1/videos/{video_id}"
    try:
        while job.get("status") not in _ENDED:
            await asyncio.sleep(poll_s)
            answer = await client.get(path)
            await check(answer)
            job = _object(answer)
    except BaseException:
        await _cancel(client, path)
        raise
    if job["status"] != "completed":
        code, message = error_of(job.get("error"))
        raise FailedError(code or str(job["status"]), message)
    note_job(job, recording)
    content = await client.get(f"{path}/content")
    await check(content)
    if not content.content:
        raise FailedError("empty_video", "the answer ended without a frame")
    recording.num_bytes = len(content.content)
    recording.num_frames = frames_in_file(content.content)


def note_job(job: Mapping[str, Any], recording: Recording) -> None:
    """What a finished job says of itself: all of it from helios_serve, the time of the model from vLLM-Omni and
    SGLang-Diffusion."""
    details = job.get("helios")
    if isinstance(details, dict):
        recording.num_chunks = details["num_chunks"]
        recording.server_timing_ms = {name: ms for name, ms in details["timing"].items() if ms is not None}
        recording.warnings = tuple(warning["message"] for warning in details["warnings"])
        recording.made_as = f"{job['size']}, steps {','.join(map(str, details['steps']))}, {details['fps']:g} fps"
    elif isinstance(seconds := job.get("inference_time_s"), int | float):
        recording.server_timing_ms = {"inference_ms": 1000 * seconds}


async def _cancel(client: httpx2.AsyncClient, path: str) -> None:
    """So that a run that stops leaves no work behind. vLLM-Omni cancels by DELETE; SGLang-Diffusion goes on."""
    with suppress(httpx2.HTTPError, TimeoutError):
        answer = await client.post(f"{path}/cancel", timeout=_CANCEL_S)
        if answer.status_code >= 300:
            await client.delete(path, timeout=_CANCEL_S)


def _object(answer: httpx2.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise FailedError("unreadable_answer", "the answer is not a JSON object", answer.status_code)
    return body


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
