"""A private Postgres cluster for tests, where its programs are installed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest


def _program(name: str) -> str | None:
    found = shutil.which(name)
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(installed[-1]) if installed else found


def _server_user() -> str | None:
    """Who runs Postgres, which refuses root."""
    if os.geteuid() != 0:
        return None
    return "postgres" if "postgres" in {entry.pw_name for entry in pwd.getpwall()} else "nobody"


def _run(home: Path, *command: str) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    subprocess.run(command, check=True, user=_server_user(), cwd=home, **quiet)  # type: ignore[call-overload]


def _control(home: Path, *words: str) -> None:
    """pg_ctl on the cluster of `postgres_cluster`; fsync is off, for kills of processes lose no page."""
    pg_ctl = _program("pg_ctl")
    assert pg_ctl is not None
    options = f"-k {home} -c listen_addresses='' -c fsync=off -c max_connections=200"
    _run(home, pg_ctl, "-D", str(home / "data"), "-l", str(home / "log"), "-w", "-o", options, *words)


@contextlib.contextmanager
def restart(home: Path) -> Iterator[None]:
    """The server is gone, as after a crash, while the block runs."""
    _control(home, "-m", "immediate", "stop")
    try:
        yield
    finally:
        _control(home, "start")


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Path]:
    """The directory of the socket of a running server; tests make their own databases."""
    initdb = _program("initdb")
    if initdb is None or _program("pg_ctl") is None:
        pytest.skip("Postgres is not installed: initdb and pg_ctl are missing (Debian package postgresql)")
    home = Path(tempfile.mkdtemp(prefix="helios-postgres-"))
    try:
        if (user := _server_user()) is not None:
            shutil.chown(home, user)
        _run(home, initdb, "-D", str(home / "data"), "-U", "helios", "-A", "trust", "--no-sync", "-E", "UTF8")
        _control(home, "start")
        try:
            yield home
        finally:
            _control(home, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_cluster: Path) -> Iterator[str]:
    """A fresh database."""
    name = f"test_{uuid.uuid4().hex}"
    admin = f"host={postgres_cluster} user=helios dbname=postgres"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield f"postgresql://helios@/{name}?host={postgres_cluster}"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
