"""Loading official layouts, strictly: what diffusers writes loads, what is broken is named."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import HeliosPipeline, HeliosPyramidPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

from helios_serve.errors import CheckpointError
from helios_serve.model_executor.checkpoint import load_module, read_config, resolve_checkpoint
from helios_serve.model_executor.model_config import CheckpointConfig, SchedulerConfig, TransformerConfig
from helios_serve.model_executor.text_encoder import TextEncoder
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.model_executor.vae import VaeConfig, WanVAE

MakeCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")
TRANSFORMER_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def load_transformer(path: Path, dtype: torch.dtype = torch.float32) -> HeliosTransformer:
    config = read_config(path).transformer
    return load_module(lambda: HeliosTransformer(config), path / "transformer", CPU, dtype)


def load_all(path: Path) -> CheckpointConfig:
    config = read_config(path)
    load_transformer(path)
    load_module(lambda: WanVAE(config.vae), path / "vae", CPU, torch.float32)
    TextEncoder.load(path, CPU, torch.float32)
    return config


def edit_json(path: Path, **changes: object) -> None:
    """Sets keys; None removes one."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def copy(tiny_distilled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_distilled, tmp_path / "copy"))


# ---- what loads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "300KB"])
def test_what_diffusers_writes_loads(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, variant: str, max_shard_size: str
) -> None:
    made = make_checkpoint(variant, amplify_history=True)
    pipeline_class = HeliosPipeline if variant == "base" else HeliosPyramidPipeline
    pipeline = pipeline_class.from_pretrained(made, local_files_only=True)
    pipeline.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    num_shards = len(list((tmp_path / "saved/transformer").glob("*.safetensors")))
    assert (num_shards > 1) == (max_shard_size == "300KB")

    config = load_all(tmp_path / "saved")
    assert config.variant == variant
    ours = load_transformer(tmp_path / "saved").state_dict()
    for name, tensor in load_transformer(made).state_dict().items():
        assert torch.equal(ours[name], tensor), name
    first, second = (TextEncoder.load(path, CPU, torch.float32) for path in (made, tmp_path / "saved"))
    assert torch.equal(first.encode("a red fox"), second.encode("a red fox"))


def test_fused_parameters_are_stacked_in_order(tiny_distilled: Path) -> None:
    stored, loaded = load_file(tiny_distilled / TRANSFORMER_WEIGHTS), load_transformer(tiny_distilled).state_dict()
    qkv = torch.cat([stored[f"blocks.1.attn1.{name}.weight"] for name in ("to_q", "to_k", "to_v")])
    assert torch.equal(loaded["blocks.1.attn1.to_qkv.weight"], qkv)
    assert torch.equal(loaded["patch_long.weight"], stored["patch_long.weight"])


def test_float32_parameters_stay_under_bfloat16(make_checkpoint: MakeCheckpoint) -> None:
    made = make_checkpoint("distilled", amplify_history=True)
    module = load_transformer(made, torch.bfloat16)
    reference = HeliosPyramidPipeline.from_pretrained(made, dtype=torch.bfloat16, local_files_only=True).transformer
    theirs = reference.state_dict()
    for name, parameter in module.named_parameters():
        key = module.fused_parameters().get(name, (name,))[0]
        assert parameter.dtype == theirs[key].dtype, name
        assert not parameter.requires_grad
    assert module.scale_shift_tables.dtype == torch.float32
    assert module.blocks[0].attn1.to_qkv.weight.dtype == torch.bfloat16
    assert not module.training


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = nn.Linear(3, 2)
        self.second.weight = self.first.weight


def test_shared_parameters_stay_shared(tmp_path: Path) -> None:
    stored = {"first.weight": torch.randn(2, 3), "first.bias": torch.zeros(2), "second.bias": torch.ones(2)}
    save_file(stored, tmp_path / "model.safetensors")
    module = load_module(Shared, tmp_path, CPU, torch.float32)
    assert module.first.weight is module.second.weight
    assert torch.equal(module.second.weight, stored["first.weight"])


