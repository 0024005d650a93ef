"""Requests that took their workers down with them: their content is refused for a while.

Knows content hashes and times; decides nothing about attempts.
"""

from __future__ import annotations

import hashlib

from helios_serve.errors import GenerationError
from helios_serve.types import VideoRequest


class PoisonList:
    """Content that is refused until `keep_s` after it was found to be poison."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._until: dict[bytes, float] = {}

    def add(self, request: VideoRequest, now: float) -> None:
        self._until[_content(request)] = now + self._keep_s

    def check(self, request: VideoRequest, now: float) -> None:
        """Raises GenerationError `request_poisoned` while the content of `request` is refused."""
        self._until = {digest: until for digest, until in self._until.items() if until > now}
        until = self._until.get(_content(request)) if self._until else None
        if until is not None:
            raise GenerationError(
                "a request with the same content ended two workers; it is refused for another "
                f"{until - now:.0f} s. Change the prompt or the media",
                code="request_poisoned",
            )


def _content(request: VideoRequest) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for change in request.prompts:
        digest.update(f"{change.chunk} {change.transition_chunks} {len(change.prompt)} {change.prompt}".encode())
    digest.update(request.negative_prompt.encode())
    for frames in (request.image, request.video):
        digest.update(b"" if frames is None else frames.data)
    return digest.digest()
