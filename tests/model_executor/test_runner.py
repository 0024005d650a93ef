"""The continuous batcher on whole videos: packed like alone, bit-identical again, untouched by aborts, cached text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helios_serve.config import ModelConfig
from helios_serve.model_executor.conditioning import Conditioning
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.model_executor.packing import TextKV
from helios_serve.model_executor.prompt_schedule import PromptEmbedding
from helios_serve.model_executor.runner import Runner, StepResult
from helios_serve.types import Frames, PromptChange, SamplingParams, VideoRequest
from helios_serve.workers.encoder import EncoderWorker

MAX_ABS, MAX_RELATIVE = 2e-4, 2e-5


def request(name: str, *, task: str = "t2v", prompt: str | None = None, **options: object) -> VideoRequest:
    fields: dict[str, object] = {"width": 64, "height": 64, "num_frames": 33, "fps": 24, "seed": 1}
    params = SamplingParams(**{**fields, "steps": (1, 1, 1), "guidance_scale": 1.0, **options})  # type: ignore[arg-type]
    return VideoRequest(
        request_id=name,
        prompts=(PromptChange(chunk=0, prompt=name if prompt is None else prompt),),
        params=params,
        negative_prompt="blurry",
        image=_pictures(params, 1) if task == "i2v" else None,
        video=_pictures(params, 70) if task == "v2v" else None,
    )


def _pictures(params: SamplingParams, count: int) -> Frames:
    rng = np.random.default_rng(params.seed)
    data = np.repeat(rng.integers(0, 255, (count, params.height, params.width // 8, 3), dtype=np.uint8), 8, axis=2)
    return Frames(data=data.tobytes(), num_frames=count, height=params.height, width=params.width)


class Bench:
    """One runner with everything that was made on it, by request."""

    def __init__(self, model: HeliosModel, text_cache_bytes: int = 1 << 30) -> None:
        self.encoder = EncoderWorker(model.text_encoder, model.vae)
        self.runner = Runner(model.transformer, model.rules, text_cache_bytes)
        self.conditioning: dict[str, Conditioning] = {}
        self.made: dict[str, list[Tensor]] = {}
        self.pack_sizes: list[int] = []

    def begin(self, video: VideoRequest) -> None:
        conditioning = self.encoder.encode(video)
        self.conditioning[video.request_id] = conditioning
        self.made[video.request_id] = []
        self.runner.join(conditioning.chunk_input(video.request_id, 0, conditioning.continuation))

    def step(self, names: Iterable[str] | None = None) -> StepResult:
        """One step; a finished chunk's successor joins at the next boundary."""
        result = self.runner.step(None if names is None else tuple(names))
        self.pack_sizes.append(result.num_sequences)
        for chunk in result.finished:
            name, conditioning = chunk.request_id, self.conditioning[chunk.request_id]
            self.made[name].append(chunk.latents)
            if chunk.chunk + 1 < conditioning.params.num_chunks:
                self.runner.join(conditioning.chunk_input(name, chunk.chunk + 1, chunk.continuation))
        return result

    def finish(self) -> dict[str, Tensor]:
        while self.runner.active:
            self.step()
        return {name: torch.cat(chunks, dim=1) for name, chunks in self.made.items() if chunks}


def alone(model: HeliosModel, video: VideoRequest) -> Tensor:
    bench = Bench(model)
    bench.begin(video)
    return bench.finish()[video.request_id]


def together(model: HeliosModel, arrivals: Mapping[int, list[VideoRequest]]) -> tuple[dict[str, Tensor], list[int]]:
    """The latents of all requests, each joining at its step boundary, and the sequences of each forward."""
    bench = Bench(model)
    for boundary in range(max(arrivals) + 1):
        for video in arrivals.get(boundary, []):
            bench.begin(video)
        bench.step()
    return bench.finish(), bench.pack_sizes


def assert_same(ours: Tensor, right: Tensor) -> None:
    assert ours.shape == right.shape
    difference = (ours - right).double()
    assert difference.abs().max() <= MAX_ABS
    assert difference.norm() / right.double().norm() <= MAX_RELATIVE


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> HeliosModel:
    return load_model(ModelConfig(model=str(tiny_base)))


@pytest.fixture(scope="module")
def mid(tiny_mid: Path) -> HeliosModel:
    return load_model(ModelConfig(model=str(tiny_mid)))


