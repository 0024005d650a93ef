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
from helios_serve.api.keys_cli import keys_app
from helios_serve.config import Device, DType, ModelConfig
from helios_serve.errors import HeliosError, InvalidRequestError
from helios_serve.logs import configure_logging
from helios_serve.settings import Derive, Flag, assignments, load_settings
from helios_serve.types import Variant

app = typer.Typer(
    help="Serves Helios, the autoregressive video diffusion transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(keys_app, name="keys")
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
    config: Annotated[
        Path | None, typer.Option(help="YAML file with settings; docs/configuration.md lists them.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; without API keys one of this machine only. [127.0.0.1]")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. [8000]")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of gRPC; none without it.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where jobs, videos and the tiny checkpoint are kept.")] = None,
    batching: Annotated[
        Literal["auto", "always", "off"] | None,
        typer.Option(help="Whether requests share forwards; auto: where it pays. [auto]"),
    ] = None,
    max_pack: Annotated[int | None, typer.Option(help="Requests in one forward, at most. [8]")] = None,
    warmup: Annotated[
        Literal["none", "default", "all"] | None,
        typer.Option(help="Recommended sizes to run once before the start. [default]"),
    ] = None,
    metrics_alias: Annotated[
        Literal["vllm"] | None, typer.Option(help="Publish metrics that vLLM has too under its names as well.")
    ] = None,
    keys_file: Annotated[
        Path | None, typer.Option(help="API keys, as `helios-serve keys` writes them; or HELIOS_API_KEYS as text.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web origin whose pages may call; repeatable.")
    ] = None,
    media_url_host: Annotated[
        list[str] | None, typer.Option(help="A host from which media may be fetched; repeatable.")
    ] = None,
    webhook_private: Annotated[
        bool | None, typer.Option("--webhook-private", help="Webhooks may go to addresses that are not public.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file, for HTTP and gRPC; with --tls-key.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
    database_url: Annotated[
        str | None, typer.Option(help="postgresql://... for several servers; SQLite in the data directory when absent.")
    ] = None,
    blob_url: Annotated[
        str | None, typer.Option(help="s3://bucket/prefix for videos; the data directory when absent.")
    ] = None,
    log_format: Annotated[
        Literal["json", "text"] | None, typer.Option(help="Of the log; text on a terminal, else json.")
    ] = None,
    executor: Annotated[
        Literal["local", "ray"] | None,
        typer.Option(help="local: all roles in this process; ray: workers of a cluster. [local]"),
    ] = None,
    encoders: Annotated[int | None, typer.Option(help="ray: encoder workers. [1]")] = None,
    dit_groups: Annotated[int | None, typer.Option(help="ray: DiT groups. [1]")] = None,
    dit_ranks: Annotated[int | None, typer.Option(help="ray: processes of one DiT group. [1]")] = None,
    vaes: Annotated[int | None, typer.Option(help="ray: VAE workers. [1]")] = None,
    gpus_per_encoder: Annotated[float | None, typer.Option(help="ray: share of a GPU; on CUDA 0.25.")] = None,
    gpus_per_rank: Annotated[float | None, typer.Option(help="ray: share of a GPU; on CUDA 1.")] = None,
    gpus_per_vae: Annotated[float | None, typer.Option(help="ray: share of a GPU; on CUDA 0.5.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="ray: host:port of a running cluster, or auto; without it one is started here.")
    ] = None,
    device: DeviceFlag = None,
    dtype: DTypeFlag = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as section.field=value; repeatable.")
    ] = None,
) -> None:
    """Serve over HTTP, and gRPC where it has a port."""
    from helios_serve.server import run_server

    given: dict[str, tuple[str, object]] = {
        "MODEL": ("model.model", model),
        "--host": ("server.host", host),
        "--port": ("server.port", port),
        "--grpc-port": ("server.grpc_port", grpc_port),
        "--data-dir": ("server.data_dir", data_dir),
        "--batching": ("engine.batching", batching),
        "--max-pack": ("engine.max_pack", max_pack),
        "--warmup": ("server.warmup", warmup),
        "--metrics-alias": ("server.metrics_alias", metrics_alias),
        "--keys-file": ("server.keys_file", keys_file),
        "--cors-origin": ("server.cors_origins", _listed(cors_origin)),
        "--media-url-host": ("server.media_url_hosts", _listed(media_url_host)),
        "--webhook-private": ("server.webhook_private", webhook_private),
        "--tls-cert": ("server.tls_cert", tls_cert),
        "--tls-key": ("server.tls_key", tls_key),
        "--database-url": ("store.database_url", database_url),
        "--blob-url": ("store.blob_url", blob_url),
        "--log-format": ("server.log_format", log_format),
        "--executor": ("executor", executor),
        "--encoders": ("ray.num_encoders", encoders),
        "--dit-groups": ("ray.num_dit_groups", dit_groups),
        "--dit-ranks": ("ray.num_dit_ranks", dit_ranks),
        "--vaes": ("ray.num_vaes", vaes),
        "--gpus-per-encoder": ("ray.gpus_per_encoder", gpus_per_encoder),
        "--gpus-per-rank": ("ray.gpus_per_rank", gpus_per_rank),
        "--gpus-per-vae": ("ray.gpus_per_vae", gpus_per_vae),
        "--ray-address": ("ray.address", ray_address),
        "--device": ("model.device", device),
        "--dtype": ("model.dtype", dtype),
    }
    flags = [Flag(name=name, key=key, value=value) for name, (key, value) in given.items()]
    derive: dict[str, Derive] = {
        "model.model": lambda known: _embedded_model(Path(str(known["server.data_dir"]))),
        "model.device": lambda known: _best_device(),
        "model.dtype": lambda known: "float32" if known["model.device"] == "cpu" else "bfloat16",
        "ray.gpus_per_encoder": lambda known: 0.25 * (known["model.device"] == "cuda"),
        "ray.gpus_per_rank": lambda known: 1.0 * (known["model.device"] == "cuda"),
        "ray.gpus_per_vae": lambda known: 0.5 * (known["model.device"] == "cuda"),
    }
    loaded = load_settings(config, os.environ, [*flags, *assignments(settings or ())], derive)
    configure_logging(loaded.server.log_format)
    run_server(loaded)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _model_config(model: str, device: Device | None, dtype: DType | None) -> ModelConfig:
    chosen: Device = device or _best_device()
    by_device: DType = "float32" if chosen == "cpu" else "bfloat16"
    return ModelConfig(model=model, device=chosen, dtype=dtype or by_device)


def _best_device() -> Device:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _listed(given: list[str] | None) -> tuple[str, ...] | None:
    return None if given is None else tuple(given)


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
