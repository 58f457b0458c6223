"""What rendered manifests must keep to, whatever rendered them."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import yaml

SOURCE = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("KEEPSET_BUILD", SOURCE / "build" / "release"))
TOOLS = pathlib.Path(os.environ.get("KEEPSET_KUBE_TOOLS", SOURCE / ".venv-deploy" / "kube"))
KUBERNETES = "1.34"
# Kinds of the Prometheus operator: no schema of Kubernetes knows them.
FOREIGN = {"PodMonitor"}
POD_KINDS = {"Deployment", "DaemonSet"}
DRAIN_SECONDS = 10

Object = dict[str, Any]


def run(*command: str | pathlib.Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def load(text: str) -> list[Object]:
    return [document for document in yaml.safe_load_all(text) if document]


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [item for item in objects if item["kind"] in kinds]


def check_schema(objects: list[Object]) -> None:
    for item in objects:
        if item["kind"] not in FOREIGN:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)


def pods(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """(labels, spec) of every pod template."""
    for item in of_kind(objects, *POD_KINDS):
        template = item["spec"]["template"]
        labels = template["metadata"]["labels"]
        assert item["spec"]["selector"]["matchLabels"].items() <= labels.items()
        yield labels, template["spec"]


def containers(spec: Object) -> list[Object]:
    return spec.get("initContainers", []) + spec["containers"]


def keepsetd(spec: Object) -> Object:
    found = [container for container in containers(spec) if container["name"] == "keepsetd"]
    assert len(found) == 1
    return found[0]


def port_of(container: Object, name: str) -> int:
    return next(port["containerPort"] for port in container["ports"] if port["name"] == name)


def check_references(objects: list[Object], outside: frozenset[str] = frozenset()) -> None:
    """Everything a pod names exists: volumes, ConfigMaps, accounts, claims. `outside`: names made elsewhere."""
    names = {(item["kind"], item["metadata"]["name"]) for item in objects}
    for _, spec in pods(objects):
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for volume in volumes.values():
            if "configMap" in volume and volume["configMap"]["name"] not in outside:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
        account = spec.get("serviceAccountName")
        assert account is None or ("ServiceAccount", account) in names
        claims = {claim["name"]: claim for claim in spec.get("resourceClaims", [])}
        for claim in claims.values():
            template = claim.get("resourceClaimTemplateName")
            assert template is None or ("ResourceClaimTemplate", template) in names
        used: set[str] = set()
        for container in containers(spec):
            mounts = container.get("volumeMounts", [])
            assert {mount["name"] for mount in mounts} <= volumes.keys()
            # A subPath mount never sees a ConfigMap's update.
            assert not any("subPath" in mount for mount in mounts)
            used |= {mount["name"] for mount in mounts}
            assert {claim["name"] for claim in container.get("resources", {}).get("claims", [])} <= claims.keys()
        assert used == volumes.keys()


def check_confinement(objects: list[Object]) -> None:
    """keepsetd runs without root, privilege, capability or a writable root; nothing shares the host's namespaces."""
    for _, spec in pods(objects):
        assert not {"hostPID", "hostIPC", "hostNetwork"} & spec.keys()
        assert spec["automountServiceAccountToken"] is False
        assert spec["terminationGracePeriodSeconds"] > DRAIN_SECONDS
        for container in containers(spec):
            assert "privileged" not in container.get("securityContext", {})
        for container in containers(spec):
            if container["image"].split(":")[0] != "keepset":
                continue
            assert re.fullmatch(r"keepset:\d+\.\d+\.\d+", container["image"])
            context = {**spec.get("securityContext", {}), **container["securityContext"]}
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"]["drop"] == ["ALL"]
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert "memory" in container["resources"]["limits"]
            if container["name"] == "keepsetd":
                assert context["runAsNonRoot"] is True and context["runAsUser"] == 65532
                assert "add" not in context["capabilities"]
            else:
                # Hands the node's folders to keepsetd's user, once.
                assert container["command"][0] == "chown"
                assert context["capabilities"]["add"] == ["CHOWN"]


