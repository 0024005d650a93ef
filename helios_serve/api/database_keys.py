"""API keys that the job store holds, which all servers of one database know. Knows rows and how long they stay true;
compares no secret.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from helios_serve.api.keys import Key, key_from
from helios_serve.store.access import Access
from helios_serve.store.records import ApiKey

logger = logging.getLogger(__name__)

CACHE_S = 2.0
"""How long a row that was read is taken for true: a revoked key ends everywhere within this time."""

MAX_CACHED = 10_000


class DatabaseKeys:
    """The `KeySource` of one process. Ids without a key are remembered too, so that they cost what others cost.

    `clock` counts seconds and is not moved by the wall clock.
    """

    def __init__(self, rows: Access, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rows = rows
        self._clock = clock
        self._read: OrderedDict[str, tuple[float, Key | None]] = OrderedDict()  # id -> when, what; oldest first

    async def find(self, key_id: str) -> Key | None:
        """Raises StorageUnavailableError while the store does not answer and nothing young is remembered."""
        now = self._clock()
        found = self._read.get(key_id)
        if found is not None and now - found[0] < CACHE_S:
            return found[1]
        row = await self._rows.key(key_id)
        key = None if row is None else _valid(row)
        self._read[key_id] = now, key
        self._read.move_to_end(key_id)
        if len(self._read) > MAX_CACHED:
            self._read.popitem(last=False)
        return key


def key_of(row: ApiKey) -> Key:
    """A row as a key. Raises ValueError for one that this version cannot read."""
    return key_from(
        {
            "id": row.id,
            "name": row.name,
            "tenant": row.tenant,
            "secret_sha256": row.secret_sha256,
            "scopes": list(row.scopes),
            "limits": row.limits,
            "expires_at": row.expires_at,
            "created_at": row.created_at,
        }
    )


def _valid(row: ApiKey) -> Key | None:
    try:
        return key_of(row)
    except ValueError as error:
        logger.error("the database holds a key that cannot be used: %s", error)
        return None
