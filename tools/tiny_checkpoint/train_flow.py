"""Trains the text encoder, the transformer and, with it, the VAE's decoder:

    python -m tools.tiny_checkpoint.train_flow --work build/tiny

Runs on after an interruption. Knows the losses and the optimisers; knows no file of a checkpoint.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import UMT5Config, UMT5EncoderModel

from helios_serve.config import ModelConfig
from helios_serve.model_executor.checkpoint import read_config
from helios_serve.model_executor.model import load_model
from helios_serve.model_executor.model_config import SchedulerConfig, TransformerConfig
from helios_serve.model_executor.sampling.schedule import ChunkSchedule
from helios_serve.model_executor.tiny_checkpoint import write_tiny_checkpoint
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.model_executor.vae import WanVAE
from tools.tiny_checkpoint.batched_flow import Prediction, TextBatch, batched_flow, token_grid
from tools.tiny_checkpoint.captions import VALUES
from tools.tiny_checkpoint.initial_weights import new_transformer
from tools.tiny_checkpoint.kept_vae import FLOW_FILE, best_vae
from tools.tiny_checkpoint.latents import LATENTS_FILE, ClipStore, load_clips, load_statistics
from tools.tiny_checkpoint.pictures import PictureLoss
from tools.tiny_checkpoint.plans import Plan, Planner
from tools.tiny_checkpoint.presets import FlowTraining, Preset, text_encoder_json, transformer_json
from tools.tiny_checkpoint.progress import Average, Progress, Run, Stateful, options, reduced_precision
from tools.tiny_checkpoint.stages import (
    NUM_STAGES,
    StageBatch,
    draw_past,
    first_stage,
    later_stage,
    nearly,
    schedules,
    shrink,
)
from tools.tiny_checkpoint.supervision import MiddleReader
from tools.tiny_checkpoint.team import ALONE, Team, run_team
from tools.tiny_checkpoint.vocabulary import Vocabulary
from tools.tiny_checkpoint.world import HEIGHT, MAX_THINGS, WIDTH

_WARMUP_STEPS = 100
_PLANNING_PROCESSES = 12
_ROLL_OUT_FROM, _ROLL_OUT_EVERY = 0.5, 2
"""Share of the training after which later stages begin, in every second step, from the transformer's own work, errors
and all, and pictures are looked at; a transformer that is trained further begins with both at once."""
_PICTURE_WEIGHT, _DECODER_RATE = 2.0, 7e-4
"""Of what pictures miss in the loss, and how fast the decoder learns, whoever makes its latents."""
_FURTHER_RATE, _FURTHER_BATCH, _FURTHER_WINDOWS = 0.2, (0.25, 0.5, 2.0), 2
"""Of a transformer that is trained further, over those of a new one: the learning rate, as that of a new one would undo
much of it first, the examples of each stage, as the last one learns longest, and the windows that are looked at."""
_NOT_A_WORD = -100
_VAE_CELL = 8


class FlowModel(nn.Module):
    """The two parts that are trained, and what reads the words of one and the tokens of the other for their losses."""

    def __init__(self, training: FlowTraining, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.transformer = new_transformer(TransformerConfig.from_json(transformer_json(training)))
        self.text_encoder = UMT5EncoderModel(UMT5Config.from_dict(text_encoder_json(training, vocabulary.size)))
        self.vocabulary = vocabulary
        self.middle_reader = MiddleReader(self.transformer.config.dim)
        self.reader = nn.Linear(training.text_dim, MAX_THINGS * sum(1 + len(names) for names in VALUES.values()))

    def load_checkpoint(self, path: Path) -> None:
        """Takes the weights of a checkpoint that was trained before."""
        loaded = load_model(ModelConfig(model=str(path), device="cpu", dtype="float32"))
        self.transformer.load_state_dict(loaded.transformer.state_dict())
        words = load_file(path / "text_encoder" / "model.safetensors")
        self.text_encoder.load_state_dict({name: value.float() for name, value in words.items()}, strict=False)

    def embed(self, ids: Tensor, lengths: Tensor) -> TextBatch:
        """What the transformer attends to for captions: canonical ids [B, L] and their numbers [B]."""
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return TextBatch.of(self.text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state, lengths)

    def prompts(self, plan: Plan) -> TextBatch:
        """What the transformer attends to for a plan's captions, faded as the engine fades prompts."""
        both = self.embed(plan.ids.flatten(0, 1), plan.lengths.flatten()).embeds[:, :-1].unflatten(0, (-1, 2))
        return TextBatch.of(torch.lerp(both[:, 0], both[:, 1], plan.share[:, None, None]), plan.lengths.amax(1))

    def word_loss(self, text: TextBatch, meanings: Tensor) -> Tensor:
        """How far each word's embedding is from telling what the whole caption says: cross-entropy with `meanings`
        [B, A], the mean over words and attributes. The transformer, which must find a few words among hundreds of zero
        rows, learns from any of them then. It alone teaches the text encoder, before the flow's training begins: the
        flow would move the embeddings while the transformer is learning what they mean."""
        sizes = [1 + len(names) for names in VALUES.values()] * MAX_THINGS
        told = self.reader(text.embeds).transpose(1, 2).split(sizes, dim=1)  # (B, values, L) each
        asked = torch.where((text.bias == 0)[..., None], meanings[:, None], _NOT_A_WORD).unbind(-1)  # (B, L) each
        losses = [F.cross_entropy(*pair, ignore_index=_NOT_A_WORD) for pair in zip(told, asked, strict=True)]
        return torch.stack(losses).mean()


