"""The flags of `helios-serve serve`: their types and help, the setting that each one sets, and the settings that follow
from others or from this machine. Knows the command line; what a setting means is said in `config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from helios_serve.config import EMBEDDED_MODEL, Device, DType
from helios_serve.settings import Derive, Flag

Model = Annotated[
    str | None, typer.Argument(help="Checkpoint directory or hub id. [a small trained one of this package]")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with settings; docs/configuration.md lists them.")
]
Host = Annotated[
    str | None, typer.Option(help="Address to listen on; without API keys one of this machine only. [127.0.0.1]")
]
Port = Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. [8000]")]
AdminBind = Annotated[
    str | None, typer.Option(help="host:port to which /live, /ready, /health, /version and /metrics move.")
]
GrpcPort = Annotated[int | None, typer.Option(help="Port of gRPC; none without it.")]
GrpcReflection = Annotated[
    bool | None, typer.Option(help="Whether gRPC tells its methods; on a loopback host it does.")
]
DataDir = Annotated[Path | None, typer.Option(help="Where jobs, videos and the tiny checkpoint are kept.")]
Batching = Annotated[
    Literal["auto", "always", "off"] | None,
    typer.Option(help="Whether requests share forwards; auto: where it pays. [auto]"),
]
MaxPack = Annotated[int | None, typer.Option(help="Requests in one forward, at most. [8]")]
Warmup = Annotated[
    Literal["none", "default", "all"] | None,
    typer.Option(help="Recommended sizes to run once before the start. [default]"),
]
MetricsAlias = Annotated[
    Literal["vllm"] | None, typer.Option(help="Publish metrics that vLLM has too under its names as well.")
]
KeysFile = Annotated[
    Path | None, typer.Option(help="API keys, as `helios-serve keys` writes them; or HELIOS_API_KEYS as text.")
]
SigningKeysFile = Annotated[
    Path | None,
    typer.Option(help="Secrets that sign addresses, one a line, the same at every replica; or HELIOS_SIGNING_KEYS."),
]
CorsOrigin = Annotated[list[str] | None, typer.Option(help="A web origin whose pages may call; repeatable.")]
MediaUrlHost = Annotated[list[str] | None, typer.Option(help="A host from which media may be fetched; repeatable.")]
WebhookPrivate = Annotated[
    bool | None, typer.Option("--webhook-private", help="Webhooks may go to addresses that are not public.")
]
ContentRedirect = Annotated[
    bool | None, typer.Option("--content-redirect", help="Send clients to the bucket for finished videos.")
]
KeysInDatabase = Annotated[
    bool | None, typer.Option("--keys-in-database", help="API keys of the job store, as `keys --keys db` writes them.")
]
TlsCert = Annotated[Path | None, typer.Option(help="PEM file, for HTTP and gRPC; with --tls-key.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM file.")]
TlsClientCa = Annotated[Path | None, typer.Option(help="PEM file; clients need a certificate of this authority.")]
DatabaseUrl = Annotated[
    str | None, typer.Option(help="postgresql://... for several servers; SQLite in the data directory when absent.")
]
BlobUrl = Annotated[str | None, typer.Option(help="s3://bucket/prefix for videos; the data directory when absent.")]
LogFormat = Annotated[Literal["json", "text"] | None, typer.Option(help="Of the log; text on a terminal, else json.")]
Executor = Annotated[
    Literal["local", "ray"] | None,
    typer.Option(help="local: all roles in this process; ray: workers of a cluster. [local]"),
]
Encoders = Annotated[int | None, typer.Option(help="ray: encoder workers. [1]")]
DitGroups = Annotated[int | None, typer.Option(help="ray: DiT groups. [1]")]
DitRanks = Annotated[int | None, typer.Option(help="ray: processes of one DiT group. [1]")]
Ulysses = Annotated[str | None, typer.Option(help="ray: ranks of a group that exchange heads, or auto. [auto]")]
Ring = Annotated[str | None, typer.Option(help="ray: ranks of a group between which keys go around, or auto. [auto]")]
CfgDegree = Annotated[
    str | None, typer.Option(help="ray: 2 gives guidance's two sequences to two halves of a group; or auto. [auto]")
]
Vaes = Annotated[int | None, typer.Option(help="ray: VAE workers. [1]")]
VaeRanks = Annotated[int | None, typer.Option(help="ray: processes of one VAE worker. [1]")]
GpusPerEncoder = Annotated[float | None, typer.Option(help="ray: share of a GPU; on CUDA 0.25.")]
GpusPerRank = Annotated[float | None, typer.Option(help="ray: share of a GPU; on CUDA 1.")]
GpusPerVae = Annotated[float | None, typer.Option(help="ray: share of a GPU; on CUDA 0.5, 1 for several ranks.")]
RayAddress = Annotated[
    str | None, typer.Option(help="ray: host:port of a running cluster, or auto; without it one is started here.")
]
DeviceFlag = Annotated[Device | None, typer.Option(help="cpu or cuda; cuda where PyTorch sees one.")]
DTypeFlag = Annotated[
    DType | None, typer.Option(help="float32 or bfloat16, for the transformer and the text encoder; by device.")
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Any other setting, as section.field=value; repeatable.")
]

KEYS = {
    "model": "model.model",
    "host": "server.host",
    "port": "server.port",
    "admin_bind": "server.admin_bind",
    "grpc_port": "server.grpc_port",
    "grpc_reflection": "server.grpc_reflection",
    "data_dir": "server.data_dir",
    "batching": "engine.batching",
    "max_pack": "engine.max_pack",
    "warmup": "server.warmup",
    "metrics_alias": "server.metrics_alias",
    "keys_file": "server.keys_file",
    "signing_keys_file": "server.signing_keys_file",
    "cors_origin": "server.cors_origins",
    "media_url_host": "server.media_url_hosts",
    "webhook_private": "server.webhook_private",
    "content_redirect": "server.content_redirect",
    "keys_in_database": "server.keys_in_database",
    "tls_cert": "server.tls_cert",
    "tls_key": "server.tls_key",
    "tls_client_ca": "server.tls_client_ca",
    "database_url": "store.database_url",
    "blob_url": "store.blob_url",
    "log_format": "server.log_format",
    "executor": "executor",
    "encoders": "ray.num_encoders",
    "dit_groups": "ray.num_dit_groups",
    "dit_ranks": "ray.num_dit_ranks",
    "ulysses": "ray.ulysses",
    "ring": "ray.ring",
    "cfg_degree": "ray.cfg_degree",
    "vaes": "ray.num_vaes",
    "vae_ranks": "ray.num_vae_ranks",
    "gpus_per_encoder": "ray.gpus_per_encoder",
    "gpus_per_rank": "ray.gpus_per_rank",
    "gpus_per_vae": "ray.gpus_per_vae",
    "ray_address": "ray.address",
    "device": "model.device",
    "dtype": "model.dtype",
}
"""The parameters of `serve` and the settings that they set."""


def given(parameters: Mapping[str, object]) -> list[Flag]:
    """What was typed, from the parameters of `serve` by name."""
    return [Flag(name=_typed(name), key=key, value=_value(parameters[name])) for name, key in KEYS.items()]


def derived() -> dict[str, Derive]:
    """The settings that follow from others or from this machine, where nobody gives them."""
    return {
        "model.model": lambda known: str(EMBEDDED_MODEL),
        "model.device": lambda known: best_device(),
        "model.dtype": lambda known: dtype_of(str(known["model.device"])),
        "ray.gpus_per_encoder": lambda known: 0.25 * (known["model.device"] == "cuda"),
        "ray.gpus_per_rank": lambda known: 1.0 * (known["model.device"] == "cuda"),
        "ray.gpus_per_vae": lambda known: (
            (0.5 if known.get("ray.num_vae_ranks", 1) == 1 else 1.0) * (known["model.device"] == "cuda")
        ),
    }


def best_device() -> Device:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(device: str) -> DType:
    """What a model runs in on a device, unless it is told."""
    return "float32" if device == "cpu" else "bfloat16"


def _typed(name: str) -> str:
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"


def _value(parameter: object) -> object:
    return tuple(parameter) if isinstance(parameter, list) else parameter
