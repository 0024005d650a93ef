"""`helios-serve bench serve` as it is typed, against a real server with the tiny checkpoint, and against none."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from helios_serve.bench.cli import bench_app
from helios_serve.cli import app
from helios_serve.errors import InvalidRequestError
from tests.acceptance.live_server import LiveServer, serving
from tests.bench.openai_fakes import FakeSglang, FakeVideos, FakeVllmOmni, serving_fake
from tests.bench.scripted_server import Script, ScriptedServer
from tests.bench.scripted_server import serving as scripted

LATE_MS = 3000
"""What a busy machine may add."""
SMALL = ("--num-frames", "50", "--size", "64x64", "--steps", "1,1,1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """A real server, and where it speaks gRPC."""

    http: LiveServer
    grpc: str


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(tmp_path_factory.mktemp("bench"), "--grpc-port", str(port)) as running:
        yield Both(http=running, grpc=f"grpc://127.0.0.1:{port}")


@pytest.fixture
def server(both: Both) -> LiveServer:
    return both.http


@pytest.fixture
def fake() -> Iterator[ScriptedServer]:
    with scripted() as running:
        yield running


def bench(url: str, out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The result and what was printed."""
    ran = CliRunner().invoke(bench_app, ["serve", "--url", url, "--out", str(out), *arguments], catch_exceptions=False)
    result: dict[str, Any] = json.loads(out.read_text())
    has_succeeded = any(summary["num_completed"] for point in result["points"] for summary in point["summaries"])
    assert ran.exit_code == (0 if has_succeeded else 1), ran.output
    return result, ran.stdout


def refused(url: str, *arguments: str) -> str:
    with pytest.raises(InvalidRequestError) as error:
        bench(url, Path("never.json"), *arguments)
    return error.value.message


