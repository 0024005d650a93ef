"""Derived values of the nouns, against what they mean."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios_serve.types import Frames, PromptChange, Restart, SamplingParams, StepCursor, VideoRequest

PARAMS = SamplingParams(
    width=64, height=64, num_frames=33, fps=24, seed=0, steps=(2, 1, 3), guidance_scale=1.0, amplify_first_chunk=False
)


def with_(**changes: object) -> SamplingParams:
    return dataclasses.replace(PARAMS, **changes)  # type: ignore[arg-type]


@st.composite
def sampling_params(draw: st.DrawFn, max_frames: int = 7260) -> SamplingParams:
    return with_(
        num_frames=draw(st.integers(1, max_frames)),
        steps=tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))),
        amplify_first_chunk=draw(st.booleans()),
        frame_policy=draw(st.sampled_from(["trim", "pad", "reference"])),
    )


@pytest.mark.parametrize(
    ("num_frames", "num_chunks", "trim", "pad", "reference"),
    [
        (1, 1, 1, 33, 33),
        (33, 1, 33, 33, 33),
        (34, 2, 34, 66, 65),
        (66, 2, 66, 66, 65),
        (99, 3, 99, 99, 97),
        (132, 4, 132, 132, 129),
        (240, 8, 240, 264, 261),
    ],
)
def test_output_frames(num_frames: int, num_chunks: int, trim: int, pad: int, reference: int) -> None:
    assert with_(num_frames=num_frames).num_chunks == num_chunks
    assert with_(num_frames=num_frames, frame_policy="trim").num_output_frames == trim
    assert with_(num_frames=num_frames, frame_policy="pad").num_output_frames == pad
    assert with_(num_frames=num_frames, frame_policy="reference").num_output_frames == reference


@given(params=sampling_params())
def test_the_frames_of_all_chunks_are_the_video(params: SamplingParams) -> None:
    counts = [params.frames_in(chunk) for chunk in range(params.num_chunks)]
    assert sum(counts) == params.num_output_frames
    assert counts[:-1] == [33] * (params.num_chunks - 1)
    assert 1 <= counts[-1] <= 33


@given(params=sampling_params(max_frames=200))
def test_the_cursor_walks_every_step_once(params: SamplingParams) -> None:
    cursor, visited, ends = StepCursor(chunk=0), list[StepCursor](), list[int]()
    while cursor.chunk < params.num_chunks:
        visited.append(cursor)
        if cursor.ends_chunk(params):
            ends.append(cursor.chunk)
        cursor = cursor.next(params)
    expected = [
        StepCursor(chunk=chunk, stage=stage, step=step)
        for chunk in range(params.num_chunks)
        for stage, count in enumerate(params.steps)
        for step in range(count * (2 if params.amplify_first_chunk and chunk == 0 else 1))
    ]
    assert visited == expected
    assert len(visited) == params.total_steps
    assert ends == list(range(params.num_chunks))
    assert cursor == StepCursor(chunk=params.num_chunks)


def test_an_amplified_first_chunk_takes_twice_the_steps() -> None:
    params = with_(num_frames=99, amplify_first_chunk=True)
    assert [params.steps_in(chunk) for chunk in range(3)] == [(4, 2, 6), (2, 1, 3), (2, 1, 3)]
    assert params.total_steps == 24
    assert [params.steps_from(chunk) for chunk in range(4)] == [24, 12, 6, 0]
    begun_anew = with_(num_frames=99, amplify_first_chunk=True, restarts=(Restart(chunk=1, seed=1),))
    for first in range(3):
        assert begun_anew.steps_from(first) == sum(sum(begun_anew.steps_in(chunk)) for chunk in range(first, 3))
    assert with_(num_frames=99).total_steps == 18


@pytest.mark.parametrize(("scale", "uses"), [(0.0, False), (1.0, False), (1.0001, True), (5.0, True)])
def test_guidance_needs_a_scale_above_one(scale: float, uses: bool) -> None:
    assert with_(guidance_scale=scale).uses_guidance is uses


def test_the_task_follows_the_media() -> None:
    request = VideoRequest(request_id="r", prompts=(PromptChange(chunk=0, prompt="p"),), params=PARAMS)
    picture = Frames(data=bytes(12), num_frames=1, height=2, width=2)
    assert request.task == "t2v"
    assert dataclasses.replace(request, image=picture).task == "i2v"
    assert dataclasses.replace(request, video=picture).task == "v2v"


def test_nouns_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PARAMS.seed = 1  # type: ignore[misc]