@pytest.fixture(scope="module")
def distilled(tiny_distilled: Path) -> HeliosModel:
    return load_model(ModelConfig(model=str(tiny_distilled)))


ARRIVALS = {
    "base": {
        0: [request("fox", width=48, height=32, steps=(6,), guidance_scale=5.0)],
        1: [request("owl", task="i2v", width=32, height=64, steps=(4,), num_frames=66, skip_first_chunk=True)],
        2: [
            request("elk", task="v2v", width=80, height=48, steps=(3,), seed=9, video_noise_sigma_max=0.9),
            request("cod", width=48, height=32, steps=(1,), num_frames=99, guidance_scale=2.0),
        ],
        4: [request("bee", width=32, height=32, steps=(2,), num_frames=34, seed=2)],
    },
    "mid": {
        0: [request("fox", width=128, steps=(2, 1, 2), guidance_scale=5.0, use_zero_init=True)],
        1: [request("owl", task="i2v", steps=(1, 2, 1), num_frames=66, seed=4)],
        3: [
            request("elk", task="v2v", steps=(3, 1, 1), guidance_scale=3.0, use_zero_init=True, zero_steps=0),
            request("cod", height=128, steps=(1, 1, 1), num_frames=66, guidance_scale=2.0),
        ],
    },
    "distilled": {
        0: [request("fox", amplify_first_chunk=True, steps=(2, 2, 2), num_frames=66)],
        1: [request("owl", task="i2v", width=128, num_frames=99, skip_first_chunk=True)],
        2: [
            request("elk", task="v2v", steps=(2, 1, 3), seed=2**40, guidance_scale=5.0),
            request("cod", height=128, steps=(1, 2, 1), amplify_first_chunk=True),
        ],
        5: [request("bee", task="i2v", num_frames=34, image_noise_sigma_max=0.8), request("ant", seed=7)],
    },
}


