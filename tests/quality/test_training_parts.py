"""The training of the small checkpoint learns what is served: the same flow, the same noise, the same places."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from helios_serve.config import ModelConfig
from helios_serve.model_executor.history import History
from helios_serve.model_executor.model import load_model
from helios_serve.model_executor.packing import TokenSequence, pack, unpack
from helios_serve.model_executor.sampling.pyramid import block_noise
from helios_serve.model_executor.sampling.schedule import Renoise
from tools.tiny_checkpoint import pictures, stages
from tools.tiny_checkpoint.batched_flow import Past, TextBatch, batched_flow
from tools.tiny_checkpoint.captions import ATTRIBUTES, SYNONYMS, caption, full_caption
from tools.tiny_checkpoint.kept_vae import FLOW_FILE, best_vae
from tools.tiny_checkpoint.latents import LATENTS_FILE, ClipStore
from tools.tiny_checkpoint.plans import Plan, Planner
from tools.tiny_checkpoint.presets import PRESETS, Preset
from tools.tiny_checkpoint.progress import Run
from tools.tiny_checkpoint.render import render_chunks
from tools.tiny_checkpoint.scorer import read_frames
from tools.tiny_checkpoint.supervision import _places
from tools.tiny_checkpoint.train_flow import (
    _DECODER_RATE,
    FlowModel,
    Lesson,
    _further_pace,
    _pace,
    distilled_scheduler,
    train_flow,
    usable_flow,
)
from tools.tiny_checkpoint.train_vae import VAE_FILE, decode, new_vae, posterior, train_vae
from tools.tiny_checkpoint.vocabulary import Vocabulary
from tools.tiny_checkpoint.world import CHUNKS_PER_CLIP, COLOURS, HEIGHT, WIDTH, draw_clip, draw_scene

CPU = torch.device("cpu")
RECORDED_LOSSES = {
    "vae": {"l1": 0.696217, "l2": 0.670787, "kl": 1.590363},
    "flow": {
        "stage0": 1.204044,
        "stage1": 0.748779,
        "stage2": 0.93395,
        "window2": 1.217512,
        "whole2": 1.132829,
        "shape2": 0.219482,
        "words0": 1.73901,
    },
}
"""Means over the 20 steps of the fixture's trainings in float32; the first five of the flow's are words alone."""


@pytest.fixture(scope="module")
def model(preset: Preset) -> FlowModel:
    torch.manual_seed(0)
    model = FlowModel(preset.flow, Vocabulary.new())
    for parameter in model.parameters():  # nothing that begins at zero stays hidden
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def test_batched_flow_is_the_flow_that_is_served(model: FlowModel) -> None:
    generator = torch.Generator().manual_seed(1)
    past = Past(
        frames=_randn(2, 16, 19, 8, 16, generator=generator), first=_randn(2, 16, 1, 8, 16, generator=generator)
    )
    x, timesteps = _randn(2, 16, 9, 4, 8, generator=generator), torch.tensor((742.0, 385.0))
    captions = ("a red circle moving left", "blue")
    with torch.no_grad():
        text = model.embed(*model.vocabulary.tokens(captions))
        batched = batched_flow(model.transformer, x, timesteps, past, text).flow
        packed = _packed_flow(model, x, timesteps, past, text)
    assert (batched - packed).abs().max() < 2e-5 * packed.abs().max()


@pytest.mark.quality
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (g++)")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
def test_compiled_flow_is_the_same(model: FlowModel) -> None:
    generator = torch.Generator().manual_seed(2)
    past = Past(
        frames=_randn(2, 16, 19, 8, 16, generator=generator), first=_randn(2, 16, 1, 8, 16, generator=generator)
    )
    x, timesteps = _randn(2, 16, 9, 2, 4, generator=generator), torch.tensor((998.0, 833.0))
    with torch.no_grad():
        text = model.embed(*model.vocabulary.tokens(("a red circle moving left", "blue")))
    found = {}
    for is_compiled in (False, True):
        predicted = batched_flow(model.transformer, x, timesteps, past, text, is_compiled=is_compiled)
        model.zero_grad(set_to_none=True)
        (predicted.flow.square().sum() + predicted.middle.square().sum()).backward()
        gradients = {name: p.grad for name, p in model.transformer.named_parameters() if p.grad is not None}
        found[is_compiled] = {"flow": predicted.flow.detach()} | gradients
    model.zero_grad(set_to_none=True)
    assert found[True].keys() == found[False].keys()
    for name, value in found[False].items():
        assert (found[True][name] - value).abs().max() <= 1e-4 * value.abs().max(), name


def _packed_flow(model: FlowModel, x: Tensor, timesteps: Tensor, past: Past, text: TextBatch) -> Tensor:
    transformer, sequences = model.transformer, []
    for index in range(len(x)):
        embeds = torch.zeros(512, text.embeds.shape[-1])
        embeds[: text.embeds.shape[1]] = text.embeds[index]
        sequences.append(
            TokenSequence(
                history=transformer.embed_history(History(frames=past.frames[index], first=past.first[index])),
                x=x[index],
                rotary=transformer.current_rotary((9, 2, 4)),
                timestep=float(timesteps[index]),
                text=transformer.project_text(embeds),
            )
        )
    batch, packed_text = pack(sequences, transformer.patch)
    return torch.stack(unpack(transformer(batch, packed_text), batch, transformer.patch))


def test_everything_is_reached_by_gradients(model: FlowModel) -> None:
    past = Past(frames=torch.randn(1, 16, 19, 8, 16), first=torch.randn(1, 16, 1, 8, 16))
    text = model.embed(*model.vocabulary.tokens(("a red circle moving left",)))
    predicted = batched_flow(model.transformer, torch.randn(1, 16, 9, 8, 16), torch.tensor((384.0,)), past, text)
    told = model.middle_reader.read(predicted.middle)
    (predicted.flow.sum() + told.sum() + model.word_loss(text, torch.zeros(1, 12, dtype=torch.long))).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad(set_to_none=True)
    assert without == []


def test_vae_with_gradients_is_the_vae_that_is_served(preset: Preset) -> None:
    torch.manual_seed(0)
    vae = new_vae(preset.vae)
    with torch.no_grad():
        frames = torch.rand(1, 3, 9, 16, 16) * 2 - 1
        mean, _ = posterior(vae, frames)
        torch.testing.assert_close(mean, vae.encode(frames)[0])
        torch.testing.assert_close(decode(vae, mean).clamp(-1, 1), vae.decode(mean), atol=1e-5, rtol=1e-4)


def test_the_kept_vae_shows_what_it_was_shown(tmp_path: Path) -> None:
    vae = best_vae(PRESETS["cpu"].vae, tmp_path)
    clips = [draw_clip(7, index) for index in range(12)]
    right = []
    for clip in clips:
        with torch.no_grad():
            pixels = vae.decode(vae.encode(render_chunks([clip], 0))[0])[0]
        reading = read_frames(((pixels.permute(1, 2, 3, 0).numpy() + 1) * 127.5).round().astype(np.uint8))
        asked = clip.scenes[0].attributes
        right.append([getattr(reading, name) == asked[name] for name in ("colour", "shape", "direction", "background")])
    assert (np.mean(right, axis=0) >= (0.9, 0.7, 0.9, 1.0)).all(), np.mean(right, axis=0)


def test_stage_noise_has_the_covariance_of_the_sampler() -> None:
    ours = stages._block_noise(torch.Size((1, 16, 9, 64, 64)), torch.Generator().manual_seed(0))[0]
    theirs = block_noise((16, 9, 128, 128), (1, 2, 2), 1 / 3, torch.Generator().manual_seed(1))
    assert (_block_covariance(ours) - _block_covariance(theirs)).abs().max() < 0.01


def _block_covariance(noise: Tensor) -> Tensor:
    blocks = noise.unfold(-2, 2, 2).unfold(-2, 2, 2).reshape(-1, 4)
    return blocks.T @ blocks / len(blocks)


def test_coupled_noise_tells_the_start_and_stays_white() -> None:
    angles = 2 * math.pi * torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4000, 16, 9, 2, 4, generator=torch.Generator().manual_seed(1))
    coupled = stages.couple(noise, angles)
    columns, halves = coupled[:, 0].mean((1, 2)), coupled[:, 1:3].mean((2, 4))
    turns = 2 * math.pi * (torch.arange(4) + 0.5) / 4
    x = torch.atan2(columns @ turns.sin(), columns @ turns.cos())
    y = torch.atan2(halves[:, 1, 0] - halves[:, 1, 1], halves[:, 0, 0] - halves[:, 0, 1])
    told = torch.stack((x, y), dim=1)
    assert ((told - angles + math.pi) % (2 * math.pi) - math.pi).abs().max() < 1e-2
    values = coupled[:, :4, 0].flatten(1)  # of coupled channels and of one that is not
    assert (values.T @ values / 4000 - torch.eye(values.shape[1])).abs().max() < 0.1


def test_noise_without_starts_is_left_alone() -> None:
    noise = torch.randn(2, 16, 9, 2, 4)
    assert torch.equal(stages.couple(noise, torch.full((2, 4), math.nan)), noise)


def test_plans_tell_where_the_first_thing_is_in_each_latent_frame() -> None:
    plan = _plan()
    for clip, chunk, centres, attributes in zip(plan.clip, plan.chunk, plan.centres, plan.attributes, strict=True):
        frames = render_chunks([_CLIPS[clip]], int(chunk))[0]
        reading = read_frames(((frames.permute(1, 2, 3, 0).numpy() + 1) * 127.5).round().astype(np.uint8))
        assert tuple(COLOURS)[attributes[0]] == reading.colour
        scene = _CLIPS[clip].scenes[chunk]
        moved = (centres[-1] - centres[-2]) / (2 * math.pi) * torch.tensor((WIDTH / 4, HEIGHT / 4))
        torch.testing.assert_close(moved, torch.tensor(scene.things[0].velocity), atol=1e-4, rtol=1e-4)
        begun = torch.tensor(_CLIPS[clip].centres(int(chunk))[0])
        torch.testing.assert_close(centres[0] / (2 * math.pi) * torch.tensor((WIDTH, HEIGHT)), begun)


def test_the_middle_is_told_where_the_thing_is_from_each_token() -> None:
    places = _places(2 * math.pi * torch.tensor([[[0.4, 0.3]]]), (1, 2, 4))
    turns = torch.atan2(places[0, :, 1::2], places[0, :, ::2]) / (2 * math.pi)
    across, along = [0.275, 0.025, -0.225, -0.475], [0.05, -0.45]
    expected = torch.tensor([(x, y) for y in along for x in across])
    torch.testing.assert_close(turns, expected, atol=1e-5, rtol=0)


def test_plans_tell_starts_to_fresh_chunks_alone() -> None:
    plan = _plan()
    is_fresh = (plan.chunk == 0) & ~plan.has_image
    assert torch.equal(~plan.angles[:, 0].isnan(), is_fresh)
    start = draw_clip(0, int(plan.clip[is_fresh][0])).starts[0]
    expected = 2 * math.pi * torch.tensor((start[0] / 128, start[1] / 64))
    torch.testing.assert_close(plan.angles[is_fresh][0, :2], expected)


def test_examples_see_the_past_of_their_chunk() -> None:
    plan = _plan()
    chunk = torch.arange(CHUNKS_PER_CLIP * 9.0).view(1, CHUNKS_PER_CLIP, 1, 9, 1, 1) + 1
    stills = torch.full((3, 16, 1, 8, 16), -5.0).half()
    store = ClipStore(_CLIPS, chunk.expand(3, -1, 16, -1, 8, 16).half(), stills)
    first, frames = store.past(plan.clip, plan.chunk, plan.has_image, plan.is_made)
    target = store.chunks(plan.clip, plan.chunk)
    for index, begun in enumerate((9 * plan.chunk).tolist()):
        assert target[index, 0, :, 0, 0].tolist() == [begun + 1 + frame for frame in range(9)]
        seen = [max(0, frame) for frame in range(begun - 18, begun + 1)]
        if plan.has_image[index] and begun <= 18:
            seen[18 - begun] = -5
        assert frames[index, 0, :, 0, 0].tolist() == seen
        assert first[index].unique().tolist() == [1.0 if begun or plan.has_image[index] else 0.0]


def test_histories_are_what_the_transformer_made_where_a_plan_says_so() -> None:
    store = ClipStore(_CLIPS, torch.ones(3, CHUNKS_PER_CLIP, 16, 9, 8, 16).half(), torch.ones(3, 16, 1, 8, 16).half())
    clip, chunk = torch.tensor((0, 1, 2, 2)), torch.tensor((0, 0, 0, 1))
    made = torch.arange(2.0, 6.0).view(-1, 1, 1, 1, 1).expand(4, 16, 9, 8, 16)
    store.keep(clip, chunk, made, torch.tensor((True, False, True, True)))
    asked = torch.tensor((0, 0, 1, 2)), torch.tensor((1, 1, 1, 2)), torch.zeros(4, dtype=torch.bool)
    first, frames = store.past(*asked, torch.tensor((True, False, True, True)))
    assert [one.unique().tolist() for one in first] == [[2], [1], [1], [4]]
    assert frames[0, 0, :, 0, 0].tolist() == [0] * 10 + [2] * 9
    assert frames[3, 0, :, 0, 0].tolist() == [0] + [4] * 9 + [5] * 9
    assert store.chunks(clip, chunk).unique().tolist() == [1]


def test_prompts_fade_as_they_do_when_served(model: FlowModel) -> None:
    ids, lengths = model.vocabulary.tokens(("a red circle", "a small blue square moving left", "blue", "blue"))
    plan = replace(_plan(), ids=ids.unflatten(0, (2, 2)), lengths=lengths.unflatten(0, (2, 2)))
    with torch.no_grad():
        text = model.prompts(replace(plan, share=torch.tensor((0.75, 1.0))))
        old, new, same = model.embed(ids[:3], lengths[:3]).embeds
    served = torch.lerp(old, new, 0.75)
    torch.testing.assert_close(text.embeds[0], served[: text.embeds.shape[1]])
    torch.testing.assert_close(text.embeds[1], same[: text.embeds.shape[1]])
    assert text.bias[0, : lengths[1]].tolist() == [0] * int(lengths[1])
    assert text.bias[1, lengths[2]] == pytest.approx(math.log(512 - int(lengths[2])))


def test_outlines_count_most_and_the_cut_sides_of_a_window_not_at_all() -> None:
    plan = _plan()
    latents = torch.zeros(len(plan.clip), 16, 9, 8, 16)
    store = ClipStore(_CLIPS, torch.zeros(3, CHUNKS_PER_CLIP, 16, 9, 8, 16).half(), torch.zeros(3, 16, 1, 8, 16).half())
    whole = pictures._pictures(store, plan, latents)
    assert whole.counts.shape == (len(plan.clip), 1, 33, HEIGHT, WIDTH)
    assert whole.counts.unique().tolist() == [1, 4]
    steps = (whole.frames[..., 1:] - whole.frames[..., :-1]).abs().amax(1, keepdim=True)
    assert (whole.counts[..., 1:][steps > 0.3] == 4).float().mean() > 0.9
    assert (whole.counts[..., 1:][steps < 0.01] == 4).float().mean() < 0.1
    cut = pictures._windows(whole, plan, torch.Generator().manual_seed(0))
    assert cut.frames.shape == (len(plan.clip), 3, 33, 48, 48)
    assert cut.counts.unique().tolist() == [0, 1, 4]
    assert (cut.counts[..., 8:-8, 8:-8] >= 1).all()
    is_seen = (cut.frames.amax((-2, -1)) - cut.frames.amin((-2, -1))).amax((1, 2)) > 0.3
    assert is_seen.float().mean() > 0.9


def test_later_chunks_are_often_the_first_of_a_changed_scene() -> None:
    points = stages.schedules(distilled_scheduler(), (18, 72, 288))
    clips = tuple(draw_clip(0, index) for index in range(50))
    plan = Planner(clips, Vocabulary.new(), points, (400,), "1")[0][0]
    is_change = torch.tensor(
        [clips[c].change == k for c, k in zip(plan.clip.tolist(), plan.chunk.tolist(), strict=True)]
    )
    assert 0.15 < is_change.float().mean() < 0.35
    is_fading = plan.share < 1
    assert 0.3 < is_fading[is_change].float().mean() < 0.7
    assert not is_fading[~is_change].any()
    assert plan.share.min() >= 0.5
    assert not torch.equal(plan.ids[is_fading][:, 0], plan.ids[is_fading][:, 1])
    assert torch.equal(plan.ids[~is_fading][:, 0], plan.ids[~is_fading][:, 1])


def test_stages_begin_where_the_sampler_does() -> None:
    """At sigma 1 the flow leads from x to the chunk's means, and the means of stage 1 lead to stage 2."""
    plan = _plan()
    plan = replace(plan, sigma=torch.ones_like(plan.sigma))
    store = ClipStore(_CLIPS, torch.randn(3, CHUNKS_PER_CLIP, 16, 9, 8, 16).half(), torch.randn(3, 16, 1, 8, 16).half())
    clean = store.chunks(plan.clip, plan.chunk)
    generator, renoise = torch.Generator().manual_seed(0), Renoise(signal=0.75, noise=0.43)
    batches = [stages.first_stage(clean, plan, generator)]
    for stage in (1, 2):
        before = stages.nearly(stages.shrink(clean, 3 - stage), generator)
        batches.append(stages.later_stage(clean, plan, before, renoise, generator))
        error = stages.shrink(batches[stage].x, 1) / 0.75 - stages.shrink(clean, 3 - stage)
        assert 0 < error.std() < 0.2
    for stage, batch in enumerate(batches):
        torch.testing.assert_close(batch.x - batch.flow, stages.shrink(clean, 2 - stage), atol=1e-5, rtol=1e-5)


