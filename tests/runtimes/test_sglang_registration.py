"""What SGLang-Diffusion finds in this package, checked where it is not installed: the entry point, what it registers,
how requests are read, what the stages make, and that nothing happens before it is called."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helios_serve.config import ModelConfig
from helios_serve.errors import UnsupportedOperationError
from helios_serve.model_executor.model import Checkpoint, load_text_encoder, load_transformer, load_vae, open_checkpoint
from helios_serve.model_executor.runtimes import sglang
from helios_serve.model_executor.runtimes.videos import VideoSteps
from helios_serve.offline import Helios
from helios_serve.parallel.collectives import GroupBrokenError
from helios_serve.workers.encoder import EncoderWorker
from helios_serve.workers.vae import VaeWorker
from tests.runtimes import sglang_stand_in as stand_in

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = "helios_serve.model_executor.runtimes.sglang_"
PIXELS = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[stand_in.Registry]:
    """SGLang's, beside as much of SGLang as is needed to register there."""
    registry = stand_in.Registry()
    for name, module in stand_in.modules(registry).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sglang, "version", lambda package: "0.5.23" if package == "sglang" else "1")
    yield registry
    for name in [name for name in sys.modules if name.startswith(OWN)]:
        del sys.modules[name]


def own(name: str) -> ModuleType:
    return importlib.import_module(OWN + name)


def test_the_entry_point_is_the_function() -> None:
    entry = PROJECT["entry-points"]["sglang.multimodal_gen.plugins"]["helios_serve"]
    module, name = entry.split(":")
    assert vars(importlib.import_module(module))[name] is sglang.register


def test_both_names_of_helios_are_taken_over_and_twice_is_as_once(registry: stand_in.Registry) -> None:
    sglang.register()
    once = registry.pipelines.copy()
    assert [call["pipeline"].pipeline_name for call in once] == ["HeliosPipeline", "HeliosPyramidPipeline"]
    assert all(call["overwrite"] for call in once)
    assert once[0]["hf_model_paths"] == list(sglang.HUB_IDS)
    for call in once:
        (detects,) = call["model_detectors"]
        assert detects(call["pipeline"].pipeline_name.lower())
        assert not detects("/models/helios")
    (adapter,) = registry.adapters
    assert adapter == (own("classes").HeliosServeConfig, own("realtime").HeliosServeRealtimeAdapter)
    sglang.register()
    assert [call["pipeline"] for call in registry.pipelines] == [call["pipeline"] for call in once * 2]


def test_the_classes_have_the_shape_that_the_runtime_looks_for(registry: stand_in.Registry) -> None:
    sglang.register()
    config_class = registry.pipelines[0]["pipeline_config_cls"]
    assert "helios" in config_class.__name__.lower()  # else ranks would not share sequences
    config = pickle.loads(pickle.dumps(config_class()))  # it goes to each worker so
    assert config.task_type == stand_in.ModelTaskType.T2V
    assert set(config.supported_task_types) == set(stand_in.ModelTaskType)
    assert config.supports_dynamic_batching()
    assert config.supports_native_grouped_requests()
    assert config.supports_batching_image_conditioning()
    assert config.supports_disaggregation()
    assert not config.get_model_deployment_config().auto_enable_cfg_parallel
    sampling = registry.pipelines[0]["sampling_param_cls"]
    assert pickle.loads(pickle.dumps(sampling(prompt="a fox"))).prompt == "a fox"
    assert {"steps", "guidance_scale", "transition_chunks"} & sampling.video_request_extra_fields() == {
        "steps",
        "guidance_scale",
    }


