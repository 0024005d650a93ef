"""Executors of a checkpoint, in this process or on a Ray cluster, and what the engine assumes of their speed.

Puts workers and models together; knows no server and no caller.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from helios_serve.config import Device, ExecutorConfig, ModelConfig
from helios_serve.engine.executor import Executor
from helios_serve.engine.step_cost import CPU_PRIOR, CostModel, DevicePrior, ModelShape
from helios_serve.errors import HeliosError
from helios_serve.model_executor.approximations import check_approximations
from helios_serve.model_executor.model import HeliosModel, load_model, open_checkpoint
from helios_serve.model_executor.model_config import CheckpointConfig
from helios_serve.model_executor.runner import Runner
from helios_serve.model_executor.spread import degrees_for, explain_degrees
from helios_serve.parallel.links import find_links
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.local_executor import LocalExecutor
from helios_serve.workers.vae import VaeWorker

logger = logging.getLogger(__name__)


def local(model: ModelConfig) -> tuple[CheckpointConfig, Executor]:
    """A checkpoint with all its roles in this process. Raises: CheckpointError."""
    loaded = load_model(model)
    return loaded.config, local_executor(loaded)


def on_cluster(model: ModelConfig, ray: ExecutorConfig) -> tuple[CheckpointConfig, Executor]:
    """A checkpoint with its roles in workers of a Ray cluster.

    Raises: ValueError for degrees that do not fit the checkpoint, CheckpointError for approximations that do not fit
    either; HeliosError without the package.
    """
    config = open_checkpoint(model).config
    links = find_links(model.device, ray.num_dit_ranks)
    degrees = degrees_for(config, ray.num_dit_ranks, ray.degrees, links=links)
    if degrees.num_ranks > 1:
        logger.info(explain_degrees(degrees, config, model.dtype, links))
    solver = config.scheduler.solver
    check_approximations(model.approximations, solver, num_ranks=degrees.num_ranks, cfg_degree=degrees.cfg)
    return config, ray_executor(model, ray)


def local_executor(model: HeliosModel) -> LocalExecutor:
    """All roles of one checkpoint in this process."""
    return LocalExecutor(
        EncoderWorker(model.text_encoder, model.vae), Runner(model.transformer, model.rules), VaeWorker(model.vae)
    )


def ray_executor(model: ModelConfig, config: ExecutorConfig) -> Executor:
    """Every role in workers of a Ray cluster.

    Raises: HeliosError without the package.
    """
    try:
        from helios_serve.workers.ray_executor import RayExecutor
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise HeliosError("executor ray: the package is missing; pip install 'helios-serve[ray]'") from error
    return RayExecutor(model, config)


def cost_model(config: CheckpointConfig, device: Device, *, is_shared: bool) -> CostModel:
    """What the engine assumes of a checkpoint on a device until it has measured.

    Args:
        is_shared: whether decoding takes its time from the device that runs the steps.
    """
    transformer = config.transformer
    shape = ModelShape(
        dim=transformer.dim,
        ffn_dim=transformer.ffn_dim,
        num_layers=transformer.num_layers,
        patch=transformer.patch_size,
        spatial_scale=config.vae.scale_factor_spatial,
    )
    prior = CPU_PRIOR if device == "cpu" else DevicePrior()
    return CostModel(shape, replace(prior, vae_on_device=is_shared))
