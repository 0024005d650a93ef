"""Multipart forms: read as the JSON of the same request, as real clients write them, and refused with a reason."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.requests import Request

from helios_serve.api import media_input
from helios_serve.api.convert import Limits, ParsedRequest, parse_generation
from helios_serve.api.forms import MAX_FIELDS, read_form
from helios_serve.api.media_input import DataUriSource, Media, MediaDecoder
from helios_serve.api.names import NamedBody, read_body
from helios_serve.api.schemas import (
    FIELD_ALIASES,
    HELIOS_ALIASES,
    GenerationBody,
    HeliosParams,
    PromptEntry,
    UploadedMedia,
)
from helios_serve.errors import BodyTooLargeError, InvalidRequestError, UnsupportedMediaTypeError
from helios_serve.types import ModelInfo

PNG = b"\x89PNG\r\n--x\r\n\r\n"
PNG_URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
VIDEO = b"frames=40"
BOUNDARY = "xYz"
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
END = f"--{BOUNDARY}--\r\n".encode()

Pair = tuple[str, str]


def read(raw: bytes, content_type: str = FORM_TYPE, piece: int = 7) -> dict[str, object]:
    pieces = [raw[start : start + piece] for start in range(0, len(raw), piece)] or [b""]
    messages: Iterator[Mapping[str, object]] = iter(
        {"type": "http.request", "body": body, "more_body": index < len(pieces) - 1}
        for index, body in enumerate(pieces)
    )

    async def receive() -> Any:
        return next(messages)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", content_type.encode())]}
    return asyncio.run(read_form(Request(scope, receive)))


def part(head: str, data: bytes | str) -> bytes:
    """As `curl -F` writes it: `head` is what follows form-data."""
    body = data.encode() if isinstance(data, str) else data
    return f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + body + b"\r\n"


def form(*pairs: Pair) -> bytes:
    return b"".join(part(f'name="{name}"', value) for name, value in pairs) + END


def read_pairs(*pairs: Pair) -> dict[str, object]:
    return read(form(*pairs), piece=1 << 16)


def brackets(value: object, name: str) -> list[Pair]:
    """A JSON value in brackets, as the SDK writes it; objects in lists grouped by key."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in brackets(inner, f"{name}[{key}]" if name else key)]
    if isinstance(value, list):
        if value and isinstance(value[0], dict):
            return [(f"{name}[][{key}]", _text(entry[key])) for key in value[0] for entry in value]
        return [(f"{name}[]", _text(entry)) for entry in value]
    return [(name, _text(value))]


def json_strings(body: dict[str, object]) -> list[Pair]:
    """Every object and list as one JSON string."""
    return [(key, json.dumps(value) if isinstance(value, dict | list) else _text(value)) for key, value in body.items()]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@pytest.fixture
def parse(model: ModelInfo, decoder: MediaDecoder) -> Callable[[Mapping[str, object]], ParsedRequest]:
    media = Media(source=DataUriSource(), decoder=decoder)
    return lambda body: parse_generation(body, model, media, Limits())


