"""What vLLM-Omni finds in this package, checked where it is not installed: the entry point, what it registers, the
shape of the class, and that nothing happens before it is called."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from helios_serve.model_executor.runtimes import vllm_omni

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIPELINE = ROOT / "helios_serve/model_executor/runtimes/vllm_pipeline.py"
CALLED_BY_THE_RUNTIME = {
    "forward": ["self", "req"],
    "load_weights": ["self", "weights"],
    "prepare_encode": ["self", "state"],
    "denoise_step": ["self", "input_batch"],
    "step_scheduler": ["self", "state", "noise_pred"],
    "post_decode": ["self", "state"],
    "prepare_next_chunk": ["self", "state"],
    "setup_compile": ["self"],
    "peek_chunk_media": ["self", "state"],
    "reference_video_decode_spec": ["cls"],
}
"""Methods and their positional parameters. `states` of `denoise_step`, and what the last one takes, go by name."""


@dataclass
class Registry:
    """Stands for vllm_omni.diffusion.registry."""

    calls: list[dict[str, str]] = field(default_factory=list)

    def register_diffusion_model(self, **names: str) -> None:
        self.calls.append(names)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry()
    module = ModuleType("vllm_omni.diffusion.registry")
    module.register_diffusion_model = registry.register_diffusion_model  # type: ignore[attr-defined]
    for name in ("vllm_omni", "vllm_omni.diffusion"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm_omni.diffusion.registry", module)
    monkeypatch.setattr(vllm_omni, "version", lambda package: "0.30.0" if package == "vllm-omni" else "1")
    return registry


def test_the_entry_point_is_the_function() -> None:
    entry = PROJECT["entry-points"]["vllm_omni.general_plugins"]["helios_serve"]
    module, name = entry.split(":")
    assert vars(importlib.import_module(module))[name] is vllm_omni.register


def test_both_names_of_helios_are_taken_over_and_twice_is_as_once(registry: Registry) -> None:
    vllm_omni.register()
    once = list(registry.calls)
    assert [call["model_arch"] for call in once] == ["HeliosPipeline", "HeliosPyramidPipeline"]
    vllm_omni.register()
    assert registry.calls == once + once


def test_what_is_registered_is_there(registry: Registry) -> None:
    vllm_omni.register()
    body = ast.parse(PIPELINE.read_text()).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    functions |= {name.name for node in body if isinstance(node, ast.ImportFrom) for name in node.names}
    for call in registry.calls:
        assert call["module_name"].split(".") == [*PIPELINE.relative_to(ROOT).parent.parts, PIPELINE.stem]
        assert {call["pre_process_func_name"], call["post_process_func_name"]} <= functions
        assert call["class_name"] in {node.name for node in body if isinstance(node, ast.ClassDef)}


def test_the_class_has_the_shape_that_the_runtime_looks_for() -> None:
    body = ast.parse(PIPELINE.read_text()).body
    (pipeline,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == "HeliosServePipeline")
    methods = {node.name: node.args for node in pipeline.body if isinstance(node, ast.FunctionDef)}
    assert {
        name: [argument.arg for argument in methods[name].args] for name in CALLED_BY_THE_RUNTIME
    } == CALLED_BY_THE_RUNTIME
    assert [argument.arg for argument in methods["__init__"].kwonlyargs] == ["od_config", "prefix"]
    attributes = {ast.unparse(node.target): node.value for node in pipeline.body if isinstance(node, ast.AnnAssign)}
    for flag in ("supports_step_execution", "supports_request_batch", "supports_request_cancellation"):
        assert ast.unparse(attributes[flag]) == "True"
    assert "dummy_run_num_frames" in attributes
    for parts in ("_dit_modules", "_encoder_modules", "_vae_modules", "_resident_modules"):
        assert ast.unparse(attributes[parts]) == "[]", "the runtime would move or hook them"


def test_nothing_loads_the_runtime_and_the_entry_point_loads_no_torch() -> None:
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in {"vllm", "vllm_omni"}, name
sys.meta_path.insert(0, Refuse())
import helios_serve.model_executor.runtimes.vllm_omni
assert not {"torch", "numpy", "pydantic"} & set(sys.modules)
import helios_serve.offline, helios_serve.server, helios_serve.cli
import helios_serve.model_executor.runtimes.videos
import helios_serve.model_executor.runtimes.memory_request
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("installed", "is_tested"),
    [("0.30.0", True), ("0.30.2rc1", True), ("0.29.9", False), ("0.31.0", False), ("1.0", False)],
)
def test_a_version_that_is_not_tested_is_named_with_the_right_ones(installed: str, is_tested: bool) -> None:
    problem = vllm_omni.version_problem(installed)
    assert (problem is None) == is_tested
    if problem is not None:
        assert installed in problem
        assert "vllm-omni>=0.30,<0.31" in problem


def test_another_version_is_told_and_served_all_the_same(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm_omni, "version", lambda package: "9.9.0")
    vllm_omni.register()
    assert len(registry.calls) == 2
    assert "install vllm-omni>=0.30,<0.31" in caplog.text


def test_the_extra_and_the_environment_of_the_tests_have_the_tested_versions() -> None:
    first, end = (".".join(str(number) for number in bound) for bound in vllm_omni.TESTED_VERSIONS)
    assert PROJECT["optional-dependencies"]["vllm"] == [f"vllm>={first},<{end}", f"vllm-omni>={first},<{end}"]
    script = (ROOT / "tests/runtimes/vllm_env.sh").read_text()
    assert f" vllm=={first}." in script
    assert f" vllm-omni=={first}." in script
