"""Trains the transformer and the text encoder: `python -m tools.tiny_checkpoint.train_flow --work build/tiny`.

Runs on after an interruption. Knows the loss, the optimisers and how weights begin; knows no file of a checkpoint.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import UMT5Config, UMT5EncoderModel

from helios_serve.model_executor.checkpoint import read_config
from helios_serve.model_executor.model_config import SchedulerConfig, TransformerConfig
from helios_serve.model_executor.sampling.schedule import ChunkSchedule
from helios_serve.model_executor.tiny_checkpoint import write_tiny_checkpoint
from helios_serve.model_executor.transformer import HeliosTransformer
from tools.tiny_checkpoint.batched_flow import TextBatch, batched_flow
from tools.tiny_checkpoint.captions import VALUES
from tools.tiny_checkpoint.latents import ClipStore, load_clips
from tools.tiny_checkpoint.plans import Plan, Planner
from tools.tiny_checkpoint.presets import FlowTraining, text_encoder_json, transformer_json
from tools.tiny_checkpoint.progress import Average, Progress, Run, options, reduced_precision
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
from tools.tiny_checkpoint.vocabulary import Vocabulary
from tools.tiny_checkpoint.world import HEIGHT, MAX_THINGS, WIDTH

FLOW_FILE = "flow.pt"
_WARMUP_STEPS = 100
_PLANNING_PROCESSES = 6
_WORD_WEIGHT = 0.1
_ROLL_OUT_FROM = 0.5
"""Share of the training after which stages begin from the transformer's own work, errors and all."""
_NOT_A_WORD = -100
_VAE_CELL = 8
_SHARP = 2.0
"""Where the norms of cross-attention begin, so that the few words of a prompt show among its hundreds of zero rows."""
_EVEN = 0.5
"""Where those of self-attention begin, so that it begins with means, among them those that tell where things start."""


