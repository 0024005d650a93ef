"""Tokens in addresses: what verifies, and that all else is refused alike."""

from __future__ import annotations

import base64
import json
import stat
import threading
from pathlib import Path
from typing import Any, get_args

import jwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_serve.api.auth import ANONYMOUS, AuthenticationError, Caller
from helios_serve.api.keys import DEFAULT_SCOPES, KeyLimits
from helios_serve.api.signed_urls import (
    CLIENT_SECRET_TTL_S,
    SIGNING_FILE,
    URL_TTL_S,
    Grant,
    SigningKey,
    SigningKeys,
    UrlSigner,
    Use,
    load_signing_keys,
    read_signing_keys,
    rotate_signing_keys,
    signing_keys_file,
    signing_keys_from,
)
from helios_serve.errors import InvalidRequestError

NOW = 1_800_000_000.75
VIDEO = "video_01JD0000000000000000000000"
USES: tuple[Use, ...] = get_args(Use)
SECRET = b"s" * 32
KEYS = SigningKeys(current=SigningKey(secret=SECRET))
SIGNER = UrlSigner(KEYS)
CALLER = Caller(tenant="studio", key_id="abcd", scopes=DEFAULT_SCOPES, limits=KeyLimits())


def refused(
    token: str, video_id: str = VIDEO, use: Use = "content", now: float = NOW, signer: UrlSigner = SIGNER
) -> None:
    with pytest.raises(AuthenticationError) as caught:
        signer.verify(token, video_id, use, now)
    assert caught.value.message == "the token is not valid here, or has expired"
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


def forged(claims: dict[str, Any], *, secret: bytes = SECRET, algorithm: str = "HS256", **header: Any) -> str:
    return jwt.encode(claims, secret, algorithm=algorithm, headers={"kid": KEYS.current.kid, **header})


@pytest.mark.parametrize("use", USES)
def test_a_token_is_for_one_video_one_use_and_one_hour(use: Use) -> None:
    token = SIGNER.sign(VIDEO, use, NOW)
    expected = Grant(video_id=VIDEO, use=use, expires_at=int(NOW) + URL_TTL_S)
    assert SIGNER.verify(token, VIDEO, use, NOW) == expected
    assert SIGNER.verify(token, VIDEO, use, expected.expires_at - 0.01) == expected
    refused(token, use=use, now=expected.expires_at)
    refused(token, "video_01JD0000000000000000000001", use)
    refused(token, VIDEO + "x", use)
    for other in USES:
        if other != use:
            refused(token, use=other)
    with pytest.raises(AuthenticationError):
        SIGNER.verify_client_secret(token, NOW)


def test_a_token_goes_into_an_address_as_it_is() -> None:
    token = SIGNER.sign(VIDEO, "hls", NOW)
    assert set(token) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")
    assert len(token) < 400


_CLAIMS = {"sub": VIDEO, "use": "content", "exp": int(NOW) + 60}


def _unsigned() -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'none', 'typ': 'JWT', 'kid': KEYS.current.kid})}.{part(_CLAIMS)}."


def test_forgeries() -> None:
    good = SIGNER.sign(VIDEO, "content", NOW)
    header, payload, signature = good.split(".")
    assert (
        SIGNER.verify(forged(_CLAIMS), VIDEO, "content", NOW).video_id == VIDEO
    )  # so that the rest fails for its fault
    for token in (
        forged(_CLAIMS, secret=b"t" * 32),
        forged(_CLAIMS, kid="other"),
        forged(_CLAIMS, secret=b"t" * 64, algorithm="HS512"),
        forged(_CLAIMS, secret=SECRET * 2, algorithm="HS512"),
        _unsigned(),
        f"{header}.{payload}.",
        f"{header}.{payload}",
        f"{header}..{signature}",
        f"{header}.{payload}.{signature}.",
        f"{good}=",
        f" {good}",
        f"{good}\n",
        "",
        ".",
        "..",
        "é",
        "\ud800",
        "[" * 1000,
        f"{header}." + "W" * 900 + f".{signature}",
        "A" * 10_000_000,
    ):
        refused(token)


def test_every_spelling_of_the_same_signature_but_ours_is_refused() -> None:
    """The last character of 43 carries two bits that base64 ignores."""
    good = SIGNER.sign(VIDEO, "content", NOW)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    accepted = []
    for last in alphabet:
        try:
            SIGNER.verify(good[:-1] + last, VIDEO, "content", NOW)
        except AuthenticationError:
            continue
        accepted.append(last)
    assert accepted == [good[-1]]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_changed_token_verifies(data: st.DataObject) -> None:
    good = SIGNER.sign(VIDEO, "content", NOW)
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 5)))
    alphabet = st.one_of(st.characters(codec="ascii"), st.characters())
    changed = good[:start] + data.draw(st.text(alphabet, max_size=5)) + good[end:]
    if changed != good:
        refused(changed)


@settings(max_examples=200, deadline=None)
@given(token=st.text(max_size=200) | st.from_regex(r"[\w-]{10,80}\.[\w-]{10,80}\.[\w-]{43}", fullmatch=True))
def test_no_invented_token_verifies(token: str) -> None:
    refused(token)
    with pytest.raises(AuthenticationError):
        SIGNER.verify_client_secret(token, NOW)


@settings(max_examples=200, deadline=None)
@given(secret=st.binary(min_size=32, max_size=64).filter(lambda secret: secret != SECRET))
def test_no_other_secret_signs(secret: bytes) -> None:
    other = UrlSigner(SigningKeys(current=SigningKey(secret=secret)))
    refused(other.sign(VIDEO, "content", NOW))
    refused(forged(_CLAIMS, secret=secret))


