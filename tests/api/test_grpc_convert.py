"""The proto and the JSON form mean the same; messages stay below their limit; the committed stubs fit the proto."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_tools import protoc
from hypothesis import given
from hypothesis import strategies as st

import helios_serve.api
import helios_serve.store
from helios_serve.api.convert import Limits, ParsedRequest, parse_generation
from helios_serve.api.grpc_convert import field_path, generation_body
from helios_serve.api.grpc_errors import MAX_TEXT_BYTES, status_code, status_message, trailers
from helios_serve.api.grpc_messages import MAX_MESSAGE_BYTES, segment_messages
from helios_serve.api.grpc_wire import SMALL_BYTES, parse_message
from helios_serve.api.jobs import JobSegment
from helios_serve.api.media_input import DataUriSource, Media
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2_grpc
from helios_serve.errors import BodyTooLargeError, HeliosError, InvalidRequestError
from helios_serve.types import ModelInfo

PNG = b"\x89PNG and so on"


class Kept:
    """Files and videos that a caller has."""

    def read(self, reference: str, param: str, max_bytes: int) -> bytes:
        return PNG if reference.startswith("file_") else b"frames=40"


@pytest.fixture
def media(decoder: Any) -> Media:
    return Media(source=DataUriSource(), decoder=decoder, files=Kept(), videos=Kept())


def parsed(body: dict[str, object], model: ModelInfo, media: Media) -> ParsedRequest:
    return parse_generation(body, model, media, Limits())


EVERYTHING: list[tuple[dict[str, Any], dict[str, object]]] = [
    ({"prompt": "a"}, {"prompt": "a"}),
    (
        {
            "model": "helios-distilled",
            "prompt": "a",
            "negative_prompt": "",
            "width": 640,
            "height": 384,
            "num_frames": 40,
            "seconds": 2.5,
            "fps": 12.5,
            "seed": 0,
            "priority": 3,
            "user": "u",
            "metadata": {"a": "b"},
            "queue_timeout": Duration(seconds=2, nanos=500_000_000),
        },
        {
            "model": "helios-distilled",
            "prompt": "a",
            "negative_prompt": "",
            "size": "640x384",
            "num_frames": 40,
            "seconds": 2.5,
            "fps": 12.5,
            "seed": 0,
            "priority": 3,
            "user": "u",
            "metadata": {"a": "b"},
            "queue_timeout": 2.5,
        },
    ),
    (
        {
            "helios": pb.HeliosParams(
                guidance_scale=1.1,
                steps=[3, 1, 2],
                amplify_first_chunk=False,
                skip_first_chunk=True,
                image_noise_sigma_min=0.05,
                image_noise_sigma_max=0.111,
                video_noise_sigma_min=0.0,
                video_noise_sigma_max=0.135,
                use_zero_init=False,
                zero_steps=0,
                frame_policy=pb.FRAME_POLICY_REFERENCE,
                image_fit=pb.IMAGE_FIT_STRETCH,
                profile=pb.PROFILE_REALTIME,
                service_class=pb.SERVICE_CLASS_REALTIME,
                reproducible=pb.REPRODUCIBLE_STRICT,
            ),
            "prompt": "a",
        },
        {
            "prompt": "a",
            "helios": {
                "guidance_scale": 1.1,
                "steps": [3, 1, 2],
                "amplify_first_chunk": False,
                "skip_first_chunk": True,
                "image_noise_sigma_min": 0.05,
                "image_noise_sigma_max": 0.111,
                "video_noise_sigma_min": 0.0,
                "video_noise_sigma_max": 0.135,
                "use_zero_init": False,
                "zero_steps": 0,
                "frame_policy": "reference",
                "image_fit": "stretch",
                "profile": "realtime",
                "service_class": "realtime",
                "reproducible": "strict",
            },
        },
    ),
    (
        {
            "prompts": [
                pb.PromptAt(prompt="a"),
                pb.PromptAt(chunk=1, prompt="b", transition_chunks=0),
                pb.PromptAt(chunk=3, prompt="c", transition_chunks=5),
            ]
        },
        {
            "prompts": [
                {"prompt": "a"},
                {"chunk": 1, "prompt": "b", "transition_chunks": 0},
                {"chunk": 3, "prompt": "c", "transition_chunks": 5},
            ]
        },
    ),
    (
        {"prompt": "a", "output": pb.OutputOptions(codec=pb.CODEC_AV1, crf=0, inline_segments=False)},
        {"prompt": "a", "codec": "av1", "helios": {"crf": 0}, "partial_videos": 0},
    ),
    ({"prompt": "a", "output": pb.OutputOptions(inline_segments=True)}, {"prompt": "a"}),
    (
        {"prompt": "a", "image": pb.Media(data=PNG, mime_type="image/png")},
        {"prompt": "a", "image": {"file_id": "file_1"}},
    ),
    ({"prompt": "a", "image": pb.Media(file_id="file_1")}, {"prompt": "a", "input_reference": {"file_id": "file_1"}}),
    (
        {"prompt": "a", "image": pb.Media(url="data:image/png;base64,iVBORw==")},
        {"prompt": "a", "image_url": "data:image/png;base64,iVBORw=="},
    ),
    ({"prompt": "a", "video": pb.Media(data=b"frames=40")}, {"prompt": "a", "video": {"id": "video_1"}}),
    ({"prompt": "a", "video": pb.Media(video_id="video_1")}, {"prompt": "a", "video": {"id": "video_1"}}),
]


@pytest.mark.parametrize(("fields", "body"), EVERYTHING)
def test_a_field_means_the_same_as_in_json(
    fields: dict[str, Any], body: dict[str, object], model: ModelInfo, media: Media
) -> None:
    left = parsed({**generation_body(pb.VideoSpec(**fields)), "seed": 5}, model, media)
    right = parsed({**body, "seed": 5}, model, media)
    for name in ("params", "prompts", "negative_prompt", "image", "video", "service_class", "priority", "is_strict"):
        assert getattr(left.request, name) == getattr(right.request, name), name
    for name in ("with_segments", "has_length", "has_class", "user", "metadata", "queue_timeout_s"):
        assert getattr(left, name) == getattr(right, name), name


def test_the_examples_above_use_every_field() -> None:
    """A field that is added to the proto and forgotten in the translation is found here."""
    used: set[str] = set()
    for fields, _ in EVERYTHING:
        spec = pb.VideoSpec(**fields)
        used |= {field.full_name for field, _ in spec.ListFields()}
        used |= {field.full_name for field, _ in spec.helios.ListFields()}
        used |= {field.full_name for field, _ in spec.output.ListFields()}
        for media in (spec.image, spec.video):
            used |= {field.full_name for field, _ in media.ListFields()}
    kinds = (pb.VideoSpec, pb.HeliosParams, pb.OutputOptions, pb.Media)
    known = {field.full_name for kind in kinds for field in kind.DESCRIPTOR.fields}
    answered_elsewhere = {"helios.video.v1.OutputOptions.container", "helios.video.v1.OutputOptions.sub_chunks"}
    assert known - used == answered_elsewhere


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4028234663852886e38, 1e-45])
def test_odd_numbers_are_left_to_validation(value: float, model: ModelInfo, media: Media) -> None:
    body = generation_body(pb.VideoSpec(prompt="a", helios=pb.HeliosParams(guidance_scale=value)))
    with pytest.raises(InvalidRequestError) as caught:
        parsed(body, model, media)
    assert caught.value.param == "helios.guidance_scale"


@pytest.mark.parametrize(
    ("param", "path"),
    [
        ("size", "spec.width"),
        ("helios.steps", "spec.helios.steps"),
        ("prompts[3].chunk", "spec.prompts[3].chunk"),
        ("crf", "spec.output.crf"),
        ("fps", "spec.fps"),
        ("id", "id"),
        ("webhook_url", "webhook_url"),
    ],
)
def test_paths(param: str, path: str) -> None:
    assert field_path(param) == path


@pytest.mark.parametrize("num_bytes", [0, 1, MAX_MESSAGE_BYTES - 300, MAX_MESSAGE_BYTES, 3_000_000, 24_330_240])
@pytest.mark.parametrize("prompt", ["", "\U0001f600" * 32_000])
def test_parts_of_a_segment_fit(num_bytes: int, prompt: str) -> None:
    media = bytes(range(256)) * (num_bytes // 256 + 1)
    segment = JobSegment(
        index=2**20,
        init=b"init",
        media=media[:num_bytes],
        start_frame=33 * 2**20,
        num_frames=33,
        fps=24,
        prompt=prompt,
        prompt_weight=0.5,
        is_last=True,
        generated_ms=10**9,
    )
    parts = [*segment_messages(segment)]
    assert b"".join(part.data for part in parts) == segment.media
    assert [part.part for part in parts] == [*range(len(parts))]
    assert {part.num_parts for part in parts} == {len(parts)}
    # As a response holds it.
    assert max(pb.SessionResponse(segment=part).ByteSize() for part in parts) <= MAX_MESSAGE_BYTES
    assert len(parts) == 1 or len(parts[0].data) > MAX_MESSAGE_BYTES - len(prompt.encode()) - 300


def _errors() -> set[type[HeliosError]]:
    for package in (helios_serve.api, helios_serve.store):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found, waiting = set(), [HeliosError]
    while waiting:
        kind = waiting.pop()
        if kind not in found:
            found.add(kind)
            waiting += kind.__subclasses__()
    return {each for each in found if each.__module__.startswith(("helios_serve.api", "helios_serve.store"))}


GRPC_OF = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
    406: "INVALID_ARGUMENT", 409: "FAILED_PRECONDITION", 410: "NOT_FOUND", 413: "RESOURCE_EXHAUSTED",
    415: "INVALID_ARGUMENT", 416: "OUT_OF_RANGE", 422: "ALREADY_EXISTS", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL",
    501: "UNIMPLEMENTED", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED", 507: "RESOURCE_EXHAUSTED",
}  # fmt: skip


def test_every_error_of_a_call_has_the_status_that_the_table_gives() -> None:
    kinds = _errors()
    assert len(kinds) > 20
    at_start = {"StoreStartError"}
    wrong = {
        kind.__name__: (kind.status, kind.grpc_status)
        for kind in kinds
        if kind.__name__ not in at_start and GRPC_OF.get(kind.status, kind.grpc_status) != kind.grpc_status
    }
    assert not wrong


def test_a_long_message_fits_into_trailers() -> None:
    error = InvalidRequestError("\u20ac" * 50_000, param="p" * 5000)
    assert len(dict(trailers(error))["grpc-status-details-bin"]) < 3 * MAX_TEXT_BYTES
    assert status_message(error) == "\u20ac" * (MAX_TEXT_BYTES // 3)
    assert status_message(InvalidRequestError("a \ud800 b")) == "a ? b"
    assert status_code(error).name == "INVALID_ARGUMENT"


def test_the_committed_stubs_are_those_of_the_proto(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    source = Path("helios_serve/api/proto/helios/video/v1/video_generation.proto")
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    include = Path(cast(str, protoc.__file__)).parent / "_proto"
    arguments = ["protoc", f"-I{root}", f"-I{include}", *outputs, str(root / source)]
    assert protoc.main(arguments) == 0
    made = sorted((tmp_path / source.parent).iterdir())
    assert [path.name for path in made] == [
        "video_generation_pb2.py",
        "video_generation_pb2.pyi",
        "video_generation_pb2_grpc.py",
    ]
    for path in made:
        committed = root / source.parent / path.name
        assert _without_version(path) == _without_version(committed), f"run make proto: {committed.name} is old"


@pytest.mark.skipif(shutil.which("buf") is None, reason="buf is not installed (npm: @bufbuild/buf)")
def test_the_proto_passes_buf_lint() -> None:
    package = Path(helios_serve.api.__file__).parent / "proto"
    rules = '{"version": "v2", "lint": {"use": ["STANDARD"]}}'
    done = subprocess.run(
        ["buf", "lint", "--config", rules, str(package)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _without_version(path: Path) -> str:
    """Another patch release of the compiler writes its own number."""
    return re.sub(r"7,\n    \d+,\n    \d+|\d+\.\d+\.\d+", "", path.read_text())


def test_the_generated_classes_serve_the_same_methods() -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["VideoGenerationService"].methods}
    assert len(methods) == 10
    servicer: Any = video_generation_pb2_grpc.VideoGenerationServiceServicer
    assert methods <= set(dir(servicer))


def _field(number: int, data: bytes) -> bytes:
    """A field that holds a text, bytes or a message."""
    head = bytearray()
    for value in (number << 3 | 2, len(data)):
        while value > 127:
            head.append(value & 127 | 128)
            value >>= 7
        head.append(value)
    return bytes(head) + data


HOSTILE = {
    "entries": _field(1, b"\x62\x00" * 500_000),
    "pairs": _field(1, b"\x8a\x01\x00" * 300_000),
    "numbers": _field(1, _field(13, _field(2, b"\x02" * 900_000))),
    "numbers one by one": _field(1, _field(13, b"\x10\x01" * 300_000)),
    "spec after spec": _field(1, b"") * 500_000,
    "unknown": _field(77, b"") * 300_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_message_of_countless_parts_is_not_parsed(name: str) -> None:
    kind = cast(Any, pb.CreateVideoRequest)
    kind.FromString(HOSTILE[name])
    with pytest.raises(BodyTooLargeError, match="fields"):
        parse_message(kind, HOSTILE[name], may_hold_media=True)


def test_a_large_message_may_hold_media_and_texts() -> None:
    entries = [pb.PromptAt(chunk=chunk, prompt="\U0001f600" * 32_000) for chunk in range(64)]
    spec = pb.VideoSpec(prompts=entries, image=pb.Media(data=b"\x0a\x00" * 10_000_000), metadata={"a": "b"}, fps=24)
    request = pb.CreateVideoRequest(spec=spec)
    raw = request.SerializeToString()
    assert len(raw) > 28_000_000
    assert parse_message(pb.CreateVideoRequest, raw, may_hold_media=True) == request
    with pytest.raises(BodyTooLargeError, match="bytes; at most 1048576"):
        parse_message(pb.CreateVideoRequest, raw)


@given(raw=st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(raw: bytes) -> None:
    """Behind a field that is long enough for the message to be looked over."""
    for data in (raw, _field(1, _field(2, b"a" * SMALL_BYTES)) + raw):
        try:
            parse_message(pb.GenerateRequest, data)
        except (InvalidRequestError, BodyTooLargeError):
            continue
