"""Uploaded files: kept for a day, for their owner only, named by `file_id` in requests. Knows the store; knows no HTTP,
and of a file only what its first bytes tell.
"""

from __future__ import annotations

import secrets

from helios_serve.api.auth import Caller
from helios_serve.api.limits import Limiter, Usage, check_usage
from helios_serve.api.media_input import MAX_IMAGE_BYTES, MAX_VIDEO_BYTES, check_media_bytes
from helios_serve.api.names import shown
from helios_serve.errors import InvalidRequestError
from helios_serve.store.access import Access
from helios_serve.store.blobs import BlobStore
from helios_serve.store.jobs import JobStore
from helios_serve.store.paging import Page, PageRequest
from helios_serve.store.records import StoredFile

FILE_TTL_S = 86_400
MIN_TTL_S = 3600
MAX_NAME_CHARS = 255
PURPOSES = ("vision", "user_data")
IMAGE_TYPES = frozenset({"image/png", "image/jpeg", "image/webp"})

_PICTURE_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")
_QUICKTIME = b"qt  "
_EBML = b"\x1a\x45\xdf\xa3"
_EBML_HEAD_BYTES = 64
"""The first element of a WebM file has about 40 bytes and names the type of the document."""


class FileService:
    """One for each process. A file that is not the caller's tenant's, or past its time, is not found."""

    def __init__(self, access: Access, blobs: BlobStore, jobs: JobStore, limiter: Limiter) -> None:
        self._access = access
        self._blobs = blobs
        self._jobs = jobs
        self._limiter = limiter

    async def create(
        self, caller: Caller, data: bytes, *, filename: str, purpose: str, ttl_s: int = FILE_TTL_S
    ) -> StoredFile:
        """Keeps an image or a video for `ttl_s` seconds.

        Raises:
            InvalidRequestError: neither PNG, JPEG, WebP, MP4 nor WebM, too large, or an unknown purpose.
            LimitError, RateLimitError, BodyTooLargeError: more than the caller may store, or send in an hour.
            StorageFullError, StorageUnavailableError: nothing is kept.
        """
        if purpose not in PURPOSES:
            raise InvalidRequestError(f"purpose {shown(purpose)}: must be {' or '.join(PURPOSES)}", param="purpose")
        if not MIN_TTL_S <= ttl_s <= FILE_TTL_S:
            message = f"expires_after {ttl_s}: {MIN_TTL_S} to {FILE_TTL_S} seconds"
            raise InvalidRequestError(message, param="expires_after")
        content_type = media_type_of(data)
        if content_type is None:
            raise InvalidRequestError(
                "file: begins like no PNG, JPEG, WebP, MP4 or WebM file", param="file", code="media_invalid"
            )
        check_media_bytes(len(data), MAX_IMAGE_BYTES if content_type in IMAGE_TYPES else MAX_VIDEO_BYTES, "file")
        stored_bytes = await self._jobs.bytes_stored(caller.tenant)
        check_usage(caller, Usage(num_queued_jobs=0, stored_bytes=stored_bytes))
        self._limiter.admit_media(caller, len(data))
        blob = await self._blobs.put(data)
        new = {
            "id": f"file-{secrets.token_hex(12)}",
            "tenant": caller.tenant,
            "filename": plain_name(filename),
            "purpose": purpose,
            "content_type": content_type,
            "num_bytes": blob.num_bytes,
            "blob": blob.key,
        }
        return await self._access.add_file(new, ttl_s=float(ttl_s))

    async def get(self, caller: Caller, file_id: str) -> StoredFile:
        """Raises NotFoundError `file_not_found`."""
        return await self._access.file(caller.tenant, file_id)

    async def list(self, caller: Caller, page: PageRequest) -> Page[StoredFile]:
        """The tenant's files. Raises NotFoundError when `page.after` is none of them."""
        return await self._access.files(caller.tenant, page)

    async def delete(self, caller: Caller, file_id: str) -> None:
        """Forgets the file; jobs that were made with it keep what they need. Raises NotFoundError."""
        await self._access.delete_file(caller.tenant, file_id)

    async def read(self, caller: Caller, file_id: str) -> bytes:
        """The content. Raises: NotFoundError; BlobMissingError, StorageUnavailableError."""
        found = await self._access.file(caller.tenant, file_id)
        return await self._blobs.get(found.blob)


def media_type_of(data: bytes) -> str | None:
    """The media type by the first bytes, whatever a file is called; None for what is not taken."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp" and data[8:12] not in (*_PICTURE_BRANDS, _QUICKTIME):
        return "video/mp4"
    if data.startswith(_EBML) and b"webm" in data[:_EBML_HEAD_BYTES]:
        return "video/webm"
    return None


def plain_name(filename: str) -> str:
    """A file's name as it is shown: without folders and control characters, at most `MAX_NAME_CHARS`."""
    last = filename.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(letter for letter in last if letter.isprintable())[:MAX_NAME_CHARS] or "file"
