"""Videos without a runtime, by the part of this package that runtimes drive."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from helios_serve.config import ModelConfig
from helios_serve.model_executor.model import load_model
from helios_serve.model_executor.runtimes.videos import Videos
from helios_serve.types import VideoRequest


def first_chunk(config: ModelConfig, request: VideoRequest) -> npt.NDArray[np.uint8]:
    """[F, H, W, 3] of a request's first chunk, in the precision and places that `config` names."""
    videos = Videos(load_model(config))
    run = videos.encode(request)
    videos.begin_chunk(run)
    while run.latents is None:
        videos.step([run])
        assert run.error is None, run.error
    return videos.frames(run).numpy()
