"""What to do when a device has run out of memory. Knows the allocator; knows nothing of what needed the memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


def clear_cache() -> None:
    """Gives the allocator's unused memory back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def retry_out_of_memory(work: Callable[[], T], free: Callable[[], None] = clear_cache) -> T:
    """The result of `work`, which is done once more, after memory was freed, if it ran out."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        logger.warning("freed memory: %s", error)
    free()  # here no exception keeps the frames of the failed attempt alive
    return work()
