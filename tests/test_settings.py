"""Settings from a file, the environment and flags: which wins, what is refused and how it is said, what is hidden."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_serve import settings as module
from helios_serve.config import EngineConfig, ExecutorConfig, GivenDegrees, ModelConfig, ServerConfig
from helios_serve.settings import (
    SHORT_ENV,
    Flag,
    Settings,
    SettingsError,
    assignments,
    describe,
    load_settings,
    sections,
    setting_types,
)
from helios_serve.settings_sources import Given, convert, env_name, type_name
from helios_serve.settings_table import DERIVED, configuration_page, field_notes
from helios_serve.store.connect import StoreConfig

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
MODEL = {"HELIOS_MODEL_MODEL": "tiny"}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HELIOS_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "helios.yaml"
    path.write_text(text)
    return path


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(*arguments, **options)
    return caught.value.message


def test_defaults_are_those_of_the_dataclasses(tmp_path: Path) -> None:
    settings = load_settings(None, MODEL)
    data_dir = tmp_path / "helios-serve"
    assert settings.engine == EngineConfig()
    assert settings.server == ServerConfig(data_dir=data_dir)
    assert settings.store == StoreConfig(data_dir=data_dir)
    assert settings.ray is None
    assert settings.sources == {"model.model": "HELIOS_MODEL_MODEL"}


def test_flags_win_over_the_environment_over_the_file_over_what_is_derived_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "engine:\n  max_pack: 2\n  max_attempts: 2\n  max_requests: 2\n  poison_s: 2\n")
    environ = MODEL | {"HELIOS_ENGINE_MAX_PACK": "3", "HELIOS_ENGINE_MAX_ATTEMPTS": "3"}
    flags = [
        Flag(name="--max-pack", key="engine.max_pack", value=4),
        Flag(name="--max-requests", key="engine.max_requests", value=None),
    ]
    derive = {"engine.max_requests": lambda known: 5, "engine.slots_per_vae": lambda known: 5}
    settings = load_settings(file, environ, flags, derive)
    engine = settings.engine
    assert (engine.max_pack, engine.max_attempts, engine.max_requests, engine.slots_per_vae) == (4, 3, 2, 5)
    assert engine.poison_s == 2.0
    assert engine.age_after_s == EngineConfig().age_after_s
    assert settings.sources["engine.max_pack"] == "--max-pack"
    assert settings.sources["engine.max_attempts"] == "HELIOS_ENGINE_MAX_ATTEMPTS"
    assert settings.sources["engine.max_requests"] == f"{file}:4"


def test_what_is_derived_knows_what_was_given_and_derived_before() -> None:
    derive = {
        "model.device": lambda known: "cuda",
        "model.dtype": lambda known: "bfloat16" if known["model.device"] == "cuda" else "float32",
        "model.model": lambda known: f"{known['server.data_dir']}/tiny",
    }
    settings = load_settings(None, {"HELIOS_DATA_DIR": "/data"}, derive=derive)
    assert (settings.model.dtype, settings.model.model) == ("bfloat16", "/data/tiny")
    assert load_settings(None, {"HELIOS_MODEL_DEVICE": "cpu"}, derive=derive).model.dtype == "float32"


def test_the_store_keeps_its_files_where_the_server_does_unless_told() -> None:
    assert load_settings(None, MODEL | {"HELIOS_DATA_DIR": "/a"}).store.data_dir == Path("/a")
    settings = load_settings(None, MODEL | {"HELIOS_DATA_DIR": "/a", "HELIOS_STORE_DATA_DIR": "/b"})
    assert (settings.server.data_dir, settings.store.data_dir) == (Path("/a"), Path("/b"))


def test_ray_is_there_when_it_is_the_executor(tmp_path: Path) -> None:
    file = write(tmp_path, "executor: ray\nray:\n  num_vaes: 2\n")
    assert load_settings(file, MODEL).ray == ExecutorConfig(num_vaes=2)
    assert load_settings(file, MODEL | {"HELIOS_EXECUTOR": "local"}).ray is None


def test_degrees_are_numbers_or_the_word_for_none(tmp_path: Path) -> None:
    file = write(tmp_path, "executor: ray\nray:\n  num_dit_ranks: 4\n  ulysses: auto\n  ring: 2\n")
    loaded = load_settings(file, MODEL | {"HELIOS_RAY_CFG_DEGREE": "auto"})
    assert loaded.ray is not None
    assert loaded.ray == ExecutorConfig(num_dit_ranks=4, ring=2)
    assert loaded.ray.degrees == GivenDegrees(ring=2)
    assert load_settings(write(tmp_path, describe(loaded)), {}) == loaded
    with pytest.raises(SettingsError, match="HELIOS_RAY_RING two: must be a whole number or auto"):
        load_settings(None, MODEL | {"HELIOS_RAY_RING": "two"})


def test_words_of_yaml_are_taken_as_they_stand(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "engine: {batching: off}\n"
        "server:\n"
        "  cors_origins: [https://a.example, 'https://b.example']\n"
        "  webhook_private: true\n"
        "  metrics_alias: null\n"
        "store:\n"
        "  lease_s: 1e1\n"
        "ray:\n"
        "# nothing but comments\n",
    )
    settings = load_settings(file, MODEL)
    assert settings.engine.batching == "off"
    assert settings.server.cors_origins == ("https://a.example", "https://b.example")
    assert settings.server.webhook_private is True
    assert settings.server.metrics_alias is None
    assert settings.store.lease_s == 10.0


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_says_nothing(tmp_path: Path, text: str) -> None:
    assert load_settings(write(tmp_path, text), MODEL).engine == EngineConfig()


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("engine:\n  max_pak: 4\n", 2, "engine.max_pak: no such setting; did you mean engine.max_pack?"),
        ("server:\n\n  database_url: x\n", 3, "no such setting; did you mean store.database_url?"),
        ("max_pack: 4\n", 1, "max_pack: no such setting; did you mean engine.max_pack?"),
        ("zzz: 1\n", 1, "zzz: no such setting; known: engine, executor, model, ray, server, store"),
        ("engine: 4\n", 1, "engine: is a section; write its fields indented below it"),
        ("engine:\n  max_pack: 4\n  max_pack: 5\n", 3, "max_pack: was set in line 2 already"),
        ("engine:\n  max_pack: {a: 1}\n", 2, "engine.max_pack: must be one value or a list of values"),
        ("engine:\n  max_pack: [1, 2]\n", 2, "engine.max_pack 1, 2: must be one value, not a list"),
        ("engine:\n  max_pack: 0.5\n", 2, "engine.max_pack 0.5: must be a whole number"),
        ("engine:\n  max_pack: true\n", 2, "engine.max_pack true: must be a whole number"),
        ("engine:\n  max_pack: null\n", 2, "engine.max_pack null: must have a value"),
        ("engine:\n  poison_s: .nan\n", 2, "engine.poison_s .nan: must be a number"),
        ("engine:\n  batching: sometimes\n", 2, "engine.batching sometimes: must be auto, always or off"),
        ("server:\n  webhook_private: maybe\n", 2, "server.webhook_private maybe: must be true or false"),
        ("engine:\n  max_pack: 0\n", 2, "engine: max_pack 0: must be at least 1"),
        ("engine:\n  max_pack: 4\n wrong\n", 3, "is not YAML"),
        ("? [a]\n: b\n", 1, "a name of a section or field is expected here"),
        ("executor: slurm\n", 1, "executor slurm: must be local or ray"),
    ],
)
def test_a_file_is_refused_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    file = write(tmp_path, text)
    message = refusal(file, MODEL)
    assert message.startswith(f"{file}:{line}")
    assert said in message


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(tmp_path / "none.yaml", MODEL)
    assert "must hold sections" in refusal(write(tmp_path, "- a\n"), MODEL)
    assert "is not YAML" in refusal(write(tmp_path, "a: 1\n---\nb: 2\n"), MODEL)
    (tmp_path / "helios.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in refusal(tmp_path / "helios.yaml", MODEL)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("HELIOS_ENGINE_MAX_PAK", "4", "HELIOS_ENGINE_MAX_PAK: no such setting; did you mean HELIOS_ENGINE_MAX_PACK?"),
        ("HELIOS_ENGIN_MAX_PACK", "4", "did you mean HELIOS_ENGINE_MAX_PACK?"),
        ("HELIOS_ENGINE_MAX_PACK", "four", "HELIOS_ENGINE_MAX_PACK four: must be a whole number"),
        ("HELIOS_SERVER_PORT", "70000", "HELIOS_SERVER_PORT server: port 70000: must be 0 to 65535"),
    ],
)
def test_a_variable_is_refused_by_its_name(name: str, text: str, said: str) -> None:
    assert said in refusal(None, MODEL | {name: text})


def test_empty_variables_and_those_of_others_say_nothing() -> None:
    links = {
        "HELIOS_SERVICE_HOST": "10.0.0.1",
        "HELIOS_SERVICE_PORT_HTTP": "8000",
        "HELIOS_SERVER_PORT": "tcp://10.0.0.1:8000",
        "HELIOS_SERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
        "HELIOS_TEST_S": "1",
        "HELIOS_ENGINE_MAX_PACK": "",
        "PATH": "/bin",
    }
    assert load_settings(None, MODEL | links) == load_settings(None, MODEL)


def test_a_variable_and_its_short_name_are_not_both_taken() -> None:
    message = refusal(None, MODEL | {"HELIOS_DATA_DIR": "/a", "HELIOS_SERVER_DATA_DIR": "/b"})
    assert message == "HELIOS_SERVER_DATA_DIR: HELIOS_DATA_DIR says the same; set only one of them"


def test_lists_in_variables_and_flags() -> None:
    environ = MODEL | {"HELIOS_SERVER_CORS_ORIGINS": "https://a.example, https://b.example,"}
    assert load_settings(None, environ).server.cors_origins == ("https://a.example", "https://b.example")
    flag = Flag(name="--cors-origin", key="server.cors_origins", value=["https://c.example"])
    assert load_settings(None, environ, [flag]).server.cors_origins == ("https://c.example",)


def test_any_setting_is_an_assignment() -> None:
    flags = assignments(["engine.max_pack=4", "store.blob_url=s3://b/a=c"])
    settings = load_settings(None, MODEL, flags)
    assert (settings.engine.max_pack, settings.store.blob_url) == (4, "s3://b/a=c")
    with pytest.raises(SettingsError, match=r"must read section\.field=value"):
        assignments(["engine.max_pack"])
    message = refusal(None, MODEL, assignments(["engine.max_pak=4"]))
    assert message == "--set engine.max_pak: no such setting; did you mean engine.max_pack?"
    assert refusal(None, MODEL, assignments(["engine.max_pack=x"])) == (
        "--set engine.max_pack x: must be a whole number"
    )


def test_what_has_no_default_must_be_set() -> None:
    assert refusal(None, {}) == "model.model: must be set"


def test_secrets_are_in_no_message_and_no_description(tmp_path: Path) -> None:
    environ = MODEL | {
        "HELIOS_API_KEYS": "hs_one_verysecretkeytext",
        "HELIOS_SIGNING_KEYS": "forgeforgeforge",
        "HELIOS_STORE_DATABASE_URL": "postgresql://helios:s3cr3t@db/helios?sslpassword=t0psecret",
    }
    text = describe(load_settings(None, environ))
    assert "verysecretkeytext" not in text
    assert "s3cr3t" not in text
    assert "forge" not in text
    assert "t0psecret" not in text
    assert "keys: [hidden]" in text.replace("'", "")
    assert "postgresql://helios:[removed]@db/helios" in text
    listed = write(tmp_path, "server:\n  keys: [hs_one_verysecretkeytext]\n")
    assert "verysecret" not in refusal(listed, MODEL)


def test_a_description_says_where_values_come_from(tmp_path: Path) -> None:
    file = write(tmp_path, "engine:\n  max_pack: 4\n")
    lines = describe(load_settings(file, MODEL)).splitlines()
    assert f"  max_pack: 4  # {file}:2" in lines
    assert "  model: tiny  # HELIOS_MODEL_MODEL" in lines
    assert "  max_requests: 1000" in lines
    assert "executor: local" in lines
    assert "ray:" not in lines


@settings(deadline=None)
@given(
    max_pack=st.integers(1, 10**6),
    seconds=st.floats(1e-9, 1e9),
    batching=st.sampled_from(["auto", "always", "off"]),
    origins=st.lists(st.text(st.characters(codec="ascii", categories=["L", "N", "P"], exclude_characters=","))),
    name=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1),
)
def test_a_description_is_a_file_that_says_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    max_pack: int,
    seconds: float,
    batching: str,
    origins: list[str],
    name: str,
) -> None:
    values = {
        "engine.max_pack": max_pack,
        "engine.drain_s": seconds,
        "engine.batching": batching,
        "server.cors_origins": origins,
        "model.model": name,
        "executor": "ray",
    }
    before = load_settings(None, {}, [Flag(name="--x", key=key, value=value) for key, value in values.items()])
    assert before.engine.drain_s == seconds
    file = tmp_path_factory.getbasetemp() / "described.yaml"
    file.write_text(describe(before), encoding="utf-8")
    if "[removed]" not in file.read_text(encoding="utf-8"):
        assert load_settings(file, {}) == before


@pytest.fixture
def later_fields() -> Iterator[pytest.MonkeyPatch]:
    """Room for dataclasses with other fields; what is cached of the real ones is made anew."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    setting_types.cache_clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class LaterServer:
    data_dir: Path
    grpc_port: int | None = None
    admin_bind: str | None = None
    tls_cert: Path | None = None
    content_redirect: bool = False
    log_format: Literal["json", "text"] | None = None
    otel_endpoint: str | None = None
    trusted: tuple[int, ...] = ()