_CLIPS = tuple(draw_clip(0, index) for index in range(3))


def _plan() -> Plan:
    points = stages.schedules(distilled_scheduler(), (18, 72, 288))
    return Planner(_CLIPS, Vocabulary.new(), points, (32,), "1")[0][0]


def test_captions_have_no_unknown_words() -> None:
    vocabulary, rng = Vocabulary.new(), random.Random(0)
    for index in range(200):
        scene = draw_scene(rng, two_share=0.3, held_back=index % 2 == 0)
        text = caption(scene, rng, frozenset(name for name in ATTRIBUTES if rng.random() < 0.3))
        unknown = vocabulary.tokenizer.unk_token_id in vocabulary.tokenizer(text)["input_ids"]
        assert unknown == ("colourless" in text), text


def test_synonyms_and_capitals_are_the_plain_word() -> None:
    vocabulary = Vocabulary.new()
    plain, _ = vocabulary.tokens(("a red circle moving left slowly",))
    for other in ("A Red ball MOVES leftwards gently", "the red disc drifting left slow"):
        assert torch.equal(vocabulary.tokens((other,))[0], plain)
    words = [word for group in SYNONYMS.values() for word in group]
    assert len(words) == len(set(words))


def test_held_back_scenes_are_never_in_a_clip() -> None:
    assert not any(scene.is_held_back for index in range(300) for scene in draw_clip(3, index, two_share=0.2).scenes)
    assert draw_scene(random.Random(0), held_back=True).is_held_back
    assert "moving" in full_caption(draw_scene(random.Random(0)))