def test_nothing_loads_the_runtime_and_the_entry_point_loads_no_torch() -> None:
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] != "sglang", name
sys.meta_path.insert(0, Refuse())
import helios_serve.model_executor.runtimes.sglang
assert not {"torch", "numpy", "pydantic"} & set(sys.modules)
import helios_serve.offline, helios_serve.cli
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_registering_loads_no_model_code() -> None:
    program = """
import sys
from unittest.mock import patch
from tests.runtimes import sglang_stand_in
sys.modules.update(sglang_stand_in.modules(sglang_stand_in.Registry()))
from helios_serve.model_executor.runtimes import sglang
with patch.object(sglang, "version", lambda package: "0.5.23"):
    sglang.register()
assert "helios_serve.model_executor.runtimes.sglang_classes" in sys.modules
assert not {"torch", "helios_serve.model_executor.model", "helios_serve.kernels"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("installed", "is_tested"),
    [("0.5.23", True), ("0.5.23.post1", True), ("0.5.22", False), ("0.5.24", False), ("0.6.0", False), ("1.0", False)],
)
def test_a_version_that_is_not_tested_is_named_with_the_right_ones(installed: str, is_tested: bool) -> None:
    problem = sglang.version_problem(installed)
    assert (problem is None) == is_tested
    if problem is not None:
        assert installed in problem
        assert "sglang>=0.5.23,<0.5.24" in problem


def test_another_version_is_told_and_served_all_the_same(
    registry: stand_in.Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sglang, "version", lambda package: "9.9.0")
    sglang.register()
    assert len(registry.pipelines) == 2
    assert "install sglang>=0.5.23,<0.5.24" in caplog.text


def test_the_extra_and_the_environment_of_the_tests_have_the_tested_versions() -> None:
    first, end = (".".join(str(number) for number in bound) for bound in sglang.TESTED_VERSIONS)
    assert PROJECT["optional-dependencies"]["sglang"] == [f"sglang>={first},<{end}"]
    assert f" sglang=={first}\n" in (ROOT / "tests/runtimes/sglang_env.sh").read_text()


def asked(checkpoint: Path, prompt: str = "a fox", **fields: Any) -> stand_in.Req:
    """A request as SGLang's front end leaves it. Raises: ValueError as there."""
    fields = {"width": 64, "height": 64, "seed": 7, "num_frames": 40, **fields}
    sampling = own("requests").HeliosServeSamplingParams(prompt=prompt, **fields)
    sampling._explicit_fields = set(fields)
    sampling._adjust_visual_fields(SimpleNamespace(model_path=str(checkpoint), comfyui_mode=False), None)
    request = stand_in.Req(sampling)
    sampling.prepare_video_request_for_queue(request)
    return request


@pytest.mark.usefixtures("registry")
def test_a_request_says_in_sglang_s_fields_what_it_comes_to(tiny_distilled: Path) -> None:
    sampling = asked(tiny_distilled, width=None, height=None, api_fields={"steps": [1, 1, 1]}).sampling_params
    assert (sampling.width, sampling.height, sampling.num_frames) == (128, 64, 40)
    assert (sampling.guidance_scale, sampling.num_inference_steps) == (1.0, 9)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 65}, "nearest: 64x64"),
        ({"api_fields": {"colour": "red"}}, "colour: unknown parameter"),
        ({"enable_teacache": True}, "enable_teacache: not with Helios"),
        ({"image_path": "/nowhere.png"}, "No such file"),
        ({"image_path": "data:image/png;base64,AAAA"}, "image"),
        ({"image_path": ["/a.png", "/b.png"]}, "one is what a video begins from"),
    ],
)
def test_what_cannot_be_served_is_refused(fields: dict[str, Any], said: str, tiny_distilled: Path) -> None:
    with pytest.raises(ValueError, match=said):
        asked(tiny_distilled, **fields)


@pytest.mark.usefixtures("registry")
def test_keys_of_a_body_that_sglang_does_not_know_go_to_the_parser() -> None:
    request = SimpleNamespace(model_extra={"steps": [1], "quality": "high"})
    lowered = own("requests").HeliosServeSamplingParams.lower_video_request_kwargs(request, {"seed": 3, "steps": [1]})
    assert lowered == {"seed": 3, "api_fields": {"steps": [1]}}


@pytest.fixture(scope="module")
def checkpoint(tiny_distilled: Path) -> Checkpoint:
    return open_checkpoint(ModelConfig(model=str(tiny_distilled)))


@pytest.fixture(scope="module")
def workers(checkpoint: Checkpoint) -> tuple[EncoderWorker, VideoSteps, VaeWorker]:
    vae = load_vae(checkpoint)
    steps = VideoSteps(load_transformer(checkpoint), checkpoint.rules)
    return EncoderWorker(load_text_encoder(checkpoint), vae), steps, VaeWorker(vae)


@pytest.fixture(scope="module")
def helios(tiny_distilled: Path) -> Helios:
    return Helios(tiny_distilled)


class Stages:
    """The three stages of one server, or of three."""

    def __init__(self, checkpoint: Checkpoint, workers: tuple[EncoderWorker, VideoSteps, VaeWorker], alone: bool):
        module = own("stages")
        hop = module._Hop(is_alone=alone)
        self.encode = module.EncodeStage(workers[0], checkpoint.config.info("model"), hop)
        self.denoise = module.DenoiseStage(workers[1], hop)
        self.decode = module.DecodeStage(workers[2], hop)

    def run(self, *requests: stand_in.Req) -> list[Any]:
        for request in requests:
            self.encode.forward(request, None)
        self.denoise.run_grouped_requests(list(requests), None)
        for request in requests:
            self.decode.forward(request, None)
        return [request.output[0] for request in requests]


