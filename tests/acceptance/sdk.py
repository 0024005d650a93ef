"""Clients of the OpenAI SDK whose traffic a test can see, and lose."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx2
from openai import OpenAI

from tests.acceptance.live_server import LiveServer


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One request and its answer. `sent_s`: of the monotonic clock."""

    sent_s: float
    method: str
    path: str
    retry_count: str | None
    status: int
    headers: httpx2.Headers


@dataclass
class Wire(httpx2.BaseTransport):
    """Passes requests on and writes them down. The answers to the next `num_lost` POSTs never reach the client."""

    num_lost: int = 0
    exchanges: list[Exchange] = field(default_factory=list)
    _inner: httpx2.HTTPTransport = field(default_factory=httpx2.HTTPTransport)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        sent_s = time.monotonic()
        answer = self._inner.handle_request(request)
        self.exchanges.append(
            Exchange(
                sent_s=sent_s,
                method=request.method,
                path=request.url.path,
                retry_count=request.headers.get("x-stainless-retry-count"),
                status=answer.status_code,
                headers=answer.headers,
            )
        )
        if request.method == "POST" and self.num_lost > 0:
            self.num_lost -= 1
            answer.read()
            raise httpx2.ReadError("the connection was lost", request=request)
        return answer

    def close(self) -> None:
        self._inner.close()

    def of(self, method: str, path: str) -> list[Exchange]:
        return [each for each in self.exchanges if (each.method, each.path) == (method, path)]


@contextmanager
def sdk_on(wire: Wire, server: LiveServer) -> Iterator[OpenAI]:
    """A client as its users make it, but for the transport."""
    with (
        httpx2.Client(transport=wire, timeout=120) as http,
        OpenAI(base_url=f"{server.url}/v1", api_key=server.key or "unused", http_client=http) as client,
    ):
        yield client