def test_interrupted_training_goes_on_as_if_nothing_had_happened(preset: Preset, work: Path, tmp_path: Path) -> None:
    for file in (VAE_FILE, LATENTS_FILE):
        shutil.copy(work / file, tmp_path)
    run = Run(work=tmp_path, device=CPU, seed=0)
    train_flow(preset, replace(run, stop_after=9))
    train_flow(preset, run)
    once, twice = (torch.load(folder / FLOW_FILE, weights_only=True)["parts"] for folder in (work, tmp_path))
    for part in ("average", "vae_average"):
        for name, value in once[part]["values"].items():
            torch.testing.assert_close(twice[part]["values"][name], value, msg=name)


def test_a_checkpoint_is_trained_further(preset: Preset, work: Path, barely_trained: Path, tmp_path: Path) -> None:
    for file in (VAE_FILE, LATENTS_FILE):
        shutil.copy(work / file, tmp_path)
    train_flow(preset, Run(work=tmp_path, device=CPU, seed=0, stop_after=1, begins_with=barely_trained))
    further, before = usable_flow(preset.flow, tmp_path), usable_flow(preset.flow, work)
    text = [model.embed(*model.vocabulary.tokens(("a red circle",))).embeds for model in (before, further)]
    assert (text[0] - text[1]).abs().max() < 0.05 * text[0].abs().max()  # bfloat16 in the checkpoint
    for name, weight in before.transformer.named_parameters():
        change = (further.transformer.get_parameter(name) - weight).abs().max()
        assert change <= 0.01 * weight.abs().max() + 1e-3, name


