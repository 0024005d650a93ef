"""The entry point that vLLM-Omni loads in each of its processes: registers this package as its Helios backend.

Knows names alone. The pipeline is imported by vLLM-Omni when it serves a Helios checkpoint; until then nothing of
PyTorch or of vLLM-Omni but its registry is.
"""

from __future__ import annotations

import logging
from importlib.metadata import version

logger = logging.getLogger("vllm.helios_serve")  # the runtime writes what comes from below its own name

MODEL_ARCHS = ("HeliosPipeline", "HeliosPyramidPipeline")
"""`_class_name` of every checkpoint's model_index.json, under which vLLM-Omni has a backend of its own. A name that it
does not know would be taken for an image model, because its front end chooses before plugins are loaded."""

TESTED_VERSIONS = (0, 30), (0, 31)
"""The first release of vLLM-Omni that the tests run, and the first that they do not."""


def register() -> None:
    """Makes this package's pipeline the backend of every Helios checkpoint. Calling it again changes nothing."""
    from vllm_omni.diffusion.registry import register_diffusion_model

    installed = version("vllm-omni")
    problem = version_problem(installed)
    if problem is not None:
        logger.warning(problem)
    for arch in MODEL_ARCHS:
        register_diffusion_model(
            model_arch=arch,
            module_name="helios_serve.model_executor.runtimes.vllm_pipeline",
            class_name="HeliosServePipeline",
            pre_process_func_name="request_reader",
            post_process_func_name="output_writer",
        )
    logger.info("helios-serve %s is the backend of %s in vllm-omni %s", version("helios-serve"), MODEL_ARCHS, installed)


def version_problem(installed: str) -> str | None:
    """What is wrong with running in this version of vLLM-Omni; None for one that the tests run."""
    first, end = TESTED_VERSIONS
    numbers = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    if first <= numbers < end:
        return None
    shown_first, shown_end = (".".join(str(number) for number in bound) for bound in TESTED_VERSIONS)
    return (
        f"vllm-omni {installed} is not among the versions that helios-serve is tested with; "
        f"install vllm-omni>={shown_first},<{shown_end}"
    )
