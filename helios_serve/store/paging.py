"""Pages of a tenant's rows, ordered by (created_at, id). Knows no table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import sqlalchemy as sa

from helios_serve.errors import NotFoundError

T = TypeVar("T")
Order = Literal["asc", "desc"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRequest:
    """after: the id that the page follows. limit: at least 1."""

    after: str | None = None
    limit: int = 20
    order: Order = "desc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    items: tuple[T, ...]
    has_more: bool


def read_page(
    connection: sa.Connection,
    query: sa.Select[Any],
    table: sa.Table,
    request: PageRequest,
    record: Callable[[sa.Row[Any]], T],
) -> Page[T]:
    """The rows of `query`, a selection from `table`, that `request` names.

    Raises: NotFoundError when `after` is no row of the query.
    """
    position = sa.tuple_(table.c.created_at, table.c.id)
    if request.after is not None:
        mark = connection.execute(query.where(table.c.id == request.after)).one_or_none()
        if mark is None:
            raise NotFoundError(f"after {request.after[:64]}: not found", param="after")
        found = sa.tuple_(sa.literal(mark.created_at, sa.Double), sa.literal(mark.id))
        query = query.where(position < found if request.order == "desc" else position > found)
    keys = (table.c.created_at, table.c.id)
    query = query.order_by(*(key.desc() if request.order == "desc" else key.asc() for key in keys))
    rows = connection.execute(query.limit(request.limit + 1)).all()
    return Page(items=tuple(record(row) for row in rows[: request.limit]), has_more=len(rows) > request.limit)