def test_a_new_field_is_a_setting_at_once(later_fields: pytest.MonkeyPatch) -> None:
    kinds = dict(sections()) | {"server": LaterServer}
    later_fields.setattr(module, "sections", lambda: kinds)
    setting_types.cache_clear()
    environ = MODEL | {"HELIOS_SERVER_GRPC_PORT": "9000", "HELIOS_SERVER_TLS_CERT": "/etc/cert.pem"}
    flags = assignments(
        ["server.log_format=json", "server.trusted=1,2", "server.otel_endpoint=http://o:4318", "server.admin_bind=:9"]
    )
    server = load_settings(None, environ, flags).server
    assert isinstance(server, LaterServer)
    assert (server.grpc_port, server.tls_cert, server.log_format) == (9000, Path("/etc/cert.pem"), "json")
    assert (server.trusted, server.otel_endpoint, server.admin_bind) == ((1, 2), "http://o:4318", ":9")
    assert refusal(None, MODEL, assignments(["server.trusted=1,b"])) == (
        "--set server.trusted 1,b: must be a whole number"
    )


def test_every_field_of_every_dataclass_has_a_type_that_can_be_read_and_named() -> None:
    keys = setting_types()
    assert {f"{section}.{each.name}" for section, kind in sections().items() for each in fields(kind)} < set(keys)
    assert set(sections()) == {"model", "engine", "server", "store", "ray"}
    assert len({env_name(key) for key in keys}) == len(keys)
    assert set(SHORT_ENV.values()) | set(DERIVED) <= set(keys)
    for key, annotation in keys.items():
        assert type_name(annotation), key
        with contextlib.suppress(ValueError):
            convert(annotation, Given(text="x", source=key))


