"""Trains the VAE's decoder on what the transformer makes:

    python -m tools.tiny_checkpoint.train_decoder --work build/tiny

The encoder stays, and with it all latents. A decoder that has seen clean latents only turns the transformer's small
errors into round shapes; one that has seen these errors draws corners. Knows losses and windows of pictures; knows no
files of a checkpoint.
Shape letters: B examples, C channels, T latent frames, F frames, h x w latent cells, H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tools.tiny_checkpoint.kept_vae import DECODER_FILE, best_vae
from tools.tiny_checkpoint.latents import LATENTS_FILE, ClipStore, load_clips, load_statistics
from tools.tiny_checkpoint.plans import Plan, Planner
from tools.tiny_checkpoint.presets import Preset
from tools.tiny_checkpoint.progress import Average, Progress, Run, options, reduced_precision
from tools.tiny_checkpoint.render import render_chunks
from tools.tiny_checkpoint.stages import NUM_STAGES, nearly, schedules
from tools.tiny_checkpoint.train_flow import Lesson, distilled_scheduler, stage_tokens, usable_flow
from tools.tiny_checkpoint.train_vae import decode

_LAST = NUM_STAGES - 1
_SOURCES = ("encoder", "transformer", "last stage", "last stage")
"""Whose latents a step decodes, in turn; the last stage alone begins from clean ones."""
_WHOLE_EVERY_STEPS = 3
_CELL = 8
"""Pixels of a latent cell."""
_WARMUP_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """What a step decodes: latents [B, C, T, h, w], the frames [B, 3, F, H, W] they stand for in [-1, 1], and which of
    their pixels count, [B, 1, 1, H, W], 0 or 1."""

    latents: Tensor
    frames: Tensor
    counts: Tensor


def main() -> None:
    """The command."""
    told = options("Trains the decoder of the small checkpoint's VAE on the transformer's latents.")
    train_decoder(told.preset, told.run)


def train_decoder(preset: Preset, run: Run) -> None:
    """Trains up to `preset.decoder.steps`, or for as long as `run` allows."""
    training = preset.decoder
    torch.manual_seed(run.seed)
    store = load_clips(run.work, run.device)
    mean, std = (part.view(1, -1, 1, 1, 1).to(run.device) for part in load_statistics(run.work / LATENTS_FILE))
    flow = usable_flow(preset.flow, run.work, run.begins_with).to(run.device)
    vae = best_vae(preset.vae, run.work).to(run.device)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    average = Average(decoder, decay=0.998)
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    parts = {"decoder": decoder, "average": average, "optimizer": optimizer}
    progress = Progress(run, DECODER_FILE, training.steps, parts)
    samplers = schedules(distilled_scheduler(), stage_tokens(flow.transformer))
    planner = Planner(store.clips, flow.vocabulary, samplers, (1, 1, training.batch), f"decoder {run.seed}")
    for step in progress.steps():
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _pace(step, progress.share)
        generator = torch.Generator(run.device).manual_seed(run.seed * 1_000_003 + step)
        is_whole = step % _WHOLE_EVERY_STEPS == 0
        plan = planner[step][_LAST].to(run.device)
        plan = plan.first(1) if is_whole else plan
        source = _SOURCES[step % len(_SOURCES)]
        if source == "encoder":
            latents = nearly(store.chunks(plan.clip, plan.chunk), generator)
        else:
            lesson = Lesson(flow, store, plan, samplers[0], generator, is_compiled=False)
            with torch.no_grad():
                text = flow.prompts(plan)
            latents = lesson.end(_LAST, text, rolls_out=source == "transformer")
        pictures = _pictures(store, plan, latents)
        if not is_whole:
            pictures = _windows(pictures, plan, training.window // _CELL, generator)
        with reduced_precision(run.device):
            decoded = decode(vae, pictures.latents * std + mean).float()
        error = (decoded - pictures.frames) * pictures.counts
        num_values = pictures.counts.sum() * decoded.shape[1] * decoded.shape[2]
        losses = {"l1": error.abs().sum() / num_values, "l2": error.square().sum() / num_values}
        optimizer.zero_grad(set_to_none=True)
        torch.stack([*losses.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update(decoder)
        progress.record(step, {f"{name}_{'whole' if is_whole else 'window'}": loss for name, loss in losses.items()})


def _pictures(store: ClipStore, plan: Plan, latents: Tensor) -> Pictures:
    shown = zip(plan.clip.tolist(), plan.chunk.tolist(), strict=True)
    frames = torch.cat([render_chunks([store.clips[clip]], chunk, device=latents.device) for clip, chunk in shown])
    return Pictures(latents=latents, frames=frames, counts=torch.ones_like(frames[:, :1, :1]))


def _windows(whole: Pictures, plan: Plan, size: int, generator: torch.Generator) -> Pictures:
    """Windows of `size` x `size` cells near where the thing is in the middle of the chunk. The decoder takes their
    sides for the picture's: what is less than a cell from one counts only where it is."""
    height, width = whole.latents.shape[-2:]
    limits = torch.tensor((width - size, height - size), device=generator.device)
    cells = torch.tensor((width, height), device=generator.device)
    middle = plan.centres[:, plan.centres.shape[1] // 2] / (2 * math.pi) % 1 * cells  # (B, 2)
    drawn = torch.rand(middle.shape, generator=generator, device=generator.device)
    corners = (middle - size * drawn).round().long().clamp(min=0).minimum(limits)
    latents, frames, counts = [], [], []
    for row, (left, top) in enumerate(corners.tolist()):
        rows, columns = slice(top, top + size), slice(left, left + size)
        pixel_rows, pixel_columns = (slice(_CELL * s.start, _CELL * s.stop) for s in (rows, columns))
        latents.append(whole.latents[row, ..., rows, columns])
        frames.append(whole.frames[row, ..., pixel_rows, pixel_columns])
        is_inner = torch.zeros_like(whole.counts[row])
        inner_rows = slice(_CELL * (top + (top > 0)), _CELL * (top + size - (top + size < height)))
        inner_columns = slice(_CELL * (left + (left > 0)), _CELL * (left + size - (left + size < width)))
        is_inner[..., inner_rows, inner_columns] = 1
        counts.append(is_inner[..., pixel_rows, pixel_columns])
    return Pictures(latents=torch.stack(latents), frames=torch.stack(frames), counts=torch.stack(counts))


def _pace(step: int, share: float) -> float:
    """Rises at the start, falls linearly over the last two thirds of the training, of which `share` is done."""
    return min(1.0, (step + 1) / _WARMUP_STEPS, max(0.02, 1.5 * (1 - share)))


if __name__ == "__main__":
    main()
