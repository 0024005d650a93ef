"""The command line, and the place where the parts are put together: checkpoint, workers, executor, engine, API.

Knows flags and wiring; the work is done below.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from helios_serve import __version__
from helios_serve.config import (
    Device,
    DType,
    EngineConfig,
    ExecutorConfig,
    ModelConfig,
    ServerConfig,
    default_data_dir,
)
from helios_serve.errors import HeliosError, InvalidRequestError
from helios_serve.telemetry import configure_logging
from helios_serve.types import Variant

app = typer.Typer(
    help="Serves Helios, the autoregressive video diffusion transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
EMBEDDED_MODEL = "helios-tiny"

DeviceFlag = Annotated[Device | None, typer.Option(help="cpu or cuda; cuda where PyTorch sees one.")]
DTypeFlag = Annotated[
    DType | None, typer.Option(help="float32 or bfloat16, for the transformer and the text encoder; by device.")
]


def main() -> None:
    """Runs the command line; errors of the caller end it with one line and status 2, Ctrl-C with status 130."""
    # Read when torch loads OpenMP: threads that spin while they wait stop each other where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    configure_logging()
    try:
        app(standalone_mode=True)
    except HeliosError as error:
        sys.exit(_complain(error.message))
    except ValueError as error:
        sys.exit(_complain(str(error)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@app.command("make-tiny")
def make_tiny(
    out: Annotated[Path, typer.Option(help="Directory to write; made if absent.")],
    variant: Annotated[Variant, typer.Option(help="base, mid or distilled.")] = "distilled",
    amplify_history: Annotated[bool, typer.Option(help="With amplified history keys.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write a tiny checkpoint with random weights in the official layout, for tests and trials."""
    from helios_serve.model_executor.tiny_checkpoint import write_tiny_checkpoint

    write_tiny_checkpoint(variant, out, seed=seed, amplify_history=amplify_history)
    print(f"wrote a tiny {variant} checkpoint to {out}")


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Checkpoint directory or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="MP4 to write.")],
    prompt: Annotated[str | None, typer.Option(help="What to show.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid; needs guidance above 1.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image that the video begins from.")] = None,
    video: Annotated[Path | None, typer.Option(help="Video that the output continues; MP4, WebM or .npy.")] = None,
    size: Annotated[str | None, typer.Option(help="WxH in pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames to make.")] = None,
    fps: Annotated[float | None, typer.Option(help="Playback rate of the file.")] = None,
    steps: Annotated[str | None, typer.Option(help="Steps per stage, such as 2,2,2, or 50 for Base.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random when absent.")] = None,
    request: Annotated[
        Path | None, typer.Option(help="JSON file with the fields of the HTTP API; flags override it.")
    ] = None,
    device: DeviceFlag = None,
    dtype: DTypeFlag = None,
    save_latents: Annotated[
        Path | None, typer.Option(help="safetensors file for the final latents [1, C, 9K, h, w].")
    ] = None,
    save_frames: Annotated[
        Path | None, typer.Option(help=".npy file for the frames [1, F, H, W, 3] in [0, 1].")
    ] = None,
) -> None:
    """Make one video in this process and write it as MP4."""
    from helios_serve.generate import Outputs, generate_to_files

    body = {} if request is None else _read_request(request)
    flags = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "image": None if image is None else str(image),
        "video": None if video is None else str(video),
        "size": size,
        "num_frames": num_frames,
        "fps": fps,
        "seed": seed,
    }
    body |= {key: value for key, value in flags.items() if value is not None}
    sampling = {"steps": None if steps is None else _read_steps(steps), "guidance_scale": guidance_scale}
    given = {key: value for key, value in sampling.items() if value is not None}
    if given:
        nested = body.get("helios", {})
        if not isinstance(nested, dict):
            raise InvalidRequestError("helios: must be an object", param="helios")
        body["helios"] = {**nested, **given}
    outputs = Outputs(video=output, latents=save_latents, frames=save_frames)
    generate_to_files(_model_config(model, device, dtype), body, outputs)


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint directory or hub id; a tiny one is made when absent.")
    ] = None,
    host: Annotated[str, typer.Option(help="Loopback address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    data_dir: Annotated[Path | None, typer.Option(help="Where videos and the tiny checkpoint are kept.")] = None,
    batching: Annotated[
        Literal["auto", "always", "off"], typer.Option(help="Whether requests share forwards; auto: where it pays.")
    ] = "auto",
    max_pack: Annotated[int, typer.Option(help="Requests in one forward, at most.")] = 8,
    warmup: Annotated[
        Literal["none", "default", "all"], typer.Option(help="Recommended sizes to run once before the start.")
    ] = "default",
    metrics_alias: Annotated[
        Literal["vllm"] | None, typer.Option(help="Publish metrics that vLLM has too under its names as well.")
    ] = None,
    executor: Annotated[
        Literal["local", "ray"], typer.Option(help="local: all roles in this process; ray: workers of a cluster.")
    ] = "local",
    encoders: Annotated[int, typer.Option(help="ray: encoder workers.")] = 1,
    dit_groups: Annotated[int, typer.Option(help="ray: DiT groups.")] = 1,
    dit_ranks: Annotated[int, typer.Option(help="ray: processes of one DiT group.")] = 1,
    vaes: Annotated[int, typer.Option(help="ray: VAE workers.")] = 1,
    gpus_per_encoder: Annotated[float | None, typer.Option(help="ray: share of a GPU; on CUDA 0.25.")] = None,
    gpus_per_rank: Annotated[float | None, typer.Option(help="ray: share of a GPU; on CUDA 1.")] = None,
    gpus_per_vae: Annotated[float | None, typer.Option(help="ray: share of a GPU; on CUDA 0.5.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="ray: host:port of a running cluster, or auto; without it one is started here.")
    ] = None,
    device: DeviceFlag = None,
    dtype: DTypeFlag = None,
) -> None:
    """Serve the HTTP API."""
    from helios_serve.server import run_server

    config = ServerConfig(
        host=host,
        port=port,
        data_dir=data_dir or default_data_dir(),
        warmup=warmup,
        metrics_alias=metrics_alias,
    )
    engine = EngineConfig(batching=batching, max_pack=max_pack)
    chosen = _model_config(_embedded_model(config.data_dir) if model is None else model, device, dtype)
    on_gpu = chosen.device == "cuda"
    ray = ExecutorConfig(
        num_encoders=encoders,
        num_dit_groups=dit_groups,
        num_dit_ranks=dit_ranks,
        num_vaes=vaes,
        gpus_per_encoder=_share(gpus_per_encoder, 0.25 * on_gpu),
        gpus_per_rank=_share(gpus_per_rank, 1.0 * on_gpu),
        gpus_per_vae=_share(gpus_per_vae, 0.5 * on_gpu),
        address=ray_address,
    )
    run_server(chosen, engine, config, ray if executor == "ray" else None)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _model_config(model: str, device: Device | None, dtype: DType | None) -> ModelConfig:
    import torch

    chosen: Device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    by_device: DType = "float32" if chosen == "cpu" else "bfloat16"
    return ModelConfig(model=model, device=chosen, dtype=dtype or by_device)


def _share(given: float | None, by_device: float) -> float:
    return by_device if given is None else given


def _embedded_model(data_dir: Path) -> str:
    """The tiny Distilled checkpoint in the data directory, made on first use."""
    from helios_serve.model_executor.tiny_checkpoint import write_tiny_checkpoint

    path = data_dir / "models" / EMBEDDED_MODEL
    if not (path / "model_index.json").is_file():
        print(f"making a tiny checkpoint with random weights in {path}", flush=True)
        write_tiny_checkpoint("distilled", path)
    return str(path)


def _read_request(path: Path) -> dict[str, object]:
    try:
        body = json.loads(path.read_text())
    except OSError as error:
        raise InvalidRequestError(f"request {path}: {error.strerror}", param="request") from error
    except ValueError as error:
        raise InvalidRequestError(f"request {path}: not valid JSON: {error}", param="request") from error
    if not isinstance(body, dict):
        raise InvalidRequestError(f"request {path}: must be a JSON object", param="request")
    return body


def _read_steps(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequestError(f"steps {text}: must be whole numbers, such as 2,2,2", param="steps") from None


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
