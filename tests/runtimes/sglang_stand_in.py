"""As much of SGLang-Diffusion as this package's classes are made of, for tests without it. Each name is where SGLang
has it; the real package is run by `make test-sglang`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from types import ModuleType, SimpleNamespace
from typing import Any


class ModelTaskType(Enum):
    T2V = auto()
    I2V = auto()
    V2V = auto()


class RoleType(StrEnum):
    MONOLITHIC = "monolithic"
    ENCODER = "encoder"
    DENOISER = "denoiser"
    DECODER = "decoder"


@dataclass
class PipelineConfig:
    task_type: ModelTaskType = ModelTaskType.I2V
    supports_auto_residency: bool = True
    dit_precision: str = "bf16"
    vae_precision: str = "fp32"


@dataclass
class SamplingParams:
    task_type: ModelTaskType | str | None = None
    request_id: str | None = None
    image_path: str | list[str] | None = None
    video_path: str | list[str] | None = None
    prompt: str | None = None
    negative_prompt: str = "worst quality"
    num_outputs_per_prompt: int = 1
    seed: int | list[int] = 42
    num_frames: int = 1
    height: int | None = None
    width: int | None = None
    fps: int = 24
    num_inference_steps: int | None = None
    guidance_scale: float | None = 1.0
    guidance_scale_2: float | None = None
    true_cfg_scale: float | None = None
    guidance_rescale: float = 0.0
    cfg_normalization: float = 0.0
    boundary_ratio: float | None = None
    cfg_gate_step: float | None = None
    max_sequence_length: int | None = None
    flow_shift: float | None = None
    progressive_mode: str = "fullres"
    enable_teacache: bool = False
    enable_cache_dit: bool | None = None
    cache_dit_params: dict[str, Any] | None = None
    attention_backend_override: str | None = None
    skip_softmax_params: dict[str, Any] | None = None
    enable_spectrum: bool = False
    rollout: bool = False
    return_trajectory_latents: bool = False
    return_trajectory_decoded: bool = False
    diffusers_kwargs: dict[str, Any] | None = None
    adjust_frames: bool = True
    enable_sequence_shard: bool | None = None

    def _set_output_file_name(self) -> None: ...


@dataclass
class Req:
    sampling_params: Any
    session: Any = None
    block_idx: int = 0
    is_warmup: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    condition_inputs: dict[str, Any] = field(default_factory=dict)
    output: Any = None

    @property
    def prompt(self) -> Any:
        return self.sampling_params.prompt


class PipelineStage:
    steps_reported = 0

    @contextmanager
    def progress_bar(self, *, total: int, batch: Req) -> Iterator[Any]:
        yield SimpleNamespace(update=self._count)

    def _count(self, steps: int) -> None:
        self.steps_reported += steps


class Session:
    """Of a realtime connection, as the worker keeps it."""

    def __init__(self) -> None:
        self.states: dict[type, Any] = {}

    def get_or_create_state(self, kind: type) -> Any:
        return self.states.setdefault(kind, kind())


@dataclass
class RealtimeChunkInputs:
    prompt: str
    condition_inputs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Registry:
    """What was registered."""

    pipelines: list[dict[str, Any]] = field(default_factory=list)
    adapters: list[tuple[type, type]] = field(default_factory=list)

    def register_pipeline(self, pipeline: type, **classes: Any) -> None:
        self.pipelines.append({"pipeline": pipeline, **classes})

    def register_realtime_model_adapter(self, config: type, adapter: type) -> None:
        self.adapters.append((config, adapter))


def modules(registry: Registry) -> dict[str, ModuleType]:
    """By full name, packages above them included."""
    empty: type = type("Empty", (), {})
    gen = "sglang.multimodal_gen"
    realtime = f"{gen}.runtime.entrypoints.openai.realtime"
    contents: dict[str, dict[str, Any]] = {
        f"{gen}.registry": {"register_pipeline": registry.register_pipeline},
        f"{gen}.configs.pipeline_configs.base": {"ModelTaskType": ModelTaskType, "PipelineConfig": PipelineConfig},
        f"{gen}.configs.pipeline_configs.model_deployment_config": {"ModelDeploymentConfig": SimpleNamespace},
        f"{gen}.configs.sample.sampling_params": {"SamplingParams": SamplingParams},
        f"{gen}.runtime.disaggregation.roles": {"RoleType": RoleType},
        f"{gen}.runtime.distributed": {"get_world_rank": lambda: 0},
        f"{gen}.runtime.entrypoints.utils": {"expand_request_outputs": lambda req: [req, req]},
        f"{gen}.runtime.entrypoints.openai.protocol": {
            "RealtimeEvent": empty,
            "RealtimeVideoGenerationsRequest": empty,
        },
        f"{gen}.runtime.entrypoints.openai.utils": {"build_sampling_params": nullcontext},
        f"{realtime}.generate_session": {"GenerateSession": empty, "RealtimeChunkContext": empty},
        f"{realtime}.realtime_adapter": {
            "BaseRealtimeModelAdapter": empty,
            "RealtimeChunkInputs": RealtimeChunkInputs,
            "save_realtime_first_frame": nullcontext,
        },
        f"{realtime}.registry": {"register_realtime_model_adapter": registry.register_realtime_model_adapter},
        f"{gen}.runtime.pipelines_core.composed_pipeline_base": {"ComposedPipelineBase": empty},
        f"{gen}.runtime.pipelines_core.schedule_batch": {"Req": Req},
        f"{gen}.runtime.pipelines_core.stages.base": {"PipelineStage": PipelineStage},
        f"{gen}.runtime.platforms": {"current_platform": SimpleNamespace(is_cuda=lambda: False)},
        f"{gen}.runtime.realtime.session": {"BaseRealtimeState": empty},
        f"{gen}.runtime.server_args": {"ServerArgs": empty},
        "sglang.srt.utils.common": {"get_image_bytes": lambda reference: b""},
    }
    made: dict[str, ModuleType] = {}
    for name, values in contents.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            made.setdefault(package, ModuleType(package))
        for key, value in values.items():
            setattr(made[name], key, value)
    return made
