"""Stores on SQLite, and on a private Postgres cluster where its programs are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helios_serve.faults import NO_FAULTS, FaultPlan
from helios_serve.store.connect import StoreConfig, Stores, open_stores
from tests.postgres import postgres_cluster, postgres_url

__all__ = ["postgres_cluster", "postgres_url"]

OpenStores = Callable[..., Stores]


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def opened(tmp_path: Path, database_url: str | None) -> Iterator[OpenStores]:
    """`opened(name, faults=..., **config)` -> stores; the same database and blobs for every name, closed at the end."""
    stores: list[Stores] = []

    def make(name: str = "data", *, faults: FaultPlan = NO_FAULTS, **options: object) -> Stores:
        config = StoreConfig(
            data_dir=tmp_path / name,
            database_url=database_url,
            blob_url=f"file://{tmp_path}/blobs",
            **options,  # type: ignore[arg-type]
        )
        stores.append(open_stores(config, faults=faults))
        return stores[-1]

    yield make
    for found in stores:
        found.close()


@pytest.fixture
def stores(opened: OpenStores) -> Stores:
    return opened()
