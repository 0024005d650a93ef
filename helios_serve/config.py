"""Settings of a process, one frozen dataclass per concern, validated on construction. No I/O, no torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, get_args

from helios_serve.types import Approximation

EMBEDDED_MODEL = Path(__file__).with_name("helios-tiny")
"""The small trained checkpoint that comes with the package; docs/tiny-checkpoint.md is its card."""

Device = Literal["cpu", "cuda"]
DType = Literal["float32", "bfloat16"]
Offload = Literal["none", "text_encoder", "all"]
STEP_CACHE_THRESHOLD = 0.05
"""Not fitted to Helios. Published ones, 0.1 to 0.3, belong to polynomials that are fitted to other models."""
Attention = Literal["auto", "fa3", "cudnn", "flash", "efficient", "triton", "flashinfer", "xformers", "cpu", "math"]
UNRECORDABLE_ATTENTION: tuple[Attention, ...] = ("flashinfer", "xformers")
"""Those that no CUDA graph can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which checkpoint runs, and where.

    model: directory of a checkpoint in the official layout, or its id at the hub. device: where the roles compute.
    dtype: of the transformer and the text encoder. offload: what stays in host memory and visits the device layer by
    layer: nothing, the text encoder, or all that has many layers, for devices of 8 GB. quantize: fp8 rounds the
    transformer's weights when they are loaded, and its activations as they come; an approximation, experimental until
    its quality is shown on trained weights. vae_precision: in which the VAE decodes, fp32 as the official pipelines
    do; None is bf16 on cuda, fp32 on cpu. The VAE always encodes in fp32. attention: the library that computes the
    transformer's self-attention; auto takes the fastest that is installed and runs on the device.
    attention_precision: fp8 rounds queries, keys and values of the self-attention, by FlashAttention 3 on Hopper, step
    by step on cpu; an approximation, experimental until its quality is shown on trained weights; None is the dtype.
    cuda_graphs: the transformer's forwards are recorded by the shape of their packs and started in one launch; on cuda;
    no faster on an H100 with the 14B model. approximations: of every video, which it changes; experimental until their
    quality is shown on trained weights. history_reuse keeps the keys and values of a chunk's history from its first
    step for the later ones; step_cache, for Base and Mid, leaves forwards out whose input has hardly changed.
    step_cache_threshold: the relative change since the last forward, summed over steps, from which on step_cache runs
    another one. weights: random draws them where they are to stay and reads the checkpoint's configuration and
    tokenizer alone, to measure a machine.
    """

    model: str
    device: Device = "cpu"
    dtype: DType = "float32"
    offload: Offload = "none"
    quantize: Literal["none", "fp8"] = "none"
    vae_precision: Literal["fp32", "bf16"] | None = None
    attention: Attention = "auto"
    attention_precision: Literal["fp8"] | None = None
    cuda_graphs: bool = False
    approximations: tuple[Approximation, ...] = ()
    step_cache_threshold: float = STEP_CACHE_THRESHOLD
    weights: Literal["checkpoint", "random"] = "checkpoint"

    def __post_init__(self) -> None:
        for name in self.approximations:
            if name not in get_args(Approximation):
                raise ValueError(f"approximations {name}: there are {' and '.join(get_args(Approximation))}")
        if len(set(self.approximations)) < len(self.approximations):
            raise ValueError(f"approximations {', '.join(self.approximations)}: each one once")
        if not 0 <= self.step_cache_threshold < math.inf:
            raise ValueError(f"step_cache_threshold {self.step_cache_threshold}: must be at least 0")
        if self.attention_precision is not None and self.attention not in ("auto", "fa3"):
            raise ValueError(f"attention_precision fp8: fa3 alone has it, not attention {self.attention}; give auto")
        if self.cuda_graphs:
            self._check_graphs()

    def _check_graphs(self) -> None:
        if self.device != "cuda":
            raise ValueError(f"cuda_graphs: needs device cuda, not {self.device}")
        if self.offload == "all":
            raise ValueError("cuda_graphs: not with offload all, as a graph reads weights where they were recorded")
        if self.attention in UNRECORDABLE_ATTENTION:
            raise ValueError(
                f"cuda_graphs: not with attention {self.attention}, which plans each shape anew; give auto"
            )

    @property
    def served_name(self) -> str:
        """What clients call the model: the last part of the directory or hub id."""
        return Path(self.model).resolve().name


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of the engine.

    batching: whether chunks of different requests share forwards: where the cost model says that it pays, always, or
    never. max_pack: requests in one forward, at most. max_requests: accepted and unfinished requests, at most.
    max_attempts: of one chunk, encoding or decoding, before the request fails. slots_per_vae: chunks that one VAE
    worker is given at a time (one decodes, one is encoded). ttfc_target_s: within which a realtime request is to have
    its first frame. max_queue_wait_s: estimated start beyond which an offline request is refused. age_after_s: when an
    offline request that gets no service goes first for one chunk. stuck_floor_s: how long a busy group may make no
    progress before it is condemned, at least; 60 on CPU. chunk_floor_s: how long a chunk may take, at least; 60 on CPU.
    encode_timeout_s: patience with an encoder; 60 on CPU. decode_timeout_s: patience with a VAE worker; 60 on CPU.
    drain_s: what a shutdown gives to running chunks. poison_s: how long poisonous content is refused.
    """

    batching: Literal["auto", "always", "off"] = "auto"
    max_pack: int = 8
    max_requests: int = 1000
    max_attempts: int = 3
    slots_per_vae: int = 2
    ttfc_target_s: float = 3.0
    max_queue_wait_s: float = 600.0
    age_after_s: float = 60.0
    stuck_floor_s: float = 5.0
    chunk_floor_s: float = 10.0
    encode_timeout_s: float = 30.0
    decode_timeout_s: float = 15.0
    drain_s: float = 10.0
    poison_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("max_pack", "max_requests", "max_attempts", "slots_per_vae"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        for name in ("stuck_floor_s", "chunk_floor_s", "encode_timeout_s", "decode_timeout_s", "drain_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be above 0")

    def patient(self) -> EngineConfig:
        """The same limits with the patience that a CPU needs."""
        return replace(self, stuck_floor_s=60.0, chunk_floor_s=60.0, encode_timeout_s=60.0, decode_timeout_s=60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where the server listens and keeps its files, and who may call.

    host: address to listen on, for HTTP and gRPC; without API keys one of this machine. port: of HTTP; 0 takes a free
    one. admin_bind: `host:port` to which /live, /ready, /health, /version and /metrics move, in plain HTTP and without
    keys; port 0 takes a free one; None leaves them at the main port. data_dir: jobs, videos, caches and secrets, unless
    section store says otherwise. warmup: recommended sizes that run once before the server greets: none, the default
    one, or all. metrics_alias: publish what vLLM's dashboards know under its names too. keys_file: API keys, as
    `helios-serve keys` writes them; the file is watched. keys: API keys as text, in the same form. keys_in_database:
    API keys of the job store too, as `helios-serve keys --keys db` writes them. signing_keys_file:
    secrets that sign addresses, one a line, the first signs and all verify; the same at every replica; None makes one
    in the data directory. signing_keys: the same as text, separated by white space or commas. cors_origins: web pages
    that may call, such as https://app.example. media_url_hosts: hosts from which images and videos may be fetched,
    `.example.com` for all below example.com; none by default. webhook_private: webhooks may go to addresses that are
    not public. grpc_port: gRPC listens there too, 0 takes a free one; None: not at all. grpc_reflection: whether gRPC
    tells its methods to whoever asks; None does on a loopback address only. tls_cert: PEM file for HTTP and gRPC, with
    all certificates of its chain; together with tls_key. tls_key: PEM file, without a passphrase. tls_client_ca: PEM
    file; clients need a certificate of this authority, for HTTP and gRPC. content_redirect: finished videos are read
    from the bucket itself, by a presigned address, instead of through this server. log_format: None is text on a
    terminal, else JSON. otel_endpoint: where traces go, as http://host:4318; None makes none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    admin_bind: str | None = None
    data_dir: Path
    warmup: Literal["none", "default", "all"] = "default"
    metrics_alias: Literal["vllm"] | None = None
    keys_file: Path | None = None
    keys: str | None = field(default=None, repr=False)
    keys_in_database: bool = False
    signing_keys_file: Path | None = None
    signing_keys: str | None = field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    media_url_hosts: tuple[str, ...] = ()
    webhook_private: bool = False
    grpc_port: int | None = None
    grpc_reflection: bool | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    content_redirect: bool = False
    log_format: Literal["json", "text"] | None = None
    otel_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port}: must be 0 to 65535")
        if self.grpc_port is not None and not 0 <= self.grpc_port <= 65535:
            raise ValueError(f"grpc_port {self.grpc_port}: must be 0 to 65535")
        if self.grpc_port is not None and self.grpc_port == self.port != 0:
            raise ValueError(f"grpc_port {self.grpc_port}: is that of HTTP too; give each its own")
        if self.grpc_reflection is not None and self.grpc_port is None:
            raise ValueError("grpc_reflection: only together with grpc_port")
        if self.admin_bind is not None:
            host, port = self.admin_address
            if port != 0 and host == self.host and port in (self.port, self.grpc_port):
                raise ValueError(f"admin_bind {self.admin_bind}: is the port of HTTP or gRPC too; give each its own")
        if self.signing_keys_file is not None and self.signing_keys:
            raise ValueError("signing_keys and signing_keys_file: give one of them")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key: give both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca: only together with tls_cert and tls_key")
        if not self.is_loopback and not self.has_keys:
            raise ValueError(
                f"host {self.host}: without API keys the server listens on loopback addresses only; use 127.0.0.1, or "
                "give keys_file or keys_in_database"
            )

    @property
    def admin_address(self) -> tuple[str, int]:
        """Host and port of `admin_bind`, which is given. Raises: ValueError when it is no such pair."""
        assert self.admin_bind is not None
        host, colon, port = self.admin_bind.rpartition(":")
        is_bare_v6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
        if not colon or not host or is_bare_v6 or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"admin_bind {self.admin_bind}: must read host:port, such as 127.0.0.1:9090 or [::]:9090")
        return host.strip("[]"), int(port)

    @property
    def has_keys(self) -> bool:
        return self.keys_file is not None or bool(self.keys) or self.keys_in_database

    @property
    def is_loopback(self) -> bool:
        return self.host == "localhost" or (_is_address(self.host) and ip_address(self.host).is_loopback)


