"""The text side: UMT5-XXL with random weights, and the keys and values that the transformer makes of its output.

Knows transformers' UMT5; no tokenizer, as ids cost nothing beside it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import random_model
from benchmarks.plan import Bench, Measurement, Section, UnavailableError

_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 256384}
_TINY = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 64}
_ENCODE_MS: dict[int, dict[str, Any]] = {120: {"gate": 15.0, "goal": 8.0, "limit": 2.2}, 512: {"limit": 6.1}}
_LINEAR_STD = 0.02


def measure_text(bench: Bench) -> list[Measurement]:
    """A prompt's embeddings by length, then the keys and values of a prompt without padding."""
    measurements = []
    with torch.inference_mode():
        umt5 = _random_umt5(bench)
        for num_tokens, targets in _ENCODE_MS.items():
            run = partial(_encode, umt5, _embedded(bench, umt5, num_tokens))
            samples = bench.clock.measure(run, repetitions=bench.sizes.repetitions)
            name = f"text/encode_ms/{num_tokens}_tokens"
            measurements.append(Measurement(name=name, unit="ms", samples=samples, **targets))
        del umt5
        transformer = random_model.transformer_of(bench)
        prompt = random_model.random_prompt(bench.sizes, torch.Generator(bench.device).manual_seed(8))
        samples = bench.clock.measure(lambda _: transformer.project_text(prompt), repetitions=bench.sizes.repetitions)
        measurements.append(Measurement(name="text/project_ms/512_tokens", unit="ms", samples=samples))
    return measurements


def _random_umt5(bench: Bench) -> Any:
    """Raises: UnavailableError without transformers."""
    try:
        from transformers import UMT5Config, UMT5EncoderModel
    except ImportError as error:
        raise UnavailableError(f"transformers: {error}") from error
    sizes = _XXL if bench.sizes.is_full else _TINY
    make_config: Any = UMT5Config
    with torch.device("meta"):
        made: Any = UMT5EncoderModel(make_config(**sizes, feed_forward_proj="gated-gelu"))
    made.to(torch.bfloat16).to_empty(device=bench.device)
    generator = torch.Generator(bench.device).manual_seed(9)
    for name, parameter in made.named_parameters():
        is_norm = "norm" in name
        parameter.normal_(1.0 if is_norm else 0.0, 0.1 if is_norm else _LINEAR_STD, generator=generator)
    return made.eval()


def _embedded(bench: Bench, umt5: Any, num_tokens: int) -> list[Tensor]:
    generator = torch.Generator(bench.device).manual_seed(num_tokens)
    shape = (1, num_tokens, umt5.config.d_model)
    return [torch.randn(shape, generator=generator, device=bench.device).to(umt5.dtype) for _ in range(3)]


def _encode(umt5: Any, embedded: list[Tensor], number: int) -> Tensor:
    tokens = embedded[number % len(embedded)]
    mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    hidden: Tensor = umt5(inputs_embeds=tokens, attention_mask=mask).last_hidden_state
    return hidden


SECTIONS = (Section(name="text", value_rank=45, expected_s=10, run=measure_text),)
