"""diffusers' own pipeline at the workload of `bench throughput --compare diffusers`.

Knows how to call it; it may be absent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from helios_serve.config import ModelConfig
from helios_serve.errors import InvalidRequestError
from helios_serve.model_executor.checkpoint import resolve_checkpoint
from helios_serve.model_executor.sampling.pyramid import SINGULAR_ROOT
from helios_serve.types import VideoRequest


def diffusers_seconds(model: ModelConfig, request: VideoRequest, num_repeats: int) -> tuple[list[float], str]:
    """Seconds of each call behind a first one that does not count, and the package with its version.

    Raises: InvalidRequestError when diffusers is missing, or nothing but its own weights would be compared.
    """
    try:
        import diffusers
    except ImportError as error:
        raise InvalidRequestError(f"compare diffusers: {error}; pip install diffusers", param="compare") from error
    if model.weights != "checkpoint":
        raise InvalidRequestError("compare diffusers: needs the weights of a checkpoint", param="compare")
    path = resolve_checkpoint(model.model)
    is_base = '"HeliosPipeline"' in (path / "model_index.json").read_text()
    kind: Any = diffusers.HeliosPipeline if is_base else diffusers.HeliosPyramidPipeline
    pipeline = kind.from_pretrained(path, dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[model.dtype])
    pipeline.to(model.device)
    pipeline.set_progress_bar_config(disable=True)
    params = request.params
    steps = (
        {"num_inference_steps": params.steps[0]}
        if is_base
        else {
            "pyramid_num_inference_steps_list": list(params.steps),
            "is_amplify_first_chunk": params.amplify_first_chunk,
        }
    )

    def call() -> float:
        began = time.perf_counter()
        pipeline(
            prompt=request.prompts[0].prompt,
            negative_prompt=request.negative_prompt,
            width=params.width,
            height=params.height,
            num_frames=params.num_frames,
            guidance_scale=params.guidance_scale,
            generator=torch.Generator().manual_seed(params.seed),
            output_type="np",
            **steps,
        )
        return time.perf_counter() - began

    with _factorised():
        call()
        return [call() for _ in range(num_repeats)], f"diffusers {diffusers.__version__}"


@contextmanager
def _factorised() -> Iterator[None]:
    """The pipeline's 4x4 block covariance is singular but for rounding, and some processors cannot factorise it: there
    it gets the root that helios_serve takes."""
    factorise: Callable[[Tensor], Tensor] = torch.linalg.cholesky

    def portable(matrix: Tensor) -> Tensor:
        try:
            return factorise(matrix)
        except RuntimeError:
            raised = matrix + torch.eye(len(matrix), device=matrix.device) * SINGULAR_ROOT**2
            return factorise(raised.double()).float()

    with mock.patch.object(torch.linalg, "cholesky", portable):
        yield
