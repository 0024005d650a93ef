"""Reads media from addresses, for a server that lists the hosts it may ask.

Knows how a thread waits for the event loop and what each failure means to a client. Which addresses may be asked,
names, sockets, redirects and time are `outgoing`'s.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Protocol

from helios_serve.api.media_input import check_media_bytes
from helios_serve.api.outgoing import MAX_REDIRECTS, Outgoing, OutgoingError, OutgoingPolicy
from helios_serve.errors import InvalidRequestError

DEFAULT_PATIENCE_S = 30.0
"""Above the time that a fetch gives itself: it ends one that the loop has lost."""


class Fetcher(Protocol):
    """`outgoing.Outgoing`, as far as it is used here."""

    async def get(self, url: str, max_bytes: int, *, max_redirects: int) -> bytes:
        """The body behind an address. Raises OutgoingError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlReader:
    """Fetches https addresses: the `urls` of a `media_input.DataUriSource`.

    fetcher: runs on `loop`, while `read` blocks a thread of its caller; must allow listed hosts only. patience_s: until
    a fetch is given up.
    """

    fetcher: Fetcher
    loop: asyncio.AbstractEventLoop
    patience_s: float = DEFAULT_PATIENCE_S

    def read(self, reference: str, param: str, max_bytes: int) -> bytes:
        """The body behind an address; never called on the loop itself, which would wait for itself.

        Raises:
            InvalidRequestError: `media_url_forbidden` for what the server may not ask; `media_fetch_failed` when no
                whole body of at most `max_bytes` comes in time.
        """
        fetching = self.fetcher.get(reference, max_bytes, max_redirects=MAX_REDIRECTS)
        waiting = asyncio.run_coroutine_threadsafe(fetching, self.loop)
        try:
            data = waiting.result(self.patience_s)
        except OutgoingError as error:
            hint = "; media_url_hosts of this server lists the hosts" if error.reason == "forbidden" else ""
            raise InvalidRequestError(f"{param}: {error.message}{hint}", param=param, code=error.code) from error
        except (TimeoutError, CancelledError) as error:
            waiting.cancel()
            message = f"{param}: the address did not give the whole file in time"
            raise InvalidRequestError(message, param=param, code="media_fetch_failed") from error
        check_media_bytes(len(data), max_bytes, param)
        return data


def url_reader(hosts: frozenset[str], loop: asyncio.AbstractEventLoop) -> UrlReader | None:
    """What reads the addresses of `hosts`; None, which refuses every address, without any.

    Args:
        hosts: names in lower case, `.example.com` for all below example.com: the setting media_url_hosts.
        loop: of the server.
    """
    if not hosts:
        return None
    return UrlReader(fetcher=Outgoing(OutgoingPolicy(allowed_hosts=hosts)), loop=loop)
