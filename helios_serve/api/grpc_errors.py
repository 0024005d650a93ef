"""How errors are told over gRPC: the status, the details of google.rpc, and when to come back. Knows no call."""

from __future__ import annotations

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from helios_serve.api.middleware import MAX_RETRY_AFTER_S, RETRY_AFTER_S
from helios_serve.errors import HeliosError

DETAILS = "grpc-status-details-bin"
RETRY_AFTER_MS = "retry-after-ms"
DOMAIN = "helios.video.v1"
MAX_TEXT_BYTES = 1000
"""Of an error's message in UTF-8. Trailers hold it three times, once with up to three bytes for each and twice with
four for three; clients refuse some calls, at random, from 8 KiB of trailers on, and lose the status then."""

MAX_FIELD_BYTES = 200


def status_code(error: HeliosError) -> grpc.StatusCode:
    """The status that a call ends with."""
    return grpc.StatusCode[error.grpc_status]


def status_message(error: HeliosError) -> str:
    """The error's message as it fits into trailers."""
    return _cut(error.message, MAX_TEXT_BYTES)


def trailers(error: HeliosError) -> tuple[tuple[str, str | bytes], ...]:
    """google.rpc.Status with its details; where a retry can help, the milliseconds to wait as plain text too."""
    delay_s = _delay_s(error)
    details: list[Message] = [ErrorInfo(reason=error.code, domain=DOMAIN)]
    if error.param is not None:
        violation = BadRequest.FieldViolation(
            field=_cut(error.param, MAX_FIELD_BYTES), description=status_message(error)
        )
        details.append(BadRequest(field_violations=[violation]))
    if delay_s is not None:
        wait = Duration()
        wait.FromMilliseconds(round(1000 * delay_s))
        details.append(RetryInfo(retry_delay=wait))
    status = Status(code=_number(error), message=status_message(error))
    for detail in details:
        status.details.add().Pack(detail)
    told: tuple[tuple[str, str | bytes], ...] = ((DETAILS, status.SerializeToString()),)
    return told if delay_s is None else (*told, (RETRY_AFTER_MS, str(round(1000 * delay_s))))


def _cut(text: str, num_bytes: int) -> str:
    """As many whole characters as fit."""
    return text.encode("utf-8", "replace")[:num_bytes].decode("utf-8", "ignore")


def _delay_s(error: HeliosError) -> float | None:
    if not error.retryable:
        return None
    return RETRY_AFTER_S if error.retry_after_s is None else min(MAX_RETRY_AFTER_S, error.retry_after_s)


def _number(error: HeliosError) -> int:
    number: int = status_code(error).value[0]
    return number
