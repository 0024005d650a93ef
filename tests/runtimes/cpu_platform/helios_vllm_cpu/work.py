"""Counts the transformer's work in every process of the runtime, whichever backend does it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

FOLDER = "HELIOS_WORK"
"""Names the folder to which each process adds a file: one line for each forward, with the sequences that it had."""


def count() -> None:
    """Begins to count in this process, if the environment names a folder."""
    folder = os.environ.get(FOLDER)
    if folder is not None:
        _Counter(Path(folder) / str(os.getpid())).begin()


class _Counter:
    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self) -> None:
        nn.modules.module.register_module_forward_hook(self._note, with_kwargs=True, always_call=False)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        num_sequences = sequences_in(module, args, kwargs)
        if num_sequences is not None:
            with self._path.open("a") as file:
                file.write(f"{num_sequences}\n")


def sequences_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many a forward has; None if it is not one of a Helios transformer, a backend's own or this package's."""
    name = type(module).__name__
    if name == "HeliosTransformer":
        return len(args[0].grids)
    return len(kwargs["hidden_states"]) if name == "HeliosTransformer3DModel" else None
