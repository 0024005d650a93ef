"""Reads the bodies of remix and extend. Knows fields, messages and how an input video becomes the beginning of another;
knows no job.

A video is extended in one of two ways. An own finished one keeps its segments, and its latents are the history. Any
other one is decoded: its last whole chunks are shown as they are, and the new ones are made as video-to-video makes
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, Field

from helios_serve.api import schemas
from helios_serve.api.convert import Limits, check_model, parse_named
from helios_serve.api.intake import DEFAULT_ADDED_S, Extension, InputExtension
from helios_serve.api.json_body import validated
from helios_serve.api.media_input import Media, read_video, video_look
from helios_serve.api.names import NamedBody, read_body
from helios_serve.api.sampling import ParameterWarning
from helios_serve.api.schemas import MAX_PROMPT_CHARS, VideoInput
from helios_serve.api.sizes import is_valid_size, size_like
from helios_serve.errors import InvalidRequestError
from helios_serve.types import FRAMES_PER_CHUNK, ModelInfo, Restart, SamplingParams, VideoRequest

_LOOK = ("size", "fps", "codec")
_TRANSITION = "transition_chunks"
_VIDEO_ALIASES = tuple(alias for alias, field in schemas.FIELD_ALIASES.items() if field == "video")


class RemixBody(BaseModel):
    """The body of `POST /v1/videos/{id}/remix`."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS)


class ExtensionBody(BaseModel):
    """The body of `POST /v1/videos/extensions` for an own finished video; `seconds` or `num_frames` is added to it."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS)
    video: VideoInput
    model: str | None = None
    seconds: float | None = Field(default=None, gt=0, le=86_400)
    num_frames: int | None = Field(default=None, ge=1, le=1_000_000)
    transition_chunks: int = Field(default=2, ge=0, le=1000)


def parse_remix(body: Mapping[str, object]) -> str:
    """The new prompt.

    Raises: InvalidRequestError with the field at fault.
    """
    return validated(RemixBody, body).prompt


class InputExtensionBody(schemas.GenerationBody):
    """The body of `POST /v1/videos/extensions` for a video that was not made here, or is to get another size, rate or
    codec: `video` is required, the rest is as for a new video, of which `seconds` or `num_frames` is what is added.
    Without `size` and `fps` the video's own are kept, as far as the checkpoint has them."""

    transition_chunks: int | None = Field(default=None, ge=0, le=1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What an extension is to look like, as its caller wrote it; None where nothing is said."""

    size: object = None
    fps: object = None
    codec: object = None

    def fits(self, params: SamplingParams) -> bool:
        """Whether a video that was made so looks like this."""
        own = ((self.size, f"{params.width}x{params.height}"), (self.fps, params.fps), (self.codec, params.codec))
        return all(asked is None or asked == is_so for asked, is_so in own)


def own_video(body: Mapping[str, object]) -> tuple[str, Look] | None:
    """The id of the finished video that is to be continued, and what is said of its looks; None when the body names a
    video of another origin."""
    video = body.get("video")
    is_elsewhere = video is None and any(body.get(alias) is not None for alias in _VIDEO_ALIASES)
    if is_elsewhere or (video is not None and not isinstance(video, Mapping)):
        return None
    named = {} if video is None else {key: value for key, value in video.items() if value is not None}
    match named:
        case {"id": str(video_id)} if len(named) == 1:
            return video_id, Look(**{key: body.get(key) for key in _LOOK})
        case _ if named.keys() & {"video_url", "file_id"}:
            return None
    return "", Look()


def parse_extension(body: Mapping[str, object], model: ModelInfo, limits: Limits) -> tuple[str, Extension]:
    """The id of the finished video that is continued as it is, and what is added.

    Raises: InvalidRequestError with the field at fault; NotFoundError for another model.
    """
    fields = validated(ExtensionBody, {key: value for key, value in body.items() if key not in _LOOK})
    check_model(fields.model, model, limits)
    if fields.video.id is None:
        raise InvalidRequestError(
            'video: required, as {"id": "video_..."} or a file', param="video", code="missing_required_parameter"
        )
    return fields.video.id, Extension(
        prompt=fields.prompt,
        num_frames=fields.num_frames,
        seconds=fields.seconds,
        transition_chunks=fields.transition_chunks,
        max_frames=limits.max_frames,
    )


def parse_input_extension(body: Mapping[str, object], model: ModelInfo, media: Media, limits: Limits) -> InputExtension:
    """A video of any origin and what is added to it, from a body for which `own_video` has no answer, or whose looks do
    not fit; decodes it, which may take a while.

    Raises: as `parse_generation`.
    """
    named = read_body({key: value for key, value in body.items() if key != _TRANSITION})
    data = read_video(named, media)
    assert data is not None
    width, height, fps = video_look(data, named, media)
    parsed = parse_named(_looking_like(named, (width, height), fps, model), model, media, limits, video=data)
    video = parsed.request.video
    assert video is not None
    num_given = video.num_frames // FRAMES_PER_CHUNK
    num_kept, num_added = FRAMES_PER_CHUNK * num_given, parsed.request.params.num_frames
    if num_kept + num_added > limits.max_frames:
        param = named.name("seconds" if named.has("seconds") and not named.has("num_frames") else "num_frames")
        raise InvalidRequestError(
            f"{param}: {num_kept} frames and {num_added} more are {num_kept + num_added}; at most {limits.max_frames} "
            "for this key",
            param=param,
        )
    warnings = (*parsed.warnings, *_extension_warnings(named, video.num_frames, body.get(_TRANSITION)))
    reference = named.fields.video
    return InputExtension(
        parsed=replace(parsed, request=_behind(parsed.request, num_given), warnings=warnings),
        num_given=num_given,
        num_left_out=video.num_frames - num_kept,
        extended_from=None if reference is None else reference.id,
    )


def _extension_warnings(named: NamedBody, num_frames: int, transition_chunks: object) -> Iterator[ParameterWarning]:
    first = num_frames % FRAMES_PER_CHUNK
    if first:
        message = f"{num_frames} frames: whole chunks of {FRAMES_PER_CHUNK} are continued, frames {first} to "
        message += f"{num_frames - 1}; those before them are left out"
        yield ParameterWarning(param=named.name("video"), message=message)
    if transition_chunks is not None:
        yield ParameterWarning(param=_TRANSITION, message="no effect: this video has no earlier prompt")


def _looking_like(named: NamedBody, size: tuple[int, int], fps: float, model: ModelInfo) -> NamedBody:
    """The body with what it does not say taken from the video."""
    fields = named.fields
    taken: dict[str, object] = {}
    if fields.size in (None, "auto") and fields.width is None and fields.height is None:
        width, height = size if is_valid_size(*size, model) else size_like(*size, model)
        taken["size"] = f"{width}x{height}"
    if not named.has("fps") and 1 <= fps <= 60:
        taken["fps"] = fps
    if fields.num_frames is None and fields.seconds is None:
        taken["seconds"] = DEFAULT_ADDED_S
    return replace(named, fields=fields.model_copy(update=taken))


def _behind(request: VideoRequest, num_given: int) -> VideoRequest:
    """The request for the whole video: what was asked for comes after `num_given` chunks, and begins as if it came
    first."""
    params, (first, *later) = request.params, request.prompts
    params = replace(
        params,
        num_frames=FRAMES_PER_CHUNK * num_given + params.num_frames,
        restarts=(Restart(chunk=num_given, seed=params.seed),),
    )
    return replace(
        request, params=params, prompts=(first, *(replace(entry, chunk=entry.chunk + num_given) for entry in later))
    )
