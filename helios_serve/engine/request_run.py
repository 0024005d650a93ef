"""One accepted request on its way through the roles: what exists of it, in references, and what was published.

Mutable; its one owner is the engine. Knows records and segments; decides nothing and reads no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from helios_serve.engine.request_state import RequestState
from helios_serve.types import NUM_TRAIL_CHUNKS, ChunkRecord, ChunkTask, Failure, Segment, TensorRef, VideoRequest


@dataclass(slots=True, kw_only=True, eq=False)
class RequestRun:
    """`records` grows by one with every finished chunk; references that nobody needs any more are taken out by
    `spent_refs`. lost_alone: (group, incarnation) of those that were lost while they ran this request alone."""

    state: RequestState
    accepted_at: float
    conditioning: TensorRef | None = None
    generator_state: bytes = b""
    records: list[ChunkRecord] = field(default_factory=list)
    parked: TensorRef | None = None
    segments: dict[int, Segment] = field(default_factory=dict)
    """Decoded and not published: an earlier chunk is still missing."""
    num_dispatched: int = 0
    num_decoded: int = 0
    num_published: int = 0
    started_at: float | None = None
    last_published_at: float | None = None
    lost_alone: set[tuple[str, int]] = field(default_factory=set)
    failure: Failure | None = None
    """How the request will end when its finished chunks are delivered."""
    is_over: bool = False
    """Completed, failed or cancelled: what still runs for it is of no use."""
    _undropped: dict[int, TensorRef] = field(default_factory=dict)

    @property
    def request(self) -> VideoRequest:
        return self.state.request

    @property
    def request_id(self) -> str:
        return self.state.request_id

    @property
    def num_undecoded(self) -> int:
        return len(self.records) - self.num_decoded

    def encoded(self, conditioning: TensorRef, generator_state: bytes) -> None:
        """The encoder's answer: the request can run its first chunk."""
        self.conditioning, self.generator_state = conditioning, generator_state
        self.state.is_ready = True

    def next_task(self, predicted_s: float) -> ChunkTask:
        """The next chunk, or what is left of it, as a group is given it; every dispatch has an id of its own."""
        assert self.conditioning is not None
        chunk = self.state.next_chunk
        pinned = self.request.pinned_chunk(chunk)
        self.num_dispatched += 1
        return ChunkTask(
            task_id=f"{self.request_id}/c{chunk}.{self.num_dispatched}",
            request_id=self.request_id,
            chunk=chunk,
            conditioning=self.conditioning,
            trail=tuple(record.latents for record in self.records[-NUM_TRAIL_CHUNKS:]),
            first=None if pinned is None else self.records[pinned].latents,
            generator_state=self.generator_state,
            parked=self.parked,
            predicted_s=predicted_s,
        )

    def add(self, record: ChunkRecord) -> None:
        """The next chunk is denoised."""
        assert record.chunk == len(self.records)
        self.records.append(record)
        self.generator_state = record.generator_state
        self._undropped[record.chunk] = record.latents

    def publishable(self, segment: Segment) -> list[Segment]:
        """Takes a decoded segment in; returns those that can now be published, in order."""
        self.segments[segment.chunk] = segment
        self.num_decoded += 1
        ready = []
        while self.num_published in self.segments:
            ready.append(self.segments.pop(self.num_published))
            self.num_published += 1
        return ready

    def spent_refs(self) -> list[TensorRef]:
        """Latents, taken out, that neither the next chunk nor a decoding to come will read."""
        following = len(self.records)
        kept = {self.request.pinned_chunk(chunk) for chunk in (following, following + 1)}
        spent = [
            chunk
            for chunk in self._undropped
            if chunk < following - NUM_TRAIL_CHUNKS and chunk not in kept and chunk < self.num_published
        ]
        return [self._undropped.pop(chunk) for chunk in spent]

    def take_parked(self) -> list[TensorRef]:
        """The parked progress, taken out: it was resumed and ended, or is lost."""
        parked, self.parked = self.parked, None
        return [] if parked is None else [parked]

    def all_refs(self) -> list[TensorRef]:
        """Everything that the request still holds, taken out."""
        held = [*self._undropped.values(), *self.take_parked()]
        if self.conditioning is not None:
            held.append(self.conditioning)
        self._undropped.clear()
        return held
