"""Flags of `helios-serve bench latency`. The work is done by `latency`, which needs torch and is imported late."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from helios_serve.bench import rank_work as flags
from helios_serve.bench.rank_launch import is_in_torchrun, parse_counts, start_ranks
from helios_serve.bench.workload import parse_steps
from helios_serve.config import AUTO
from helios_serve.errors import InvalidRequestError


def bench_latency(
    model: flags.ModelFlag,
    chunks: Annotated[int, typer.Option(min=1, help="Of the video; the first one has no history.")] = 4,
    size: flags.SizeFlag = None,
    steps: flags.StepsFlag = None,
    guidance_scale: flags.GuidanceFlag = None,
    fps: Annotated[float, typer.Option(help="Playback rate that times are compared with.")] = 24.0,
    device: flags.DeviceFlag = None,
    dtype: flags.DTypeFlag = None,
    quantize: flags.QuantizeFlag = "none",
    weights: flags.WeightsFlag = "checkpoint",
    ranks: flags.RanksFlag = None,
    ulysses: flags.UlyssesFlag = AUTO,
    ring: flags.RingFlag = AUTO,
    cfg_degree: flags.CfgFlag = AUTO,
    warmup: Annotated[int, typer.Option(min=0, help="Videos before, which do not count.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Videos that count.")] = 3,
    out: Annotated[Path, typer.Option("--out", "-o", help="Result, JSON.")] = Path("bench-latency.json"),
) -> None:
    """Make one video at a time in this process, and say where each chunk spends its time: by role and stage."""
    if ranks is not None and not is_in_torchrun():
        counts = parse_counts("ranks", ranks)
        if len(counts) > 1:
            raise InvalidRequestError(f"ranks {ranks}: one number here; throughput compares several", param="ranks")
        start_ranks(counts, sys.argv[1:])
        return
    from helios_serve.bench.latency import LatencyRun, run_latency

    run_latency(
        LatencyRun(
            model=flags.model_of(model, device, dtype, quantize, weights),
            degrees=flags.degrees_of(cfg_degree, ring, ulysses),
            workload=flags.Workload(
                num_chunks=chunks,
                size=size,
                steps=None if steps is None else parse_steps(steps),
                guidance_scale=guidance_scale,
                fps=fps,
            ),
            num_warmups=warmup,
            num_repeats=repeat,
            command=shlex.join(["helios-serve", *sys.argv[1:]]),
            out=out,
        )
    )
