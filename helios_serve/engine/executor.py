"""Everything that the engine may ask of the machine. No torch, no threads, no policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from helios_serve.types import ChunkTask, DecodeTask, ExecutorEvent, VideoRequest


class Executor(Protocol):
    """The workers of all roles together. No call blocks; results arrive through `emit`, from any thread."""

    def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        """Starts the workers."""

    def encode(self, request: VideoRequest) -> None:
        """Encoder: answers Encoded or TaskFailed."""

    def submit(self, task: ChunkTask) -> None:
        """DiT group: the chunk joins at the next step boundary; answers StepDone per step, then TaskDone or
        TaskFailed."""

    def decode(self, task: DecodeTask) -> None:
        """VAE worker: answers Decoded or TaskFailed; the latents are let go."""

    def release(self, request_id: str) -> None:
        """Stops all work for a request at the next step boundary and lets go of everything it holds."""

    def close(self) -> None:
        """Stops the workers and waits for them; work in flight is lost."""
