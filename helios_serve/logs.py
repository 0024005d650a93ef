"""Log records as lines: JSON for machines, text for people, each with the id of the request that it belongs to.

Knows records and what must never be in a log; knows no HTTP framework and not who logs.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TextIO

LogFormat = Literal["json", "text"]

_request_id: ContextVar[str | None] = ContextVar("helios_request_id", default=None)
_access = logging.getLogger("helios_serve.access")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
"""What every record has, or another formatter leaves in it; the rest was given as `extra`."""

PROBES = frozenset({"/live", "/ready", "/health", "/metrics"})
"""Routes that machines ask every few seconds: no line in the log, no span."""

_SECRETS = (
    # `token=` in an address, as `<video>` and `EventSource` send it.
    (re.compile(r"([?&]token=)[^&#\s\"']*"), r"\1[removed]"),
    (re.compile(r"\b(hs_[A-Za-z0-9]+_)[A-Za-z0-9_-]{8,}"), r"\1[removed]"),
    (re.compile(r"\b(whsec_)[A-Za-z0-9+/=_-]{8,}"), r"\1[removed]"),
    (re.compile(r"(?i)\b(bearer\s+)(?!hs_)[A-Za-z0-9._~+/=-]{8,}"), r"\1[removed]"),
    # The password of an address; the last @ before the path ends it.
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/:@\"'?#]*:)[^\s/\"'?#]*@"), r"\1[removed]@"),
    (re.compile(r"(?i)([?&](?:password|sslpassword|secret[a-z_]*|[a-z_]*secret)=)[^&#\s\"']*"), r"\1[removed]"),
)


def without_secrets(text: str) -> str:
    """Text without the tokens, API keys, webhook secrets and passwords of addresses in it."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


@contextmanager
def bind_request_id(request_id: str) -> Iterator[None]:
    """Records made inside, and in tasks and threads started inside, carry `request_id`."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def current_request_id() -> str | None:
    """The id that records made here carry."""
    return _request_id.get()


def configure_logging(log_format: LogFormat | None = None, *, level: int = logging.INFO) -> None:
    """One line per record on standard error, in place of what was set up before. None: text on a terminal, else
    JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(log_format, sys.stderr))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def formatter(log_format: LogFormat | None, stream: TextIO) -> logging.Formatter:
    """The formatter that `configure_logging` uses for a stream."""
    chosen = log_format or ("text" if stream.isatty() else "json")
    return JsonFormatter() if chosen == "json" else TextFormatter()


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """One answered request, one WebSocket from its opening to its end, or one gRPC call.

    method: of HTTP, or `WEBSOCKET` or `GRPC`. path: without the query; of gRPC `/service/method`. template: of the
    route. status: of HTTP, 499 when the client left before any answer; the code that closed a WebSocket, or the HTTP
    status that refused it; the name of gRPC's code. num_bytes: of the answer's body, or of all messages that were sent;
    None where nobody counts.
    """

    method: str
    path: str
    template: str
    status: int | str
    seconds: float
    num_bytes: int | None = None
    client: str | None = None


def log_access(access: Access) -> None:
    """One line for a request, when its answer is complete, or for a connection or call that ended. Probes and scrapes
    are told at level DEBUG."""
    level = logging.DEBUG if access.template in PROBES else logging.INFO
    _access.log(
        level,
        "%s %s %s",
        access.method,
        access.path,
        access.status,
        extra={
            "method": access.method,
            "path": access.path,
            "template": access.template,
            "status": access.status,
            "duration_s": round(access.seconds, 6),
            "num_bytes": access.num_bytes,
            "client": access.client,
        },
    )


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (RFC 3339, UTC), level, logger, message; request_id, what was given as `extra`
    (job_id, for one) and exception, where there is one. ASCII, so that nothing in it can break a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": without_secrets(record.getMessage()),
        }
        if (request_id := _request_id.get()) is not None:
            line["request_id"] = request_id
        for name, value in _extra(record).items():
            line.setdefault(name, value)
        if (trace := _trace(self, record)) is not None:
            line["exception"] = trace
        return json.dumps(line, allow_nan=False)


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, and in brackets the request and the job. Further lines of a message are indented; a
    traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        message = without_secrets(record.getMessage())
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {_indented(message)}"
        ids = {"request": _request_id.get(), "job": _extra(record).get("job_id")}
        known = [f"{name} {_one_line(str(value))}" for name, value in ids.items() if value is not None]
        if known:
            line += f" [{', '.join(known)}]"
        trace = _trace(self, record)
        return line if trace is None else f"{line}\n{trace}"


def _extra(record: logging.LogRecord) -> dict[str, object]:
    """What was given as `extra`, as JSON can hold it."""
    found: dict[str, object] = {}
    for name, value in vars(record).items():
        if name in _STANDARD or name.startswith("_") or value is None:
            continue
        is_plain = isinstance(value, bool | int) or (isinstance(value, float) and abs(value) < float("inf"))
        found[name] = value if is_plain else without_secrets(str(value))
    return found


def _trace(formats: logging.Formatter, record: logging.LogRecord) -> str | None:
    parts = []
    if record.exc_info and record.exc_info[0] is not None:
        parts.append(formats.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formats.formatStack(record.stack_info))
    return without_secrets("\n".join(parts)) if parts else None


def _indented(text: str) -> str:
    """Lines of a message, the first as it is: what a client sends cannot look like a record of its own."""
    return "\n    ".join(_one_line(line) for line in text.split("\n"))


def _one_line(text: str) -> str:
    """Control characters as escapes."""
    return "".join(each if each.isprintable() or each == "\t" else repr(each)[1:-1] for each in text)
