"""`/v1/files`: uploads that requests name by `file_id`. Translates to `FileService` and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from helios_serve.api.files import FILE_TTL_S, FileService
from helios_serve.api.forms import FORM_TYPE
from helios_serve.api.http_access import HttpAccess
from helios_serve.api.http_request import content_type_of
from helios_serve.api.names import shown
from helios_serve.api.pages import add_get, error_answers, page_request
from helios_serve.errors import InvalidRequestError, UnsupportedMediaTypeError
from helios_serve.store.records import StoredFile

FILES = "/v1/files"
_MAX_FIELDS = 8
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "PNG, JPEG, WebP, MP4 or WebM"},
        "purpose": {"type": "string", "enum": ["vision", "user_data"]},
        _ANCHOR: {"type": "string", "enum": ["created_at"]},
        _SECONDS: {"type": "integer", "minimum": 3600, "maximum": 86_400},
    },
}


class FileObject(BaseModel):
    """An uploaded file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"]


class FileList(BaseModel):
    """A page of files; ask for the next one with `after` = `last_id`."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """The file is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


def file_router(files: FileService, access: HttpAccess) -> APIRouter:
    """The routes; all of them want the scope generate."""
    routes = _Routes(files, access)
    router = APIRouter(tags=["files"])
    router.add_api_route(
        FILES,
        routes.create,
        methods=["POST"],
        summary="Upload a file",
        response_model=FileObject,
        responses=error_answers(400, 413, 415, 507),
        openapi_extra={"requestBody": {"required": True, "content": {FORM_TYPE: {"schema": _FORM_SCHEMA}}}},
    )
    add_get(router, FILES, routes.files, FileList, 400, 404)
    add_get(router, f"{FILES}/{{file_id}}", routes.file, FileObject, 404)
    router.add_api_route(
        f"{FILES}/{{file_id}}",
        routes.delete,
        methods=["DELETE"],
        response_model=FileDeleted,
        responses=error_answers(404),
    )
    return router


class _Routes:
    """One method per route."""

    def __init__(self, files: FileService, access: HttpAccess) -> None:
        self._files = files
        self._access = access

    async def create(self, request: Request) -> Response:
        caller = await self._access.caller(request, "generate")
        upload = await _read_upload(request)
        stored = await self._files.create(
            caller,
            upload.data,
            filename=upload.filename,
            purpose=_required(upload.fields, "purpose"),
            ttl_s=_ttl_s(upload.fields),
        )
        return JSONResponse(_file_object(stored).model_dump())

    async def files(self, request: Request, after: str | None = None, limit: int = 20, order: str = "desc") -> Response:
        caller = await self._access.caller(request, "generate")
        if "purpose" in request.query_params:
            message = "purpose: lists are not filtered by it; leave it out"
            raise InvalidRequestError(message, param="purpose", code="unsupported_parameter")
        page = await self._files.list(caller, page_request(after, limit, order))
        data = [_file_object(stored) for stored in page.items]
        answer = FileList(
            object="list",
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=page.has_more,
        )
        return JSONResponse(answer.model_dump())

    async def file(self, request: Request, file_id: str) -> Response:
        caller = await self._access.caller(request, "generate")
        return JSONResponse(_file_object(await self._files.get(caller, file_id)).model_dump())

    async def delete(self, request: Request, file_id: str) -> Response:
        caller = await self._access.caller(request, "generate")
        await self._files.delete(caller, file_id)
        return JSONResponse(FileDeleted(id=file_id, object="file", deleted=True).model_dump())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Upload:
    data: bytes
    filename: str
    fields: dict[str, str]


async def _read_upload(request: Request) -> _Upload:
    """The file and the other fields; a large file is on disk while it arrives.

    Raises: InvalidRequestError, UnsupportedMediaTypeError.
    """
    content_type = content_type_of(request)
    if content_type != FORM_TYPE:
        raise UnsupportedMediaTypeError(f"content-type {shown(content_type)}: only {FORM_TYPE}")
    parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=_MAX_FIELDS)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequestError(f"body: not a {FORM_TYPE}: {error.message}", code="malformed_body") from None
    try:
        upload, fields = _parts_of(form)
        return _Upload(data=await upload.read(), filename=upload.filename or "", fields=fields)
    finally:
        await form.close()


def _parts_of(form: FormData) -> tuple[UploadFile, dict[str, str]]:
    fields = {}
    for name, value in form.multi_items():
        if name not in ("file", "purpose", _ANCHOR, _SECONDS):
            message = f"{shown(name)}: unknown parameter; known: file, purpose, {_ANCHOR}, {_SECONDS}"
            raise InvalidRequestError(message, param=name[:120], code="unknown_parameter")
        if isinstance(value, UploadFile) != (name == "file"):
            problem = "must be a file, with a filename" if name == "file" else "must be text, not a file"
            raise InvalidRequestError(f"{name}: {problem}", param=name)
        if isinstance(value, str):
            fields[name] = value
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise InvalidRequestError("file: required", param="file", code="missing_required_parameter")
    return upload, fields


def _required(fields: dict[str, str], name: str) -> str:
    if name not in fields:
        raise InvalidRequestError(f"{name}: required", param=name, code="missing_required_parameter")
    return fields[name]


def _ttl_s(fields: dict[str, str]) -> int:
    if fields.get(_ANCHOR, "created_at") != "created_at":
        raise InvalidRequestError(f"{_ANCHOR} {shown(fields[_ANCHOR])}: must be created_at", param=_ANCHOR)
    text = fields.get(_SECONDS, str(FILE_TTL_S))
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InvalidRequestError(f"{_SECONDS} {shown(text)}: must be a whole number of seconds", param=_SECONDS)
    return int(text)


def _file_object(stored: StoredFile) -> FileObject:
    return FileObject(
        id=stored.id,
        object="file",
        bytes=stored.num_bytes,
        created_at=int(stored.created_at),
        expires_at=int(stored.expires_at),
        filename=stored.filename,
        purpose=stored.purpose,
        status="processed",
    )