def test_the_official_configurations_are_served() -> None:
    official = {
        "base": ("HeliosPipeline", {"_class_name": "HeliosScheduler", "stages": 1, "stage_range": [0, 1]}, {}, 16),
        "mid": ("HeliosPyramidPipeline", {"_class_name": "HeliosScheduler"}, {"is_cfg_zero_star": True}, 64),
        "distilled": (
            "HeliosPyramidPipeline",
            {"_class_name": "HeliosDMDScheduler", "scheduler_type": "dmd"},
            {"is_distilled": True},
            64,
        ),
    }
    steps = {"base": (50,), "mid": (20, 20, 20), "distilled": (2, 2, 2)}
    for variant, (pipeline, scheduler, flags, multiple) in official.items():
        info = CheckpointConfig.from_parts(
            Path(),
            {"_class_name": pipeline, **flags},
            TransformerConfig.from_json({"_class_name": "HeliosTransformer3DModel"}),
            SchedulerConfig.from_json(scheduler | {"use_dynamic_shifting": True}),
            VaeConfig.from_json({"_class_name": "AutoencoderKLWan"}),
        ).info("helios")
        assert (info.variant, info.size_multiple, info.default_steps) == (variant, multiple, steps[variant])
        assert info.default_size == (640, 384)
        assert info.guidance == ("cfg_zero_star" if variant == "mid" else "cfg")
        assert info.default_guidance_scale == (1.0 if variant == "distilled" else 5.0)


def test_defaults_follow_the_scheduler_class() -> None:
    unipc = SchedulerConfig.from_json({"_class_name": "HeliosScheduler"})
    dmd = SchedulerConfig.from_json({"_class_name": "HeliosDMDScheduler", "scheduler_type": "dmd", "base_shift": 0.4})
    euler = SchedulerConfig.from_json({"_class_name": "HeliosScheduler", "scheduler_type": "euler", "_x": 1})
    assert [(c.solver, c.time_shift_type) for c in (unipc, dmd, euler)] == [
        ("unipc", "exponential"),
        ("dmd", "linear"),
        ("euler", "exponential"),
    ]
    assert (unipc.stages, dmd.use_dynamic_shifting, dmd.base_shift, unipc.base_shift) == (3, False, 0.4, 0.5)


def test_keys_that_the_reference_ignores_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    SchedulerConfig.from_json({"_class_name": "HeliosDMDScheduler", "scheduler_type": "dmd", "future_option": 1})
    assert [record.getMessage() for record in caplog.records] == [
        "scheduler/scheduler_config.json: ignored unknown keys: future_option"
    ]


def test_recommended_sizes_follow_the_number_of_stages(copy: Path) -> None:
    edit_json(copy / SCHEDULER, stages=4, stage_range=[0, 0.25, 0.5, 0.75, 1])
    assert read_config(copy).info("tiny").recommended_sizes == ((128, 128),)
    edit_json(copy / SCHEDULER, stages=2, stage_range=[0, 0.5, 1])
    assert read_config(copy).info("tiny").recommended_sizes == ((128, 64), (64, 128), (128, 128))


def test_a_checkpoint_may_recommend_steps_and_a_prompt(copy: Path) -> None:
    before = read_config(copy).info("tiny")
    assert (before.default_steps, before.example_prompt) == ((2, 2, 2), None)
    edit_json(copy / INDEX, _helios_serve={"default_steps": [3, 1, 2], "example_prompt": "a red circle"})
    info = read_config(copy).info("tiny")
    assert (info.default_steps, info.example_prompt) == ((3, 1, 2), "a red circle")
    assert info.recommended_sizes == ((640, 384),)


# ---- what is refused ------------------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _to_pickle(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))


def _shard_without_file(path: Path) -> None:
    weights = path / TRANSFORMER_WEIGHTS
    keys = list(load_file(weights))
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    shards = [f"diffusion_pytorch_model-0000{1 + (key == keys[-1])}-of-00002.safetensors" for key in keys]
    index = {"metadata": {}, "weight_map": dict(zip(keys, shards, strict=True))}
    (path / f"{TRANSFORMER_WEIGHTS}.index.json").write_text(json.dumps(index))


