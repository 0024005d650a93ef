"""A name for latents by their content. Knows bytes; knows nothing of requests."""

from __future__ import annotations

import hashlib

from torch import Tensor


def latents_digest(latents: Tensor) -> str:
    """BLAKE2b-128 of the float32 bytes of a tensor, row-major, in hexadecimal. Waits for the tensor's device."""
    host = latents.float().cpu().contiguous()
    return hashlib.blake2b(host.numpy().tobytes(), digest_size=16).hexdigest()
