"""One accepted request on its way through the roles: what exists of it, in references, and what was published.

Mutable; its one owner is the engine. Knows records, segments and what holds a request back; reads no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from helios_serve.engine.request_state import RequestState
from helios_serve.types import (
    NUM_TRAIL_CHUNKS,
    ChunkRecord,
    ChunkTask,
    Failure,
    PlayState,
    PromptChange,
    Restart,
    Resume,
    Segment,
    TensorRef,
    VideoRequest,
)

Hold = Literal["vae", "store", "prompt", "credit", "pause"]
"""Why a request starts no chunk: the VAEs or its keeper are behind, a new prompt is being encoded, its viewer has all
the segments that it asked for, or it was told to stand still."""


@dataclass(slots=True, kw_only=True, eq=False)
class RequestRun:
    """`records` are of the chunks that later ones, a decoding or the keeper will still read. lost_alone: (group,
    incarnation) of those that were lost while they ran this request alone.

    has_keeper: somebody commits every chunk and says so; until then its latents stay. allowed: chunks that may be
    started at all, None without such a limit.
    """

    state: RequestState
    accepted_at: float
    has_keeper: bool = False
    conditioning: TensorRef | None = None
    generator_state: bytes = b""
    records: dict[int, ChunkRecord] = field(default_factory=dict)
    parked: TensorRef | None = None
    segments: dict[int, Segment] = field(default_factory=dict)
    """Decoded and not published: an earlier chunk is still missing."""
    num_changes: int = 0
    num_dispatched: int = 0
    num_undecoded: int = 0
    num_committed: int = 0
    num_published: int = 0
    allowed: int | None = None
    play_state: PlayState = "running"
    started_at: float | None = None
    last_published_at: float | None = None
    lost_alone: set[tuple[str, int]] = field(default_factory=set)
    failure: Failure | None = None
    """How the request will end when its finished chunks are delivered."""
    is_over: bool = False
    """Completed, failed or cancelled: what still runs for it is of no use."""
    _encoders_chunk: int | None = None
    """The chunk, not the first, that begins from the generator state that the encoder leaves."""
    _holds: set[Hold] = field(default_factory=set)
    _published_before: set[int] = field(default_factory=set)
    """Chunks with a segment from an earlier run, behind one without."""
    _replaced: list[TensorRef] = field(default_factory=list)

    @property
    def request(self) -> VideoRequest:
        return self.state.request

    @property
    def request_id(self) -> str:
        return self.state.request_id

    @property
    def num_uncommitted(self) -> int:
        return self.state.next_chunk - self.num_committed if self.has_keeper else 0

    @property
    def is_complete(self) -> bool:
        """Whether every chunk was delivered and kept."""
        return self.num_published == self.state.end_chunk and self.num_uncommitted == 0

    @property
    def first_free_chunk(self) -> int:
        """The first chunk whose denoising has not begun."""
        has_begun = self.state.group_id is not None or self.state.step > 0
        return self.state.next_chunk + has_begun

    def resume(self, point: Resume) -> None:
        """Takes over what exists of the request; its state stands at `point.next_chunk` already."""
        self.records = {record.chunk: record for record in point.records}
        self.generator_state = point.generator_state
        self._encoders_chunk = None if point.generator_state or point.next_chunk == 0 else point.next_chunk
        self.state.is_suspect = point.is_suspect
        self.num_committed = point.next_chunk
        self.num_undecoded = len(point.undecoded)
        self.num_published = min(point.undecoded, default=point.next_chunk)
        self._published_before = set(range(self.num_published, point.next_chunk)) - set(point.undecoded)

    def hold(self, why: Hold, is_on: bool) -> None:
        """Adds or takes away one reason to start no chunk."""
        if is_on:
            self._holds.add(why)
        else:
            self._holds.discard(why)
        self.state.is_held = bool(self._holds)

    def is_held_by(self, why: Hold) -> bool:
        return why in self._holds

    def change_prompt(self, change: PromptChange) -> None:
        """From `change.chunk` on, whose denoising has not begun; a change that begins there or later is replaced."""
        kept = tuple(earlier for earlier in self.request.prompts if earlier.chunk < change.chunk)
        self.state.request = replace(self.request, prompts=(*kept, change))
        self.num_changes += 1

    def restart(self, restart: Restart) -> None:
        """From `restart.chunk` on, whose denoising has not begun, the history is new."""
        params = self.request.params
        kept = tuple(earlier for earlier in params.restarts if earlier.chunk < restart.chunk)
        self.state.request = replace(self.request, params=replace(params, restarts=(*kept, restart)))
        self.num_changes += 1

    def encoded(self, conditioning: TensorRef, generator_state: bytes) -> None:
        """The encoder's answer: the request can run its next chunk."""
        if self.conditioning is not None:
            self._replaced.append(self.conditioning)  # a chunk that was given out may still read it
        self.conditioning = conditioning
        if not self.generator_state:
            self.generator_state = generator_state
        self.state.is_ready = True

    def next_task(self, predicted_s: float) -> ChunkTask:
        """The next chunk, or what is left of it, as a group is given it; every dispatch has an id of its own."""
        assert self.conditioning is not None
        chunk = self.state.next_chunk
        pinned = self.request.pinned_chunk(chunk)
        self.num_dispatched += 1
        params = self.request.params
        trail = range(max(params.start_of(chunk), chunk - NUM_TRAIL_CHUNKS), chunk)
        return ChunkTask(
            task_id=f"{self.request_id}/c{chunk}.{self.num_dispatched}",
            request_id=self.request_id,
            chunk=chunk,
            conditioning=self.conditioning,
            trail=tuple(self.records[earlier].latents for earlier in trail),
            first=None if pinned is None else self.records[pinned].latents,
            generator_state=self.generator_state,
            parked=self.parked,
            predicted_s=predicted_s,
            seed=None if chunk == self._encoders_chunk else params.seed_at(chunk),
        )

    def add(self, record: ChunkRecord) -> None:
        """The next chunk is denoised."""
        assert record.chunk == self.state.next_chunk - 1
        self.records[record.chunk] = record
        self.generator_state = record.generator_state
        self.num_undecoded += 1

    def publishable(self, segment: Segment) -> list[Segment]:
        """Takes a decoded segment in; returns those that can now be published, in order."""
        self.segments[segment.chunk] = segment
        self.num_undecoded -= 1
        ready = []
        while True:
            if self.num_published in self.segments:
                ready.append(self.segments.pop(self.num_published))
            elif self.num_published not in self._published_before:
                return ready
            self.num_published += 1

    def spent_refs(self) -> list[TensorRef]:
        """What neither the next chunk, nor a decoding to come, nor the keeper will read, taken out."""
        following = self.state.next_chunk
        kept = {self.request.pinned_chunk(chunk) for chunk in (following, following + 1)}
        committed = self.num_committed if self.has_keeper else following
        spent = [
            chunk
            for chunk in self.records
            if chunk < following - NUM_TRAIL_CHUNKS
            and chunk not in kept
            and chunk < self.num_published
            and chunk < committed
        ]
        return [self.records.pop(chunk).latents for chunk in spent]

    def take_parked(self) -> list[TensorRef]:
        """The parked progress, taken out: it was resumed and ended, or is lost."""
        parked, self.parked = self.parked, None
        return [] if parked is None else [parked]

    def take_replaced(self) -> list[TensorRef]:
        """Conditionings that a newer one replaced, taken out; no chunk that was given out reads them any more."""
        replaced, self._replaced = self._replaced, []
        return replaced

    def all_refs(self) -> Iterable[TensorRef]:
        """Everything that the request still holds, taken out."""
        held = [record.latents for record in self.records.values()]
        held += [*self.take_parked(), *self.take_replaced()]
        if self.conditioning is not None:
            held.append(self.conditioning)
        self.records.clear()
        return held
