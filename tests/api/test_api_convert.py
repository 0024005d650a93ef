"""What a request becomes: defaults from the checkpoint, aliases, warnings, schedules, sizes."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import pytest

from helios_serve.api.convert import Limits, ParsedRequest, new_video_id, parse_generation
from helios_serve.api.media_input import DataUriSource, Media, MediaDecoder
from helios_serve.api.sizes import nearest_sizes
from helios_serve.errors import InvalidRequestError
from helios_serve.types import ModelInfo, PromptChange

PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
VIDEO = "data:video/mp4;base64," + base64.b64encode(b"frames=40").decode()


@pytest.fixture
def base(model: ModelInfo) -> ModelInfo:
    return replace(
        model,
        name="helios-base",
        variant="base",
        num_stages=1,
        size_multiple=16,
        default_steps=(50,),
        default_guidance_scale=5.0,
    )


@pytest.fixture
def mid(model: ModelInfo) -> ModelInfo:
    return replace(
        model,
        name="helios-mid",
        variant="mid",
        guidance="cfg_zero_star",
        default_steps=(20, 20, 20),
        default_guidance_scale=5.0,
    )


class Parse:
    def __init__(self, decoder: MediaDecoder) -> None:
        self._media = Media(source=DataUriSource(), decoder=decoder)

    def __call__(self, model: ModelInfo, **body: Any) -> ParsedRequest:
        return parse_generation({"prompt": "p"} | body, model, self._media, Limits())


@pytest.fixture
def parse(decoder: MediaDecoder) -> Parse:
    return Parse(decoder)


def _warned(parsed: ParsedRequest) -> list[str]:
    return [warning.param for warning in parsed.warnings]


def test_distilled_defaults(parse: Parse, model: ModelInfo) -> None:
    parsed = parse(model)
    params = parsed.request.params
    assert (params.width, params.height, params.num_frames, params.fps) == (640, 384, 132, 24.0)
    assert (params.steps, params.guidance_scale) == ((2, 2, 2), 1.0)
    assert params.amplify_first_chunk
    assert not params.skip_first_chunk
    assert not params.use_zero_init
    assert params.zero_steps == 1
    assert (params.image_noise_sigma_min, params.video_noise_sigma_max) == (0.111, 0.135)
    assert (params.frame_policy, params.image_fit, params.crf, params.codec) == ("trim", "crop", 23, "h264")
    assert 0 <= params.seed < 2**32
    assert (parsed.response_format, parsed.detach, parsed.warnings) == ("url", False, ())
    assert parsed.request.service_class == "offline"
    assert parse(model).request.params.seed != params.seed


def test_a_strict_request_shares_no_forward(parse: Parse, model: ModelInfo) -> None:
    assert parse(model, reproducible="strict").request.is_strict
    assert not parse(model).request.is_strict


def test_mid_and_base_defaults(parse: Parse, mid: ModelInfo, base: ModelInfo) -> None:
    params = parse(mid).request.params
    assert (params.steps, params.guidance_scale, params.use_zero_init, params.zero_steps) == (
        (20, 20, 20),
        5.0,
        True,
        1,
    )
    assert not params.amplify_first_chunk
    params = parse(base, size="656x400").request.params
    assert (params.steps, params.guidance_scale, params.use_zero_init) == ((50,), 5.0, False)


@pytest.mark.parametrize(
    ("body", "steps", "warned"),
    [
        ({"profile": "realtime"}, (1, 1, 1), []),
        ({"profile": "quality", "service_class": "realtime"}, (2, 2, 2), []),
        ({"service_class": "realtime"}, (1, 1, 1), []),
        ({"steps": [3, 2, 1]}, (3, 2, 1), []),
        ({"profile": "realtime", "steps": [3, 2, 1]}, (3, 2, 1), ["profile"]),
        ({"service_class": "realtime", "steps": [3, 2, 1]}, (3, 2, 1), []),
        ({"extra_body": {"pyramid_num_inference_steps_list": [4, 4, 4]}}, (4, 4, 4), []),
        ({"sampling_params": {"pyramid_steps": [4, 4, 4], "num_frames": 66, "seed": 7}}, (4, 4, 4), []),
        ({"steps": [2, 2, 2], "helios": {"steps": [2, 2, 2]}}, (2, 2, 2), []),
        ({"is_enable_stage2": True, "pyramid_num_stages": 3}, (2, 2, 2), []),
    ],
)
def test_steps(parse: Parse, model: ModelInfo, body: dict[str, Any], steps: tuple[int, ...], warned: list[str]) -> None:
    parsed = parse(model, **body)
    assert parsed.request.params.steps == steps
    assert _warned(parsed) == warned


def test_steps_of_one_stage(parse: Parse, base: ModelInfo, mid: ModelInfo) -> None:
    assert parse(base, num_inference_steps=7).request.params.steps == (7,)
    assert parse(base, num_inference_steps=7, steps=[7]).request.params.steps == (7,)
    with pytest.raises(InvalidRequestError, match=r"num_inference_steps 7: steps says \[8\]"):
        parse(base, num_inference_steps=7, steps=[8])
    with pytest.raises(InvalidRequestError, match=r"steps \[2, 2, 2\]: helios-base needs 1 number, 1 to 100"):
        parse(base, steps=[2, 2, 2])
    parsed = parse(mid, profile="realtime")
    assert parsed.request.params.steps == (20, 20, 20)
    assert _warned(parsed) == ["profile"]


def test_values_without_effect_are_listed(parse: Parse, model: ModelInfo, mid: ModelInfo, base: ModelInfo) -> None:
    assert _warned(parse(model, negative_prompt="blurry")) == ["negative_prompt"]
    assert _warned(parse(mid, negative_prompt="blurry")) == []
    assert _warned(parse(mid, negative_prompt="blurry", guidance_scale=1)) == ["negative_prompt"]
    assert _warned(parse(model, num_frames=33, duration="2.5")) == ["duration"]
    assert _warned(parse(model, size="704x384")) == ["size"]
    assert _warned(parse(model, helios={"image_fit": "stretch", "video_noise_sigma_min": 0})) == [
        "helios.image_fit",
        "helios.video_noise_sigma_min",
    ]
    assert _warned(parse(model, helios={"image_fit": "stretch"}, image=PNG)) == []
    parsed = parse(model, guidance_scale=2)
    assert parsed.request.params.uses_guidance
    assert "costs twice, not what the checkpoint was trained for" in parsed.warnings[0].message
    parsed = parse(base, is_amplify_first_chunk=True, use_zero_init=True, zero_steps=2)
    assert sorted(_warned(parsed)) == ["is_amplify_first_chunk", "use_zero_init", "zero_steps"]
    assert not parsed.request.params.amplify_first_chunk
    assert not parsed.request.params.use_zero_init


def test_zero_init_needs_guidance(parse: Parse, mid: ModelInfo) -> None:
    assert not parse(mid, guidance_scale=1).request.params.use_zero_init
    assert _warned(parse(mid, guidance_scale=1, use_zero_init=True)) == ["use_zero_init"]
    assert not parse(mid, use_zero_init=False).request.params.use_zero_init
    assert parse(mid, zero_steps=0).request.params.zero_steps == 0
    assert _warned(parse(mid, use_zero_init=False, zero_steps=3)) == ["zero_steps"]


@pytest.mark.parametrize(
    ("body", "num_frames"),
    [
        ({"seconds": 5.5}, 132),
        ({"seconds": "7"}, 168),
        ({"duration": 2, "fps": 16}, 32),
        ({"seconds": 0.1, "fps": 25}, 3),
        ({"frames": 5, "seconds": 9}, 5),
        ({"seconds": 302.5}, 7260),
    ],
)
def test_length(parse: Parse, model: ModelInfo, body: dict[str, Any], num_frames: int) -> None:
    assert parse(model, **body).request.params.num_frames == num_frames


def test_false_and_zero_are_values(parse: Parse, model: ModelInfo) -> None:
    params = parse(model, seed=0, crf=0, amplify_first_chunk=False, video_noise_sigma_min=0.0, image=PNG).request.params
    assert (params.seed, params.crf, params.amplify_first_chunk, params.video_noise_sigma_min) == (0, 0, False, 0.0)


def test_nulls_are_absent_and_off_values_accepted(parse: Parse, model: ModelInfo) -> None:
    body: dict[str, Any] = {"stream": False, "async": False, "priority": 0, "partial_images": 3, "n": 1, "seed": None}
    body |= {"expires_after": {"seconds": 86400}, "webhook_url": None, "image": None, "helios": None, "fps": 24}
    assert _warned(parse(model, **body)) == []


def test_waiting_and_keeping(parse: Parse, model: ModelInfo) -> None:
    parsed = parse(model)
    assert (parsed.request.priority, parsed.queue_timeout_s) == (0, None)
    assert (parsed.webhook_url, parsed.expires_after_s) == (None, None)
    parsed = parse(model, priority=-2, queue_timeout=1.5, callback_url="https://a.example/hook", expires_after=7200)
    assert (parsed.request.priority, parsed.queue_timeout_s) == (-2, 1.5)
    assert (parsed.webhook_url, parsed.expires_after_s) == ("https://a.example/hook", 7200)
    assert parse(model, expires_after={"seconds": 3600}).expires_after_s == 3600
    assert _warned(parsed) == []


def test_size_auto_follows_the_image(parse: Parse, model: ModelInfo) -> None:
    """The image has 1920x1080; of the sizes within the checkpoint's pixels, the one that is nearest to its shape."""
    params = parse(model, size="auto", image=PNG).request.params
    assert params.width % 64 == params.height % 64 == 0
    assert params.width * params.height <= model.max_pixels
    assert abs(params.width / params.height - 16 / 9) < 0.1