BODIES: list[dict[str, Any]] = [
    {"prompt": "a lighthouse"},
    {"prompt": "\u706f\u53f0 \U0001f30a\r\nsecond line", "negative_prompt": ""},
    {"prompt": "true", "user": "5", "metadata": {"a": "1", "b": "null", "c": ""}},
    {"prompt": "{}", "negative_prompt": "[1]", "model": "helios-distilled"},
    {"prompt": "p", "size": "640x384", "num_frames": 33, "fps": 12.5, "seed": 2**63 - 1},
    {"prompt": "p", "width": 640, "height": 384, "seconds": 2.5, "fps": 12},
    {"prompt": "p", "seconds": "4"},
    {"prompt": "p", "duration": "04.50", "num_outputs_per_prompt": 1},
    {"prompt": "p", "response_format": "b64_json", "n": 1, "output_format": "mp4", "codec": "vp9"},
    {"prompt": "p", "stream": True, "detach": True, "partial_images": 3},
    {"prompt": "p", "stream": True, "partial_videos": 0},
    {"prompt": "p", "partial_videos": "all", "async": True, "priority": 0},
    {"prompt": "p", "expires_after": 86400},
    {"prompt": "p", "expires_after": {"seconds": 86400}},
    {"prompt": "p", "image": PNG_URI, "image_noise_sigma_max": 0.5, "image_fit": "stretch"},
    {"prompt": "p", "input_reference": {"image_url": PNG_URI}},
    {"prompt": "p", "video": {"video_url": "data:video/mp4;base64," + base64.b64encode(VIDEO).decode()}},
    {
        "prompts": [
            {"prompt": "a", "chunk": 0, "transition_chunks": 1},
            {"prompt": "b", "chunk": 2, "transition_chunks": 0},
        ]
    },
    {"prompts": [{"start_seconds": 0, "prompt": "a"}, {"start_seconds": 2.75, "prompt": "b"}]},
    {"prompt": "p", "steps": [1, 2, 3], "crf": 30},
    {"prompt": "p", "extra_body": {"num_frames": 66, "pyramid_steps": [2, 2, 2]}, "extra_params": {"fps": 30}},
    {"prompt": "p", "is_amplify_first_chunk": False, "is_skip_first_chunk": True},
    {
        "prompt": "p",
        "helios": {
            "steps": [1, 1, 1],
            "profile": "realtime",
            "guidance_scale": 2,
            "amplify_first_chunk": False,
            "skip_first_chunk": True,
            "use_zero_init": False,
            "zero_steps": 1,
            "image_noise_sigma_min": 0.1,
            "image_noise_sigma_max": 0.2,
            "video_noise_sigma_min": 0,
            "video_noise_sigma_max": 1,
            "frame_policy": "pad",
            "image_fit": "crop",
            "crf": 0,
            "service_class": "realtime",
            "reproducible": "strict",
            "is_enable_stage2": True,
            "pyramid_num_stages": 3,
        },
    },
]


@pytest.mark.parametrize("write", [lambda body: brackets(body, ""), json_strings], ids=["brackets", "json_strings"])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(body)[:50])
def test_a_form_is_read_as_the_json_of_the_same_request(
    parse: Callable[[Mapping[str, object]], ParsedRequest],
    monkeypatch: pytest.MonkeyPatch,
    body: dict[str, Any],
    write: Callable[[dict[str, Any]], list[Pair]],
) -> None:
    monkeypatch.setattr("helios_serve.api.convert.new_video_id", lambda: "video_1")
    seeded = {"seed": 7} | body
    assert parse(read_pairs(*write(seeded))) == parse(seeded)


