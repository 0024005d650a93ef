"""What a checkpoint recommends in our own, optional entry of model_index.json.

Knows that entry's keys; knows no other. The reference skips keys that begin with an underscore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from helios_serve.errors import CheckpointError
from helios_serve.model_executor.json_keys import JsonKeys

RECOMMENDATIONS_KEY = "_helios_serve"
_SIZES, _STEPS, _PROMPT = "recommended_sizes", "default_steps", "example_prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendations:
    """sizes: (width, height) pairs in pixels, the default first. steps: of each stage, for requests that name none.
    prompt: one that shows what the checkpoint can do."""

    sizes: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    prompt: str | None

    @classmethod
    def from_json(cls, file: str, model_index: Mapping[str, object], default_steps: tuple[int, ...]) -> Recommendations:
        """Reads a parsed model_index.json, `file` in messages.

        Raises: CheckpointError for an entry that is not what it must be.
        """
        ours = model_index.get(RECOMMENDATIONS_KEY, {})
        if not isinstance(ours, Mapping):
            ours = {_SIZES: None}
        sizes = ours.get(_SIZES, [[640, 384]])
        if not isinstance(sizes, list) or not sizes:
            raise CheckpointError(f"{file}: {RECOMMENDATIONS_KEY} must hold {_SIZES}, a list of [width, height]")
        parsed = []
        for size in sizes:
            width, height = JsonKeys(file, {_SIZES: size}).integers(_SIZES, (), length=2)
            parsed.append((width, height))
        steps = JsonKeys(file, ours).integers(_STEPS, default_steps, length=len(default_steps))
        prompt = ours.get(_PROMPT)
        if not (prompt is None or isinstance(prompt, str)):
            raise CheckpointError(f"{file}: {_PROMPT} is {prompt!r}; it must be a string", param=_PROMPT)
        return cls(sizes=tuple(parsed), steps=steps, prompt=prompt)
