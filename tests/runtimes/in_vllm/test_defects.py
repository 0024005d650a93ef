"""What goes wrong in the runtime's own Helios backend, each as a test that passes on ours.

With `VLLM_PLUGINS=helios_cpu`, which leaves ours out, each must fail on the runtime's own; docs/runtimes.md has the
record. The first test passes on both: it says that the comparisons are fair.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import MakeCheckpoint
from tests.runtimes.in_vllm.conftest import IS_OURS, Frames, Server
from tests.runtimes.in_vllm.omni import forwards, frames_of, omni, sampling, worst
from tests.runtimes.in_vllm.served import play, post
from tests.runtimes.pictures import luma

defect = pytest.mark.xfail(not IS_OURS, reason="a defect of the runtime's own backend", strict=True)

STEPS = [1, 1, 1]
STEPS_OF = {"pyramid_num_inference_steps_list": STEPS}
FLAGS = {"is_enable_stage2": True, "is_amplify_first_chunk": True}
"""What the checkpoint says, told again, as the runtime's own backend needs it."""
UNGUIDED = {"guidance_scale": 1.0, "guidance_scale_provided": True}
ALL_TOLD = {**UNGUIDED, "max_sequence_length": 512, "extra_args": {**FLAGS, **STEPS_OF}}
NEAR = 4
"""Of 255; two backends' float32 roundings, through the VAE. Another video is 100 away."""


@pytest.fixture
def expected(tiny_distilled: Path, native: Callable[..., list[Frames]]) -> Frames:
    return np.concatenate(native(tiny_distilled, "a fox", num_frames=66, steps=STEPS))


def test_both_backends_make_this_video(tiny_distilled: Path, expected: Frames) -> None:
    with omni(tiny_distilled) as started:
        (output,) = started.generate("a fox", sampling(num_frames=66, **ALL_TOLD))
    assert worst(frames_of(output), expected) <= NEAR


@defect
def test_each_prompt_has_its_own_video(tiny_distilled: Path, native: Callable[..., list[Frames]]) -> None:
    prompts = [f"animal number {number}" for number in range(30)]
    videos: dict[str, Frames] = {}
    with omni(tiny_distilled) as started:
        for prompt in prompts:
            (output,) = started.generate(prompt, sampling(num_frames=33, **ALL_TOLD))
            videos[prompt] = frames_of(output)
    assert len({video.tobytes() for video in videos.values()}) == 30
    for prompt in prompts:
        (own,) = native(tiny_distilled, prompt, num_frames=33, steps=STEPS)
        assert np.array_equal(videos[prompt], own), prompt


@defect
def test_the_checkpoint_says_how_it_is_sampled(tiny_distilled: Path, expected: Frames) -> None:
    with omni(tiny_distilled) as started:
        told = {**ALL_TOLD, "extra_args": {"pyramid_num_inference_steps_list": STEPS}}
        (output,) = started.generate("a fox", sampling(num_frames=66, **told))
    assert worst(frames_of(output), expected) <= NEAR


@defect
def test_text_has_512_tokens(tiny_distilled: Path, expected: Frames) -> None:
    told = {key: value for key, value in ALL_TOLD.items() if key != "max_sequence_length"}
    with omni(tiny_distilled) as started:
        (output,) = started.generate("a fox", sampling(num_frames=66, **told))
    assert worst(frames_of(output), expected) <= NEAR


@defect
def test_a_video_has_the_frames_that_were_asked_for(tiny_distilled: Path) -> None:
    with omni(tiny_distilled) as started:
        (output,) = started.generate("a fox", sampling(num_frames=40, **ALL_TOLD))
    assert len(frames_of(output)) == 40


@defect
def test_a_size_that_cannot_be_made_is_refused(tiny_distilled: Path) -> None:
    with omni(tiny_distilled) as started, pytest.raises(Exception, match="nearest: 64x64"):
        started.generate("a fox", sampling(width=70, **ALL_TOLD))


@defect
def test_requests_are_taken_together(tiny_distilled: Path) -> None:
    with omni(tiny_distilled, max_num_seqs=2) as started:
        outputs = started.generate(["a fox", "a dog"], sampling(**ALL_TOLD))
    assert len(outputs) == 2


@defect
def test_step_mode_makes_all_chunks(tiny_distilled: Path) -> None:
    with omni(tiny_distilled, step_execution=True) as started:
        (output,) = started.generate("a fox", sampling(num_frames=66, **ALL_TOLD))
    assert len(frames_of(output)) == 66


@defect
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_tokens_need_not_divide_by_the_ranks(num_ranks: int, tiny_distilled: Path, expected: Frames) -> None:
    with omni(tiny_distilled, ulysses_degree=num_ranks) as started:
        (output,) = started.generate("a fox", sampling(num_frames=66, **ALL_TOLD))
    assert worst(frames_of(output), expected) <= NEAR


@defect
def test_ranks_share_the_sequences_of_guidance(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIOS_WORK", str(tmp_path))
    with omni(make_checkpoint("mid"), cfg_parallel_size=2) as started:
        forwards(tmp_path)
        guided = {"guidance_scale": 5.0, "guidance_scale_provided": True}
        told = {"extra_args": {"is_enable_stage2": True, **STEPS_OF, "use_zero_init": False}}
        started.generate("a fox", sampling(num_frames=33, **guided, **told))
        assert forwards(tmp_path) == [[1, 1, 1], [1, 1, 1]]


@defect
def test_layers_can_wait_in_host_memory(tiny_distilled: Path, expected: Frames) -> None:
    with omni(tiny_distilled, enable_layerwise_offload=True, pin_cpu_memory=False) as started:
        (output,) = started.generate("a fox", sampling(num_frames=66, **ALL_TOLD))
    assert worst(frames_of(output), expected) <= NEAR


@defect
def test_a_setting_that_would_be_ignored_is_refused(tiny_distilled: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="vae-patch-parallel-size"),
        omni(tiny_distilled, ulysses_degree=2, vae_patch_parallel_size=2),
    ):
        pass


TOLD_OVER_HTTP: dict[str, Any] = {"guidance_scale": "1.0", "max_sequence_length": "512"}
TOLD_AS_EXTRA = {**FLAGS, **STEPS_OF}


@defect
def test_a_picture_over_http_counts(server: Server, tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64, 3), 200, dtype=np.uint8)).save(tmp_path / "first.png")
    files = {"input_reference": ("first.png", (tmp_path / "first.png").read_bytes(), "image/png")}
    answers = [post(server, given, extra_params=TOLD_AS_EXTRA, **TOLD_OVER_HTTP) for given in (None, files)]
    assert [answer.status_code for answer in answers] == [200, 200]
    without, with_picture = (luma(answer.content) for answer in answers)
    assert np.abs(with_picture - without).mean() > 1


@defect
def test_steps_that_make_no_sense_are_the_client_s_fault(server: Server) -> None:
    answer = post(server, extra_params={**FLAGS, "pyramid_num_inference_steps_list": "x"}, **TOLD_OVER_HTTP)
    assert answer.status_code == 400


@defect
def test_a_streaming_server_answers_with_whole_files(streaming: Server) -> None:
    answer = post(streaming, num_frames="132", extra_params=TOLD_AS_EXTRA, **TOLD_OVER_HTTP)
    assert len(luma(answer.content)) == 132


@defect
def test_two_sessions_overlap(streaming: Server) -> None:
    played = play(streaming, ["a fox", "a dog"], num_frames=132, extra_params=TOLD_AS_EXTRA, guidance_scale=1.0)
    assert [len(luma(video)) for video in played] == [132, 132]