@pytest.mark.parametrize("name", ["input_reference", "image", "input_reference[image_url]", "extra_body[first_frame]"])
def test_a_file_is_read_as_its_data_uri(
    parse: Callable[[Mapping[str, object]], ParsedRequest], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("helios_serve.api.convert.new_video_id", lambda: "video_1")
    text = part('name="prompt"', "p") + part('name="seed"', "7")
    uploaded = read(text + part(f'name="{name}"; filename="a.png"', PNG) + END)
    assert parse(uploaded) == parse({"prompt": "p", "seed": 7, "input_reference": PNG_URI})


def test_the_bodies_above_give_every_field_that_is_offered() -> None:
    given_keys = {FIELD_ALIASES.get(key, key) for body in BODIES for key in body}
    given_keys |= {HELIOS_ALIASES.get(key, key) for body in BODIES for key in body.get("helios", {})}
    fields = {field.alias or name for name, field in GenerationBody.model_fields.items()} | set(
        HeliosParams.model_fields
    )
    assert fields - given_keys == {"queue_timeout", "webhook_url", "num_inference_steps"}


_TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
_NAMES = st.text(st.characters(categories=["L", "N"], include_characters="_-. "), min_size=1, max_size=10)
_INTEGERS = st.integers(-(10**20), 10**20)
_NUMBERS = _INTEGERS | st.floats(allow_nan=False, allow_infinity=False)


def _values(model: type[BaseModel]) -> dict[str, st.SearchStrategy[Any]]:
    """For each field, values of the JSON types that it takes, in its range or not."""
    strategies: dict[str, st.SearchStrategy[Any]] = {}
    for name, info in model.model_fields.items():
        members = set(_members(info.annotation))
        if list[int] in members:
            strategies[info.alias or name] = st.lists(_INTEGERS, min_size=1, max_size=4)
        elif bool in members:
            strategies[info.alias or name] = st.booleans()
        elif float in members:
            strategies[info.alias or name] = _NUMBERS
        elif int in members:
            strategies[info.alias or name] = _INTEGERS
        else:
            strategies[info.alias or name] = _TEXTS
    return strategies


def _members(annotation: object) -> Iterator[object]:
    """The types in an annotation, at any depth."""
    yield annotation
    for inner in get_args(annotation):
        yield from _members(inner)


_ENTRIES = st.sets(st.sampled_from(sorted(set(PromptEntry.model_fields) - {"prompt"}))).flatmap(
    lambda keys: st.lists(
        st.fixed_dictionaries({key: value for key, value in _values(PromptEntry).items() if key in {*keys, "prompt"}}),
        min_size=1,
        max_size=4,
    )
)
_BODIES = st.fixed_dictionaries(
    {},
    optional=_values(GenerationBody)
    | {
        "helios": st.fixed_dictionaries({}, optional=_values(HeliosParams)),
        "prompts": _ENTRIES,
        "metadata": st.dictionaries(_NAMES, _TEXTS, min_size=1, max_size=3),
        "video": st.fixed_dictionaries({"video_url": _TEXTS.map(lambda text: "data:" + text)}),
        "input_reference": _TEXTS.map(lambda text: "data:" + text),
        "partial_videos": st.just("all") | st.integers(0, 9),
        "expires_after": _INTEGERS,
    },
)


def _outcome(read_it: Callable[[], Mapping[str, object]]) -> tuple[object, ...]:
    try:
        named: NamedBody = read_body(read_it())
    except InvalidRequestError as error:
        return error.param, error.code
    return named.fields, named.written


@settings(deadline=None, max_examples=200)
@given(_BODIES)
def test_any_body_has_one_outcome_in_all_three_forms(body: dict[str, Any]) -> None:
    expected = _outcome(lambda: body)
    assert _outcome(lambda: read_pairs(*json_strings(body))) == expected
    if body.get("helios") != {}:
        assert _outcome(lambda: read_pairs(*brackets(body, ""))) == expected


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.text("ab[]helios", max_size=12) | _NAMES, st.binary(max_size=20)), max_size=6),
    st.integers(1, 30),
    st.integers(0, 400),
)
def test_no_form_escapes_as_another_error(pairs: list[tuple[str, bytes]], piece: int, cut: int) -> None:
    raw = b"".join(part(f'name="{name}"', value) for name, value in pairs) + END
    for body in (raw, raw[:cut]):
        with contextlib.suppress(InvalidRequestError):
            read_body(read(body, piece=piece))


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(1, 40))
def test_bytes_that_are_no_form_are_refused(raw: bytes, piece: int) -> None:
    with pytest.raises(InvalidRequestError):
        read(raw, piece=piece)


class Captured:
    """The bodies that an SDK client sent."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, bytes]] = []
        transport = httpx2.MockTransport(self._answer)
        http_client = httpx2.Client(transport=transport)
        self.client = openai.OpenAI(api_key="k", base_url="http://server/v1", http_client=http_client)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append((request.headers["content-type"], request.read()))
        return httpx2.Response(200, json={"id": "video_1", "object": "video"})

    def create(self, **arguments: Any) -> dict[str, object]:
        """What the server reads of `client.videos.create(...)`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.client.videos.create(**arguments)
        content_type, raw = self.requests[-1]
        return read(raw, content_type)


@pytest.fixture
def sdk() -> Iterator[Captured]:
    captured = Captured()
    with captured.client:
        yield captured


def test_sdk_text_and_extra_body(sdk: Captured) -> None:
    helios = {"guidance_scale": 1.5, "steps": [1, 2, 3], "skip_first_chunk": True, "crf": 20, "profile": None}
    prompts = [{"chunk": 0, "prompt": "a"}, {"chunk": 2, "prompt": "b"}]
    body = sdk.create(
        prompt="a", size="640x384", seconds="4", extra_body={"helios": helios, "prompts": prompts, "seed": 7}
    )
    assert sdk.requests[-1][0].startswith("multipart/form-data; boundary=")
    assert body == {
        "prompt": "a",
        "size": "640x384",
        "seconds": 4.0,
        "seed": 7,
        "helios": {"guidance_scale": 1.5, "steps": [1, 2, 3], "skip_first_chunk": True, "crf": 20},
        "prompts": prompts,
    }


def test_sdk_without_a_file_sends_a_form_too(sdk: Captured) -> None:
    assert sdk.create(prompt="p") == {"prompt": "p"}


