"""Reads settings as they are written: YAML with line numbers, environment variables, flags; and turns text into the
type that a field declares. Knows how things are spelled; knows no field by name."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from helios_serve.errors import HeliosError

Keys = Mapping[str, Any]
"""`section.field`, or `field` outside sections, to what the field's annotation says."""

PREFIX = "HELIOS_"
IGNORED_PREFIXES = ("HELIOS_TEST_",)
_NULL = "tag:yaml.org,2002:null"
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
"""What Kubernetes and Docker add to the environment for a service whose name begins with `helios`."""


class SettingsError(HeliosError):
    """The configuration cannot be used; the message names the file and line, the variable or the flag."""

    code, grpc_status, retryable = "settings_invalid", "FAILED_PRECONDITION", False


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A value as it was written, and where. text: None for YAML's null, a tuple for a list."""

    text: str | tuple[str, ...] | None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """An option of the command line: its name as typed, the key that it sets, its value; None when it was not given."""

    name: str
    key: str
    value: object


def from_file(path: Path, keys: Keys) -> dict[str, Given]:
    """What a YAML file says: sections of fields, and fields outside sections. Scalars are taken as they are written,
    so that `off` is a word.

    Raises: SettingsError.
    """
    root = _compose(path)
    if root is None:
        return {}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    found: dict[str, Given] = {}
    for name, node in _pairs(path, root):
        if name.value not in sections:
            written = [(name, name.value, node)]
        elif isinstance(node, yaml.MappingNode):
            written = [(field, f"{name.value}.{field.value}", value) for field, value in _pairs(path, node)]
        elif node.tag == _NULL:  # a section whose lines are all comments
            written = []
        else:
            raise SettingsError(f"{_place(path, name)} {name.value}: is a section; write its fields indented below it")
        for at, key, value in written:
            if key not in keys:
                raise SettingsError(f"{_place(path, at)} {key}: no such setting{_hint(key, list(keys))}")
            found[key] = _given(_place(path, at), key, value)
    return found


def from_environ(environ: Mapping[str, str], keys: Keys, short: Mapping[str, str]) -> dict[str, Given]:
    """What `HELIOS_...` variables say; an empty one says nothing. short: variables with names of their own.

    Raises: SettingsError for one that is not known, or two that mean the same.
    """
    by_name = {env_name(key): key for key in keys} | dict(short)
    found: dict[str, Given] = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name.startswith(IGNORED_PREFIXES) or not text or _is_service_link(name, text):
            continue
        if name not in by_name:
            raise SettingsError(f"{name}: no such setting{_hint(name, list(by_name))}")
        key = by_name[name]
        if key in found:
            raise SettingsError(f"{name}: {found[key].source} says the same; set only one of them")
        found[key] = Given(text=text, source=name)
    return found


def from_flags(flags: Iterable[Flag], keys: Keys) -> dict[str, Given]:
    """What flags say; a later one wins.

    Raises: SettingsError for a key that is not known.
    """
    found = {}
    for flag in flags:
        if flag.key not in keys:
            raise SettingsError(f"{flag.name} {flag.key}: no such setting{_hint(flag.key, list(keys))}")
        if flag.value is not None:
            found[flag.key] = Given(text=_written(flag.value), source=flag.name)
    return found


def assignments(texts: Iterable[str], *, name: str = "--set") -> list[Flag]:
    """`section.field=value`, as a repeatable option gives it.

    Raises: SettingsError.
    """
    flags = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"{name} {text}: must read section.field=value, such as engine.max_pack=4")
        flags.append(Flag(name=name, key=key.strip(), value=value))
    return flags


def env_name(key: str) -> str:
    """`engine.max_pack` -> `HELIOS_ENGINE_MAX_PACK`."""
    return PREFIX + key.replace(".", "_").upper()


def convert(annotation: Any, given: Given) -> Any:
    """The value as the annotation wants it.

    Raises: ValueError with what would be right.
    """
    members = _members(annotation)
    if given.text is None:
        if type(None) in members:
            return None
        raise ValueError("must have a value")
    kind, *words = [each for each in members if each is not type(None)]
    assert all(get_origin(each) is Literal for each in words), f"{annotation}: settings are of one type, words or None"
    if any(given.text in get_args(each) for each in words):
        return given.text
    if get_origin(kind) is tuple:
        return _convert_list(get_args(kind)[0], given.text)
    if isinstance(given.text, tuple):
        raise ValueError("must be one value, not a list")
    try:
        return _convert_one(kind, given.text.strip())
    except ValueError as error:
        raise ValueError(" or ".join((str(error), *map(_kind_name, words)))) from None


