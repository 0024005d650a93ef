"""The text side: UMT5-XXL with random weights, as it is served and as transformers runs it, and the keys and values
that the transformer makes of its output.

Knows no tokenizer, as ids cost nothing beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import random_model
from benchmarks.plan import Bench, Measurement, Section, UnavailableError
from benchmarks.yardsticks import distance
from helios_serve.model_executor.umt5 import encode_tokens

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
            embedded = _embedded(bench, umt5, num_tokens)
            ours, theirs = encode_tokens(umt5, embedded[0]), _encode_by_library(umt5, embedded[0])
            for name, encode, known in (
                ("encode", encode_tokens, targets | {"details": {"distance": distance(ours, theirs)}}),
                ("library_encode", _encode_by_library, {}),
            ):
                run = partial(_encode, encode, umt5, embedded)
                samples = bench.clock.measure(run, repetitions=bench.sizes.repetitions)
                named = f"text/{name}_ms/{num_tokens}_tokens"
                measurements.append(Measurement(name=named, unit="ms", samples=samples, **known))
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
    shape = (num_tokens, umt5.config.d_model)
    return [torch.randn(shape, generator=generator, device=bench.device).to(umt5.dtype) for _ in range(3)]


def _encode(encode: Callable[[Any, Tensor], Tensor], umt5: Any, embedded: list[Tensor], number: int) -> Tensor:
    return encode(umt5, embedded[number % len(embedded)])


def _encode_by_library(umt5: Any, tokens: Tensor) -> Tensor:
    """[N, D] -> [N, D], as `encode_tokens`."""
    mask = torch.ones(1, len(tokens), dtype=torch.int64, device=tokens.device)
    hidden: Tensor = umt5(inputs_embeds=tokens[None], attention_mask=mask).last_hidden_state[0]
    return hidden


SECTIONS = (Section(name="text", value_rank=45, expected_s=10, run=measure_text),)
