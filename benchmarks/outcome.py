"""What a run of the benchmark leaves behind, in memory and as JSON, and whether it may be kept.

Knows no kernel, no model and no layout of a page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.environment import ROOT, Source, missing, source
from benchmarks.plan import Check, Measurement
from benchmarks.timing import Samples

BENCHMARK = "gpu"
RESULTS = ROOT / "benchmarks" / "results"
_DIGITS = 6

Status = Literal["measured", "failed", "unavailable", "cut"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOutcome:
    """One gate. reason: the exception that ended it; empty if it came to its end."""

    name: str
    checks: tuple[Check, ...]
    reason: str
    seconds: float

    @property
    def is_green(self) -> bool:
        return not self.reason and bool(self.checks) and all(check.is_green for check in self.checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionOutcome:
    """One section. clocks: minimum, median and maximum of what was sampled while it ran; notes: on what it left out."""

    name: str
    status: Status
    reason: str
    seconds: float
    clocks: Mapping[str, list[float]]
    notes: Mapping[str, str]
    measurements: tuple[Measurement, ...]


@dataclass(slots=True, kw_only=True)
class Result:
    """One run, complete or so far. date: UTC; num_gates: how many there are to pass; options: of the command."""

    name: str
    date: str
    rehearsal: bool
    source: Source
    environment: dict[str, Any]
    workload: dict[str, Any]
    options: dict[str, Any]
    num_gates: int
    gates: list[GateOutcome] = field(default_factory=list)
    sections: list[SectionOutcome] = field(default_factory=list)

    @property
    def is_green(self) -> bool:
        """Whether every gate has run and passed."""
        return len(self.gates) == self.num_gates > 0 and all(gate.is_green for gate in self.gates)

    @property
    def measurements(self) -> list[Measurement]:
        return [one for section in self.sections for one in section.measurements]


class RefusedError(Exception):
    """A result that may not be kept; the message names every reason."""


def refusals(result: Result) -> list[str]:
    """Why a result may not be kept; empty if it may."""
    reasons = ["it is a rehearsal"] if result.rehearsal else []
    reasons += ["the commit is not known: name it with --commit"] if result.source.commit is None else []
    reasons += ["the tree has changes that the commit lacks"] if result.source.dirty else []
    reasons += [f"the gate {gate.name} is red" for gate in result.gates if not gate.is_green]
    if len(result.gates) < result.num_gates:
        reasons.append(f"{len(result.gates)} of {result.num_gates} gates ran")
    reasons += [f"the version of {name} is missing" for name in missing(result.environment)]
    return reasons


def save(result: Result, folder: Path = RESULTS) -> Path:
    """Writes a result that may be kept, under its date, name, device and commit.

    Raises: RefusedError.
    """
    reasons = refusals(result)
    if reasons:
        raise RefusedError("; ".join(reasons))
    device = re.sub(r"[^a-z0-9]+", "-", str(result.environment["device"]).lower()).strip("-")
    path = folder / f"{result.date[:10]}_{result.name}_{device}_{str(result.source.commit)[:12]}.json"
    return write(result, path)


def keep(path: Path, folder: Path = RESULTS) -> Path:
    """`save` for a result that a copy of this tree left elsewhere.

    Raises: RefusedError, also where this tree is not the one that was measured.
    """
    result, here = read(path), source()
    if here.dirty or (here.commit, here.tree_sha256) != (result.source.commit, result.source.tree_sha256):
        raise RefusedError(f"this tree is not that of commit {result.source.commit} that was measured")
    return save(result, folder)


def write(result: Result, path: Path) -> Path:
    """As JSON, whatever it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(result), indent=1) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> Result:
    """The inverse of `write`."""
    return from_json(json.loads(path.read_text(encoding="utf-8")))


def to_json(result: Result) -> dict[str, Any]:
    return {
        "benchmark": BENCHMARK,
        "name": result.name,
        "date": result.date,
        "rehearsal": result.rehearsal,
        **asdict(result.source),
        **result.environment,
        "workload": result.workload,
        "options": result.options,
        "num_gates": result.num_gates,
        "gate": "green" if result.is_green else "red",
        "gates": [{**asdict(gate), "green": gate.is_green} for gate in result.gates],
        "sections": [
            {
                **{key: value for key, value in asdict(section).items() if key != "measurements"},
                "measurements": [_measurement_to_json(one) for one in section.measurements],
            }
            for section in result.sections
        ],
    }


def from_json(data: Mapping[str, Any]) -> Result:
    known = ("name", "date", "rehearsal", "workload", "options", "num_gates")
    ran = {key: data[key] for key in ("commit", "dirty", "tree_sha256")}
    others = {"benchmark", "gate", "gates", "sections", *known, *ran}
    return Result(
        **{key: data[key] for key in known},
        source=Source(**ran),
        environment={key: value for key, value in data.items() if key not in others},
        gates=[_gate_from_json(gate) for gate in data["gates"]],
        sections=[
            SectionOutcome(**{**section, "measurements": tuple(map(_measurement_from_json, section["measurements"]))})
            for section in data["sections"]
        ],
    )


def _gate_from_json(data: Mapping[str, Any]) -> GateOutcome:
    checks = tuple(Check(**check) for check in data["checks"])
    return GateOutcome(name=data["name"], checks=checks, reason=data["reason"], seconds=data["seconds"])


def _measurement_to_json(one: Measurement) -> dict[str, Any]:
    samples = one.samples
    return {
        "name": one.name,
        "unit": one.unit,
        "median": _short(samples.median),
        "p10": _short(samples.p10),
        "p90": _short(samples.p90),
        "count": samples.count,
        "gate": one.gate,
        "goal": one.goal,
        "limit": one.limit,
        "is_better_high": one.is_better_high,
        "details": _plain(one.details),
        "samples": [_short(value) for value in samples.values],
    }


def _measurement_from_json(data: Mapping[str, Any]) -> Measurement:
    derived = ("median", "p10", "p90", "count")
    fields = {key: value for key, value in data.items() if key not in derived}
    return Measurement(**{**fields, "samples": Samples(values=tuple(data["samples"]))})


def _plain(value: Any) -> Any:
    """What JSON can hold; anything else as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return _short(value)
    return value if isinstance(value, int | str | None) else str(value)


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
