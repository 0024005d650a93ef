"""What vLLM-Omni loads in each of its processes."""

from __future__ import annotations

from helios_vllm_cpu import block_noise, outputs, work


def begin() -> None:
    """Prepares this process for a machine without an accelerator, and for tests that count its work."""
    outputs.apply()
    block_noise.make_portable()
    work.count()