class FlowModel(nn.Module):
    """The two parts that are trained, and what reads the words of one for its loss."""

    def __init__(self, training: FlowTraining, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.transformer = new_transformer(TransformerConfig.from_json(transformer_json(training)))
        self.text_encoder = UMT5EncoderModel(UMT5Config.from_dict(text_encoder_json(training, vocabulary.size)))
        self.vocabulary = vocabulary
        self.reader = nn.Linear(training.text_dim, MAX_THINGS * sum(1 + len(names) for names in VALUES.values()))

    def embed(self, ids: Tensor, lengths: Tensor) -> TextBatch:
        """What the transformer attends to for captions: canonical ids [B, L] and their numbers [B]."""
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return TextBatch.of(self.text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state, lengths)

    def word_loss(self, text: TextBatch, meanings: Tensor) -> Tensor:
        """How far each word's embedding is from telling what the whole caption says: cross-entropy with `meanings`
        [B, A], the mean over words and attributes. The transformer, which must find a few words among hundreds of zero
        rows, learns from any of them then. It alone teaches the text encoder: the flow would move the embeddings while
        the transformer is learning what they mean."""
        sizes = [1 + len(names) for names in VALUES.values()] * MAX_THINGS
        told = self.reader(text.embeds).transpose(1, 2).split(sizes, dim=1)  # (B, values, L) each
        asked = torch.where((text.bias == 0)[..., None], meanings[:, None], _NOT_A_WORD).unbind(-1)  # (B, L) each
        losses = [F.cross_entropy(*pair, ignore_index=_NOT_A_WORD) for pair in zip(told, asked, strict=True)]
        return torch.stack(losses).mean()


class Lesson:
    """One stage's examples of a step."""

    def __init__(
        self, model: FlowModel, store: ClipStore, plan: Plan, schedule: ChunkSchedule, generator: torch.Generator
    ) -> None:
        self._transformer = model.transformer
        self._schedule = schedule
        self._generator = generator
        self.plan = plan
        self._clean = store.chunks(plan.clip, plan.chunk)
        self._past = draw_past(store, plan, generator)

    def flow_loss(self, stage: int, text: TextBatch, *, rolls_out: bool) -> Tensor:
        """Mean squared error of the flow; with `rolls_out` half of the examples begin from what the transformer itself
        made of the stages before."""
        batch = self._batch(stage, self.plan, text, rolls_out=rolls_out)
        return (self._flow(batch.x, self.plan.timestep, text).float() - batch.flow).square().mean()

    def _batch(self, stage: int, plan: Plan, text: TextBatch, *, rolls_out: bool) -> StageBatch:
        if stage == 0:
            return first_stage(self._clean, plan, self._generator)
        before = nearly(shrink(self._clean, NUM_STAGES - stage), self._generator)
        if rolls_out:
            before[::2] = self._own_end(stage - 1, text)[::2]
        renoise = self._schedule.renoise[stage]
        assert renoise is not None
        return later_stage(self._clean, plan, before, renoise, self._generator)

    @torch.no_grad()
    def _own_end(self, stage: int, text: TextBatch) -> Tensor:
        """What the transformer makes of a stage in one step, after those before it."""
        points = self._schedule.stages[stage]
        sigma = torch.full_like(self.plan.sigma, points.sigmas[0])
        timestep = torch.full_like(self.plan.timestep, points.model_timesteps[0])
        batch = self._batch(stage, replace(self.plan, sigma=sigma), text, rolls_out=True)
        return batch.x - sigma.view(-1, 1, 1, 1, 1) * self._flow(batch.x, timestep, text).float()

    def _flow(self, x: Tensor, timestep: Tensor, text: TextBatch) -> Tensor:
        with reduced_precision(x.device):
            return batched_flow(self._transformer, x, timestep, self._past, text)


def main() -> None:
    """The command."""
    told = options("Trains the transformer and the text encoder of the small checkpoint.")
    train_flow(told.preset.flow, told.run, load_clips(told.run.work, told.run.device))


def train_flow(training: FlowTraining, run: Run, store: ClipStore) -> None:
    """Trains on the device of `store` up to `training.steps`, or for as long as `run` allows."""
    torch.manual_seed(run.seed)
    device = store.device
    model = FlowModel(training, Vocabulary.new()).to(device)
    average = Average(model, decay=0.998)
    optimizers = _optimizers(model, training)
    samplers = schedules(distilled_scheduler(), stage_tokens(model.transformer))
    progress = Progress(run, FLOW_FILE, training.steps, {"model": model, "average": average, **optimizers})
    planner = Planner(store.clips, model.vocabulary, samplers, training.batch, run.seed)
    plans = DataLoader(
        planner,
        batch_size=None,
        sampler=progress.steps_left,
        num_workers=_PLANNING_PROCESSES if device.type == "cuda" else 0,
        pin_memory=device.type == "cuda",
    )
    for step, staged in zip(progress.steps(), plans, strict=False):
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * _pace(step, training.word_steps, progress.share)
            optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator(device).manual_seed(run.seed * 1_000_003 + step)
        losses: dict[str, Tensor] = {}
        for stage, plan in enumerate(staged):
            lesson = Lesson(model, store, plan.to(device), samplers[0], generator)
            text = model.embed(lesson.plan.ids, lesson.plan.lengths)
            word_loss, flow_loss = model.word_loss(text, lesson.plan.meanings), torch.zeros((), device=device)
            if step >= training.word_steps:
                flow_loss = lesson.flow_loss(stage, text.detached(), rolls_out=progress.share > _ROLL_OUT_FROM)
            (flow_loss + _WORD_WEIGHT * word_loss).backward()
            losses |= {f"stage{stage}": flow_loss, f"words{stage}": word_loss}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        average.update(model)
        progress.record(step, losses)


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


def new_transformer(config: TransformerConfig) -> HeliosTransformer:
    """Random weights that pass the patches of x through to the flow: it begins as x itself, which holds the noise."""
    transformer = HeliosTransformer(config)
    for name, parameter in transformer.named_parameters():
        _begin(name, parameter.data)
    _pass_through(transformer)
    return transformer


def _begin(name: str, weight: Tensor) -> None:
    if "norm" in name and name.endswith("weight"):
        nn.init.constant_(weight, _SHARP if "attn2" in name else _EVEN if "attn1" in name else 1.0)
    elif name.endswith("bias") or "time_proj" in name or "scale_shift_table" in name:
        nn.init.zeros_(weight)
        if name == "scale_shift_tables":
            weight[:, (2, 5)] = 1.0  # gates of attention and feed-forward
    else:
        gain = 0.2 if any(part in name for part in (".to_out.", "ffn.net.2", "time_embedder.linear_2")) else 1.0
        nn.init.normal_(weight, std=gain * weight[0].numel() ** -0.5)


def _pass_through(transformer: HeliosTransformer) -> None:
    """The first dimensions of the stream carry the values of a patch, and the output reads them."""
    channels, (_, height, width), dim = transformer.config.in_channels, transformer.patch, transformer.config.dim
    num_values = channels * height * width
    for projection in (transformer.patch_embedding, transformer.patch_short):
        weight = projection.weight.data.view(dim, num_values)
        weight.mul_(0.1)[:num_values] = torch.eye(num_values)
    # rows of the output are (cell, channel), values of a patch (channel, cell)
    place = torch.arange(num_values).view(channels, height * width).T.flatten()
    transformer.proj_out.weight.data.zero_()[torch.arange(num_values), place] = (num_values / dim) ** 0.5


def _optimizers(model: FlowModel, training: FlowTraining) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    blocks = {id(p) for p in model.transformer.blocks.parameters() if p.dim() == 2}
    matrices = [p for p in model.parameters() if id(p) in blocks]
    others = [p for p in model.parameters() if id(p) not in blocks]
    rate = training.learning_rate
    return {
        "muon": torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
    }


def _pace(step: int, word_steps: int, share: float) -> float:
    """Rises at the start and when the transformer joins in, falls linearly over the second half of the training, of
    which `share` is done."""
    since = step if step < word_steps else step - word_steps
    return min(1.0, (since + 1) / _WARMUP_STEPS, max(0.02, 2 * (1 - share)))


if __name__ == "__main__":
    main()
