"""Lines of the log as a collector and as a person read them, and what must never be in one."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from helios_serve.logs import (
    Access,
    bind_request_id,
    configure_logging,
    current_request_id,
    log_access,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Gives what was written to standard error; the logging of the tests comes back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield lambda: capsys.readouterr().err
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(written: Callable[[], str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written().splitlines()]


def test_a_record_is_one_object(written: Callable[[], str]) -> None:
    configure_logging("json")
    logging.getLogger("helios_serve.a").warning("disk at %d %%", 93)
    (line,) = lines(written)
    assert set(line) == {"time", "level", "logger", "message"}
    assert (line["level"], line["logger"], line["message"]) == ("warning", "helios_serve.a", "disk at 93 %")
    assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0)
    assert abs(datetime.fromisoformat(line["time"]).timestamp() - datetime.now().timestamp()) < 60


def test_a_record_carries_the_request_and_what_was_given_as_extra(written: Callable[[], str]) -> None:
    configure_logging("json")
    logger = logging.getLogger("helios_serve.a")
    with bind_request_id("req_1"):
        logger.info("begun", extra={"job_id": "video_1", "chunk": 3, "ratio": float("nan"), "why": None})
    logger.info("outside")
    first, second = lines(written)
    assert (first["request_id"], first["job_id"], first["chunk"]) == ("req_1", "video_1", 3)
    assert first["ratio"] == "nan"
    assert "why" not in first
    assert "request_id" not in second


def test_extra_cannot_replace_what_a_line_is_found_by(written: Callable[[], str]) -> None:
    configure_logging("json")
    with bind_request_id("req_1"):
        logging.getLogger("a").info("x", extra={"level": "none", "request_id": "other", "time": "never"})
    (line,) = lines(written)
    assert (line["level"], line["request_id"]) == ("info", "req_1")
    assert line["time"] != "never"


def test_ids_follow_tasks_and_threads_and_do_not_mix(written: Callable[[], str]) -> None:
    configure_logging("json")
    logger = logging.getLogger("a")

    async def serve(name: str) -> None:
        with bind_request_id(name):
            await asyncio.sleep(0)
            await asyncio.create_task(inner(name))
            await asyncio.to_thread(logger.info, name)

    async def inner(name: str) -> None:
        await asyncio.sleep(0)
        logger.info(name)

    async def all_of_them() -> None:
        await asyncio.gather(*(serve(f"req_{number}") for number in range(5)))

    asyncio.run(all_of_them())
    found = lines(written)
    assert len(found) == 10
    assert all(line["request_id"] == line["message"] for line in found)
    assert current_request_id() is None


def test_an_exception_is_one_string(written: Callable[[], str]) -> None:
    configure_logging("json")
    try:
        raise RuntimeError("no\nroom at https://h/v?token=abc")
    except RuntimeError:
        logging.getLogger("a").exception("failed")
    (line,) = lines(written)
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert "RuntimeError: no\nroom at https://h/v?token=[removed]" in line["exception"]


def test_a_request_is_one_line(written: Callable[[], str]) -> None:
    configure_logging("json", level=logging.DEBUG)
    access = Access(
        method="GET",
        path="/v1/videos/video_1",
        template="/v1/videos/{video_id}",
        status=200,
        seconds=0.0123456789,
        num_bytes=512,
        client="10.0.0.9",
    )
    with bind_request_id("req_1"):
        log_access(access)
        log_access(Access(method="GET", path="/live", template="/live", status=200, seconds=0.001, num_bytes=15))
    answered, probe = lines(written)
    assert answered["logger"] == "helios_serve.access"
    assert answered["message"] == "GET /v1/videos/video_1 200"
    assert answered["request_id"] == "req_1"
    assert (answered["status"], answered["num_bytes"], answered["duration_s"]) == (200, 512, 0.012346)
    assert (answered["template"], answered["client"]) == ("/v1/videos/{video_id}", "10.0.0.9")
    assert (answered["level"], probe["level"]) == ("info", "debug")
    assert "client" not in probe


def test_a_call_and_a_socket_are_lines_too(written: Callable[[], str]) -> None:
    configure_logging("json")
    path = "/helios.video.v1.VideoGenerationService/GetVideo"
    log_access(Access(method="GRPC", path=path, template=path, status="NOT_FOUND", seconds=0.5))
    log_access(Access(method="WEBSOCKET", path="/ws", template="/ws", status=1012, seconds=60.0, num_bytes=9))
    call, socket = lines(written)
    assert (call["message"], call["status"], call["duration_s"]) == (f"GRPC {path} NOT_FOUND", "NOT_FOUND", 0.5)
    assert "num_bytes" not in call
    assert (socket["message"], socket["status"], socket["num_bytes"]) == ("WEBSOCKET /ws 1012", 1012, 9)
