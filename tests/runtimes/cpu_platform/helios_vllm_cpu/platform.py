"""The platform class that vLLM-Omni asks for: a device, gloo, and streams that do nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import psutil
import torch


def find() -> str:
    """Where the platform is."""
    return "helios_vllm_cpu.platform.CpuOmniPlatform"


def __getattr__(name: str) -> object:
    """Builds the class on first use: its bases cannot be imported while vLLM looks for platforms."""
    if name == "CpuOmniPlatform":
        globals()[name] = made = _build()
        return made
    raise AttributeError(name)


class _Nothing:
    """A stream or an event of a device that has none."""

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _build() -> type:
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.platforms.cpu import CpuPlatform
    from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

    class CpuOmniPlatform(OmniPlatform, CpuPlatform):
        _omni_enum = OmniPlatformEnum.OOT
        device_type = "cpu"
        dist_backend = "gloo"
        device_control_env_var = "HELIOS_VLLM_CPU_VISIBLE"
        Stream = Event = _Nothing

        @classmethod
        def get_diffusion_attn_backend_cls(
            cls, selected_backend: object, head_size: int, allow_trtllm_default: bool = False
        ) -> str:
            return "helios_vllm_cpu.attention.CpuAttentionBackend"

        @classmethod
        def supports_torch_inductor(cls) -> bool:
            return False

        @classmethod
        def get_default_stage_config_path(cls) -> str:
            return "vllm_omni/deploy"

        @classmethod
        def get_omni_ar_worker_cls(cls) -> str:
            return "vllm_omni.worker.gpu_ar_worker.GPUARWorker"

        @classmethod
        def get_omni_generation_worker_cls(cls) -> str:
            return "vllm_omni.worker.gpu_generation_worker.GPUGenerationWorker"

        @classmethod
        def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
            return torch.device("cpu")

        @classmethod
        def get_device_count(cls) -> int:
            return int(os.environ.get("HELIOS_VLLM_CPU_COUNT", "8"))

        @classmethod
        def get_device_version(cls) -> None:
            return None

        @classmethod
        def is_available(cls) -> bool:
            return False

        @classmethod
        def is_initialized(cls) -> bool:
            return False

        @classmethod
        def current_device(cls) -> int:
            return 0

        @classmethod
        def set_device(cls, device: object) -> None: ...

        @classmethod
        def synchronize(cls) -> None: ...

        @classmethod
        def empty_cache(cls) -> None: ...

        @classmethod
        def reset_peak_memory_stats(cls, device: object = None) -> None: ...

        @classmethod
        def max_memory_reserved(cls, device: object = None) -> int:
            return 0

        @classmethod
        def max_memory_allocated(cls, device: object = None) -> int:
            return 0

        @classmethod
        def current_stream(cls, device: object = None) -> _Nothing:
            return _Nothing()

        @classmethod
        @contextlib.contextmanager
        def stream(cls, stream: object) -> Iterator[None]:
            yield

        @classmethod
        def get_free_memory(cls, device: object = None) -> int:
            return int(psutil.virtual_memory().available)

        @classmethod
        def get_device_memory(cls, device: object = None) -> tuple[int, int]:
            memory = psutil.virtual_memory()
            return int(memory.available), int(memory.total)

        @classmethod
        def get_default_ir_op_priority(cls, vllm_config: object) -> object:
            return IrOpPriorityConfig.with_default(["native"])

    return CpuOmniPlatform