def native(helios: Helios, prompt: str | None = None, **fields: Any) -> Any:
    asked = {"size": "64x64", "seed": 7, "num_frames": 40, **fields}
    return np.concatenate([chunk.frames for chunk in helios.generate(prompt, **asked)])


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_stages_make_the_engine_s_video(
    task: str, alone: bool, checkpoint: Checkpoint, workers: Any, helios: Helios, tiny_distilled: Path, tmp_path: Path
) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "first.png")
    path = str(tmp_path / "first.png") if task == "i2v" else None
    stages = Stages(checkpoint, workers, alone)
    request = asked(tiny_distilled, image_path=path, api_fields={"steps": [1, 1, 1]})
    (frames,) = stages.run(request)
    if not alone:  # SGLang's own way from a float in 0 to 1 to a pixel
        frames = (frames * 255).clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()
    expected = native(helios, "a fox", steps=[1, 1, 1], **({} if path is None else {"image": path}))
    assert np.array_equal(frames, expected)
    assert stages.denoise.steps_reported == 9
    assert not request.extra


@pytest.mark.usefixtures("registry")
def test_requests_of_a_group_share_steps(
    checkpoint: Checkpoint, workers: Any, helios: Helios, tiny_distilled: Path
) -> None:
    fox = asked(tiny_distilled, "a fox", api_fields={"steps": [1, 1, 1]})
    dog = asked(tiny_distilled, "a dog", width=128, num_frames=33, seed=8, api_fields={"steps": [1, 2, 1]})
    frames = Stages(checkpoint, workers, True).run(fox, dog)
    assert np.abs(frames[0].astype(int) - native(helios, "a fox", steps=[1, 1, 1])).max() <= 1
    wide = native(helios, "a dog", size="128x64", num_frames=33, seed=8, steps=[1, 2, 1])
    assert np.abs(frames[1].astype(int) - wide).max() <= 1


@pytest.mark.usefixtures("registry")
def test_a_session_s_prompt_changes_between_its_chunks(
    checkpoint: Checkpoint, workers: Any, helios: Helios, tiny_distilled: Path
) -> None:
    stages, session = Stages(checkpoint, workers, True), stand_in.Session()
    frames = []
    for chunk, prompt in enumerate(["a fox", "a dog", "a dog"]):
        request = asked(tiny_distilled, prompt, num_frames=70, api_fields={"steps": [1, 1, 1]})
        request.session, request.block_idx = session, chunk
        frames += stages.run(request)
    assert [len(part) for part in frames] == [33, 33, 4]
    schedule = [{"prompt": "a fox"}, {"prompt": "a dog", "chunk": 1}]
    assert np.array_equal(np.concatenate(frames), native(helios, prompts=schedule, num_frames=70, steps=[1, 1, 1]))
    (state,) = session.states.values()
    state.dispose()
    assert workers[1]._runner.active == ()


@pytest.mark.usefixtures("registry")
def test_sessions_are_refused_where_roles_are_apart(checkpoint: Checkpoint, workers: Any, tiny_distilled: Path) -> None:
    request = asked(tiny_distilled)
    request.session = stand_in.Session()
    with pytest.raises(UnsupportedOperationError, match="one server has all roles"):
        Stages(checkpoint, workers, False).run(request)


@pytest.mark.usefixtures("registry")
def test_a_worker_whose_ranks_no_longer_agree_ends(
    checkpoint: Checkpoint, workers: Any, tiny_distilled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(runs: object) -> None:
        raise GroupBrokenError("rank 1 is gone")

    monkeypatch.setattr(workers[1], "step", lose)
    with pytest.raises(SystemExit, match="rank 1 is gone; restart the server"):
        Stages(checkpoint, workers, True).run(asked(tiny_distilled))
    assert workers[1]._runner.active == ()


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("payload", ["", 3, {"text": "a dog"}, {"prompt": "a dog", "transition_chunks": -1}])
def test_what_is_no_change_of_the_prompt_is_refused(payload: Any) -> None:
    module = own("realtime")
    session = SimpleNamespace(adapter_state=module.SessionControl("a fox"), generate_chunk_cnt=1)
    event = SimpleNamespace(kind="prompt", payload=payload, event_id=5)
    with pytest.raises(ValueError, match="payload must be a prompt"):
        module.HeliosServeRealtimeAdapter().ingest_event(session, event)
    assert session.adapter_state == module.SessionControl("a fox")


@pytest.mark.usefixtures("registry")
def test_a_change_of_the_prompt_is_in_the_next_chunk_s_inputs() -> None:
    module = own("realtime")
    session = SimpleNamespace(adapter_state=module.SessionControl("a fox"), generate_chunk_cnt=1)
    adapter = module.HeliosServeRealtimeAdapter()
    event = SimpleNamespace(kind="prompt", payload={"prompt": "a dog", "transition_chunks": 0}, event_id=5)
    adapter.ingest_event(session, event)
    inputs = adapter.sample_chunk_inputs(session, None, None, 9)
    assert (inputs.prompt, inputs.condition_inputs) == ("a dog", {"transition_chunks": 0})
    assert adapter.get_realtime_event_id(session) == 5