def test_a_mix_of_all_ways_on_the_real_server(both: Both, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("id,prompt,duration\n1,a fox,50\n2,a red ball,34\n")
    result, printed = bench(
        both.http.url, tmp_path / "mixed.json", "--grpc", both.grpc, "--rate", "3", "--num-requests", "8",
        "--seed", "5", "--prompts", str(prompts), "--lengths-from-prompts", "--size", "64x64", "--steps", "1,1,1",
        "--mix", "task=t2v", "--mix", "via=raw task=i2v", "--mix", "class=offline task=v2v",
        "--mix", "via=grpc task=i2v", "--slo", "e2e=600", "--warmup", "0",
    )  # fmt: skip
    (point,) = result["points"]
    (summary,), (requests,) = point["summaries"], point["requests"]
    assert (summary["num_completed"], summary["errors"], summary["good_share"]) == (8, {}, 1.0)
    assert summary["goodput_per_s"] == summary["requests_per_s"] > 0
    ways = [seen["kind"].split()[-1] for seen in requests]
    assert {*ways} == {"sse", "raw", "grpc", "jobs"}
    for index, (via, seen) in enumerate(zip(ways, requests, strict=True)):
        # Frames are counted in the bytes, so this says that all of the video came.
        assert (seen["num_frames"], seen["num_chunks"]) == ((50, 34)[index % 2], 2)
        frames = [num_frames for _, num_frames, _ in seen["segments"]]
        assert frames == ([] if via == "jobs" else [33, (17, 1)[index % 2]])
        assert both.http.job(seen["video_id"])["helios"]["seed"] == seen["seed"]
        assert via == "raw" or seen["made_as"].startswith("64x64, ")
    (by_kind,) = point["by_kind"]
    assert {*by_kind} == {seen["kind"] for seen in requests}
    assert all(name in printed for name in by_kind)
    assert result["server"]["models"]["data"][0]["id"] == "helios-tiny"
    assert "good share" in printed
    ElementTree.parse(tmp_path / "mixed.svg")


def test_what_the_client_saw_agrees_with_what_the_server_says(server: LiveServer, tmp_path: Path) -> None:
    result, _ = bench(server.url, tmp_path / "one.json", *SMALL, "--num-requests", "3")
    for seen in result["points"][0]["requests"][0]:
        told = server.job(seen["video_id"])
        assert (told["status"], told["helios"]["seed"]) == ("completed", seen["seed"])
        assert told["helios"]["steps"] == [1, 1, 1]
        timing = told["helios"]["timing"]
        first_ms = 1000 * (seen["segments"][0][0] - seen["due_s"])
        assert timing["first_segment_ms"] - 5 <= first_ms < timing["first_segment_ms"] + LATE_MS
        assert timing["total_ms"] - 5 <= 1000 * (seen["ended_s"] - seen["due_s"]) < timing["total_ms"] + LATE_MS
        assert seen["server_timing_ms"]["total_ms"] == timing["total_ms"]


def test_the_real_server_as_any_server_of_openais_videos(server: LiveServer, tmp_path: Path) -> None:
    result, _ = bench(
        server.url + "/v1", tmp_path / "openai.json", "--api", "openai-videos", "--size", "64x64", "--num-frames", "48",
        "--extra", "helios={\"steps\": [1, 1, 1]}", "--mix", "task=i2v", "--num-requests", "2", "--concurrency", "2",
    )  # fmt: skip
    summary = result["points"][0]["summaries"][0]
    assert (summary["num_completed"], summary["time_to_first_segment_s"]) == (2, None)
    assert [seen["num_frames"] for seen in result["points"][0]["requests"][0]] == [48, 48]
    assert "End to end" in (tmp_path / "openai.svg").read_text()


def test_errors_of_the_real_server_are_counted_by_their_code(server: LiveServer, tmp_path: Path) -> None:
    result, printed = bench(
        server.url, tmp_path / "bad.json", "--size", "100x64", "--warmup", "0", "--num-requests", "2"
    )
    assert result["points"][0]["summaries"][0]["errors"] == {"invalid_value": 2}
    assert "multiples of 64" in printed


def test_errors_over_grpc_have_the_same_codes(both: Both, tmp_path: Path) -> None:
    result, printed = bench(
        both.http.url, tmp_path / "bad.json", "--grpc", both.grpc, "--via", "grpc", "--size", "100x64",
        "--warmup", "0", "--num-requests", "2",
    )  # fmt: skip
    assert result["points"][0]["summaries"][0]["errors"] == {"invalid_value": 2}
    assert "error invalid_value, 2 times: " in printed


@pytest.mark.parametrize("kind", [FakeVllmOmni, FakeSglang])
def test_other_servers_are_driven_with_the_fields_that_they_have(kind: type[FakeVideos], tmp_path: Path) -> None:
    with serving_fake(kind()) as fake:
        result, printed = bench(
            fake.url, tmp_path / "other.json", "--api", "openai-videos", "--num-requests", "2", "--size", "640x384",
            "--extra", "num_frames={num_frames}", "--extra", "fps={fps}", "--extra", "seed={seed}", "--poll", "0.02",
            "--extra", 'extra_params={"pyramid_num_inference_steps_list": [2, 2, 2]}', "--warmup", "0",
        )  # fmt: skip
    requests = result["points"][0]["requests"][0]
    assert [seen["num_frames"] for seen in requests] == [24, 24]  # of the file that came, not what was asked for
    for form, seen in zip(fake.received, requests, strict=True):
        assert (form["num_frames"], form["fps"], form["seed"]) == ("132", "24", str(seen["seed"]))
        assert form["extra_params"] == '{"pyramid_num_inference_steps_list": [2, 2, 2]}'
        assert "seconds" not in form
    assert result["points"][0]["summaries"][0]["server_timing_ms"]["inference_ms"]["p50"] == 150
    assert "server: model, ms" in printed


@pytest.mark.parametrize(("kind", "code"), [(FakeVllmOmni, "http_500"), (FakeSglang, "failed")])
def test_failures_of_other_servers_are_counted(kind: type[FakeVideos], code: str, tmp_path: Path) -> None:
    whole_seconds = ("--api", "openai-videos", "--num-frames", "48", "--num-requests", "1", "--warmup", "0")
    with serving_fake(kind(failing=True)) as fake:
        result, printed = bench(fake.url, tmp_path / "failed.json", *whole_seconds)
        assert fake.received[0]["seconds"] == "2"
    assert result["points"][0]["summaries"][0]["errors"] == {code: 1}
    assert "out of memory" in printed
    with serving_fake(kind(never_ends=True)) as fake:
        result, _ = bench(fake.url, tmp_path / "late.json", *whole_seconds, "--timeout", "0.5")
        assert fake.deleted == ["video_gen_1"]
    assert result["points"][0]["summaries"][0]["errors"] == {"timeout": 1}


def test_a_sweep_finds_the_load_that_a_server_bears(fake: ScriptedServer, tmp_path: Path) -> None:
    """The fake answers soon while at most 4 run, and a good deal later when more do. Soon is long enough that a late
    thread still meets the others."""
    fake.script, fake.busy_script, fake.num_free = Script(segments_s=(0.4,)), Script(segments_s=(2.0,)), 4
    result, printed = bench(
        fake.url, tmp_path / "sweep.json", "--concurrency", "1", "--num-requests", "8", "--warmup", "0",
        "--slo", "ttfs=1.5", "--sweep", "--sweep-share", "1",
    )  # fmt: skip
    assert result["search"] == {"highest": 4, "lowest_failing": 5}
    assert [point["load"]["level"] for point in result["points"]] == [1, 2, 4, 5, 6, 8]
    assert "up to 4 in flight, not at 5" in printed


def test_a_key_is_sent_and_kept_nowhere(fake: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_KEY", "hs_secret")
    _, printed = bench(fake.url, tmp_path / "keyed.json", "--key-env", "BENCH_KEY", "--num-requests", "1")
    assert {headers["authorization"] for headers in fake.headers} == {"Bearer hs_secret"}
    assert "hs_secret" not in (tmp_path / "keyed.json").read_text() + printed


def test_several_loads_and_repeats_make_a_table_each_and_one_picture(fake: ScriptedServer, tmp_path: Path) -> None:
    fake.script = Script(segments_s=(0.02, 0.04))
    result, printed = bench(
        fake.url, tmp_path / "rates.json", "--rate", "20,40", "--repeat", "3", "--num-requests", "4",
        "--slo", "ttfs=1", "--burstiness", "inf",
    )  # fmt: skip
    assert [point["load"]["label"] for point in result["points"]] == ["20 requests/s", "40 requests/s"]
    for point in result["points"]:
        rates = sorted(summary["requests_per_s"] for summary in point["summaries"])
        assert point["spread"]["requests_per_s"] == {"median": rates[1], "low": rates[0], "high": rates[2]}
    assert printed.count("12 of 12 completed") == 2
    picture = (tmp_path / "rates.svg").read_text()
    assert picture.count("<circle") == 2 * 6  # three percentiles; goodput, completed, offered


def test_what_cannot_be_measured_is_refused_before_anything_is_sent(fake: ScriptedServer, tmp_path: Path) -> None:
    url = fake.url
    assert "exclude each other" in refused(url, "--rate", "1", "--concurrency", "1")
    assert "needs an --slo" in refused(url, "--sweep")
    assert "whole numbers" in refused(url, "--concurrency", "1.5")
    assert "whole numbers" in refused(url, "--concurrency", "inf")
    assert "must be numbers" in refused(url, "--rate", "fast")
    assert "e2e or rtf" in refused(url, "--via", "jobs", "--slo", "ttfs=1")
    assert "only via jobs" in refused(url, "--api", "openai-videos", "--via", "sse")
    assert "only via jobs" in refused(url, "--api", "openai-videos", "--task", "v2v")
    assert "name=value" in refused(url, "--extra", "seed")
    assert "No such file" in refused(url, "--task", "i2v", "--image", str(tmp_path / "none.png"))
    assert "needs --prompts" in refused(url, "--lengths-from-prompts")
    assert "whole seconds" in refused(url, "--api", "openai-videos", "--num-frames", "132")
    assert "no field for them" in refused(url, "--api", "openai-videos", "--num-frames", "48", "--steps", "2")
    assert "or neither" in refused(url, "--via", "grpc")
    assert "or neither" in refused(url, "--grpc", "127.0.0.1:1")
    assert "grpc://host:port" in refused(url, "--via", "grpc", "--grpc", "http://127.0.0.1:1")
    assert "not beside gRPC" in refused(url, "--via", "grpc", "--grpc", "127.0.0.1:1", "--extra", "a=b")
    assert "not beside --num-requests" in refused(url, "--rate", "1", "--duration", "5", "--num-requests", "3")
    assert "has no times" in refused(url, "--duration", "5")
    assert "one load" in refused(url, "--rate", "1,2", "--slo", "ttfs=1", "--sweep")
    assert "is the JSON" in refused(url, "--out", "plot.svg")
    assert "--key-env" in refused("http://me:secret@127.0.0.1:1")
    assert fake.received == []
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert "nothing answers" in refused(nobody)
    assert "http://" in refused("127.0.0.1:8000")


def test_the_program_has_the_command() -> None:
    shown = CliRunner().invoke(app, ["bench", "--help"])
    assert shown.exit_code == 0
    assert "serve" in shown.stdout
