"""A benchmark as a file: everything that was seen, what it comes to, and what it depends on.

Knows JSON; measures nothing and prints nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2

from helios_serve import __version__
from helios_serve.bench.campaign import Campaign, Found, Point, level_of, spread
from helios_serve.bench.metrics import by_kind, flat
from helios_serve.bench.observed import Observed
from helios_serve.errors import InvalidRequestError

FORMAT = 1
_OPEN_DEPTH = 5
"""Down to one line for each request, and for each distribution of a summary."""


async def describe_server(client: httpx2.AsyncClient) -> dict[str, Any]:
    """What the server says of itself; null for what it does not answer."""
    return {"version": await _asked(client, "/version"), "models": await _asked(client, "/v1/models")}


async def _asked(client: httpx2.AsyncClient, path: str) -> Any:
    try:
        answer = await client.get(path)
        return answer.json() if answer.status_code == 200 else None
    except (httpx2.HTTPError, ValueError):
        return None


def describe_client() -> dict[str, Any]:
    return {
        "helios_serve": __version__,
        "python": platform.python_version(),
        "httpx2": httpx2.__version__,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }


def result_of(
    campaign: Campaign, points: Sequence[Point], found: Found | None, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The result as JSON takes it; `about` is put in front: command, server, client."""
    return {
        "format": FORMAT,
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **about,
        "campaign": _settings(campaign),
        "points": [_point(campaign, point) for point in points],
        "search": None if found is None else dataclasses.asdict(found),
    }


def json_text(value: Any) -> str:
    """JSON whose outer levels have a line for each entry, and whose numbers are rounded to a millionth."""
    return _json(value, _OPEN_DEPTH, "") + "\n"


def write_text(path: Path, text: str) -> None:
    """Raises: InvalidRequestError when the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"out {path}: {error.strerror}", param="out") from error


def _settings(campaign: Campaign) -> dict[str, Any]:
    settings = dataclasses.asdict(campaign)
    del settings["loads"]
    prompts = settings.pop("prompts")
    return {**settings, "num_prompts": len(prompts)}


def _point(campaign: Campaign, point: Point) -> dict[str, Any]:
    summaries = [dataclasses.asdict(summary) for summary in point.summaries]
    load = {**dataclasses.asdict(point.load), "label": point.load.label, "level": level_of(point.load)}
    if load.get("burstiness") == float("inf"):
        load["burstiness"] = "inf"
    kinds = [by_kind(run, campaign.slo) for run in point.runs]
    return {
        "load": load,
        "summaries": summaries,
        "by_kind": [{name: dataclasses.asdict(summary) for name, summary in one.items()} for one in kinds],
        "spread": spread([flat(summary) for summary in summaries]),
        "client_cpu_shares": list(point.client_cpu_shares),
        "requests": [[_request(seen) for seen in run] for run in point.runs],
    }


def _request(seen: Observed) -> dict[str, Any]:
    """A request with the name of its kind, and its segments as [seconds, frames, bytes]."""
    row = dataclasses.asdict(seen)
    planned = row.pop("planned")
    row["segments"] = [[one.at_s, one.num_frames, one.num_bytes] for one in seen.segments]
    return {**planned, "kind": seen.planned.kind.name, **row}


def _json(value: Any, depth: int, indent: str) -> str:
    if depth == 0 or not value or not isinstance(value, dict | list | tuple):
        return json.dumps(_rounded(value), allow_nan=False, ensure_ascii=False)
    inner = indent + " "
    if isinstance(value, dict):
        rows = [f"{json.dumps(key)}: {_json(one, depth - 1, inner)}" for key, one in value.items()]
        opening, closing = "{}"
    else:
        rows = [_json(one, depth - 1, inner) for one in value]
        opening, closing = "[]"
    return opening + "\n" + ",\n".join(inner + row for row in rows) + "\n" + indent + closing


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
