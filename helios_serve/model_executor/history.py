"""What a chunk sees of the past: latent windows and the tokens made of them.

Knows latents, patch sizes and frame numbering; knows nothing of steps, text or requests. The window slides over the
last 19 latent frames (16 long, 2 mid, 1 short) and pins one first frame; tokens are embedded once per chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from helios_serve.types import HISTORY_FRAMES

NUM_HISTORY_FRAMES = sum(HISTORY_FRAMES)
LONG_FRAMES, MID_FRAMES, _ = HISTORY_FRAMES
FIRST_LONG_FRAME = 1
FIRST_MID_FRAME = FIRST_LONG_FRAME + LONG_FRAMES
LAST_HISTORY_FRAME = FIRST_MID_FRAME + MID_FRAMES
FIRST_CURRENT_FRAME = LAST_HISTORY_FRAME + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What one chunk sees of the past: `frames` [C, 19, h, w] float32, oldest first, and the pinned `first` frame
    [C, 1, h, w] float32, or None as long as nothing was generated."""

    frames: Tensor
    first: Tensor | None

    def followed_by(self, trail: Sequence[Tensor], pinned: Tensor | None) -> History:
        """The history of a later chunk, rebuilt from the latents of finished ones.

        Args:
            trail: [C, 9, h, w] each, the chunks just before it, oldest first: all of them, or the last three.
            pinned: [C, 9, h, w], the chunk whose first frame is pinned; None keeps the frame that is.
        """
        device = self.frames.device
        frames = torch.cat((self.frames, *(latents.to(device).float() for latents in trail)), dim=1)
        first = self.first if pinned is None else pinned[:, :1].to(device).float().clone()
        return History(frames=frames[:, -NUM_HISTORY_FRAMES:].contiguous(), first=first)

    def windows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Long [C, 16, h, w], mid [C, 2, h, w] and short [C, 2, h, w] = (first, last) frames."""
        long, mid, last = self.frames.split(HISTORY_FRAMES, dim=1)
        first = torch.zeros_like(last) if self.first is None else self.first
        return long, mid, torch.cat((first, last), dim=1)


def empty_history(channels: int, height: int, width: int, device: torch.device) -> History:
    """The history of a text-to-video request before its first chunk: zeros of the latent size."""
    frames = torch.zeros(channels, NUM_HISTORY_FRAMES, height, width, device=device)
    return History(frames=frames, first=None)


def seeded_history(frames: Tensor, first: Tensor) -> History:
    """The history that begins an image- or video-to-video request.

    Args:
        frames: [C, T, h, w] latents that came before; the last 19 are kept, zeros stand before fewer.
        first: [C, 1, h, w], pinned for the whole video.
    """
    missing = max(0, NUM_HISTORY_FRAMES - frames.shape[1])
    window = F.pad(frames[:, -NUM_HISTORY_FRAMES:], (0, 0, 0, 0, missing, 0))
    return History(frames=window.float(), first=first.float())


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryTokens:
    """Embedded history of one chunk: tokens [Nh, D], rotary [Nh, 2, Dh/2] float32, in the order long, mid, short."""

    tokens: Tensor
    rotary: Tensor
