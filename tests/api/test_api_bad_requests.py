"""Every bad request has its own answer: 400, the field as the client wrote it, a code, and what would be right."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from starlette.testclient import TestClient

URL = "/v1/videos/generations"
PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()


def _uri(data: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


VIDEO = _uri(b"frames=40")

Row = tuple[dict[str, Any], str, str, str]
# body without prompt, param, code, fragment of the message
ROWS: list[Row] = [
    (
        {"size": "650x384"},
        "size",
        "invalid_value",
        "size 650x384: both sides must be multiples of 64 for helios-distilled; nearest: 640x384, 704x384",
    ),
    (
        {"size": "1920x1088"},
        "size",
        "invalid_value",
        "size 1920x1088: at most 921600 pixels on this server; nearest: 1216x704, 1280x704",
    ),
    ({"size": "big"}, "size", "invalid_value", 'size "big": must be WIDTHxHEIGHT, like 640x384, or auto'),
    ({"size": 640}, "size", "invalid_value", "size 640: must be a string"),
    ({"size": "0x0"}, "size", "invalid_value", "size 0x0: both sides must be multiples of 64"),
    ({"width": 640}, "height", "missing_required_parameter", "height: required beside width"),
    ({"height": 384}, "width", "missing_required_parameter", "width: required beside height"),
    ({"width": 0, "height": 384}, "width", "invalid_value", "width 0: at least 1"),
    ({"width": 640, "height": 390}, "height", "invalid_value", "size 640x390: both sides must be multiples of 64"),
    ({"width": 1920, "height": 1088}, "width", "invalid_value", "size 1920x1088: at most 921600 pixels"),
    ({"width": 700, "height": 384}, "width", "invalid_value", "size 700x384: both sides must be multiples of 64"),
    (
        {"width": 704, "height": 384, "size": "640x384"},
        "size",
        "conflicting_parameters",
        "width and height say 704x384",
    ),
    ({"num_frames": 9000}, "num_frames", "invalid_value", "num_frames 9000: at most 7260 for this key"),
    ({"frames": 9000}, "frames", "invalid_value", "frames 9000: at most 7260 for this key"),
    ({"num_frames": 0}, "num_frames", "invalid_value", "num_frames 0: at least 1"),
    ({"num_frames": True}, "num_frames", "invalid_value", "num_frames true: must be an integer"),
    ({"num_frames": 33.5}, "num_frames", "invalid_value", "num_frames 33.5: must be an integer"),
    ({"num_frames": 33, "frames": 66}, "frames", "conflicting_parameters", "frames 66: num_frames says 33"),
    ({"seconds": "abc"}, "seconds", "invalid_value", 'seconds "abc": must be a number'),
    ({"seconds": -1}, "seconds", "invalid_value", "seconds -1: must be above 0"),
    ({"duration": 400}, "duration", "invalid_value", "duration 400: 9600 frames at 24 fps"),
    ({"seconds": 0.001}, "seconds", "invalid_value", "must give at least 1"),
    ({"fps": 0}, "fps", "invalid_value", "fps 0: at least 1"),
    ({"fps": 61}, "fps", "invalid_value", "fps 61: at most 60"),
    ({"fps": True}, "fps", "invalid_value", "fps true: must be a number"),
    ({"seed": -1}, "seed", "invalid_value", "seed -1: at least 0"),
    ({"seed": 2**63}, "seed", "invalid_value", "at most 9223372036854775807"),
    ({"guidence_scale": 2}, "guidence_scale", "unknown_parameter", "did you mean guidance_scale?"),
    (
        {"helios": {"guidence_scale": 2}},
        "helios.guidence_scale",
        "unknown_parameter",
        "helios.guidence_scale: unknown parameter; did you mean guidance_scale?",
    ),
    ({"extra_params": {"xyz": 1}}, "extra_params.xyz", "unknown_parameter", "extra_params.xyz: unknown parameter"),
    ({"helios": 3}, "helios", "invalid_value", "helios 3: must be an object"),
    (
        {"helios": {"steps": [2, 2]}},
        "helios.steps",
        "invalid_value",
        "helios.steps [2, 2]: helios-distilled needs 3 numbers, one per stage, each 1 to 100",
    ),
    ({"helios": {"steps": [2, 2, 101]}}, "helios.steps", "invalid_value", "each 1 to 100"),
    ({"helios": {"steps": [2, 2, True]}}, "helios.steps[2]", "invalid_value", "must be an integer"),
    ({"pyramid_steps": []}, "pyramid_steps", "invalid_value", "pyramid_steps []: helios-distilled needs 3 numbers"),
    ({"steps": 50}, "steps", "invalid_value", "steps 50: must be a list"),
    ({"num_inference_steps": 50}, "num_inference_steps", "invalid_value", "helios-distilled has 3 stages"),
    (
        {"steps": [2, 2, 2], "helios": {"pyramid_num_inference_steps_list": [1, 1, 1]}},
        "helios.pyramid_num_inference_steps_list",
        "conflicting_parameters",
        "steps says [2, 2, 2]",
    ),
    ({"guidance_scale": 0.5}, "guidance_scale", "invalid_value", "guidance_scale 0.5: at least 1"),
    ({"helios": {"guidance_scale": 21}}, "helios.guidance_scale", "invalid_value", "at most 20"),
    ({"profile": "fast"}, "profile", "invalid_value", 'profile "fast": must be quality or realtime'),
    ({"amplify_first_chunk": 1}, "amplify_first_chunk", "invalid_value", "must be true or false"),
    (
        {"helios": {"image_noise_sigma_min": 0.5}},
        "helios.image_noise_sigma_min",
        "invalid_value",
        "helios.image_noise_sigma_min 0.5: the maximum is 0.135",
    ),
    ({"video_noise_sigma_max": 0.1}, "video_noise_sigma_max", "invalid_value", "the minimum is 0.111"),
    ({"video_noise_sigma_max": 1.5}, "video_noise_sigma_max", "invalid_value", "at most 1"),
    ({"zero_steps": -1}, "zero_steps", "invalid_value", "zero_steps -1: at least 0"),
    ({"frame_policy": "cut"}, "frame_policy", "invalid_value", "must be trim, pad or reference"),
    ({"crf": 52}, "crf", "invalid_value", "crf 52: at most 51"),
    ({"image_fit": "zoom"}, "image_fit", "invalid_value", "must be crop or stretch"),
    ({"is_enable_stage2": False}, "is_enable_stage2", "invalid_value", "has 3 pyramid stages"),
    ({"pyramid_num_stages": 2}, "pyramid_num_stages", "invalid_value", "leave it out or give 3"),
    ({"reproducible": "always"}, "reproducible", "invalid_value", "must be strict"),
    ({"codec": "h265"}, "codec", "invalid_value", 'codec "h265": must be h264, vp9 or av1'),
    (
        {"output_format": "webm"},
        "output_format",
        "invalid_value",
        'output_format "webm": only mp4; for royalty-free video set codec to vp9 or av1',
    ),
    ({"response_format": "file"}, "response_format", "invalid_value", "must be url or b64_json"),
    ({"response_format": "b64_json", "num_frames": 727}, "response_format", "invalid_value", "727 frames, at most 726"),
    ({"n": 2}, "n", "invalid_value", "n 2: only 1; send one request per video"),
    ({"n": True}, "n", "invalid_value", "n true: must be an integer"),
    ({"n": 1, "num_outputs_per_prompt": True}, "num_outputs_per_prompt", "conflicting_parameters", "n says 1"),
    ({"stream": True, "async": True}, "async", "conflicting_parameters", "not beside stream"),
    ({"queue_timeout": 0}, "queue_timeout", "invalid_value", "above 0"),
    ({"callback_url": "http://a.example"}, "callback_url", "invalid_value", "must be an https URL"),
    ({"webhook_url": "https://127.0.0.1/hook"}, "webhook_url", "invalid_value", "not public"),
    ({"expires_after": {"seconds": 5}}, "expires_after", "invalid_value", "must be 3600 to 604800 seconds"),
    ({"user": "u" * 257}, "user", "invalid_value", "at most 256 characters"),
    ({"metadata": {"a": 1}}, "metadata.a", "invalid_value", "must be a string"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "invalid_value", "at most 16 entries"),
    ({"metadata": {"k" * 65: ""}}, "metadata", "invalid_value", "must have 1 to 64 characters"),
    ({"prompt": ""}, "prompt", "invalid_value", "at least 1 character"),
    ({"prompt": "p" * 32_001}, "prompt", "invalid_value", "at most 32000 characters"),
    ({"prompt": 5}, "prompt", "invalid_value", "prompt 5: must be a string"),
    ({"prompt": None}, "prompt", "missing_required_parameter", "prompt: required"),
    ({"negative_prompt": "p" * 32_001}, "negative_prompt", "invalid_value", "at most 32000 characters"),
    ({"image": "https://a.example/x.png"}, "image", "media_url_forbidden", "addresses are not fetched"),
    ({"image": [1]}, "image", "invalid_value", "image [1]: must be a string, or an object with image_url"),
    ({"video_url": 7}, "video_url", "invalid_value", "video_url 7: must be a string, or an object with video_url"),
    ({"keep_first_frame": False}, "keep_first_frame", "unsupported_parameter", "the first frame is always kept"),
    ({"latents": [1]}, "latents", "unsupported_parameter", "latents: initial noise comes from seed"),
    ({"video_latents": [1]}, "video_latents", "unsupported_parameter", "latents are not taken; give video"),
    ({"num_videos_per_prompt": 2}, "num_videos_per_prompt", "unsupported_parameter", "send several requests"),
    ({"helios": {"sigmas": [1]}}, "helios.sigmas", "unsupported_parameter", "steps says how many"),
    ({"max_sequence_length": 226}, "max_sequence_length", "unsupported_parameter", "always have 512 tokens"),
    ({"": 1}, "", "unknown_parameter", '"": unknown parameter'),
    ({"a\nb": 1}, "a\nb", "unknown_parameter", '"a\\nb": unknown parameter'),
    ({"prompt": ["p", "q"]}, "prompt", "invalid_value", 'prompt ["p", "q"]: must be a string'),
    ({"first_frame": "file:///etc/passwd"}, "first_frame", "media_url_forbidden", "first_frame file"),
    ({"image": "AAAA"}, "image", "media_invalid", "must be a data: URI"),
    ({"image": "data:image/png,abc"}, "image", "media_invalid", "must be base64"),
    ({"image": "data:image/png;base64,$$$"}, "image", "media_invalid", "not valid base64"),
    ({"image_url": _uri(b"GIF8")}, "image_url", "media_invalid", "not a PNG, JPEG or WebP image"),
    ({"input_reference": {"file_id": "f"}}, "input_reference.file_id", "unsupported_parameter", "send a data: URI"),
    (
        {"input_reference": {"imageurl": "f"}},
        "input_reference.imageurl",
        "unknown_parameter",
        "did you mean image_url?",
    ),
    ({"input_reference": {}}, "input_reference", "missing_required_parameter", "image_url is missing"),
    ({"image": PNG, "first_frame": PNG + "AA"}, "first_frame", "conflicting_parameters", "image says"),
    ({"image": PNG, "video": VIDEO}, "video", "conflicting_parameters", "not together with image"),
    ({"video": _uri(b"frames=20")}, "video", "media_invalid", "video: 20 frames, at least 33 are needed"),
    ({"video_url": _uri(b"frames=1453")}, "video_url", "media_invalid", "1453 frames, at most 1452"),
    ({"video": _uri(b"junk")}, "video", "media_invalid", "not an MP4 or WebM video"),
    ({"video": {"id": "video_1"}}, "video.id", "unsupported_parameter", "stored files are not offered"),
    ({"prompts": []}, "prompts", "invalid_value", "prompts: 0 entries, must be 1 to 64"),
    ({"prompts": "x"}, "prompts", "invalid_value", "must be a list"),
    ({"prompts": [{"chunk": 0}]}, "prompts[0].prompt", "missing_required_parameter", "prompts[0].prompt: required"),
    ({"prompts": [{"chunk": 1, "prompt": "p"}]}, "prompts[0].chunk", "invalid_value", "must start at 0"),
    ({"prompts": [{"prompt": "p", "chnk": 0}]}, "prompts[0].chnk", "unknown_parameter", "did you mean chunk?"),
    (
        {"prompts": [{"chunk": 0, "prompt": "p"}, {"chunk": 6, "prompt": "q"}]},
        "prompts[1].chunk",
        "invalid_value",
        "prompts[1].chunk 6: the video has 4 chunks, 0 to 3",
    ),
    (
        {"prompts": [{"chunk": 0, "prompt": "p"}, {"chunk": 2, "prompt": "q"}, {"chunk": 2, "prompt": "r"}]},
        "prompts[2].chunk",
        "invalid_value",
        "must come after chunk 2",
    ),
    (
        {"prompts": [{"chunk": 0, "prompt": "p"}, {"start_seconds": 9, "prompt": "q"}]},
        "prompts[1].start_seconds",
        "invalid_value",
        "the video has 4 chunks",
    ),
    (
        {"prompts": [{"prompt": "p"}, {"prompt": "q"}]},
        "prompts[1].chunk",
        "missing_required_parameter",
        "start_seconds",
    ),
    (
        {"prompts": [{"prompt": "p", "chunk": 0, "start_seconds": 0}]},
        "prompts[0]",
        "conflicting_parameters",
        "two names of one moment",
    ),
    (
        {"prompts": [{"prompt": "p", "transition_chunks": -1}]},
        "prompts[0].transition_chunks",
        "invalid_value",
        "at least 0",
    ),
    ({"prompt": "x", "prompts": [{"prompt": "p"}]}, "prompt", "conflicting_parameters", "prompts[0].prompt"),
]


@pytest.mark.parametrize(("body", "param", "code", "fragment"), ROWS, ids=lambda value: str(value)[:40])
def test_bad_request(client: TestClient, body: dict[str, Any], param: str, code: str, fragment: str) -> None:
    default = {} if "prompts" in body else {"prompt": "p"}
    answer = client.post(URL, json=default | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code), error["message"]
    assert fragment in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert client.post(URL, json={"prompt": "good", "num_frames": 1}).status_code == 200


def test_unknown_key_is_named_before_what_it_left_missing(client: TestClient) -> None:
    error = client.post(URL, json={"promt": "a lighthouse"}).json()["error"]
    assert error["param"] == "promt"
    assert error["message"] == "promt: unknown parameter; did you mean prompt?"


def test_no_name_is_guessed_from_afar(client: TestClient) -> None:
    error = client.post(URL, json={"prompt": "p", "style": "noir"}).json()["error"]
    assert error["message"] == "style: unknown parameter"


def test_unknown_model_is_404(client: TestClient) -> None:
    answer = client.post(URL, json={"prompt": "p", "model": "sora-2"})
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": 'model "sora-2": not served here; served: helios-distilled',
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert client.post(URL, json={"prompt": "p", "model": "org/Helios-Distilled"}).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    ],
    ids=lambda raw: raw[:20].decode("latin-1"),
)
def test_malformed_body(client: TestClient, raw: bytes) -> None:
    answer = client.post(URL, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "malformed_body"


@pytest.mark.parametrize("depth", [100, 300, 900, 980])
def test_deep_values_are_refused(client: TestClient, depth: int) -> None:
    raw = '{"prompt": "p", "seed": ' + "[" * depth + "]" * depth + "}"
    answer = client.post(URL, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text


def test_infinite_numbers_are_refused(client: TestClient) -> None:
    raw = '{"prompt": "p", "fps": 1e999}'
    answer = client.post(URL, content=raw, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "fps")
    assert "finite" in answer.json()["error"]["message"]