def test_sdk_file_and_reference(sdk: Captured, parse: Callable[[Mapping[str, object]], ParsedRequest]) -> None:
    body = sdk.create(prompt="p", input_reference=("a.png", PNG, "image/png"))
    assert body == {"prompt": "p", "input_reference": UploadedMedia(PNG, "image/png")}
    assert parse(body).request.task == "i2v"
    body = sdk.create(prompt="p", extra_body={"input_reference": {"image_url": PNG_URI}})
    assert body == {"prompt": "p", "input_reference": {"image_url": PNG_URI}}
    body = sdk.create(prompt="p", extra_body={"video": {"id": "video_1"}})
    assert body == {"prompt": "p", "video": {"id": "video_1"}}


def test_curl_forms(parse: Callable[[Mapping[str, object]], ParsedRequest]) -> None:
    file = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="video"; filename="a \\"b\\".mp4"\r\n'
        "Content-Type: video/mp4\r\n\r\n"
    ).encode()
    typed = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="helios"\r\nContent-Type: application/json\r\n\r\n'
        '{"crf": 30}\r\n'
    ).encode()
    body = read(part('name="prompt"', "p") + typed + file + VIDEO + b"\r\n" + END)
    assert body == {"prompt": "p", "helios": {"crf": 30}, "video": UploadedMedia(VIDEO, "video/mp4")}
    assert parse(body).request.task == "v2v"
    body = read(part('name="first_frame"; filename="a.png"', PNG) + part('name="prompt"', "p") + END)
    assert body["first_frame"] == UploadedMedia(PNG, "application/octet-stream")
    assert parse(body).request.task == "i2v"
    body = read(part('name="video[video_url]"; filename=a.mp4', VIDEO) + part("name=prompt", "p") + END)
    assert parse(body).request.task == "v2v"


def test_entries_of_a_list_may_come_one_by_one_or_as_json() -> None:
    entries = [{"chunk": 0, "prompt": "a"}, {"chunk": 2, "prompt": "b"}]
    one_by_one = [pair for entry in entries for pair in brackets([entry], "prompts")]
    assert read_pairs(*one_by_one) == {"prompts": entries}
    assert read_pairs(*[("prompts[]", json.dumps(entry)) for entry in entries]) == {"prompts": entries}
    nested = [(f"helios{name[name.index('[') :]}", value) for name, value in brackets({"x": entries}, "y")]
    assert read_pairs(*nested) == {"helios": {"x": [{k: str(v) for k, v in entry.items()} for entry in entries]}}


def test_a_part_may_be_larger_than_a_mebibyte() -> None:
    text = "data:image/png;base64," + "A" * 3 * 2**20
    assert read_pairs(("image", text)) == {"image": text}


def test_the_body_limit_of_the_middleware_passes_through() -> None:
    async def receive() -> Any:
        raise BodyTooLargeError("body: too large")

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", FORM_TYPE.encode())]}
    with pytest.raises(BodyTooLargeError):
        asyncio.run(read_form(Request(scope, receive)))


@pytest.mark.parametrize(
    "content_type", ["application/x-www-form-urlencoded", "text/plain", "multipart/mixed; boundary=x", ""]
)
def test_another_content_type_is_415(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaTypeError, match="only multipart/form-data"):
        read(b"prompt=p", content_type)


