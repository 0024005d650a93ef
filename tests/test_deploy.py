"""What `deploy/` says against the code: names of metrics and settings, ports, paths, times. Where `helm` and `promtool`
are installed they judge their files as well."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from helios_serve import telemetry
from helios_serve.api.probes import Probes
from helios_serve.api.routes import Desk
from helios_serve.api.system_routes import add_open_routes
from helios_serve.config import EngineConfig, ServerConfig
from helios_serve.settings import SHORT_ENV, load_settings, setting_types
from helios_serve.settings_sources import env_name
from helios_serve.telemetry import Metrics

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "helios-serve"
ALERTS = CHART / "files" / "alerts.yaml"
DASHBOARD = DEPLOY / "grafana" / "helios-serve.json"

DEFAULT_LABELS = {"instance", "job", "le", "namespace", "service"}
"""What Prometheus adds, and a histogram's own."""

needs_helm = pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def published() -> set[str]:
    """Every series name of the server."""
    text, _ = Metrics("any").render(openmetrics=False)
    ends = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    families = [each for each in text_string_to_metric_families(text.decode()) if each.name.startswith("helios:")]
    return {family.name + end for family in families for end in ends[family.type]}


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"helios:[a-zA-Z0-9_]+", text))


def dashboard_builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_dashboard", DEPLOY / "grafana" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def dockerfile() -> list[list[str]]:
    """Instructions and their arguments, lines joined, comments dropped."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [line.split() for line in joined.splitlines() if line.strip()]


def dockerfile_env() -> dict[str, str]:
    pairs = [each for instruction in dockerfile() if instruction[0] == "ENV" for each in instruction[1:]]
    return dict(cast(tuple[str, str], tuple(pair.split("=", 1))) for pair in pairs)


def compose() -> Any:
    return read_yaml(DEPLOY / "compose.yaml")


def helios_routes() -> set[str]:
    app = FastAPI()
    desk = SimpleNamespace(service=None, settings=None)
    add_open_routes(app, cast(Desk, desk), Metrics("any"), Probes())
    return {str(route.path) for route in app.routes}  # type: ignore[attr-defined]


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)(s|m)", text)
    assert match is not None
    return int(match.group(1)) * {"s": 1, "m": 60}[match.group(2)]


def test_every_file_that_is_yaml_or_json_can_be_read() -> None:
    files = [path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".yml") and "templates" not in path.parts]
    assert len(files) >= 10
    for path in files:
        assert list(yaml.safe_load_all(path.read_text())), path
    for path in DEPLOY.rglob("*.json"):
        assert json.loads(path.read_text()), path


def test_the_dashboard_is_up_to_date() -> None:
    assert DASHBOARD.read_text() == dashboard_builder().rendered(), "run: python deploy/grafana/build.py"


def test_the_dashboard_shows_what_the_server_publishes_all_of_it_and_nothing_else() -> None:
    names = published()
    shown = metrics_in(DASHBOARD.read_text())
    assert shown <= names
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in names}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in shown} == families


def test_the_dashboard_builder_refuses_unknown_names_and_wrong_kinds() -> None:
    builder = dashboard_builder()
    for verb, name in ((builder.rate, "frames_total"), (builder.gauge, "frames_generated_total")):
        with pytest.raises(SystemExit, match=f"{name}: no"):
            verb(name)


def test_panels_have_their_own_ids_and_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in own) < 24
        assert not own & taken
        taken |= own


def test_alerts_ask_for_metrics_that_exist() -> None:
    rules = [rule for group in read_yaml(ALERTS)["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert metrics_in(rule["expr"]) <= published(), rule["alert"]
        assert {"summary", "description"} <= set(rule["annotations"]), rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule["alert"]


def test_alerts_and_the_dashboard_group_and_select_by_labels_that_exist() -> None:
    rows = (*telemetry._COUNTERS, *telemetry._GAUGES, *telemetry._HISTOGRAMS)
    labels = DEFAULT_LABELS | {label for row in rows for label in row.head[2]}
    texts = [*expressions(), *(rule["expr"] for group in read_yaml(ALERTS)["groups"] for rule in group["rules"])]
    used = {
        label for text in texts for group in re.findall(r"by \(([^)]*)\)", text) for label in re.findall(r"\w+", group)
    }
    used |= {label for text in texts for label in re.findall(r"(\w+)(?:=~|!~|!=|=)\"", text)}
    assert {"service_class", "finished_reason"} <= used
    assert used <= labels


def test_probes_and_scrapes_ask_for_paths_that_exist() -> None:
    deployment = (CHART / "templates" / "deployment.yaml").read_text()
    probes = re.findall(r"httpGet: \{path: (\S+), port: (\w+)\}", deployment)
    assert probes == [("/live", "admin"), ("/live", "admin"), ("/ready", "admin")]
    assert "targetPort: admin\n" in (CHART / "templates" / "monitoring.yaml").read_text()
    assert re.search(r"- name: admin\n +containerPort: \{\{ \.Values\.admin\.port \}\}", deployment)
    (healthcheck,) = [" ".join(each) for each in dockerfile() if each[0] == "HEALTHCHECK"]
    check = re.search(r"\}(/\w+)\\", healthcheck)
    assert check is not None
    scrape = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"][0]["metrics_path"]
    monitor = re.findall(r"path: (/\S+)", (CHART / "templates" / "monitoring.yaml").read_text())
    assert {path for path, _ in probes} | {check.group(1), scrape, *monitor} <= helios_routes()


def test_ports_agree(tmp_path: Path) -> None:
    port = str(ServerConfig(data_dir=tmp_path).port)
    (exposed,) = [each[1] for each in dockerfile() if each[0] == "EXPOSE"]
    service = compose()["services"]["helios"]
    scrape = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"][0]
    assert exposed == port
    assert dockerfile_env()["HELIOS_SERVER_PORT"] == port
    assert [each.rpartition(":")[2] for each in service["ports"]] == [port]
    assert scrape["static_configs"][0]["targets"] == [f"helios:{port}"]
    assert read_yaml(DEPLOY / "helios.yaml")["server"]["port"] == int(port)
    assert read_yaml(CHART / "values.yaml")["config"]["server"]["port"] == int(port)


def test_variables_are_settings() -> None:
    known = {env_name(key) for key in setting_types()} | set(SHORT_ENV)
    chart = set(re.findall(r"- name: (HELIOS_\w+)", (CHART / "templates" / "deployment.yaml").read_text()))
    image = {name for name in dockerfile_env() if name.startswith("HELIOS_")}
    composed = {name for name in compose()["services"]["helios"]["environment"] if name.startswith("HELIOS_")}
    assert chart
    assert image
    assert composed
    assert chart | image | composed <= known


def test_the_settings_of_compose_and_of_the_chart_can_be_loaded(tmp_path: Path) -> None:
    given = compose()["services"]["helios"]["environment"]
    environ = dockerfile_env() | {name: str(text) for name, text in given.items()} | {"HELIOS_MODEL_MODEL": "m"}
    environ["HELIOS_API_KEYS"] = "hs_a_b"
    settings = load_settings(DEPLOY / "helios.yaml", environ)
    assert settings.server.data_dir == settings.store.data_dir == Path("/data")
    assert settings.store.database_url is not None
    assert settings.store.database_url.endswith("@postgres:5432/helios")
    bucket = re.search(r"store/(\w+)", compose()["services"]["bucket"]["command"][0])
    assert bucket is not None
    assert settings.store.blob_url == f"s3://{bucket.group(1)}/blobs"

    chart = tmp_path / "chart.yaml"
    chart.write_text(yaml.safe_dump(read_yaml(CHART / "values.yaml")["config"]))
    environ = {"HELIOS_KEYS_FILE": "/run/secrets/helios/keys.yaml", "HELIOS_MODEL_MODEL": "m"}
    assert load_settings(chart, dockerfile_env() | environ).server.host == "0.0.0.0"


def test_there_is_time_to_drain() -> None:
    drain_s = EngineConfig().drain_s
    assert seconds(compose()["services"]["helios"]["stop_grace_period"]) > drain_s
    values = read_yaml(CHART / "values.yaml")
    assert values["config"]["engine"]["drain_s"] == drain_s
    assert values["terminationGracePeriodSeconds"] > values["preStopSeconds"] + drain_s


def test_the_image_runs_as_nobody_in_particular_and_holds_no_secret() -> None:
    instructions = dockerfile()
    last_stage = instructions[max(index for index, each in enumerate(instructions) if each[0] == "FROM") :]
    users = [each[1] for each in last_stage if each[0] == "USER"]
    assert users == ["10001:10001"]
    values = read_yaml(CHART / "values.yaml")
    assert values["podSecurityContext"]["runAsUser"] == 10001
    names = {each.split("=")[0] for line in instructions if line[0] in ("ENV", "ARG") for each in line[1:]}
    assert not {name for name in names if re.search("KEY|TOKEN|PASSWORD|SECRET", name)}
    assert ["ENTRYPOINT", '["tini",', '"--",', '"helios-serve"]'] in last_stage


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False)])
def test_the_health_check_of_the_image_works(status: int, is_healthy: bool) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/live" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    (line,) = [" ".join(each) for each in dockerfile() if each[0] == "HEALTHCHECK"]
    command = json.loads(line.partition(" CMD ")[2])
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        environ = {"HELIOS_SERVER_PORT": str(server.server_port)}
        done = subprocess.run([sys.executable, *command[1:]], env=environ, check=False, capture_output=True, timeout=30)
        thread.join()
    assert (done.returncode == 0) is is_healthy, done.stderr


def test_only_what_the_build_copies_is_sent_to_it() -> None:
    rules = [line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule[0] == "!"}
    copied = {
        source.removeprefix("./")
        for line in dockerfile()
        if line[0] == "COPY" and not line[1].startswith("--from")
        for source in line[1:-1]
    }
    assert copied == allowed
    assert all((ROOT / each).exists() for each in copied)


def test_compose_mounts_what_exists_and_takes_every_password_from_outside() -> None:
    parts = compose()
    for name, service in parts["services"].items():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), (name, source)
            else:
                assert source in parts["volumes"], (name, source)
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEYS", variable):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), (name, variable)
    text = (DEPLOY / "compose.yaml").read_text()
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required <= set(re.findall(r"^(\w+)=", (DEPLOY / ".env.example").read_text(), re.MULTILINE))
    published_ports = [port for service in parts["services"].values() for port in service.get("ports", [])]
    assert all("127.0.0.1" in port for port in published_ports)


def test_grafana_finds_its_source_and_dashboard() -> None:
    source = read_yaml(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    provider = read_yaml(DEPLOY / "grafana" / "provisioning" / "dashboards" / "helios.yaml")["providers"][0]
    grafana = compose()["services"]["grafana"]
    targets = [mount.split(":")[1] for mount in grafana["volumes"]]
    assert f"{provider['options']['path']}/{DASHBOARD.name}" in targets
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in targets


KEYS = ("--set", "apiKeys.existingSecret=keys")
SHARED = (*KEYS, "--set", "database.existingSecret=db", "--set", "config.store.blob_url=s3://b/p")
ALL = (
    *SHARED,
    *("--set", "replicaCount=3", "--set", "grpc.enabled=true", "--set", "ingress.enabled=true"),
    *("--set", "serviceMonitor.enabled=true", "--set", "prometheusRule.enabled=true", "--set", "keda.enabled=true"),
    *("--set", "envFromSecrets={bucket}", "--set", "ingress.tls[0].secretName=tls"),
)


def helm(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["helm", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )


def rendered(*options: str) -> dict[str, Any]:
    done = helm("template", "release", CHART, "--kube-version", "1.30.0", *options)
    assert done.returncode == 0, done.stderr
    documents = [each for each in yaml.safe_load_all(done.stdout) if each is not None]
    return {each["kind"]: each for each in documents}


@needs_helm
@pytest.mark.parametrize("options", [KEYS, ALL])
def test_helm_accepts_the_chart(options: tuple[str, ...]) -> None:
    done = helm("lint", "--strict", CHART, *options)
    assert done.returncode == 0, done.stdout


@needs_helm
def test_one_pod_with_its_volume() -> None:
    found = rendered(*KEYS)
    kinds = {"ConfigMap", "Deployment", "PersistentVolumeClaim", "PodDisruptionBudget", "Service"}
    assert set(found) == kinds
    assert found["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": 8000}, {"name": "admin", "containerPort": 8001}]
    assert {"name": "HELIOS_SERVER_ADMIN_BIND", "value": "0.0.0.0:8001"} in container["env"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "admin"}
    assert not [each for each in container["env"] if each["name"] == "HELIOS_SIGNING_KEYS_FILE"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == found["Service"]["spec"]["selector"]
    assert found["Service"]["spec"]["selector"].items() <= (
        found["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    )


@needs_helm
def test_pods_share_what_signs_addresses() -> None:
    pod = rendered(*KEYS, "--set", "signingKeys.existingSecret=s")["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    path = "/run/secrets/helios-signing"
    assert {"name": "HELIOS_SIGNING_KEYS_FILE", "value": f"{path}/signing"} in container["env"]
    assert {"name": "signing", "mountPath": path, "readOnly": True} in container["volumeMounts"]
    assert {"name": "signing", "secret": {"secretName": "s", "defaultMode": 0o440}} in pod["volumes"]


@needs_helm
def test_several_pods_with_everything(tmp_path: Path) -> None:
    found = rendered(*ALL)
    assert {"Ingress", "ServiceMonitor", "PrometheusRule", "ScaledObject"} <= set(found)
    assert "PersistentVolumeClaim" not in found
    deployment = found["Deployment"]["spec"]
    assert "replicas" not in deployment
    assert deployment["strategy"]["type"] == "RollingUpdate"
    (container,) = deployment["template"]["spec"]["containers"]
    assert {"name": "grpc", "containerPort": 9000} in container["ports"]
    assert [port["targetPort"] for port in found["Service"]["spec"]["ports"]] == ["http", "grpc"]
    assert container["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    assert found["PrometheusRule"]["spec"] == read_yaml(ALERTS)
    assert metrics_in(found["ScaledObject"]["spec"]["triggers"][0]["metadata"]["query"]) <= published()
    file = tmp_path / "helios.yaml"
    file.write_text(found["ConfigMap"]["data"]["helios.yaml"])
    environ = {"HELIOS_KEYS_FILE": "/keys.yaml", "HELIOS_MODEL_MODEL": "m"}
    assert load_settings(file, environ).store.blob_url == "s3://b/p"


@needs_helm
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "apiKeys.existingSecret: the server answers others than its own machine only with API keys"),
        ((*KEYS, "--set", "replicaCount=2"), "several replicas need database.existingSecret"),
        ((*KEYS, "--set", "hpa.enabled=true"), "several replicas need database.existingSecret"),
        ((*SHARED, "--set", "hpa.enabled=true", "--set", "keda.enabled=true"), "enable one of them"),
        ((*KEYS, "--set", "config.engine.drain_s=60"), "must exceed preStopSeconds 5 + config.engine.drain_s 60"),
        ((*KEYS, "--set", "replicas=2"), "replicas"),
        ((*KEYS, "--set", "config.server.keys=hs_a_b"), "keys"),
    ],
)
def test_helm_refuses_what_would_not_work(options: tuple[str, ...], said: str) -> None:
    done = helm("template", "release", CHART, "--kube-version", "1.30.0", *options)
    assert done.returncode != 0
    assert said in done.stderr


def test_every_alert_is_explained() -> None:
    rules = {rule["alert"] for group in read_yaml(ALERTS)["groups"] for rule in group["rules"]}
    page = (ROOT / "docs" / "operations.md").read_text()
    assert set(re.findall(r"\bHelios[A-Z]\w+", page)) == rules


def promtool(*arguments: object) -> None:
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60, cwd=DEPLOY
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_accepts_its_files() -> None:
    promtool("check", "rules", ALERTS)
    promtool("check", "config", "--syntax-only", "prometheus/prometheus.yml")


@needs_promtool
def test_alerts_fire_when_they_should_and_not_else() -> None:
    promtool("test", "rules", "prometheus/alerts_test.yaml")


@needs_promtool
def test_prometheus_understands_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": text.replace("$__rate_interval", "1m")}
        for number, text in enumerate(expressions())
    ]
    assert len(rules) > 30
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", file)
