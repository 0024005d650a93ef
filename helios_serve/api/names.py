"""From the JSON a client wrote to a typed body: resolves other names of fields, refuses unknown keys and wrong types.

Remembers under which name each field was given, so that every message names the field as the client wrote it. Knows no
checkpoint and no protocol.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from helios_serve.api.schemas import (
    ALSO_IN_HELIOS,
    FIELD_ALIASES,
    FIXED_HERE,
    HELIOS_ALIASES,
    HELIOS_CONTAINERS,
    GenerationBody,
    HeliosParams,
    ImageReference,
    PromptEntry,
    VideoReference,
)
from helios_serve.errors import InvalidRequestError

Path = tuple[str | int, ...]


def _field_names(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in model.model_fields.items())


_FIELDS = _field_names(GenerationBody)
_HELIOS = _field_names(HeliosParams)
_KEYS_OF_OBJECT = {
    "prompts": _field_names(PromptEntry),
    "input_reference": _field_names(ImageReference),
    "video": _field_names(VideoReference),
}
_LIKENESS = 0.7
"""How like a known name an unknown one must be to be taken for a slip of the keyboard, 0 to 1."""

_REFERENCES = {
    "input_reference": "must be a string, or an object with image_url or file_id",
    "video": "must be a string, or an object with video_url, file_id or id",
}
_TYPE_MESSAGES = {
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "model_type": "must be an object",
    "dict_type": "must be an object",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedBody:
    """A validated body and the name that the client used for each field it gave."""

    fields: GenerationBody
    written: Mapping[Path, str]

    def name(self, *path: str | int) -> str:
        """Dotted path of a field as the client wrote it, e.g. `prompts[1].chunk`; the documented one if not given."""
        return _dotted(path, self.written)

    def has(self, *path: str | int) -> bool:
        """Whether the client gave the field, under any name, and not as null."""
        return path in self.written


def read_body(body: Mapping[str, object]) -> NamedBody:
    """Validates a client's JSON object against `GenerationBody`.

    Raises:
        InvalidRequestError: an unknown key, a wrong type, a value out of range, or one field under two names with
            different values.
    """
    canonical = _Canonical()
    for key, value in body.items():
        if key in HELIOS_CONTAINERS:
            _merge_container(canonical, key, value)
        else:
            canonical.put(_resolve(key, key), value, key)
    try:
        fields = GenerationBody.model_validate(canonical.nested())
    except ValidationError as error:
        raise _translate(error, canonical.written) from None
    return NamedBody(fields=fields, written=canonical.written)


def shown(value: object) -> str:
    """A value as a message quotes it: JSON, at most 80 characters."""
    text = json.dumps(value[:80] if isinstance(value, str) else value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


class _Canonical:
    """The fields seen so far under their documented names."""

    def __init__(self) -> None:
        self.values: dict[Path, object] = {}
        self.written: dict[Path, str] = {}

    def put(self, path: Path, value: object, written: str) -> None:
        if value is None:
            return
        if path in self.values and not _same(self.values[path], value):
            raise InvalidRequestError(
                f"{written} {shown(value)}: {self.written[path]} says {shown(self.values[path])}; give one of them",
                param=written,
                code="conflicting_parameters",
            )
        self.values.setdefault(path, value)
        self.written.setdefault(path, written)

    def nested(self) -> dict[str, object]:
        helios = {str(path[1]): value for path, value in self.values.items() if len(path) == 2}
        return {str(path[0]): value for path, value in self.values.items() if len(path) == 1} | {"helios": helios}


def _merge_container(canonical: _Canonical, container: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{container} {shown(value)}: must be an object", param=container)
    for key, inner in value.items():
        written = f"{container}.{key}"
        name = HELIOS_ALIASES.get(key, key)
        if container == "helios" and name not in _HELIOS and key not in ALSO_IN_HELIOS:
            raise _unknown(written, key, _HELIOS | set(HELIOS_ALIASES))
        canonical.put(_resolve(key, written), inner, written)


def _resolve(key: str, written: str) -> Path:
    """The documented path of a top-level key."""
    field, helios = FIELD_ALIASES.get(key, key), HELIOS_ALIASES.get(key, key)
    if field in _FIELDS and field != "helios":
        return (field,)
    if helios in _HELIOS:
        return ("helios", helios)
    raise _unknown(written, key, _FIELDS | _HELIOS | set(FIELD_ALIASES) | set(HELIOS_ALIASES))


def _same(left: object, right: object) -> bool:
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _unknown(written: str, key: str, known: Iterable[str]) -> InvalidRequestError:
    param = written[:120]
    if key in FIXED_HERE:
        return InvalidRequestError(f"{param}: {FIXED_HERE[key]}", param=param, code="unsupported_parameter")
    close = difflib.get_close_matches(key[:64], sorted(known), n=1, cutoff=_LIKENESS)
    hint = f"; did you mean {close[0]}?" if close else ""
    name = param if param.isprintable() and param else shown(param)
    return InvalidRequestError(f"{name}: unknown parameter{hint}", param=param, code="unknown_parameter")


def _dotted(path: Path, written: Mapping[Path, str]) -> str:
    """Replaces the longest prefix that has a written name, then appends the rest."""
    for length in range(len(path), 0, -1):
        if path[:length] in written:
            text, rest = written[path[:length]], path[length:]
            break
    else:
        text, rest = str(path[0]), path[1:]
    return text + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)


def _translate(error: ValidationError, written: Mapping[Path, str]) -> InvalidRequestError:
    """The first problem as our error; unknown keys first, for a typo explains what is missing."""
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    detail = details[0]
    loc: Path = tuple(detail["loc"])
    name = _dotted(loc, written)
    if detail["type"] == "extra_forbidden":
        return _unknown(name, str(loc[-1]), _KEYS_OF_OBJECT[str(loc[0])])
    if detail["type"] == "missing":
        return InvalidRequestError(f"{name}: required", param=name, code="missing_required_parameter")
    is_reference = detail["type"] == "model_type" and len(loc) == 1 and loc[0] in _REFERENCES
    explained = _REFERENCES[str(loc[0])] if is_reference else _explain(detail)
    return InvalidRequestError(f"{name} {shown(detail['input'])}: {explained}", param=name)


def _explain(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _TYPE_MESSAGES:
        return _TYPE_MESSAGES[kind]
    if kind == "literal_error":
        return "must be " + str(context["expected"]).replace("'", "")
    if kind == "greater_than_equal":
        return f"at least {context['ge']:g}"
    if kind == "greater_than":
        return f"must be above {context['gt']:g}"
    if kind == "less_than_equal":
        return f"at most {context['le'] if isinstance(context['le'], int) else format(context['le'], 'g')}"
    if kind == "string_too_short":
        return f"at least {context['min_length']} character"
    if kind == "string_too_long":
        return f"at most {context['max_length']} characters"
    if kind == "too_long":
        return f"at most {context['max_length']} entries"
    return detail["msg"][0].lower() + detail["msg"][1:]
