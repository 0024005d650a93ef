"""Forwards by graphs on several ranks, on the stand-in for a device that records: the bits of those without, also where
one rank cannot record and launches what the others replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.host_graphs import HostRecorder, recording_on_host
from helios_serve.model_executor.cuda_graph import ForwardGraphs
from helios_serve.model_executor.history_reuse import HistoryKV
from helios_serve.model_executor.packing import TokenSequence
from helios_serve.model_executor.spread import predict
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts
from helios_serve.parallel.collectives import RankGroup
from helios_serve.parallel.mesh import Degrees, Mesh, build_mesh
from tests.parallel.ranks import run_ranks
from tests.parallel.test_sharded_transformer import CONFIG, make_sequences, make_transformer

PACK = ((21, 3, 4, 6), (37, 3, 6, 10))
NUM_STEPS = 4
DEGREES = (Degrees(ulysses=2), Degrees(ring=2), Degrees(cfg=2))


def _steps(ranks: RankGroup, end: Connection, *, fails_on: int | None) -> None:
    transformer = make_transformer(Shortcuts(last_block_skips_history=True))
    with recording_on_host():
        for degrees in DEGREES:
            mesh = build_mesh(ranks, degrees)
            recorder = HostRecorder(failure=RuntimeError("no") if ranks.rank == fails_on else None)
            graphs = ForwardGraphs(transformer, recorder)
            same = True
            for step in range(NUM_STEPS):
                sequences = [_at(one, step) for one in make_sequences(transformer, PACK)]
                ours = predict(transformer, sequences, mesh, graphs)
                same &= all(map(torch.equal, ours, predict(transformer, sequences, mesh)))
            end.send((same, recorder.num_tries, recorder.num_replays))


def _at(given: TokenSequence, step: int) -> TokenSequence:
    return replace(given, x=given.x * (1.0 + step), timestep=given.timestep - 10.0 * step)


@pytest.mark.parametrize("fails_on", [None, 1])
def test_each_rank_replays_or_launches_the_same(fails_on: int | None, tmp_path: Path) -> None:
    answers = run_ranks(2, tmp_path, partial(_steps, fails_on=fails_on))
    for rank, answer in enumerate(answers):
        num_replays = 0 if rank == fails_on else NUM_STEPS - 1
        assert [*answer] == [(True, 1, num_replays)] * len(DEGREES)


def _kept_steps(ranks: RankGroup, end: Connection) -> None:
    transformer = make_transformer(Shortcuts(last_block_skips_history=True))
    with recording_on_host():
        for degrees in DEGREES[:2]:
            mesh = build_mesh(ranks, degrees)
            graphs = ForwardGraphs(transformer, HostRecorder())
            for _ in range(3):
                by_graphs = _chunk(make_sequences(transformer, PACK), partial(_predict, transformer, mesh, graphs))
                launched = _chunk(make_sequences(transformer, PACK), partial(_predict, transformer, mesh, None))
                end.send(all(map(torch.equal, by_graphs, launched)))
            end.send(len(graphs))


def _predict(
    transformer: HeliosTransformer, mesh: Mesh, graphs: ForwardGraphs | None, sequences: list[TokenSequence]
) -> list[Tensor]:
    if graphs is not None:
        graphs.begin_step()
    return predict(transformer, sequences, mesh, graphs)


def _chunk(sequences: list[TokenSequence], forward: Callable[[list[TokenSequence]], list[Tensor]]) -> list[Tensor]:
    """Two steps of which the second one has the history of the first."""
    kept = [replace(one, history_kv=HistoryKV(CONFIG.num_layers)) for one in sequences]
    flows = [*forward(kept)]
    for one in kept:
        assert one.history_kv is not None
        one.history_kv.seal()
    return [*flows, *forward([_at(one, 1) for one in kept])]


def test_kept_history_stays_with_its_rank(tmp_path: Path) -> None:
    for answer in run_ranks(2, tmp_path, _kept_steps):
        assert [*answer] == [True, True, True, 2] * 2
