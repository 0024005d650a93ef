"""`vllm serve CHECKPOINT --omni` with this package beside it: files, sessions and refusals over HTTP and WebSocket."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import MakeCheckpoint
from tests.runtimes.in_vllm.conftest import Frames, Server, StartServer
from tests.runtimes.in_vllm.served import Session, open_session, play, post
from tests.runtimes.pictures import MAX_LUMA_ERROR, as_mp4, luma, luma_of

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)


def test_the_log_names_the_backend(server: Server) -> None:
    assert "is the backend of ('HeliosPipeline', 'HeliosPyramidPipeline')" in server.log.read_text()


STEPS = {"base": [3], "mid": [1, 2, 1]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A picture or a video to begin from, as a form takes it and as this package's engine does."""

    files: dict[str, Any]
    fields: dict[str, str]


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    folder = tmp_path_factory.mktemp("media")
    picture, clip = folder / "first.png", folder / "clip.mp4"
    Image.fromarray(PIXELS[0]).save(picture)
    clip.write_bytes(as_mp4(PIXELS))
    return {
        "t2v": Task(files={}, fields={}),
        "i2v": Task(
            files={"input_reference": (picture.name, picture.read_bytes(), "image/png")}, fields={"image": str(picture)}
        ),
        "v2v": Task(
            files={"input_reference": (clip.name, clip.read_bytes(), "video/mp4")}, fields={"video": str(clip)}
        ),
    }


@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v"])
def test_a_file_is_the_engine_s_video(
    task: str, server: Server, tasks: dict[str, Task], tiny_distilled: Path, native: Callable[..., list[Frames]]
) -> None:
    answer = post(server, tasks[task].files)
    assert answer.status_code == 200, answer.text
    expected = luma_of(np.concatenate(native(tiny_distilled, "a fox", num_frames=40, **tasks[task].fields)))
    assert np.abs(luma(answer.content) - expected).mean() < MAX_LUMA_ERROR


@pytest.mark.parametrize("variant", ["base", "mid"])
def test_files_and_sessions_of_the_other_variants(
    variant: str,
    make_checkpoint: MakeCheckpoint,
    start_server: StartServer,
    tasks: dict[str, Task],
    native: Callable[..., list[Frames]],
) -> None:
    checkpoint, extra = make_checkpoint(variant), {"steps": STEPS[variant]}
    server = start_server(checkpoint, "--diffusion-streaming-output")
    for task in tasks.values():
        answer = post(server, task.files, extra_params=extra)
        assert answer.status_code == 200, answer.text
        expected = luma_of(np.concatenate(native(checkpoint, "a fox", num_frames=40, **extra, **task.fields)))
        assert np.abs(luma(answer.content) - expected).mean() < MAX_LUMA_ERROR, task
    picture = tasks["i2v"].files["input_reference"][1]
    given = {"image_reference": {"image_url": f"data:image/png;base64,{base64.b64encode(picture).decode()}"}}
    for task, reference in (("t2v", {}), ("i2v", given)):
        (video,) = play(server, ["a fox"], num_frames=40, extra_params=extra, **reference)
        expected = luma_of(np.concatenate(native(checkpoint, "a fox", num_frames=40, **extra, **tasks[task].fields)))
        assert np.abs(luma(video) - expected).mean() < MAX_LUMA_ERROR, task


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": "65x64"}, "nearest: 64x64"),
        ({"extra_params": {"pyramid_num_inference_steps_list": [1]}}, "needs 3 numbers"),
        ({"extra_params": {"pyramid_num_inference_steps_list": "x"}}, "must be a list"),
        ({"extra_params": {"colour": "red"}}, "colour: unknown parameter"),
        ({"num_inference_steps": "5"}, "3 stages"),
        ({"enable_frame_interpolation": "true"}, "not interpolated"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(fields: dict[str, Any], said: str, server: Server) -> None:
    answer = post(server, **fields)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_a_streaming_server_answers_with_whole_files(
    streaming: Server, tiny_distilled: Path, native: Callable[..., list[Frames]]
) -> None:
    answer = post(streaming, num_frames="66")
    assert answer.status_code == 200, answer.text
    expected = luma_of(np.concatenate(native(tiny_distilled, "a fox", num_frames=66)))
    assert np.abs(luma(answer.content) - expected).mean() < MAX_LUMA_ERROR


def test_a_session_plays_chunk_by_chunk_and_takes_a_prompt_change(
    streaming: Server, tiny_distilled: Path, native: Callable[..., list[Frames]]
) -> None:
    with open_session(streaming) as socket:
        session = Session(socket=socket)
        session.start("a fox", num_frames=330, extra_params={"steps": [1, 1, 1]})
        while not session.chunks:
            session.hear()
        session.change_prompt("e1", "a dog")
        session.hear_all()
    assert [chunk["generation_chunk_index"] for chunk in session.chunks] == list(range(10))
    (changed,) = (chunk["generation_chunk_index"] for chunk in session.chunks if "e1" in chunk["started_event_ids"])
    assert 1 <= changed < 10
    schedule = [{"prompt": "a fox"}, {"prompt": "a dog", "chunk": changed, "transition_chunks": 0}]
    expected = luma_of(np.concatenate(native(tiny_distilled, prompts=schedule, num_frames=330, steps=[1, 1, 1])))
    unchanged = luma_of(np.concatenate(native(tiny_distilled, "a fox", num_frames=330, steps=[1, 1, 1])))
    played = luma(session.media)
    errors = [np.abs(played - other)[33 * changed :].mean() for other in (expected, unchanged)]
    assert np.abs(played - expected).mean() < MAX_LUMA_ERROR
    assert errors[0] < errors[1] / 3


def test_sessions_overlap_and_each_is_its_own(
    streaming: Server, tiny_distilled: Path, native: Callable[..., list[Frames]]
) -> None:
    prompts = ["a fox", "a dog", "a cat"]
    videos = play(streaming, prompts, num_frames=99, extra_params={"steps": [1, 1, 1]})
    for prompt, video in zip(prompts, videos, strict=True):
        expected = luma_of(np.concatenate(native(tiny_distilled, prompt, num_frames=99, steps=[1, 1, 1])))
        assert np.abs(luma(video) - expected).mean() < MAX_LUMA_ERROR, prompt
