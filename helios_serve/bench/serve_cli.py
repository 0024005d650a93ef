"""`helios-serve bench serve`: flags in, result file, plot and tables out.

Knows flags and wiring; the work is done by its neighbours.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from helios_serve.bench.arrivals import ClosedLoad, Load, OpenLoad, TraceLoad
from helios_serve.bench.metrics import STREAM_ONLY, Slo, parse_slo
from helios_serve.bench.workload import Kind, Via, kinds_asked, parse_kind, parse_steps, usual_class, usual_via
from helios_serve.errors import InvalidRequestError
from helios_serve.types import ServiceClass, Task

Api = Literal["helios", "openai-videos"]


def bench_serve(
    url: Annotated[str, typer.Option(help="Of the server, such as http://127.0.0.1:8000.")],
    grpc: Annotated[
        str | None, typer.Option(help="Where the server speaks gRPC, such as grpc://127.0.0.1:8001; for --via grpc.")
    ] = None,
    api: Annotated[
        Api, typer.Option(help="helios: streams and jobs; openai-videos: create, poll, download at any server.")
    ] = "helios",
    rate: Annotated[
        str | None, typer.Option(help="Open loop: requests per second, or several to compare: 0.5,1,2.")
    ] = None,
    burstiness: Annotated[
        float, typer.Option(help="Of the gaps: 1 is Poisson, less comes in bursts, inf is regular.")
    ] = 1.0,
    trace: Annotated[
        Path | None, typer.Option(help="Open loop: a file of arrivals in seconds, one a line, or JSON lines with `at`.")
    ] = None,
    trace_speed: Annotated[float, typer.Option(help="2 replays the trace twice as fast.")] = 1.0,
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: requests in flight, or several to compare: 1,2,4.")
    ] = None,
    num_requests: Annotated[int | None, typer.Option(min=1, help="Of each run; 32 when absent.")] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.1, help="Open loop: all requests that are due within so many seconds.")
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=0, help="Requests of each kind before, one after another, which do not count.")
    ] = 1,
    repeat: Annotated[
        int, typer.Option(min=1, help="Runs of each load, with other arrivals; reported with range.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of arrivals, mix and requests.")] = 0,
    task: Annotated[Task, typer.Option(help="t2v, i2v or v2v.")] = "t2v",
    service_class: Annotated[
        ServiceClass | None,
        typer.Option(help="realtime or offline; when absent, streams are realtime and jobs offline."),
    ] = None,
    via: Annotated[
        Via | None, typer.Option(help="sse, raw (live fMP4), grpc or jobs; when absent sse, and jobs for offline.")
    ] = None,
    num_frames: Annotated[int, typer.Option(help="Length.")] = 132,
    size: Annotated[str | None, typer.Option(help="WxH; the server's default when absent.")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Per stage, such as 2,2,2; the server's default when absent.")
    ] = None,
    fps: Annotated[float, typer.Option(help="Target rate of playback.")] = 24.0,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="A kind of request, as 'weight=3 class=offline task=i2v frames=66 size=640x384 steps=2,2,2 via=jobs'; "
            "repeatable. What it leaves out comes from the flags above."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line, or a CSV with a prompt column, such as HeliosBench's.")
    ] = None,
    lengths_from_prompts: Annotated[
        bool, typer.Option("--lengths-from-prompts", help="Frames from the duration column of the CSV.")
    ] = False,
    image: Annotated[Path | None, typer.Option(help="For i2v; a drawn one when absent.")] = None,
    video: Annotated[Path | None, typer.Option(help="For v2v, MP4; a drawn one when absent.")] = None,
    model: Annotated[str | None, typer.Option(help="Name sent with each request.")] = None,
    extra: Annotated[
        list[str] | None,
        typer.Option(
            help="One more field of each request, as name=value; repeatable. For openai-videos a value may hold "
            "{num_frames}, {fps} and {seed}."
        ),
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            help="What makes a request a good one, repeatable: ttfs=2, gap=1.5, stall=0, stall_preroll=0, e2e=30 "
            "(seconds), rtf=1."
        ),
    ] = None,
    preroll: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds a player waits after the first segment; else as the server recommends."),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Find the highest load that meets the SLO, beginning with the one given.")
    ] = False,
    sweep_share: Annotated[float, typer.Option(min=0, max=1, help="Of requests that must be good.")] = 0.95,
    sweep_refine: Annotated[int, typer.Option(min=0, help="Halvings of the bracket at the end of the sweep.")] = 3,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for one request.")] = 3600.0,
    poll: Annotated[
        float, typer.Option(min=0.001, help="Seconds between two looks at a job: the grain of its end.")
    ] = 0.25,
    key_env: Annotated[str, typer.Option(help="Variable that holds the API key, if there is one.")] = "HELIOS_API_KEY",
    out: Annotated[Path, typer.Option("--out", "-o", help="Result; the plot lies beside it as .svg.")] = Path(
        "bench-serve.json"
    ),
) -> None:
    """Drive a server with load, and report what its clients see. Exits with 1 when no request succeeds."""
    from helios_serve.bench.campaign import Campaign, Search
    from helios_serve.bench.serve import ServeRun, run_serve
    from helios_serve.bench.sources import BUILT_IN_PROMPTS, read_prompts

    chosen_via = _via(api, service_class, via)
    default = Kind(
        service_class=usual_class(chosen_via) if service_class is None else service_class,
        via=chosen_via,
        task=task,
        num_frames=num_frames,
        size=size,
        steps=None if steps is None else parse_steps(steps),
        fps=fps,
    )
    kinds = tuple(parse_kind(text, default) for text in mix) if mix else (default,)
    loads = _loads(rate, burstiness, trace, trace_speed, concurrency)
    fields, wanted = _fields(extra or ()), parse_slo(slo or ())
    if lengths_from_prompts and prompts is None:
        raise InvalidRequestError("lengths-from-prompts: needs --prompts with a CSV", param="lengths-from-prompts")
    found = BUILT_IN_PROMPTS if prompts is None else tuple(read_prompts(prompts, lengths_from_prompts))
    asked = sorted(kinds_asked(kinds, found), key=lambda kind: kind.name)
    _check_target(api, url, grpc, asked, fields)
    _check_plan(loads, num_requests, duration, wanted, sweep)
    _check_slo(wanted, kinds)
    if out.suffix == ".svg":
        raise InvalidRequestError(f"out {out}: is the JSON; the plot lies beside it as .svg", param="out")
    campaign = Campaign(
        kinds=kinds,
        prompts=found,
        loads=loads,
        num_requests=32 if num_requests is None else num_requests,
        duration_s=duration,
        num_warmup=warmup,
        num_repeats=repeat,
        seed=seed,
        slo=wanted,
        search=Search(share=sweep_share, num_refinements=sweep_refine) if sweep else None,
    )
    run = ServeRun(
        url=url,
        grpc=grpc,
        api=api,
        model=model,
        extra=fields,
        image=image,
        video=video,
        timeout_s=timeout,
        poll_s=poll,
        preroll_s=preroll,
        key=os.environ.get(key_env),
        command=shlex.join(["helios-serve", *sys.argv[1:]]),
        out=out,
    )
    if not asyncio.run(run_serve(campaign, run)):
        raise typer.Exit(1)


def _via(api: Api, service_class: ServiceClass | None, via: Via | None) -> Via:
    if via is not None:
        return via
    return "jobs" if api == "openai-videos" else usual_via(service_class or "realtime")


def _loads(
    rate: str | None, burstiness: float, trace: Path | None, trace_speed: float, concurrency: str | None
) -> tuple[Load, ...]:
    """Exactly one of the three kinds of load; one request in flight when none is asked for."""
    from helios_serve.bench.sources import read_trace

    if sum(one is not None for one in (rate, trace, concurrency)) > 1:
        raise InvalidRequestError("rate, trace and concurrency exclude each other: give one of them", param="rate")
    if trace is not None:
        return (TraceLoad(times=read_trace(trace), speed=trace_speed),)
    if rate is not None:
        return tuple(OpenLoad(rate=value, burstiness=burstiness) for value in _numbers("rate", rate))
    levels = _numbers("concurrency", concurrency or "1")
    if not all(level.is_integer() for level in levels):
        raise InvalidRequestError(
            f"concurrency {concurrency}: must be whole numbers, such as 1,2,4", param="concurrency"
        )
    return tuple(ClosedLoad(concurrency=int(level)) for level in levels)


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequestError(f"{name} {text}: must be numbers, such as 1,2,4", param=name) from None


def _check_target(api: Api, url: str, grpc: str | None, asked: Sequence[Kind], fields: Mapping[str, str]) -> None:
    """Raises InvalidRequestError for what cannot be asked of such a server."""
    if "@" in url:
        raise InvalidRequestError("url: no user and password in it, as it is kept; use --key-env", param="url")
    if api == "openai-videos":
        from helios_serve.bench.openai_target import check_openai_kind

        for kind in asked:
            check_openai_kind(kind, fields)
    if (grpc is not None) != any(kind.via == "grpc" for kind in asked):
        raise InvalidRequestError("grpc: give --grpc and a kind of request via grpc, or neither", param="grpc")
    if grpc is not None and fields:
        raise InvalidRequestError("extra: not beside gRPC, whose requests have no other fields", param="extra")


def _check_plan(
    loads: Sequence[Load], num_requests: int | None, duration: float | None, slo: Slo | None, sweep: bool
) -> None:
    """Raises InvalidRequestError for flags of which one would do nothing."""
    if duration is not None and num_requests is not None:
        raise InvalidRequestError("duration: not beside --num-requests", param="duration")
    if duration is not None and isinstance(loads[0], ClosedLoad):
        raise InvalidRequestError("duration: needs --rate or --trace, as a closed loop has no times", param="duration")
    if sweep and slo is None:
        raise InvalidRequestError("sweep: needs an --slo to meet, such as --slo ttfs=2", param="sweep")
    if sweep and len(loads) > 1:
        raise InvalidRequestError("sweep: takes one load to begin with", param="sweep")


def _check_slo(slo: Slo | None, kinds: Sequence[Kind]) -> None:
    """Raises InvalidRequestError for an SLO that some kind of request would meet whatever happens."""
    if slo is not None and set(slo.limits) <= STREAM_ONLY and not all(kind.is_stream for kind in kinds):
        raise InvalidRequestError("slo: jobs need a limit that their client can see: e2e or rtf", param="slo")


def _fields(texts: Sequence[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidRequestError(f"extra {text!r}: must be name=value", param="extra")
        fields[name] = value
    return fields
