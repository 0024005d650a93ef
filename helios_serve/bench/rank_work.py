"""What the offline benchmarks make, and the flags that they share. Knows fields of requests; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from helios_serve.config import Device, DType, GivenDegrees, ModelConfig
from helios_serve.types import FRAMES_PER_CHUNK

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
UlyssesFlag = Annotated[int | None, typer.Option(help="Ranks that exchange tokens for heads; chosen when absent.")]
RingFlag = Annotated[int | None, typer.Option(help="Ranks between which keys and values go around.")]
CfgFlag = Annotated[int | None, typer.Option(help="2 gives the sequences of guidance to two halves of the ranks.")]


def model_of(
    model: str, device: Device | None, dtype: DType | None, quantize: Quantize, weights: Weights
) -> ModelConfig:
    """With what is left out chosen as the server does."""
    from helios_serve.serve_flags import best_device, dtype_of

    chosen: Device = device or best_device()
    return ModelConfig(model=model, device=chosen, dtype=dtype or dtype_of(chosen), quantize=quantize, weights=weights)


def degrees_of(cfg: int | None, ring: int | None, ulysses: int | None) -> GivenDegrees:
    return GivenDegrees(cfg=cfg, ring=ring, ulysses=ulysses)
