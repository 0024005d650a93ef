"""Reads the bodies of remix and extend. Knows fields and messages; knows no job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from helios_serve.api.intake import Extension
from helios_serve.api.names import shown
from helios_serve.api.schemas import MAX_PROMPT_CHARS, VideoReference
from helios_serve.errors import InvalidRequestError

Body = TypeVar("Body", bound=BaseModel)


class RemixBody(BaseModel):
    """The body of `POST /v1/videos/{id}/remix`."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS)


class ExtensionBody(BaseModel):
    """The body of `POST /v1/videos/extensions`: `seconds` or `num_frames` is what is added."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS)
    video: VideoReference
    model: str | None = None
    seconds: float | None = Field(default=None, gt=0, le=86_400)
    num_frames: int | None = Field(default=None, ge=1, le=1_000_000)
    transition_chunks: int = Field(default=2, ge=0, le=1000)


def parse_remix(body: Mapping[str, object]) -> str:
    """The new prompt.

    Raises: InvalidRequestError with the field at fault.
    """
    return _read(RemixBody, body).prompt


def parse_extension(body: Mapping[str, object]) -> tuple[str, Extension]:
    """The id of the video that is continued, and what is added.

    Raises: InvalidRequestError with the field at fault.
    """
    fields = _read(ExtensionBody, body)
    if fields.video.id is None:
        raise InvalidRequestError(
            'video: only an own finished video can be extended, {"id": "video_..."}; to continue another one, send it '
            "as video to /v1/videos",
            param="video",
            code="missing_required_parameter",
        )
    return fields.video.id, Extension(
        prompt=fields.prompt,
        num_frames=fields.num_frames,
        seconds=fields.seconds,
        transition_chunks=fields.transition_chunks,
    )


def _read(kind: type[Body], body: Mapping[str, object]) -> Body:
    try:
        return kind.model_validate(dict(body))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(first["type"])
        problem = "required" if first["type"] == "missing" else _problem(first)
        raise InvalidRequestError(f"{name}: {problem}", param=name, code=code) from None


def _problem(detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        return "unknown parameter"
    return f"{shown(detail['input'])}: {detail['msg'].lower()}"
