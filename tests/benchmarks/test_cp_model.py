"""The model of context parallelism: two queues and one case added up by hand, bytes against the published table, one
rank against what was measured, and what is kept."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from benchmarks import cp_model
from benchmarks.cp_model import MARK, PARAMS, SHAPE, Links, Model, Play, Task, end_s, gpu_of, ring, ulysses
from benchmarks.cp_work import Gpu, Layer, full_tile_flops, full_wave_flops, layers_of, read_anchor
from benchmarks.outcome import RESULTS
from helios_serve.engine.step_cost import ModelShape

KEPT = RESULTS / "cp_model_h100.json"
FAST = Gpu(
    product_flops_per_s=math.inf,
    attention_flops_per_s=math.inf,
    fused_bytes_per_s=math.inf,
    copy_bytes_per_s=math.inf,
)
"""Computes in no time, so that launches and links remain."""


def anchored() -> Model:
    kept = json.loads(KEPT.read_text())
    return Model(gpu=gpu_of(read_anchor(RESULTS / kept["anchor"]["file"])))


def play_of(layer: Layer, gpu: Gpu = FAST) -> Play:
    return Play(gpu=gpu, links=Links(), factor=1.0)


def usual(degree: int, stage: int) -> Layer:
    return layers_of(SHAPE, stage, degree, PARAMS)[0]


# The timeline


def compute(seconds: float, *after: int) -> Task:
    return Task(kind="products", seconds=seconds, after=after)


def link(seconds: float, *after: int) -> Task:
    return Task(kind="links", seconds=seconds, after=after)


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ([compute(3), link(2, 0), compute(1, 1)], 6),  # nothing to hide behind
        ([compute(3), link(2, 0), compute(4), compute(1, 1)], 8),  # 3, 3 to 5 while 3 to 7, 7 to 8
        ([compute(3), link(9, 0), compute(4), compute(1, 1)], 13),  # the link is longer: 3 to 12, then 1
        ([link(2), link(2), compute(3, 0), compute(3, 1)], 8),  # two groups: 2, 4 while 5, 8
        ([compute(1, 1), link(5)], None),
    ],
)
def test_two_queues_by_hand(tasks: list[Task], expected: float | None) -> None:
    if expected is None:  # nobody waits for what is written down later
        with pytest.raises(IndexError):
            end_s(tasks)
    else:
        assert end_s(tasks) == expected


def test_a_forward_of_two_layers_added_up_by_hand() -> None:
    """Stage 0 on two ranks, exchanges one by one: 1470 rows of 5120 each, of which 270 are current; 2 us a product, 3
    an attention, 2.5 a fused operator; 20 us and 300 GB/s an exchange."""
    tensor_us = 2 * 1470 * 5120 / 2 / 300e9 * 1e6  # half of q leaves: 25.088
    current_us = 2 * 270 * 5120 / 2 / 300e9 * 1e6  # 4.608
    first = 6 * 2 + 2 * 3 + 9 * 2.5 + 2 * 20 + 4 * tensor_us  # 180.852
    last = 7 * 2 + 2 * 3 + 9 * 2.5 + 2 * 20 + 2 * tensor_us + 2 * current_us  # 141.892
    flow = 20 + 2 * 64 * 270 / 300e9 * 1e6  # 20.1152
    model = Model(gpu=FAST, shape=ModelShape(num_layers=2))
    found = model.predict("ulysses", 2, 0, is_overlapped=False)
    assert found.forward_ms == pytest.approx((first + last + flow + 400) / 1e3, rel=1e-12)
    assert found.forward_ms == pytest.approx(0.7428592, rel=1e-9)
    sent_us = 80 + 6 * tensor_us + 2 * current_us + flow
    assert [found.links_ms, found.exposed_ms] == pytest.approx([sent_us / 1e3] * 2)
    assert found.sent_mb == pytest.approx((4 * 7.5264e6 + 2 * 7.5264e6 + 2 * 1.3824e6 + 34560) / 1e6)
    assert found.speed_up == pytest.approx((6 * 2 + 7 * 2 + 2 * (6 + 22.5) + 400) / 742.8592)


def test_groups_hide_what_is_computed_meanwhile_by_hand() -> None:
    """Four ranks of stage 2, two groups: the second group arrives and the first result leaves under attention."""
    layer = usual(4, 2)
    play = play_of(layer)
    ulysses(play, layer, 2)
    tensor = 2 * 2760 * 5120  # bytes of q
    incoming, outgoing = 20 + 3 * tensor * 0.75 / 2 / 300e3, 20 + tensor * 0.75 / 2 / 300e3
    before, after = 2 + 2 * 2.5, 5 * 2 + 3 + 7 * 2.5
    # attention is but 3 us: both groups arrive, then both results leave, one behind the other
    assert end_s(play.tasks) * 1e6 == pytest.approx(before + 2 * incoming + 2 * outgoing + after)
    slow = Gpu(
        product_flops_per_s=math.inf,
        attention_flops_per_s=full_wave_flops((11040, 11040, 5), 132) / 500e-6,
        fused_bytes_per_s=math.inf,
        copy_bytes_per_s=math.inf,
    )
    play = play_of(layer, slow)
    ulysses(play, layer, 2)
    crossed = full_wave_flops(layer.crossed(), 132) / slow.attention_flops_per_s * 1e6
    # attention of 503 us a group: what arrives first and what leaves last is all that shows
    assert end_s(play.tasks) * 1e6 == pytest.approx(before + incoming + 2 * 503 + outgoing + after + crossed)


def test_a_ring_sends_under_attention_by_hand() -> None:
    layer = usual(4, 2)
    turn_us, shown = 10 + 2 * 2 * 2760 * 5120 / 350e3, []
    for is_overlapped in (False, True):
        play = play_of(layer)
        ring(play, layer, is_overlapped=is_overlapped)
        shown.append(end_s(play.tasks) * 1e6 - (2 + 5 + 5 * 2 + 3 + 17.5))
    assert shown[0] == pytest.approx(3 * turn_us + 4 * 3)  # each turn, then its attention
    assert shown[1] == pytest.approx(3 * turn_us + 3)  # three of the four under turns


# What is counted


@pytest.mark.parametrize(
    ("degree", "stage", "ulysses_mb", "ring_mb"),
    [(2, 2, 113.0, 113.0), (4, 2, 84.8, 169.6), (8, 0, 13.2, 52.8), (8, 1, 20.4, 81.7), (8, 2, 49.5, 197.8)],
)
def test_bytes_of_a_layer_are_those_of_the_table(degree: int, stage: int, ulysses_mb: float, ring_mb: float) -> None:
    layer = usual(degree, stage)
    for groups in (1, 5):
        exchanged = play_of(layer)
        ulysses(exchanged, layer, groups)
        assert sum(task.num_bytes for task in exchanged.tasks) / 1e6 == pytest.approx(ulysses_mb, abs=0.06)
    turned = play_of(layer)
    ring(turned, layer, is_overlapped=True)
    assert sum(task.num_bytes for task in turned.tasks) / 1e6 == pytest.approx(ring_mb, abs=0.06)


def test_work_of_a_forward_is_the_counted_work() -> None:
    """Products and attention of stage 2 on one rank, as the closed form has them: 40 layers, less what the last one
    does not compute of 2400 rows of history."""
    total, noisy, dim, ffn = 11040, 8640, 5120, 13824
    first, last = layers_of(SHAPE, 2, 1, PARAMS)
    counted = 0
    for count, layer in ((39, first), (1, last)):
        products = [*layer.products_before(), *layer.products_after()]
        queries, keys, heads = layer.crossed()
        counted += count * sum(2 * m * n * k for m, n, k in products)
        counted += count * 4 * 128 * (layer.total_kept * layer.total * 40 + queries * keys * heads)
    linear = 8 * total * dim**2 + 4 * total * dim * ffn + 4 * noisy * dim**2
    expected = 40 * (linear + 4 * total**2 * dim + 4 * noisy * 512 * dim)
    expected -= 2400 * (4 * dim**2 + 4 * dim * ffn + 4 * total * dim)
    assert counted == expected


def test_a_rank_holds_its_share() -> None:
    layer = usual(8, 0)
    assert (layer.rows, layer.noisy, layer.total) == (368, 68, 2940)
    assert layers_of(SHAPE, 0, 8, PARAMS)[1].kept == 68


def test_ulysses_copies_sixteen_times_a_tensor() -> None:
    """q, k and v into blocks and out of them, and the result likewise, each read and written."""
    layer = usual(4, 1)
    gpu = Gpu(product_flops_per_s=1, attention_flops_per_s=1, fused_bytes_per_s=1, copy_bytes_per_s=1)
    play = play_of(layer, gpu)
    ulysses(play, layer, 2)
    copied = sum(task.seconds for task in play.tasks if task.kind == "copies")
    assert copied == pytest.approx(16 * 2 * 1140 * 5120)


def test_tiles_and_waves() -> None:
    assert full_tile_flops((128, 256 * 132, 64), 132) == 2 * 128 * 256 * 132 * 64  # every processor one full tile
    assert full_tile_flops((128, 256 * 133, 64), 132) > 1.05 * 2 * 128 * 256 * 133 * 64  # one tile is left over
    assert full_wave_flops((128, 180, 132), 132) == 4 * 128 * 180 * 132 * 128 * 2  # short keys take twice as long
    assert full_wave_flops((128, 180, 1), 132) == pytest.approx(4 * 128 * 180 * 128 * 2 / 0.75)


# What is predicted


def test_one_rank_takes_what_was_measured() -> None:
    kept = json.loads(KEPT.read_text())
    model = anchored()
    for stage, measured_ms in enumerate(kept["anchor"]["forward_ms"]):
        for scheme in cp_model.SCHEMES:
            found = model.predict(scheme, 1, stage, is_overlapped=True)
            assert found.forward_ms == pytest.approx(measured_ms, rel=1e-5)
            assert found.speed_up == pytest.approx(1.0)
            assert found.links_ms == found.sent_mb == 0
    assert all(0.9 < factor < 1.1 for factor in model.gpu.factors)  # counted work explains the stages


@pytest.mark.parametrize("scheme", cp_model.SCHEMES)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_predictions_hold_together(scheme: str, stage: int) -> None:
    model, before = anchored(), math.inf
    for degree in cp_model.DEGREES:
        plain, overlapped = (model.predict(scheme, degree, stage, is_overlapped=on) for on in (False, True))
        for found in (plain, overlapped):
            assert found.forward_ms == pytest.approx(sum(found.parts_ms.values()) + found.exposed_ms)
            assert found.exposed_ms <= found.links_ms + 1e-9
            assert found.speed_up <= degree + 1e-9
        assert plain.exposed_ms == pytest.approx(plain.links_ms)
        assert overlapped.forward_ms <= plain.forward_ms + 1e-9
        assert plain.forward_ms < before
        before = plain.forward_ms


def test_what_is_kept_is_what_the_model_says_and_says_what_it_is() -> None:
    kept = json.loads(KEPT.read_text())
    made = cp_model.rounded(cp_model.run(read_anchor(RESULTS / kept["anchor"]["file"])))
    for part in ("forwards", "chunks", "gpu", "links_assumed", "workload"):
        assert made[part] == kept[part], part
    assert kept["mark"] == MARK == "model, not a measurement"
    assert MARK in KEPT.with_suffix(".svg").read_text()


def test_the_command_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.setattr(sys, "argv", ["cp_model", "--out", str(tmp_path / "cp_model_here")])
    cp_model.main()
    result = json.loads((tmp_path / "cp_model_here.json").read_text())
    assert len(result["forwards"]) == len(cp_model.SCHEMES) * len(cp_model.DEGREES) * 2 * 3
    assert (tmp_path / "cp_model_here.svg").read_text().startswith("<svg")
    assert isinstance(capsys, pytest.CaptureFixture)
    assert capsys.readouterr().out.startswith(MARK)
