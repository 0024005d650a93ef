"""Approximations that a server makes are said in its answers and kept with the job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from helios_serve.api.convert import Limits, ParsedRequest, parse_generation
from helios_serve.api.grpc_messages import model_message
from helios_serve.api.job_spec import JobSpec, read_spec, spec_from, spec_hash
from helios_serve.api.jobs import model_object
from helios_serve.api.media_input import DataUriSource, Media
from helios_serve.types import Approximation
from tests.api import conftest
from tests.api.conftest import DISTILLED, FakeDecoder, FakeEngine, client_of, parts_of

BODY = {"prompt": "a fox", "size": "64x64", "num_frames": 33, "seed": 1}
"""What a client sends, who need not know of approximations."""


@pytest.fixture
def approximating(engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(conftest, "DISTILLED", replace(DISTILLED, approximations=("history_reuse",)))
    with parts_of(engine, tmp_path) as parts, client_of(parts.app) as client:
        yield client


def test_answers_name_them(approximating: TestClient) -> None:
    (model,) = approximating.get("/v1/models").json()["data"]
    assert model["helios"]["approximations"] == ["history_reuse"]
    video = approximating.post("/v1/videos", json=BODY).json()
    assert video["helios"]["approximations"] == ["history_reuse"]
    assert approximating.get(f"/v1/videos/{video['id']}").json()["helios"]["approximations"] == ["history_reuse"]
    assert approximating.post("/v1/videos/generations", json=BODY).json()["helios"]["approximations"] == [
        "history_reuse"
    ]


def test_the_engine_is_told(approximating: TestClient, engine: FakeEngine) -> None:
    approximating.post("/v1/videos/generations", json=BODY)
    assert engine.requests[-1].params.approximations == ("history_reuse",)


def test_without_them_the_lists_are_empty(client: TestClient, engine: FakeEngine) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["helios"]["approximations"] == []
    assert client.post("/v1/videos/generations", json=BODY).json()["helios"]["approximations"] == []
    assert engine.requests[-1].params.approximations == ()


def spec_of(*names: Approximation) -> tuple[JobSpec, ParsedRequest]:
    media = Media(source=DataUriSource(), decoder=FakeDecoder())
    parsed = parse_generation(BODY, replace(DISTILLED, approximations=names), media, Limits())
    return spec_from(parsed, DISTILLED.name, None), parsed


def test_the_hash_of_a_job_tells_them_apart() -> None:
    assert spec_hash(*spec_of()) != spec_hash(*spec_of("history_reuse"))


def test_a_row_keeps_them_and_one_without_has_none() -> None:
    kept, _ = spec_of("history_reuse")
    row: Any = SimpleNamespace(spec=json.loads(json.dumps(kept.to_json())))
    assert read_spec(row).params == kept.params
    del row.spec["params"]["approximations"]
    assert read_spec(row).params.approximations == ()


def test_grpc_names_them() -> None:
    info = replace(DISTILLED, approximations=("history_reuse",))
    assert [*model_message(model_object(info, 0, Limits())).approximations] == ["history_reuse"]
    assert [*model_message(model_object(DISTILLED, 0, Limits())).approximations] == []
