"""Predicts what sharing a forward between GPUs gains, by degree and stage, with the exchanges overlapped and not.

    python -m benchmarks.cp_model --out benchmarks/results/cp_model_h100

A model, not a measurement. Work and bytes are counted; rates are those of one GPU's kept result, and each stage is
scaled so that one rank takes exactly what was measured; links are assumed. One layer is played on two queues, one that
computes and one that sends, each in order. Not in it: the host, clocks that differ between GPUs, and ranks that wait
for each other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import outcome
from benchmarks.cp_plot import Line, Panel, draw
from benchmarks.cp_work import (
    ATTENTION_FLOOR_S,
    BF16_BYTES,
    FUSED_AFTER,
    FUSED_BEFORE,
    FUSED_FLOOR_S,
    HEAD_DIM,
    PRODUCT_FLOOR_S,
    STAGES,
    Anchor,
    Gpu,
    Layer,
    full_tile_flops,
    full_wave_flops,
    layers_of,
    read_anchor,
)
from benchmarks.environment import source
from helios_serve.engine.step_cost import ModelShape
from helios_serve.types import SamplingParams

MARK = "model, not a measurement"
DEGREES = (1, 2, 4, 8)
SCHEMES = ("ulysses", "ring")
GROUPS = (1, 2, 4, 5, 10)
"""Groups of heads that an overlapped exchange may be cut into, where they divide the heads of a rank."""
PATCH_VALUES = 64
SHAPE = ModelShape()
PARAMS = SamplingParams(width=640, height=384, num_frames=33, fps=24.0, seed=0, steps=(1, 1, 1), guidance_scale=1.0)
_OTHER_S = 0.4e-3  # embeddings, positions and time steps of a forward, the same on all ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Between GPUs of one node: assumed, bytes per second of a rank and seconds of a call."""

    exchange_bytes_per_s: float = 300e9
    exchange_latency_s: float = 20e-6
    ring_bytes_per_s: float = 350e9
    ring_latency_s: float = 10e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Seconds on one of the two queues, once the tasks of the numbers `after` have ended. kind: products, attention,
    fused, copies or links."""

    kind: str
    seconds: float
    after: tuple[int, ...] = ()
    num_bytes: float = 0.0

    @property
    def queue(self) -> str:
        return "links" if self.kind == "links" else "compute"


def end_s(tasks: Sequence[Task]) -> float:
    """When the last task ends, if each queue takes its tasks in the order given."""
    free = {"compute": 0.0, "links": 0.0}
    ends: list[float] = []
    for task in tasks:
        start = max([free[task.queue], *(ends[number] for number in task.after)])
        ends.append(start + task.seconds)
        free[task.queue] = ends[-1]
    return max(ends)


@dataclass(slots=True, kw_only=True)
class Play:
    """Tasks as they are written down."""

    gpu: Gpu
    links: Links
    factor: float
    tasks: list[Task] = field(default_factory=list)

    def compute(self, kind: str, seconds: float, *after: int) -> int:
        return self._add(Task(kind=kind, seconds=seconds * self.factor, after=after))

    def copy(self, num_bytes: float, *after: int) -> int:
        return self.compute("copies", num_bytes / self.gpu.copy_bytes_per_s, *after)

    def exchange(self, num_bytes: float, *after: int) -> int:
        seconds = self.links.exchange_latency_s + num_bytes / self.links.exchange_bytes_per_s
        return self._add(Task(kind="links", seconds=seconds, after=after, num_bytes=num_bytes))

    def rotate(self, num_bytes: float, *after: int) -> int:
        seconds = self.links.ring_latency_s + num_bytes / self.links.ring_bytes_per_s
        return self._add(Task(kind="links", seconds=seconds, after=after, num_bytes=num_bytes))

    def before(self, layer: Layer) -> int:
        self.compute("products", sum(map(self.gpu.product_s, layer.products_before())))
        return self.compute("fused", self.gpu.fused_s(layer.fused_bytes_before(), FUSED_BEFORE))

    def after(self, layer: Layer, *after: int) -> None:
        self.compute("products", sum(map(self.gpu.product_s, layer.products_after())), *after)
        self.compute("attention", self.gpu.attention_s(layer.crossed()))
        self.compute("fused", self.gpu.fused_s(layer.fused_bytes_after(), FUSED_AFTER))

    def _add(self, task: Task) -> int:
        self.tasks.append(task)
        return len(self.tasks) - 1


Way = Callable[[Play, Layer], None]
"""Writes down the tasks of one layer."""


def alone(play: Play, layer: Layer) -> None:
    """One rank."""
    heads = layer.shape.dim // HEAD_DIM
    play.before(layer)
    play.compute("attention", play.gpu.attention_s((layer.total_kept, layer.total, heads)))
    play.after(layer)


def ulysses(play: Play, layer: Layer, groups: int) -> None:
    """q, k and v in one exchange, the result in another, each in so many groups of heads: while one group is attended
    to, the next is on its way. What travels is copied into blocks, and out of them, on both sides."""
    heads, share = layer.shape.dim // HEAD_DIM // layer.degree, (layer.degree - 1) / layer.degree
    incoming = (layer.tensor_bytes(layer.kept) + 2 * layer.tensor_bytes(layer.rows)) / groups
    outgoing = layer.tensor_bytes(layer.kept) / groups
    attend_s = play.gpu.attention_s((layer.total_kept, layer.total, heads // groups))
    play.before(layer)
    packed = [play.copy(2 * incoming) for _ in range(groups)]
    arrived = [play.exchange(share * incoming, number) for number in packed]
    sent = []
    for number in arrived:
        play.copy(2 * incoming, number)
        play.compute("attention", attend_s)
        sent.append(play.exchange(share * outgoing, play.copy(2 * outgoing)))
    play.copy(2 * outgoing * groups, *sent)
    play.after(layer)


def ring(play: Play, layer: Layer, *, is_overlapped: bool) -> None:
    """Keys and values go around; a block may travel while another is attended to, but not into one in use. Partial
    results are merged in float32."""
    heads, block = layer.shape.dim // HEAD_DIM, 2 * layer.tensor_bytes(layer.rows)
    attend_s = play.gpu.attention_s((layer.kept, layer.rows, heads))
    play.before(layer)
    attended = play.copy(2 * block)
    arrived: tuple[int, ...] = ()
    for turn in range(layer.degree):
        is_sent = turn < layer.degree - 1
        coming = (play.rotate(block, attended, *arrived),) if is_sent else ()
        attended = play.compute("attention", attend_s, *(arrived if is_overlapped else (*arrived, *coming)))
        if turn:
            merged = play.copy(5 * layer.tensor_bytes(layer.kept))
            attended = attended if is_overlapped else merged
        arrived = coming
    play.copy(3 * layer.tensor_bytes(layer.kept))
    play.after(layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Of one forward. parts_ms: compute by kind; links_ms: how long the links are busy, hidden or not; exposed_ms: the
    time that nothing is computed. groups: of heads, where an exchange is cut."""

    scheme: str
    degree: int
    stage: int
    is_overlapped: bool
    groups: int
    forward_ms: float
    speed_up: float
    parts_ms: Mapping[str, float]
    links_ms: float
    exposed_ms: float
    sent_mb: float

    @property
    def efficiency(self) -> float:
        return self.speed_up / self.degree


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A GPU, its links, and what is computed."""

    gpu: Gpu
    links: Links = Links()
    shape: ModelShape = SHAPE
    params: SamplingParams = PARAMS

    def predict(self, scheme: str, degree: int, stage: int, *, is_overlapped: bool) -> Prediction:
        """A forward of one sequence. An overlapped exchange is cut into the groups that make it fastest."""
        ways: dict[int, Way] = {1: alone}
        if degree > 1 and scheme == "ring":
            ways = {1: partial(ring, is_overlapped=is_overlapped)}
        elif degree > 1:
            heads = self.shape.dim // HEAD_DIM // degree
            counts = [count for count in GROUPS if heads % count == 0] if is_overlapped else [1]
            ways = {count: partial(ulysses, groups=count) for count in counts}
        found = [self._forward(scheme, degree, stage, is_overlapped, groups, way) for groups, way in ways.items()]
        return min(found, key=lambda prediction: prediction.forward_ms)

    def alone_s(self, stage: int) -> float:
        """A forward on one rank."""
        plays = self._plays(1, stage, alone)
        return self._other_s(stage) + sum(count * end_s(play.tasks) for count, play in plays)

    def _forward(self, scheme: str, degree: int, stage: int, is_overlapped: bool, groups: int, way: Way) -> Prediction:
        plays = self._plays(degree, stage, way)
        totals: dict[str, float] = {"other": self._other_s(stage)}
        for count, play in plays:
            for task in play.tasks:
                totals[task.kind] = totals.get(task.kind, 0.0) + count * task.seconds
        links_s = totals.pop("links", 0.0)
        played_s = sum(count * end_s(play.tasks) for count, play in plays)
        gathered = self._gathered(degree, stage)
        forward_s = totals["other"] + played_s + gathered.seconds
        sent = sum(count * sum(task.num_bytes for task in play.tasks) for count, play in plays)
        return Prediction(
            scheme=scheme,
            degree=degree,
            stage=stage,
            is_overlapped=is_overlapped,
            groups=groups,
            forward_ms=1e3 * forward_s,
            speed_up=self.alone_s(stage) / forward_s,
            parts_ms={kind: 1e3 * seconds for kind, seconds in totals.items()},
            links_ms=1e3 * (links_s + gathered.seconds),
            exposed_ms=1e3 * max(0.0, round(forward_s - sum(totals.values()), 12)),  # Python 3.12 sums more exactly
            sent_mb=(sent + gathered.num_bytes) / 1e6,
        )

    def _plays(self, degree: int, stage: int, way: Way) -> list[tuple[int, Play]]:
        plays = []
        for count, layer in zip(
            (self.shape.num_layers - 1, 1), layers_of(self.shape, stage, degree, self.params), strict=True
        ):
            play = Play(gpu=self.gpu, links=self.links, factor=self.gpu.factors[stage])
            way(play, layer)
            plays.append((count, play))
        return plays

    def _other_s(self, stage: int) -> float:
        return _OTHER_S * self.gpu.factors[stage]

    def _gathered(self, degree: int, stage: int) -> Task:
        """The flow of all current tokens, which every rank needs in the end."""
        _, last = layers_of(self.shape, stage, degree, self.params)
        num_bytes = BF16_BYTES * PATCH_VALUES * last.noisy * (degree - 1)
        seconds = self.links.exchange_latency_s + num_bytes / self.links.exchange_bytes_per_s if degree > 1 else 0.0
        return Task(kind="links", seconds=seconds, num_bytes=num_bytes)


def gpu_of(anchor: Anchor, shape: ModelShape = SHAPE, params: SamplingParams = PARAMS) -> Gpu:
    """The rates at which the counted work of the chunk takes what its kernels took, then the factors of the stages."""
    layers = [
        layer
        for stage in STAGES
        for count, layer in zip((shape.num_layers - 1, 1), layers_of(shape, stage, 1, params), strict=True)
        for _ in range(count)
    ]
    products = [one for layer in layers for one in (*layer.products_before(), *layer.products_after())]
    attentions = [(layer.total_kept, layer.total, shape.dim // HEAD_DIM) for layer in layers]
    attentions += [layer.crossed() for layer in layers]
    fused_bytes = sum(layer.fused_bytes_before() + layer.fused_bytes_after() for layer in layers)
    measured_s = {kind: ms / 1e3 for kind, ms in anchor.kernel_ms.items()}
    sms = anchor.num_sms
    gpu = Gpu(
        product_flops_per_s=sum(full_tile_flops(one, sms) for one in products)
        / (measured_s["gemm"] - len(products) * PRODUCT_FLOOR_S),
        attention_flops_per_s=sum(full_wave_flops(one, sms) for one in attentions)
        / (measured_s["attention"] - len(attentions) * ATTENTION_FLOOR_S),
        fused_bytes_per_s=fused_bytes
        / (measured_s["fused"] - (FUSED_BEFORE + FUSED_AFTER) * len(layers) * FUSED_FLOOR_S),
        copy_bytes_per_s=anchor.copy_gb_per_s * 1e9,
        num_sms=sms,
    )
    plain = Model(gpu=gpu, shape=shape, params=params)
    return replace(gpu, factors=tuple(anchor.forward_ms[s] / 1e3 / plain.alone_s(s) for s in STAGES))


def run(anchor: Anchor) -> dict[str, Any]:
    """The result file: what was assumed, and every degree, scheme and stage."""
    model = Model(gpu=gpu_of(anchor))
    forwards, chunks = [], []
    for scheme, degree, is_overlapped in product(SCHEMES, DEGREES, (False, True)):
        found = [model.predict(scheme, degree, stage, is_overlapped=is_overlapped) for stage in STAGES]
        forwards += [asdict(one) for one in found]
        chunk_ms = sum(one.forward_ms for one in found)
        speed_up = 1e3 * sum(map(model.alone_s, STAGES)) / chunk_ms
        same = {"scheme": scheme, "degree": degree, "is_overlapped": is_overlapped}
        chunks.append({**same, "forwards_ms": chunk_ms, "speed_up": speed_up})
    return {
        "benchmark": "cp_model",
        "mark": MARK,
        **asdict(source()),
        "anchor": asdict(anchor),
        "gpu": asdict(model.gpu),
        "links_assumed": asdict(model.links),
        "workload": {**asdict(SHAPE), "width": PARAMS.width, "height": PARAMS.height, "steps": PARAMS.steps},
        "forwards": forwards,
        "chunks": chunks,
    }


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines for people."""
    lines = [f"{MARK}: anchored on {result['anchor']['file']}"]
    for chunk in result["chunks"]:
        key = ("scheme", "degree", "is_overlapped")
        found = [one for one in result["forwards"] if all(one[name] == chunk[name] for name in key)]
        stages = "  ".join(f"{one['forward_ms']:7.1f} ms {one['speed_up']:5.2f}x" for one in found)
        overlap = "overlapped" if chunk["is_overlapped"] else "one by one"
        lines.append(f"{chunk['scheme']:8} {chunk['degree']}  {overlap}  {stages}  chunk {chunk['speed_up']:5.2f}x")
    return lines


