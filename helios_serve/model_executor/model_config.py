"""What a checkpoint's JSON files say, as frozen, checked values: its transformer, its scheduler and what follows for
the served variant.

Knows the keys and defaults of the reference's classes and which settings are served. Opens no file. Messages begin with
the file's path within the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast

from helios_serve.model_executor.json_keys import JsonKeys, require
from helios_serve.model_executor.recommendations import Recommendations
from helios_serve.model_executor.vae import VaeConfig
from helios_serve.types import Approximation, Guidance, ModelInfo, Variant

TRANSFORMER_FILE = "transformer/config.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
TEXT_ENCODER_FILE = "text_encoder/config.json"
MODEL_INDEX_FILE = "model_index.json"

MAX_TRAIN_TIMESTEPS = 100_000
"""Tables of this length are computed; a hundred times what the official checkpoints have."""

HistoryScaleMode = Literal["per_head", "scalar"]
Solver = Literal["unipc", "euler", "dmd"]
TimeShift = Literal["exponential", "linear"]

_DEFAULT_STEPS = {"base": 50, "mid": 20, "distilled": 2}
_DEFAULT_GUIDANCE_SCALE = {"base": 5.0, "mid": 5.0, "distilled": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """`transformer/config.json`; the defaults are those of the reference's class.

    fp8_edge_blocks: the linear layers of all blocks but so many at either end are stored in FP8; None: no block's are.
    """

    CLASS_NAME: ClassVar[str] = "HeliosTransformer3DModel"

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    eps: float = 1e-6
    rope_dim: tuple[int, int, int] = (44, 42, 42)
    rope_theta: float = 10000.0
    is_amplify_history: bool = False
    history_scale_mode: HistoryScaleMode = "per_head"
    fp8_edge_blocks: int | None = None

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def is_fp8(self, block: int) -> bool:
        """Whether the linear layers of a block are in FP8."""
        edge = self.fp8_edge_blocks
        return edge is not None and edge <= block < self.num_layers - edge

    @classmethod
    def from_json(cls, config: Mapping[str, object]) -> TransformerConfig:
        """Reads a parsed config.json; absent keys take the defaults.

        Raises: CheckpointError naming the key that is of the wrong type or not served.
        """
        keys = JsonKeys(TRANSFORMER_FILE, config)
        keys.require_class(cls.CLASS_NAME)
        keys.require_only("qk_norm", "rms_norm_across_heads")
        keys.require_only("added_kv_proj_dim", None)
        for key in ("cross_attn_norm", "guidance_cross_attn", "zero_history_timestep", "has_multi_term_memory_patch"):
            keys.require_only(key, True)
        in_channels = keys.positive("in_channels", 16)
        parsed = cls(
            patch_size=_triple(keys.integers("patch_size", (1, 2, 2), length=3)),
            num_attention_heads=keys.positive("num_attention_heads", 40),
            attention_head_dim=keys.positive("attention_head_dim", 128),
            in_channels=in_channels,
            out_channels=in_channels if keys.is_null("out_channels") else keys.positive("out_channels", 16),
            text_dim=keys.positive("text_dim", 4096),
            freq_dim=keys.positive("freq_dim", 256),
            ffn_dim=keys.positive("ffn_dim", 13824),
            num_layers=keys.positive("num_layers", 40),
            eps=keys.above_zero("eps", 1e-6),
            rope_dim=_triple(keys.integers("rope_dim", (44, 42, 42), length=3)),
            rope_theta=keys.above_zero("rope_theta", 10000.0),
            is_amplify_history=keys.flag("is_amplify_history", False),
            history_scale_mode=cast(
                HistoryScaleMode, keys.choice("history_scale_mode", "per_head", ("per_head", "scalar"))
            ),
            fp8_edge_blocks=keys.positive("fp8_edge_blocks", 1) if "fp8_edge_blocks" in config else None,
        )
        keys.warn_of_unread()
        parsed._check_shapes()
        return parsed

    def _check_shapes(self) -> None:
        t, height, width = self.patch_size
        require(t == 1 and height == width, TRANSFORMER_FILE, "patch_size", self.patch_size, "[1, p, p] is served")
        require(
            self.out_channels == self.in_channels,
            TRANSFORMER_FILE,
            "out_channels",
            self.out_channels,
            f"it must equal in_channels, {self.in_channels}",
        )
        require(
            sum(self.rope_dim) == self.attention_head_dim,
            TRANSFORMER_FILE,
            "rope_dim",
            self.rope_dim,
            f"its sum must be attention_head_dim, {self.attention_head_dim}",
        )
        require(
            not any(dim % 2 for dim in self.rope_dim),
            TRANSFORMER_FILE,
            "rope_dim",
            self.rope_dim,
            "its entries must be even",
        )
        require(self.freq_dim % 2 == 0, TRANSFORMER_FILE, "freq_dim", self.freq_dim, "it must be even")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """`scheduler/scheduler_config.json` of a HeliosScheduler or HeliosDMDScheduler.

    The shift bounds are not written by the reference's classes; its pipelines look for them all the same.
    """

    CLASS_NAMES: ClassVar[tuple[str, str]] = ("HeliosScheduler", "HeliosDMDScheduler")

    num_train_timesteps: int = 1000
    shift: float = 1.0
    stages: int = 3
    stage_range: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0)
    gamma: float = 1 / 3
    solver: Solver = "unipc"
    solver_order: int = 2
    lower_order_final: bool = True
    use_dynamic_shifting: bool = False
    time_shift_type: TimeShift = "exponential"
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    @property
    def class_name(self) -> str:
        return self.CLASS_NAMES[self.solver == "dmd"]

    @classmethod
    def from_json(cls, config: Mapping[str, object]) -> SchedulerConfig:
        """Reads a parsed scheduler_config.json; absent keys take the defaults of the class that the file names.

        Raises: CheckpointError naming the key that is of the wrong type or not served.
        """
        keys = JsonKeys(SCHEDULER_FILE, config)
        is_dmd = keys.require_class(*cls.CLASS_NAMES) == "HeliosDMDScheduler"
        keys.require_only("prediction_type", "flow_prediction")
        keys.require_only("use_flow_sigmas", True)
        shift_type = keys.choice("time_shift_type", "linear" if is_dmd else "exponential", ("exponential", "linear"))
        parsed = cls(
            num_train_timesteps=keys.positive("num_train_timesteps", 1000),
            shift=keys.above_zero("shift", 1.0),
            stages=keys.positive("stages", 3),
            stage_range=keys.numbers("stage_range", (0.0, 1 / 3, 2 / 3, 1.0)),
            gamma=keys.number("gamma", 1 / 3),
            solver="dmd" if is_dmd else _unipc_or_euler(keys),
            solver_order=2 if is_dmd else keys.positive("solver_order", 2),
            lower_order_final=True if is_dmd else keys.flag("lower_order_final", True),
            use_dynamic_shifting=keys.flag("use_dynamic_shifting", False),
            time_shift_type=cast(TimeShift, shift_type),
            base_image_seq_len=keys.positive("base_image_seq_len", 256),
            max_image_seq_len=keys.positive("max_image_seq_len", 4096),
            base_shift=keys.number("base_shift", 0.5),
            max_shift=keys.number("max_shift", 1.15),
        )
        keys.warn_of_unread(ignored=("scheduler_type",) if is_dmd else ())
        parsed._check_values()
        return parsed

    def _check_values(self) -> None:
        require(
            2 <= self.num_train_timesteps <= MAX_TRAIN_TIMESTEPS,
            SCHEDULER_FILE,
            "num_train_timesteps",
            self.num_train_timesteps,
            f"2 to {MAX_TRAIN_TIMESTEPS} are served",
        )
        require(self.solver_order in (1, 2), SCHEDULER_FILE, "solver_order", self.solver_order, "1 or 2 is served")
        require(0 < self.gamma <= 1 / 3, SCHEDULER_FILE, "gamma", self.gamma, "it must be above 0 and at most 1/3")
        require(
            len(self.stage_range) == self.stages + 1,
            SCHEDULER_FILE,
            "stage_range",
            self.stage_range,
            f"stages = {self.stages} needs {self.stages + 1} bounds",
        )
        rising = all(a < b for a, b in zip(self.stage_range, self.stage_range[1:], strict=False))
        require(
            rising and self.stage_range[0] >= 0 and self.stage_range[-1] <= 1,
            SCHEDULER_FILE,
            "stage_range",
            self.stage_range,
            "it must rise within [0, 1]",
        )
        require(
            not self.use_dynamic_shifting or self.shift == 1.0,
            SCHEDULER_FILE,
            "shift",
            self.shift,
            "with use_dynamic_shifting it must be 1.0",
        )
        require(
            self.max_image_seq_len != self.base_image_seq_len,
            SCHEDULER_FILE,
            "max_image_seq_len",
            self.max_image_seq_len,
            "it must differ from base_image_seq_len",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """All configurations of a checkpoint, consistent with each other, and the variant that they make."""

    path: Path
    variant: Variant
    is_cfg_zero_star: bool
    transformer: TransformerConfig
    scheduler: SchedulerConfig
    vae: VaeConfig
    recommended: Recommendations

    @classmethod
    def from_parts(
        cls,
        path: Path,
        model_index: Mapping[str, object],
        transformer: TransformerConfig,
        scheduler: SchedulerConfig,
        vae: VaeConfig,
    ) -> CheckpointConfig:
        """Joins the parsed model_index.json with the components' configurations.

        Raises: CheckpointError for a class that is not served and for parts that do not belong together.
        """
        keys = JsonKeys(MODEL_INDEX_FILE, model_index)
        variant = _variant(keys)
        joined = cls(
            path=path,
            variant=variant,
            is_cfg_zero_star=keys.flag("is_cfg_zero_star", False),
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            recommended=Recommendations.from_json(
                MODEL_INDEX_FILE, model_index, (_DEFAULT_STEPS[variant],) * scheduler.stages
            ),
        )
        joined._check_variant()
        joined._check_channels()
        joined._check_sizes()
        return joined

    @property
    def guidance(self) -> Guidance:
        return "cfg_zero_star" if self.is_cfg_zero_star else "cfg"

    @property
    def size_multiple(self) -> int:
        """Both sides of a video in pixels are multiples of this."""
        patch = self.vae.scale_factor_spatial * self.transformer.patch_size[1]
        return patch << (self.scheduler.stages - 1)

    @property
    def recommended_sizes(self) -> tuple[tuple[int, int], ...]:
        """The listed sizes, rounded up where the number of stages asks for a larger multiple."""
        step = self.size_multiple
        return tuple(dict.fromkeys((-(-w // step) * step, -(-h // step) * step) for w, h in self.recommended.sizes))

    def info(self, name: str, max_pixels: int = 921600, approximations: tuple[Approximation, ...] = ()) -> ModelInfo:
        """What the API may know of this checkpoint, served as `name` with at most `max_pixels` a frame."""
        return ModelInfo(
            name=name,
            variant=self.variant,
            num_stages=self.scheduler.stages,
            guidance=self.guidance,
            size_multiple=self.size_multiple,
            spatial_scale=self.vae.scale_factor_spatial,
            latent_channels=self.vae.z_dim,
            default_steps=self.recommended.steps,
            default_guidance_scale=_DEFAULT_GUIDANCE_SCALE[self.variant],
            recommended_sizes=self.recommended_sizes,
            example_prompt=self.recommended.prompt,
            max_pixels=max_pixels,
            approximations=approximations,
        )

    def _check_variant(self) -> None:
        scheduler, stages = self.scheduler.class_name, self.scheduler.stages
        needed = "HeliosDMDScheduler" if self.variant == "distilled" else "HeliosScheduler"
        made_by = {
            "base": "HeliosPipeline",
            "mid": "HeliosPyramidPipeline with is_distilled false",
            "distilled": "HeliosPyramidPipeline with is_distilled true",
        }[self.variant]
        require(scheduler == needed, SCHEDULER_FILE, "_class_name", scheduler, f"{made_by} needs {needed}")
        if self.variant == "base":
            require(stages == 1, SCHEDULER_FILE, "stages", stages, f"{made_by} needs 1")
            require(
                not self.is_cfg_zero_star, MODEL_INDEX_FILE, "is_cfg_zero_star", True, f"{made_by} has plain guidance"
            )
        else:
            require(stages >= 2, SCHEDULER_FILE, "stages", stages, f"{made_by} needs at least 2")

    def _check_channels(self) -> None:
        require(
            self.vae.z_dim == self.transformer.in_channels,
            TRANSFORMER_FILE,
            "in_channels",
            self.transformer.in_channels,
            f"it must equal z_dim of vae/config.json, {self.vae.z_dim}",
        )
        require(
            self.vae.scale_factor_temporal == 4,
            "vae/config.json",
            "scale_factor_temporal",
            self.vae.scale_factor_temporal,
            "a chunk of 9 latent frames makes 33 frames only with 4",
        )

    def _check_sizes(self) -> None:
        patch = self.size_multiple >> (self.scheduler.stages - 1)
        for size in self.recommended.sizes:
            require(
                all(side % patch == 0 for side in size),
                MODEL_INDEX_FILE,
                "_helios_serve.recommended_sizes",
                list(size),
                f"both sides must be multiples of {patch}",
            )


def _triple(entries: tuple[int, ...]) -> tuple[int, int, int]:
    first, second, third = entries
    return first, second, third


def _unipc_or_euler(keys: JsonKeys) -> Solver:
    keys.require_only("thresholding", False)
    keys.require_only("predict_x0", True)
    keys.require_only("solver_type", "bh2")
    keys.require_only("disable_corrector", [])
    keys.require_only("solver_p", None)
    return cast(Solver, keys.choice("scheduler_type", "unipc", ("unipc", "euler")))


def _variant(keys: JsonKeys) -> Variant:
    pipeline = keys.require_class("HeliosPipeline", "HeliosPyramidPipeline")
    is_distilled = keys.flag("is_distilled", False)
    if pipeline == "HeliosPyramidPipeline":
        return "distilled" if is_distilled else "mid"
    require(not is_distilled, MODEL_INDEX_FILE, "is_distilled", True, "HeliosPyramidPipeline is distilled, not this")
    return "base"
