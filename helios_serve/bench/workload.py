"""What is asked for: kinds of requests, their shares in a mix, and the requests of a run from a seed.

Knows the fields of a request; sends nothing.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from helios_serve.errors import InvalidRequestError
from helios_serve.types import ServiceClass, Task

Via = Literal["sse", "raw", "grpc", "jobs"]
"""How an answer comes: server-sent events, live fMP4, a call of gRPC, or a job that is polled and downloaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Requests that differ in nothing but prompt and seed. None: the server's default."""

    service_class: ServiceClass = "realtime"
    via: Via = "sse"
    task: Task = "t2v"
    num_frames: int = 132
    size: str | None = None
    steps: tuple[int, ...] | None = None
    fps: float = 24.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self.num_frames >= 1, f"frames {self.num_frames}: must be at least 1", "frames")
        _check(1 <= self.fps <= 60, f"fps {self.fps:g}: must be 1 to 60", "fps")
        _check(0 < self.weight < math.inf, f"weight {self.weight:g}: must be above 0", "weight")
        _check(self.size is None or _SIZE.fullmatch(self.size) is not None, f"size {self.size}: must be WxH", "size")

    @property
    def name(self) -> str:
        """Such as `realtime t2v 132f 640x384 2,2,2 sse`; parts that the server chooses are left out."""
        steps = None if self.steps is None else ",".join(map(str, self.steps))
        parts = (self.service_class, self.task, f"{self.num_frames}f", self.size, steps, self.via)
        return " ".join(part for part in parts if part is not None)

    @property
    def is_stream(self) -> bool:
        return self.via != "jobs"


_SIZE = re.compile(r"[1-9]\d*x[1-9]\d*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """`num_frames` where the file gives a length to each prompt."""

    text: str
    num_frames: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One request of a run, before it is sent."""

    index: int
    kind: Kind
    prompt: str
    seed: int


def parse_kind(text: str, default: Kind) -> Kind:
    """Reads `weight=3 class=offline task=i2v frames=66 size=640x384 steps=2,2,2 fps=24 via=jobs`, in any order.

    What is not given is `default`'s, but that of class and via the one decides the other: streams are realtime and jobs
    offline, unless both are given.

    Raises: InvalidRequestError for an unknown key or a value that cannot be read.
    """
    given: dict[str, str] = {}
    for part in text.split():
        key, equals, value = part.partition("=")
        _check(
            bool(equals) and key in _READERS, f"mix {part!r}: must be one of {', '.join(_READERS)}, as key=value", "mix"
        )
        given[key] = value
    kind = replace(default, **{_FIELDS[key]: _read(key, value) for key, value in given.items()})
    if ("class" in given) == ("via" in given) or kind.is_stream == (kind.service_class == "realtime"):
        return kind
    if "class" in given:
        return replace(kind, via=usual_via(kind.service_class))
    return replace(kind, service_class=usual_class(kind.via))


def usual_via(service_class: ServiceClass) -> Via:
    return "sse" if service_class == "realtime" else "jobs"


def usual_class(via: Via) -> ServiceClass:
    """What the server takes a request for that does not say."""
    return "offline" if via == "jobs" else "realtime"


def plan_requests(kinds: Sequence[Kind], prompts: Sequence[Prompt], count: int, seed: int) -> list[Planned]:
    """`count` requests: kinds drawn by their weights, prompts in order, seeds that differ; equal for equal seeds."""
    draw = random.Random(seed)
    chosen = draw.choices(kinds, [kind.weight for kind in kinds], k=count)
    return _planned(chosen, prompts, draw.randrange(2**31))


def plan_each(kinds: Sequence[Kind], prompts: Sequence[Prompt], rounds: int, seed: int) -> list[Planned]:
    """`rounds` requests of each kind, in turn."""
    return _planned([*kinds] * rounds, prompts, random.Random(seed).randrange(2**31))


def kinds_asked(kinds: Sequence[Kind], prompts: Sequence[Prompt]) -> set[Kind]:
    """All that `plan_requests` may draw."""
    return {_fitted(kind, prompt) for kind in kinds for prompt in prompts}


def _fitted(kind: Kind, prompt: Prompt) -> Kind:
    return kind if prompt.num_frames is None else replace(kind, num_frames=prompt.num_frames)


def _planned(chosen: Sequence[Kind], prompts: Sequence[Prompt], first_seed: int) -> list[Planned]:
    planned = []
    for index, kind in enumerate(chosen):
        prompt = prompts[index % len(prompts)]
        planned.append(Planned(index=index, kind=_fitted(kind, prompt), prompt=prompt.text, seed=first_seed + index))
    return planned


def parse_steps(text: str) -> tuple[int, ...]:
    """`2,2,2` -> (2, 2, 2). Raises InvalidRequestError."""
    steps: tuple[int, ...] = _read("steps", text)
    return steps


def _read(key: str, text: str) -> Any:
    """The value in the type of its field."""
    try:
        return _READERS[key](text)
    except ValueError:
        raise InvalidRequestError(f"{key} {text!r}: must be {_FORMS[key]}", param=key) from None


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return read


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_READERS: Mapping[str, Callable[[str], Any]] = {
    "weight": float,
    "class": _one_of(get_args(ServiceClass)),
    "via": _one_of(get_args(Via)),
    "task": _one_of(get_args(Task)),
    "frames": int,
    "size": str,
    "steps": _whole_numbers,
    "fps": float,
}
_FIELDS: Mapping[str, str] = {key: key for key in _READERS} | {"class": "service_class", "frames": "num_frames"}
_FORMS: Mapping[str, str] = {
    "weight": "a number",
    "class": " or ".join(get_args(ServiceClass)),
    "via": ", ".join(get_args(Via)),
    "task": ", ".join(get_args(Task)),
    "frames": "a whole number",
    "size": "WxH",
    "steps": "whole numbers, one per stage, such as 2,2,2",
    "fps": "a number",
}


def _check(is_valid: bool, message: str, param: str) -> None:
    if not is_valid:
        raise InvalidRequestError(message, param=param)
