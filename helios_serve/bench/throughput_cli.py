"""Flags of `helios-serve bench throughput`. The work is done by `throughput`, which needs torch and is imported
late."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from helios_serve.bench import rank_work as flags
from helios_serve.bench.rank_launch import is_in_torchrun, parse_counts, start_ranks
from helios_serve.bench.workload import parse_steps
from helios_serve.config import AUTO
from helios_serve.errors import InvalidRequestError


def bench_throughput(
    model: flags.ModelFlag,
    chunks: Annotated[int, typer.Option(min=2, help="Of each video, with those of --warmup.")] = 6,
    batch: Annotated[str, typer.Option(help="Videos made together in one forward, or several to compare: 1,4.")] = "1",
    size: flags.SizeFlag = None,
    steps: flags.StepsFlag = None,
    guidance_scale: flags.GuidanceFlag = None,
    device: flags.DeviceFlag = None,
    dtype: flags.DTypeFlag = None,
    quantize: flags.QuantizeFlag = "none",
    weights: flags.WeightsFlag = "checkpoint",
    ranks: flags.RanksFlag = None,
    ray: flags.RayFlag = None,
    ulysses: flags.UlyssesFlag = AUTO,
    ring: flags.RingFlag = AUTO,
    cfg_degree: flags.CfgFlag = AUTO,
    symmetric_memory: Annotated[
        bool, typer.Option("--symmetric-memory", help="--ulysses writes into other ranks' memory where it can.")
    ] = False,
    decode: Annotated[bool, typer.Option(help="Make pixels, shared by the ranks, and segments, too.")] = True,
    warmup: Annotated[
        int, typer.Option(min=1, help="Chunks of each video that do not count; with --ray a video of so many ahead.")
    ] = 2,
    repeat: Annotated[int, typer.Option(min=1, help="Videos, or batches of them; medians with range.")] = 3,
    compare: Annotated[
        Literal["diffusers"] | None, typer.Option(help="Also measure diffusers' pipeline, where it is installed.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Result, to which each call adds; the plot lies beside it as .svg.")
    ] = Path("bench-throughput.json"),
) -> None:
    """Make videos offline, on one rank or on several that share each forward, and count frames per second."""
    if warmup >= chunks:
        raise InvalidRequestError(f"warmup {warmup}: must leave one of {chunks} chunks to be counted", param="warmup")
    shares = (ranks, ulysses, ring, cfg_degree, symmetric_memory)
    if ray and shares != (None, AUTO, AUTO, AUTO, False):
        raise InvalidRequestError(
            "ray: has settings of its own for ranks, such as num_dit_ranks=2 ulysses=2", param="ray"
        )
    if ray and (compare is not None or not decode):
        raise InvalidRequestError("ray: makes whole videos; leave out --compare and --no-decode", param="ray")
    if ranks is not None and not is_in_torchrun():
        start_ranks(parse_counts("ranks", ranks), sys.argv[1:])
        return
    from helios_serve.bench.throughput import ThroughputRun, run_throughput

    run_throughput(
        ThroughputRun(
            model=flags.model_of(model, device, dtype, quantize, weights),
            cluster=flags.cluster_of(ray) if ray else None,
            degrees=replace(flags.degrees_of(cfg_degree, ring, ulysses), symmetric_memory=symmetric_memory),
            workload=flags.Workload(
                num_chunks=chunks,
                size=size,
                steps=None if steps is None else parse_steps(steps),
                guidance_scale=guidance_scale,
            ),
            batches=parse_counts("batch", batch),
            num_warmups=warmup,
            num_repeats=repeat,
            decodes=decode,
            compares_diffusers=compare == "diffusers",
            command=shlex.join(["helios-serve", *sys.argv[1:]]),
            out=out,
        )
    )
