"""The work of encoders and VAE workers for one request, as their pools queue it. Knows tasks and predictions; queues
nothing itself."""

from __future__ import annotations

import math

from helios_serve.config import EngineConfig
from helios_serve.engine.request_run import RequestRun
from helios_serve.engine.role_pool import PoolJob
from helios_serve.engine.step_cost import REFERENCE_PIXELS, CostModel
from helios_serve.types import DecodeTask, EncodeTask, SamplingParams


def encoding_name(run: RequestRun) -> str:
    """The pool's name of the encoding that the next chunk needs."""
    return f"encode{run.num_changes}"


def encode_job(run: RequestRun, model: CostModel, config: EngineConfig) -> PoolJob:
    """The prompts of a request, and its media unless that was done. What it reads is settled when it is given out."""
    state = run.state
    needs_media = run.conditioning is None and run.request.task != "t2v" and run.request.start is None
    return PoolJob(
        request_id=run.request_id,
        name=encoding_name(run),
        deadline=state.deadline if state.live else math.inf,
        timeout_s=config.encode_timeout_s,
        expected_s=model.text_s() + (model.media_s() if needs_media else 0.0),
        make_task=lambda task_id: EncodeTask(task_id=task_id, request=run.request, conditioning=run.conditioning),
    )


def decode_job(run: RequestRun, chunk: int, model: CostModel, config: EngineConfig) -> PoolJob:
    """A finished chunk to be decoded and encoded as a segment."""
    state, params, latents = run.state, run.request.params, run.records[chunk].latents
    return PoolJob(
        request_id=run.request_id,
        name=f"d{chunk}",
        deadline=state.deadline - state.period_s if state.live else math.inf,
        timeout_s=config.decode_timeout_s,
        expected_s=model.decode_s(pixel_ratio(params)),
        make_task=lambda task_id: DecodeTask(
            task_id=task_id,
            request_id=run.request_id,
            chunk=chunk,
            params=params,
            latents=latents,
            is_due=state.live,
        ),
    )


def pixel_ratio(params: SamplingParams) -> float:
    """Pixels of a frame as a share of the reference size."""
    return params.width * params.height / REFERENCE_PIXELS