def test_media(parse: Parse, model: ModelInfo) -> None:
    request = parse(model, image=PNG, size="704x384").request
    assert request.task == "i2v"
    assert request.image is not None
    assert (request.image.width, request.image.height) == (704, 384)
    assert parse(model, input_reference={"image_url": PNG}).request.task == "i2v"
    request = parse(model, video_reference={"video_url": VIDEO}).request
    assert request.task == "v2v"
    assert request.video is not None
    assert request.video.num_frames == 40


def test_media_beyond_its_limit_is_refused_unread(parse: Parse, model: ModelInfo) -> None:
    with pytest.raises(InvalidRequestError, match=r"image: 2[01]\.\d MiB, at most 20 MiB") as caught:
        parse(model, image="data:image/png;base64," + "A" * (28 * 2**20))
    assert caught.value.code == "media_invalid"


def test_prompt_schedule(parse: Parse, model: ModelInfo) -> None:
    schedule = [
        {"prompt": "p"},
        {"prompt": "q", "start_seconds": 1.375, "transition_chunks": 0},
        {"prompt": "r", "chunk": 3},
    ]
    request = parse(model, prompts=schedule, prompt="p").request
    assert request.prompts == (
        PromptChange(chunk=0, prompt="p", transition_chunks=2),
        PromptChange(chunk=1, prompt="q", transition_chunks=0),
        PromptChange(chunk=3, prompt="r", transition_chunks=2),
    )
    many = [{"prompt": "p", "chunk": chunk} for chunk in range(65)]
    with pytest.raises(InvalidRequestError, match="65 entries, must be 1 to 64"):
        parse(model, prompts=many, num_frames=7260)


