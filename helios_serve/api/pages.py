"""Pages of rows in requests and answers, and GET routes that answer HEAD. Knows no route and no row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter, FastAPI

from helios_serve.api.names import shown
from helios_serve.api.schemas import ErrorAnswer
from helios_serve.errors import InvalidRequestError
from helios_serve.store.paging import PageRequest

MAX_LIMIT = 100


def page_request(after: str | None, limit: int, order: str) -> PageRequest:
    """Raises InvalidRequestError when `limit` is not 1 to 100, or `order` not asc or desc."""
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidRequestError(f"limit {limit}: must be 1 to {MAX_LIMIT}", param="limit")
    if order == "asc":
        return PageRequest(after=after, limit=limit, order="asc")
    if order == "desc":
        return PageRequest(after=after, limit=limit, order="desc")
    raise InvalidRequestError(f"order {shown(order)}: must be asc or desc", param="order")


def add_get(
    router: APIRouter | FastAPI,
    path: str,
    endpoint: Callable[..., Any],
    answer: type[Any] | None,
    *error_statuses: int,
    others: Mapping[int, dict[str, Any]] = MappingProxyType({}),
) -> None:
    """A GET route that answers HEAD too, which the framework does not do by itself.

    Args:
        answer: None where it is not JSON.
        others: statuses that are neither the answer nor an error, as OpenAPI describes them.
    """
    responses = error_answers(*error_statuses) | dict(others)
    router.add_api_route(path, endpoint, methods=["GET"], response_model=answer, responses=responses)
    router.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: what every route with keys may refuse with, and these."""
    return {status: {"model": ErrorAnswer} for status in sorted({*statuses, 401, 403, 429})}
