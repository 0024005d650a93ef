"""A VAE worker in a process of its own, or one of its ranks. Knows its worker and payloads; knows nothing of
transports."""

from __future__ import annotations

from helios_serve.model_executor.model import Checkpoint, load_vae
from helios_serve.model_executor.vae_spread import join_columns
from helios_serve.parallel.collectives import connect
from helios_serve.types import DecodeTask, ExecutorEvent, RoleTask
from helios_serve.workers.host import Fetch, PoolHost, wait_for_memory
from helios_serve.workers.payload import Payload, unpack
from helios_serve.workers.ray_wire import HostSpec
from helios_serve.workers.vae import VaeWorker


class VaeHost(PoolHost):
    """Decodes chunks; while one is encoded to a segment the next may be decoded. Several ranks share each decode."""

    def __init__(self, spec: HostSpec, checkpoint: Checkpoint, address: str) -> None:
        ranks = connect(spec.rank, spec.num_ranks, address)
        super().__init__(ranks)
        axis = join_columns(ranks, checkpoint.device)
        wait_for_memory(checkpoint, "vae")
        self._worker = VaeWorker(load_vae(checkpoint), faults=spec.faults, axis=axis)

    def _do(self, task: RoleTask, fetch: Fetch, key: str) -> tuple[ExecutorEvent | None, Payload | None]:
        assert isinstance(task, DecodeTask)
        latents = unpack(fetch(task.latents))
        if self._ranks.rank > 0:
            self._order.submit(task.task_id, lambda: self._worker.help_decode(task, latents))
            return None, None
        pictures = self._compute(task, lambda: self._worker.decode_pictures(task, latents))
        return self._worker.encode_pictures(task, pictures), None
