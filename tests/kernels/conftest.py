"""Triton's interpreter, made fast enough for kernels that are built from functions."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _language_is_patched_once_per_launch() -> Iterator[None]:
    """The interpreter replaces Triton's language again in each call of a function, which takes longer than the call. It
    replaces what the function's module can see: a launch does so for the language's own functions, which see its core,
    too."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.language import core
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang

    def patch_lang_and_core(kernel: Any) -> Any:
        kernel.__globals__.setdefault("_language_core", core)
        return patch_lang(kernel)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_lang_and_core)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
