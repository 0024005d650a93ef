"""Classifier-free guidance: how a conditional and an unconditional flow become one. Pure functions of tensors."""

from __future__ import annotations

from torch import Tensor


def cfg(cond: Tensor, uncond: Tensor, guidance_scale: float) -> Tensor:
    """Plain guidance: u + g (c - u). Source: Ho and Salimans 2022, arXiv 2207.12598."""
    return uncond + guidance_scale * (cond - uncond)


def cfg_zero_star(cond: Tensor, uncond: Tensor, guidance_scale: float) -> Tensor:
    """Guidance from the unconditional flow scaled by its projection on the conditional one.

    Source: Fan et al. 2025, "CFG-Zero*", arXiv 2503.18886, equation 8.
    """
    c, u = cond.float().flatten(), uncond.float().flatten()
    alpha = ((c * u).sum() / (u.square().sum() + 1e-8)).to(cond.dtype)
    return uncond * alpha + guidance_scale * (cond - uncond * alpha)
