"""What measurements are called where people read them. Knows names; measures nothing."""

from __future__ import annotations

import re

_WORDS: tuple[tuple[str, str], ...] = (
    (r"chunk/fps/(\d)-(\d)-(\d)/fp8", r"frames per second, FP8, steps [\1,\2,\3], VAE included"),
    (r"chunk/fps/(\d)-(\d)-(\d)/graphs", r"frames per second, CUDA graphs, steps [\1,\2,\3], VAE included"),
    (r"chunk/fps/(\d)-(\d)-(\d)", r"frames per second, steps [\1,\2,\3], VAE included"),
    (r"chunk/first_ms/(\d)-(\d)-(\d)", r"first chunk, steps [\1,\2,\3] twice, to 33 frames"),
    (r"chunk/idle_share/(\d)-(\d)-(\d)/fp8", r"chunk [\1,\2,\3] FP8: idle share of the GPU"),
    (r"chunk/idle_share/(\d)-(\d)-(\d)/graphs", r"chunk [\1,\2,\3], CUDA graphs: idle share of the GPU"),
    (r"chunk/idle_share/(\d)-(\d)-(\d)", r"chunk [\1,\2,\3]: idle share of the GPU"),
    (r"chunk/device_waits/(\d)-(\d)-(\d)/fp8", r"chunk [\1,\2,\3] FP8: waits for the GPU"),
    (r"chunk/device_waits/(\d)-(\d)-(\d)/graphs", r"chunk [\1,\2,\3], CUDA graphs: waits for the GPU"),
    (r"chunk/device_waits/(\d)-(\d)-(\d)", r"chunk [\1,\2,\3]: waits for the GPU"),
    (r"chunk/gain/(\d)-(\d)-(\d)/x(\d)", r"frames per second, steps [\1,\2,\3]: of \4 streams together over one"),
    (r"text/encode_ms/(\d+)_tokens", r"text encoder, prompt of \1 tokens"),
    (r"text/library_encode_ms/(\d+)_tokens", r"text encoder by transformers, prompt of \1 tokens"),
    (r"dit/forward_ms/stage(\d)", r"forward, stage \1"),
    (r"dit/forward_kernel_ms/stage(\d)", r"forward, stage \1: its kernels"),
    (r"dit/graphs/forward_ms/stage(\d)", r"forward in a row of four, stage \1, by a CUDA graph"),
    (r"dit/graphs/idle_share/stage(\d)", r"forward in a row of four, stage \1, by a CUDA graph: idle share of the GPU"),
    (r"dit/forward_fp8_ms/stage(\d)", r"forward, stage \1, FP8"),
    (r"dit/forward_fp8_attention_ms/stage(\d)", r"forward, stage \1, attention in FP8"),
    (r"dit/fp8_with_attention_speed_up/(\d)-(\d)-(\d)", r"FP8, attention too, over bf16, forwards of [\1,\2,\3]"),
    (r"dit/fp8_speed_up/(\d)-(\d)-(\d)", r"FP8 over bf16, forwards of [\1,\2,\3]"),
    (r"vae/decode_(?:kernel_)?ms/(\w+)", r"VAE decode of 33 frames, \1"),
    (r"vae/encode_ms/(\d+)_frames", r"VAE encode, frames: \1"),
    (r"rival/ratio/(\w+)/vae_(\w+)", r"speed over \1 diffusers, its VAE in \2"),
    (r"rival/fps/(\w+)/vae_(\w+)", r"\1 diffusers, VAE in \2: frames per second"),
    (r"rival/forward_ms/(\w+)/stage(\d)", r"\1 diffusers: forward, stage \2"),
)


def title_of(name: str) -> str:
    """In words, or the name itself."""
    for pattern, words in _WORDS:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(words)
    return name
