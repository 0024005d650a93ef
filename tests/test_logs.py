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
from hypothesis import given
from hypothesis import strategies as st

from helios_serve.api.signed_urls import without_token
from helios_serve.logs import (
    Access,
    bind_request_id,
    configure_logging,
    current_request_id,
    formatter,
    log_access,
    without_secrets,
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


@given(st.text(), st.text(min_size=1))
def test_any_text_comes_back_and_looks_like_no_other_record(text: str, request_id: str) -> None:
    record = logging.makeLogRecord({"msg": "%s", "args": (text,), "levelname": "INFO", "name": "a"})
    with bind_request_id(request_id):
        as_json = formatter("json", io.StringIO()).format(record)
        as_text = formatter("text", io.StringIO()).format(record)
    assert len(as_json.splitlines()) == 1
    assert all(line.startswith("    ") for line in as_text.splitlines()[1:])
    assert len(as_text.splitlines()) == without_secrets(text).count("\n") + 1
    assert json.loads(as_json)["request_id"] == request_id
    assert json.loads(as_json)["message"] == without_secrets(text)


def test_text_is_for_people(written: Callable[[], str]) -> None:
    configure_logging("text")
    with bind_request_id("req_1"):
        logging.getLogger("helios_serve.a").warning("slow", extra={"job_id": "video_1"})
    assert written().endswith(" WARNING helios_serve.a: slow [request req_1, job video_1]\n")


def test_text_on_a_terminal_and_json_elsewhere() -> None:
    record = logging.makeLogRecord({"msg": "x"})
    assert formatter(None, io.StringIO()).format(record).startswith("{")
    assert not formatter(None, Terminal()).format(record).startswith("{")
    assert formatter("json", Terminal()).format(record).startswith("{")


def test_setting_up_twice_writes_once(written: Callable[[], str]) -> None:
    configure_logging("json")
    configure_logging("json")
    logging.getLogger("a").info("x")
    logging.getLogger("a").debug("y")
    assert len(lines(written)) == 1


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("GET /v1/videos/v/content?token=eyJ.a-b_c.d HTTP", "GET /v1/videos/v/content?token=[removed] HTTP"),
        ("x?a=1&token=abc&b=2", "x?a=1&token=[removed]&b=2"),
        ("key hs_1a2b_AbCd-efgh_1234 used", "key hs_1a2b_[removed] used"),
        ("Authorization: Bearer hs_1a2b_AbCdefgh1234", "Authorization: Bearer hs_1a2b_[removed]"),
        ("Authorization: bearer eyJhbGciOi.J9.x", "Authorization: bearer [removed]"),
        ("secret whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "secret whsec_[removed]"),
        ("postgresql://me:p4ss@db:5432/x", "postgresql://me:[removed]@db:5432/x"),
        ("postgresql://me:p@ss@db/x", "postgresql://me:[removed]@db/x"),
        ("postgresql://db/x?user=me&password=p4ss&a=1", "postgresql://db/x?user=me&password=[removed]&a=1"),
        ("http://127.0.0.1:8000/v1/videos", "http://127.0.0.1:8000/v1/videos"),
        ("the bearer of news", "the bearer of news"),
    ],
)
def test_secrets_are_removed(text: str, clean: str) -> None:
    assert without_secrets(text) == clean
    assert without_secrets(clean) == clean


@given(st.text(alphabet="?&token=ab \"'#c", max_size=60))
def test_tokens_in_addresses_are_removed_as_where_they_are_made(text: str) -> None:
    assert without_secrets(text) == without_token(text)


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
