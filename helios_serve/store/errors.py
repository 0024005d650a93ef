"""What can go wrong with stores, and which error of the API it is. Knows drivers' and the system's errors by name."""

from __future__ import annotations

import errno
import sqlite3

import sqlalchemy as sa
from obstore.exceptions import BaseError as ObjectStoreError

from helios_serve.errors import CapacityError, ConflictError, GenerationError, HeliosError

FULL = (errno.ENOSPC, errno.EDQUOT)


class StorageUnavailableError(CapacityError):
    """The database or the blob store does not answer, or refuses to write (HTTP 503)."""

    code = "storage_unavailable"


class StorageFullError(HeliosError):
    """No space is left, or the bucket's quota is used up (HTTP 507)."""

    status, grpc_status, code, retryable = 507, "RESOURCE_EXHAUSTED", "storage_full", True


class DataLossError(GenerationError):
    """What the job needs is gone or damaged and cannot be made again (HTTP 500)."""

    code = "data_loss"


class IdempotencyKeyReusedError(HeliosError):
    """The idempotency key belongs to another request (HTTP 422)."""

    status, grpc_status, code, retryable = 422, "ALREADY_EXISTS", "idempotency_key_reused", False


class EventIdConflictError(ConflictError):
    """The event id belongs to another message of the same session."""

    code = "event_id_conflict"


class StoreStartError(HeliosError):
    """The stores cannot be used as configured; the message says what to do."""

    status, grpc_status, code, retryable = 500, "FAILED_PRECONDITION", "store_invalid", False


class BlobMissingError(Exception):
    """There is no intact blob of this key: never written, swept, or damaged and moved to quarantine."""

    def __init__(self, key: str, why: str = "not found") -> None:
        super().__init__(f"blob {key}: {why}")
        self.key = key


def storage_error(error: Exception) -> HeliosError | None:
    """The error to answer with for one of a driver, of obstore or of the system; None for those that are defects."""
    if isinstance(error, OSError):
        kind = StorageFullError if error.errno in FULL else StorageUnavailableError
        return kind(f"storage: {error.strerror or error}", retry_after_s=5.0)
    if isinstance(error, ObjectStoreError):
        full = any(f"os error {number}" in str(error) for number in FULL) or "QuotaExceeded" in str(error)
        return (StorageFullError if full else StorageUnavailableError)(f"blob store: {error}", retry_after_s=5.0)
    if isinstance(error, sa.exc.TimeoutError):
        return StorageUnavailableError("the database has no free connection", retry_after_s=5.0)
    if isinstance(error, sa.exc.DBAPIError) and not isinstance(error, sa.exc.IntegrityError | sa.exc.ProgrammingError):
        kind = StorageFullError if _is_full(error) else StorageUnavailableError
        return kind(f"database: {str(error.orig).strip()}", retry_after_s=5.0)
    return None


def sqlstate(error: Exception) -> str | None:
    """The five-character code of a Postgres error, None for any other."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) else None
    if cause is None or isinstance(cause, sqlite3.Error):
        return None
    state = cause.sqlstate  # type: ignore[attr-defined]  # psycopg.Error; psycopg may not be installed
    assert state is None or isinstance(state, str)
    return state


def _is_full(error: sa.exc.DBAPIError) -> bool:
    cause = error.orig
    if isinstance(cause, sqlite3.OperationalError):
        return cause.sqlite_errorname == "SQLITE_FULL"
    return sqlstate(error) == "53100"
