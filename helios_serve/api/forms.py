"""From a multipart form to the mapping that a JSON body gives, so that `parse_generation` reads both alike.

A name in brackets is a path: `helios[crf]`, `helios[steps][]` repeated, `prompts[][chunk]`. A value is text and becomes
what the schema of its field takes; an object or a list may also come as one JSON string, which leaves nothing to guess.
A file becomes an `UploadedMedia`. Unknown names and ranges are left to `names` and `convert`. Knows no checkpoint.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from helios_serve.api.http_request import strict_json
from helios_serve.api.names import shown
from helios_serve.api.schemas import (
    ALSO_IN_HELIOS,
    FIELD_ALIASES,
    FILE_MARK,
    HELIOS_ALIASES,
    HELIOS_CONTAINERS,
    GenerationBody,
    UploadedMedia,
)
from helios_serve.errors import InvalidRequestError, UnsupportedMediaTypeError

FORM_TYPE = "multipart/form-data"
MAX_FIELDS = 200
MAX_DEPTH = 4
"""Parts of a form, files included, and parts of a name: `helios[prompts][][chunk]` has four."""

_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_INTEGER = re.compile(r"-?[0-9]{1,1000}")
_NUMBER = re.compile(r"-?[0-9]{1,1000}(\.[0-9]{1,1000})?([eE][+-]?[0-9]{1,9})?")
_PLAIN_ENCODINGS = ("", "7bit", "8bit", "binary")


async def read_form(request: Request) -> dict[str, object]:
    """The body of `request` as if it had come as JSON; files are `UploadedMedia`. Reads the request's stream.

    Raises:
        InvalidRequestError: a form that is no form (`malformed_body`), a name that is no path, a part given twice, or
            text that its field cannot take.
        UnsupportedMediaTypeError: another content type.
    """
    content_type, options = parse_options_header(request.headers.get("content-type"))
    if content_type != FORM_TYPE.encode():
        raise UnsupportedMediaTypeError(f"content-type {shown(content_type.decode('latin-1'))}: only {FORM_TYPE}")
    if not options.get(b"boundary"):
        raise _malformed("the content-type has no boundary; let the client library write that header")
    collector = _Collector()
    try:
        parser = MultipartParser(options[b"boundary"], collector.callbacks())
        async for piece in request.stream():
            parser.write(piece)
    except FormParserError as error:
        raise _malformed(str(error)[:200]) from None
    if not collector.is_complete:
        raise _malformed("it ends before its last boundary")
    # A thread, because the JSON in a part may be as long as a body.
    return await asyncio.to_thread(_body_of, collector.parts)


@dataclass(slots=True)
class _Part:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    name: str = ""
    is_file: bool = False


class _Collector:
    """Takes what the parser finds. Holds the parts in memory; the middleware limits the body."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.is_complete = False
        self._header = b"", b""

    def callbacks(self) -> Any:
        """Names as the parser wants them."""
        return {
            "on_part_begin": self._begin,
            "on_header_begin": self._begin_header,
            "on_header_field": self._extend_key,
            "on_header_value": self._extend_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._read_headers,
            "on_part_data": self._extend_data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.parts) == MAX_FIELDS:
            raise _malformed(f"more than {MAX_FIELDS} fields; send objects and lists as JSON strings")
        self.parts.append(_Part())

    def _begin_header(self) -> None:
        self._header = b"", b""

    def _extend_key(self, data: bytes, start: int, end: int) -> None:
        self._header = self._header[0] + data[start:end], self._header[1]

    def _extend_value(self, data: bytes, start: int, end: int) -> None:
        self._header = self._header[0], self._header[1] + data[start:end]

    def _end_header(self) -> None:
        key, value = self._header
        self.parts[-1].headers[key.lower()] = value

    def _read_headers(self) -> None:
        part = self.parts[-1]
        kind, options = parse_options_header(part.headers.get(b"content-disposition"))
        if kind != b"form-data" or not options.get(b"name"):
            raise _malformed('a part has no name; each needs content-disposition: form-data; name="..."')
        try:
            part.name = options[b"name"].decode()
        except UnicodeDecodeError:
            raise _malformed("the name of a part is not UTF-8") from None
        part.is_file = b"filename" in options
        encoding = part.headers.get(b"content-transfer-encoding", b"").decode("latin-1").strip().lower()
        if encoding not in _PLAIN_ENCODINGS:
            raise InvalidRequestError(
                f"{_quoted(part.name)}: content-transfer-encoding {shown(encoding)}: send the bytes as they are",
                param=part.name[:120],
            )

    def _extend_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].data += memoryview(data)[start:end]

    def _end(self) -> None:
        self.is_complete = True


