"""From protocol buffers to the mapping that a JSON body gives, so that `parse_generation` reads both alike; and from
its names of fields back to those of the proto. Only what is set is passed on: defaults are resolved in one place.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from google.protobuf.duration_pb2 import Duration
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message

from helios_serve.api.jobs import Page, State
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.api.schemas import UploadedMedia
from helios_serve.api.session import Action
from helios_serve.api.video_files import Still
from helios_serve.errors import HeliosError, InvalidRequestError

STATUSES: dict[State, pb.VideoStatus] = {
    "queued": pb.VIDEO_STATUS_QUEUED,
    "in_progress": pb.VIDEO_STATUS_IN_PROGRESS,
    "completed": pb.VIDEO_STATUS_COMPLETED,
    "failed": pb.VIDEO_STATUS_FAILED,
    "cancelled": pb.VIDEO_STATUS_CANCELLED,
    "expired": pb.VIDEO_STATUS_EXPIRED,
}
_STILLS: dict[int, Still | None] = {
    pb.VARIANT_UNSPECIFIED: None,
    pb.VARIANT_VIDEO: None,
    pb.VARIANT_THUMBNAIL: "thumbnail",
    pb.VARIANT_SPRITESHEET: "spritesheet",
    pb.VARIANT_LAST_FRAME: "last_frame",
}
_ACTIONS: dict[int, Action] = {
    pb.ACTION_PAUSE: "pause",
    pb.ACTION_RESUME: "resume",
    pb.ACTION_RESET: "reset",
    pb.ACTION_STOP: "stop",
}
_SPEC_FIELDS = frozenset(pb.VideoSpec.DESCRIPTOR.fields_by_name)
_PATHS = {
    "input_reference": "image",
    "size": "width",
    "service_class": "helios.service_class",
    "codec": "output.codec",
    "crf": "output.crf",
    "partial_videos": "output.inline_segments",
    "video.id": "video.video_id",
}
"""Names in the JSON form -> paths in VideoSpec, where they differ."""


def generation_body(spec: pb.VideoSpec) -> dict[str, object]:
    """The JSON form of a request. To be called under `named_as_in_proto`.

    Raises: InvalidRequestError for what the JSON form has no words for: a number that an enum does not have, a medium
    without a source.
    """
    body: dict[str, object] = _set_scalars(spec)
    for name in ("image", "video"):
        if spec.HasField(name):
            body[name] = _media(name, spec.image if name == "image" else spec.video)
    if spec.prompts:
        body["prompts"] = [_prompt_at(entry) for entry in spec.prompts]
    if spec.metadata:
        body["metadata"] = dict(spec.metadata)
    if spec.HasField("queue_timeout"):
        body["queue_timeout"] = seconds_of(spec.queue_timeout)
    if spec.HasField("helios"):
        body["helios"] = _helios(spec.helios)
    if spec.HasField("output"):
        body.update(_output(spec.output))
    return body


def seconds_of(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def whole_seconds_of(duration: Duration, param: str) -> int:
    """Raises InvalidRequestError for parts of a second."""
    if duration.nanos:
        raise InvalidRequestError(f"{param} {seconds_of(duration):g} s: must be whole seconds", param=param)
    return duration.seconds


def page_of(request: pb.ListVideosRequest) -> Page:
    """Raises InvalidRequestError."""
    if not 0 <= request.page_size <= 100:
        message = f"page_size {request.page_size}: must be 1 to 100, or 0 for 20"
        raise InvalidRequestError(message, param="page_size")
    names = {number: state for state, number in STATUSES.items()}
    for index, number in enumerate(request.statuses):
        if number not in names:
            raise unknown_value(f"statuses[{index}]", number, pb.VideoStatus)
    return Page(
        limit=request.page_size or 20,
        after=request.page_token or None,
        newest_first=not request.ascending,
        states=frozenset(names[number] for number in request.statuses) if request.statuses else None,
    )


def still_of(variant: int) -> Still | None:
    """The picture that is asked for; None for the video. Raises InvalidRequestError."""
    if variant not in _STILLS:
        raise unknown_value("variant", variant, pb.Variant)
    return _STILLS[variant]


def action_of(action: int) -> Action:
    """Raises InvalidRequestError."""
    if action not in _ACTIONS:
        raise unknown_value("control.action", action, pb.Action)
    return _ACTIONS[action]


def check_nothing_beside(message: Message, allowed: frozenset[str], prefix: str, reason: str) -> None:
    """Raises InvalidRequestError `conflicting_parameters` when a field is set that has no meaning here."""
    for field, _ in message.ListFields():
        if field.name not in allowed:
            raise InvalidRequestError(
                f"{prefix}{field.name}: {reason}", param=f"{prefix}{field.name}", code="conflicting_parameters"
            )


@contextmanager
def named_as_in_proto(prefix: str = "spec") -> Iterator[None]:
    """Errors about a field of the JSON form name the field of the message, as it is reached from the request."""
    try:
        yield
    except HeliosError as error:
        if error.param is not None:
            error.param = field_path(error.param, prefix)
        raise


@contextmanager
def named(param: str, path: str) -> Iterator[None]:
    """Errors about `param` name the field `path` of the message, where the service calls it otherwise."""
    try:
        yield
    except HeliosError as error:
        if error.param == param:
            error.param = path
        raise


def field_path(param: str, prefix: str = "spec") -> str:
    """`helios.steps` -> `spec.helios.steps`, `size` -> `spec.width`; what is no field of VideoSpec stays as it is."""
    path = _PATHS.get(param, param)
    head = path.partition(".")[0].partition("[")[0]
    return f"{prefix}.{path}" if head in _SPEC_FIELDS else path


def _set_scalars(spec: pb.VideoSpec) -> dict[str, object]:
    """Those without presence are set unless they are empty."""
    body: dict[str, object] = {
        name: value
        for name, value in (("model", spec.model), ("prompt", spec.prompt), ("user", spec.user))
        if value != ""
    }
    if spec.HasField("negative_prompt"):
        body["negative_prompt"] = spec.negative_prompt
    if spec.HasField("width"):
        body["width"] = spec.width
    if spec.HasField("height"):
        body["height"] = spec.height
    if spec.HasField("num_frames"):
        body["num_frames"] = spec.num_frames
    if spec.HasField("seconds"):
        body["seconds"] = spec.seconds
    if spec.HasField("fps"):
        body["fps"] = spec.fps
    if spec.HasField("seed"):
        body["seed"] = spec.seed
    if spec.HasField("priority"):
        body["priority"] = spec.priority
    return body


def _media(name: str, media: pb.Media) -> object:
    match media.WhichOneof("source"):
        case "data":
            return UploadedMedia(media.data, media.mime_type or "application/octet-stream")
        case "url":
            return {f"{name}_url": media.url}
        case "file_id":
            return {"file_id": media.file_id}
        case "video_id" if name == "video":
            return {"id": media.video_id}
        case "video_id":
            raise InvalidRequestError(
                "image.video_id: an image is no video; download its last frame, or give video",
                param="image.video_id",
            )
        case _:
            choices = "data, url, file_id" + (", video_id" if name == "video" else "")
            raise InvalidRequestError(
                f"{name}: none of {choices} is set", param=name, code="missing_required_parameter"
            )


def _prompt_at(entry: pb.PromptAt) -> Mapping[str, object]:
    transition = {"transition_chunks": entry.transition_chunks} if entry.HasField("transition_chunks") else {}
    return {"chunk": entry.chunk, "prompt": entry.prompt, **transition}


def _helios(helios: pb.HeliosParams) -> Mapping[str, object]:
    enums: dict[str, tuple[int, EnumTypeWrapper]] = {
        "frame_policy": (helios.frame_policy, pb.FramePolicy),
        "image_fit": (helios.image_fit, pb.ImageFit),
        "profile": (helios.profile, pb.Profile),
        "service_class": (helios.service_class, pb.ServiceClass),
        "reproducible": (helios.reproducible, pb.Reproducible),
    }
    body: dict[str, object] = {}
    for field, value in helios.ListFields():
        if field.name in enums:
            number, kind = enums[field.name]
            body[field.name] = _enum_word(f"helios.{field.name}", number, kind)
        elif field.name == "steps":
            body[field.name] = [*helios.steps]
        elif isinstance(value, float):
            body[field.name] = _shortest(value)
        else:
            body[field.name] = value
    return body


def _output(output: pb.OutputOptions) -> Mapping[str, object]:
    body: dict[str, object] = {}
    if output.codec != pb.CODEC_UNSPECIFIED:
        body["codec"] = _enum_word("output.codec", output.codec, pb.Codec)
    if output.HasField("crf"):
        body["crf"] = output.crf
    if output.HasField("inline_segments") and not output.inline_segments:
        body["partial_videos"] = 0
    return body


def _enum_word(param: str, number: int, kind: EnumTypeWrapper) -> str:
    """FRAME_POLICY_PAD -> pad."""
    if number not in kind.values():
        raise unknown_value(param, number, kind)
    prefix = kind.Name(0).removesuffix("UNSPECIFIED")
    return kind.Name(number).removeprefix(prefix).lower()


def _shortest(value: float) -> float:
    """The shortest decimal of a 32-bit float: what the client wrote, 0.111 rather than 0.11100000143051147."""
    raw = struct.pack("<f", value)
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        if abs(short) < 3e38 and struct.pack("<f", short) == raw:
            return short
    return value


def unknown_value(param: str, number: int, kind: EnumTypeWrapper) -> InvalidRequestError:
    """A number that the enumeration does not have."""
    names = ", ".join(name for name, value in kind.items() if value != 0)
    return InvalidRequestError(f"{param} {number}: must be one of {names}", param=param)
