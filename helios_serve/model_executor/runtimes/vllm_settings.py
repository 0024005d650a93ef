"""Settings of a vLLM-Omni stage as this package's own, and a clear refusal of those that it would not honour."""

from __future__ import annotations

import torch.distributed as dist
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.offloader.config import OffloadStrategy, resolve_offload_strategy
from vllm_omni.platforms import current_omni_platform

from helios_serve.config import Device, DType, ModelConfig, Offload
from helios_serve.errors import UnsupportedOperationError
from helios_serve.parallel.collectives import RankGroup
from helios_serve.parallel.mesh import SOLO, Degrees, Mesh, build_mesh

_DTYPES: dict[str, DType] = {"torch.float32": "float32", "torch.bfloat16": "bfloat16"}
_OFFLOADS: dict[OffloadStrategy, Offload] = {
    OffloadStrategy.NONE: "none",
    OffloadStrategy.MODEL_LEVEL: "text_encoder",
    OffloadStrategy.LAYER_WISE: "all",
}
"""What stays in host memory. Of the two that the runtime's model level takes turns with, only the text encoder has to:
the transformer is all that is left on the device."""


def model_config(od_config: OmniDiffusionConfig) -> ModelConfig:
    """Which checkpoint a stage runs, and how.

    Raises: UnsupportedOperationError for a setting that would be ignored, with what to do.
    """
    _refuse_ignored(od_config)
    dtype = _DTYPES.get(str(od_config.dtype))
    if dtype is None:
        raise UnsupportedOperationError(f"--dtype {od_config.dtype}: Helios runs in bfloat16 or float32", param="dtype")
    device: Device = "cuda" if current_omni_platform.is_cuda() else "cpu"
    return ModelConfig(
        model=str(od_config.model),
        device=device,
        dtype=dtype,
        offload=_OFFLOADS[resolve_offload_strategy(od_config)],
        quantize="none" if _quantization(od_config) is None else "fp8",
    )


def mesh_of(od_config: OmniDiffusionConfig, num_heads: int) -> Mesh:
    """How the ranks of a stage share forwards: as its Ulysses, ring and CFG degrees say. All of them call this at the
    same time, in the process group that the runtime has made.

    Raises: UnsupportedOperationError for degrees that do not fit the ranks and heads, with what fits.
    """
    parallel = od_config.parallel_config
    degrees = Degrees(cfg=parallel.cfg_parallel_size, ring=parallel.ring_degree, ulysses=parallel.ulysses_degree)
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    try:
        degrees.check(num_ranks, num_heads)
    except ValueError as error:
        raise UnsupportedOperationError(str(error), param="parallel_config") from error
    if num_ranks == 1:
        return SOLO
    backend = "nccl" if current_omni_platform.is_cuda() else "gloo"
    return build_mesh(RankGroup(rank=dist.get_rank(), size=num_ranks), degrees, backend)


def _quantization(od_config: OmniDiffusionConfig) -> str | None:
    config = od_config.quantization_config
    return None if config is None else str(config.get_name())


def _refuse_ignored(od_config: OmniDiffusionConfig) -> None:
    parallel = od_config.parallel_config
    quantization = _quantization(od_config)
    refused = (
        ("--tensor-parallel-size", parallel.tensor_parallel_size > 1, "every rank holds the whole transformer"),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size > 1, "every rank holds the whole transformer"),
        ("--data-parallel-size", (parallel.data_parallel_size or 1) > 1, "ranks share each forward"),
        ("--allgather-degree", parallel.allgather_degree > 1, "ranks exchange by Ulysses and ring"),
        ("--vae-patch-parallel-size", parallel.vae_patch_parallel_size > 1, "a chunk is decoded on one rank"),
        ("--use-hsdp", parallel.use_hsdp, "every rank holds the whole transformer"),
        (
            "--enable-distributed-layerwise-offload",
            od_config.enable_distributed_layerwise_offload,
            "--enable-layerwise-offload keeps layers in host memory",
        ),
        (
            "--diffusion-offload-config",
            od_config.diffusion_offload_config is not None,
            "--enable-layerwise-offload and --enable-cpu-offload choose what is kept in host memory",
        ),
        ("--cache-backend", od_config.cache_backend not in (None, "none"), "every step is computed"),
        (f"--quantization {quantization}", quantization not in (None, "fp8"), "fp8 is served"),
        (
            f"--quantization {quantization} with offloading",
            quantization is not None and resolve_offload_strategy(od_config) is not OffloadStrategy.NONE,
            "one of the two is served at a time",
        ),
    )
    for name, is_set, why in refused:
        if is_set:
            raise UnsupportedOperationError(f"{name}: not with helios-serve, where {why}; leave it out", param=name)
