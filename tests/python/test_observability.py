"""Alert rules and dashboard against a running keepsetd, scraped by a real Prometheus."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from conftest import random_layers, spec

import keepset

ROOT = pathlib.Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "keepset.rules.yaml"
RULE_TESTS = sorted((ROOT / "tests" / "deploy").glob("keepset_rules*_test.yaml"))
DASHBOARD = ROOT / "deploy" / "grafana" / "keepset.json"
RUNBOOK = ROOT / "docs" / "operations.md"
SELECTOR = re.compile(r"keepset_[a-z0-9_]+(?:\{[^}]*\})?")
TIMEOUT_SECONDS = 30.0

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus and promtool are not installed (Debian package prometheus)",
)


class Prometheus:
    """A Prometheus with our rules that scrapes one page; `get` asks its HTTP API."""

    def __init__(self, metrics_url: str, directory: pathlib.Path):
        target = urllib.parse.urlsplit(metrics_url).netloc
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {"job_name": "keepset", "static_configs": [{"targets": [target]}]}
            ],
        }
        file = directory / "prometheus.yml"
        file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        self._process = subprocess.Popen(
            ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}",
             "--web.listen-address=127.0.0.1:0"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._url = ""
        self._log: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()
        self._ready.wait(TIMEOUT_SECONDS)

    def _read_log(self) -> None:
        for line in self._process.stderr:
            self._log.append(line)
            match = re.search(r'msg="Listening on" address=(\S+)', line)
            if match:
                self._url = f"http://{match.group(1)}"
            if "Server is ready to receive web requests" in line:
                self._ready.set()
        self._ready.set()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(TIMEOUT_SECONDS)
        self._reader.join()

    def get(self, path: str, **parameters):
        assert self._url, "".join(self._log[-20:])
        query = urllib.parse.urlencode(parameters, doseq=True)
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{query}", timeout=10) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as refused:
            pytest.fail(f"{path} {parameters}: {refused.read().decode()}")

    def await_true(self, condition):
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.05)
        pytest.fail("condition not reached:\n" + "".join(self._log[-20:]))

    def has_series(self, selector: str) -> bool:
        return bool(self.get("series", **{"match[]": selector}))


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    with keepset.Client.connect(server.address) as client:
        for policy in ("compilerkv", "snapkv"):
            client.compress(layers=random_layers(), **spec(policy=policy))
    running = Prometheus(server.metrics_url, tmp_path_factory.mktemp("prometheus"))
    try:
        running.await_true(lambda: running.has_series("keepset_build_info"))
        yield running
    finally:
        running.stop()


def rules_of(prometheus) -> list[dict]:
    groups = prometheus.await_true(lambda: [
        group for group in prometheus.get("rules")["groups"]
        if all(rule["health"] != "unknown" for rule in group["rules"])
    ])
    return [rule for group in groups for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [
        one.replace("$__rate_interval", "1m").replace("$instance", ".*") for one in expressions
    ]


def alert_names() -> list[str]:
    return re.findall(r"^\s*- alert: (\w+)$", RULES.read_text(encoding="utf-8"), re.MULTILINE)


@needs_prometheus
def test_a_real_scrape_passes_promtool(server, prometheus):
    with urllib.request.urlopen(server.metrics_url, timeout=10) as reply:
        # The listener's own series are the library's.
        page = b"".join(line for line in reply if b"exposer_" not in line)
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True)
    assert checked.returncode == 0, checked.stderr.decode()


@needs_prometheus
@pytest.mark.parametrize("file", RULE_TESTS, ids=lambda file: file.stem)
def test_rules_fire_when_they_should(file):
    checked = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_prometheus
def test_rules_run_in_a_prometheus(prometheus):
    rules = rules_of(prometheus)
    assert sorted(rule["name"] for rule in rules) == sorted(alert_names())
    assert [rule["lastError"] for rule in rules if rule["health"] != "ok"] == []


@needs_prometheus
def test_no_alert_fires_on_a_healthy_server(prometheus):
    active = [rule["name"] for rule in rules_of(prometheus) if rule["alerts"]]
    assert active == []


@needs_prometheus
def test_every_series_of_a_rule_is_on_the_page(prometheus):
    selectors = {found for rule in rules_of(prometheus) for found in SELECTOR.findall(rule["query"])}
    assert len(selectors) > 10
    missing = [one for one in sorted(selectors) if not prometheus.has_series(one)]
    assert missing == []


@needs_prometheus
def test_every_expression_of_the_dashboard_runs(prometheus):
    for expression in dashboard_expressions():
        prometheus.get("query", query=expression)


@needs_prometheus
def test_every_series_of_the_dashboard_is_on_the_page(prometheus):
    selectors = {found for one in dashboard_expressions() for found in SELECTOR.findall(one)}
    assert len(selectors) > 30
    missing = [one for one in sorted(selectors) if not prometheus.has_series(one)]
    assert missing == []


def test_every_alert_has_a_firing_test_and_a_runbook():
    tests = "".join(file.read_text(encoding="utf-8") for file in RULE_TESTS)
    headings = re.findall(r"^### (\w+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
    rules = RULES.read_text(encoding="utf-8")
    assert len(alert_names()) == len(set(alert_names())) > 10
    for name in alert_names():
        assert re.search(rf"alertname: {name}\n\s+exp_alerts:", tests), name
        assert name in headings
        assert f"runbook: operations.md#{name.lower()}\n" in rules


def test_the_dashboard_file_is_what_its_generator_writes():
    written = subprocess.run(
        [sys.executable, str(DASHBOARD.parent / "make_dashboard.py")],
        capture_output=True, text=True, check=True).stdout
    assert DASHBOARD.read_text(encoding="utf-8") == written, (
        "run deploy/grafana/make_dashboard.py > deploy/grafana/keepset.json")


def test_every_metric_is_on_the_dashboard_or_in_a_rule():
    names = re.findall(r"^\| `(keepset_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    shown = "\n".join(dashboard_expressions()) + RULES.read_text(encoding="utf-8")
    assert [name for name in names if name not in shown] == []
