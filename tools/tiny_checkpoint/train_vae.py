"""Trains the VAE: `python -m tools.tiny_checkpoint.train_vae --work build/tiny`. Runs on after an interruption.

Knows the loss and the pictures it is computed on; knows nothing of words or flows.
"""

from __future__ import annotations

import random
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from helios_serve.model_executor.vae import VaeConfig, WanVAE, sample_posterior
from helios_serve.model_executor.vae_layers import AttentionBlock, ResidualBlock, Slab
from tools.tiny_checkpoint.presets import VaeTraining
from tools.tiny_checkpoint.progress import Average, Progress, Run, options, reduced_precision
from tools.tiny_checkpoint.render import Canvas, render
from tools.tiny_checkpoint.world import HEIGHT, MAX_THINGS, SIZES, WIDTH, draw_scene

VAE_FILE = "vae.pt"
_KL_WEIGHT = 3e-4
_TWO_SHARE = 0.25
"""Windows with two things teach all pairs of neighbouring colours."""
_WHOLE_EVERY_STEPS = 4
_WARMUP_STEPS = 50
_FIRST_LOGVAR = -4.0
"""So little noise at first that latents need not grow to be heard through it."""


def main() -> None:
    """The command."""
    told = options("Trains the VAE of the small checkpoint.")
    train_vae(told.preset.vae, told.run)


def train_vae(training: VaeTraining, run: Run) -> None:
    """Trains up to `training.steps`, or for as long as `run` allows; equal seeds give equal losses on one machine."""
    torch.manual_seed(run.seed)
    vae = new_vae(training).to(run.device)
    average = Average(vae, decay=0.998)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    progress = Progress(run, VAE_FILE, training.steps, {"vae": vae, "average": average, "optimizer": optimizer})
    for step in progress.steps():
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _pace(step, progress.share)
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        frames = frame_batch(training, step, random.Random(f"{run.seed} {step}"), run.device)
        with reduced_precision(run.device):
            losses = vae_losses(vae, frames, generator)
        loss = losses["l1"] + losses["l2"] + _KL_WEIGHT * losses["kl"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae)
        progress.record(step, losses)


def new_vae(training: VaeTraining) -> WanVAE:
    """Random weights that keep variances; residual blocks begin weak, and attention in the middle never adds anything,
    so that small windows teach whole pictures."""
    vae = WanVAE(VaeConfig(base_dim=training.base_dim, num_res_blocks=training.num_res_blocks))
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.normal_(layer.weight, std=(1.5 / layer.weight[0].numel()) ** 0.5)
            nn.init.zeros_(cast(Tensor, layer.bias))
    for layer in vae.modules():
        if isinstance(layer, ResidualBlock):
            layer.conv2.weight.data.mul_(0.3)
        elif isinstance(layer, AttentionBlock):
            layer.requires_grad_(False)
            layer.proj.weight.zero_()
    cast(Tensor, vae.quant_conv.bias).data[vae.config.z_dim :] = _FIRST_LOGVAR
    return vae


def frame_batch(training: VaeTraining, step: int, rng: random.Random, device: torch.device) -> Tensor:
    """What the VAE is shown in a step, [B, 3, F, h, w] in [-1, 1]: windows near the first things of random scenes, or
    whole pictures."""
    is_whole = step % _WHOLE_EVERY_STEPS == _WHOLE_EVERY_STEPS - 1
    count = training.pictures if is_whole else training.batch
    scenes = [draw_scene(rng, two_share=_TWO_SHARE) for _ in range(count)]
    places = [[[rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)] for _ in range(MAX_THINGS)] for _ in scenes]
    centres, corner = torch.tensor(places), torch.zeros(count, 2)
    width, height = WIDTH, HEIGHT
    if not is_whole:
        width = height = training.window
        reach = max(SIZES.values()) / 2 + training.window / 4
        offsets = torch.tensor([[rng.uniform(-reach, reach) for _ in range(2)] for _ in scenes])
        corner = (centres[:, 0] + offsets - training.window / 2).floor()
    canvas = Canvas(left=corner[:, 0].to(device), top=corner[:, 1].to(device), width=width, height=height)
    return render(scenes, centres.to(device), training.frames, canvas)


def vae_losses(vae: WanVAE, frames: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Mean absolute and squared errors of the reconstruction, and the mean KL divergence of a latent in nats."""
    mean, logvar = posterior(vae, frames)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    decoded = decode(vae, sample_posterior(mean, logvar, noise)).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return {"l1": F.l1_loss(decoded, frames), "l2": F.mse_loss(decoded, frames), "kl": kl}


def posterior(vae: WanVAE, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logvar as `WanVAE.encode` computes them, with gradients."""
    mean, logvar = vae.quant_conv(vae.encoder(frames, _whole_clip(frames.device))).float().chunk(2, dim=1)
    return mean, logvar.clamp(-12, 10)


def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    """Pixels as `WanVAE.decode` computes them, with gradients and not clamped."""
    pixels: Tensor = vae.decoder(vae.post_quant_conv(latents), _whole_clip(latents.device))
    return pixels


def _whole_clip(device: torch.device) -> Slab:
    """The served norms write in place and the served convolutions know no gradients, but are several times faster on a
    processor; on a GPU they want channels last."""
    is_plain = torch.is_grad_enabled() or device.type != "cpu"
    return Slab(is_first=True, is_last=True, keeps_sum_order=is_plain, tails={})


def _pace(step: int, share: float) -> float:
    """Rises at the start, falls linearly over the last two thirds of the training, of which `share` is done."""
    return min(1.0, (step + 1) / _WARMUP_STEPS, max(0.02, 1.5 * (1 - share)))


if __name__ == "__main__":
    main()
