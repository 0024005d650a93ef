"""The one place where a client's JSON becomes a `types.VideoRequest`, complete and valid.

Resolves every default with the checkpoint's `ModelInfo`, checks what only the checkpoint can decide, and lists what was
accepted without effect. Knows no protocol and no store.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from helios_serve.api.media_input import Media, image_size, load_image, load_video, read_image
from helios_serve.api.names import NamedBody, read_body, shown
from helios_serve.api.sampling import ParameterWarning, Shape, Warnings, resolve_sampling
from helios_serve.api.schemas import PromptEntry
from helios_serve.api.sizes import check_size, size_like
from helios_serve.errors import InvalidRequestError, NotFoundError
from helios_serve.types import FRAMES_PER_CHUNK, ModelInfo, PromptChange, SamplingParams, ServiceClass, VideoRequest

DEFAULT_NUM_FRAMES = 132
MIN_EXPIRY_S = 3_600
MAX_QUEUE_TIMEOUT_S = 86_400
_BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a caller may ask for. model_aliases: further names of the served checkpoint, e.g. its hub id.
    webhook_schemes: of a job's own webhook."""

    max_frames: int = 7260
    max_b64_frames: int = 726
    max_prompts: int = 64
    max_expires_after_s: int = 7 * 86_400
    model_aliases: tuple[str, ...] = ()
    webhook_schemes: tuple[str, ...] = ("https",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A valid request and what its answer needs beside the video."""

    request: VideoRequest
    warnings: tuple[ParameterWarning, ...]
    response_format: Literal["url", "b64_json"]
    detach: bool
    stream: bool
    is_async: bool
    with_segments: bool
    """Whether a stream of events carries the segments, or progress alone."""
    has_seed: bool
    """Whether the caller chose the seed."""
    has_length: bool
    """Whether the caller said how long the video is to be."""
    has_class: bool
    """Whether the caller chose the service class."""
    user: str | None
    metadata: Mapping[str, str] | None
    queue_timeout_s: float | None
    webhook_url: str | None
    expires_after_s: float | None
    patience_s: float | None = None
    """How long the caller waits for the whole video; None: as long as it takes, or not at all."""


def parse_generation(
    body: Mapping[str, object], model: ModelInfo, media: Media, limits: Limits, *, is_live: bool = False
) -> ParsedRequest:
    """Validates `body` (a parsed JSON object) for `model`; decodes its media, which may take a while.

    Args:
        is_live: somebody watches the video while it is made, as with `stream`: it is realtime unless it says otherwise.

    Raises:
        InvalidRequestError: anything that cannot be served as written, with `param` as the client named the field.
        NotFoundError: another model was asked for.
    """
    return parse_named(read_body(body), model, media, limits, is_live=is_live)


def parse_named(
    named: NamedBody,
    model: ModelInfo,
    media: Media,
    limits: Limits,
    *,
    is_live: bool = False,
    video: bytes | None = None,
) -> ParsedRequest:
    """`parse_generation` of a body whose fields are read.

    Args:
        video: what `media_input.read_video` gave, if it has been called.
    """
    fields = named.fields
    warnings: Warnings = []
    check_model(named.fields.model, model, limits)
    _check_handling(named, limits)
    _check_outputs(named)
    _check_media(named, warnings)
    by_image = fields.size == "auto" and fields.width is None and fields.height is None
    image = read_image(named, media) if by_image else None
    like = None if image is None else image_size(image, named, media)
    width, height = _size(named, model, like, warnings)
    chosen = fields.helios.service_class
    default: ServiceClass = "realtime" if is_live or fields.stream else "offline"
    shape = Shape(
        width=width,
        height=height,
        num_frames=_num_frames(named, limits, warnings),
        service_class=default if chosen is None else chosen,
    )
    params = resolve_sampling(named, model, shape, warnings)
    if fields.response_format == "b64_json" and params.num_output_frames > limits.max_b64_frames:
        raise InvalidRequestError(
            f"response_format b64_json: the video has {params.num_output_frames} frames, at most "
            f"{limits.max_b64_frames} fit; use url",
            param="response_format",
        )
    prompts = _prompts(named, params, limits)
    request = VideoRequest(
        request_id=new_video_id(),
        prompts=prompts,
        params=params,
        negative_prompt="" if fields.negative_prompt is None else fields.negative_prompt,
        image=load_image(named, params, media, image),
        video=load_video(named, params, media, video),
        service_class=shape.service_class,
        priority=fields.priority,
        is_strict=fields.helios.reproducible == "strict",
    )
    return ParsedRequest(
        request=request,
        warnings=tuple(warnings),
        response_format=fields.response_format,
        detach=fields.detach,
        stream=fields.stream,
        is_async=fields.async_,
        with_segments=fields.partial_videos == "all",
        has_seed=fields.seed is not None,
        has_length=fields.num_frames is not None or fields.seconds is not None,
        has_class=chosen is not None,
        user=fields.user,
        metadata=fields.metadata,
        queue_timeout_s=fields.queue_timeout,
        webhook_url=fields.webhook_url,
        expires_after_s=fields.expires_after,
    )


def new_video_id() -> str:
    """`video_` and 26 base32 characters: 48 bits of milliseconds, then 80 random bits, so ids sort by time."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "video_" + "".join(_BASE32[value >> shift & 31] for shift in range(125, -1, -5))


def check_model(asked: str | None, model: ModelInfo, limits: Limits) -> None:
    """Raises: NotFoundError when a request names a model that is not served."""
    if asked is not None and asked != model.name and asked not in limits.model_aliases:
        raise NotFoundError(
            f"model {shown(asked)}: not served here; served: {model.name}", param="model", code="model_not_found"
        )


def _check_handling(named: NamedBody, limits: Limits) -> None:
    """Fields about the job rather than its video."""
    body = named.fields
    if body.stream and body.async_:
        raise InvalidRequestError(
            f"{named.name('async')}: not beside stream; leave one of them out",
            param=named.name("async"),
            code="conflicting_parameters",
        )
    if body.queue_timeout is not None and not 0 < body.queue_timeout <= MAX_QUEUE_TIMEOUT_S:
        name = named.name("queue_timeout")
        raise InvalidRequestError(
            f"{name} {body.queue_timeout:g}: must be above 0 and at most {MAX_QUEUE_TIMEOUT_S} seconds", param=name
        )
    if body.expires_after is not None and not MIN_EXPIRY_S <= body.expires_after <= limits.max_expires_after_s:
        name = named.name("expires_after")
        raise InvalidRequestError(
            f"{name} {body.expires_after}: must be {MIN_EXPIRY_S} to {limits.max_expires_after_s} seconds", param=name
        )
    schemes = limits.webhook_schemes
    url = rf"({'|'.join(schemes)})://[^\s/]+\S{{0,2000}}"
    if body.webhook_url is not None and re.fullmatch(url, body.webhook_url) is None:
        name = named.name("webhook_url")
        right = f"an {' or '.join(schemes)} URL"
        raise InvalidRequestError(f"{name} {shown(body.webhook_url)}: must be {right}", param=name)


def _check_outputs(named: NamedBody) -> None:
    body = named.fields
    if body.n != 1:
        name = named.name("n")
        raise InvalidRequestError(f"{name} {shown(body.n)}: only 1; send one request per video", param=name)
    if body.output_format != "mp4":
        raise InvalidRequestError(
            f"output_format {shown(body.output_format)}: only mp4; for royalty-free video set codec to vp9 or av1",
            param="output_format",
        )
    for key in () if body.metadata is None else body.metadata:
        if not 1 <= len(key) <= 64:
            raise InvalidRequestError(f"metadata key {shown(key)}: must have 1 to 64 characters", param="metadata")


def _size(named: NamedBody, model: ModelInfo, like: tuple[int, int] | None, warnings: Warnings) -> tuple[int, int]:
    body = named.fields
    if body.width is None and body.height is None:
        size = _size_from_text(named, model, like)
        param = "size"
    else:
        if body.width is None or body.height is None:
            given, missing = ("height", "width") if body.width is None else ("width", "height")
            raise InvalidRequestError(
                f"{missing}: required beside {given}", param=missing, code="missing_required_parameter"
            )
        size = (body.width, body.height)
        param = "width" if body.width % model.size_multiple or not body.height % model.size_multiple else "height"
        if body.size not in (None, "auto") and _size_from_text(named, model, like) != size:
            raise InvalidRequestError(
                f"size {shown(body.size)}: width and height say {size[0]}x{size[1]}; give one of them",
                param="size",
                code="conflicting_parameters",
            )
    check_size(*size, model, param)
    if size not in model.recommended_sizes:
        recommended = ", ".join(f"{w}x{h}" for w, h in model.recommended_sizes)
        message = f"{size[0]}x{size[1]} is outside the recommended sizes ({recommended}); the picture may jump"
        warnings.append(ParameterWarning(param=param, message=message))
    return size


def _size_from_text(named: NamedBody, model: ModelInfo, like: tuple[int, int] | None) -> tuple[int, int]:
    text = named.fields.size
    if text is None:
        return model.default_size
    if text == "auto":
        return model.default_size if like is None else size_like(*like, model)
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if match is None:
        width, height = model.default_size
        raise InvalidRequestError(
            f"size {shown(text)}: must be WIDTHxHEIGHT, like {width}x{height}, or auto", param="size"
        )
    return int(match[1]), int(match[2])


def _num_frames(named: NamedBody, limits: Limits, warnings: Warnings) -> int:
    body = named.fields
    if body.num_frames is not None:
        name = named.name("num_frames")
        if body.num_frames > limits.max_frames:
            raise InvalidRequestError(
                f"{name} {shown(body.num_frames)}: at most {limits.max_frames} for this key", param=name
            )
        if body.seconds is not None:
            message = f"no effect: {name} says {body.num_frames}"
            warnings.append(ParameterWarning(param=named.name("seconds"), message=message))
        return body.num_frames
    if body.seconds is None:
        return min(DEFAULT_NUM_FRAMES, limits.max_frames)
    name = named.name("seconds")
    exact = body.seconds * body.fps
    if not 0.5 <= exact < limits.max_frames + 0.5:
        raise InvalidRequestError(
            f"{name} {body.seconds:g}: {exact:.6g} frames at {body.fps:g} fps; "
            f"must give at least 1 and at most {limits.max_frames} frames for this key",
            param=name,
        )
    return math.floor(exact + 0.5)


def _prompts(named: NamedBody, params: SamplingParams, limits: Limits) -> tuple[PromptChange, ...]:
    prompt, schedule = named.fields.prompt, named.fields.prompts
    if schedule is None:
        if prompt is None:
            raise InvalidRequestError("prompt: required", param="prompt", code="missing_required_parameter")
        return (PromptChange(chunk=0, prompt=prompt),)
    if not 1 <= len(schedule) <= limits.max_prompts:
        raise InvalidRequestError(
            f"prompts: {len(schedule)} entries, must be 1 to {limits.max_prompts}", param="prompts"
        )
    if prompt is not None and prompt != schedule[0].prompt:
        raise InvalidRequestError(
            "prompt: prompts[0].prompt says something else; give one of them",
            param="prompt",
            code="conflicting_parameters",
        )
    changes: list[PromptChange] = []
    for index, entry in enumerate(schedule):
        name, value, chunk = _start_of(index, entry, params)
        if chunk >= params.num_chunks:
            last = params.num_chunks - 1
            raise InvalidRequestError(
                f"{name} {value:g}: the video has {params.num_chunks} chunk{'s' if last else ''}, 0 to {last}",
                param=name,
            )
        if index == 0 and chunk != 0:
            raise InvalidRequestError(f"{name} {value:g}: the first prompt must start at 0", param=name)
        if changes and chunk <= changes[-1].chunk:
            raise InvalidRequestError(
                f"{name} {value:g}: starts in chunk {chunk}, must come after chunk {changes[-1].chunk}", param=name
            )
        changes.append(PromptChange(chunk=chunk, prompt=entry.prompt, transition_chunks=entry.transition_chunks))
    return tuple(changes)


def _start_of(index: int, entry: PromptEntry, params: SamplingParams) -> tuple[str, float, int]:
    """Name and value of the field that says where the entry begins, and its chunk: the one that holds the moment."""
    name = f"prompts[{index}]"
    if entry.chunk is not None and entry.start_seconds is not None:
        raise InvalidRequestError(
            f"{name}: chunk and start_seconds are two names of one moment; give one of them",
            param=name,
            code="conflicting_parameters",
        )
    if entry.chunk is not None:
        return f"{name}.chunk", entry.chunk, entry.chunk
    if entry.start_seconds is not None:
        chunk = entry.start_seconds * params.fps / FRAMES_PER_CHUNK
        # 1e-9: a start computed as chunk * 33 / fps must not fall into the chunk before by rounding.
        return f"{name}.start_seconds", entry.start_seconds, math.floor(min(chunk, 1e6) + 1e-9)
    if index == 0:
        return f"{name}.chunk", 0, 0
    raise InvalidRequestError(
        f"{name}.chunk: required, or start_seconds", param=f"{name}.chunk", code="missing_required_parameter"
    )


def _check_media(named: NamedBody, warnings: Warnings) -> None:
    body = named.fields
    if body.input_reference is not None and body.video is not None:
        name = named.name("video")
        raise InvalidRequestError(
            f"{name}: not together with {named.name('input_reference')}; give one of them",
            param=name,
            code="conflicting_parameters",
        )
    if body.input_reference is not None or body.video is not None:
        return
    bounds = (f"{kind}_noise_sigma_{edge}" for kind in ("image", "video") for edge in ("min", "max"))
    for key in ("image_fit", *bounds):
        if named.has("helios", key):
            message = "no effect: the request has no image and no video"
            warnings.append(ParameterWarning(param=named.name("helios", key), message=message))
