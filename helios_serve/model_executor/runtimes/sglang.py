"""The entry point that SGLang-Diffusion loads in each of its processes: registers this package as its Helios backend.

SGLang's registry takes classes, so what they are made of is imported with it; the model code is not, before SGLang
serves a Helios checkpoint.
"""

from __future__ import annotations

import logging
from importlib.metadata import version

logger = logging.getLogger("sglang.helios_serve")

HUB_IDS = ("BestWishYsh/Helios-Base", "BestWishYsh/Helios-Mid", "BestWishYsh/Helios-Distilled")
"""Names under which SGLang knows its own backend's settings; a folder that is called like one would get them."""

TESTED_VERSIONS = (0, 5, 23), (0, 5, 24)
"""The first release of SGLang that the tests run, and the first that they do not."""


def register() -> None:
    """Makes this package's pipelines the backend of every Helios checkpoint. Calling it again changes nothing."""
    from sglang.multimodal_gen.registry import register_pipeline
    from sglang.multimodal_gen.runtime.entrypoints.openai.realtime.registry import register_realtime_model_adapter

    from helios_serve.model_executor.runtimes.sglang_classes import PIPELINES, HeliosServeConfig
    from helios_serve.model_executor.runtimes.sglang_realtime import HeliosServeRealtimeAdapter
    from helios_serve.model_executor.runtimes.sglang_requests import HeliosServeSamplingParams

    installed = version("sglang")
    problem = version_problem(installed)
    if problem is not None:
        logger.warning(problem)
    names = tuple(pipeline.pipeline_name for pipeline in PIPELINES)
    for pipeline, hub_ids in zip(PIPELINES, (HUB_IDS, ()), strict=True):
        register_pipeline(
            pipeline,
            sampling_param_cls=HeliosServeSamplingParams,
            pipeline_config_cls=HeliosServeConfig,
            hf_model_paths=list(hub_ids),
            model_detectors=[lambda name, own=pipeline.pipeline_name: name == own.lower()],
            overwrite=True,
        )
    register_realtime_model_adapter(HeliosServeConfig, HeliosServeRealtimeAdapter)
    logger.info("helios-serve %s is the backend of %s in sglang %s", version("helios-serve"), names, installed)


def version_problem(installed: str) -> str | None:
    """What is wrong with running in this version of SGLang; None for one that the tests run."""
    first, end = TESTED_VERSIONS
    numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    if first <= numbers < end:
        return None
    shown_first, shown_end = (".".join(str(number) for number in bound) for bound in TESTED_VERSIONS)
    return (
        f"sglang {installed} is not among the versions that helios-serve is tested with; "
        f"install sglang>={shown_first},<{shown_end}"
    )
