"""The continuous batcher on whole videos: packed like alone, bit-identical again, untouched by aborts, cached text."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helios_serve.config import ModelConfig
from helios_serve.errors import InvalidRequestError
from helios_serve.faults import NO_FAULTS, Fault, FaultPlan
from helios_serve.model_executor.batch import ChunkInput, ChunkState, NotFiniteError, ParkedChunk
from helios_serve.model_executor.conditioning import Conditioning
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.model_executor.packing import PackedBatch, PackedText, TextKV
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
    """One runner with everything that was made on it, by request; tasks have the names of their requests."""

    def __init__(self, model: HeliosModel, text_cache_bytes: int = 1 << 30, faults: FaultPlan = NO_FAULTS) -> None:
        self.encoder = EncoderWorker(model.text_encoder, model.vae)
        self.runner = Runner(model.transformer, model.rules, text_cache_bytes, faults)
        self.videos: dict[str, VideoRequest] = {}
        self.conditioning: dict[str, Conditioning] = {}
        self.made: dict[str, list[Tensor]] = {}
        self.failed: dict[str, Exception] = {}
        self.pack_sizes: list[int] = []

    def begin(self, video: VideoRequest) -> None:
        self.runner.join(self.encode(video))

    def encode(self, video: VideoRequest) -> ChunkInput:
        """The request's first chunk."""
        encoded = self.encoder.encode(video)
        name = video.request_id
        self.videos[name], self.conditioning[name], self.made[name] = video, encoded.conditioning, []
        return self.next_input(name, encoded.generator_state)

    def next_input(self, name: str, generator_state: bytes) -> ChunkInput:
        made, conditioning = self.made[name], self.conditioning[name]
        pinned = self.videos[name].pinned_chunk(len(made))
        history = conditioning.history.followed_by(made[-3:], None if pinned is None else made[pinned])
        return conditioning.chunk_input(name, name, len(made), history, generator_state)

    def step(self, names: Iterable[str] | None = None) -> StepResult:
        """One step; a finished chunk's successor joins at the next boundary."""
        result = self.runner.step(None if names is None else tuple(names))
        self.pack_sizes.extend(result.pack_sizes)
        self.failed.update(result.failed)
        for chunk in result.finished:
            name = chunk.task_id
            self.made[name].append(chunk.latents)
            if chunk.chunk + 1 < self.videos[name].params.num_chunks:
                self.runner.join(self.next_input(name, chunk.generator_state))
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
    assert (result.pack_sizes, result.finished) == ((3,), ())


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


@pytest.mark.parametrize(("task", "skips"), [(task, skips) for task in ("t2v", "i2v", "v2v") for skips in (0, 1)])
def test_what_a_chunk_sees_is_rebuilt_from_the_last_three(distilled: HeliosModel, task: str, skips: int) -> None:
    """The window over all frames so far, and the first frame that the reference pins."""
    bench = Bench(distilled)
    chunk = bench.encode(request("fox", task=task, num_frames=165, skip_first_chunk=bool(skips)))
    start = bench.conditioning["fox"].history
    for index in range(5):
        made = bench.made["fox"]
        assert torch.equal(chunk.history.frames, torch.cat((start.frames, *made), dim=1)[:, -19:])
        first = start.first if index == 0 or task != "t2v" else made[0][:, :1]
        if skips and index >= 2:
            first = made[1][:, :1]
        assert (chunk.history.first is None) == (first is None)
        assert first is None or torch.equal(chunk.history.first, first)
        bench.runner.join(chunk)
        while not (finished := bench.runner.step().finished):
            pass
        assert finished[0].latents.dtype == torch.float32
        made.append(finished[0].latents)
        chunk = bench.next_input("fox", finished[0].generator_state)


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
    start = bench.encode(request("fox"))
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


