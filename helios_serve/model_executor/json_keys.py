"""Typed reading of a checkpoint's JSON objects.

Knows types and how to word what is wrong. Knows no key, no class and no file system.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import TypeGuard

from helios_serve.errors import CheckpointError

_log = logging.getLogger(__name__)


class JsonKeys:
    """One JSON object and the file it comes from; remembers which keys were read.

    All readers take the default for an absent key and raise CheckpointError for a value of another type.
    """

    def __init__(self, file: str, config: Mapping[str, object]) -> None:
        self._file = file
        self._config = config
        self._read: set[str] = set()

    def require_class(self, *names: str) -> str:
        """The class that the file names; an error unless it is one of `names`."""
        found = self._config.get("_class_name")
        served = " or ".join(names)
        if not isinstance(found, str) or found not in names:
            raise CheckpointError(f"{self._file}: _class_name is {found!r}; {served} is served", param="_class_name")
        return found

    def require_only(self, key: str, served: object) -> None:
        """An error unless `key` is absent or has the one value that is served."""
        found = self._get(key, served)
        require(type(found) is type(served) and found == served, self._file, key, found, f"{served!r} is served")

    def is_null(self, key: str) -> bool:
        """Whether `key` is present and null."""
        return self._get(key, 0) is None

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._mistyped(key, value, "true or false")
        return value

    def positive(self, key: str, default: int) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._mistyped(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if not _is_finite(value):
            raise self._mistyped(key, value, "a finite number")
        return float(value)

    def above_zero(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if not _is_finite(value) or value <= 0:
            raise self._mistyped(key, value, "a finite number above 0")
        return float(value)

    def choice(self, key: str, default: str, served: tuple[str, ...]) -> str:
        value = self._get(key, default)
        if not isinstance(value, str) or value not in served:
            raise self._mistyped(key, value, " or ".join(repr(name) for name in served))
        return value

    def integers(self, key: str, default: tuple[int, ...], length: int) -> tuple[int, ...]:
        value = self._get(key, default)
        entries = value if isinstance(value, list | tuple) else ()
        if len(entries) != length or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in entries):
            raise self._mistyped(key, value, f"a list of {length} positive integers")
        return tuple(entries)

    def numbers(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        value = self._get(key, default)
        if not isinstance(value, list | tuple) or not all(_is_finite(n) for n in value):
            raise self._mistyped(key, value, "a list of finite numbers")
        return tuple(float(n) for n in value)

    def warn_of_unread(self, ignored: tuple[str, ...] = ()) -> None:
        """The reference ignores keys that its classes lack, so these are no error."""
        unread = [key for key in self._config if not key.startswith("_") and key not in self._read | set(ignored)]
        if unread:
            _log.warning("%s: ignored unknown keys: %s", self._file, ", ".join(sorted(unread)))

    def _get(self, key: str, default: object) -> object:
        self._read.add(key)
        return self._config.get(key, default)

    def _mistyped(self, key: str, value: object, right: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {key} is {value!r}; it must be {right}", param=key)


def _is_finite(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that a float can hold; neither NaN nor infinity is, which Python's JSON reader admits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def require(condition: bool, file: str, key: str, value: object, right: str) -> None:
    """Raises CheckpointError unless `condition` holds: `key` of `file` is `value`, and `right` says what is right."""
    if not condition:
        raise CheckpointError(f"{file}: {key} is {value!r}; {right}", param=key)