Leaf = str | UploadedMedia
Node = Leaf | dict[str, "Node"] | list["Node"]
"""What the names alone say of a form."""

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """What a field takes: JSON types, then what an object's keys and a list's entries take. No types: unknown field."""

    types: frozenset[str] = frozenset()
    keys: Mapping[str, _Target] = field(default_factory=dict)
    other_keys: _Target | None = None
    entry: _Target | None = None
    takes_file: bool = False


def _body_of(parts: Iterable[_Part]) -> dict[str, object]:
    root: dict[str, Node] = {}
    for part in parts:
        _insert(root, _split(part.name), _leaf(part))
    return {key: _value(node, _top_level(key), (key,)) for key, node in root.items()}


def _leaf(part: _Part) -> Leaf:
    if part.is_file:
        content_type, _ = parse_options_header(part.headers.get(b"content-type", b"application/octet-stream"))
        return UploadedMedia(bytes(part.data), content_type.decode("latin-1"))
    try:
        return part.data.decode()
    except UnicodeDecodeError:
        raise _refused(part.name, _split(part.name), "not UTF-8 text") from None


def _split(name: str) -> tuple[str, ...]:
    """`helios[prompts][][chunk]` -> helios, prompts, "", chunk; "" is the next entry of a list."""
    match = _NAME.fullmatch(name)
    path = () if match is None else (match[1], *re.findall(r"\[([^\[\]]*)\]", match[2]))
    if not path:
        raise _refused(name, (name[:120],), "not a name; write field, field[key] or field[]")
    if len(path) > MAX_DEPTH:
        raise _refused(name, path, f"{len(path)} levels deep, at most {MAX_DEPTH}; send a JSON string")
    if ("", "") in itertools.pairwise(path):
        raise _refused(name, path, "no field is a list of lists")
    return path


def _insert(root: dict[str, Node], path: tuple[str, ...], leaf: Leaf) -> None:
    """Puts a leaf at its place. In a list of objects that is the first one that has no such key yet."""
    place: Node = root
    for key, below in zip(path, (*path[1:], None), strict=True):
        inner: Node | None = None
        if isinstance(place, dict) and key:
            if below is None and key in place:
                again = "give it once; a list as field[] for each entry, or as one JSON string"
                raise _refused(_bracketed(path), path, f"given twice; {again}", "conflicting_parameters")
            inner = place.setdefault(key, _new(leaf, below))
        elif isinstance(place, list) and not key:
            inner = _entry(place, leaf, below)
        if inner is None or (below is not None and isinstance(inner, Leaf)):
            once = "give it as one JSON string, or all of it in brackets"
            raise _refused(_bracketed(path), path, f"{path[0]} comes in two forms; {once}", "conflicting_parameters")
        place = inner


def _new(leaf: Leaf, below: str | None) -> Node:
    if below is None:
        return leaf
    return {} if below else []


def _entry(entries: list[Node], leaf: Leaf, below: str | None) -> Node | None:
    """The entry of a list that the rest of a name belongs to; None if the list holds entries of another form."""
    if any(isinstance(entry, dict) == (below is None) for entry in entries):
        return None
    if below is None:
        entries.append(leaf)
        return leaf
    for entry in entries:
        if isinstance(entry, dict) and below not in entry:
            return entry
    entries.append({})
    return entries[-1]


def _value(node: Node, target: _Target, path: Path) -> object:
    """What JSON would hold at `path`."""
    if isinstance(node, str):
        return _from_text(node, target, path)
    if isinstance(node, UploadedMedia):
        if target.types and not target.takes_file:
            raise _refused_at(path, "takes no file; files go to input_reference or video")
        return node
    if isinstance(node, list):
        if target.types and "array" not in target.types:
            raise _refused_at(path, f"not a list; give {_bracketed(path)} once")
        _check_entries(node, path)
        entry = target.entry or _UNKNOWN
        return [_value(inner, entry, (*path, index)) for index, inner in enumerate(node)]
    if target.types and "object" not in target.types:
        name = _bracketed(path)
        hint = f"a list has empty brackets: {name}[]" if "array" in target.types else f"{name} has no keys"
        raise _refused_at((*path, next(iter(node))), hint)
    return {key: _value(inner, _key_of(target, key, path), (*path, key)) for key, inner in node.items()}


