"""`helios-serve bench throughput`: frames per second offline, over ranks, degrees, batches and precisions.

Knows how points become one result file, table and plot; the work is timed by `rank_engine`. Each call adds its points
to the file, in place of older ones for the same cell.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from helios_serve.bench.rank_engine import ChunkTimes, RankEngine, VideoTimes, describe_params
from helios_serve.bench.rank_work import Workload
from helios_serve.bench.result_file import describe_client, json_text, write_text
from helios_serve.bench.tables import wide_console
from helios_serve.bench.throughput_plot import scaling_plot
from helios_serve.config import ExecutorConfig, GivenDegrees, ModelConfig
from helios_serve.errors import InvalidRequestError
from helios_serve.parallel.peer_memory import PeerAxis
from helios_serve.types import FRAMES_PER_CHUNK, ModelInfo

FORMAT = 1
_SHAPE = (
    *("num_encoders", "num_dit_groups", "num_dit_ranks", "num_vaes", "num_vae_ranks"),
    *("ulysses", "ring", "cfg_degree", "head_groups", "symmetric_memory"),
)
"""Settings of a cluster that distinguish its points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputRun:
    """What is measured, and where the result goes. num_warmups: chunks of each video that do not count, at least the
    first, which has no history. cluster: None for this rank and those that torchrun started."""

    model: ModelConfig
    cluster: ExecutorConfig | None
    degrees: GivenDegrees
    workload: Workload
    batches: tuple[int, ...]
    num_warmups: int
    num_repeats: int
    decodes: bool
    compares_diffusers: bool
    command: str
    out: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What distinguishes a point from the others of a file."""

    engine: str
    ranks: int
    degrees: str
    batch: int
    precision: str


Rate = tuple[float, float, float]
"""Frames per second of all streams together: median of the repeats, lowest, highest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One cell, measured. None for what was left out.

    dit_fps: what the forwards of steady chunks alone would give. fps: with decoding, which the ranks share, and
    segments on rank 0, one after the other. video_fps: of whole videos, with their prompts and first chunks. chunk_s,
    decode_s: of a steady chunk of all streams, the median.
    """

    cell: Cell
    dit_fps: Rate | None
    fps: Rate | None
    video_fps: Rate | None
    chunk_s: float | None
    decode_s: float | None
    num_chunks: int


def run_throughput(run: ThroughputRun) -> None:
    """Measures on this rank; rank 0 adds the points to the result and draws it.

    Raises: CheckpointError, InvalidRequestError, ValueError for what cannot be run, compared or written.
    """
    if run.cluster is not None:
        _run_on_cluster(run, run.cluster)
        return
    engine = RankEngine(run.model, run.degrees)
    try:
        params: dict[str, object] = {}
        points = []
        for batch in run.batches:
            requests = engine.requests(replace(run.workload, batch=batch))
            params = describe_params(requests[0].params)
            videos = [engine.run(requests, decodes=run.decodes) for _ in range(run.num_repeats)]
            points.append(point_of(_cell(run, engine, batch), videos, run.num_warmups, decodes=run.decodes))
        if engine.is_first:
            if run.compares_diffusers:
                points.append(_diffusers_point(run, engine))
            _report(run, engine.info, params, points)
    finally:
        engine.close()


def _run_on_cluster(run: ThroughputRun, cluster: ExecutorConfig) -> None:
    """Whole videos alone are timed: chunks of different videos are under way at the same time."""
    from helios_serve.bench.throughput_ray import ClusterEngine

    params: dict[str, object] = {}
    points = []
    with ClusterEngine(run.model, cluster) as engine:
        for batch in run.batches:
            workload = replace(run.workload, batch=batch)
            params = describe_params(engine.requests(workload)[0].params)
            engine.seconds(engine.requests(replace(workload, num_chunks=run.num_warmups)))
            num_chunks = batch * workload.num_chunks
            seconds = [engine.seconds(engine.requests(workload)) for _ in range(run.num_repeats)]
            rates = [FRAMES_PER_CHUNK * num_chunks / one for one in seconds]
            points.append(_whole_videos(_cluster_cell(run, cluster, batch), rates, num_chunks))
        _report(run, engine.info, params, points)


def _cluster_cell(run: ThroughputRun, cluster: ExecutorConfig, batch: int) -> Cell:
    usual = ExecutorConfig()
    chosen = {name: getattr(cluster, name) for name in _SHAPE if getattr(cluster, name) != getattr(usual, name)}
    return Cell(
        engine="helios_serve on Ray",
        ranks=cluster.num_dit_groups * cluster.num_dit_ranks,
        degrees=", ".join(f"{name} {value}" for name, value in chosen.items()) or "one of each",
        batch=batch,
        precision=_precision(run.model),
    )


def point_of(cell: Cell, videos: Sequence[VideoTimes], num_warmups: int, *, decodes: bool) -> Point:
    """From the repeats of a cell, the first chunks of which are warm-up."""
    steady = [video.chunks[num_warmups:] for video in videos]
    counted = [chunk for chunks in steady for chunk in chunks]
    made = FRAMES_PER_CHUNK * cell.batch

    def rate(seconds: Callable[[ChunkTimes], float]) -> Rate:
        return _spread([made * len(chunks) / sum(seconds(chunk) for chunk in chunks) for chunks in steady])

    whole = [made * len(video.chunks) / video.total_s for video in videos]
    return Point(
        cell=cell,
        dit_fps=rate(lambda one: one.denoise_s),
        fps=rate(lambda one: one.total_s) if decodes else None,
        video_fps=_spread(whole) if decodes else None,
        chunk_s=statistics.median(chunk.denoise_s for chunk in counted),
        decode_s=statistics.median(chunk.decode_s for chunk in counted) if decodes else None,
        num_chunks=len(counted),
    )


def _spread(values: Sequence[float]) -> Rate:
    return statistics.median(values), min(values), max(values)


def _cell(run: ThroughputRun, engine: RankEngine, batch: int) -> Cell:
    mesh = engine.mesh
    axes = {"cfg": mesh.cfg.size, "ring": mesh.ring.size, "ulysses": mesh.ulysses.size}
    degrees = " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1)
    if isinstance(mesh.ulysses, PeerAxis):
        degrees += " by symmetric memory"
    precision = _precision(run.model)
    return Cell(
        engine="helios_serve", ranks=mesh.num_ranks, degrees=degrees or "alone", batch=batch, precision=precision
    )


def _precision(model: ModelConfig) -> str:
    return model.dtype if model.quantize == "none" else f"{model.dtype}, {model.quantize}"


def _diffusers_point(run: ThroughputRun, engine: RankEngine) -> Point:
    """diffusers' pipeline on one device, one video at a time, its whole call over all of its frames."""
    from helios_serve.bench.throughput_diffusers import diffusers_seconds

    (request,) = engine.requests(replace(run.workload, batch=1))
    seconds, package = diffusers_seconds(run.model, request, run.num_repeats)
    rates = [request.params.num_frames / one for one in seconds]
    cell = Cell(engine=package, ranks=1, degrees="alone", batch=1, precision=run.model.dtype)
    return _whole_videos(cell, rates, request.params.num_chunks)