@pytest.mark.parametrize("variant", list(ARRIVALS))
def test_packed_videos_equal_their_solo_runs(variant: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(variant)
    packed, pack_sizes = together(model, ARRIVALS[variant])
    videos = [video for batch in ARRIVALS[variant].values() for video in batch]
    assert len(videos) == len(packed) >= 4
    assert max(pack_sizes) >= 4
    for video in videos:
        assert_same(packed[video.request_id], alone(model, video))


def test_a_packed_step_mixes_stages_and_reports_each(distilled: HeliosModel) -> None:
    bench = Bench(distilled)
    bench.begin(request("fox", steps=(1, 2, 1)))
    bench.step()
    bench.begin(request("owl", guidance_scale=2.0))
    result = bench.step()
    assert [(name, cursor.stage, cursor.step) for name, cursor in result.steps] == [("fox", 1, 0), ("owl", 0, 0)]
    assert (result.num_sequences, result.finished) == (3, ())


@pytest.mark.parametrize("variant", list(ARRIVALS))
def test_the_same_videos_again_are_bit_identical(variant: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(variant)
    video = ARRIVALS[variant][1][0]
    assert torch.equal(alone(model, video), alone(model, video))
    one, _ = together(model, ARRIVALS[variant])
    other, _ = together(model, ARRIVALS[variant])
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_abort_leaves_the_others_bits_alone(distilled: HeliosModel) -> None:
    """Aborting is as if the request had only been left out of later packs."""

    def run(*, abort: bool) -> list[Tensor]:
        bench = Bench(distilled)
        for name in ("fox", "owl", "elk"):
            bench.begin(request(name, steps=(2, 2, 2), num_frames=66))
        for _ in range(3):
            bench.step()
        if abort:
            bench.runner.abort("owl")
            assert bench.runner.active == ("fox", "elk")
        while "fox" in bench.runner.active:
            bench.step(("fox", "elk"))
        assert bench.made["owl"] == []
        return [torch.cat(bench.made[name], dim=1) for name in ("fox", "elk")]

    assert all(torch.equal(one, other) for one, other in zip(run(abort=True), run(abort=False), strict=True))


def test_aborting_twice_or_nobody_is_harmless(distilled: HeliosModel) -> None:
    bench = Bench(distilled)
    bench.begin(request("fox"))
    for name in ("nobody", "fox", "fox"):
        bench.runner.abort(name)
    assert bench.runner.active == ()


def test_a_request_draws_from_its_own_generator(distilled: HeliosModel) -> None:
    """Equal seeds side by side make equal videos, and the process's generator is neither read nor moved."""
    videos = [request(name, prompt="twin", seed=5, num_frames=66) for name in ("one", "two")]
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    packed, _ = together(distilled, {0: videos[:1], 1: [request("noise", seed=6, num_frames=66)], 2: videos[1:]})
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    solo = alone(distilled, videos[0])
    assert_same(packed["one"], solo)
    assert_same(packed["two"], solo)
    assert (packed["noise"] - solo).abs().max() > 1e-2


def test_skip_first_chunk_pins_the_second_chunk(distilled: HeliosModel) -> None:
    video = request("fox", num_frames=132)
    for skips, pinned in ((False, [0, 0, 0, 0]), (True, [0, 1, 1, 1])):
        skipping = dataclasses.replace(video, params=dataclasses.replace(video.params, skip_first_chunk=skips))
        bench = Bench(distilled)
        bench.begin(skipping)
        firsts = []
        while bench.runner.active:
            for chunk in bench.step().finished:
                assert chunk.continuation.history.first is not None
                firsts.append(chunk.continuation.history.first)
        made = bench.made["fox"]
        assert all(torch.equal(first, made[at][:, :1]) for first, at in zip(firsts, pinned, strict=True))


@pytest.fixture
def projected(distilled: HeliosModel, monkeypatch: pytest.MonkeyPatch) -> list[TextKV]:
    """Every text projection that the transformer really makes."""
    made = list[TextKV]()
    project = distilled.transformer.project_text

    def record(embeds: Tensor) -> TextKV:
        made.append(project(embeds))
        return made[-1]

    monkeypatch.setattr(distilled.transformer, "project_text", record)
    return made


def run_prompts(bench: Bench, *prompts: str) -> list[Tensor]:
    made = []
    for index, prompt in enumerate(prompts):
        bench.begin(request(f"{index}", prompt=prompt))
        made.append(bench.finish()[f"{index}"])
    return made


def test_text_is_projected_once_per_prompt(distilled: HeliosModel, projected: list[TextKV]) -> None:
    bench = Bench(distilled)
    fox, owl, again = run_prompts(bench, "a fox", "an owl", "a fox")
    assert len(projected) == 2
    assert torch.equal(fox, again)
    assert (fox - owl).abs().max() > 1e-3
    bench.begin(request("long", prompt="an owl", num_frames=99, steps=(2, 2, 2)))
    bench.finish()
    assert len(projected) == 2


def test_text_is_kept_by_content_not_by_address(distilled: HeliosModel, projected: list[TextKV]) -> None:
    """The same memory with another content is another prompt; the same content elsewhere is the same one."""
    bench = Bench(distilled)
    conditioning = bench.encoder.encode(request("fox"))
    start = conditioning.chunk_input("fox", 0, conditioning.continuation)
    embeds = start.prompt.embeds.clone()
    results = []
    for key, scale in (("one", 1.0), ("two", -1.0), ("one", -1.0)):
        embeds *= scale
        bench.runner.join(dataclasses.replace(start, prompt=PromptEmbedding(key=key, embeds=embeds.clone())))
        while bench.runner.active:
            results.extend(chunk.latents for chunk in bench.runner.step().finished)
    assert len(projected) == 2
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_the_byte_limit_evicts_text(distilled: HeliosModel, projected: list[TextKV]) -> None:
    roomy = run_prompts(Bench(distilled), "a fox", "an owl", "a fox")
    num_bytes = projected[0].num_bytes
    projected.clear()
    tight = run_prompts(Bench(distilled, text_cache_bytes=2 * num_bytes - 1), "a fox", "an owl", "a fox")
    assert len(projected) == 3
    projected.clear()
    run_prompts(Bench(distilled, text_cache_bytes=2 * num_bytes), "a fox", "an owl", "a fox")
    assert len(projected) == 2
    assert all(torch.equal(one, other) for one, other in zip(roomy, tight, strict=True))


def test_text_in_use_survives_its_eviction(distilled: HeliosModel, projected: list[TextKV]) -> None:
    expected = alone(distilled, request("fox", steps=(2, 2, 2)))
    bench = Bench(distilled, text_cache_bytes=1)
    bench.begin(request("fox", steps=(2, 2, 2)))
    bench.step()
    bench.begin(request("owl"))
    bench.runner.abort("owl")
    assert torch.equal(bench.finish()["fox"], expected)