def _check_entries(entries: list[Node], path: Path) -> None:
    """Refuses objects of different keys: the names do not say which of them lacks what."""
    objects = [entry for entry in entries if isinstance(entry, dict)]
    for key in {} if not objects else objects[0]:
        count = sum(key in entry for entry in objects)
        if count < len(objects):
            name = f"{_bracketed(path)}[][{key}]"
            raise InvalidRequestError(
                f"{name}: {count} for {len(objects)} entries; give it for each, or {_bracketed(path)} as a JSON string",
                param=_dotted(path),
            )


def _key_of(target: _Target, key: str, path: Path) -> _Target:
    if len(path) == 1 and path[0] in HELIOS_CONTAINERS:
        return target.keys.get(HELIOS_ALIASES.get(key, key), _UNKNOWN) if path[0] == "helios" else _top_level(key)
    return target.keys.get(key, target.other_keys or _UNKNOWN)


def _from_text(text: str, target: _Target, path: Path) -> object:
    types = target.types
    if "boolean" in types and text in ("true", "false"):
        return text == "true"
    if "integer" in types and _INTEGER.fullmatch(text):
        return int(text)
    if "number" in types and _NUMBER.fullmatch(text):
        return float(text)
    opening = text.lstrip()[:1]
    if ("object" in types and opening == "{") or ("array" in types and opening == "["):
        try:
            return strict_json(text.encode())
        except ValueError as error:
            raise _refused_at(path, f"not JSON: {error}") from None
    if not types or "string" in types:
        return text
    raise _refused_at(path, _wanted(types, path), text)


def _wanted(types: frozenset[str], path: Path) -> str:
    name = _bracketed(path)
    if "boolean" in types:
        return "must be true or false"
    if "array" in types:
        return f"must be a list: {name}[] for each entry, or one JSON list"
    if types == {"object"}:
        return f"must be an object: {name}[key] for each key, or one JSON object"
    return "must be an integer" if "integer" in types else "must be a number"


def _top_level(key: str) -> _Target:
    """What a top-level key takes, under any of its names."""
    if key in HELIOS_CONTAINERS:
        return _HELIOS
    known = _BODY.keys.get(FIELD_ALIASES.get(key, key))
    return _HELIOS.keys.get(HELIOS_ALIASES.get(key, key), _UNKNOWN) if known is None else known


def _read_schema(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> _Target:
    """The target that a JSON schema describes."""
    if "$ref" in schema:
        return _read_schema(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        members = [_read_schema(member, definitions) for member in schema["anyOf"]]
        return _Target(
            types=frozenset().union(*(member.types for member in members)),
            keys={key: value for member in members for key, value in member.keys.items()},
            other_keys=next((member.other_keys for member in members if member.other_keys), None),
            entry=next((member.entry for member in members if member.entry), None),
            takes_file=any(member.takes_file for member in members),
        )
    keys = {key: _read_schema(value, definitions) for key, value in schema.get("properties", {}).items()}
    others = schema.get("additionalProperties", False)
    return _Target(
        types=frozenset({schema["type"]}) - {"null"},
        keys=keys,
        other_keys=_read_schema(others, definitions) if others else None,
        entry=_read_schema(schema["items"], definitions) if "items" in schema else None,
        takes_file=schema.get(FILE_MARK, False) or any(key.takes_file for key in keys.values()),
    )


def _bracketed(path: Path) -> str:
    """A path as a form writes it; an entry of a list has no number there."""
    return str(path[0]) + "".join("[]" if isinstance(part, int) else f"[{part}]" for part in path[1:])


def _dotted(path: Path) -> str:
    """A path as errors about JSON write it."""
    return str(path[0]) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[1:])


def _quoted(name: str) -> str:
    short = name[:120]
    return short if short.isprintable() and short else shown(short)


def _malformed(problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"body: not a {FORM_TYPE}: {problem}", code="malformed_body")


def _refused_at(path: Path, problem: str, text: str | None = None) -> InvalidRequestError:
    given = "" if text is None else " " + shown(text)
    return InvalidRequestError(f"{_quoted(_bracketed(path))}{given}: {problem}", param=_dotted(path)[:120])


def _refused(name: str, path: tuple[str, ...], problem: str, code: str | None = None) -> InvalidRequestError:
    param = _dotted(tuple(part for part in path if part))[:120]
    return InvalidRequestError(f"{_quoted(name)}: {problem}", param=param, code=code)


_UNKNOWN = _Target()
_SCHEMA = GenerationBody.model_json_schema()
_BODY = _read_schema({key: value for key, value in _SCHEMA.items() if key != "$defs"}, _SCHEMA["$defs"])
_HELIOS = replace(
    _BODY.keys["helios"],
    keys={**_BODY.keys["helios"].keys, **{name: _BODY.keys[name] for name in ALSO_IN_HELIOS}},
)