def check_probes(objects: list[Object]) -> None:
    """Live by "", started and ready by the compression service, on the port the configuration opens for it."""
    for _, spec in pods(objects):
        container = keepsetd(spec)
        config = config_of(objects, spec)
        health = port_of(container, "health")
        assert f'health_listen: "0.0.0.0:{health}"' in config
        assert f'metrics_listen: "0.0.0.0:{port_of(container, "metrics")}"' in config
        assert container["livenessProbe"]["grpc"] == {"port": health}
        for probe in ("startupProbe", "readinessProbe"):
            assert container[probe]["grpc"] == {"port": health, "service": "keepset.v1.CompressionService"}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert "/run/keepset" in mounts and "readOnly" not in mounts["/run/keepset"]
        assert 'listen: "unix:/run/keepset/keepset.sock"' in config
        assert ("/var/lib/keepset/tables" in mounts) == ("tables_directory:" in config)
        assert ("/var/lib/keepset/state" in mounts) == ("state_directory:" in config)
        assert "readOnly" not in mounts.get("/var/lib/keepset/state", {})
        # Writes and a fleet's decisions are worth keeping.
        assert "state_directory:" in config or "table_writes: true" not in config
        assert ("/etc/keepset-etcd" in mounts) == ("/etc/keepset-etcd/" in config)


def config_of(objects: list[Object], spec: Object) -> str:
    """The keepsetd.conf that the pod mounts at /etc/keepset."""
    volume = next(m["name"] for m in keepsetd(spec)["volumeMounts"] if m["mountPath"] == "/etc/keepset")
    name = next(v["configMap"]["name"] for v in spec["volumes"] if v["name"] == volume)
    config = next(c for c in of_kind(objects, "ConfigMap") if c["metadata"]["name"] == name)
    return str(config["data"]["keepsetd.conf"])


def check_network(objects: list[Object], policies: int) -> None:
    """Policies and monitors select our pods and name ports these have."""
    templates = list(pods(objects))
    assert len(of_kind(objects, "NetworkPolicy")) == policies
    for item in of_kind(objects, "NetworkPolicy", "PodMonitor"):
        key = "podSelector" if item["kind"] == "NetworkPolicy" else "selector"
        wanted = item["spec"][key]["matchLabels"]
        chosen = [spec for labels, spec in templates if wanted.items() <= labels.items()]
        assert chosen, item["metadata"]["name"]
        rules = item["spec"].get("ingress", [])
        named = [port["port"] for rule in rules for port in rule["ports"]]
        named += [endpoint["port"] for endpoint in item["spec"].get("podMetricsEndpoints", [])]
        for spec in chosen:
            ports = {port["name"] for container in containers(spec) for port in container.get("ports", [])}
            assert set(named) <= ports


def check_configuration(config: str, arguments: list[str], folder: pathlib.Path) -> None:
    """keepsetd serves with this configuration; only its places are the test's."""
    path = folder / "keepsetd.conf"
    path.write_text(config)
    (folder / "tables").mkdir(exist_ok=True)
    assert arguments[:2] == ["--config", "/etc/keepset/keepsetd.conf"]
    command = [str(BUILD / "service" / "keepsetd"), "--config", str(path), *arguments[2:]]
    command += [f"--listen=unix:{folder}/k.sock", "--metrics-listen=127.0.0.1:0", "--health-listen=127.0.0.1:0"]
    command += [f"--tables={folder}/tables"]
    if "state_directory:" in config:
        command += [f"--state={folder}/state"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next((line for line in process.stderr if "ready" in line), "never ready")
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert "ready" in line, line
        assert process.wait(30) == 0


def check_all(objects: list[Object], policies: int, folder: pathlib.Path, outside: frozenset[str] = frozenset()) -> None:
    check_schema(objects)
    check_references(objects, outside)
    check_confinement(objects)
    check_probes(objects)
    check_network(objects, policies)
    for _, spec in pods(objects):
        check_configuration(config_of(objects, spec), keepsetd(spec)["args"], folder)
