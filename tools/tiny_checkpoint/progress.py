"""What both trainings share: options, averaged weights, a log of losses, and state that outlives an interruption.

Knows files and steps; knows no model.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tools.tiny_checkpoint.presets import PRESETS, Preset
from tools.tiny_checkpoint.team import ALONE, Team

_LOG_EVERY_STEPS = 20
_SAVE_EVERY_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where, on what and for how long a training runs.

    max_s: seconds after which it must have ended, those before an interruption included; the learning rate falls with
    the time then, and losses depend on the machine's speed. stop_after: a step to stop at as if interrupted.
    is_compiled: see `batched_flow`. num_processes: that share the transformer's training, see `team`.
    has_new_vae: whether the VAE is trained too, rather than the kept one used. begins_with: a checkpoint of the same
    sizes whose text encoder stays and whose transformer is trained further.
    """

    work: Path
    device: torch.device
    seed: int
    max_s: float | None = None
    stop_after: int | None = None
    is_compiled: bool = False
    num_processes: int = 1
    has_new_vae: bool = False
    begins_with: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a training command was told."""

    preset: Preset
    run: Run


def options(purpose: str) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="where state, latents and logs are kept")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="sizes and numbers of steps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="end after so many seconds if the steps are not done by then")
    parser.add_argument("--stop-after", type=int, help="stop at this step as if interrupted")
    parser.add_argument(
        "--compile", action="store_true", help="fuse the transformer's small operations; minutes at first"
    )
    parser.add_argument("--processes", type=int, default=1, help="that share the transformer's training")
    parser.add_argument("--new-vae", action="store_true", help="train the VAE too, rather than use the kept one")
    parser.add_argument("--begin-with", type=Path, help="train this checkpoint's transformer further")
    told = parser.parse_args()
    told.work.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True  # the same few shapes all the time
    run = Run(
        work=told.work,
        device=torch.device(told.device),
        seed=told.seed,
        max_s=told.seconds,
        stop_after=told.stop_after,
        is_compiled=told.compile,
        num_processes=told.processes,
        has_new_vae=told.new_vae,
        begins_with=told.begin_with,
    )
    return Options(preset=PRESETS[told.preset], run=run)


def reduced_precision(device: torch.device) -> torch.autocast:
    """Matrix products and convolutions in bfloat16, where the device computes with it."""
    computes = torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else True
    return torch.autocast(device.type, torch.bfloat16, enabled=computes)


class Stateful(Protocol):
    """What can be saved and restored, as modules and optimisers can."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


class Average:
    """An exponential average of a module's parameters; it warms up so that the random start is soon forgotten."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._num_updates = 0
        self.values = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes in the module's present parameters."""
        self._num_updates += 1
        weight = 1 - min(self._decay, self._num_updates / (self._num_updates + 10))
        present = dict(module.named_parameters())
        torch._foreach_lerp_([*self.values.values()], [present[name].detach() for name in self.values], weight)

    @torch.no_grad()
    def write_to(self, module: nn.Module) -> None:
        """Overwrites the module's parameters."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.values[name])

    def state_dict(self) -> dict[str, Any]:
        """See Stateful."""
        return {"num_updates": self._num_updates, "values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See Stateful."""
        self._num_updates = state_dict["num_updates"]
        for name, value in self.values.items():
            value.copy_(state_dict["values"][name])


class Progress:
    """Counts steps, logs losses beside the state's file, and saves all `parts` every few minutes and at the end; of a
    team the first process does."""

    def __init__(self, run: Run, file: str, num_steps: int, parts: Mapping[str, Stateful], team: Team = ALONE) -> None:
        self._team = team
        self._run = run
        self._file = run.work / file
        self._log = self._file.with_suffix(".jsonl")
        self._num_steps = num_steps
        self._parts = parts
        self._recorded: dict[str, list[Tensor]] = {}
        self._num_recorded = 0
        self._next_step, self._spent_s = 0, 0.0
        if self._file.is_file():
            saved = torch.load(self._file, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(saved["parts"][name])
            self._next_step, self._spent_s = saved["next_step"], saved["spent_s"]
        self._started_s = self._window_s = self._saved_s = time.monotonic()
        self.share = self._measure_share()
        """How much of the training is done, by steps or by time: 0 to 1."""

    @property
    def steps_left(self) -> range:
        """The steps from here to the end, or to where the run is to stop."""
        stop = self._num_steps if self._run.stop_after is None else min(self._num_steps, self._run.stop_after)
        return range(self._next_step, stop)

    def _measure_share(self) -> float:
        by_time = 0.0 if self._run.max_s is None else self._total_s / self._run.max_s
        return self._team.agree(max(self._next_step / self._num_steps, by_time))

    def steps(self) -> Iterator[int]:
        """`steps_left`, for as long as there is time; saves while it goes and when it is through."""
        for step in self.steps_left:
            self.share = self._measure_share()
            if self.share >= 1:
                break
            yield step
            self._next_step = step + 1
            if time.monotonic() - self._saved_s > _SAVE_EVERY_S:
                self._save()
        self._save()

    @property
    def _total_s(self) -> float:
        return self._spent_s + time.monotonic() - self._started_s

    def record(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Adds the losses of a step to the log, as means over a few steps."""
        if self._team.rank > 0:
            return
        for name, loss in losses.items():
            self._recorded.setdefault(name, []).append(loss.detach())
        self._num_recorded += 1
        if (step + 1) % _LOG_EVERY_STEPS:
            return
        now = time.monotonic()
        means = {name: round(float(torch.stack(values).mean()), 6) for name, values in self._recorded.items()}
        line = {"step": step + 1, **means, "step_ms": round(1000 * (now - self._window_s) / self._num_recorded, 1)}
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        self._recorded, self._num_recorded, self._window_s = {}, 0, now

    def _save(self) -> None:
        if self._team.rank > 0:
            return
        scratch = self._file.with_suffix(".part")
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        state = {"next_step": self._next_step, "spent_s": self._total_s, "parts": parts}
        torch.save(state, scratch)
        os.replace(scratch, self._file)
        self._saved_s = time.monotonic()
