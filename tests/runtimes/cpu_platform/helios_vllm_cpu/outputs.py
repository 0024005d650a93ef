"""The loop that carries a worker's outputs away, without the device stream that the original asks for."""

from __future__ import annotations

import torch


def apply() -> None:
    """Replaces the loop in this process where there is no accelerator."""
    if torch.accelerator.is_available():
        return
    from vllm_omni.diffusion.worker import diffusion_worker

    diffusion_worker.WorkerProc._async_output_loop = _carry_outputs


def _carry_outputs(self) -> None:  # type: ignore[no-untyped-def]
    from vllm_omni.diffusion.data import AsyncDiffusionOutput, AsyncOutputKind
    from vllm_omni.diffusion.ipc import pack_diffusion_output_shm

    while (item := self._async_output_queue.get()) is not None:
        output, output_id, _ = item
        ready = AsyncDiffusionOutput(kind=AsyncOutputKind.OUTPUT_READY, async_output_id=output_id, output=output)
        try:
            pack_diffusion_output_shm(output)
            self._enqueue_result(ready)
        except Exception as error:
            failed = AsyncDiffusionOutput(
                kind=AsyncOutputKind.OUTPUT_READY, async_output_id=output_id, error=repr(error)
            )
            self._enqueue_result(failed)
        finally:
            with self._async_output_done:
                self._async_output_pending = max(0, self._async_output_pending - 1)
                self._async_output_done.notify_all()
