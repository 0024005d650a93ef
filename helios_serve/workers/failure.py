"""What a worker says of a task that it could not do. Knows exceptions and fault classes; decides nothing."""

from __future__ import annotations

import logging

import torch

from helios_serve.errors import HeliosError
from helios_serve.model_executor.batch import NotFiniteError
from helios_serve.types import TaskFailed

logger = logging.getLogger(__name__)

_CODE = "generation_failed"


def task_failed(task_id: str, error: Exception) -> TaskFailed:
    """The answer for a task that raised `error`; logs what is not the caller's fault.

    Raises: the error itself if it comes from the device's driver: nothing can go on in this process.
    """
    if isinstance(error, torch.AcceleratorError):
        raise error
    if isinstance(error, HeliosError):
        return TaskFailed(task_id=task_id, fault="request", code=error.code, message=error.message)
    logger.error("task %s failed", task_id, exc_info=error)
    if isinstance(error, NotFiniteError):
        return TaskFailed(task_id=task_id, fault="nan", code=_CODE, message=f"generation failed: {error}")
    if isinstance(error, torch.OutOfMemoryError):
        message = "generation failed: out of memory, even alone"
        return TaskFailed(task_id=task_id, fault="out_of_memory", code=_CODE, message=message)
    message = f"generation failed: {type(error).__name__}: {error}"
    return TaskFailed(task_id=task_id, fault="error", code=_CODE, message=message)
