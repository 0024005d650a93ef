"""A request as the store keeps it, and back: JSON of what was asked for, and a record of the input pictures.

What is written here is read by later versions: fields are added, never renamed. Knows no database and no engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from typing import Any

from helios_serve.api.convert import ParsedRequest
from helios_serve.api.sampling import ParameterWarning
from helios_serve.store.jobs import canonical_hash
from helios_serve.store.records import Control, Job
from helios_serve.types import (
    FRAMES_PER_CHUNK,
    NUM_TRAIL_CHUNKS,
    Frames,
    PromptChange,
    Restart,
    SamplingParams,
    Start,
    Task,
    VideoRequest,
)

NUM_TRAIL_FRAMES = NUM_TRAIL_CHUNKS * FRAMES_PER_CHUNK
"""Pixel frames at the end of an input video that the encoder reads; of the others only the first one and the count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """Everything about a job that its row's columns do not say."""

    task: Task
    prompts: tuple[PromptChange, ...]
    params: SamplingParams
    negative_prompt: str
    model: str
    is_strict: bool
    priority: int
    is_open_ended: bool
    with_segments: bool
    warnings: tuple[ParameterWarning, ...]
    user: str | None
    metadata: dict[str, str] | None
    queue_timeout_s: float | None
    max_running_jobs: int | None
    max_ahead: int | None = None
    remixed_from: str | None = None
    extended_from: str | None = None
    num_inherited: int = 0
    """Chunks that an extension took over from its source, or that are of its caller's own video."""
    num_given: int = 0
    """Those that are of its caller's own video: shown, and never made."""
    num_left_out: int = 0
    """Frames of that video before the first of them."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def request(self, job: Job) -> VideoRequest:
        """The request without its pictures."""
        return VideoRequest(
            request_id=job.id,
            prompts=self.prompts,
            params=self.params,
            negative_prompt=self.negative_prompt,
            service_class=job.service_class,
            tenant=job.tenant,
            priority=self.priority,
            is_strict=self.is_strict,
            is_interactive=job.is_interactive,
            is_open_ended=self.is_open_ended,
        )


def spec_from(parsed: ParsedRequest, model: str, max_running_jobs: int | None) -> JobSpec:
    """What is kept of a request that is about to become a job."""
    request = parsed.request
    return JobSpec(
        task=request.task,
        prompts=request.prompts,
        params=request.params,
        negative_prompt=request.negative_prompt,
        model=model,
        is_strict=request.is_strict,
        priority=request.priority,
        is_open_ended=request.is_open_ended,
        with_segments=parsed.with_segments,
        warnings=parsed.warnings,
        user=parsed.user,
        metadata=None if parsed.metadata is None else dict(parsed.metadata),
        queue_timeout_s=parsed.queue_timeout_s,
        max_running_jobs=max_running_jobs,
    )


def read_spec(job: Job) -> JobSpec:
    """The spec of a job's row."""
    data = dict(job.spec)
    data["prompts"] = tuple(PromptChange(**change) for change in data["prompts"])
    params = dict(data["params"])
    params["steps"] = tuple(params["steps"])
    params["approximations"] = tuple(params.get("approximations", ()))
    params["restarts"] = tuple(Restart(**restart) for restart in params.get("restarts", ()))
    data["params"] = SamplingParams(**params)
    data["warnings"] = tuple(ParameterWarning(**warning) for warning in data["warnings"])
    known = {item.name for item in fields(JobSpec)}
    return JobSpec(**{name: value for name, value in data.items() if name in known})


def spec_hash(spec: JobSpec, parsed: ParsedRequest) -> str:
    """Equal for calls that ask for the same video: pictures by their hash, a random seed left out."""
    body = spec.to_json()
    for name in ("warnings", "max_running_jobs"):
        del body[name]
    for name in ("num_given", "num_left_out"):  # other videos keep the hash that they had without these fields
        if body[name] == 0:
            del body[name]
    if not body["params"]["approximations"]:
        del body["params"]["approximations"]
    if not parsed.has_seed:
        del body["params"]["seed"]
        for restart in body["params"]["restarts"]:  # where a video of the caller's own ends
            del restart["seed"]
    pictures = parsed.request.image or parsed.request.video
    body["pictures"] = None if pictures is None else hashlib.sha256(pictures.data).hexdigest()
    body["service_class"] = parsed.request.service_class
    return canonical_hash(body)


def change_of(control: Control, next_chunk: int) -> PromptChange | Restart | None:
    """What a message to a session changes, at `next_chunk` if it is not applied yet."""
    chunk = next_chunk if control.applied_chunk is None else control.applied_chunk
    if control.kind == "prompt":
        prompt, transition_chunks = control.payload["prompt"], control.payload["transition_chunks"]
        return PromptChange(chunk=chunk, prompt=prompt, transition_chunks=transition_chunks)
    if control.kind == "reset":
        return Restart(chunk=chunk, seed=control.payload["seed"])
    return None


def changed(request: VideoRequest, change: PromptChange | Restart) -> VideoRequest:
    """The request with a change; one of the same kind that begins there or later is replaced."""
    if isinstance(change, PromptChange):
        prompts = (earlier for earlier in request.prompts if earlier.chunk < change.chunk)
        return replace(request, prompts=(*prompts, change))
    restarts = (earlier for earlier in request.params.restarts if earlier.chunk < change.chunk)
    return replace(request, params=replace(request.params, restarts=(*restarts, change)))


def with_controls(request: VideoRequest, controls: Sequence[Control], next_chunk: int) -> VideoRequest:
    """A session's request with the messages that it was sent; those not applied yet begin at `next_chunk`."""
    changes = (change_of(control, next_chunk) for control in controls)
    return reduce(changed, (change for change in changes if change is not None), request)


def pictures_record(request: VideoRequest) -> bytes | None:
    """The input pictures of a request as bytes to be kept; None when it has none. Of a long video only the frames that
    the encoder reads are kept."""
    frames = request.image or request.video
    if frames is None:
        return None
    size = frames.height * frames.width * 3
    tail = min(frames.num_frames - 1, NUM_TRAIL_FRAMES)
    shape = {"num_frames": frames.num_frames, "height": frames.height, "width": frames.width, "num_last": tail}
    head = json.dumps({"task": request.task, **shape}).encode()
    view = memoryview(frames.data)
    return b"".join((len(head).to_bytes(4, "little"), head, view[:size], view[len(view) - tail * size :]))


def with_pictures(request: VideoRequest, record: bytes) -> VideoRequest:
    """The request with its input pictures; frames that the encoder does not read are black."""
    num_head = int.from_bytes(record[:4], "little")
    head = json.loads(record[4 : 4 + num_head])
    num_frames, size = head["num_frames"], head["height"] * head["width"] * 3
    kept = memoryview(record)[4 + num_head :]
    gap = bytes(size * (num_frames - 1 - head["num_last"]))
    frames = Frames(
        data=b"".join((kept[:size], gap, kept[size:])),
        num_frames=num_frames,
        height=head["height"],
        width=head["width"],
    )
    return replace(request, image=frames) if head["task"] == "i2v" else replace(request, video=frames)


def with_start(request: VideoRequest, task: Task, record: bytes, generator_state: bytes) -> VideoRequest:
    """The request with what the encoder made of its pictures."""
    return replace(request, start=Start(task=task, record=record, generator_state=generator_state))
