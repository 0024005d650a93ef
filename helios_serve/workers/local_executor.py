"""All roles in one process, one thread per role: the default executor.

The DiT thread runs the continuous batcher; the encoder and the VAE work beside it, so that decoding chunk k overlaps
with denoising chunk k + 1. References are keys of a table in memory. Knows nothing of clients or scheduling.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from helios_serve.errors import HeliosError
from helios_serve.model_executor.conditioning import Conditioning
from helios_serve.model_executor.history import Continuation
from helios_serve.model_executor.runner import Runner, StepResult
from helios_serve.types import (
    ChunkTask,
    Decoded,
    DecodeTask,
    Encoded,
    ExecutorEvent,
    StepDone,
    TaskDone,
    TaskFailed,
    TensorRef,
    VideoRequest,
)
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.vae import VaeWorker

logger = logging.getLogger(__name__)

Held = Conditioning | Continuation | torch.Tensor
"""What a reference stands for."""


class TensorTable:
    """The tensors that references stand for, by request. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, dict[str, Held]] = {}

    def open(self, request_id: str) -> None:
        with self._lock:
            self._held[request_id] = {}

    def put(self, request_id: str, key: str, value: Held) -> TensorRef:
        """Keeps a value until the request closes; a closed request keeps nothing."""
        with self._lock:
            if request_id in self._held:
                self._held[request_id][key] = value
        return TensorRef(key=key)

    def get(self, request_id: str, ref: TensorRef) -> Held | None:
        """The value, or None if the request was closed meanwhile."""
        with self._lock:
            return self._held.get(request_id, {}).get(ref.key)

    def pop(self, request_id: str, ref: TensorRef) -> Held | None:
        with self._lock:
            return self._held.get(request_id, {}).pop(ref.key, None)

    def close(self, request_id: str) -> None:
        with self._lock:
            self._held.pop(request_id, None)

    def is_open(self, request_id: str) -> bool:
        with self._lock:
            return request_id in self._held


class LocalExecutor:
    """Runs an encoder, one DiT group of one rank, and a VAE worker in threads of this process."""

    def __init__(self, encoder: EncoderWorker, runner: Runner, vae: VaeWorker) -> None:
        self._encoder = encoder
        self._runner = runner
        self._vae = vae
        self._table = TensorTable()
        self._joining: queue.SimpleQueue[ChunkTask | None] = queue.SimpleQueue()
        self._encoder_thread = ThreadPoolExecutor(1, thread_name_prefix="helios-encoder")
        self._vae_thread = ThreadPoolExecutor(1, thread_name_prefix="helios-vae")
        self._dit_thread = threading.Thread(target=self._run_steps, name="helios-dit", daemon=True)
        self._emit: Callable[[ExecutorEvent], None] = lambda _: None

    def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        self._emit = emit
        self._dit_thread.start()

    def encode(self, request: VideoRequest) -> None:
        self._table.open(request.request_id)
        self._encoder_thread.submit(self._guard, request.request_id, lambda: self._encode(request))

    def submit(self, task: ChunkTask) -> None:
        self._joining.put(task)

    def decode(self, task: DecodeTask) -> None:
        self._vae_thread.submit(self._guard, task.request_id, lambda: self._decode(task))

    def release(self, request_id: str) -> None:
        self._table.close(request_id)

    def close(self) -> None:
        self._joining.put(None)
        for pool in (self._encoder_thread, self._vae_thread):
            pool.shutdown(wait=True, cancel_futures=True)
        if self._dit_thread.is_alive():
            self._dit_thread.join()

    def _encode(self, request: VideoRequest) -> None:
        if not self._table.is_open(request.request_id):
            return
        conditioning = self._encoder.encode(request)
        self._emit(
            Encoded(
                request_id=request.request_id,
                conditioning=self._table.put(request.request_id, "conditioning", conditioning),
                continuation=self._table.put(request.request_id, "continuation", conditioning.continuation),
            )
        )

    def _decode(self, task: DecodeTask) -> None:
        latents = self._table.pop(task.request_id, task.latents)
        if latents is None:
            return
        assert isinstance(latents, torch.Tensor)
        pixels = self._vae.decode(latents)
        self._emit(Decoded(segment=self._vae.encode_segment(pixels, task.request_id, task.chunk, task.params)))

    def _run_steps(self) -> None:
        """The DiT thread: take in what joined, drop what was released, step, hand out finished chunks."""
        while self._take_joining():
            for request_id in self._runner.active:
                if not self._table.is_open(request_id):
                    self._runner.abort(request_id)
            if self._runner.active:
                self._step(self._runner.active)

    def _step(self, request_ids: tuple[str, ...]) -> None:
        """One forward for all; if it fails, nobody has moved, and each gets its own: only the one at fault ends."""
        started = time.perf_counter()
        try:
            result = self._runner.step(request_ids)
        except Exception as error:
            if len(request_ids) > 1:
                for request_id in request_ids:
                    self._step((request_id,))
                return
            self._runner.abort(request_ids[0])
            self._fail(request_ids[0], error)
            return
        self._hand_out(result, 1000 * (time.perf_counter() - started))

    def _take_joining(self) -> bool:
        """Joins waiting chunks; blocks while nothing runs. False when the executor closes."""
        while True:
            try:
                task = self._joining.get(block=not self._runner.active)
            except queue.Empty:
                return True
            if task is None:
                return False
            self._guard(task.request_id, lambda task=task: self._join(task))  # type: ignore[misc]

    def _join(self, task: ChunkTask) -> None:
        conditioning = self._table.get(task.request_id, task.conditioning)
        continuation = self._table.get(task.request_id, task.continuation)
        if conditioning is None or continuation is None:
            return
        assert isinstance(conditioning, Conditioning)
        assert isinstance(continuation, Continuation)
        self._runner.join(conditioning.chunk_input(task.request_id, task.chunk, continuation))

    def _hand_out(self, result: StepResult, device_ms: float) -> None:
        self._emit(StepDone(steps=result.steps, num_sequences=result.num_sequences, device_ms=device_ms))
        for request_id, error in result.failed:
            self._fail(request_id, error)
        for chunk in result.finished:
            request_id = chunk.request_id
            self._emit(
                TaskDone(
                    request_id=request_id,
                    chunk=chunk.chunk,
                    latents=self._table.put(request_id, f"latents-{chunk.chunk}", chunk.latents),
                    continuation=self._table.put(request_id, "continuation", chunk.continuation),
                )
            )

    def _guard(self, request_id: str, work: Callable[[], None]) -> None:
        """Runs one request's work; whatever it raises ends that request alone."""
        try:
            work()
        except Exception as error:
            self._fail(request_id, error)

    def _fail(self, request_id: str, error: Exception) -> None:
        if not isinstance(error, HeliosError):
            logger.error("request %s failed", request_id, exc_info=error)
        self._emit(_failure(request_id, error))


def _failure(request_id: str, error: Exception) -> TaskFailed:
    if isinstance(error, HeliosError):
        return TaskFailed(request_id=request_id, code=error.code, message=error.message)
    message = f"generation failed: {type(error).__name__}: {error}"
    return TaskFailed(request_id=request_id, code="generation_failed", message=message)