def test_text_in_use_is_found_whatever_the_limit(distilled: HeliosModel, projected: list[TextKV]) -> None:
    bench = Bench(distilled, text_cache_bytes=1)
    names = ("fox", "owl", "elk")
    for name in names:
        bench.begin(request(name, steps=(2, 2, 2)))
    for name in names:
        bench.begin(request(f"{name} again", prompt=name, seed=2))
    assert len(projected) == 3
    bench.finish()
    assert len(bench.runner._texts) == 1  # the one used last


def test_text_is_let_go_however_its_chunk_ends(distilled: HeliosModel) -> None:
    """Finished, parked, aborted, failed or never begun: nobody holds it any longer."""
    error = RuntimeError("out of luck")
    culprit = Fault(point="dit.step", action="raise", where={"request_id": "bad"}, times=9, error=error)
    bench = Bench(distilled, text_cache_bytes=1, faults=FaultPlan(culprit))
    for name in ("fox", "owl", "elk", "bad"):
        bench.begin(request(name, guidance_scale=3.0))
    bench.runner.park("owl")
    bench.runner.abort("elk")
    bench.finish()
    assert bench.failed == {"bad": error}
    chunk = dataclasses.replace(bench.encode(request("cod")), generator_state=b"short")
    with pytest.raises(RuntimeError, match="RNG state"):
        bench.runner.join(chunk)
    assert len(bench.runner._texts) == 1
    assert all(entry.num_users == 0 for entry in bench.runner._texts._entries.values())


def test_many_prompts_in_a_small_pool_make_the_same_videos(distilled: HeliosModel) -> None:
    names = ("fox", "owl", "elk", "cod")
    expected = {name: alone(distilled, request(name, num_frames=66)) for name in names}
    bench = Bench(distilled, text_cache_bytes=1)
    for name in names:
        bench.begin(request(name, num_frames=66))
        bench.step()
    for name, latents in bench.finish().items():
        assert_same(latents, expected[name])


# Steps without a forward

ZEROED = [((3, 2, 2), 1, 2), ((3, 2, 2), 0, 1), ((3, 2, 2), 5, 3), ((1, 2, 1), 1, 1)]
"""Steps, `zero_steps`, and how many steps are zeroed: one more than that, in the first stage."""


@pytest.mark.parametrize(("steps", "zero_steps", "num_zeroed"), ZEROED)
def test_zeroed_steps_need_no_forward_and_change_no_bit(
    mid: HeliosModel, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], zero_steps: int, num_zeroed: int
) -> None:
    video = request("fox", steps=steps, guidance_scale=5.0, use_zero_init=True, zero_steps=zero_steps, num_frames=66)
    bench = Bench(mid)
    bench.begin(video)
    made = bench.finish()["fox"]
    assert bench.pack_sizes == [2] * 2 * (sum(steps) - num_zeroed)

    needs_forward, advance = ChunkState.needs_forward.fget, ChunkState.advance  # type: ignore[attr-defined]
    predicted = []

    def throw_away(state: ChunkState, flows: list[Tensor]) -> None:
        predicted.append(len(flows))
        with monkeypatch.context() as patch:
            patch.setattr(ChunkState, "needs_forward", property(needs_forward))
            advance(state, flows if state.needs_forward else [])

    monkeypatch.setattr(ChunkState, "needs_forward", True)
    monkeypatch.setattr(ChunkState, "advance", throw_away)
    assert torch.equal(alone(mid, video), made)
    assert predicted == [2] * 2 * sum(steps)


def test_a_step_that_nobody_needs_a_forward_for_is_still_a_step(mid: HeliosModel) -> None:
    seen = []

    class Plan(FaultPlan):
        def at(self, point: str, **facts: object) -> bool:
            seen.append((facts["request_id"], facts["stage"], facts["step"], facts["num_chunks"]))
            return False

    bench = Bench(mid, faults=Plan())
    for name in ("fox", "owl"):
        bench.begin(request(name, steps=(3, 1, 1), guidance_scale=5.0, use_zero_init=True))
    for step in range(2):
        result = bench.step()
        assert [(name, cursor.stage, cursor.step) for name, cursor in result.steps] == [
            ("fox", 0, step),
            ("owl", 0, step),
        ]
        assert (result.pack_sizes, result.max_tokens) == ((), None)
    assert bench.step().pack_sizes == (4,)
    assert seen == [(name, 0, step, 2) for step in range(3) for name in ("fox", "owl")]


