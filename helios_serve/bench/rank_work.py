"""What the offline benchmarks make, and the flags that they share. Knows fields of requests; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, fields
from typing import Annotated, Any, Literal, get_type_hints

import typer

from helios_serve.config import AUTO, Device, DType, ExecutorConfig, GivenDegrees, ModelConfig
from helios_serve.errors import InvalidRequestError
from helios_serve.types import FRAMES_PER_CHUNK, ModelInfo, VideoRequest

PROMPT = "A red fox runs along a snowy ridge at sunrise while the camera follows from the side."


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Equal videos, so many in a batch, of so many chunks. size, steps: None for the checkpoint's own."""

    num_chunks: int
    batch: int = 1
    size: str | None = None
    steps: tuple[int, ...] | None = None
    guidance_scale: float | None = None
    fps: float = 24.0

    def body(self, number: int) -> dict[str, object]:
        """The fields of one request, as over HTTP."""
        body: dict[str, object] = {
            "prompt": f"{PROMPT} Take {number + 1}.",
            "num_frames": FRAMES_PER_CHUNK * self.num_chunks,
            "fps": self.fps,
            "seed": number,
        }
        details: dict[str, object] = {}
        if self.steps is not None:
            details["steps"] = list(self.steps)
        if self.guidance_scale is not None:
            details["guidance_scale"] = self.guidance_scale
        return {**body, **({} if self.size is None else {"size": self.size}), "helios": details}


def requests_of(workload: Workload, info: ModelInfo) -> list[VideoRequest]:
    """Raises: InvalidRequestError when the checkpoint cannot make such videos."""
    from helios_serve.api.convert import Limits, parse_generation
    from helios_serve.api.media_input import Media
    from helios_serve.offline import FileSource
    from helios_serve.workers.media import Decoder

    media = Media(source=FileSource(), decoder=Decoder())
    bodies = [workload.body(number) for number in range(workload.batch)]
    return [parse_generation(body, info, media, Limits()).request for body in bodies]


Quantize = Literal["none", "fp8"]
Weights = Literal["checkpoint", "random"]

ModelFlag = Annotated[str, typer.Option(help="Checkpoint directory or hub id.")]
SizeFlag = Annotated[str | None, typer.Option(help="WxH; the checkpoint's default when absent.")]
StepsFlag = Annotated[str | None, typer.Option(help="Per stage, such as 2,2,2; the checkpoint's when absent.")]
GuidanceFlag = Annotated[float | None, typer.Option(help="1 is none; the checkpoint's when absent.")]
DeviceFlag = Annotated[Device | None, typer.Option(help="cpu or cuda; cuda where PyTorch sees one.")]
DTypeFlag = Annotated[DType | None, typer.Option(help="float32 or bfloat16; by device.")]
QuantizeFlag = Annotated[Quantize, typer.Option(help="fp8 rounds the transformer's products.")]
WeightsFlag = Annotated[
    Weights, typer.Option(help="random reads configurations alone: to measure a machine without the weights.")
]
RanksFlag = Annotated[
    str | None,
    typer.Option(help="Ranks that share each forward, such as 1,2,4,8: one run for each, by torchrun, on this node."),
]
RayFlag = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="A setting of `ray`, such as num_dit_groups=2; repeatable. Whole videos are timed on a cluster then, with"
        " its groups and ranks.",
    ),
]
UlyssesFlag = Annotated[str, typer.Option(help="Ranks that exchange tokens for heads.")]
RingFlag = Annotated[str, typer.Option(help="Ranks between which keys and values go around.")]
CfgFlag = Annotated[str, typer.Option(help="2 gives the sequences of guidance to two halves of the ranks.")]


def model_of(
    model: str, device: Device | None, dtype: DType | None, quantize: Quantize, weights: Weights
) -> ModelConfig:
    """With what is left out chosen as the server does."""
    from helios_serve.serve_flags import best_device, dtype_of

    chosen: Device = device or best_device()
    return ModelConfig(model=model, device=chosen, dtype=dtype or dtype_of(chosen), quantize=quantize, weights=weights)


def degrees_of(cfg: str, ring: str, ulysses: str) -> GivenDegrees:
    """Raises: InvalidRequestError for what is neither a number nor auto."""
    return GivenDegrees(cfg=_degree("cfg_degree", cfg), ring=_degree("ring", ring), ulysses=_degree("ulysses", ulysses))


def cluster_of(settings: Sequence[str]) -> ExecutorConfig:
    """From `name=value` of settings of `ray`.

    Raises: InvalidRequestError for an unknown name or a value that does not do.
    """
    from pydantic import TypeAdapter, ValidationError

    known = {field.name: TypeAdapter(kind) for field, kind in _cluster_fields()}
    given: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in known:
            raise InvalidRequestError(f"ray {name}: no such setting; there are {', '.join(known)}", param="ray")
        try:
            given[name] = known[name].validate_strings(text)
        except ValidationError:
            raise InvalidRequestError(f"ray {setting}: no value of that setting", param="ray") from None
    try:
        return ExecutorConfig(**given)
    except ValueError as error:
        raise InvalidRequestError(f"ray {error}", param="ray") from None


def _cluster_fields() -> Iterator[tuple[Field[Any], Any]]:
    kinds = get_type_hints(ExecutorConfig)
    return ((field, kinds[field.name]) for field in fields(ExecutorConfig))


def _degree(name: str, text: str) -> int | None:
    if text == AUTO:
        return None
    if not text.isdecimal():
        raise InvalidRequestError(f"{name} {text}: must be a whole number or {AUTO}", param=name)
    return int(text)