def picture(result: Mapping[str, Any]) -> str:
    """Speed-up against degree, a panel for each scheme, as SVG."""
    panels = []
    for scheme in SCHEMES:
        lines = []
        for stage, is_overlapped in product(STAGES, (True, False)):
            points = [
                (one["degree"], one["speed_up"])
                for one in result["forwards"]
                if (one["scheme"], one["stage"], one["is_overlapped"]) == (scheme, stage, is_overlapped)
            ]
            lines.append(Line(name=f"stage {stage}", points=points, colour=stage, is_dashed=not is_overlapped))
        panels.append(Panel(title=scheme, lines=lines))
    device = result["anchor"]["device"]
    return draw(f"Speed-up of a 14B forward at 640x384, one rank as measured on {device}", MARK, panels)


def newest_anchor(folder: Path = outcome.RESULTS) -> Path:
    """The last kept result of that name on an H100."""
    return sorted(folder.glob("*first*h100*.json"))[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict speed-ups by context parallelism; a model.")
    parser.add_argument("--anchor", type=Path, default=None, help="a kept result of one GPU; default: the newest")
    parser.add_argument("--out", type=Path, default=None, help="write PATH.json and PATH.svg")
    options = parser.parse_args()
    result = run(read_anchor(newest_anchor() if options.anchor is None else options.anchor))
    print("\n".join(table(result)))
    if options.out is not None:
        options.out.with_suffix(".json").write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".svg").write_text(picture(result), encoding="utf-8")


def rounded(value: Any) -> Any:
    """Six digits of every number."""
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
