"""Servers as processes of their own, and a Postgres for those that share one."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helios_serve.model_executor.tiny_checkpoint import write_tiny_checkpoint
from tests.faults.server_process import Server
from tests.postgres import postgres_cluster, postgres_url

__all__ = ["postgres_cluster", "postgres_url"]

NewServer = Callable[..., Server]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_checkpoint("distilled", path)
    return path


@pytest.fixture
def new_server(tiny_model: Path, tmp_path: Path) -> Iterator[NewServer]:
    """`new_server(name, *options)` -> a server on a data directory of its own, not started; killed at the end."""
    servers: list[Server] = []

    def make(name: str = "data", *options: str) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (tmp_path / name).mkdir()
        servers.append(Server(model=tiny_model, data_dir=tmp_path / name, port=port, options=options))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()