def default_data_dir() -> Path:
    """HELIOS_DATA_DIR, else helios-serve in the user's data directory."""
    chosen = os.environ.get("HELIOS_DATA_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "helios-serve"


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenDegrees:
    """Over how many ranks a forward is to be shared along each axis; None leaves it to the server. head_groups: in how
    many parts the heads of a rank travel. symmetric_memory: ranks write heads into each other's memory, where they can.
    """

    cfg: int | None = None
    ring: int | None = None
    ulysses: int | None = None
    head_groups: int = 1
    symmetric_memory: bool = False


FREE_DEGREES = GivenDegrees()
"""Nothing is given."""
AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """The workers of a Ray cluster: how many of each role, and what each one may use.

    num_encoders: encoder workers. num_dit_groups: DiT groups, each with the whole transformer. num_dit_ranks: processes
    of one DiT group, all on one node. ulysses: ranks that exchange tokens for heads in attention; divides the heads of
    the checkpoint. ring: ranks between which keys and values go around. cfg_degree: 2 gives the two sequences of
    guidance to two halves of a group. cfg_degree x ring x ulysses is num_dit_ranks; what is auto is chosen so that
    exchanges take the least time. head_groups: parts in which `ulysses` exchanges the heads of a rank, so that one
    travels while another is attended to; not measured yet. symmetric_memory: `ulysses` writes heads into the memory of
    other ranks, where PyTorch and the GPUs allow it; not tried on GPUs yet. num_vaes: VAE workers. num_vae_ranks:
    processes of one VAE worker, all on one node, which share each picture by columns. gpus_per_*: a share of one GPU; 0
    on CPU. cpus_per_*: cores that Ray sets aside, and compute threads of a CPU worker (at least one). address: of a
    running cluster, `host:port` or `auto`; None starts one on this machine. object_store_bytes: of a cluster that we
    start; /dev/shm must hold it. cache_bytes: conditionings that a DiT rank keeps. beat_s: between the beats of a
    worker, which is replaced after 2 s without one. spawn_timeout_s: until a worker's process must answer.
    load_timeout_s: until it must be ready.
    """

    num_encoders: int = 1
    num_dit_groups: int = 1
    num_dit_ranks: int = 1
    ulysses: int | Literal["auto"] = AUTO
    ring: int | Literal["auto"] = AUTO
    cfg_degree: Literal[1, 2, "auto"] = AUTO
    head_groups: int = 1
    symmetric_memory: bool = False
    num_vaes: int = 1
    num_vae_ranks: int = 1
    gpus_per_encoder: float = 0.0
    gpus_per_rank: float = 0.0
    gpus_per_vae: float = 0.0
    cpus_per_encoder: float = 1.0
    cpus_per_rank: float = 1.0
    cpus_per_vae: float = 2.0
    address: str | None = None
    object_store_bytes: int = 4 << 30
    cache_bytes: int = 1 << 30
    beat_s: float = 0.5
    spawn_timeout_s: float = 60.0
    load_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("num_encoders", "num_dit_groups", "num_dit_ranks", "head_groups", "num_vaes", "num_vae_ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        for name in ("ulysses", "ring", "cfg_degree"):
            degree = getattr(self, name)
            if degree != AUTO and (degree < 1 or self.num_dit_ranks % degree):
                raise ValueError(f"{name} {degree}: must divide num_dit_ranks {self.num_dit_ranks}")
        for name in ("gpus_per_encoder", "gpus_per_rank", "gpus_per_vae"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be 0 to 1, a share of one GPU")
        for name, ranks in (("gpus_per_rank", "num_dit_ranks"), ("gpus_per_vae", "num_vae_ranks")):
            share, count = getattr(self, name), getattr(self, ranks)
            if count > 1 and 0 < share <= 0.5:
                raise ValueError(f"{name} {share}: must be above 0.5 with {ranks} {count}: each needs a GPU of its own")
        for name in ("cpus_per_encoder", "cpus_per_rank", "cpus_per_vae"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be above 0")
        for name in ("beat_s", "spawn_timeout_s", "load_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be above 0")
        if self.address is not None and "://" in self.address:
            raise ValueError(
                f"address {self.address}: a Ray client address does not do; run on a node of the cluster and give "
                "host:port or auto"
            )
        if self.object_store_bytes < 80 << 20:
            raise ValueError(f"object_store_bytes {self.object_store_bytes}: Ray wants at least {80 << 20}")

    @property
    def degrees(self) -> GivenDegrees:
        """How the ranks of a DiT group are to share a forward, as far as it is given."""
        return GivenDegrees(
            cfg=None if self.cfg_degree == AUTO else self.cfg_degree,
            ring=None if self.ring == AUTO else self.ring,
            ulysses=None if self.ulysses == AUTO else self.ulysses,
            head_groups=self.head_groups,
            symmetric_memory=self.symmetric_memory,
        )

    @property
    def num_cpus(self) -> int:
        """Cores that all workers together set aside."""
        ranks, vae_ranks = self.num_dit_groups * self.num_dit_ranks, self.num_vaes * self.num_vae_ranks
        return math.ceil(
            self.num_encoders * self.cpus_per_encoder + ranks * self.cpus_per_rank + vae_ranks * self.cpus_per_vae
        )