def _shard_twice(path: Path) -> None:
    weights = path / TRANSFORMER_WEIGHTS
    tensors = load_file(weights)
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    save_file({"proj_out.bias": tensors["proj_out.bias"]}, weights.with_name(shards[1]))
    weights.rename(weights.with_name(shards[0]))
    index = {"weight_map": dict.fromkeys(tensors, shards[0]) | {"proj_out.bias": shards[1]}}
    (path / f"{TRANSFORMER_WEIGHTS}.index.json").write_text(json.dumps(index))


def _drop(key: str) -> Callable[[Path], None]:
    return lambda path: edit_weights(path / TRANSFORMER_WEIGHTS, lambda tensors: tensors.__delitem__(key))


def _put(key: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda path: edit_weights(path / TRANSFORMER_WEIGHTS, lambda tensors: tensors.__setitem__(key, tensor))


def _edit(file: str, **changes: Any) -> Callable[[Path], None]:
    return lambda path: edit_json(path / file, **changes)


INDEX, TRANSFORMER = "model_index.json", "transformer/config.json"
SCHEDULER, TEXT = "scheduler/scheduler_config.json", "text_encoder/config.json"

BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no checkpoint": (shutil.rmtree, ("copy does not exist", "model_index.json")),
    "no index": (lambda p: (p / INDEX).unlink(), ("copy/model_index.json is missing",)),
    "no component": (lambda p: shutil.rmtree(p / "vae"), ("copy/vae is missing", "text_encoder, tokenizer")),
    "no config": (lambda p: (p / TRANSFORMER).unlink(), ("copy/transformer/config.json is missing",)),
    "no weights": (lambda p: (p / TRANSFORMER_WEIGHTS).unlink(), ("transformer has no weights", "model.safetensors")),
    "missing shard": (_shard_without_file, ("lacks shards that its index names", "-00002-of-00002.safetensors")),
    "index without map": (
        lambda p: (p / f"{TRANSFORMER_WEIGHTS}.index.json").write_text("{}"),
        ("index.json has no weight_map", "each key"),
    ),
    "shard elsewhere": (
        lambda p: (p / f"{TRANSFORMER_WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../vae/x.safetensors"}}'),
        ("'../vae/x.safetensors'", "beside its index"),
    ),
    "truncated": (lambda p: _truncate(p / TRANSFORMER_WEIGHTS), (TRANSFORMER_WEIGHTS, "is cut short", "again")),
    "empty": (lambda p: (p / TRANSFORMER_WEIGHTS).write_bytes(b""), (TRANSFORMER_WEIGHTS, "is cut short")),
    "cut in the header": (
        lambda p: (p / TRANSFORMER_WEIGHTS).write_bytes((p / TRANSFORMER_WEIGHTS).read_bytes()[:300]),
        (TRANSFORMER_WEIGHTS, "is cut short"),
    ),
    "git lfs pointer": (
        lambda p: (p / TRANSFORMER_WEIGHTS).write_bytes(b"version https://git-lfs"),
        ("is not a safetensors file", "Git LFS pointers"),
    ),
    "garbage header": (
        lambda p: (p / TRANSFORMER_WEIGHTS).write_bytes(b"\x08" + bytes(7) + b"garbage!"),
        ("is not a safetensors file",),
    ),
    "renamed pickle": (
        lambda p: (p / TRANSFORMER_WEIGHTS).write_bytes(pickle.dumps([0] * 50)),
        ("is not a safetensors file", "pickles"),
    ),
    "pickle": (lambda p: _to_pickle(p / "transformer"), ("diffusion_pytorch_model.bin; only safetensors are read",)),
    "truncated text encoder": (
        lambda p: _truncate(p / "text_encoder/model.safetensors"),
        ("text_encoder/model.safetensors is cut short",),
    ),
    "invalid json": (lambda p: (p / TRANSFORMER).write_text("{,}"), ("config.json is not valid JSON", "line 1")),
    "json list": (lambda p: (p / SCHEDULER).write_text("[]"), ("holds a JSON list", "must hold an object")),
    "not text": (lambda p: (p / INDEX).write_bytes(b"\xff\xfe\x00"), ("cannot be read as JSON text",)),
    "wrong pipeline": (_edit(INDEX, _class_name="WanPipeline"), ("'WanPipeline'", "HeliosPipeline or HeliosPyramid")),
    "wrong class": (
        _edit(TRANSFORMER, _class_name="WanTransformer3DModel"),
        ("copy/transformer/config.json: _class_name is 'WanTransformer3DModel'", "HeliosTransformer3DModel is served"),
    ),
    "wrong component": (
        _edit(INDEX, text_encoder=["transformers", "T5EncoderModel"]),
        ("text_encoder is ['transformers', 'T5EncoderModel']", "must be UMT5EncoderModel"),
    ),
    "classes disagree": (
        _edit(INDEX, scheduler=["diffusers", "HeliosScheduler"]),
        ("_class_name is 'HeliosDMDScheduler'", "model_index.json says HeliosScheduler"),
    ),
    "missing key": (_drop("blocks.1.ffn.net.2.bias"), ("1 missing: blocks.1.ffn.net.2.bias",)),
    "missing part of a fused one": (_drop("blocks.0.attn1.to_k.weight"), ("1 missing: blocks.0.attn1.to_k.weight",)),
    "left-over key": (_put("blocks.3.extra", torch.zeros(1)), ("1 left over: blocks.3.extra",)),
    "wrong shape": (
        _put("proj_out.bias", torch.zeros(7)),
        ("1 misfitting: proj_out.bias is [7], must be [64]",),
    ),
    "wrong type": (
        _put("proj_out.bias", torch.zeros(64, dtype=torch.int8)),
        ("proj_out.bias is of type I8, must be one of F64, F32, F16, BF16",),
    ),
    "more layers than weights": (
        _edit(TRANSFORMER, num_layers=5),
        ("54 missing: blocks.3.scale_shift_table", "and 44 more"),
    ),
    "base with three stages": (
        _edit(INDEX, _class_name="HeliosPipeline", is_distilled=False),
        ("'HeliosDMDScheduler'", "HeliosPipeline needs HeliosScheduler"),
    ),
    "mid with the scheduler of distilled": (
        _edit(INDEX, is_distilled=False),
        ("'HeliosDMDScheduler'", "HeliosPyramidPipeline with is_distilled false needs HeliosScheduler"),
    ),
    "pyramid of one stage": (
        _edit(SCHEDULER, stages=1, stage_range=[0, 1]),
        ("stages is 1", "needs at least 2"),
    ),
    "channels": (_edit(TRANSFORMER, in_channels=8, out_channels=8), ("in_channels is 8", "z_dim of vae/config.json")),
    "text width": (_edit(TRANSFORMER, text_dim=48), ("d_model is 32", "text_dim of transformer/config.json, 48")),
    "other text model": (_edit(TEXT, model_type="t5"), ("model_type is 't5'", "'umt5' is served")),
    "bad text config": (_edit(TEXT, num_layers="two"), ("text_encoder/config.json is not a UMT5 configuration",)),
    "vae": (_edit("vae/config.json", is_residual=True), ("copy/vae/config.json: is_residual is True",)),
    "sizes": (_edit(INDEX, _helios_serve={"recommended_sizes": [[100, 64]]}), ("[100, 64]", "multiples of 16")),
    "prompt": (_edit(INDEX, _helios_serve={"example_prompt": 7}), ("example_prompt is 7", "must be a string")),
    "steps": (_edit(INDEX, _helios_serve={"default_steps": [1]}), ("default_steps is [1]", "a list of 3 positive")),
    "activation": (
        _edit(TEXT, feed_forward_proj="gated-foo"),
        ("copy/text_encoder/config.json", "'gated-foo'", "'gated-gelu'"),
    ),
    "one tensor in two shards": (
        _shard_twice,
        ("-00002-of-00002.safetensors", "another shard holds too: proj_out.bias"),
    ),
    "bytes too many": (
        lambda p: (p / TRANSFORMER_WEIGHTS).write_bytes((p / TRANSFORMER_WEIGHTS).read_bytes() + b"x"),
        (TRANSFORMER_WEIGHTS, "cut short or damaged"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_told_in_one_message(copy: Path, name: str) -> None:
    breakage, expected = BROKEN[name]
    breakage(copy)
    with pytest.raises(CheckpointError) as caught:
        load_all(copy)
    message = caught.value.message
    for part in (str(copy), *expected):
        assert part in message
    assert message.count(str(copy)) == 1
    assert len(message) < 900


UNSERVED: list[tuple[str, dict[str, object], str]] = [
    ("HeliosTransformer3DModel", {"added_kv_proj_dim": 64}, "added_kv_proj_dim is 64; None is served"),
    ("HeliosTransformer3DModel", {"qk_norm": "rms_norm"}, "qk_norm is 'rms_norm'; 'rms_norm_across_heads' is served"),
    ("HeliosTransformer3DModel", {"cross_attn_norm": False}, "cross_attn_norm is False; True is served"),
    ("HeliosTransformer3DModel", {"guidance_cross_attn": False}, "guidance_cross_attn is False"),
    ("HeliosTransformer3DModel", {"zero_history_timestep": False}, "zero_history_timestep is False"),
    ("HeliosTransformer3DModel", {"has_multi_term_memory_patch": False}, "has_multi_term_memory_patch is False"),
    ("HeliosTransformer3DModel", {"rope_dim": [44, 42, 40]}, "its sum must be attention_head_dim, 128"),
    ("HeliosTransformer3DModel", {"rope_dim": [44, 41, 43]}, "its entries must be even"),
    ("HeliosTransformer3DModel", {"patch_size": [2, 2, 2]}, "[1, p, p] is served"),
    ("HeliosTransformer3DModel", {"patch_size": [1, 2]}, "a list of 3 positive integers"),
    ("HeliosTransformer3DModel", {"out_channels": 32}, "out_channels is 32; it must equal in_channels, 16"),
    ("HeliosTransformer3DModel", {"num_layers": 0}, "num_layers is 0; it must be a positive integer"),
    ("HeliosTransformer3DModel", {"eps": "small"}, "eps is 'small'; it must be a finite number above 0"),
    ("HeliosTransformer3DModel", {"eps": -1e-6}, "eps is -1e-06; it must be a finite number above 0"),
    ("HeliosTransformer3DModel", {"rope_theta": float("nan")}, "rope_theta is nan; it must be a finite number above 0"),
    ("HeliosTransformer3DModel", {"is_amplify_history": 1}, "is_amplify_history is 1; it must be true or false"),
    ("HeliosTransformer3DModel", {"history_scale_mode": "row"}, "it must be 'per_head' or 'scalar'"),
    ("HeliosScheduler", {"solver_type": "bh1"}, "solver_type is 'bh1'; 'bh2' is served"),
    ("HeliosScheduler", {"disable_corrector": [0]}, "disable_corrector is [0]; [] is served"),
    ("HeliosScheduler", {"predict_x0": False}, "predict_x0 is False; True is served"),
    ("HeliosScheduler", {"prediction_type": "epsilon"}, "prediction_type is 'epsilon'; 'flow_prediction' is served"),
    ("HeliosDMDScheduler", {"prediction_type": "epsilon"}, "prediction_type is 'epsilon'"),
    ("HeliosScheduler", {"thresholding": True}, "thresholding is True; False is served"),
    ("HeliosScheduler", {"solver_p": ["diffusers", "X"]}, "solver_p is ['diffusers', 'X']; None is served"),
    ("HeliosScheduler", {"solver_order": 3}, "solver_order is 3; 1 or 2 is served"),
    ("HeliosDMDScheduler", {"use_flow_sigmas": False}, "use_flow_sigmas is False; True is served"),
    ("HeliosScheduler", {"scheduler_type": "dmd"}, "it must be 'unipc' or 'euler'"),
    ("HeliosScheduler", {"time_shift_type": "cubic"}, "it must be 'exponential' or 'linear'"),
    ("HeliosDMDScheduler", {"use_dynamic_shifting": True, "shift": 3.0}, "with use_dynamic_shifting it must be 1.0"),
    ("HeliosScheduler", {"stages": 2}, "stages = 2 needs 3 bounds"),
    ("HeliosScheduler", {"stage_range": [0, 0.7, 0.3, 1]}, "it must rise within [0, 1]"),
    ("HeliosScheduler", {"stage_range": [0, 0.5, 1, 2]}, "it must rise within [0, 1]"),
    ("HeliosScheduler", {"gamma": float("nan")}, "gamma is nan; it must be a finite number"),
    ("HeliosScheduler", {"base_shift": 10**400}, "it must be a finite number"),
    ("HeliosScheduler", {"shift": 0}, "shift is 0; it must be a finite number above 0"),
    ("HeliosScheduler", {"stage_range": [0, float("nan"), 0.6, 1]}, "it must be a list of finite numbers"),
    ("HeliosScheduler", {"num_train_timesteps": 1}, "num_train_timesteps is 1; 2 to 100000 are served"),
    ("HeliosScheduler", {"num_train_timesteps": 10**9}, "2 to 100000 are served"),
    ("HeliosScheduler", {"gamma": 0}, "gamma is 0.0; it must be above 0 and at most 1/3"),
    ("UniPCMultistepScheduler", {}, "HeliosScheduler or HeliosDMDScheduler is served"),
]


@pytest.mark.parametrize(("class_name", "changes", "message"), UNSERVED)
def test_a_setting_that_is_not_served_is_named(class_name: str, changes: dict[str, object], message: str) -> None:
    is_transformer = class_name == "HeliosTransformer3DModel"
    parse = TransformerConfig.from_json if is_transformer else SchedulerConfig.from_json
    file = "transformer/config.json" if is_transformer else "scheduler/scheduler_config.json"
    with pytest.raises(CheckpointError) as caught:
        parse({"_class_name": class_name, **changes})
    assert message in caught.value.message
    assert caught.value.message.startswith(f"{file}: ")
    assert caught.value.param in {"_class_name", "stage_range", *changes}


# ---- where checkpoints come from ------------------------------------------------------------------------------------


def test_a_directory_is_taken_as_it_is(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_base.parent)
    assert resolve_checkpoint(tiny_base.name) == tiny_base.resolve()


def test_a_hub_id_is_downloaded_without_what_is_not_needed(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked[repo_id] = allow_patterns
        return str(tiny_base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_checkpoint("owner/name") == tiny_base
    listed = [
        "model_index.json",
        "transformer/diffusion_pytorch_model-00001-of-00006.safetensors",
        "transformer/diffusion_pytorch_model.bin",
        "transformer_ode/diffusion_pytorch_model-00001-of-00006.safetensors",
        "tokenizer/spiece.model",
        "text_encoder/model.safetensors.index.json",
        "guider/guider_config.json",
    ]
    kept = list(huggingface_hub.utils.filter_repo_objects(listed, allow_patterns=asked["owner/name"]))
    assert kept == [listed[0], listed[1], listed[4], listed[5]]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), "the hub cannot be reached, and no copy is cached"),
        (OSError("disk full"), "downloading owner/name from the hub failed: disk full"),
        (huggingface_hub.errors.HFValidationError("bad"), "neither a directory nor a hub repository"),
    ],
)
def test_hub_errors_are_translated(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint("owner/name")


def test_neither_a_directory_nor_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; give a checkpoint directory or a hub id"):
        resolve_checkpoint(str(tmp_path / "nothing"))
    (tmp_path / "file.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a directory"):
        resolve_checkpoint(str(tmp_path / "file.safetensors"))
