"""A VAE worker in a process of its own. Knows its worker and payloads; knows nothing of transports."""

from __future__ import annotations

from helios_serve.model_executor.model import Checkpoint, load_vae
from helios_serve.types import DecodeTask, ExecutorEvent, RoleTask
from helios_serve.workers.host import Fetch, PoolHost, wait_for_memory
from helios_serve.workers.payload import Payload, unpack
from helios_serve.workers.ray_wire import HostSpec
from helios_serve.workers.vae import VaeWorker


class VaeHost(PoolHost):
    """Decodes chunks; while one is encoded to a segment the next may be decoded."""

    def __init__(self, spec: HostSpec, checkpoint: Checkpoint) -> None:
        super().__init__()
        wait_for_memory(checkpoint, "vae")
        self._worker = VaeWorker(load_vae(checkpoint), faults=spec.faults)

    def _do(self, task: RoleTask, fetch: Fetch, key: str) -> tuple[ExecutorEvent, Payload | None]:
        assert isinstance(task, DecodeTask)
        latents = unpack(fetch(task.latents))
        pictures = self._compute(lambda: self._worker.decode_pictures(task, latents))
        return self._worker.encode_pictures(task, pictures), None
