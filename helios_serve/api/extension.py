"""Reads the bodies of remix and extend. Knows fields and messages; knows no job."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from helios_serve.api.convert import Limits, check_model
from helios_serve.api.intake import Extension
from helios_serve.api.json_body import validated
from helios_serve.api.schemas import MAX_PROMPT_CHARS, VideoInput
from helios_serve.errors import InvalidRequestError, UnsupportedOperationError
from helios_serve.types import ModelInfo


class RemixBody(BaseModel):
    """The body of `POST /v1/videos/{id}/remix`."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS)


class ExtensionBody(BaseModel):
    """The body of `POST /v1/videos/extensions`: `seconds` or `num_frames` is what is added."""

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


def parse_extension(body: Mapping[str, object], model: ModelInfo, limits: Limits) -> tuple[str, Extension]:
    """The id of the video that is continued, and what is added.

    Raises: InvalidRequestError with the field at fault; NotFoundError for another model; UnsupportedOperationError for
    a video that was not made here.
    """
    fields = validated(ExtensionBody, body)
    check_model(fields.model, model, limits)
    if fields.video.video_url is not None or fields.video.file_id is not None:
        raise UnsupportedOperationError(
            'video: only an own finished video can be extended, {"id": "video_..."}; for the new part alone, send this '
            "one as video to /v1/videos",
            param="video",
        )
    if fields.video.id is None:
        raise InvalidRequestError(
            'video: required, as {"id": "video_..."}', param="video", code="missing_required_parameter"
        )
    return fields.video.id, Extension(
        prompt=fields.prompt,
        num_frames=fields.num_frames,
        seconds=fields.seconds,
        transition_chunks=fields.transition_chunks,
        max_frames=limits.max_frames,
    )
