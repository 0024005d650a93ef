"""One call of `helios-serve bench serve`: connections, the target, and where the result goes.

Knows how the parts of a benchmark are put together; knows no flags.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2
from rich.console import Console

from helios_serve.bench.campaign import Campaign, Found, Point, level_of, run_campaign
from helios_serve.bench.helios_target import HeliosTarget
from helios_serve.bench.load import Caller
from helios_serve.bench.openai_target import OpenAIVideosTarget
from helios_serve.bench.plot import load_plot
from helios_serve.bench.progress import ProgressView
from helios_serve.bench.result_file import describe_client, describe_server, json_text, result_of, write_text
from helios_serve.bench.sources import built_in_image, built_in_video, read_media
from helios_serve.bench.tables import print_found, print_point, wide_console
from helios_serve.bench.targets import Target, TargetByVia
from helios_serve.errors import InvalidRequestError

_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRun:
    """Which server, how it is talked to, and where the result goes. `key` is sent as bearer token and never kept."""

    url: str
    grpc: str | None
    api: Literal["helios", "openai-videos"]
    model: str | None
    extra: Mapping[str, str]
    image: Path | None
    video: Path | None
    timeout_s: float
    poll_s: float
    preroll_s: float | None
    key: str | None
    command: str
    out: Path


async def run_serve(campaign: Campaign, run: ServeRun) -> bool:
    """Measures, prints tables to stdout, and writes the result and its plot; when it is interrupted, of the loads that
    were done. Returns whether any request has succeeded.

    Raises: InvalidRequestError when nothing answers at the address, or the result cannot be written.
    """
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs each request
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(_client(run))
        target = await _target(campaign, run, client, stack)
        await _check_reachable(client, run.url)
        about = _about(run, await describe_server(client))
        caller = Caller(target=target, timeout_s=run.timeout_s, preroll_s=run.preroll_s)
        points: list[Point] = []
        found = None
        try:
            with ProgressView(console=Console(stderr=True)) as view:
                found = await run_campaign(campaign, caller, view, points)
        finally:
            if points:
                _report(run, campaign, sorted(points, key=lambda point: level_of(point.load)), found, about)
        return any(summary.num_completed for point in points for summary in point.summaries)


def _client(run: ServeRun) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        base_url=run.url.rstrip("/").removesuffix("/v1"),
        headers={} if run.key is None else {"authorization": f"Bearer {run.key}"},
        timeout=httpx2.Timeout(run.timeout_s, connect=_CONNECT_S),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        follow_redirects=True,
        trust_env=False,  # a proxy would be measured, too
    )


async def _target(campaign: Campaign, run: ServeRun, client: httpx2.AsyncClient, stack: AsyncExitStack) -> Target:
    tasks = {kind.task for kind in campaign.kinds}
    image = read_media(run.image, built_in_image() if "i2v" in tasks else b"", "image")
    if run.api == "openai-videos":
        return OpenAIVideosTarget(client=client, poll_s=run.poll_s, image=image, model=run.model, extra=run.extra)
    video = read_media(run.video, built_in_video() if "v2v" in tasks else b"", "video")
    extra = {name: _json_or_text(value) for name, value in run.extra.items()}
    over_http = HeliosTarget(client=client, poll_s=run.poll_s, image=image, video=video, model=run.model, extra=extra)
    if run.grpc is None:
        return over_http
    from helios_serve.bench.grpc_target import GrpcTarget, parse_grpc_url

    channels = await stack.enter_async_context(aclosing(parse_grpc_url(run.grpc)))
    over_grpc = GrpcTarget(channels=channels, image=image, video=video, model=run.model, key=run.key)
    return TargetByVia(targets={"sse": over_http, "raw": over_http, "jobs": over_http, "grpc": over_grpc})


def _json_or_text(text: str) -> object:
    """`5` is a number and `null` is nothing, as in JSON; what is no JSON is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


async def _check_reachable(client: httpx2.AsyncClient, url: str) -> None:
    """Any answer will do."""
    try:
        await client.get("/v1/models")
    except httpx2.UnsupportedProtocol as error:
        raise InvalidRequestError(f"url {url}: must begin with http:// or https://", param="url") from error
    except httpx2.HTTPError as error:
        raise InvalidRequestError(f"url {url}: nothing answers there ({error})", param="url") from error


def _about(run: ServeRun, server: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "command": run.command,
        "api": run.api,
        "url": run.url,
        "grpc": run.grpc,
        "poll_s": run.poll_s,
        "preroll_s": run.preroll_s,
        "timeout_s": run.timeout_s,
        "extra": dict(run.extra),
        "server": server,
        "client": describe_client(),
    }


def _report(
    run: ServeRun, campaign: Campaign, points: Sequence[Point], found: Found | None, about: Mapping[str, Any]
) -> None:
    console = wide_console()
    for point in points:
        print_point(console, campaign, point)
    if found is not None:
        print_found(console, campaign, found)
    result = result_of(campaign, points, found, about)
    picture = run.out.with_suffix(".svg")
    write_text(run.out, json_text(result))
    write_text(picture, load_plot(result))
    console.print(f"wrote {run.out} and {picture}", highlight=False, soft_wrap=True)