def test_a_chunk_boundary_in_seconds_is_that_chunk(parse: Parse, model: ModelInfo) -> None:
    for fps in (7, 16, 23.976, 24, 59.94):
        for chunk in range(1, 40):
            schedule = [{"prompt": "p"}, {"prompt": "q", "start_seconds": chunk * 33 / fps}]
            request = parse(model, prompts=schedule, num_frames=40 * 33, fps=fps).request
            assert request.prompts[1].chunk == chunk


def test_nearest_sizes_are_valid_and_near(model: ModelInfo) -> None:
    for width, height in ((650, 384), (1920, 1088), (1, 1), (1, 100_000), (100_000, 1), (384, 641), (999_999, 999_999)):
        sizes = nearest_sizes(width, height, model)
        assert 1 <= len(sizes) <= 2
        for w, h in sizes:
            assert w % 64 == h % 64 == 0
            assert 0 < w * h <= model.max_pixels
    assert nearest_sizes(384, 641, model) == [(384, 640), (384, 704)]
    tiny = replace(model, size_multiple=64, recommended_sizes=((128, 64),), max_pixels=128 * 64)
    assert nearest_sizes(640, 384, tiny) == [(128, 64), (64, 64)]


def test_size_auto_without_image_is_the_default(parse: Parse, model: ModelInfo) -> None:
    params = parse(model, size="auto").request.params
    assert (params.width, params.height) == (640, 384)
    params = parse(model, width=704, height=384, size="704x384").request.params
    assert (params.width, params.height) == (704, 384)


def test_video_ids_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for millisecond in (1, 2, 1_795_186_776_000, 1_795_186_776_001):
        monkeypatch.setattr("time.time_ns", lambda now=millisecond: now * 1_000_000)
        ids.append(new_video_id())
    assert ids == sorted(ids)
    assert all(len(video_id) == len("video_") + 26 for video_id in ids)
