"""The continuous batcher of chunk steps: at each step boundary it packs the current step of all its chunks, whatever
stage, size or guidance each has, into one forward, and advances every one of them.

Knows chunk states and the transformer; knows nothing of threads, ranks, clients or the VAE. One thread uses a runner.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from helios_serve.faults import NO_FAULTS, FaultPlan
from helios_serve.model_executor.approximations import check_approximations
from helios_serve.model_executor.batch import ChunkInput, ChunkOutput, ChunkState, ParkedChunk, SamplingRules
from helios_serve.model_executor.cached_forward import predict_cached
from helios_serve.model_executor.cuda_graph import graphs_of
from helios_serve.model_executor.memory import clear_cache, retry_out_of_memory
from helios_serve.model_executor.packing import TextKV
from helios_serve.model_executor.spread import breaks_group, predict
from helios_serve.model_executor.text_pool import TextPool
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.parallel.collectives import GroupBrokenError
from helios_serve.parallel.mesh import SOLO, Mesh
from helios_serve.types import StepCursor

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did; chunks that it finished or failed are forgotten.

    steps: the step of each task that took part. failed: tasks that could not be advanced, and why.
    pack_sizes: the sequences in each forward that was done; more than one forward after a pack did not fit.
    max_tokens: the largest forward known to fit, if that was learned in this step.
    """

    steps: tuple[tuple[str, StepCursor], ...]
    finished: tuple[ChunkOutput, ...]
    failed: tuple[tuple[str, Exception], ...]
    pack_sizes: tuple[int, ...]
    max_tokens: int | None


@dataclass(slots=True)
class _StepLog:
    """A StepResult in the making. fitted, too_large: tokens of forwards that were done, and of packs that ran out of
    memory."""

    steps: list[tuple[str, StepCursor]] = field(default_factory=list)
    finished: list[ChunkOutput] = field(default_factory=list)
    failed: list[tuple[str, Exception]] = field(default_factory=list)
    pack_sizes: list[int] = field(default_factory=list)
    fitted: list[int] = field(default_factory=list)
    too_large: list[int] = field(default_factory=list)


