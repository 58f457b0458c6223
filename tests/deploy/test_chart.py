"""The chart, rendered by helm: as a DaemonSet, as the sidecar of another chart, and what its schema refuses."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess

import pytest

import manifests
from manifests import Object

CHART = manifests.SOURCE / "deploy" / "helm" / "keepset"
ENGINE = manifests.SOURCE / "tests" / "deploy" / "engine-chart"
HELM = manifests.TOOLS / "helm"
REFUSED = {
    "an unknown key": {"tabels": {}},
    "an unknown key inside": {"daemonset": {"enabld": True}},
    "two sources of tables": {"tables": {"configMap": "a", "persistentVolumeClaim": "b"}},
    "an address of the chart": {"config": 'metrics_listen: "off"'},
    "an address in a later line": {"config": 'socket_mode: 0660\n  listen: "0.0.0.0:1"'},
    "what the chart says of writes": {"config": "table_writes: true"},
    "an etcd beside the chart's": {"config": 'etcd { endpoints: "e:2379" }'},
    "an endpoint without a port": {"registry": {"etcd": {"endpoints": ["https://etcd"]}}},
    "an endpoint that ends its string": {"registry": {"etcd": {"endpoints": ['e" x: "y:1']}}},
    "a relative socket folder": {"daemonset": {"socketDirectory": "run/keepset"}},
    "an end before the drain": {"terminationGracePeriodSeconds": 10},
    "a tag that is a number": {"image": {"tag": 1}},
}


@pytest.fixture(autouse=True)
def own_home(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """helm keeps nothing outside the test."""
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"HELM_{name}_HOME", str(tmp_path / name.lower()))


def template(chart: pathlib.Path, values: Object, folder: pathlib.Path) -> list[Object]:
    path = folder / "values.json"
    path.write_text(json.dumps(values))
    return manifests.load(manifests.run(HELM, "template", "test", chart, "--values", path))


def test_lint_finds_nothing() -> None:
    manifests.run(HELM, "lint", "--strict", CHART)


def test_versions_are_the_programs() -> None:
    version = manifests.run(manifests.BUILD / "clients" / "cli" / "keepset", "--version").split()[1]
    chart = (CHART / "Chart.yaml").read_text()
    assert f"\nversion: {version}\nappVersion: {version}\n" in chart


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tables": {"configMap": "t"}},
        {"tables": {"persistentVolumeClaim": "t"}},
        {"config": "num_threads: 4\nlimits { queue_capacity: 8 }\n"},
        {"registry": {"state": False}},
        {"registry": {"tableWrites": True, "etcd": {"endpoints": ["e-0.invalid:2379", "e-1.invalid:2380"]}}},
        {"registry": {"etcd": {"endpoints": ["https://e.invalid:2379"], "prefix": "/k", "secret": "s"}}},
        {
            "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "imagePullSecrets": [{"name": "s"}],
            "daemonset": {
                "nodeSelector": {"gpu": "yes"},
                "tolerations": [{"key": "gpu", "operator": "Exists"}],
                "runtimeClassName": "nvidia",
            },
        },
    ],
    ids=["defaults", "configmap", "claim", "config", "stateless", "fleet", "fleet-tls", "everything"],
)
def test_daemonset_holds_together(values: Object, tmp_path: pathlib.Path) -> None:
    objects = template(CHART, values, tmp_path)
    assert len(manifests.of_kind(objects, "DaemonSet")) == 1
    assert len(manifests.of_kind(objects, "PodMonitor")) == ("podMonitor" in values)
    manifests.check_all(objects, 1, tmp_path, frozenset({"t"}))


def test_changed_configuration_replaces_pods(tmp_path: pathlib.Path) -> None:
    digests = set()
    for config in ("num_threads: 1", "num_threads: 2"):
        (item,) = manifests.of_kind(template(CHART, {"config": config}, tmp_path), "DaemonSet")
        digests.add(item["spec"]["template"]["metadata"]["annotations"]["keepset/config-digest"])
    assert len(digests) == 2


def test_no_reader_of_metrics_means_no_ingress(tmp_path: pathlib.Path) -> None:
    objects = template(CHART, {"networkPolicy": {"enabled": True, "metricsFrom": []}}, tmp_path)
    (policy,) = manifests.of_kind(objects, "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy["spec"]


def test_policy_lets_out_to_the_ports_of_etcd_and_to_names(tmp_path: pathlib.Path) -> None:
    etcd = {"endpoints": ["e-0:2379", "https://e-1:2380"]}
    objects = template(CHART, {"registry": {"etcd": etcd}}, tmp_path)
    (policy,) = manifests.of_kind(objects, "NetworkPolicy")
    to_etcd, to_names = policy["spec"]["egress"]
    assert [port["port"] for port in to_etcd["ports"]] == [2379, 2380]
    assert {port["port"] for port in to_names["ports"]} == {53}


def test_state_lies_on_the_node_and_belongs_to_keepsetd(tmp_path: pathlib.Path) -> None:
    (item,) = manifests.of_kind(template(CHART, {}, tmp_path), "DaemonSet")
    spec = item["spec"]["template"]["spec"]
    (state,) = (volume for volume in spec["volumes"] if volume["name"] == "keepset-state")
    assert state["hostPath"]["path"] == "/var/lib/keepset/state"
    assert "/var/lib/keepset/state" in spec["initContainers"][0]["command"]


def test_lends_its_sidecar_to_another_chart(tmp_path: pathlib.Path) -> None:
    chart = tmp_path / "engine"
    shutil.copytree(ENGINE, chart)
    shutil.copytree(CHART, chart / "charts" / "keepset")
    objects = template(chart, {}, tmp_path)
    assert not manifests.of_kind(objects, "DaemonSet")
    manifests.check_all(objects, 0, tmp_path)
    (spec,) = (spec for _, spec in manifests.pods(objects))
    (sidecar,) = spec["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["resources"]["claims"] == spec["containers"][0]["resources"]["claims"]


@pytest.mark.parametrize("values", REFUSED.values(), ids=REFUSED.keys())
def test_schema_refuses(values: Object, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "values.json"
    path.write_text(json.dumps(values))
    command = [str(HELM), "template", "test", str(CHART), "--values", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "schema" in done.stderr