BAD: list[tuple[list[Pair], str | None, str, str]] = [
    ([("seed", "abc")], "seed", "invalid_value", 'seed "abc": must be an integer'),
    ([("seed", "")], "seed", "invalid_value", 'seed "": must be an integer'),
    ([("num_frames", "33.0")], "num_frames", "invalid_value", 'num_frames "33.0": must be an integer'),
    ([("num_frames", "\u0663\u0663")], "num_frames", "invalid_value", "must be an integer"),
    ([("fps", "NaN")], "fps", "invalid_value", 'fps "NaN": must be a number'),
    ([("fps", "1e999")], "fps", "invalid_value", "must be a finite number"),
    ([("fps", "24 ")], "fps", "invalid_value", "must be a number"),
    ([("seconds", "four")], "seconds", "invalid_value", 'seconds "four": must be a number'),
    ([("detach", "True")], "detach", "invalid_value", 'detach "True": must be true or false'),
    ([("stream", "1")], "stream", "invalid_value", 'stream "1": must be true or false'),
    (
        [("helios[guidance_scale]", "high")],
        "helios.guidance_scale",
        "invalid_value",
        'helios[guidance_scale] "high": must be a number',
    ),
    (
        [("helios[pyramid_steps][]", "2"), ("helios[pyramid_steps][]", "x")],
        "helios.pyramid_steps[1]",
        "invalid_value",
        'helios[pyramid_steps][] "x": must be an integer',
    ),
    ([("steps", "2")], "steps", "invalid_value", 'steps "2": must be a list: steps[] for each entry, or one JSON list'),
    ([("steps", "[2, 2")], "steps", "invalid_value", "steps: not JSON:"),
    ([("steps[0]", "2")], "steps.0", "invalid_value", "steps[0]: a list has empty brackets: steps[]"),
    ([("steps[]", "[2]")], "steps[0]", "invalid_value", "must be an integer"),
    ([("helios", "quality")], "helios", "invalid_value", "must be an object: helios[key] for each key"),
    ([("helios", '{"crf": 1, "crf": 2}')], "helios", "invalid_value", "same key twice"),
    ([("helios", '{"fps": NaN}')], "helios", "invalid_value", "NaN is not JSON"),
    ([("helios", '{"crf": "1"}')], "helios.crf", "invalid_value", "must be an integer"),
    ([("helios[guidence_scale]", "2")], "helios.guidence_scale", "unknown_parameter", "did you mean guidance_scale?"),
    ([("promt", "p")], "promt", "unknown_parameter", "did you mean prompt?"),
    ([("latents[]", "1")], "latents", "unsupported_parameter", "initial noise comes from seed"),
    ([("prompt[a]", "p")], "prompt.a", "invalid_value", "prompt[a]: prompt has no keys"),
    ([("prompt[]", "p")], "prompt", "invalid_value", "prompt: not a list; give prompt once"),
    ([("metadata[a][b]", "p")], "metadata.a.b", "invalid_value", "metadata[a] has no keys"),
    ([("seed", "1"), ("seed", "1")], "seed", "conflicting_parameters", "seed: given twice"),
    (
        [("helios[crf]", "1"), ("helios[crf]", "2")],
        "helios.crf",
        "conflicting_parameters",
        "helios[crf]: given twice; give it once",
    ),
    ([("frames", "33"), ("num_frames", "34")], "num_frames", "conflicting_parameters", "frames says 33"),
    ([("helios", "{}"), ("helios[crf]", "1")], "helios.crf", "conflicting_parameters", "comes in two forms"),
    ([("helios[crf]", "1"), ("helios", "{}")], "helios", "conflicting_parameters", "given twice"),
    ([("steps", "[2]"), ("steps[]", "1")], "steps", "conflicting_parameters", "comes in two forms"),
    ([("steps[]", "1"), ("steps[a]", "1")], "steps.a", "conflicting_parameters", "comes in two forms"),
    ([("prompts[]", "{}"), ("prompts[][chunk]", "1")], "prompts.chunk", "conflicting_parameters", "two forms"),
    (
        [("prompts[][prompt]", "a"), ("prompts[][prompt]", "b"), ("prompts[][chunk]", "2")],
        "prompts",
        "invalid_value",
        "prompts[][chunk]: 1 for 2 entries; give it for each, or prompts as a JSON string",
    ),
    ([("a[b][c][d][e]", "1")], "a.b.c.d.e", "invalid_value", "5 levels deep, at most 4"),
    ([("steps[][]", "1")], "steps", "invalid_value", "no field is a list of lists"),
    ([("helios[crf", "1")], "helios[crf", "invalid_value", "not a name; write field, field[key] or field[]"),
    ([("helios]crf[", "1")], "helios]crf[", "invalid_value", "not a name"),
    ([("helios[crf]x", "1")], "helios[crf]x", "invalid_value", "not a name"),
    ([("[helios]", "1")], "[helios]", "invalid_value", "not a name"),
    ([(f"metadata[{i}]", "") for i in range(MAX_FIELDS + 1)], None, "malformed_body", "more than 200 fields"),
    ([("", "1")], None, "malformed_body", "a part has no name"),
]


@pytest.mark.parametrize(("pairs", "param", "code", "fragment"), BAD, ids=lambda value: str(value)[:40])
def test_bad_form(
    parse: Callable[[Mapping[str, object]], ParsedRequest],
    pairs: list[Pair],
    param: str | None,
    code: str,
    fragment: str,
) -> None:
    given_names = {name.partition("[")[0] for name, _ in pairs}
    with pytest.raises(InvalidRequestError) as raised:
        parse(read_pairs(*pairs, *([] if given_names & {"prompt", "prompts"} else [("prompt", "p")])))
    assert (raised.value.param, raised.value.code) == (param, code), raised.value.message
    assert fragment in raised.value.message


