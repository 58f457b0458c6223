"""Every overlay, rendered by kubectl's kustomize."""

from __future__ import annotations

import pathlib

import pytest
import yaml

import manifests
from manifests import Object

KUBERNETES = manifests.SOURCE / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())


def render(folder: pathlib.Path) -> list[Object]:
    return manifests.load(manifests.run(manifests.TOOLS / "kubectl", "kustomize", folder))


def render_overlay(name: str) -> list[Object]:
    return render(KUBERNETES / "overlays" / name)


def worker(objects: list[Object]) -> Object:
    return next(spec for _, spec in manifests.pods(objects))


def test_every_asked_for_form_is_there() -> None:
    assert OVERLAYS == ["cpu-only", "daemonset", "gpu-dra", "gpu-mps", "sidecar"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_holds_together(overlay: str, tmp_path: pathlib.Path) -> None:
    manifests.check_all(render_overlay(overlay), 1, tmp_path)


@pytest.mark.parametrize("overlay", sorted(set(OVERLAYS) - {"daemonset"}))
def test_sidecar_starts_first_and_stays(overlay: str) -> None:
    spec = worker(render_overlay(overlay))
    assert [container["name"] for container in spec["initContainers"]] == ["keepsetd"]
    assert spec["initContainers"][0]["restartPolicy"] == "Always"
    volumes = [{m["name"] for m in c["volumeMounts"]} for c in manifests.containers(spec)]
    assert "run" in volumes[0] & volumes[1]


def test_tables_keep_their_name_and_the_configuration_does_not() -> None:
    names = {item["metadata"]["name"] for item in manifests.of_kind(render_overlay("sidecar"), "ConfigMap")}
    assert "keepset-tables" in names
    assert any(name.startswith("keepset-config-") for name in names)


def test_cpu_only_is_guaranteed_whole_cores_and_as_many_threads() -> None:
    spec = worker(render_overlay("cpu-only"))
    for container in manifests.containers(spec):
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert resources["requests"]["cpu"].isdigit()
    sidecar = manifests.keepsetd(spec)
    assert f"--threads={sidecar['resources']['requests']['cpu']}" in sidecar["args"]


@pytest.mark.parametrize("overlay", ["gpu-dra", "gpu-mps"])
def test_both_containers_name_one_claim(overlay: str) -> None:
    spec = worker(render_overlay(overlay))
    claims = [container["resources"]["claims"] for container in manifests.containers(spec)]
    assert claims == [[{"name": "gpu"}], [{"name": "gpu"}]]
    assert [claim["name"] for claim in spec["resourceClaims"]] == ["gpu"]


def test_mps_serves_one_user() -> None:
    objects = render_overlay("gpu-mps")
    (template,) = manifests.of_kind(objects, "ResourceClaimTemplate")
    (config,) = template["spec"]["spec"]["devices"]["config"]
    assert config["opaque"]["parameters"]["sharing"] == {"strategy": "MPS"}
    requests = {request["name"] for request in template["spec"]["spec"]["devices"]["requests"]}
    assert set(config["requests"]) == requests
    spec = worker(objects)
    users = {c.get("securityContext", {}).get("runAsUser", spec["securityContext"]["runAsUser"])
             for c in manifests.containers(spec)}
    assert users == {65532}


@pytest.mark.parametrize("overlay", ["daemonset", "sidecar"])
def test_fleet_component_brings_etcd_and_its_secret(overlay: str, tmp_path: pathlib.Path) -> None:
    objects = render_with(overlay, "fleet", tmp_path)
    manifests.check_all(objects, 1, tmp_path)
    spec = worker(objects)
    assert "etcd {" in manifests.config_of(objects, spec)
    (secret,) = (volume["secret"] for volume in spec["volumes"] if "secret" in volume)
    assert secret["secretName"] == "keepset-etcd"
    (policy,) = manifests.of_kind(objects, "NetworkPolicy")
    if "Egress" in policy["spec"]["policyTypes"]:
        assert {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]} == {2379, 53}


def test_state_outlives_keepsetd() -> None:
    for overlay, kind in (("daemonset", "hostPath"), ("sidecar", "emptyDir")):
        spec = worker(render_overlay(overlay))
        (state,) = (volume for volume in spec["volumes"] if volume["name"] == "state")
        assert kind in state


def render_with(overlay: str, component: str, tmp_path: pathlib.Path) -> list[Object]:
    (tmp_path / "kubernetes").symlink_to(KUBERNETES)
    combined = {
        "resources": [f"kubernetes/overlays/{overlay}"],
        "components": [f"kubernetes/components/{component}"],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(combined))
    return render(tmp_path)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_monitoring_component_finds_the_pods(overlay: str, tmp_path: pathlib.Path) -> None:
    objects = render_with(overlay, "monitoring", tmp_path)
    assert len(manifests.of_kind(objects, "PodMonitor")) == 1
    manifests.check_network(objects, 1)
