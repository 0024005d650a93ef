"""Checkpoints in the official layout: finding one, reading its configuration, loading weights into modules.

Knows files, safetensors and how strictly keys must match. Knows no architecture: modules say what they are made of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from helios_serve.errors import CheckpointError
from helios_serve.kernels import FP8
from helios_serve.model_executor.model_config import (
    MODEL_INDEX_FILE,
    SCHEDULER_FILE,
    TEXT_ENCODER_FILE,
    TRANSFORMER_FILE,
    CheckpointConfig,
    SchedulerConfig,
    TransformerConfig,
)
from helios_serve.model_executor.vae import VaeConfig

VAE_FILE = "vae/config.json"
COMPONENT_CLASSES = {
    "transformer": (TransformerConfig.CLASS_NAME,),
    "vae": (VaeConfig.CLASS_NAME,),
    "text_encoder": ("UMT5EncoderModel",),
    "tokenizer": ("T5TokenizerFast", "T5Tokenizer"),
    "scheduler": SchedulerConfig.CLASS_NAMES,
}
"""Component folders and the classes in model_index.json that are served; both tokenizer names are one class."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = (
    MODEL_INDEX_FILE,
    *(f"{folder}/*.{kind}" for folder in ("transformer", "vae", "text_encoder") for kind in ("json", "safetensors")),
    "scheduler/*.json",
    "tokenizer/*",
)
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_FP8_DTYPES = ("F8_E4M3",)
_CUT_SHORT = ("header too small", "invalid header length", "file not fully covered")
_MAX_NAMED = 10

M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class Loadable(Protocol):
    """A module whose parameters differ from the checkpoint's in layout or precision."""

    def fused_parameters(self) -> Mapping[str, tuple[str, ...]]:
        """Our parameter -> the checkpoint keys, of equal shapes, that are concatenated along dimension 0 to make it."""
        ...

    def keeps_float32(self, name: str) -> bool:
        """Whether our parameter `name` stays float32 whatever the target dtype is."""
        ...


class Load(Protocol):
    """How a module comes to its weights: `load_module`, or another with its arguments."""

    def __call__(self, build: Callable[[], M], folder: Path, device: torch.device, dtype: torch.dtype, /) -> M: ...


def resolve_checkpoint(model: str, *, has_weights: bool = True) -> Path:
    """The directory of a checkpoint, given as a path or as a hub id `owner/name`, which is downloaded or cached: all of
    it, or all but its weights.

    Raises: CheckpointError if it is neither or cannot be downloaded.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise CheckpointError(f"{model} is a file; a checkpoint is a directory that holds {MODEL_INDEX_FILE}")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model} does not exist; give a checkpoint directory or a hub id such as owner/name")
    patterns = [pattern for pattern in _HUB_FILES if has_weights or not pattern.endswith(".safetensors")]
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"hub repository {model} is gated; accept its terms on the hub and set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{model} is neither a directory nor a hub repository that can be read; a private one needs HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model} is not a directory, the hub cannot be reached, and no copy is cached; "
            "connect to the network or give a checkpoint directory"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"downloading {model} from the hub failed: {error}") from error


def read_config(path: Path) -> CheckpointConfig:
    """Reads and checks all JSON configurations of the checkpoint in `path`; reads no weights.

    Raises: CheckpointError naming the file and what would be right.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give the directory that holds {MODEL_INDEX_FILE}")
    index = read_json(path / MODEL_INDEX_FILE)
    for folder in COMPONENT_CLASSES:
        if not (path / folder).is_dir():
            raise CheckpointError(f"{path / folder} is missing; a checkpoint has {', '.join(COMPONENT_CLASSES)}")
    with _paths_in_errors(path):
        _check_component_classes(index)
        scheduler = read_json(path / SCHEDULER_FILE)
        _check_scheduler_class(index, scheduler)
        parts = (
            TransformerConfig.from_json(read_json(path / TRANSFORMER_FILE)),
            SchedulerConfig.from_json(scheduler),
            VaeConfig.from_json(read_json(path / VAE_FILE)),
        )
        _check_text_encoder(read_json(path / TEXT_ENCODER_FILE), parts[0])
        return CheckpointConfig.from_parts(path, index, *parts)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises: CheckpointError if there is none."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; a checkpoint in the official layout has it") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON text: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds a JSON {type(parsed).__name__}; it must hold an object")
    return parsed


def load_module(build: Callable[[], M], folder: Path, device: torch.device, dtype: torch.dtype) -> M:
    """Builds a module and reads its weights, each tensor straight to its device and dtype.

    Args:
        build: makes the module; called on the meta device, so its parameters take no memory.
        folder: a component folder with one safetensors file or several and their index.
        device: where the parameters go.
        dtype: what they become, but for those that a `Loadable` keeps in float32.

    Returns: the module in eval mode, without gradients.
    Raises: CheckpointError naming missing, left-over and mis-shaped keys, or the file that is missing or damaged.
    """
    with torch.device("meta"):
        module = build()
    buffers = [name for name, _ in module.named_buffers()]
    assert not buffers, f"buffers would stay empty: {buffers}"
    with ExitStack() as stack:
        stored = _open_weights(folder, stack)
        slots = _slots(module)
        _check_keys(folder, module, slots, stored)
        loaded = _read_parameters(module, slots, stored, device, dtype)
    put_parameters(module, loaded)
    return module.eval().requires_grad_(False)