def test_a_pack_holds_those_who_need_a_forward(mid: HeliosModel) -> None:
    videos = [
        request("fox", steps=(3, 1, 1), guidance_scale=5.0, use_zero_init=True),
        request("owl", steps=(3, 1, 1), guidance_scale=5.0, seed=3),
        request("elk", steps=(3, 1, 1), seed=4),
    ]
    bench = Bench(mid)
    for video in videos:
        bench.begin(video)
    made = bench.finish()
    assert bench.pack_sizes == [3, 3, 5, 5, 5]
    for video in videos:
        assert_same(made[video.request_id], alone(mid, video))


def test_steps_without_a_forward_teach_no_limit(mid: HeliosModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(mid)
    bench.begin(request("idle", steps=(3, 1, 1), guidance_scale=5.0, use_zero_init=True))
    for name in ("fox", "owl"):
        bench.begin(request(name, steps=(3, 1, 1)))
    tokens = bench.runner._chunks["fox"].num_tokens
    assert bench.runner._chunks["idle"].num_tokens == 0
    device = SmallDevice(mid, monkeypatch, limit=tokens)
    result = bench.step()
    assert device.tried == [2 * tokens, tokens, tokens]
    assert (result.pack_sizes, result.max_tokens) == ((1, 1), tokens)
    assert {name for name, _ in result.steps} == {"idle", "fox", "owl"}


# Parking

PARKED = {
    "base": request("fox", width=48, height=32, steps=(5,), guidance_scale=5.0, num_frames=66),
    "mid": request("fox", steps=(2, 3, 2), guidance_scale=5.0, use_zero_init=True, num_frames=66),
    "distilled": request("fox", task="i2v", steps=(2, 1, 3), num_frames=66),
}


@pytest.mark.parametrize("variant", list(PARKED))
def test_a_chunk_parked_at_any_step_goes_on_bit_identically_elsewhere(
    variant: str, request: pytest.FixtureRequest
) -> None:
    model, video = request.getfixturevalue(variant), PARKED[variant]
    expected = alone(model, video)
    num_steps = sum(video.params.steps)
    for boundary in range(num_steps):
        here, there = Bench(model), Bench(model)
        here.begin(video)
        there.encode(video)
        for _ in range(num_steps + boundary):  # in the second chunk
            here.step()
        parked = here.runner.park("fox")
        assert here.runner.active == ()
        assert parked is not None
        assert sum(video.params.steps[: parked.cursor.stage]) + parked.cursor.step == boundary
        there.made["fox"] = here.made["fox"]
        moved: ParkedChunk = pickle.loads(pickle.dumps(parked))
        assert [tensor.dtype for tensor in moved.tensors()] == [tensor.dtype for tensor in parked.tensors()]
        there.runner.join(there.next_input("fox", b"not needed"), moved)
        assert torch.equal(there.finish()["fox"], expected)


def test_a_chunk_parked_twice_in_a_pack_leaves_its_mates_alone(distilled: HeliosModel) -> None:
    """Parking is as if the chunk had been left out of some packs."""
    bench = Bench(distilled)
    videos = [request(name, steps=(2, 2, 2)) for name in ("fox", "owl", "elk")]
    inputs = {video.request_id: bench.encode(video) for video in videos}
    for chunk in inputs.values():
        bench.runner.join(chunk)
    for _ in range(2):
        bench.step()
        parked = bench.runner.park("owl")
        bench.step()
        bench.runner.join(inputs["owl"], parked)
    made = bench.finish()
    for video in videos:
        assert_same(made[video.request_id], alone(distilled, video))


def test_parking_nobody_is_harmless(distilled: HeliosModel) -> None:
    assert Bench(distilled).runner.park("nobody") is None


@pytest.mark.parametrize("variant", list(PARKED))
def test_bfloat16_parks_with_its_dtypes(variant: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(f"tiny_{variant}")
    model = load_model(ModelConfig(model=str(path), dtype="bfloat16"))
    video = dataclasses.replace(PARKED[variant], params=dataclasses.replace(PARKED[variant].params, num_frames=33))
    expected = alone(model, video)
    assert expected.dtype == torch.float32
    for boundary in range(sum(video.params.steps)):
        bench = Bench(model)
        chunk = bench.encode(video)
        bench.runner.join(chunk)
        for _ in range(boundary):
            bench.step()
        bench.runner.join(chunk, pickle.loads(pickle.dumps(bench.runner.park("fox"))))
        assert torch.equal(bench.finish()["fox"], expected)


# Faults

TRIO = ("fox", "bad", "owl")


def trio(model: HeliosModel, *faults: Fault) -> tuple[Bench, dict[str, Tensor]]:
    """Three videos that share every forward, under faults."""
    bench = Bench(model, faults=FaultPlan(*faults))
    for name in TRIO:
        bench.begin(request(name, steps=(2, 2, 2)))
    return bench, bench.finish()


@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_chunk_that_is_not_finite_fails_alone_at_its_end(distilled: HeliosModel, step: int) -> None:
    _, expected = trio(distilled)
    bench, made = trio(distilled, Fault(point="dit.step", action="nan", where={"request_id": "bad", "step": step}))
    assert {name: type(error) for name, error in bench.failed.items()} == {"bad": NotFiniteError}
    assert bench.pack_sizes == [3] * 6
    assert sorted(made) == ["fox", "owl"]
    assert all(torch.equal(latents, expected[name]) for name, latents in made.items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("variant", list(ARRIVALS))
def test_one_bad_number_in_any_sampler_is_found(
    variant: str, value: float, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(variant)
    predict, calls = model.transformer.forward, []

    def spoil(batch: PackedBatch, text: PackedText) -> Tensor:
        flows = predict(batch, text).clone()
        calls.append(1)
        if len(calls) == 3:
            flows[0, 0] = value
        return flows

    monkeypatch.setattr(model.transformer, "forward", spoil)
    bench = Bench(model)
    bench.begin(PARKED[variant])
    bench.finish()
    assert isinstance(bench.failed["fox"], NotFiniteError)
    assert bench.runner.active == ()


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), InvalidRequestError("cannot be", param="prompt")])
def test_an_exception_ends_its_chunk_alone(distilled: HeliosModel, error: Exception) -> None:
    culprit = Fault(point="dit.step", action="raise", where={"request_id": "bad", "step": 2}, times=9, error=error)
    bench, made = trio(distilled, culprit)
    assert bench.failed == {"bad": error}
    assert bench.pack_sizes == [3, 3, 1, 1, 2, 2, 2]
    for name in ("fox", "owl"):
        assert_same(made[name], alone(distilled, request(name, steps=(2, 2, 2))))


def test_an_exception_that_does_not_come_again_ends_nobody(distilled: HeliosModel) -> None:
    bench, made = trio(distilled, Fault(point="dit.step", action="raise", where={"request_id": "bad", "step": 2}))
    assert bench.failed == {}
    assert bench.pack_sizes == [3, 3, 1, 1, 1, 3, 3, 3]
    assert sorted(made) == sorted(TRIO)


class SmallDevice:
    """A transformer that runs out of memory in forwards of more than `limit` tokens."""

    def __init__(self, model: HeliosModel, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        self.tried: list[int] = []
        predict = model.transformer.forward

        def forward(batch: PackedBatch, text: PackedText) -> Tensor:
            self.tried.append(batch.num_tokens)
            if batch.num_tokens > limit:
                raise torch.OutOfMemoryError(f"{batch.num_tokens} tokens do not fit")
            return predict(batch, text)

        monkeypatch.setattr(model.transformer, "forward", forward)


def test_a_pack_that_does_not_fit_is_halved_and_the_size_remembered(
    distilled: HeliosModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All five are done; later packs keep to what fitted and never run out of memory again."""
    videos = [request(name, steps=(9, 1, 1)) for name in ("fox", "owl", "elk", "cod", "bee")]
    expected = {video.request_id: alone(distilled, video) for video in videos}
    bench = Bench(distilled)
    for video in videos:
        bench.begin(video)
    tokens = bench.runner._chunks["fox"].num_tokens
    device = SmallDevice(distilled, monkeypatch, limit=2 * tokens)
    first = bench.step()
    # 5 do not fit; of the halves 3 do not, their halves 2 and 1 do, and so do the other 2
    assert device.tried == [5 * tokens, 3 * tokens, 2 * tokens, tokens, 2 * tokens]
    assert first.pack_sizes == (2, 1, 2)
    assert first.max_tokens == 2 * tokens
    assert len(first.steps) == 5
    device.tried.clear()
    second = bench.step()
    assert device.tried == [2 * tokens, 2 * tokens, tokens]
    assert second.max_tokens is None
    monkeypatch.undo()
    for name, latents in bench.finish().items():
        assert_same(latents, expected[name])
    assert bench.failed == {}


def test_a_chunk_that_does_not_fit_even_alone_fails_alone(
    distilled: HeliosModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(distilled)
    for video in (request("fox"), request("bad", width=256, height=256), request("owl")):
        bench.begin(video)
    tokens = {name: state.num_tokens for name, state in bench.runner._chunks.items()}
    device = SmallDevice(distilled, monkeypatch, limit=tokens["bad"] - 1)
    result = bench.step()
    assert [(name, type(error)) for name, error in result.failed] == [("bad", torch.OutOfMemoryError)]
    assert device.tried.count(tokens["bad"]) == 2  # once more after the cache was cleared
    assert {name for name, _ in result.steps} == {"fox", "owl"}
    assert sorted(bench.finish()) == ["fox", "owl"]


def test_memory_that_comes_back_costs_nothing(distilled: HeliosModel) -> None:
    passing = torch.OutOfMemoryError("for once")
    bench = Bench(distilled, faults=FaultPlan(Fault(point="dit.step", action="raise", error=passing, skip=1)))
    bench.begin(request("fox"))
    assert torch.equal(bench.finish()["fox"], alone(distilled, request("fox")))
    assert bench.failed == {}


def test_joining_is_tried_again_after_memory_ran_out(distilled: HeliosModel, monkeypatch: pytest.MonkeyPatch) -> None:
    embed, calls = distilled.transformer.embed_history, []

    def once(history: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("for once")
        return embed(history)  # type: ignore[arg-type]

    monkeypatch.setattr(distilled.transformer, "embed_history", once)
    bench = Bench(distilled)
    bench.begin(request("fox"))
    assert bench.runner.active == ("fox",)
    assert len(calls) == 2


def test_a_visit_says_which_step_it_is(distilled: HeliosModel) -> None:
    seen = []

    class Plan(FaultPlan):
        def at(self, point: str, **facts: object) -> bool:
            seen.append((point, *(facts[name] for name in ("request_id", "chunk", "stage", "step", "num_chunks"))))
            return False

    bench = Bench(distilled, faults=Plan())
    bench.begin(request("fox", steps=(2, 1, 1)))
    bench.finish()
    stages = (0, 0, 1, 2)
    assert seen == [("dit.step", "fox", 0, stage, step, 1) for step, stage in enumerate(stages)]
