"""Writes the page about settings from the dataclasses: their fields, defaults and docstrings.

`python -m helios_serve.settings_table docs/configuration.md` writes it anew.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from fnmatch import fnmatch
from inspect import getdoc
from pathlib import Path
from typing import Any

from helios_serve.settings import SHORT_ENV, sections, setting_types
from helios_serve.settings_sources import env_name, type_name

DERIVED = {
    "model.model": "the small trained checkpoint of this package",
    "model.device": "`cuda` where PyTorch sees one, else `cpu`",
    "model.dtype": "`bfloat16` on `cuda`, `float32` on `cpu`",
    "server.data_dir": "`helios-serve` in the user's data directory",
    "store.data_dir": "that of `server`",
    "ray.gpus_per_encoder": "0.25 on `cuda`, 0 on `cpu`",
    "ray.gpus_per_rank": "1 on `cuda`, 0 on `cpu`",
    "ray.gpus_per_vae": "0.5 on `cuda`, 1 there for several ranks, 0 on `cpu`",
}
"""Defaults that follow from the machine or from other settings."""

_LABEL = re.compile(r"(?:^|(?<=\. ))([a-z0-9_*]+(?:, [a-z0-9_*]+)*): ")
_HEAD = """# Configuration

This page is made from the code by `python -m helios_serve.settings_table docs/configuration.md`.

Every setting can be written in a YAML file (`helios-serve serve --config helios.yaml`), as an environment variable, or
as a flag. A flag wins over the environment, the environment over the file, the file over the default. Any setting can
be given as a flag with `--set section.field=value`; the usual ones have flags of their own
(`helios-serve serve --help`).

```yaml
# helios.yaml
executor: local
model:
  model: /models/Helios-Distilled
engine:
  batching: auto
  max_pack: 4
server:
  host: 0.0.0.0
  keys_file: /run/secrets/helios-keys.yaml
  cors_origins: [https://app.example]
store:
  blob_url: s3://videos/helios
```

- Unknown names are errors, in the file, in the environment (all that begins with `HELIOS_`, but for the variables that
  Kubernetes and Docker add for a service of that name) and in flags. The message names the line, the variable or the
  flag, and the nearest name.
- Words of the file are taken as they stand: `off` is the word, not a boolean. A boolean is `true` or `false`. An empty
  variable counts as not set. A list is a YAML list, or values separated by commas; a list replaces, it does not add.
  `null` is possible where *none* is a default.
- Values are checked at the start. What is in force is printed once, as YAML, with where each value came from; keys and
  passwords are hidden.
- Put secrets into variables or files that only the server reads. Flags are visible to other users of the machine.
- Times end in `_s` and are seconds, sizes end in `_bytes`.
"""


def configuration_page() -> str:
    """The whole page, in Markdown."""
    parts = [_HEAD, "## Outside sections\n", _table([("executor", "`local`", _EXECUTOR)])]
    for section, kind in sections().items():
        parts += [f"## `{section}`\n", f"{_summary(kind)}\n", _table(_rows(section, kind))]
    return "\n".join(parts)


def field_notes(kind: type[Any]) -> dict[str, str]:
    """What a dataclass's docstring says of each field, as `name: text.` or `name, other_*: text.`; `help` in the
    field's metadata wins."""
    names = [each.name for each in fields(kind)]
    text = " ".join((getdoc(kind) or "").split())
    labels = [match for match in _LABEL.finditer(text) if all(_fields_named(part, names) for part in _parts(match))]
    found: dict[str, str] = {}
    ends = [*(match.start() for match in labels), len(text)][1:]
    for match, end in zip(labels, ends, strict=False):  # no label, one end
        note = text[match.end() : end].strip()
        found |= {name: note for part in _parts(match) for name in _fields_named(part, names)}
    return found | {each.name: each.metadata["help"] for each in fields(kind) if "help" in each.metadata}


_EXECUTOR = "local: all roles in this process; ray: workers of a Ray cluster, as in section `ray`"


def _rows(section: str, kind: type[Any]) -> Iterator[tuple[str, str, str]]:
    """Key, default and meaning."""
    notes = field_notes(kind)
    for each in fields(kind):
        key = f"{section}.{each.name}"
        note = notes.get(each.name, "").removesuffix(".")
        yield key, DERIVED.get(key) or _default(each), note


def _table(rows: Iterator[tuple[str, str, str]] | list[tuple[str, str, str]]) -> str:
    short = {key: name for name, key in SHORT_ENV.items()}
    lines = ["| setting | environment | type | default | meaning |", "| --- | --- | --- | --- | --- |"]
    for key, default, note in rows:
        names = f"`{env_name(key)}`" + (f", `{short[key]}`" if key in short else "")
        cells = (f"`{key}`", names, type_name(setting_types()[key]), default, note)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(each: Field[Any]) -> str:
    if each.default is MISSING:
        return "must be set" if each.default_factory is MISSING else f"`{each.default_factory()}`"
    if each.default is None or each.default == ():
        return "none"
    if isinstance(each.default, bool):
        return f"`{str(each.default).lower()}`"
    return f"`{each.default}`"


def _summary(kind: type[Any]) -> str:
    """The docstring without its field notes."""
    paragraphs = [" ".join(part.split()) for part in (getdoc(kind) or "").split("\n\n")]
    names = [each.name for each in fields(kind)]
    kept = []
    for paragraph in paragraphs:
        starts = [m.start() for m in _LABEL.finditer(paragraph) if all(_fields_named(p, names) for p in _parts(m))]
        kept.append(paragraph[: starts[0]].strip() if starts else paragraph)
    return "\n\n".join(paragraph for paragraph in kept if paragraph)


def _parts(match: re.Match[str]) -> list[str]:
    return match.group(1).split(", ")


def _fields_named(pattern: str, names: list[str]) -> list[str]:
    return [name for name in names if fnmatch(name, pattern)]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(configuration_page(), encoding="utf-8")