def test_client_secrets() -> None:
    secret = SIGNER.sign_client_secret(CALLER, NOW)
    assert secret.expires_at == int(NOW) + CLIENT_SECRET_TTL_S
    assert secret.value not in repr(secret)
    assert SIGNER.verify_client_secret(secret.value, NOW) == "abcd"
    assert SIGNER.verify_client_secret(SIGNER.sign_client_secret(ANONYMOUS, NOW).value, NOW) is None
    assert SIGNER.sign_client_secret(CALLER, NOW, ttl_s=1).expires_at == int(NOW) + 1
    with pytest.raises(AuthenticationError):
        SIGNER.verify_client_secret(secret.value, secret.expires_at)
    for use in USES:
        refused(secret.value, "abcd", use)
    for ttl_s in (0, -1, 601):
        with pytest.raises(InvalidRequestError, match="1 to 600 seconds"):
            SIGNER.sign_client_secret(CALLER, NOW, ttl_s=ttl_s)


def test_rotation_keeps_the_previous_secret_and_ends_the_one_before(tmp_path: Path) -> None:
    first = load_signing_keys(tmp_path)
    assert first.previous is None
    assert load_signing_keys(tmp_path) == first
    token = UrlSigner(first).sign(VIDEO, "content", NOW)
    second = rotate_signing_keys(tmp_path)
    assert second.previous == first.current
    assert load_signing_keys(tmp_path) == second
    rotated = UrlSigner(second)
    assert rotated.verify(token, VIDEO, "content", NOW).video_id == VIDEO
    assert rotated.sign(VIDEO, "content", NOW) != token
    assert UrlSigner(second).verify(rotated.sign(VIDEO, "content", NOW), VIDEO, "content", NOW)
    refused(token, signer=UrlSigner(rotate_signing_keys(tmp_path)))


def test_the_signing_file_is_for_its_owner(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = load_signing_keys(tmp_path)
    path = tmp_path / SIGNING_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.current.secret.hex() not in repr(keys)
    assert repr(keys.current.secret) not in repr(keys)
    assert caplog.text == ""
    path.chmod(0o640)
    assert load_signing_keys(tmp_path) == keys
    assert "mode 0640 lets others read it" in caplog.text
    assert keys.current.secret.hex() not in caplog.text


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"secrets": []}', '{"secrets": ["zz"]}', '{"secrets": [1]}', '{"secrets": ["00"]}'],
)
def test_a_damaged_signing_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / SIGNING_FILE).write_text(text)
    with pytest.raises(ValueError, match=SIGNING_FILE):
        load_signing_keys(tmp_path)


def test_servers_that_start_together_agree_on_the_secret(tmp_path: Path) -> None:
    found: list[SigningKeys] = []
    threads = [threading.Thread(target=lambda: found.append(load_signing_keys(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(keys == found[0] for keys in found)


def test_replicas_with_the_same_given_secret_understand_each_other() -> None:
    one, two = signing_keys_from("a" * 32), signing_keys_from("b" * 32, "a" * 32)
    assert UrlSigner(two).verify(UrlSigner(one).sign(VIDEO, "stream", NOW), VIDEO, "stream", NOW)
    with pytest.raises(ValueError, match="at least 32"):
        signing_keys_from("short")


def test_a_rotation_over_replicas_ends_no_token() -> None:
    """The new secret verifies everywhere before it signs anywhere; the old one verifies until its tokens have ended."""
    old, new = "a" * 32, "b" * 32
    for one, two in ((f"{old}\n", f"{old}\n{new}\n"), (f"{old},{new}", f"{new} {old}"), (f"{new}, {old}", new)):
        here, there = UrlSigner(read_signing_keys(one)), UrlSigner(read_signing_keys(two))
        assert there.verify(here.sign(VIDEO, "stream", NOW), VIDEO, "stream", NOW)
    with pytest.raises(AuthenticationError):
        UrlSigner(read_signing_keys(new)).verify(
            UrlSigner(read_signing_keys(old)).sign(VIDEO, "stream", NOW), VIDEO, "stream", NOW
        )
    three = read_signing_keys(f"{new}\n{old}\n{'c' * 32}")
    assert [key.secret[:1] for key in three.in_order] == [b"b", b"a", b"c"]
    assert UrlSigner(three).verify(UrlSigner(read_signing_keys("c" * 32)).sign(VIDEO, "hls", NOW), VIDEO, "hls", NOW)


def test_a_file_of_signing_secrets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "signing"
    path.write_text(f"# made in March\n{'a' * 32}  # old\n\n{'b' * 32}\n")
    path.chmod(0o600)
    assert signing_keys_file(path) == signing_keys_from("a" * 32, "b" * 32)
    assert caplog.text == ""
    path.chmod(0o644)
    signing_keys_file(path)
    assert "mode 0644 lets others read it" in caplog.text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"# nothing\n", "none is given"),
        (b"hunter2hunter2\n", "14 bytes; at least 32 are needed"),
        (b"a" * 32 + b"\n" + b"a" * 32, "one is there twice"),
        (b"\xff" * 40, "is not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_a_file_of_signing_secrets_that_does_not_do_is_named_and_not_quoted(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "signing"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(ValueError, match=problem) as caught:
        signing_keys_file(path)
    assert str(caught.value).startswith(f"signing_keys_file {path}: ")
    assert "hunter2" not in str(caught.value)
