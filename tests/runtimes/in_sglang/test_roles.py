"""Encoder, denoiser and decoder apart: what a request is between them survives SGLang's way of sending it.

Each role is a worker of its own in this process. SGLang 0.5.23 starts no servers for them without CUDA: it makes
streams with arguments that PyTorch's CPU device does not take.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType
from sglang.multimodal_gen.runtime.disaggregation.scheduler_mixin import (
    SchedulerDisaggMixin,
    extract_transfer_fields,
)
from sglang.multimodal_gen.runtime.disaggregation.transport.codec import pack_tensors, unpack_tensors
from sglang.multimodal_gen.runtime.entrypoints.utils import materialize_output_sample
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

from tests.conftest import MakeCheckpoint
from tests.runtimes.in_sglang.conftest import STEPS, Frames, Native
from tests.runtimes.in_sglang.started import PIXELS, Runtime

ROLES = (RoleType.ENCODER, RoleType.DENOISER, RoleType.DECODER)


def sent(request: Req) -> Req:
    """The request as the next role receives it."""
    head, buffers = pack_tensors(*extract_transfer_fields(request))
    tensors, scalars = unpack_tensors([head, *(bytes(buffer._view) for buffer in buffers)])
    receiver = SimpleNamespace(_disagg_sampling_params_cls=type(request.sampling_params))
    received: Req = SchedulerDisaggMixin._build_disagg_req(receiver, scalars, tensors)
    return received


def made_apart(checkpoint: Path, settings: dict[str, Any], **fields: Any) -> Frames:
    roles = [Runtime(checkpoint, disagg_role=role.value, disagg_mode=True, **settings) for role in ROLES]
    for role, runtime in zip(ROLES, roles, strict=True):
        assert {stage.role_affinity for stage in runtime.worker.pipeline.stages} == {role}
    request = roles[0].request(**fields)
    for runtime in roles[:2]:
        request = sent(runtime.worker.execute_forward([request], return_req=True))
    request.save_output, request.return_file_paths_only, request.return_frames = False, False, False
    output = roles[2].worker.execute_forward([request])
    assert output.error is None, output.error
    return np.stack(materialize_output_sample(output.output[0], request.data_type, 24).frames)


@pytest.mark.parametrize(("variant", "task"), [("distilled", "t2v"), ("base", "t2v"), ("mid", "i2v"), ("base", "v2v")])
def test_a_video_that_went_from_role_to_role_is_the_engine_s(
    variant: str, task: str, make_checkpoint: MakeCheckpoint, native: Native, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(variant)
    Image.fromarray(PIXELS[0]).save(tmp_path / "first.png")
    np.save(tmp_path / "clip.npy", PIXELS)
    media = {"t2v": {}, "i2v": {"image": tmp_path / "first.png"}, "v2v": {"video": tmp_path / "clip.npy"}}[task]
    theirs = {f"{kind}_path": str(path) for kind, path in media.items()}
    ours = {kind: str(path) for kind, path in media.items()}
    frames = made_apart(checkpoint, {}, num_frames=70, **theirs, api_fields={"steps": STEPS[variant]})
    expected = native(checkpoint, "a fox", num_frames=70, steps=STEPS[variant], **ours)
    assert np.array_equal(frames, expected)
