"""What each approximation leaves out, and how far it takes a video, on tiny checkpoints with random weights: the table
in docs/performance.md.

    python -m benchmarks.approximations docs/performance.md

The work that is left out is counted. The distance says that two videos are not the same and no more: random weights
know nothing of quality.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from helios_serve.config import ModelConfig
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.model_executor.packing import PackedBatch
from helios_serve.model_executor.runner import Runner
from helios_serve.model_executor.tiny_checkpoint import write_tiny_checkpoint
from helios_serve.types import Approximation, PromptChange, SamplingParams, Variant, VideoRequest
from helios_serve.workers.encoder import EncoderWorker

_BEGIN, _END = "<!-- approximations table: begin -->", "<!-- approximations table: end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A video of two chunks. threshold: of `step_cache`."""

    variant: Variant
    steps: tuple[int, ...]
    names: tuple[Approximation, ...]
    threshold: float = 0.0

    @property
    def key(self) -> tuple[Variant, tuple[int, ...]]:
        """Of its lossless video."""
        return self.variant, self.steps

    @property
    def params(self) -> SamplingParams:
        width, height = (48, 32) if self.variant == "base" else (64, 64)
        return SamplingParams(
            width=width,
            height=height,
            num_frames=66,
            fps=24,
            seed=1,
            steps=self.steps,
            guidance_scale=1.0 if self.variant == "distilled" else 5.0,
            use_zero_init=self.variant == "mid",
        )


_MANY_STEPS: tuple[tuple[Variant, tuple[int, ...]], ...] = (("mid", (20, 20, 20)), ("base", (50,)))
CASES = (
    Case(variant="distilled", steps=(1, 1, 1), names=("history_reuse",)),
    Case(variant="distilled", steps=(2, 2, 2), names=("history_reuse",)),
    Case(variant="mid", steps=(20, 20, 20), names=("history_reuse",)),
    Case(variant="base", steps=(50,), names=("history_reuse",)),
    *(
        Case(variant=variant, steps=steps, names=("step_cache",), threshold=threshold)
        for variant, steps in _MANY_STEPS
        for threshold in (0.2, 0.4, 0.8)
    ),
    Case(variant="base", steps=(50,), names=("history_reuse", "step_cache"), threshold=0.2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """Latents [C, T, h, w], and what went through the transformer for them: sequences and their tokens."""

    latents: Tensor
    num_sequences: int
    num_tokens: int


def make_video(model: HeliosModel, params: SamplingParams) -> Video:
    """A whole video, alone."""
    request = VideoRequest(request_id="r", prompts=(PromptChange(chunk=0, prompt="a fox"),), params=params)
    encoded = EncoderWorker(model.text_encoder, model.vae).encode(request)
    runner, conditioning, state = Runner(model.transformer, model.rules), encoded.conditioning, encoded.generator_state
    made: list[Tensor] = []
    sizes: list[tuple[int, int]] = []

    def note(_: nn.Module, given: tuple[Any, ...]) -> None:
        batch = given[0]
        assert isinstance(batch, PackedBatch)
        sizes.append((len(batch.grids), batch.num_tokens))

    hook = model.transformer.register_forward_pre_hook(note)
    for chunk in range(params.num_chunks):
        history = conditioning.history.followed_by(made[-3:], made[0] if made else None)
        runner.join(conditioning.chunk_input("r", "r", chunk, history, state))
        while runner.active:
            for output in runner.step().finished:
                made.append(output.latents)
                state = output.generator_state
    hook.remove()
    num_sequences, num_tokens = (sum(counts) for counts in zip(*sizes, strict=True))
    return Video(latents=torch.cat(made, dim=1), num_sequences=num_sequences, num_tokens=num_tokens)


def distance(ours: Tensor, right: Tensor) -> float:
    """Norm of the difference, as a share of the right one's."""
    return float((ours - right).norm() / right.norm())


def render(cases: Sequence[Case] = CASES) -> str:
    """The table, between its marks."""
    head = ("approximation", "checkpoint, steps", "sequences run", "tokens run", "distance")
    rows = []
    with TemporaryDirectory() as folder:
        models = {variant: _model(variant, Path(folder)) for variant in {case.variant for case in cases}}
        lossless = {key: make_video(models[key[0]], case.params) for key, case in {c.key: c for c in cases}.items()}
        for case in cases:
            model = replace(models[case.variant], step_cache_threshold=case.threshold)
            ours = make_video(model, replace(case.params, approximations=case.names))
            rows.append(_row(case, lossless[case.key], ours))
    lines = ["| " + " | ".join(row) + " |" for row in (head, ("---", "---", "---:", "---:", "---:"), *rows)]
    return "\n".join((_BEGIN, "", *lines, "", _END))


def _model(variant: Variant, folder: Path) -> HeliosModel:
    write_tiny_checkpoint(variant, folder / variant)
    return load_model(ModelConfig(model=str(folder / variant)))


def _row(case: Case, lossless: Video, ours: Video) -> tuple[str, ...]:
    named = " + ".join(f"`{name}`" for name in case.names)
    at = f" at {case.threshold}" if "step_cache" in case.names else ""
    return (
        named + at,
        f"{case.variant}, {list(case.steps)}",
        f"{ours.num_sequences} of {lossless.num_sequences}",
        f"{ours.num_tokens / lossless.num_tokens:.0%}",
        f"{distance(ours.latents, lossless.latents):.2g}",
    )


def write(page: Path) -> None:
    """Puts the table between the marks of a page."""
    text = page.read_text()
    begin, end = text.index(_BEGIN), text.index(_END) + len(_END)
    page.write_text(text[:begin] + render() + text[end:])


if __name__ == "__main__":
    write(Path(sys.argv[1]))
