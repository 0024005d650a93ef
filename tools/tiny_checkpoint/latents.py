"""Encodes clips once: `python -m tools.tiny_checkpoint.latents --work build/tiny` after the VAE was trained.

Knows the trained VAE and the file of latents; knows nothing of flows.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helios_serve.model_executor.vae import WanVAE
from helios_serve.types import FRAMES_PER_CHUNK, HISTORY_FRAMES, LATENT_FRAMES_PER_CHUNK
from tools.tiny_checkpoint.presets import FlowTraining, Preset, VaeTraining
from tools.tiny_checkpoint.progress import Run, options
from tools.tiny_checkpoint.render import render_chunks
from tools.tiny_checkpoint.train_vae import VAE_FILE, new_vae, posterior
from tools.tiny_checkpoint.world import CHUNKS_PER_CLIP, Clip, draw_clip

LATENTS_FILE = "latents.safetensors"
_NUM_HISTORY = sum(HISTORY_FRAMES)
_CLIPS_AT_ONCE = {"cpu": 1, "cuda": 32}


class ClipStore:
    """Encoded clips on one device.

    Args:
        clips: what they show.
        latents: [clips, chunks, C, 9, h, w] float16, normalised.
        stills: [clips, C, 1, h, w], the last latent frame of a chunk that shows frame 0 all the time.
    """

    def __init__(self, clips: tuple[Clip, ...], latents: Tensor, stills: Tensor) -> None:
        self.clips = clips
        frames = latents.transpose(2, 3).flatten(1, 2)  # (clips, chunks * 9, C, h, w)
        self._timeline = F.pad(frames, (0, 0, 0, 0, 0, 0, _NUM_HISTORY, 0))
        self._stills = stills[:, :, 0]

    @property
    def device(self) -> torch.device:
        return self._timeline.device

    def chunks(self, clip: Tensor, chunk: Tensor) -> Tensor:
        """One chunk of each clip: [B], [B] -> [B, C, 9, h, w] float32."""
        return self._frames(clip, LATENT_FRAMES_PER_CHUNK * chunk + _NUM_HISTORY, LATENT_FRAMES_PER_CHUNK)

    def past(self, clip: Tensor, chunk: Tensor, has_image: Tensor) -> tuple[Tensor, Tensor]:
        """The pinned frame [B, C, 1, h, w] and the 19 frames [B, C, 19, h, w] before a chunk, zeros for what there is
        not; where `has_image`, of a chunk 0 that follows an image of the clip's first frame."""
        frames = self._frames(clip, LATENT_FRAMES_PER_CHUNK * chunk, _NUM_HISTORY)
        image = has_image[:, None, None, None]
        frames[:, :, -1] = torch.where(image, self._stills[clip].float(), frames[:, :, -1])
        # the VAE encodes the first frame of a chunk as it encodes an image
        first = self._frames(clip, torch.full_like(chunk, _NUM_HISTORY), 1)
        return torch.where(image[:, None] | (chunk > 0).view(-1, 1, 1, 1, 1), first, 0.0), frames

    def _frames(self, clip: Tensor, start: Tensor, count: int) -> Tensor:
        index = start[:, None] + torch.arange(count, device=start.device)
        return self._timeline[clip[:, None], index].transpose(1, 2).float()


def main() -> None:
    """The command."""
    told = options("Encodes the clips that the transformer is trained on.")
    encode_clips(told.preset, told.run)


def trained_vae(training: VaeTraining, work: Path) -> WanVAE:
    """The averaged weights of the VAE's training, which may still be going on."""
    vae = new_vae(training)
    values = torch.load(work / VAE_FILE, map_location="cpu", weights_only=True)["parts"]["average"]["values"]
    vae.load_state_dict(values)
    return vae.eval()


@torch.no_grad()
def encode_clips(preset: Preset, run: Run) -> None:
    """Writes LATENTS_FILE into the work directory."""
    training, device = preset.flow, run.device
    vae = trained_vae(preset.vae, run.work).to(device)
    latents, stills = [], []
    size = _CLIPS_AT_ONCE[device.type]
    for start in range(0, training.num_clips, size):
        clips = _clips(training, run.seed, range(start, min(start + size, training.num_clips)))
        chunks = [posterior(vae, render_chunks(clips, chunk, device=device))[0] for chunk in range(CHUNKS_PER_CLIP)]
        still = render_chunks(clips, 0, num_frames=1, device=device).expand(-1, -1, FRAMES_PER_CHUNK, -1, -1)
        latents.append(torch.stack(chunks, dim=1).cpu())
        stills.append(posterior(vae, still.contiguous())[0][:, :, -1:].cpu())
        if start // size % 50 == 0:
            print(f"{start + len(clips)} of {training.num_clips} clips", flush=True)
    encoded = torch.cat(latents)
    mean, std = encoded.mean((0, 1, 3, 4, 5)), encoded.std((0, 1, 3, 4, 5))
    shape = (-1, 1, 1, 1)
    tensors = {
        "latents": ((encoded - mean.view(shape)) / std.view(shape)).half(),
        "stills": ((torch.cat(stills) - mean.view(shape)) / std.view(shape)).half(),
        "mean": mean,
        "std": std,
    }
    save_file(tensors, run.work / LATENTS_FILE, metadata={"seed": str(run.seed), "two_share": str(training.two_share)})


def load_clips(work: Path, device: torch.device) -> ClipStore:
    """What `encode_clips` wrote, on `device`."""
    with safe_open(work / LATENTS_FILE, "pt") as file:
        metadata = file.metadata()
        latents, stills = (file.get_tensor(name).to(device) for name in ("latents", "stills"))
    seed, two_share = int(metadata["seed"]), float(metadata["two_share"])
    clips = tuple(draw_clip(seed, index, two_share=two_share) for index in range(len(latents)))
    return ClipStore(clips, latents, stills)


def load_statistics(file: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the encoded latents by channel: [C] each."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor("mean"), opened.get_tensor("std")


def _clips(training: FlowTraining, seed: int, indices: range) -> list[Clip]:
    return [draw_clip(seed, index, two_share=training.two_share) for index in indices]


if __name__ == "__main__":
    main()
