"""Times every backend of attention that is here, and every candidate of tiles, on the CUDA device at hand.

    python -m helios_serve.kernels.tune_attention [--json FILE] [--write] [--budget-s 60]

`--write` puts the order of the backends and the best tiles into `tuned.json` under the device's name. Knows the 14B
model's heads and lengths; checks no result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helios_serve.kernels.attention import Segments, attend, attention_scale, obstacles
from helios_serve.kernels.attention.torch_attention import empty_results
from helios_serve.kernels.attention.triton_attention import CANDIDATES, Tiles, head_block_of, launch_attend
from helios_serve.kernels.cases_attention import SERVED_LENGTHS
from helios_serve.kernels.launch import TUNED, read_tuned

NUM_HEADS, HEAD_DIM = 40, 128
LENGTHS = (*((length,) for length in SERVED_LENGTHS), *((length, length) for length in SERVED_LENGTHS[:2]))
"""Tokens of each sequence of a pack."""
TOO_SLOW = ("cpu", "math")
NUM_SETS, NUM_WARM_UPS, NUM_CALLS = 3, 2, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One backend, or the Triton kernel with tiles of its own, on one pack."""

    name: str
    lengths: tuple[int, ...]
    tiles: Tiles | None
    milliseconds: float

    @property
    def tflops(self) -> float:
        return 4 * NUM_HEADS * HEAD_DIM * sum(length**2 for length in self.lengths) / self.milliseconds / 1e9


def measure(device: torch.device, deadline: float) -> Iterator[Timing]:
    """Backends first, then tiles; stops at `deadline`, a value of the monotonic clock."""
    for lengths in LENGTHS:
        bounds = (0, *accumulate(lengths))
        segments = Segments(cu_q=bounds, cu_k=bounds, scale=attention_scale(HEAD_DIM))
        sets = _projections(bounds[-1], device)
        can = [name for name, obstacle in obstacles(sets[0][0], segments).items() if obstacle is None]
        for name in can:
            if name in TOO_SLOW or time.monotonic() > deadline:
                continue
            named = Segments(cu_q=bounds, cu_k=bounds, scale=segments.scale, backend=name)
            taken = _milliseconds(lambda q, k, v, named=named: attend(q, k, v, named), sets)
            yield Timing(name=name, lengths=lengths, tiles=None, milliseconds=taken)
        for tiles in CANDIDATES if "triton" in can and torch.cuda.get_device_capability(device)[0] >= 9 else ():
            if time.monotonic() > deadline:
                continue
            taken = _milliseconds(
                lambda q, k, v, tiles=tiles, segments=segments: launch_attend(
                    q, k, v, segments, *empty_results(q), tiles
                ),
                sets,
            )
            yield Timing(name="triton", lengths=lengths, tiles=tiles, milliseconds=taken)


def _projections(num_tokens: int, device: torch.device) -> list[tuple[Tensor, ...]]:
    """q, k and v as the fused projection leaves them."""
    shape = (num_tokens, 3, NUM_HEADS, HEAD_DIM)
    return [torch.randn(shape, dtype=torch.bfloat16, device=device).unbind(1) for _ in range(NUM_SETS)]


def _milliseconds(call: Callable[..., object], sets: Sequence[tuple[Tensor, ...]]) -> float:
    """Median of single calls."""
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(NUM_CALLS)]
    for index in range(NUM_WARM_UPS):
        call(*sets[index % len(sets)])
    torch.cuda.synchronize()
    for index, (start, end) in enumerate(events):
        start.record()
        call(*sets[index % len(sets)])
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def tables_of(timings: Sequence[Timing]) -> dict[str, Any]:
    """The tables `attention` and `attention_tiles`: what takes least time over all lengths goes first. What was not
    timed at every length that others were is left out."""
    tables: dict[str, Any] = {}
    for kind, is_packed in (("dense", False), ("packed", True)):
        chosen = [one for one in timings if one.tiles is None and (len(one.lengths) > 1) == is_packed]
        order = _fastest_first([(one.name, one.milliseconds) for one in chosen])
        if order:
            tables.setdefault("attention", {})[kind] = order
    tiles = _fastest_first([(one.tiles, one.milliseconds) for one in timings if one.tiles is not None])
    if tiles:
        tables["attention_tiles"] = {str(head_block_of(HEAD_DIM)): asdict(tiles[0])}
    return tables


def _fastest_first(found: Sequence[tuple[Any, float]]) -> list[Any]:
    taken: dict[Any, list[float]] = defaultdict(list)
    for key, milliseconds in found:
        taken[key].append(milliseconds)
    most = max((len(times) for times in taken.values()), default=0)
    whole = {key: sum(times) for key, times in taken.items() if len(times) == most}
    return sorted(whole, key=whole.__getitem__)


def report(timings: Sequence[Timing]) -> str:
    """A line for each."""
    return "\n".join(
        f"{one.name:11} {'+'.join(map(str, one.lengths)):11} {one.milliseconds:8.3f} ms {one.tflops:6.0f} TFLOP/s"
        + ("" if one.tiles is None else "  {queries}x{keys} {num_warps}w {num_stages}s".format(**asdict(one.tiles)))
        for one in timings
    )


def main() -> None:
    """The command. Raises SystemExit on a machine without a CUDA device."""
    parser = argparse.ArgumentParser(description="Time every backend of attention and every candidate of tiles.")
    parser.add_argument("--json", type=Path, help="file for all timings and the tables")
    parser.add_argument("--write", action="store_true", help="put the tables into tuned.json")
    parser.add_argument("--budget-s", type=float, default=60.0, help="begin no measurement after so many seconds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_attention: PyTorch sees no CUDA device here; run it on the device that is to be tuned")
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.inference_mode():
        timings = list(measure(device, time.monotonic() + options.budget_s))
    found, name = tables_of(timings), torch.cuda.get_device_name(device)
    print(report(timings))
    if options.json is not None:
        measured = {"device": name, "torch": torch.__version__, "tuned": {name: found}}
        content = {**measured, "timings": [{**asdict(one), "tflops": round(one.tflops, 1)} for one in timings]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.write:
        tables = {device: dict(known) for device, known in read_tuned().items()}
        tables[name] = {**tables.get(name, {}), **found}
        TUNED.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