@pytest.mark.parametrize("is_reader_new", [True, False])
def test_a_new_reader_learns_alone(model: FlowModel, *, is_reader_new: bool) -> None:
    plan, points = _plan().first(2), stages.schedules(distilled_scheduler(), (18, 72, 288))
    store = ClipStore(_CLIPS, torch.randn(3, CHUNKS_PER_CLIP, 16, 9, 8, 16).half(), torch.randn(3, 16, 1, 8, 16).half())
    with torch.no_grad():
        text = model.prompts(plan)
    lesson = Lesson(model, store, plan, points[0], torch.Generator().manual_seed(0), is_compiled=False)
    found, _ = lesson.losses(0, text, rolls_out=False, is_reader_new=is_reader_new)
    found["middle"].backward()
    assert model.middle_reader.read.weight.grad is not None
    has_learned = any(parameter.grad is not None for parameter in model.transformer.parameters())
    model.zero_grad(set_to_none=True)
    assert has_learned != is_reader_new


def test_training_further_slows_down_from_the_start() -> None:
    paces = [_further_pace(1000, 0, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert paces == sorted(set(paces), reverse=True)
    assert _pace(1000, 0, 0.25) == 1.0


def test_losses_are_the_recorded_ones(work: Path) -> None:
    """A change here changes every checkpoint that is trained from now on: record the new losses if it was meant. A
    processor with bfloat16 is allowed its rounding."""
    for training, losses in RECORDED_LOSSES.items():
        logged = json.loads((work / f"{training}.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert {name: logged[name] for name in losses} == pytest.approx(losses, rel=3e-3)


def test_training_ends_in_time(preset: Preset, tmp_path: Path) -> None:
    train_vae(replace(preset.vae, steps=10**6), Run(work=tmp_path, device=CPU, seed=0, max_s=0.5))
    state = torch.load(tmp_path / VAE_FILE, weights_only=True)
    assert 0 < state["next_step"] < 10**4
    assert state["spent_s"] < 5


def test_what_was_trained_is_served(preset: Preset, work: Path, barely_trained: Path) -> None:
    loaded = load_model(ModelConfig(model=str(barely_trained), device="cpu", dtype="float32"))
    info = loaded.config.info("tiny")
    assert (info.recommended_sizes, info.default_steps) == (((128, 64),), (1, 1, 1))
    trained = usable_flow(preset.flow, work)
    for name, parameter in loaded.transformer.named_parameters():
        assert torch.equal(parameter, trained.transformer.get_parameter(name).bfloat16().float()), name
    text = trained.embed(*trained.vocabulary.tokens(("a red circle",))).embeds[0]
    served = loaded.text_encoder.encode("The Red ball")
    assert (served[: len(text)] - text).abs().max() < 0.05 * text.abs().max()


def test_the_decoder_is_trained_and_latents_keep_their_meaning(preset: Preset, work: Path, tmp_path: Path) -> None:
    shutil.copy(work / VAE_FILE, tmp_path)
    before, after = best_vae(preset.vae, tmp_path), best_vae(preset.vae, work)
    changed = {name for name, value in after.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv"}
    for name in changed:
        change = (after.get_parameter(name) - before.get_parameter(name)).abs().max()
        assert change < _DECODER_RATE * preset.flow.steps, name


def test_latents_are_normalised(work: Path) -> None:
    with safe_open(work / "latents.safetensors", "pt") as file:
        latents = file.get_tensor("latents").float()
    assert latents.mean((0, 1, 3, 4, 5)).abs().max() < 0.01
    assert (latents.std((0, 1, 3, 4, 5)) - 1).abs().max() < 0.01


def _randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)
