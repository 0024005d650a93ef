"""The tables of device memory in docs/performance.md: they are what is counted, and what is counted is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import memory_table
from benchmarks.memory_table import CONFIG, META, MODES, SMALL, WHOLE, Mode, PeakBytes

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
GB = 10**9


def without_measured(text: str) -> str:
    """The tables of a page but for the column of peaks, which a new result changes."""
    tables = text[text.index("<!-- memory table: begin") : text.index("<!-- memory table: end")]
    head = r"(\| workspace, GB[^\n]*\n)((?:\|[^\n]*\n)*)"
    return re.sub(head, lambda found: re.sub(r"[^|\n]*\|\n", "\n", found[0]), tables)


def test_the_page_says_what_is_counted() -> None:
    assert without_measured(PAGE.read_text()) == without_measured(memory_table.render())


def test_a_changed_number_would_be_seen() -> None:
    page = PAGE.read_text()
    assert without_measured(page.replace("28.68", "28.67")) != without_measured(page)
    assert without_measured(page.replace("| 7.84 |", "| 7.83 |")) != without_measured(page)


def test_a_tensor_counts_as_long_as_it_lives() -> None:
    with PeakBytes() as seen:
        first = torch.empty(100, dtype=torch.float32, device=META)
        view = first.view(10, 10)[2:]
        view.add_(1)
        assert (seen.live_bytes, seen.peak_bytes) == (400, 400)
        second = first + 1
        assert seen.live_bytes == 800
        del first
        assert seen.live_bytes == 800  # its memory is that of the view
        del view
        assert seen.live_bytes == 400
        second = second.half()
        assert (seen.live_bytes, seen.peak_bytes) == (200, 800)
    del second
    assert seen.live_bytes == 0


def test_what_was_there_before_does_not_count() -> None:
    given = torch.empty(1000, device=META)
    assert memory_table.peak_bytes(lambda: given.view(10, 100).mul_(2)) == 0
    assert memory_table.peak_bytes(lambda: given * 2) == 4000


def test_weights_are_those_of_the_performance_plan() -> None:
    """Its figures are parameters times two bytes; tables and norms in float32 come to it here."""
    assert memory_table.transformer_weights(is_fp8=False).whole == pytest.approx(28.62 * GB, rel=0.003)
    assert memory_table.text_encoder_weights().whole == pytest.approx(11.36 * GB, rel=0.001)
    rounded = sum(
        linear.numel()
        for name, linear in memory_table.transformer(is_fp8=False).named_parameters()
        if re.fullmatch(r"blocks\.([3-9]|[12].|3[0-6])\.(attn1|attn2\.to_[qo]|ffn).*\.weight", name)
        and linear.dim() == 2
    )
    saved = memory_table.transformer_weights(is_fp8=False).whole - memory_table.transformer_weights(is_fp8=True).whole
    assert saved == pytest.approx(rounded, rel=0.001)  # one byte of two


def test_offloaded_layers_leave_two_buffers() -> None:
    blocks = memory_table.transformer(is_fp8=False).blocks
    of_block = memory_table.parameter_bytes(blocks[0])
    weights = memory_table.transformer_weights(is_fp8=False)
    assert weights.whole - weights.offloaded == pytest.approx(38 * of_block, rel=1e-5)  # parameters begin aligned


@pytest.mark.parametrize(("keys", "mebibytes"), [(512, 400), (227, 177), (121, 94.5)])
def test_text_is_that_of_the_performance_plan(keys: int, mebibytes: float) -> None:
    assert memory_table.text_kv(keys).num_bytes == pytest.approx(mebibytes * 2**20, rel=0.003)


def test_history_keys_and_values_are_those_of_the_performance_plan() -> None:
    assert memory_table.history_kv_bytes() == 2 * 40 * 2400 * 5120 * 2 == pytest.approx(1.97 * GB, rel=0.003)


def test_a_forward_holds_what_its_last_attention_needs() -> None:
    """x and the norm before attention, keys and values as projected, rotated keys; of current tokens the queries and
    what they attended to. Elsewhere x, the norm, the fused projection and the attended live together: 12 D bytes."""
    current, tokens = 8640, 11040
    most = 10 * tokens * CONFIG.dim + 4 * current * CONFIG.dim
    assert memory_table.forward_bytes((2,)) == pytest.approx(most, rel=0.02)


def test_a_decode_holds_its_widest_windows_and_two_tensors_more() -> None:
    """At full size, 96 channels of 33 frames: windows of three frames, what goes in and what comes out."""
    widest = 33 * 384 * 640 * 96 * 2
    assert memory_table.decode_bytes(WHOLE) == pytest.approx(5 * widest, rel=0.01)


def test_slabs_bound_a_decode() -> None:
    assert memory_table.decode_bytes(SMALL) < 0.3 * memory_table.decode_bytes(WHOLE)


def test_offloading_with_a_decode_in_slabs_fits_into_8_gb() -> None:
    (small,) = (mode for mode in MODES if mode.is_transformer_offloaded and mode.decode == SMALL)
    in_all = small.weight_bytes + small.workspace_bytes + memory_table.text_kv(512).num_bytes
    assert in_all + memory_table.stream_bytes() < 8 * GB


def test_fewer_streams_fit_where_more_is_taken() -> None:
    assert Mode(name="", text_encoder="elsewhere").num_streams(512) > Mode(name="").num_streams(512) > 0
    assert Mode(name="", pack=64).num_streams(512) == 0
