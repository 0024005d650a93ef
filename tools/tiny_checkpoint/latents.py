"""Encodes clips once: `python -m tools.tiny_checkpoint.latents --work build/tiny` after the VAE was trained.

Knows the trained VAE and the file of latents; knows nothing of flows.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helios_serve.types import FRAMES_PER_CHUNK, HISTORY_FRAMES, LATENT_FRAMES_PER_CHUNK
from tools.tiny_checkpoint.kept_vae import best_vae, kept_statistics
from tools.tiny_checkpoint.presets import FlowTraining, Preset
from tools.tiny_checkpoint.progress import Run, options
from tools.tiny_checkpoint.render import render_chunks
from tools.tiny_checkpoint.train_vae import posterior
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
        self._made = self._timeline.clone()
        self._stills = stills[:, :, 0]

    @property
    def device(self) -> torch.device:
        return self._timeline.device

    def chunks(self, clip: Tensor, chunk: Tensor) -> Tensor:
        """One chunk of each clip: [B], [B] -> [B, C, 9, h, w] float32."""
        return self._frames(clip, LATENT_FRAMES_PER_CHUNK * chunk + _NUM_HISTORY, LATENT_FRAMES_PER_CHUNK)

    def keep(self, clip: Tensor, chunk: Tensor, made: Tensor, where: Tensor) -> None:
        """Remembers what the transformer made [B, C, 9, h, w] of chunks, `where` [B] it may be remembered, until it
        makes them again; what was never made is the clip's own."""
        index = self._index(LATENT_FRAMES_PER_CHUNK * chunk + _NUM_HISTORY, LATENT_FRAMES_PER_CHUNK)
        row, new = clip[:, None], made.transpose(1, 2).to(self._made.dtype)
        self._made[row, index] = torch.where(where.view(-1, 1, 1, 1, 1), new, self._made[row, index])

    def past(self, clip: Tensor, chunk: Tensor, has_image: Tensor, is_made: Tensor) -> tuple[Tensor, Tensor]:
        """The pinned frame [B, C, 1, h, w] and the 19 frames [B, C, 19, h, w] before a chunk, zeros for what there is
        not; where `has_image`, of a video that follows an image of the clip's first frame; where `is_made`, of what the
        transformer made."""
        frames = self._frames(clip, LATENT_FRAMES_PER_CHUNK * chunk, _NUM_HISTORY, is_made)
        places = torch.arange(_NUM_HISTORY, device=chunk.device)
        is_still = has_image[:, None] & (places == _NUM_HISTORY - 1 - LATENT_FRAMES_PER_CHUNK * chunk[:, None])
        frames = torch.where(is_still[:, None, :, None, None], self._stills[clip][:, :, None].float(), frames)
        # the VAE encodes the first frame of a chunk as it encodes an image
        clean, made = (self._frames(clip, torch.full_like(chunk, _NUM_HISTORY), 1, one) for one in (None, is_made))
        first = torch.where(has_image.view(-1, 1, 1, 1, 1), clean, made)
        return torch.where((has_image | (chunk > 0)).view(-1, 1, 1, 1, 1), first, 0.0), frames

    def _frames(self, clip: Tensor, start: Tensor, count: int, is_made: Tensor | None = None) -> Tensor:
        row, index = clip[:, None], self._index(start, count)
        frames = self._timeline[row, index]
        if is_made is not None:
            frames = torch.where(is_made.view(-1, 1, 1, 1, 1), self._made[row, index], frames)
        return frames.transpose(1, 2).float()

    @staticmethod
    def _index(start: Tensor, count: int) -> Tensor:
        return start[:, None] + torch.arange(count, device=start.device)


def main() -> None:
    """The command."""
    told = options("Encodes the clips that the transformer is trained on.")
    encode_clips(told.preset, told.run)


@torch.no_grad()
def encode_clips(preset: Preset, run: Run) -> None:
    """Writes LATENTS_FILE into the work directory: of `num_clips` clips, or of fewer if the time is up before."""
    training, device = preset.flow, run.device
    began = time.monotonic()
    vae = best_vae(preset.vae, run.work).to(device)
    latents, stills = [], []
    size = _CLIPS_AT_ONCE[device.type]
    for start in range(0, training.num_clips, size):
        if latents and run.max_s is not None and time.monotonic() - began > run.max_s:
            break
        clips = _clips(training, run.seed, range(start, min(start + size, training.num_clips)))
        chunks = [posterior(vae, render_chunks(clips, chunk, device=device))[0] for chunk in range(CHUNKS_PER_CLIP)]
        still = render_chunks(clips, 0, num_frames=1, device=device).expand(-1, -1, FRAMES_PER_CHUNK, -1, -1)
        latents.append(torch.stack(chunks, dim=1).cpu())
        stills.append(posterior(vae, still.contiguous())[0][:, :, -1:].cpu())
        if start // size % 50 == 0:
            print(f"{start + len(clips)} of {training.num_clips} clips", flush=True)
    encoded = torch.cat(latents)
    kept = kept_statistics(run.work)  # the latents of a transformer that is trained further stay what they are
    mean, std = kept or (encoded.mean((0, 1, 3, 4, 5)), encoded.std((0, 1, 3, 4, 5)))
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
