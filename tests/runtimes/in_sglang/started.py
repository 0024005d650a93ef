"""SGLang for tests: its worker in this process, or all of it in processes of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from helios_vllm_cpu.work import sequences_in
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator
from sglang.multimodal_gen.runtime.entrypoints.utils import prepare_request
from sglang.multimodal_gen.runtime.managers.gpu_worker import GPUWorker
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks
from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args
from torch import nn

from tests.runtimes.in_sglang.conftest import Frames, free_port

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)


class Runtime:
    """SGLang for one checkpoint: what its front end makes of a request, and what its worker makes of that."""

    def __init__(self, checkpoint: Path, **settings: Any) -> None:
        apply_plugin_hooks()
        self.args = ServerArgs.from_kwargs(
            model_path=str(checkpoint),
            **{"dit_precision": "fp32", "output_path": str(checkpoint.parent / "out"), **settings},
        )
        set_global_server_args(self.args)
        self.worker = GPUWorker(local_rank=0, rank=0, master_port=free_port(), server_args=self.args)

    def request(self, prompt: str = "a fox", **fields: Any) -> Req:
        """Raises: ValueError as the front end does."""
        fields = {"width": 64, "height": 64, "seed": 7, "num_frames": 40, **fields}
        own = {"save_output": False, "return_frames": True, "return_file_paths_only": False}
        sampling = SamplingParams.from_user_sampling_params_args(
            self.args.model_path, server_args=self.args, prompt=prompt, **own, **fields
        )
        request = prepare_request(self.args, sampling)
        sampling.prepare_video_request_for_queue(request)
        return request

    def run(self, *requests: Req) -> list[Frames]:
        output = self.worker.execute_forward(list(requests))
        assert output.error is None, output.error
        return list(output.output)

    def generate(self, prompt: str = "a fox", **fields: Any) -> Frames:
        (frames,) = self.run(self.request(prompt, **fields))
        return frames


@contextmanager
def generator(checkpoint: Path, **settings: Any) -> Iterator[DiffGenerator]:
    started = DiffGenerator.from_pretrained(
        model_path=str(checkpoint), dit_precision="fp32", output_path=str(checkpoint.parent / "out"), **settings
    )
    try:
        yield started
    finally:
        started.shutdown()


def frames_of(started: DiffGenerator, prompt: str, **fields: Any) -> Frames:
    asked = {"width": 64, "height": 64, "seed": 7, "num_frames": 66, **fields}
    result = started.generate({"prompt": prompt, "save_output": False, "return_frames": True, **asked})
    return np.stack(result.frames)


@contextmanager
def forwards() -> Iterator[list[int]]:
    """The sequences in each forward of this process, while the block runs."""
    counted: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        num_sequences = sequences_in(module, args, kwargs)
        if num_sequences is not None:
            counted.append(num_sequences)

    hook = nn.modules.module.register_module_forward_hook(note, with_kwargs=True)
    try:
        yield counted
    finally:
        hook.remove()