def test_sections_are_the_fields_of_settings() -> None:
    assert {each.name for each in fields(Settings)} == {*sections(), "sources"}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), (
        "run: python -m helios_serve.settings_table docs/configuration.md"
    )


def test_the_page_has_a_row_for_every_setting() -> None:
    rows = [line for line in configuration_page().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(setting_types())
    assert all(row.replace("\\|", "").count("|") == 6 for row in rows)


def test_the_example_on_the_page_can_be_loaded(tmp_path: Path) -> None:
    example = configuration_page().split("```yaml\n")[1].split("```")[0]
    settings = load_settings(write(tmp_path, example), {})
    assert yaml.safe_load(example)["engine"]["max_pack"] == settings.engine.max_pack == 4
    assert settings.server.cors_origins == ("https://app.example",)


def test_what_docstrings_say_of_fields() -> None:
    notes = field_notes(EngineConfig)
    assert notes["max_pack"] == "requests in one forward, at most."
    assert notes["decode_timeout_s"] == "patience with a VAE worker; 60 on CPU."
    assert field_notes(ExecutorConfig)["gpus_per_vae"] == "a share of one GPU; 0 on CPU."


@pytest.mark.parametrize("kind", [ModelConfig, EngineConfig, ServerConfig, ExecutorConfig])
def test_every_field_has_a_meaning(kind: type[Any]) -> None:
    notes = field_notes(kind)
    assert [each.name for each in fields(kind) if not notes.get(each.name)] == []


@pytest.mark.parametrize(
    ("given_fields", "said"),
    [
        ({"admin_bind": "9090"}, "admin_bind 9090: must read host:port"),
        ({"admin_bind": ":9090"}, "must read host:port"),
        ({"admin_bind": "::1:9090"}, "must read host:port"),
        ({"admin_bind": "127.0.0.1:70000"}, "must read host:port"),
        ({"admin_bind": "127.0.0.1:8000"}, "is the port of HTTP or gRPC too"),
        ({"admin_bind": "127.0.0.1:9", "grpc_port": 9}, "is the port of HTTP or gRPC too"),
        ({"grpc_port": 8000}, "is that of HTTP too"),
        ({"grpc_reflection": True}, "only together with grpc_port"),
        ({"signing_keys": "a", "signing_keys_file": Path("f")}, "give one of them"),
    ],
)
def test_servers_that_cannot_be(tmp_path: Path, given_fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServerConfig(data_dir=tmp_path, **given_fields)


def test_admin_addresses(tmp_path: Path) -> None:
    for text, address in (("127.0.0.1:0", ("127.0.0.1", 0)), ("[::]:9090", ("::", 9090)), ("admin:1", ("admin", 1))):
        assert ServerConfig(data_dir=tmp_path, admin_bind=text).admin_address == address
    assert ServerConfig(data_dir=tmp_path, port=0, grpc_port=0, admin_bind="127.0.0.1:0").grpc_port == 0
