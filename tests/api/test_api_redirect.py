"""Finished videos that clients read from the bucket itself."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from obstore.store import S3Store
from starlette.testclient import TestClient

from helios_serve.api.routes import Presign
from helios_serve.store.blobs import BlobStore
from helios_serve.store.connect import StoreConfig
from tests.api import conftest
from tests.api.conftest import FakeEngine, Parts, client_of, parts_of
from tests.api.desks import app_over
from tests.api.test_api_streaming import create, finished

VIDEOS = "/v1/videos"


@contextmanager
def serving(parts: Parts, presign: Presign) -> Iterator[TestClient]:
    with client_of(app_over(parts, presign=presign)) as client:
        client.follow_redirects = False
        yield client


def made(client: TestClient) -> str:
    """The path of a finished video's content."""
    video_id = create(client, "exact")["id"]
    assert finished(client, video_id)["status"] == "completed"
    return f"{VIDEOS}/{video_id}/content"


def signed_offline(tmp_path: Path) -> BlobStore:
    """Signs as for a bucket, which takes no network."""
    root = S3Store(
        "videos",
        prefix="helios",
        region="eu-west-1",
        endpoint="https://s3.eu-west-1.amazonaws.com",
        access_key_id="AKIDEXAMPLE",
        secret_access_key="secret of the tests",
    )
    return BlobStore(root, local=None, staging=tmp_path / "staging")


def test_a_client_is_sent_to_a_presigned_address(parts: Parts, tmp_path: Path) -> None:
    bucket = signed_offline(tmp_path)
    with serving(parts, bucket.presign) as client, closing(bucket):
        path = made(client)
        answer = client.get(path)
        assert (answer.status_code, answer.content) == (302, b"")
        target = urlsplit(answer.headers["location"])
        assert target.scheme == "https"
        assert "videos" in target.netloc + target.path
        query = parse_qs(target.query)
        assert query["X-Amz-Expires"] == ["3600"]
        assert query["X-Amz-SignedHeaders"] == ["host"]
        assert len(query["X-Amz-Signature"][0]) == 64
        assert "secret" not in answer.headers["location"]
        assert answer.headers["cache-control"] == "no-store", "the address ends before a cache would"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_what_a_presigned_get_cannot_answer_is_answered_here(parts: Parts, tmp_path: Path) -> None:
    bucket = signed_offline(tmp_path)
    with serving(parts, bucket.presign) as client, closing(bucket):
        path = made(client)
        head = client.head(path)
        assert (head.status_code, int(head.headers["content-length"]) > 0) == (200, True)
        assert client.get(path, headers={"if-none-match": head.headers["etag"]}).status_code == 304
        assert client.get(path, params={"variant": "thumbnail"}).status_code == 200
        assert client.get(f"{VIDEOS}/video_0/content").status_code == 404
        running = create(client, "slow", steps=[9, 9, 9])["id"]
        assert client.get(f"{VIDEOS}/{running}/content").status_code == 409
        client.delete(f"{VIDEOS}/{running}")


def test_the_page_may_play_what_it_is_sent_to(parts: Parts, tmp_path: Path) -> None:
    bucket = signed_offline(tmp_path)
    with serving(parts, bucket.presign) as client, closing(bucket):
        target = urlsplit(client.get(made(client)).headers["location"])
        for path in ("/", "/playground/app.js"):
            rules = client.get(path).headers["content-security-policy"].split("; ")
            policy = {name: sources.split() for name, _, sources in (rule.partition(" ") for rule in rules)}
            for kind in ("media-src", "connect-src", "img-src"):
                assert f"{target.scheme}://{target.netloc}" in policy[kind]
            assert policy["script-src"] == ["'self'"]


def test_a_page_of_a_directory_names_no_other_origin(parts: Parts) -> None:
    with serving(parts, parts.stores.blobs.presign) as client:
        assert "http" not in client.get("/").headers["content-security-policy"]


def test_a_directory_has_no_addresses(parts: Parts) -> None:
    with serving(parts, parts.stores.blobs.presign) as client:
        answer = client.get(made(client))
        assert (answer.status_code, answer.content[:4]) == (200, b"INIT")


def test_a_real_bucket_answers_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against any S3-compatible server, with the AWS_* variables that it needs."""
    url = os.environ.get("HELIOS_TEST_S3_URL")
    if url is None:
        pytest.skip("HELIOS_TEST_S3_URL is not set to a bucket, s3://name, that tests may write to")
    monkeypatch.setattr(conftest, "StoreConfig", partial(StoreConfig, blob_url=f"{url}/{uuid.uuid4().hex}"))
    with parts_of(FakeEngine(), tmp_path) as parts, serving(parts, parts.stores.blobs.presign) as client:
        path = made(client)
        location = client.get(path).headers["location"]
        assert httpx2.get(location).content.startswith(b"INIT[exact")
        part = httpx2.get(location, headers={"range": "bytes=1-3"})
        assert (part.status_code, part.content) == (206, b"NIT")
