"""Configuration of a server: a YAML file, the environment and flags become the frozen dataclasses of `config`.

Knows sections, which source wins, and what to hide. What fields there are, of which type, and which values do is
said by the dataclasses alone: a new field there is a setting here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_type_hints

import yaml

from helios_serve.config import EngineConfig, ExecutorConfig, ModelConfig, ServerConfig, default_data_dir
from helios_serve.logs import without_secrets
from helios_serve.settings_sources import (
    Flag,
    Given,
    Keys,
    SettingsError,
    assignments,
    convert,
    from_environ,
    from_file,
    from_flags,
)
from helios_serve.store.connect import StoreConfig

__all__ = ["Derive", "Flag", "Settings", "SettingsError", "assignments", "describe", "load_settings"]

Derive = Callable[[Mapping[str, object]], object]
"""The value of a setting that no source gives, from the values that are known before it."""

EXECUTOR = "executor"
SHORT_ENV = {
    "HELIOS_DATA_DIR": "server.data_dir",
    "HELIOS_API_KEYS": "server.keys",
    "HELIOS_KEYS_FILE": "server.keys_file",
    "HELIOS_SIGNING_KEYS": "server.signing_keys",
    "HELIOS_SIGNING_KEYS_FILE": "server.signing_keys_file",
}
"""Variables with names of their own, beside `HELIOS_<SECTION>_<FIELD>`."""

HIDDEN = "[hidden]"
_NONE: Mapping[str, Any] = MappingProxyType({})
_DERIVED: dict[str, Derive] = {
    "server.data_dir": lambda known: default_data_dir(),
    "store.data_dir": lambda known: known["server.data_dir"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that a server is configured with. ray: the workers of a Ray cluster; None runs all roles in this
    process. sources: where a setting was given, by key; derived ones and defaults are not in it."""

    model: ModelConfig
    engine: EngineConfig
    server: ServerConfig
    store: StoreConfig
    ray: ExecutorConfig | None = None
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


@cache
def sections() -> Mapping[str, type[Any]]:
    """The dataclass of each section: the fields of Settings that are one."""
    found = {}
    for name, hint in get_type_hints(Settings).items():
        classes = [each for each in (hint, *get_args(hint)) if isinstance(each, type) and is_dataclass(each)]
        if classes:
            found[name] = classes[0]
    return found


@cache
def setting_types() -> Keys:
    """Every key with its annotation."""
    found: dict[str, Any] = {EXECUTOR: Literal["local", "ray"]}
    for section, kind in sections().items():
        hints = get_type_hints(kind)
        found |= {f"{section}.{each.name}": hints[each.name] for each in fields(kind)}
    return found


def load_settings(
    config_file: Path | None,
    environ: Mapping[str, str],
    flags: Iterable[Flag] = (),
    derive: Mapping[str, Derive] = _NONE,
) -> Settings:
    """Flags win over the environment, that over the file, that over what is derived, that over the defaults.

    Args:
        derive: by key, in this order; for what depends on other settings or on the machine. A key of `ray` too.

    Raises: SettingsError, which names the source.
    """
    keys = setting_types()
    given = {} if config_file is None else from_file(config_file, keys)
    given |= from_environ(environ, keys, SHORT_ENV)
    given |= from_flags(flags, keys)
    values: dict[str, object] = {key: _converted(key, keys, each) for key, each in given.items()}
    for key, rule in (_DERIVED | dict(derive)).items():
        assert key in keys, key
        if key not in values:
            values[key] = rule(values)
    built = {section: _build(section, kind, values, given) for section, kind in sections().items()}
    if values.get(EXECUTOR, "local") == "local":
        built["ray"] = None
    return Settings(**built, sources=MappingProxyType({key: each.source for key, each in given.items()}))


def describe(settings: Settings) -> str:
    """The settings in force as YAML that `load_settings` reads, with the source of what was given. Secrets are
    hidden."""
    lines = [f"executor: {'local' if settings.ray is None else 'ray'}"]
    for section in sections():
        config = getattr(settings, section)
        if config is None:
            continue
        lines.append(f"{section}:")
        for each in fields(config):
            shown = f"  {each.name}: {_shown(each, getattr(config, each.name))}"
            source = settings.sources.get(f"{section}.{each.name}")
            lines.append(shown if source is None else f"{shown}  # {source}")
    return "\n".join(lines) + "\n"


def _converted(key: str, keys: Keys, given: Given) -> object:
    try:
        value: object = convert(keys[key], given)
    except ValueError as error:
        raise SettingsError(f"{given.source} {_named(key, given)}{_quoted(key, given.text)}: {error}") from None
    return value


def _build(section: str, kind: type[Any], values: Mapping[str, object], given: Mapping[str, Given]) -> Any:
    own = {key.partition(".")[2]: value for key, value in values.items() if key.partition(".")[0] == section}
    for each in fields(kind):
        if each.name not in own and each.default is MISSING and each.default_factory is MISSING:
            raise SettingsError(f"{section}.{each.name}: must be set")
    try:
        return kind(**own)
    except ValueError as error:
        raise SettingsError(_placed(section, without_secrets(str(error)), given)) from error


def _placed(section: str, message: str, given: Mapping[str, Given]) -> str:
    """A dataclass's refusal begins with the name of the field; the source is put before it."""
    key = f"{section}.{message.partition(' ')[0]}"
    return f"{given[key].source} {section}: {message}" if key in given else f"{section}: {message}"


def _named(key: str, given: Given) -> str:
    """The key, where the source does not say it already."""
    return "" if given.source.startswith("HELIOS_") else f"{key} "


def _quoted(key: str, text: str | tuple[str, ...] | None) -> str:
    """What was written, short; nothing of a setting that may be a secret."""
    if text is None:
        return "null"
    if _is_hidden(key):
        return HIDDEN
    return without_secrets(text if isinstance(text, str) else ", ".join(text))[:200]


def _is_hidden(key: str) -> bool:
    section, _, name = key.partition(".")
    return section in sections() and any(each.name == name and not each.repr for each in fields(sections()[section]))


def _shown(each: Field[Any], value: object) -> str:
    if value is not None and not each.repr:
        return HIDDEN
    if isinstance(value, str | Path):
        value = without_secrets(str(value))
    elif isinstance(value, tuple):
        value = [without_secrets(str(item)) for item in value]
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
