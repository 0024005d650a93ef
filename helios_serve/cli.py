"""The command line, and the place where the parts are put together: checkpoint, workers, executor, engine, API.

Knows flags and wiring; the work is done below.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from helios_serve import __version__
from helios_serve import serve_flags as flags
from helios_serve.api.keys_cli import keys_app
from helios_serve.bench.cli import bench_app
from helios_serve.config import EMBEDDED_MODEL, Device, DType, ModelConfig
from helios_serve.errors import HeliosError, InvalidRequestError
from helios_serve.logs import configure_logging
from helios_serve.quantize_cli import quantize
from helios_serve.settings import assignments, load_settings
from helios_serve.types import Variant

app = typer.Typer(
    help="Serves Helios, the autoregressive video diffusion transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
app.add_typer(keys_app, name="keys")
app.command("quantize")(quantize)


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


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


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
    output: Annotated[Path, typer.Option("--output", "-o", help="MP4 to write.")],
    model: Annotated[
        str,
        typer.Option(help="Checkpoint directory or hub id. [a small trained one of this package]", show_default=False),
    ] = str(EMBEDDED_MODEL),
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
    device: flags.DeviceFlag = None,
    dtype: flags.DTypeFlag = None,
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
    typed = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "image": None if image is None else str(image),
        "video": None if video is None else str(video),
        "size": size,
        "num_frames": num_frames,
        "fps": fps,
        "seed": seed,
    }
    body |= {key: value for key, value in typed.items() if value is not None}
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
    context: typer.Context,
    model: flags.Model = None,
    config: flags.ConfigFile = None,
    host: flags.Host = None,
    port: flags.Port = None,
    admin_bind: flags.AdminBind = None,
    grpc_port: flags.GrpcPort = None,
    grpc_reflection: flags.GrpcReflection = None,
    data_dir: flags.DataDir = None,
    batching: flags.Batching = None,
    max_pack: flags.MaxPack = None,
    warmup: flags.Warmup = None,
    metrics_alias: flags.MetricsAlias = None,
    keys_file: flags.KeysFile = None,
    signing_keys_file: flags.SigningKeysFile = None,
    cors_origin: flags.CorsOrigin = None,
    media_url_host: flags.MediaUrlHost = None,
    webhook_private: flags.WebhookPrivate = None,
    content_redirect: flags.ContentRedirect = None,
    keys_in_database: flags.KeysInDatabase = None,
    tls_cert: flags.TlsCert = None,
    tls_key: flags.TlsKey = None,
    tls_client_ca: flags.TlsClientCa = None,
    database_url: flags.DatabaseUrl = None,
    blob_url: flags.BlobUrl = None,
    log_format: flags.LogFormat = None,
    executor: flags.Executor = None,
    encoders: flags.Encoders = None,
    dit_groups: flags.DitGroups = None,
    dit_ranks: flags.DitRanks = None,
    ulysses: flags.Ulysses = None,
    ring: flags.Ring = None,
    cfg_degree: flags.CfgDegree = None,
    vaes: flags.Vaes = None,
    vae_ranks: flags.VaeRanks = None,
    gpus_per_encoder: flags.GpusPerEncoder = None,
    gpus_per_rank: flags.GpusPerRank = None,
    gpus_per_vae: flags.GpusPerVae = None,
    ray_address: flags.RayAddress = None,
    device: flags.DeviceFlag = None,
    dtype: flags.DTypeFlag = None,
    settings: flags.Assignments = None,
) -> None:
    """Serve over HTTP, and gRPC where it has a port."""
    from helios_serve.server import run_server

    given = [*flags.given(context.params), *assignments(settings or ())]
    loaded = load_settings(config, os.environ, given, flags.derived())
    configure_logging(loaded.server.log_format)
    run_server(loaded)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _model_config(model: str, device: Device | None, dtype: DType | None) -> ModelConfig:
    chosen: Device = device or flags.best_device()
    return ModelConfig(model=model, device=chosen, dtype=dtype or flags.dtype_of(chosen))


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