def checkpoint_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Checkpoint key -> shape of every tensor that makes up `module`, which may be on the meta device."""
    return {key: slot.shape for key, slot in _slots(module).items()}


def put_parameters(module: nn.Module, loaded: Mapping[str, nn.Parameter]) -> None:
    """Replaces the meta parameters of a module; one that several submodules share stays shared."""
    replaced = [(parameter, loaded[name]) for name, parameter in module.named_parameters()]
    by_identity = {id(old): new for old, new in replaced}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            owner.register_parameter(name, by_identity[id(parameter)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """Where one checkpoint tensor goes: rows `start` to `start + shape[0]` of our parameter `name`."""

    name: str
    start: int
    shape: tuple[int, ...]
    is_fp8: bool


def _open_weights(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Checkpoint key -> the open, memory-mapped file that holds it."""
    stored: dict[str, Any] = {}
    for path in _weight_files(folder):
        try:
            opened = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        twice = sorted(stored.keys() & set(opened.keys()))
        if twice:
            raise CheckpointError(f"{path} holds tensors that another shard holds too: {_name_some(twice)}")
        stored.update(dict.fromkeys(opened.keys(), opened))
    return stored


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing; it must hold the weights as safetensors")
    for stem in _WEIGHT_STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _shards(index)
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return [single]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(f"{folder} holds {', '.join(pickles)}; only safetensors are read, convert the weights")
    names = " or ".join(f"{stem}.safetensors" for stem in _WEIGHT_STEMS)
    raise CheckpointError(f"{folder} has no weights; {names} or shards with their .index.json must be there")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map; it must map each key to the name of its shard")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names the shard {name!r}; a shard must be a file beside its index")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks shards that its index names: {_name_some(missing)}")
    return [index.parent / name for name in names]


def _slots(module: nn.Module) -> dict[str, _Slot]:
    """Checkpoint key -> its place; a parameter that has several names counts by its first."""
    fused = module.fused_parameters() if isinstance(module, Loadable) else {}
    slots = {}
    for name, parameter in module.named_parameters():
        keys = fused.get(name, (name,))
        rows = parameter.shape[0] // len(keys)
        for index, key in enumerate(keys):
            shape = (rows, *parameter.shape[1:])
            slots[key] = _Slot(name=name, start=index * rows, shape=shape, is_fp8=parameter.dtype == FP8)
    return slots


def _check_keys(folder: Path, module: nn.Module, slots: Mapping[str, _Slot], stored: Mapping[str, Any]) -> None:
    aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)} - slots.keys()
    missing = [key for key in slots if key not in stored]
    left_over = sorted(stored.keys() - slots.keys() - aliases)
    misfits = []
    for key in slots.keys() & stored.keys():
        view = stored[key].get_slice(key)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if shape != slots[key].shape:
            misfits.append(f"{key} is {list(shape)}, must be {list(slots[key].shape)}")
        elif dtype not in (served := _FP8_DTYPES if slots[key].is_fp8 else _FLOAT_DTYPES):
            misfits.append(f"{key} is of type {dtype}, must be one of {', '.join(served)}")
    problems = [
        f"{len(keys)} {problem}: {_name_some(keys)}"
        for problem, keys in (("missing", missing), ("left over", left_over), ("misfitting", sorted(misfits)))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{folder}: the weights do not match config.json; {'; '.join(problems)}")


def _read_parameters(
    module: nn.Module, slots: Mapping[str, _Slot], stored: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Parameter]:
    """Weights in FP8 stay so: they mean nothing without the scales beside them."""
    named = dict(module.named_parameters())
    in_float32 = {name for name in named if isinstance(module, Loadable) and module.keeps_float32(name)}
    loaded = {}
    for name, parameter in named.items():
        own_dtype = torch.float32 if name in in_float32 else FP8 if parameter.dtype == FP8 else dtype
        loaded[name] = torch.empty(parameter.shape, device=device, dtype=own_dtype)
    for key, slot in slots.items():
        loaded[slot.name].narrow(0, slot.start, slot.shape[0]).copy_(stored[key].get_tensor(key))
    return {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in loaded.items()}


def _check_component_classes(index: Mapping[str, Any]) -> None:
    for component, served in COMPONENT_CLASSES.items():
        entry = index.get(component)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found not in served:
            raise CheckpointError(
                f"{MODEL_INDEX_FILE}: {component} is {entry!r}; the class must be {' or '.join(served)}",
                param=component,
            )


def _check_scheduler_class(index: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    listed, found = index["scheduler"][1], scheduler.get("_class_name")
    if listed != found:
        raise CheckpointError(
            f"{SCHEDULER_FILE}: _class_name is {found!r}; {MODEL_INDEX_FILE} says {listed}", param="_class_name"
        )


def _check_text_encoder(config: Mapping[str, Any], transformer: TransformerConfig) -> None:
    if config.get("model_type") != "umt5":
        raise CheckpointError(
            f"{TEXT_ENCODER_FILE}: model_type is {config.get('model_type')!r}; 'umt5' is served", param="model_type"
        )
    if config.get("d_model") != transformer.text_dim:
        raise CheckpointError(
            f"{TEXT_ENCODER_FILE}: d_model is {config.get('d_model')!r}; "
            f"it must equal text_dim of {TRANSFORMER_FILE}, {transformer.text_dim}",
            param="d_model",
        )


@contextmanager
def _paths_in_errors(path: Path) -> Iterator[None]:
    """Messages about a file within the checkpoint also say which checkpoint."""
    try:
        yield
    except CheckpointError as error:
        if str(path) in error.message:
            raise
        raise CheckpointError(f"{path / error.message}", param=error.param) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if path.stat().st_size == 0 or any(hint in str(error) for hint in _CUT_SHORT):
        return CheckpointError(f"{path} is cut short or damaged ({error}); copy or download it again")
    return CheckpointError(f"{path} is not a safetensors file ({error}); pickles and Git LFS pointers are not read")


def _name_some(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMED])
    return shown if len(names) <= _MAX_NAMED else f"{shown} and {len(names) - _MAX_NAMED} more"
