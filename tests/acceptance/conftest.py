"""Two servers for the whole session: one without keys, and one with keys of several tenants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI

from tests.acceptance.live_server import LiveServer, make_key, serving


@dataclass(frozen=True, slots=True)
class KeyedServer:
    """A server with keys. alice and bob are tenants; reader is a key of alice's that may only read. The others have
    tenants of their own: capped may make 33 frames a job; slow 1980 frames a minute, so that 33 come back in a second;
    narrow may have one job run and one wait."""

    alice: LiveServer
    bob: LiveServer
    reader: LiveServer
    capped: LiveServer
    slow: LiveServer
    narrow: LiveServer
    anonymous: LiveServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with serving(tmp_path_factory.mktemp("keyless"), "--webhook-private") as running:
        yield running


@pytest.fixture(scope="session")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedServer]:
    data_dir = tmp_path_factory.mktemp("keyed")
    keys_file = data_dir / "keys.yaml"
    alice = make_key(keys_file, "--tenant", "alice", "--limit", "requests_per_second=1000")
    bob = make_key(keys_file, "--tenant", "bob")
    reader = make_key(keys_file, "--tenant", "alice", "--scope", "read")
    capped = make_key(
        keys_file, "--tenant", "capped", "--limit", "max_frames_per_job=33", "--limit", "requests_per_second=1000",
        "--limit", "frames_per_minute=1000000",
    )  # fmt: skip
    slow = make_key(keys_file, "--tenant", "slow", "--limit", "frames_per_minute=1980")
    narrow = make_key(keys_file, "--tenant", "narrow", "--limit", "max_running_jobs=1", "--limit", "max_queued_jobs=1")
    with serving(data_dir, "--webhook-private", "--keys-file", str(keys_file)) as running:
        held = [running.as_key(key) for key in (alice, bob, reader, capped, slow, narrow)]
        yield KeyedServer(*[*held, running])
        for each in held:
            each.http.close()


@pytest.fixture
def client(server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused") as made:
        yield made


@pytest.fixture(scope="session")
def finished(server: LiveServer) -> str:
    """The id of a finished video of 66 frames: two segments."""
    answer = server.http.post(
        "/v1/videos/generations", json={"prompt": "a fox", "num_frames": 66, "size": "64x64", "seed": 7}
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


@pytest.fixture(scope="session")
def picture() -> Path:
    return Path(__file__).parent.parent.parent / "docs" / "images" / "playground-390-light.png"