class Lesson:
    """One stage's examples of a step."""

    def __init__(
        self,
        model: FlowModel,
        store: ClipStore,
        plan: Plan,
        schedule: ChunkSchedule,
        generator: torch.Generator,
        *,
        is_compiled: bool,
    ) -> None:
        self._model = model
        self._is_compiled = is_compiled
        self._schedule = schedule
        self._generator = generator
        self._store = store
        self.plan = plan
        self._clean = store.chunks(plan.clip, plan.chunk)
        self._past = draw_past(store, plan, generator)

    def losses(
        self, stage: int, text: TextBatch, *, rolls_out: bool, is_reader_new: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Mean squared error of the flow, and what the tokens half way miss, by name, and where the flow ends,
        [B, C, 9, h, w]; with `rolls_out` the later stages begin from what the transformer itself made of those before,
        and what it makes in the last one is kept for the chunks that follow. A new reader of the tokens half way learns
        alone: its first errors would undo what the transformer knows."""
        batch = self._batch(stage, self.plan, text, rolls_out=rolls_out)
        predicted = self._predict(batch.x, self.plan.timestep, text)
        flow = predicted.flow.float()
        end = batch.x - self.plan.sigma.view(-1, 1, 1, 1, 1) * flow
        if rolls_out and stage == NUM_STAGES - 1:
            is_one_step = self.plan.sigma == self._schedule.stages[stage].sigmas[0]
            self._store.keep(self.plan.clip, self.plan.chunk, end.detach(), is_one_step)
        grid = token_grid(self._model.transformer, batch.x)
        middle = predicted.middle.detach() if is_reader_new else predicted.middle
        losses = {
            "stage": (flow - batch.flow).square().mean(),
            "middle": self._model.middle_reader.loss(middle, self.plan, grid),
        }
        return losses, end

    def _batch(self, stage: int, plan: Plan, text: TextBatch, *, rolls_out: bool) -> StageBatch:
        if stage == 0:
            return first_stage(self._clean, plan, self._generator)
        before = (
            self.end(stage - 1, text, rolls_out=True)
            if rolls_out
            else nearly(shrink(self._clean, NUM_STAGES - stage), self._generator)
        )
        renoise = self._schedule.renoise[stage]
        assert renoise is not None
        return later_stage(self._clean, plan, before, renoise, self._generator)

    @torch.no_grad()
    def end(self, stage: int, text: TextBatch, *, rolls_out: bool) -> Tensor:
        """What the transformer makes of a stage in one step; with `rolls_out` after what it made of those before."""
        points = self._schedule.stages[stage]
        sigma = torch.full_like(self.plan.sigma, points.sigmas[0])
        timestep = torch.full_like(self.plan.timestep, points.model_timesteps[0])
        batch = self._batch(stage, replace(self.plan, sigma=sigma), text, rolls_out=rolls_out)
        return batch.x - sigma.view(-1, 1, 1, 1, 1) * self._predict(batch.x, timestep, text).flow.float()

    def _predict(self, x: Tensor, timestep: Tensor, text: TextBatch) -> Prediction:
        is_compiled = self._is_compiled and torch.is_grad_enabled()  # each set of shapes takes minutes to compile
        with reduced_precision(x.device):
            return batched_flow(self._model.transformer, x, timestep, self._past, text, is_compiled=is_compiled)


def main() -> None:
    """The command."""
    told = options("Trains the text encoder, the transformer and the decoder of the small checkpoint.")
    train_flow(told.preset, told.run)


def train_flow(preset: Preset, run: Run) -> None:
    """Trains on the encoded clips up to `preset.flow.steps`, or for as long as `run` allows. What the transformer made
    for histories is not kept over an interruption: they are the clips' own again until it makes them anew."""
    if run.num_processes == 1:
        _train(preset, run, ALONE)
    else:
        run_team(run.num_processes, partial(_train, preset, run))


def _train(preset: Preset, run: Run, team: Team) -> None:
    training = preset.flow
    store = load_clips(run.work, run.device)
    torch.manual_seed(run.seed)
    device = store.device
    model = FlowModel(training, Vocabulary.new())
    if run.begins_with is not None:
        training = _further(training)
        model.load_checkpoint(run.begins_with)
    model.to(device)
    pictures = PictureLoss(
        best_vae(preset.vae, run.work), *load_statistics(run.work / LATENTS_FILE), training.num_windows // team.size
    ).to(device)
    averages = {"average": Average(model, decay=0.998), "vae_average": Average(pictures.vae, decay=0.998)}
    optimizers = _optimizers(model, pictures.vae, training)
    samplers = schedules(distilled_scheduler(), stage_tokens(model.transformer))
    parts: dict[str, Stateful] = {"model": model, "vae": pictures.vae, **averages, **optimizers}
    trained = [p for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]]
    progress = Progress(run, FLOW_FILE, training.steps, parts, team)
    batch = [count // team.size for count in training.batch]
    planner = Planner(store.clips, model.vocabulary, samplers, batch, f"{run.seed} {team.rank}")
    plans = DataLoader(
        planner,
        batch_size=None,
        sampler=progress.steps_left,
        num_workers=_PLANNING_PROCESSES if device.type == "cuda" else 0,
        pin_memory=device.type == "cuda",
    )
    pace = _pace if run.begins_with is None else _further_pace
    for step, staged in zip(progress.steps(), plans, strict=False):
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * pace(step, training.word_steps, progress.share)
            optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator(device).manual_seed((run.seed * 1_000_003 + step) * team.size + team.rank)
        is_late = run.begins_with is not None or progress.share > _ROLL_OUT_FROM
        losses: dict[str, Tensor] = {}
        for stage, plan in enumerate(plan.to(device) for plan in staged):
            if step < training.word_steps:
                text = model.embed(plan.ids[:, 1], plan.lengths[:, 1])
                found = {"words": model.word_loss(text, plan.meanings)}
            else:
                with torch.no_grad():
                    text = model.prompts(plan)
                lesson = Lesson(model, store, plan, samplers[0], generator, is_compiled=run.is_compiled)
                rolls_out = is_late and step % _ROLL_OUT_EVERY == 0
                is_reader_new = run.begins_with is not None and step < _WARMUP_STEPS
                found, end = lesson.losses(stage, text, rolls_out=rolls_out, is_reader_new=is_reader_new)
                if is_late and stage == NUM_STAGES - 1:
                    seen = pictures(store, plan, end, step, generator)
                    found |= {name: _PICTURE_WEIGHT * loss for name, loss in seen.items()}
            sum(found.values(), start=torch.zeros((), device=device)).backward()
            losses |= {f"{name}{stage}": loss for name, loss in found.items()}
        team.average_gradients(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        averages["average"].update(model)
        averages["vae_average"].update(pictures.vae)
        progress.record(step, losses)


def _further(training: FlowTraining) -> FlowTraining:
    """How a transformer is trained further."""
    first, middle, last = (int(share * count) for share, count in zip(_FURTHER_BATCH, training.batch, strict=True))
    return replace(
        training,
        word_steps=0,
        batch=(max(1, first), max(1, middle), last),
        num_windows=_FURTHER_WINDOWS * training.num_windows,
        learning_rate=_FURTHER_RATE * training.learning_rate,
    )


def usable_flow(training: FlowTraining, work: Path) -> FlowModel:
    """The averaged weights of the training in `work`, which may still be going on."""
    model = FlowModel(training, Vocabulary.new())
    values = torch.load(work / FLOW_FILE, map_location="cpu", weights_only=True)["parts"]["average"]["values"]
    model.load_state_dict(values, strict=False)
    return model.eval()


def distilled_scheduler() -> SchedulerConfig:
    """The scheduler of Distilled checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_checkpoint("distilled", Path(folder) / "checkpoint")
        return read_config(Path(folder) / "checkpoint").scheduler


def stage_tokens(transformer: HeliosTransformer) -> tuple[int, ...]:
    """Current tokens of each stage."""
    _, height, width = transformer.patch
    rows, columns = HEIGHT // _VAE_CELL // height, WIDTH // _VAE_CELL // width
    return tuple(9 * (rows >> halvings) * (columns >> halvings) for halvings in reversed(range(NUM_STAGES)))


def _optimizers(model: FlowModel, vae: WanVAE, training: FlowTraining) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else, with a rate of its own for the decoder."""
    blocks = {id(p) for p in model.transformer.blocks.parameters() if p.dim() == 2}
    matrices = [p for p in model.parameters() if id(p) in blocks]
    others = [p for p in model.parameters() if id(p) not in blocks]
    decoder = [p for p in vae.parameters() if p.requires_grad]
    rate = training.learning_rate
    optimizers: dict[str, torch.optim.Optimizer] = {
        "muon": torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
        "decoder": torch.optim.AdamW(decoder, lr=_DECODER_RATE, betas=(0.9, 0.99), weight_decay=1e-4),
    }
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _pace(step: int, word_steps: int, share: float) -> float:
    """Rises at the start and when the transformer joins in, falls linearly over the second half of the training, of
    which `share` is done."""
    since = step if step < word_steps else step - word_steps
    return min(1.0, (since + 1) / _WARMUP_STEPS, max(0.02, 2 * (1 - share)))


def _further_pace(step: int, word_steps: int, share: float) -> float:
    """Of a transformer that is trained further: falls from the start, as it gains most while the rate is low."""
    return min(_pace(step, word_steps, share), max(0.02, (1 - share) ** 2))


if __name__ == "__main__":
    main()
