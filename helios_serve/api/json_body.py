"""From the JSON body of a small route to its model, with messages that name the field. Knows no route."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from helios_serve.api.http_request import json_object, read_body
from helios_serve.api.names import shown
from helios_serve.errors import InvalidRequestError

Body = TypeVar("Body", bound=BaseModel)


async def read_json(request: Request, model: type[Body], *, is_optional: bool = False) -> Body:
    """The body as `model`.

    Args:
        is_optional: an absent body reads as `{}`.

    Raises:
        InvalidRequestError: not a JSON object, or a field that `model` refuses.
        UnsupportedMediaTypeError: not application/json.
    """
    if is_optional and await request.body() == b"":
        return validated(model, {})
    return validated(model, json_object(await read_body(request)))


def validated(model: type[Body], body: Mapping[str, object]) -> Body:
    """Raises InvalidRequestError with the first field that `model` refuses; unknown ones first."""
    try:
        return model.model_validate(dict(body))
    except ValidationError as error:
        details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
        raise _refused(details[0], model) from None


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of a route that reads its body by hand."""
    schema = model.model_json_schema()
    nested = schema.pop("$defs", {})
    is_required = bool(schema.get("required"))
    return {
        "requestBody": {"required": is_required, "content": {"application/json": {"schema": _whole(schema, nested)}}}
    }


def _whole(schema: Any, nested: dict[str, Any]) -> Any:
    """A schema with its references replaced by what they name, as they would not resolve inside a document."""
    if isinstance(schema, list):
        return [_whole(entry, nested) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _whole(nested[schema["$ref"].rpartition("/")[2]], nested)
    return {key: _whole(value, nested) for key, value in schema.items()}


def _refused(detail: ErrorDetails, model: type[BaseModel]) -> InvalidRequestError:
    name = ".".join(str(part) for part in detail["loc"])[:120]
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, list(model.model_fields), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return InvalidRequestError(f"{shown(name)}: unknown parameter{hint}", param=name, code="unknown_parameter")
    if detail["type"] == "missing":
        return InvalidRequestError(f"{name}: required", param=name, code="missing_required_parameter")
    problem = detail["msg"].removeprefix("Value error, ")
    return InvalidRequestError(f"{name} {shown(detail['input'])}: {problem[0].lower()}{problem[1:]}", param=name)
