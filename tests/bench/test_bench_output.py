"""What is printed, drawn and written: complete, readable, and the same numbers everywhere."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

from helios_serve.bench.arrivals import ClosedLoad, Load, OpenLoad
from helios_serve.bench.campaign import Campaign, Found, Point, Search
from helios_serve.bench.cli import bench_app
from helios_serve.bench.metrics import Slo, summarize
from helios_serve.bench.observed import Observed, SeenSegment
from helios_serve.bench.plot import load_plot
from helios_serve.bench.progress import ProgressView
from helios_serve.bench.result_file import json_text, result_of
from helios_serve.bench.tables import print_found, print_point
from helios_serve.bench.workload import Kind, Planned, Prompt
from helios_serve.errors import InvalidRequestError

STREAM, JOB = Kind(num_frames=24), Kind(service_class="offline", via="jobs", num_frames=24)
SLO = Slo(limits={"ttfs": 2.0, "e2e": 9.0})


def stream(first_s: float, **more: object) -> Observed:
    segment = SeenSegment(at_s=first_s, num_frames=24, num_bytes=10)
    fields: dict[str, object] = {"segments": (segment,), "num_frames": 24, "num_chunks": 1, **more}
    planned = Planned(index=0, kind=STREAM, prompt="un renard — 狐", seed=1)
    return Observed(planned=planned, due_s=0.0, sent_s=0.0, ended_s=first_s + 0.5, **fields)  # type: ignore[arg-type]


def point(load: Load, *runs: tuple[Observed, ...], cpu: float = 0.1) -> Point:
    summaries = tuple(summarize(run, SLO) for run in runs)
    return Point(load=load, runs=runs, summaries=summaries, client_cpu_shares=(cpu,) * len(runs))


def campaign(load: Load, search: Search | None = None) -> Campaign:
    return Campaign(
        kinds=(STREAM, JOB), prompts=(Prompt(text="a fox"),), loads=(load,), num_requests=1, num_warmup=0,
        num_repeats=1, seed=0, slo=SLO, search=search,
    )  # fmt: skip


def printed(one: Point, width: int = 120) -> str:
    out = io.StringIO()
    print_point(Console(file=out, width=width), campaign(one.load), one)
    return out.getvalue()


def test_a_table_has_median_and_range_of_the_repeats() -> None:
    text = printed(point(ClosedLoad(concurrency=1), (stream(1.0),), (stream(1.25),), (stream(3.0),)))
    row = next(line for line in text.splitlines() if "time to first segment" in line)
    assert row.split()[-5:] == ["1.25±1.8"] * 5
    assert "1 in flight: 3 of 3 completed" in text
    assert "…" not in text


def test_a_mix_has_a_row_for_each_kind() -> None:
    job = replace(stream(1.0), planned=Planned(index=1, kind=JOB, prompt="x", seed=2), segments=(), ended_s=4.0)
    text = printed(point(OpenLoad(rate=1), (stream(1.0), stream(2.5), job)))
    rows = [line.split() for line in text.splitlines() if line.strip().startswith(("realtime t2v", "offline t2v"))]
    assert rows == [
        ["realtime", "t2v", "24f", "sse", "2/2", "1.75", "2.48", "2.25", "2.98", "1", "0.5"],
        ["offline", "t2v", "24f", "jobs", "1/1", "4", "4", "1"],
    ]


def test_errors_and_warnings_are_told_once_with_their_number() -> None:
    busy = [stream(1.0, error="quota_exceeded", status=429, message=f"at most {limit}") for limit in (4, 5)]
    warned = [stream(1.0, warnings=(f"would use {share} of 0.85 groups",)) for share in (0.9, 1.25, 7)]
    text = printed(point(OpenLoad(rate=1), (*busy, *warned), cpu=0.95))
    assert "error quota_exceeded, 2 times: at most 4" in text
    assert "the server warns, 3 times: would use 0.9 of 0.85 groups" in text
    assert "this client used 95% of a core" in text
    assert text.count("groups") == 1


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Found(highest=None, lowest_failing=1.0), "no load was met at which 95%"),
        (Found(highest=8.0, lowest_failing=None), "95% of the requests meet the SLO at 8 requests/s and at all"),
        (Found(highest=2.0, lowest_failing=2.5), "up to 2 requests/s, not at 2.5"),
    ],
)
def test_the_end_of_a_search_is_said_in_words(found: Found, text: str) -> None:
    out = io.StringIO()
    load = OpenLoad(rate=1)
    print_found(Console(file=out, width=200), campaign(load, Search(share=0.95, num_refinements=1)), found)
    assert text in out.getvalue()


def test_json_is_one_line_a_request_and_says_what_python_says() -> None:
    load = OpenLoad(rate=0.1 + 0.2, burstiness=math.inf)
    result = result_of(
        campaign(load), [point(load, (stream(1 / 3), stream(2.0)))], None, {"command": "x", "server": {}}
    )
    text = json_text(result)
    read = json.loads(text)
    assert read["points"][0]["load"] == {"rate": 0.3, "burstiness": "inf", "label": "0.3 requests/s", "level": 0.3}
    assert read["points"][0]["requests"][0][0]["segments"] == [[0.333333, 24, 10]]
    assert sum("un renard — 狐" in line for line in text.splitlines()) == 2
    again = json.loads(json.dumps(result), parse_float=lambda number: round(float(number), 6))
    assert read == again


def drawing(load: Load, levels: list[Load], search: Found | None = None) -> ElementTree.Element:
    points = [point(one, (stream(1.0 + index),), (stream(1.5 + index),)) for index, one in enumerate(levels)]
    about = {"server": {"models": {"data": [{"id": "helios-<tiny>"}]}}}
    return ElementTree.fromstring(load_plot(result_of(campaign(load), points, search, about)))


def test_the_plot_has_every_load_its_ranges_and_the_limit() -> None:
    load = OpenLoad(rate=1)
    root = drawing(load, [OpenLoad(rate=rate) for rate in (1, 2, 4)], Found(highest=2.0, lowest_failing=4.0))
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"helios-<tiny>: realtime t2v 24f sse", "offered load [requests/s]", "SLO 2", "SLO holds up to 2"} <= {
        *texts
    }
    circles = [*root.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(circles) == 3 * 6
    title = circles[0].find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert title.text == "p50 at 1: 1.25 (1 to 1.5)"
    for circle in circles:
        assert 0 <= float(circle.get("cx", "")) <= 760
        assert 0 <= float(circle.get("cy", "")) <= 640


def test_a_single_closed_load_makes_a_plot_too() -> None:
    root = drawing(ClosedLoad(concurrency=3), [ClosedLoad(concurrency=3)])
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "requests in flight" in texts
    assert "offered" not in texts


def test_progress_counts_what_it_is_told() -> None:
    view = ProgressView(console=Console(file=io.StringIO()))
    view.begin("2 requests/s", 4)
    for _ in range(3):
        view.sent()
    view.segment(33)
    view.ended(stream(1.25))
    view.ended(stream(9.0, error="cut", segments=()))
    assert re.fullmatch(
        r"2 requests/s  2/4 done, 1 running  1 segments, [\d.]+ fps  first segment p50 1.25 s  cut 1  0 s", view.line()
    )


def test_results_are_put_side_by_side(tmp_path: Path) -> None:
    paths = []
    for name, first_s in (("ours", 1.0), ("theirs", 2.0)):
        load = ClosedLoad(concurrency=2)
        failed = stream(first_s, error="cut", message="x")
        result = result_of(campaign(load), [point(load, (stream(first_s), failed))], None, {})
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json_text(result))
    shown = CliRunner().invoke(bench_app, ["compare", *map(str, paths)], catch_exceptions=False).stdout
    rows = [line.split() for line in shown.splitlines() if "in flight" in line]
    assert [row[0] for row in rows] == ["ours", "theirs"]
    assert rows[0][1:] == ["2", "in", "flight", "1/2", "0.667", "16", "1", "1", "1.5", "1.5", "1", "0.5"]
    page = CliRunner().invoke(bench_app, ["compare", "--markdown", *map(str, paths)], catch_exceptions=False).stdout
    lines = page.splitlines()
    assert lines[1] == "| --- " * 11 + "|"
    assert lines[3] == "| theirs | 2 in flight | 1/2 | 0.4 | 9.6 | 2 | 2 | 2.5 | 2.5 | 1 | 0.5 |"
    for text in ("no json", '{"format": 0}', "[]"):
        paths[0].write_text(text)
        with pytest.raises(InvalidRequestError, match="results"):
            CliRunner().invoke(bench_app, ["compare", str(paths[0])], catch_exceptions=False)