def type_name(annotation: Any) -> str:
    """An annotation as people write it: `whole number`, `auto, always or off`."""
    members = [each for each in _members(annotation) if each is not type(None)]
    return " or ".join(_kind_name(each) for each in members)


def _compose(path: Path) -> yaml.Node | None:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not UTF-8 text") from error
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = path if mark is None else f"{path}:{mark.line + 1}"
        raise SettingsError(f"{where}: is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: is not YAML: {error}") from error
    if root is not None and root.tag != _NULL and not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{path}: must hold sections, such as `engine:` with `max_pack: 4` indented below it")
    return root if isinstance(root, yaml.MappingNode) else None


def _pairs(path: Path, node: yaml.Node) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """Raises: SettingsError for a key that is no word, or stands there twice."""
    pairs: list[tuple[yaml.ScalarNode, yaml.Node]] = []
    first: dict[str, yaml.ScalarNode] = {}
    for name, value in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise SettingsError(f"{_place(path, name)}: a name of a section or field is expected here")
        if name.value in first:
            before = first[name.value].start_mark.line + 1
            raise SettingsError(f"{_place(path, name)} {name.value}: was set in line {before} already")
        first[name.value] = name
        pairs.append((name, value))
    return pairs


def _given(where: str, key: str, node: yaml.Node) -> Given:
    if node.tag == _NULL:
        return Given(text=None, source=where)
    if isinstance(node, yaml.ScalarNode):
        return Given(text=node.value, source=where)
    if isinstance(node, yaml.SequenceNode) and all(isinstance(each, yaml.ScalarNode) for each in node.value):
        return Given(text=tuple(each.value for each in node.value), source=where)
    raise SettingsError(f"{where} {key}: must be one value or a list of values")


def _place(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _is_service_link(name: str, text: str) -> bool:
    return _SERVICE_LINK.search(name) is not None or (
        name.endswith("_PORT") and text.startswith(("tcp://", "udp://", "sctp://"))
    )


def _hint(wrong: str, right: Sequence[str]) -> str:
    """The nearest known name: one of the same last part wins over one that is spelled alike."""
    field = wrong.rpartition(".")[2]
    same = [each for each in right if each.rpartition(".")[2] == field]
    near = same or get_close_matches(wrong, right, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    section = wrong.partition(".")[0]
    known = [each for each in right if each.partition(".")[0] == section] or sorted(
        {each.partition(".")[0] for each in right}
    )
    return "" if wrong.startswith(PREFIX) else f"; known: {', '.join(known)}"


def _written(value: object) -> str | tuple[str, ...]:
    """A parsed flag as text again, so that one reader judges all sources. Python's float text is exact."""
    if isinstance(value, list | tuple):
        return tuple(str(each) for each in value)
    return str(value)


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _convert_list(kind: Any, text: str | tuple[str, ...]) -> tuple[Any, ...]:
    """A list, or one text with commas."""
    parts = text.split(",") if isinstance(text, str) else text
    return tuple(_convert_one(kind, part.strip()) for part in parts if part.strip())


def _convert_one(kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if str(choice) == text:
                return choice
        raise ValueError(f"must be {_kind_name(kind)}")
    assert kind in _READERS, f"{kind}: no setting has this type yet"
    try:
        return _READERS[kind](text)
    except ValueError:
        article = "" if kind is bool else "a "
        raise ValueError(f"must be {article}{_kind_name(kind)}") from None


def _read_bool(text: str) -> bool:
    if text.lower() not in _WORDS:
        raise ValueError
    return _WORDS[text.lower()]


def _read_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _read_path(text: str) -> Path:
    if not text:
        raise ValueError
    return Path(text).expanduser()


_READERS: dict[Any, Callable[[str], Any]] = {
    bool: _read_bool,
    int: int,
    float: _read_float,
    str: str,
    Path: _read_path,
}
_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}


def _kind_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(kind) is tuple:
        return f"list of {_kind_name(get_args(kind)[0])}"
    return _NAMES[kind]
