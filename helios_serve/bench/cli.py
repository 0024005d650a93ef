"""`helios-serve bench`: its commands.

Knows their names; each has a module of its own.
"""

from __future__ import annotations

import typer

from helios_serve.bench.compare_cli import bench_compare
from helios_serve.bench.latency_cli import bench_latency
from helios_serve.bench.serve_cli import bench_serve
from helios_serve.bench.throughput_cli import bench_throughput

bench_app = typer.Typer(help="Measure serving load, latency and throughput.", no_args_is_help=True)
bench_app.command("serve")(bench_serve)
bench_app.command("compare")(bench_compare)
bench_app.command("latency")(bench_latency)
bench_app.command("throughput")(bench_throughput)
