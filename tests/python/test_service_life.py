"""Clients of a keepsetd that starts, reloads, restarts or ends, and clients that die."""

import os
import pathlib
import signal
import subprocess
import sys

import grpc
import numpy as np
import pytest
from conftest import binary, poll, publish, random_layers, spec

import keepset
from keepset.server_process import ServerProcess


def reflected_services(address: str) -> bytes:
    """The raw answer of server reflection to list_services (field 7) "*"."""
    with grpc.insecure_channel(address) as channel:
        ask = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        return next(ask(iter([b"\x3a\x01*"]), timeout=30))


def test_reflection_lists_the_services(server):
    services = reflected_services(server.address)
    for name in ("CompressionService", "SessionService", "ServerService", "TableService"):
        assert f"keepset.v1.{name}".encode() in services
    assert b"grpc.health.v1.Health" in services


def test_reflection_can_be_switched_off():
    with ServerProcess(binary(), arguments=["--disable-reflection"]) as server:
        with pytest.raises(grpc.RpcError) as refused:
            reflected_services(server.address)
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_nobody_listening_is_unreachable(tmp_path):
    with pytest.raises(keepset.Unreachable):
        keepset.Client.connect(f"unix:{tmp_path}/none.sock", timeout_seconds=5)


def test_server_restart_is_survived_by_connecting_again(tmp_path):
    with ServerProcess(binary()) as server:
        client = keepset.Client.connect(server.address)
        server.kill()
        with pytest.raises(keepset.Unreachable):
            client.compress(layers=random_layers(), **spec())
        client.close()
    with ServerProcess(binary()) as server, keepset.Client.connect(server.address) as client:
        assert client.compress(layers=random_layers(), **spec()).outcome == "compressed"


def test_reload_under_load_never_fails_or_mixes(tmp_path):
    """Each version has its own tau; a mixed operation would show two of them."""
    with ServerProcess(binary(), tables=tmp_path) as server:
        publish(server, "0")
        with keepset.Client.connect(server.address) as client:
            poll(lambda: client.server_info().tables)
            layers = random_layers()
            seen = set()

            def one_operation() -> str:
                result = client.compress(layers=layers, **spec(policy="compilerkv"))
                tau = np.float32(0.8 + 0.005 * int(result.table.version))
                assert [layer.tau for layer in result.layers] == pytest.approx([tau] * 3)
                seen.add(result.table.version)
                return result.table.version

            # Before the first reload, which may be quicker than an operation.
            one_operation()
            for version in range(1, 20):
                publish(server, str(version), gate=0.8 + 0.005 * version)
                poll(lambda want=str(version): one_operation() == want)
            assert len(seen) == 20


CRASHING_CLIENT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from conftest import random_layers, spec
import keepset
phase = {phase!r}
client = keepset.Client.connect({address!r}, transport="memfd")
region = client.shared_region(8 << 20, writable_by_server=True)
if phase == "registered":
    os.kill(os.getpid(), signal.SIGKILL)
operation = client.begin(**spec(gather=True))
layers = random_layers()
operation.observe(layers[0])
if phase == "midway":
    os.kill(os.getpid(), signal.SIGKILL)
for layer in layers[1:]:
    operation.observe(layer)
if phase == "before_result":
    operation._send(end=__import__("keepset.v1.compression_pb2", fromlist=["x"]).OperationEnd())
    os.kill(os.getpid(), signal.SIGKILL)
operation.finish()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("phase", ["registered", "midway", "before_result", "holding_result"])
def test_killed_client_leaves_nothing_behind(server, phase):
    script = CRASHING_CLIENT.format(
        tests=str(pathlib.Path(__file__).parent), phase=phase, address=server.address
    )
    died = subprocess.run([sys.executable, "-c", script], env=os.environ, timeout=60)
    assert died.returncode == -signal.SIGKILL
    maps = pathlib.Path(f"/proc/{server.pid}/maps")
    poll(lambda: "memfd:keepset" not in maps.read_text())
    with keepset.Client.connect(server.address) as client:
        assert client.compress(layers=random_layers(), **spec()).outcome == "compressed"


def test_sigterm_drains_and_exits_zero():
    server = ServerProcess(binary())
    with keepset.Client.connect(server.address) as client:
        client.compress(layers=random_layers(), **spec())
    assert server.stop() == 0