BAD_RAW: list[tuple[bytes, str | None, str, str]] = [
    (b"", None, "malformed_body", "ends before its last boundary"),
    (part('name="prompt"', "p"), None, "malformed_body", "ends before its last boundary"),
    (part('name="prompt"', "p") + b"--xYz", None, "malformed_body", "ends before its last boundary"),
    (part('filename="a"', "p") + END, None, "malformed_body", "a part has no name"),
    (part('name="\xff"', "p").replace("\xff".encode(), b"\xff") + END, None, "malformed_body", "not UTF-8"),
    (b"--xYz\r\n\r\np\r\n" + END, None, "malformed_body", "a part has no name"),
    (part('name="prompt"', b"\xff\xfe") + END, "prompt", "invalid_value", "prompt: not UTF-8 text"),
    (part('name="prompt"; filename="p.txt"', "p") + END, "prompt", "invalid_value", "prompt: takes no file"),
    (part('name="helios[crf]"; filename="p"', "1") + END, "helios.crf", "invalid_value", "helios[crf]: takes no file"),
    (part('name="picture"; filename="p"', "1") + END, "picture", "unknown_parameter", "unknown parameter"),
    (part('name="image"; filename=""', "") + END, "image", "media_invalid", "image: the file is empty"),
    (part('name="image"; filename="a"', "GIF8") + END, "image", "media_invalid", "not a PNG, JPEG or WebP image"),
    (part('name="image[file_id]"; filename="a"', "GIF8") + END, "image.file_id", "invalid_value", "takes no file"),
    (
        part('name="prompt"\r\nContent-Transfer-Encoding: base64', "cA==") + END,
        "prompt",
        "invalid_value",
        'content-transfer-encoding "base64": send the bytes as they are',
    ),
    (
        part('name="image"; filename="a"', PNG) + part('name="first_frame"; filename="a"', PNG + b"1") + END,
        "first_frame",
        "conflicting_parameters",
        'image says "file of 13 bytes, application/octet-stream"',
    ),
    (
        part('name="image"; filename="a"', PNG) + part('name="image"; filename="a"', PNG) + END,
        "image",
        "conflicting_parameters",
        "image: given twice",
    ),
]


@pytest.mark.parametrize(("raw", "param", "code", "fragment"), BAD_RAW, ids=lambda value: str(value)[:40])
def test_bad_bytes(
    parse: Callable[[Mapping[str, object]], ParsedRequest], raw: bytes, param: str | None, code: str, fragment: str
) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse({"prompt": "p"} | read(raw))
    assert (raised.value.param, raised.value.code) == (param, code), raised.value.message
    assert fragment in raised.value.message


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=" + "b" * 5000])
def test_bad_boundary(content_type: str) -> None:
    with pytest.raises(InvalidRequestError, match="oundary") as raised:
        read(form(("prompt", "p")), content_type)
    assert raised.value.code == "malformed_body"


def test_a_form_of_the_largest_number_of_fields_is_read() -> None:
    assert read_pairs(*[("steps[]", "2")] * MAX_FIELDS) == {"steps": [2] * MAX_FIELDS}


@pytest.mark.parametrize(("name", "limit"), [("image", "MAX_IMAGE_BYTES"), ("video[video_url]", "MAX_VIDEO_BYTES")])
def test_a_file_above_its_limit_is_refused(
    parse: Callable[[Mapping[str, object]], ParsedRequest], name: str, limit: str
) -> None:
    max_bytes: int = getattr(media_input, limit)
    body = read(part(f'name="{name}"; filename="a"', bytes(max_bytes + 1)) + END, piece=1 << 16)
    with pytest.raises(InvalidRequestError, match="MiB are allowed") as raised:
        parse({"prompt": "p"} | body)
    assert (raised.value.param, raised.value.code) == (name.partition("[")[0], "media_invalid")


def test_json_cannot_bring_an_upload(parse: Callable[[Mapping[str, object]], ParsedRequest]) -> None:
    with pytest.raises(InvalidRequestError, match="must be a string"):
        parse({"prompt": "p", "image": {"image_url": {"data": "aa", "content_type": "image/png"}}})
