"""What the transformer must know half way through: where the thing is, seen from each token, and what it looks like.

A loss on the tokens between the blocks teaches it within minutes what the flow's own loss hardly shows. Knows plans and
tokens; knows no latents.
Shape letters: B examples, T frames, h x w tokens of a frame, M = T h w, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tools.tiny_checkpoint.captions import VALUES
from tools.tiny_checkpoint.plans import Plan

_PLACE_WEIGHT, _LOOKS_WEIGHT = 0.3, 0.05
_SIZES = [len(names) for names in VALUES.values()]


class MiddleReader(nn.Module):
    """Reads the first thing's place and attributes off every token; gone when the training is over."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.read = nn.Linear(dim, 4 + sum(_SIZES))

    def loss(self, middle: Tensor, plan: Plan, grid: tuple[int, int, int]) -> Tensor:
        """Squared error of the angles from each token to the thing, and cross-entropy of its attributes.

        Args:
            middle: current tokens between two blocks, [B, M, D].
            grid: T, h and w.
        """
        told = self.read(F.layer_norm(middle.float(), middle.shape[-1:]))
        place, looks = told[..., :4], told[..., 4:].transpose(1, 2).split(_SIZES, dim=1)
        error = (place - _places(plan.centres, grid)).square().mean()
        tokens = plan.attributes[:, None].expand(-1, middle.shape[1], -1).unbind(-1)
        losses = [F.cross_entropy(*pair) for pair in zip(looks, tokens, strict=True)]
        loss: Tensor = _PLACE_WEIGHT * error + _LOOKS_WEIGHT * torch.stack(losses).mean()
        return loss


def _places(centres: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Cosine and sine of the angles from each token to the thing, of columns and of rows: [B, T, 2] -> [B, M, 4]."""
    _, height, width = grid
    across, along = (_turns(count, centres.device) for count in (width, height))
    x = (centres[:, :, None, None, 0] - across).expand(-1, -1, height, -1)
    y = (centres[:, :, None, None, 1] - along[:, None]).expand(-1, -1, -1, width)
    return torch.stack((x.cos(), x.sin(), y.cos(), y.sin()), dim=-1).flatten(1, 3)


def _turns(count: int, device: torch.device) -> Tensor:
    """The middles of so many cells of a full turn."""
    return 2 * math.pi * (torch.arange(count, device=device) + 0.5) / count