class Runner:
    """Runs chunks of many requests step by step. Chunks are known by their task ids.

    Args:
        transformer: ready to run, on its device.
        rules: what the checkpoint decides about sampling.
        text_cache_bytes: limit of the kept text keys and values; those of running chunks are kept beyond it.
        faults: visited at `dit.step` for each chunk of a pack, before its forward, with request_id, chunk, stage, step
            (counted over the chunk's stages) and num_chunks (in this pack).
        mesh: the ranks that share each forward; all of them run the same chunks in the same order.
    """

    def __init__(
        self,
        transformer: HeliosTransformer,
        rules: SamplingRules,
        text_cache_bytes: int = 4 << 30,
        faults: FaultPlan = NO_FAULTS,
        mesh: Mesh = SOLO,
    ) -> None:
        self.transformer = transformer
        self.rules = rules
        self._faults = faults
        self._mesh = mesh
        self._texts = TextPool(text_cache_bytes)
        self._graphs = graphs_of(transformer)
        self._chunks: dict[str, ChunkState] = {}
        self._max_tokens: int | None = None

    @property
    def active(self) -> tuple[str, ...]:
        """Tasks whose chunks take part in the next step."""
        return tuple(self._chunks)

    @torch.inference_mode()
    def join(self, chunk: ChunkInput, parked: ParkedChunk | None = None) -> None:
        """Takes a chunk in, from its beginning or from where it was parked; it takes part from the next step on.

        Raises: GroupBrokenError when memory runs out on one of several ranks; CheckpointError for approximations that
            are not possible with this checkpoint or on these ranks.
        """
        assert chunk.task_id not in self._chunks
        check_approximations(
            chunk.params.approximations,
            self.rules.scheduler.solver,
            num_ranks=self._mesh.num_ranks,
            cfg_degree=self._mesh.cfg.size,
        )
        with breaks_group(self._mesh):
            self._chunks[chunk.task_id] = self._retry(lambda: self._make_state(chunk, parked))

    def park(self, task_id: str) -> ParkedChunk | None:
        """Takes a chunk out and returns its progress; None if there is no such chunk."""
        chunk = self._forget(task_id)
        return None if chunk is None else chunk.park()

    def abort(self, task_id: str) -> bool:
        """Forgets a chunk; whether there was one."""
        return self._forget(task_id) is not None

    @torch.inference_mode()
    def step(self, task_ids: Sequence[str] | None = None) -> StepResult:
        """Advances the chunks of `task_ids`, or every active one, by one step: in one forward if it fits, in none if
        nobody's step takes a predicted flow.

        Raises: GroupBrokenError when a forward over several ranks fails, or memory runs out on one of them; no chunk
            can go on then.
        """
        log = _StepLog()
        if self._graphs is not None:
            self._graphs.begin_step()
        for chunks in self._plan_packs(self.active if task_ids is None else task_ids):
            self._run_pack(chunks, log)
        return StepResult(
            steps=tuple(log.steps),
            finished=tuple(log.finished),
            failed=tuple(log.failed),
            pack_sizes=tuple(log.pack_sizes),
            max_tokens=self._learn_limit(log),
        )

    def _make_state(self, chunk: ChunkInput, parked: ParkedChunk | None) -> ChunkState:
        """The chunk's state, whose prompts stay in the pool until it is forgotten."""
        texts: list[TextKV] = []
        with ExitStack() as undo:
            for prompt in chunk.prompts:
                texts.append(self._texts.acquire(prompt.key, partial(self.transformer.project_text, prompt.embeds)))
                undo.callback(self._texts.release, prompt.key)
            cond, uncond = texts if len(texts) == 2 else (texts[0], None)
            state = ChunkState(chunk, self.rules, self.transformer, (cond, uncond), parked)
            undo.pop_all()
        return state

    def _forget(self, task_id: str) -> ChunkState | None:
        """Lets go of a chunk and of its prompts."""
        chunk = self._chunks.pop(task_id, None)
        if chunk is not None:
            for prompt in chunk.input.prompts:
                self._texts.release(prompt.key)
        return chunk

    def _retry(self, work: Callable[[], T]) -> T:
        """The result of `work`, which is done once more if memory ran out."""
        return retry_out_of_memory(work, self._free_memory)

    def _free_memory(self) -> None:
        if self._graphs is not None:
            self._graphs.release()
        clear_cache()

    def _plan_packs(self, task_ids: Iterable[str]) -> list[list[ChunkState]]:
        """All chunks in one pack, or in as many as the known limit asks for."""
        packs: list[list[ChunkState]] = []
        num_tokens = 0
        for chunk in (self._chunks[task_id] for task_id in task_ids):
            num_tokens += chunk.num_tokens
            if not packs or (self._max_tokens is not None and num_tokens > self._max_tokens):
                packs.append([])
                num_tokens = chunk.num_tokens
            packs[-1].append(chunk)
        return packs

    def _run_pack(self, chunks: Sequence[ChunkState], log: _StepLog) -> None:
        """One forward for all. If it fails nobody has moved, and smaller ones follow: only the chunk at fault ends."""
        try:
            with breaks_group(self._mesh):
                flows = self._predict(chunks) if len(chunks) > 1 else self._retry(lambda: self._predict(chunks))
        except GroupBrokenError:
            raise
        except Exception as error:
            failure = error
        else:
            self._advance(chunks, flows, log)
            return
        if len(chunks) == 1:
            self._fail(chunks[0], failure, log)
            return
        size = 1
        if isinstance(failure, torch.OutOfMemoryError):
            log.too_large.append(sum(chunk.num_tokens for chunk in chunks))
            size = (len(chunks) + 1) // 2
            failure.__traceback__ = None  # its frames hold the tensors of the failed forward
            self._free_memory()
        for at in range(0, len(chunks), size):
            self._run_pack(chunks[at : at + size], log)

    def _predict(self, chunks: Sequence[ChunkState]) -> list[list[Tensor]]:
        """The flows of each chunk's sequences."""
        spoiled = [self._visit(chunk, len(chunks)) for chunk in chunks]
        sequences = [chunk.sequences() for chunk in chunks]
        forward = partial(predict, self.transformer, mesh=self._mesh, graphs=self._graphs)
        flows = iter(predict_cached(self.transformer, [sequence for own in sequences for sequence in own], forward))
        own_flows = [[next(flows) for _ in own] for own in sequences]
        return [
            [torch.full_like(flow, torch.nan) for flow in own] if is_spoiled else own
            for own, is_spoiled in zip(own_flows, spoiled, strict=True)
        ]

    def _advance(self, chunks: Sequence[ChunkState], flows: Sequence[list[Tensor]], log: _StepLog) -> None:
        computed = [chunk for chunk in chunks if chunk.num_computed]
        if computed:
            log.pack_sizes.append(sum(chunk.num_computed for chunk in computed))
            log.fitted.append(sum(chunk.num_tokens for chunk in computed))
        for chunk, own in zip(chunks, flows, strict=True):
            task_id, cursor = chunk.input.task_id, chunk.cursor
            # The others have moved on or will: one that fails must not stop them, nor be repeated with them.
            try:
                with breaks_group(self._mesh):
                    chunk.advance(own)
                    output = chunk.output() if chunk.is_finished else None
            except GroupBrokenError:
                raise
            except Exception as error:
                self._fail(chunk, error, log)
                continue
            log.steps.append((task_id, cursor))
            if output is not None:
                log.finished.append(output)
                self._forget(task_id)

    def _fail(self, chunk: ChunkState, error: Exception, log: _StepLog) -> None:
        log.failed.append((chunk.input.task_id, error))
        self.abort(chunk.input.task_id)

    def _learn_limit(self, log: _StepLog) -> int | None:
        """Remembers the largest forward that fitted, if a larger pack did not."""
        fitted = [size for size in log.fitted if log.too_large and size < min(log.too_large)]
        if not fitted:
            return None
        self._max_tokens = max(fitted)
        logger.warning(
            "a forward of %d tokens ran out of memory; packs have at most %d tokens from now on",
            min(log.too_large),
            self._max_tokens,
        )
        return self._max_tokens

    def _visit(self, chunk: ChunkState, num_chunks: int) -> bool:
        """Whether a test wants this chunk's flow to be NaN."""
        cursor, steps = chunk.cursor, chunk.input.params.steps_in(chunk.input.chunk)
        return self._faults.at(
            "dit.step",
            request_id=chunk.input.request_id,
            chunk=cursor.chunk,
            stage=cursor.stage,
            step=sum(steps[: cursor.stage]) + cursor.step,
            num_chunks=num_chunks,
        )
