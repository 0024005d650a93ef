"""An encoder in a process of its own. Knows its worker and payloads; knows nothing of transports."""

from __future__ import annotations

from helios_serve.model_executor.model import Checkpoint, load_text_encoder, load_vae
from helios_serve.parallel.collectives import RankGroup
from helios_serve.types import Encoded, EncodeTask, ExecutorEvent, RoleTask, TensorRef
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.host import Fetch, PoolHost, wait_for_memory
from helios_serve.workers.payload import Payload, num_bytes, pack, unpack
from helios_serve.workers.ray_wire import HostSpec


class EncoderHost(PoolHost):
    """Encodes requests."""

    def __init__(self, spec: HostSpec, checkpoint: Checkpoint) -> None:
        super().__init__(RankGroup())
        wait_for_memory(checkpoint, "text_encoder", "vae")
        text_encoder, vae = load_text_encoder(checkpoint), load_vae(checkpoint)
        self._worker = EncoderWorker(text_encoder, vae, faults=spec.faults)

    def _do(self, task: RoleTask, fetch: Fetch, key: str) -> tuple[ExecutorEvent, Payload | None]:
        assert isinstance(task, EncodeTask)
        earlier = None if task.conditioning is None else unpack(fetch(task.conditioning), copy=True)
        result = self._compute(task, lambda: self._worker.encode(task.request, earlier))
        payload = pack(result.conditioning)
        event = Encoded(
            task_id=task.task_id,
            conditioning=TensorRef(key=key, num_bytes=num_bytes(payload)),
            generator_state=result.generator_state,
            phases=result.phases,
        )
        return event, payload
