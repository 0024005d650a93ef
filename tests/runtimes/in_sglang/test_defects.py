"""What goes wrong in SGLang's own Helios backend, each as a test that passes on ours.

With `SGLANG_PLUGINS=helios_cpu`, which leaves ours out, each must fail on SGLang's own; docs/runtimes.md has the
record. The first test passes on both: it says that the comparisons are fair. A backend is compared with itself where
that is possible, because SGLang's own draws other noise for the same seed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from helios_vllm_cpu.work import FOLDER
from PIL import Image
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import LatentPreparationStage
from sglang.multimodal_gen.runtime.server_args import ServerArgs

from helios_serve.errors import UnsupportedOperationError
from tests.conftest import MakeCheckpoint
from tests.runtimes.in_sglang.conftest import IS_OURS, STEPS, Frames, Native, Server, StartServer
from tests.runtimes.in_sglang.served import content, finished, play, post
from tests.runtimes.in_sglang.started import PIXELS, Runtime, forwards, frames_of, generator
from tests.runtimes.in_sglang.test_roles import made_apart

pytestmark = pytest.mark.timeout(1800)  # each process that SGLang starts imports for half a minute
defect = pytest.mark.xfail(not IS_OURS, reason="a defect of the runtime's own backend", strict=True)

HUB_NAMES = {"base": "Helios-Base", "mid": "Helios-Mid", "distilled": "Helios-Distilled"}
NEAR = 4
"""Of 255; two ways of the same float32 arithmetic, through the VAE. Another video is 100 away."""


def told(variant: str) -> dict[str, Any]:
    """Settings that say again what the checkpoint says, as SGLang's own backend needs them, in float32."""
    if IS_OURS:
        return {}
    config = {"precision": "fp32", "pyramid_num_inference_steps_list": STEPS[variant]}
    return {"model_id": HUB_NAMES[variant], "pipeline_config": config}


def asked(variant: str) -> dict[str, Any]:
    """Fields of a request for the steps that the tests take."""
    if IS_OURS:
        return {"api_fields": {"steps": STEPS[variant]}}
    return {"num_inference_steps": STEPS[variant][0]} if variant == "base" else {}


def worst(frames: Frames, expected: Frames) -> int:
    """The largest difference of a colour value, 0 to 255, in the frames that both have."""
    frames, expected = frames[: len(expected)], expected[: len(frames)]
    return int(np.abs(frames.astype(int) - expected).max())


@pytest.fixture(scope="module")
def runtime(make_checkpoint: MakeCheckpoint) -> Callable[[str], Runtime]:
    """`runtime(variant)`, started once."""
    started: dict[str, Runtime] = {}

    def start(variant: str) -> Runtime:
        if variant not in started:
            started[variant] = Runtime(make_checkpoint(variant), **told(variant))
        return started[variant]

    return start


@pytest.fixture
def base(runtime: Callable[[str], Runtime]) -> Runtime:
    return runtime("base")


