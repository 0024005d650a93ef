"""`helios-serve bench latency`: one stream, alone, and where each of its chunks spends its time.

Knows how times become a table and a file; the work is timed by `rank_engine`.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from helios_serve.bench.rank_engine import ChunkTimes, RankEngine, VideoTimes, describe_params
from helios_serve.bench.rank_work import Workload
from helios_serve.bench.result_file import describe_client, json_text, write_text
from helios_serve.bench.tables import wide_console
from helios_serve.config import GivenDegrees, ModelConfig
from helios_serve.types import FRAMES_PER_CHUNK

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRun:
    """What is measured, how often behind how many warm-up videos, and where the result goes."""

    model: ModelConfig
    degrees: GivenDegrees
    workload: Workload
    num_warmups: int
    num_repeats: int
    command: str
    out: Path


def run_latency(run: LatencyRun) -> None:
    """Measures; rank 0 prints the table and writes the result.

    Raises: CheckpointError, InvalidRequestError, ValueError for what cannot be run or written.
    """
    engine = RankEngine(run.model, run.degrees)
    try:
        requests = engine.requests(run.workload)
        for _ in range(run.num_warmups):
            engine.run(requests)
        videos = [engine.run(requests) for _ in range(run.num_repeats)]
        if engine.is_first:
            result = result_of(run, engine, describe_params(requests[0].params), videos)
            write_text(run.out, json_text(result))
            console = wide_console()
            console.print(latency_table(videos, run.workload.fps))
            console.print(f"result: {run.out}", highlight=False)
    finally:
        engine.close()


def result_of(
    run: LatencyRun, engine: RankEngine, params: dict[str, object], videos: Sequence[VideoTimes]
) -> dict[str, Any]:
    """The result as JSON takes it."""
    mesh = engine.mesh
    return {
        "format": FORMAT,
        "benchmark": "latency",
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": run.command,
        "model": {"name": engine.info.name, "variant": engine.info.variant, "weights": run.model.weights},
        "device": run.model.device,
        "dtype": run.model.dtype,
        "quantize": run.model.quantize,
        "ranks": mesh.num_ranks,
        "degrees": {"cfg": mesh.cfg.size, "ring": mesh.ring.size, "ulysses": mesh.ulysses.size},
        "params": params,
        "warmups": run.num_warmups,
        "client": describe_client(),
        "videos": [dataclasses.asdict(video) for video in videos],
    }


def latency_table(videos: Sequence[VideoTimes], fps: float) -> Table:
    """By chunk, medians over the repeats in milliseconds; behind the total, the range of the repeats."""
    first = videos[0].chunks[0]
    encode_s = statistics.median(video.encode_s for video in videos)
    title = f"one stream: encoder {_ms(encode_s)} ms, then by chunk in ms, DiT by stage"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    stages = [f"stage {stage}" for stage in range(len(first.stages))]
    for name in ("chunk", "steps", *stages, "dit", "vae", "mux", "total", "range", "x realtime"):
        table.add_column(name, justify="right", no_wrap=True)
    for chunk in range(len(videos[0].chunks)):
        table.add_row(*_row([video.chunks[chunk] for video in videos], fps))
    return table


def _row(times: Sequence[ChunkTimes], fps: float) -> list[str]:
    def middle(value: Callable[[ChunkTimes], float]) -> float:
        return statistics.median(value(one) for one in times)

    totals = [one.total_s for one in times]
    stages = [middle(lambda one, at=stage: one.stages[at]) for stage in range(len(times[0].stages))]  # type: ignore[misc]
    parts = (middle(lambda one: one.denoise_s), middle(lambda one: one.decode_s), middle(lambda one: one.mux_s))
    total = statistics.median(totals)
    return [
        str(times[0].chunk),
        ",".join(map(str, times[0].steps)),
        *(_ms(stage) for stage in stages),
        *(_ms(part) for part in parts),
        _ms(total),
        f"{_ms(min(totals))}..{_ms(max(totals))}",
        f"{FRAMES_PER_CHUNK / fps / total:.2f}",
    ]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
