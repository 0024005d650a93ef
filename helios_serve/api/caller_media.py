"""Reads the media that a caller's requests name: its own uploads, its own videos, and addresses where they are allowed.

Requests are parsed in threads while uploads and videos are read on the event loop: this passes from one to the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from helios_serve.api.auth import Caller
from helios_serve.api.files import FileService
from helios_serve.api.media_fetch import UrlReader
from helios_serve.api.media_input import DataUriSource, Media, MediaDecoder, check_media_bytes
from helios_serve.api.service import VideoService
from helios_serve.errors import HeliosError

PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _LoopReader:
    """A `MediaSource` whose bytes a coroutine of the event loop reads."""

    loop: asyncio.AbstractEventLoop
    fetch: Callable[[str, str, int], Coroutine[None, None, bytes]]

    def read(self, reference: str, param: str, max_bytes: int) -> bytes:
        waiting = asyncio.run_coroutine_threadsafe(self.fetch(reference, param, max_bytes), self.loop)
        try:
            return waiting.result(PATIENCE_S)
        except HeliosError as error:
            error.param = param
            raise
        finally:
            waiting.cancel()


class CallerMedia:
    """One for each server.

    Args:
        decoder_for: decodes in the name of a tenant.
        urls: None answers no address.
    """

    def __init__(
        self,
        service: VideoService,
        files: FileService,
        decoder_for: Callable[[str], MediaDecoder],
        urls: UrlReader | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._service = service
        self._files = files
        self._decoder_for = decoder_for
        self._source = DataUriSource(urls=urls)
        self._loop = loop

    def __call__(self, caller: Caller) -> Media:
        async def file(reference: str, param: str, max_bytes: int) -> bytes:
            data = await self._files.read(caller, reference)
            check_media_bytes(len(data), max_bytes, param)
            return data

        async def video(reference: str, param: str, max_bytes: int) -> bytes:
            found = await self._service.video(caller, reference)
            check_media_bytes(found.num_bytes, max_bytes, param)
            return b"".join([piece async for piece in self._service.read(found)])

        return Media(
            source=self._source,
            decoder=self._decoder_for(caller.tenant),
            files=_LoopReader(loop=self._loop, fetch=file),
            videos=_LoopReader(loop=self._loop, fetch=video),
        )