def _whole_videos(cell: Cell, rates: Sequence[float], num_chunks: int) -> Point:
    """rates: frames per second of each repeat, of `num_chunks` each."""
    return Point(
        cell=cell,
        dit_fps=None,
        fps=None,
        video_fps=_spread(rates),
        chunk_s=None,
        decode_s=None,
        num_chunks=num_chunks * len(rates),
    )


def _report(run: ThroughputRun, info: ModelInfo, params: Mapping[str, object], points: Sequence[Point]) -> None:
    about = {
        "model": {"name": info.name, "variant": info.variant, "weights": run.model.weights},
        "device": run.model.device,
        "params": dict(params),
    }
    result = merged(_read(run.out), about, run.command, points)
    write_text(run.out, json_text(result))
    write_text(run.out.with_suffix(".svg"), scaling_plot(result))
    console = wide_console()
    console.print(throughput_table(result["points"]))
    console.print(f"result: {run.out}, plot: {run.out.with_suffix('.svg')}", highlight=False)


def merged(
    before: Mapping[str, Any] | None, about: Mapping[str, Any], command: str, points: Iterable[Point]
) -> dict[str, Any]:
    """The file with these points in it.

    Raises: InvalidRequestError when the file's other points are of another model, device or workload.
    """
    if before is not None and any(before.get(name) != value for name, value in about.items()):
        raise InvalidRequestError(
            "out: the file holds points of another model, device or workload; name a new file", param="out"
        )
    new = [asdict(point) for point in points]
    cells = [point["cell"] for point in new]
    kept = [] if before is None else [point for point in before["points"] if point["cell"] not in cells]
    ordered = sorted(
        kept + new,
        key=lambda point: (
            [str(point["cell"][key]) for key in ("engine", "precision")]
            + [f"{point['cell'][key]:09d}" for key in ("batch", "ranks")]
        ),
    )
    return {
        "format": FORMAT,
        "benchmark": "throughput",
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        **about,
        "client": describe_client(),
        "points": json.loads(json.dumps(ordered)),
    }


def _read(path: Path) -> dict[str, Any] | None:
    """Raises: InvalidRequestError for a file that is no such result."""
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        content = {}
    if content.get("benchmark") != "throughput":
        raise InvalidRequestError(f"out {path}: exists and is no result of this command; name another", param="out")
    return content


def throughput_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each point: milliseconds of a chunk of all streams, rates, and the speed-up over one rank."""
    table = Table(
        title="steady chunks: milliseconds, and frames per second of all streams", title_justify="left", box=SIMPLE_HEAD
    )
    for name in ("engine", "precision", "batch", "ranks", "shared by"):
        table.add_column(name, justify="right" if name in ("batch", "ranks") else "left", no_wrap=True)
    for name in ("DiT ms", "VAE ms", "DiT FPS", "FPS", "videos' FPS", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        cell = point["cell"]
        table.add_row(
            cell["engine"],
            cell["precision"],
            str(cell["batch"]),
            str(cell["ranks"]),
            cell["degrees"],
            *("" if point[name] is None else f"{1000 * point[name]:.1f}" for name in ("chunk_s", "decode_s")),
            *(_shown(point[name]) for name in ("dit_fps", "fps", "video_fps")),
            _speed_up(point, points),
        )
    return table


def _shown(rate: Sequence[float] | None) -> str:
    """The median, and how far the farthest repeat lies."""
    if rate is None:
        return ""
    middle, low, high = rate
    away = max(high - middle, middle - low)
    return f"{middle:.3g}" if away == 0 else f"{middle:.3g} ±{away:.2g}"


def _speed_up(point: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> str:
    """Of the forwards over one rank's, and which share of the ranks that is."""
    alone, ranks = alone_of(point, points), point["cell"]["ranks"]
    if alone is None or ranks == 1:
        return ""
    speed_up = point["dit_fps"][0] / alone["dit_fps"][0]
    return f"{speed_up:.2f}x, {speed_up / ranks:.0%}"


def alone_of(point: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The point of one rank that a point is to be compared with."""
    wanted = {**point["cell"], "ranks": 1, "degrees": "alone"}
    return next((other for other in points if other["cell"] == wanted), None)