@pytest.fixture
def first_noise_is_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own backend draws noise for a whole video and uses none of it; here its generators forget that."""
    prepare = LatentPreparationStage.forward

    def forget(stage: LatentPreparationStage, request: Req, server_args: ServerArgs) -> Req:
        states = [noise.get_state() for noise in request.generator]
        prepared = prepare(stage, request, server_args)
        for noise, state in zip(request.generator, states, strict=True):
            noise.set_state(state)
        return prepared

    monkeypatch.setattr(LatentPreparationStage, "forward", forget)


GUIDED: dict[str, Any] = {"num_frames": 66, "guidance_scale": 5.0, "negative_prompt": "rain"}


@pytest.mark.usefixtures("first_noise_is_unused")
def test_both_backends_make_this_video(base: Runtime, tiny_base: Path, native: Native) -> None:
    expected = native(tiny_base, "a fox", steps=STEPS["base"], **GUIDED)
    assert worst(base.generate(**GUIDED, **asked("base")), expected) <= NEAR
    assert worst(base.generate("a dog", **GUIDED, **asked("base")), expected) > NEAR


@defect
def test_a_seed_is_the_noise_of_the_reference(base: Runtime, tiny_base: Path, native: Native) -> None:
    expected = native(tiny_base, "a fox", steps=STEPS["base"], **GUIDED)
    assert worst(base.generate(**GUIDED, **asked("base")), expected) <= NEAR


@defect
@pytest.mark.parametrize("variant", ["mid", "distilled"])
def test_a_seed_decides_the_noise_between_stages(variant: str, runtime: Callable[[str], Runtime]) -> None:
    once, again = (runtime(variant).generate(num_frames=33, **asked(variant)) for _ in range(2))
    assert np.array_equal(once, again)


@defect
def test_a_video_has_the_frames_that_were_asked_for(base: Runtime) -> None:
    assert len(base.generate(num_frames=40, **asked("base"))) == 40


@defect
def test_a_picture_counts(base: Runtime, tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "first.png")
    with_picture = base.generate(image_path=str(tmp_path / "first.png"), **asked("base"))
    assert worst(with_picture, base.generate(**asked("base"))) > NEAR


@defect
def test_a_video_counts(base: Runtime, tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", PIXELS)
    with_video = base.generate(video_path=str(tmp_path / "clip.npy"), **asked("base"))
    assert worst(with_video, base.generate(**asked("base"))) > NEAR


@defect
def test_several_outputs_are_several_videos(base: Runtime) -> None:
    request = base.request(num_outputs_per_prompt=2, num_frames=33, **asked("base"))
    expanded = request.sampling_params.expand_video_request_outputs_for_queue(request)
    once, other = base.run(*(expanded or [request]))
    assert worst(once, other) > NEAR


@defect
def test_steps_that_are_not_said_are_the_checkpoint_s(tiny_distilled: Path, native: Native) -> None:
    settings = told("distilled")
    settings.get("pipeline_config", {}).pop("pyramid_num_inference_steps_list", None)
    served = Runtime(tiny_distilled, **settings)
    with forwards() as theirs:
        served.generate(num_frames=66)
    with forwards() as ours:
        native(tiny_distilled, "a fox", num_frames=66)
    assert theirs == ours


@defect
def test_a_folder_s_name_decides_nothing(tiny_distilled: Path, native: Native, tmp_path: Path) -> None:
    shutil.copytree(tiny_distilled, tmp_path / "helios")
    settings = told("distilled")
    settings.pop("model_id", None)
    served = Runtime(tmp_path / "helios", **settings)
    with forwards() as theirs:
        served.generate(num_frames=33, **asked("distilled"))
    with forwards() as ours:
        native(tiny_distilled, "a fox", num_frames=33, steps=STEPS["distilled"])
    assert theirs == ours


@defect
@pytest.mark.parametrize(("width", "height"), [(832, 480), (65, 64)])
def test_a_size_that_cannot_be_made_is_refused_at_once(
    width: int, height: int, runtime: Callable[[str], Runtime]
) -> None:
    with pytest.raises(ValueError, match="nearest"):
        runtime("distilled").request(width=width, height=height, **asked("distilled"))


@defect
@pytest.mark.parametrize(
    ("variant", "num_ranks", "side"),
    [("base", 2, 64), ("base", 4, 64), ("base", 2, 48), ("base", 4, 48), ("distilled", 2, 64)],
)
def test_ranks_that_share_a_sequence_make_the_video_of_one(
    variant: str, num_ranks: int, side: int, make_checkpoint: MakeCheckpoint, runtime: Callable[[str], Runtime]
) -> None:
    """48 pixels are 3 tokens: 81 in 9 frames do not divide by the ranks."""
    fields = {"width": side, "height": side, "num_frames": 66, **asked(variant)}
    expected = runtime(variant).generate(**fields)
    shared = {"num_gpus": num_ranks, "ulysses_degree": num_ranks, "enable_cfg_parallel": False}
    with generator(make_checkpoint(variant), **shared, **told(variant)) as started:
        assert worst(frames_of(started, "a fox", **fields), expected) <= NEAR


@defect
def test_ranks_share_the_sequences_of_guidance(
    tiny_base: Path, native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with forwards() as ours:
        native(tiny_base, "a fox", num_frames=33, steps=STEPS["base"])
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with generator(tiny_base, num_gpus=2, enable_cfg_parallel=True, **told("base")) as started:
        frames_of(started, "a fox", num_frames=33, **asked("base"))
    counts = [len(path.read_text().split()) for path in tmp_path.iterdir()]
    assert counts == [sum(ours) // 2] * 2


@defect
def test_tensor_parallelism_is_refused_or_works(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("base", amplify_history=True)
    shared = {"num_gpus": 2, "tp_size": 2, "enable_cfg_parallel": False, **told("base")}
    try:
        ServerArgs.from_kwargs(model_path=str(checkpoint), **shared)
    except UnsupportedOperationError:
        return
    with generator(checkpoint, **shared) as started:
        frames_of(started, "a fox", num_frames=33, **asked("base"))


@defect
def test_a_video_that_went_from_role_to_role_is_that_of_one_server(base: Runtime, tiny_base: Path) -> None:
    fields = {"num_frames": 66, **asked("base")}
    frames = made_apart(tiny_base, told("base"), **fields)
    expected = base.generate(**fields)
    assert len(frames) == len(expected)
    assert worst(frames, expected) <= NEAR


@pytest.fixture(scope="module")
def server(start_server: StartServer, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    flags = ["--batching-max-size", "2", "--batching-delay-ms", "1500"]
    if not IS_OURS:
        file = tmp_path_factory.mktemp("config") / "config.json"
        file.write_text(json.dumps(told("base")["pipeline_config"]))
        flags += ["--model-id", HUB_NAMES["base"], "--pipeline-config-path", str(file)]
    return start_server(tiny_base, *flags)


def test_both_backends_answer_with_a_file(server: Server) -> None:
    assert content(server, post(server, num_inference_steps=2))


@defect
def test_requests_at_a_time_are_made(server: Server) -> None:
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda prompt: post(server, prompt=prompt, num_inference_steps=2), ["a fox", "a dog"]))
    jobs = [finished(server, answer.json()["id"]) for answer in answers]
    assert [job["status"] for job in jobs] == ["completed"] * 2, jobs


@defect
def test_progress_is_told(server: Server) -> None:
    video_id = post(server, num_frames=330, num_inference_steps=4).json()["id"]
    told_so_far = set()
    while (job := httpx.get(f"{server.url}/v1/videos/{video_id}", timeout=60).json())["status"] != "completed":
        assert job["status"] != "failed", job
        told_so_far.add(job["progress"])
        time.sleep(0.05)
    assert len(told_so_far) > 3


@defect
def test_a_session_plays_chunk_by_chunk(server: Server) -> None:
    chunks, _ = play(server, {"num_frames": 66, "num_inference_steps": 2}, {})
    assert len(chunks) == 2
