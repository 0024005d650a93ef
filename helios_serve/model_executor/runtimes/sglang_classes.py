"""What SGLang-Diffusion keeps of a model family before it serves one: its settings and its pipelines, no model code.

Knows SGLang's contract of both. The stages, and with them the model code, are imported when a Helios checkpoint is
served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sglang.multimodal_gen.configs.pipeline_configs.base import ModelTaskType, PipelineConfig
from sglang.multimodal_gen.configs.pipeline_configs.model_deployment_config import ModelDeploymentConfig
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.server_args import ServerArgs

from helios_serve.errors import UnsupportedOperationError

_PIXELS_PER_TOKEN = 16 * 16 * 4
"""Of height, width and time: the VAE's factors and the transformer's patch."""


@dataclass
class HeliosServeConfig(PipelineConfig):  # type: ignore[misc]
    """What SGLang asks about a model before it is loaded: the same for all variants, which the checkpoint tells apart.

    SGLang looks for `helios` in the name of this class, and then leaves frame counts alone when ranks share forwards.
    """

    task_type: ModelTaskType = ModelTaskType.T2V
    supported_task_types: ClassVar[tuple[ModelTaskType, ...]] = (
        ModelTaskType.T2V,
        ModelTaskType.I2V,
        ModelTaskType.V2V,
    )
    supports_auto_residency: bool = False

    def get_model_deployment_config(self) -> ModelDeploymentConfig:
        """Degrees that were not given are chosen by this package, with the checkpoint's guidance in mind."""
        return ModelDeploymentConfig(auto_enable_cfg_parallel=False)

    def validate_server_args(self, server_args: ServerArgs) -> None:
        """Raises: UnsupportedOperationError for a setting that would be ignored, with what to do."""
        from helios_serve.model_executor.runtimes.sglang_settings import model_config

        model_config(server_args)

    def supports_dynamic_batching(self) -> bool:
        return True

    def supports_native_grouped_requests(self) -> bool:
        """Requests share forwards as they are: nothing has to be merged, and sizes may differ."""
        return True

    def supports_batching_image_conditioning(self) -> bool:
        return True

    def supports_disaggregation(self) -> bool:
        return True

    def estimate_request_cost(self, batch: Req) -> float:
        """For caps of `--batching-config`: tokens of the last stage, of all sequences and chunks."""
        num_sequences = 2 if batch.guidance_scale > 1.0 else 1
        pixels = batch.width * batch.height * batch.num_frames * batch.num_outputs_per_prompt
        return float(num_sequences * pixels / _PIXELS_PER_TOKEN)


class HeliosServePipeline(ComposedPipelineBase):  # type: ignore[misc]
    """Text-, image- and video-to-video with every Helios checkpoint; the checkpoint's configuration says which it is.

    Raises: CheckpointError for what keeps the checkpoint from being served; UnsupportedOperationError for a setting of
        the runtime that would be ignored.
    """

    pipeline_name: ClassVar[str] = "HeliosPipeline"
    is_video_pipeline: ClassVar[bool] = True
    _required_config_modules: ClassVar[list[str]] = []

    def load_modules(self, server_args: ServerArgs, loaded_modules: object = None) -> dict[str, Any]:
        """None: SGLang places, shards and converts what it is told of; the stages load theirs, ready as they are."""
        if not isinstance(server_args.pipeline_config, HeliosServeConfig):
            raise UnsupportedOperationError(
                f"{server_args.model_path}: SGLang takes its name for that of another model "
                f"({type(server_args.pipeline_config).__name__}); add --model-id Helios-Base, for any variant"
            )
        return {}

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """The stages of this server's role, each with what it needs of the checkpoint."""
        from helios_serve.model_executor.runtimes.sglang_stages import make_stages

        for name, role, make in make_stages(server_args):
            self.add_stage_factory(role, make, name)


class HeliosServePyramidPipeline(HeliosServePipeline):
    """The same, under the name that checkpoints of several stages have."""

    pipeline_name: ClassVar[str] = "HeliosPyramidPipeline"


PIPELINES = (HeliosServePipeline, HeliosServePyramidPipeline)
"""By `_class_name` of a checkpoint's model_index.json, under which SGLang has backends of its own."""
