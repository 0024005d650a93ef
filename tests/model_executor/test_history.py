"""Windows over numbered frames: frame i holds the value i everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helios_serve.model_executor.history import (
    FIRST_CURRENT_FRAME,
    FIRST_LONG_FRAME,
    FIRST_MID_FRAME,
    LAST_HISTORY_FRAME,
    NUM_HISTORY_FRAMES,
    History,
    empty_history,
    seeded_history,
)
from helios_serve.types import NUM_TRAIL_CHUNKS


def frames(*values: float) -> Tensor:
    """[2, len(values), 3, 4]."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1).expand(2, -1, 3, 4).clone()


def span(start: int, stop: int) -> Tensor:
    return frames(*range(start, stop))


def values(window: Tensor) -> list[float]:
    assert (window == window[:1, :, :1, :1]).all()
    return window[0, :, 0, 0].tolist()


def test_frame_numbers() -> None:
    assert (FIRST_LONG_FRAME, FIRST_MID_FRAME, LAST_HISTORY_FRAME, FIRST_CURRENT_FRAME) == (1, 17, 19, 20)
    assert NUM_HISTORY_FRAMES == 19


def test_an_empty_history_is_zeros_and_pins_nothing() -> None:
    history = empty_history(2, 3, 4, torch.device("cpu"))
    assert history.frames.shape == (2, 19, 3, 4)
    assert history.frames.dtype == torch.float32
    assert history.first is None
    assert [values(window) for window in history.windows()] == [[0] * 16, [0] * 2, [0] * 2]


def test_windows_are_long_mid_and_first_with_last() -> None:
    long, mid, short = History(frames=span(100, 119), first=frames(7)).windows()
    assert values(long) == list(range(100, 116))
    assert values(mid) == [116, 117]
    assert values(short) == [7, 118]


def test_the_window_slides_over_what_was_made() -> None:
    start = History(frames=span(0, 19), first=None)
    chunks = [span(at, at + 9) for at in (19, 28, 37, 46)]
    for count in range(5):
        made = chunks[:count]
        history = start.followed_by(made[-3:], made[0] if made else None)
        assert values(history.frames) == list(range(9 * count, 9 * count + 19))
        assert (history.first is None) == (count == 0)
        assert history.first is None or values(history.first) == [19]
    assert NUM_TRAIL_CHUNKS == 3


def test_what_is_pinned_stays_unless_a_chunk_is_named() -> None:
    start = seeded_history(frames(5), frames(3))
    assert values(start.followed_by([span(10, 19)], None).windows()[2]) == [3, 18]
    assert values(start.followed_by([span(10, 19), span(20, 29)], span(20, 29)).windows()[2]) == [20, 28]


def test_a_history_keeps_no_part_of_the_chunks_alive() -> None:
    latents = span(1, 10)
    history = empty_history(2, 3, 4, torch.device("cpu")).followed_by([latents], latents)
    latents.fill_(-1)
    assert history.first is not None
    assert values(history.first) == [1]
    assert values(history.frames)[-9:] == list(range(1, 10))
    assert history.first.untyped_storage().nbytes() == history.first.nbytes
    assert history.frames.untyped_storage().nbytes() == history.frames.nbytes


@pytest.mark.parametrize("count", [1, 9, 18, 19, 20, 27, 45])
def test_a_seeded_history_keeps_the_last_19_behind_zeros(count: int) -> None:
    history = seeded_history(span(1, count + 1), frames(-5))
    expected = [0] * max(0, 19 - count) + list(range(max(1, count - 18), count + 1))
    assert values(history.frames) == expected
    assert values(history.windows()[2]) == [-5, count]
    assert history.frames.untyped_storage().nbytes() == history.frames.nbytes


@given(count=st.integers(1, 40), num_chunks=st.integers(0, 6))
def test_the_window_is_the_tail_of_all_frames(count: int, num_chunks: int) -> None:
    everything = [0.0] * 19 + [float(i) for i in range(1, count + 1)]
    history = seeded_history(span(1, count + 1), frames(-5))
    made = []
    for chunk in range(num_chunks):
        start = 1000 + 9 * chunk
        everything += [float(i) for i in range(start, start + 9)]
        made.append(span(start, start + 9))
    history = history.followed_by(made[-NUM_TRAIL_CHUNKS:], None)
    assert values(history.frames) == everything[-19:]
    assert history.first is not None
    assert values(history.first) == [-5]
