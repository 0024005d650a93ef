"""The continuous batcher of chunk steps: at each step boundary it packs the current step of all its chunks, whatever
stage, size or guidance each has, into one forward, and advances every one of them.

Knows chunk states and the transformer; knows nothing of threads, clients or the VAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_serve.model_executor.batch import ChunkInput, ChunkOutput, ChunkState, SamplingRules
from helios_serve.model_executor.byte_cache import ByteCache
from helios_serve.model_executor.packing import TextKV, TokenSequence, pack, unpack
from helios_serve.model_executor.prompt_schedule import PromptEmbedding
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.types import StepCursor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One forward: the chunks it advances, each with its sequences in packing order."""

    chunks: tuple[ChunkState, ...]
    sequences: tuple[TokenSequence, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did: the step of each request that took part, the chunks that it finished, and the requests that it
    could not advance; their chunks are forgotten."""

    steps: tuple[tuple[str, StepCursor], ...]
    finished: tuple[ChunkOutput, ...]
    failed: tuple[tuple[str, Exception], ...]
    num_sequences: int


class Runner:
    """Runs chunks of many requests step by step.

    Args:
        transformer: ready to run, on its device.
        rules: what the checkpoint decides about sampling.
        text_cache_bytes: limit of the kept text keys and values.
    """

    def __init__(self, transformer: HeliosTransformer, rules: SamplingRules, text_cache_bytes: int = 4 << 30) -> None:
        self._transformer = transformer
        self._rules = rules
        self._texts = ByteCache[TextKV](text_cache_bytes)
        self._chunks: dict[str, ChunkState] = {}

    @property
    def active(self) -> tuple[str, ...]:
        """Requests whose chunks take part in the next step."""
        return tuple(self._chunks)

    @torch.inference_mode()
    def join(self, chunk: ChunkInput) -> None:
        """Takes a chunk in; it takes part from the next step on. One chunk per request at a time."""
        assert chunk.request_id not in self._chunks
        cond = self._text_kv(chunk.prompt)
        uncond = None if chunk.negative is None else self._text_kv(chunk.negative)
        self._chunks[chunk.request_id] = ChunkState(chunk, self._rules, self._transformer, (cond, uncond))

    def abort(self, request_id: str) -> None:
        """Forgets the chunk of a request, if it has one."""
        self._chunks.pop(request_id, None)

    @torch.inference_mode()
    def step(self, request_ids: Sequence[str] | None = None) -> StepResult:
        """Advances the chunks of `request_ids`, or every active one, by one step in one forward."""
        plan = self._plan_step(self.active if request_ids is None else request_ids)
        batch, text = pack(plan.sequences, self._transformer.patch)
        flows = unpack(self._transformer(batch, text), batch, self._transformer.patch)
        return self._advance(plan, flows)

    def _plan_step(self, request_ids: Sequence[str]) -> StepPlan:
        chunks = tuple(self._chunks[request_id] for request_id in request_ids)
        return StepPlan(chunks=chunks, sequences=tuple(s for chunk in chunks for s in chunk.sequences()))

    def _advance(self, plan: StepPlan, flows: Sequence[Tensor]) -> StepResult:
        steps, finished, failed, remaining = [], [], [], list(flows)
        for chunk in plan.chunks:
            request_id, cursor = chunk.input.request_id, chunk.cursor
            count = 1 if chunk.input.negative is None else 2
            own, remaining = remaining[:count], remaining[count:]
            # The others have moved on or will: one that fails must not stop them, nor be repeated with them.
            try:
                chunk.advance(own)
                if chunk.is_finished:
                    finished.append(chunk.output())
                    del self._chunks[request_id]
                steps.append((request_id, cursor))
            except Exception as error:
                failed.append((request_id, error))
                self.abort(request_id)
        return StepResult(
            steps=tuple(steps), finished=tuple(finished), failed=tuple(failed), num_sequences=len(plan.sequences)
        )

    def _text_kv(self, prompt: PromptEmbedding) -> TextKV:
        return self._texts.get(prompt.key, lambda: self._transformer.project_text(prompt.embeds))
