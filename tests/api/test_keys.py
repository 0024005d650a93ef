"""Keys, the files and variables they come from, and the commands that change the files."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from helios_serve.api import private_file
from helios_serve.api.keys import (
    DEFAULT_SCOPES,
    SCOPES,
    Key,
    KeyFile,
    KeyLimits,
    KeyRing,
    change_keys,
    key_from,
    key_to_dict,
    keys_from_env,
    new_key,
    parse_keys,
    read_keys,
    split_key,
)
from helios_serve.api.keys_cli import keys_app
from helios_serve.api.private_file import write_private


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_key_has_256_random_bits_and_keeps_only_their_hash() -> None:
    plain, key = new_key(tenant="studio")
    parts = split_key(plain)
    assert parts is not None
    key_id, secret = parts
    assert len(bytes.fromhex(secret)) == 32
    assert (key.id, key.secret_sha256) == (key_id, hashlib.sha256(secret.encode()).hexdigest())
    assert secret not in repr(key)
    assert key.secret_sha256 not in repr(key)
    assert len({new_key()[0] for _ in range(100)}) == 100


_LIMITS = st.builds(
    KeyLimits,
    frames_per_minute=st.integers(1, 10**9),
    max_sessions=st.integers(0, 50),
    min_priority=st.integers(-100, 100),
    weight=st.floats(0.01, 100),
    may_use_realtime=st.booleans(),
)
_KEYS = st.builds(
    Key,
    id=st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=4, max_size=32),
    name=st.text(max_size=20),
    tenant=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    secret_sha256=st.one_of(st.text("0123456789abcdef", min_size=64, max_size=64), st.just("1" * 62 + "e5")),
    scopes=st.sets(st.sampled_from(SCOPES)).map(frozenset),
    limits=_LIMITS,
    expires_at=st.none() | st.floats(0, 1e11),
)


@settings(max_examples=100, deadline=None)
@given(keys=st.lists(_KEYS, max_size=3, unique_by=lambda key: key.id))
def test_keys_survive_yaml_and_json(keys: list[Key]) -> None:
    document = {"keys": [key_to_dict(key) for key in keys]}
    assert parse_keys(yaml.safe_dump(document, sort_keys=False)) == keys
    assert parse_keys(json.dumps(document, indent=2)) == keys


def test_a_row_of_a_table_may_hold_the_hash_as_bytes() -> None:
    key = new_key(tenant="studio", limits=KeyLimits(max_sessions=3))[1]
    row = {**key_to_dict(key), "secret_sha256": bytes.fromhex(key.secret_sha256)}
    assert key_from(row) == key


def test_a_file_written_by_hand_needs_little() -> None:
    (key,) = parse_keys(f"keys:\n  - id: abcd\n    secret_sha256: '{'0' * 64}'\n    limits: {{max_sessions: 4}}\n")
    assert (key.tenant, key.scopes, key.limits) == ("default", DEFAULT_SCOPES, KeyLimits(max_sessions=4))
    assert parse_keys("") == parse_keys("keys:") == parse_keys("[]") == []


ROW = {"id": "abcd", "secret_sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "id must be a string"),
        ({"id": "A_b"}, "must be 4 to 32 lower-case letters and digits"),
        ({"secret_sha256": 123}, "secret_sha256 must be a string; put it in quotes"),
        ({"secret_sha256": "0" * 63}, "64 hexadecimal digits"),
        ({"tenant": "a/b"}, "tenant 'a/b'"),
        ({"tenant": ""}, "tenant ''"),
        ({"scopes": "read"}, "scopes: must be a list"),
        ({"scopes": ["reed"]}, "scopes: reed: unknown; known: generate, read"),
        ({"scopes": [["read"]]}, "scopes: "),
        ({"limit": {}}, "limit: unknown field; did you mean limits?"),
        ({"limits": [1]}, "limits: must be a mapping"),
        ({"limits": {"frames_per_minutes": 1}}, "did you mean frames_per_minute?"),
        ({"limits": {"frames_per_minute": 0}}, "limits.frames_per_minute 0: must be at least 1"),
        ({"limits": {"frames_per_minute": True}}, "limits.frames_per_minute True: must be a whole number"),
        ({"limits": {"frames_per_minute": "9"}}, "must be a whole number"),
        ({"limits": {"max_sessions": -1}}, "must be at least 0"),
        ({"limits": {"weight": float("inf")}}, "limits.weight inf: must be a number above 0"),
        ({"limits": {"may_use_realtime": 1}}, "must be true or false"),
        ({"expires_at": "tomorrow"}, "expires_at tomorrow: must be seconds of the Unix clock, or null"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        key_from({**ROW, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text", ["keys: 3", "keys: [3]", "3", "other: []", "keys: [", "{", f"[{json.dumps(ROW)}, {json.dumps(ROW)}]"]
)
def test_what_is_wrong_with_a_file_is_said(text: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"keys file .*keys\.yaml: "):
        read_keys(path)
    with pytest.raises(ValueError, match="No such file"):
        read_keys(tmp_path / "absent.yaml")


def test_keys_from_a_variable() -> None:
    (first, one), (second, two) = new_key(tenant="studio"), new_key()
    keys = keys_from_env(f"  {first},\n{second} ,")
    assert [(key.id, key.secret_sha256, key.tenant) for key in keys] == [
        (one.id, one.secret_sha256, "default"),
        (two.id, two.secret_sha256, "default"),
    ]
    assert keys_from_env(json.dumps({"keys": [key_to_dict(one)]})) == [one]
    assert keys_from_env("") == []
    with pytest.raises(ValueError, match="key 2: must read hs_") as caught:
        keys_from_env(f"{first} {second}extra")
    assert second[20:] not in str(caught.value)
    with pytest.raises(ValueError, match="two with this id"):
        keys_from_env(f"{first},{first}")


def test_a_damaged_document_is_not_quoted() -> None:
    with pytest.raises(ValueError, match="neither YAML nor JSON") as caught:
        keys_from_env("keys: [secretsecret")
    assert "secretsecret" not in str(caught.value)


def test_a_ring_refuses_two_keys_of_one_id() -> None:
    key = new_key()[1]
    with pytest.raises(ValueError, match="two with this id"):
        KeyRing([key, replace(key, tenant="other")])


def test_a_changed_file_is_read_again_and_a_damaged_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "keys.yaml", Clock()
    one, two = new_key()[1], new_key()[1]
    change_keys(path, lambda keys: [*keys, one])
    source = KeyFile(path, clock=clock)

    def find(key: Key) -> Key | None:
        return asyncio.run(source.find(key.id))

    assert (len(source), find(one), find(two)) == (1, one, None)
    change_keys(path, lambda _: [two])
    assert find(one) == one  # looked at once a second
    clock.now += 1
    assert (find(one), find(two)) == (None, two)
    for damage in (lambda: path.write_text("keys: ["), path.unlink):
        damage()
        clock.now += 1
        assert find(two) == two
        assert "stay in force" in caplog.text
        caplog.clear()
    change_keys(path, lambda _: [])
    clock.now += 1
    assert find(two) is None


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_a_keys_file_is_for_its_owner_and_leaves_nothing_beside_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new" / name
    old = os.umask(0)
    try:
        change_keys(path, lambda keys: [*keys, new_key()[1]])
    finally:
        os.umask(old)
    assert mode_of(path) == 0o600
    path.chmod(0o644)
    change_keys(path, lambda keys: [*keys, new_key()[1]])
    assert mode_of(path) == 0o600
    assert len(read_keys(path)) == 2
    assert {each.name for each in path.parent.iterdir()} == {name, f".{name}.lock"}
    if name == "keys.json":
        json.loads(path.read_text())


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "real.yaml", tmp_path / "keys.yaml"
    link.symlink_to(target)
    change_keys(link, lambda keys: [*keys, new_key()[1]])
    assert link.is_symlink()
    assert len(read_keys(target)) == 1


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.yaml"
    write_private(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(private_file.os, point, fail)
    with pytest.raises(OSError, match="No space"):
        write_private(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["keys.yaml"]


def test_readers_never_see_half_a_file_and_writers_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    change_keys(path, lambda _: [])
    done = threading.Event()
    seen: list[int] = []

    def read() -> None:
        while not done.is_set():
            seen.append(len(read_keys(path)))

    reader = threading.Thread(target=read)
    reader.start()
    code = (
        "import sys; from pathlib import Path; from helios_serve.api.keys import change_keys, new_key\n"
        "for _ in range(10): change_keys(Path(sys.argv[1]), lambda keys: [*keys, new_key()[1]])"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(3)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    done.set()
    reader.join()
    assert len(read_keys(path)) == 30
    assert seen == sorted(seen)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(keys_app, [str(each) for each in arguments])


def test_commands(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    flags = ["--scope", "read", "--limit", "frames_per_minute=5000", "--limit", "may_use_realtime=false"]
    names = ["--tenant", "studio", "--name", "render farm"]
    created = run("create", "--keys-file", path, *names, *flags, "--expires-in-days", "30")
    assert created.exit_code == 0, created.output
    plain = created.stdout.strip()
    parts = split_key(plain)
    assert parts is not None
    (key,) = read_keys(path)
    assert (key.id, key.tenant, key.scopes) == (parts[0], "studio", {"read"})
    assert key.limits == KeyLimits(frames_per_minute=5000, may_use_realtime=False)
    assert parts[1] not in path.read_text()
    assert key.expires_at is not None
    assert key.created_at is not None
    assert key.expires_at - key.created_at == pytest.approx(30 * 86_400, abs=2)
    assert run("create", "--keys-file", path).exit_code == 0
    listed = run("list", "--keys-file", path)
    assert len(listed.stdout.splitlines()) == 2
    for part in (key.id, "studio", "read", "frames_per_minute=5000", "render farm", "expires 20"):
        assert part in listed.stdout.splitlines()[0]
    assert "never expires  default limits" in listed.stdout.splitlines()[1]
    assert key.secret_sha256 not in listed.output
    assert run("revoke", key.id, "--keys-file", path).exit_code == 0
    assert key.id not in run("list", "--keys-file", path).stdout
    assert mode_of(path) == 0o600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "--scope", "reed"], "scope reed: unknown"),
        (["create", "--limit", "frames_per_minute"], "must read name=value"),
        (["create", "--limit", "frames_per_minute=many"], "must be a whole number"),
        (["create", "--limit", "x=["], "must be a number"),
        (["create", "--limit", "frames=3"], "unknown field"),
        (["create", "--tenant", "a/b"], "tenant"),
        (["create", "--expires-in-days", "0"], "must be above 0"),
        (["create", "--expires-in-days", "nan"], "must be above 0"),
        (["revoke", "abcd"], "does not exist"),
    ],
)
def test_commands_say_what_is_wrong_and_write_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    path = tmp_path / "keys.yaml"
    result = run(*arguments, "--keys-file", path)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert not path.exists()


def test_revoking_an_unknown_key_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    change_keys(path, lambda keys: [*keys, new_key()[1]])
    before = path.read_bytes()
    assert "not in" in str(run("revoke", "abcdef", "--keys-file", path).exception)
    assert path.read_bytes() == before
