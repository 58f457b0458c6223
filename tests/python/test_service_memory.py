"""Memory of the server's own (`Client.allocate_region`)."""

import ctypes
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy as np
import pytest
from conftest import MODEL, binary, random_layers, spec

import keepset
from keepset.device_memory import ServiceDeviceRegion
from keepset.errors import KeepsetError
from keepset.server_process import ServerProcess

FAKE_DEVICE = "GPU-00112233-4455-6677-8899-aabbccddeeff"
MIB = 1 << 20


@pytest.fixture
def worker(server):
    with keepset.Client.connect(server.address, transport="memfd") as client:
        yield client


def await_metric(metrics_url: str, name: str, value: float, kind: str = "memfd") -> bool:
    """Whether the gauge comes to have this value."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        page = urllib.request.urlopen(metrics_url, timeout=10).read().decode()
        found = re.search(rf'^{name}{{kind="{kind}"}} (\S+)$', page, re.MULTILINE)
        if found and float(found.group(1)) == value:
            return True
        time.sleep(0.01)
    return False


def test_it_is_zero_and_whole_pages(worker):
    region = worker.allocate_region(5000)
    assert region.size_bytes == 8192
    assert not region.empty((8192,), np.uint8).any()


def test_a_worker_cannot_resize_it(worker):
    region = worker.allocate_region(4096)
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, 0)


def test_rows_gathered_into_it_are_the_rows_of_the_cache(worker):
    layers = random_layers()
    region = worker.allocate_region(MIB)
    placed = [keepset.Layer(layer.q_window, region.place(layer.k), region.place(layer.v))
              for layer in layers]
    result = worker.compress(layers=placed, gather="in_place", **spec(policy="snapkv"))
    assert result.outcome == "compressed"
    for layer, own, kept in zip(layers, placed, result.layers, strict=True):
        for head in range(MODEL.num_kv_heads):
            indices = kept.sets[head % len(kept.sets)].indices
            assert np.array_equal(own.k[head, : len(indices)], layer.k[head][indices])
            assert np.array_equal(own.v[head, : len(indices)], layer.v[head][indices])


def test_retire_gives_it_back(server, worker):
    region = worker.allocate_region(3 * MIB)
    assert await_metric(server.metrics_url, "keepset_owned_region_bytes", 3 * MIB)
    worker.retire(region)
    assert await_metric(server.metrics_url, "keepset_owned_region_bytes", 0)
    with pytest.raises(keepset.InvalidInput, match="not registered with this client"):
        worker.retire(region)


def test_closing_the_client_gives_it_back(server):
    with keepset.Client.connect(server.address, transport="memfd") as client:
        client.allocate_region(3 * MIB)
        assert await_metric(server.metrics_url, "keepset_owned_region_bytes", 3 * MIB)
    assert await_metric(server.metrics_url, "keepset_owned_region_bytes", 0)


def test_a_limit_is_named(worker):
    with pytest.raises(keepset.Overloaded, match="memory.max_owned_bytes_per_session is 268435456"):
        worker.allocate_region((256 << 20) + 1)


def test_a_server_without_a_device_says_so(worker):
    with pytest.raises(keepset.Refused, match="this server has no device"):
        worker.allocate_region(MIB, kind="cuda_ipc", device_uuid=FAKE_DEVICE)


def test_no_bytes_are_refused(worker):
    with pytest.raises(keepset.InvalidInput, match="num_bytes=0"):
        worker.allocate_region(0)


def test_an_inline_client_has_none(server):
    with keepset.Client.connect(server.address, transport="inline") as client:
        with pytest.raises(keepset.KeepsetError, match="needs transport 'memfd'"):
            client.allocate_region(MIB)


def test_memory_of_a_killed_server_is_lost_by_a_typed_error():
    with ServerProcess(binary()) as server:
        with keepset.Client.connect(server.address, transport="memfd") as client:
            region = client.allocate_region(MIB)
            placed = region.place(np.arange(4.0))
            server.kill()
            with pytest.raises(keepset.Unreachable):
                client.allocate_region(MIB)
            assert placed.sum() == 6.0


def test_a_worker_of_a_server_that_drains_is_told():
    with ServerProcess(binary()) as server:
        with keepset.Client.connect(server.address, transport="memfd") as client:
            assert not client.draining
            # An operation that has begun holds the drain up.
            operation = client.begin(**spec(policy="snapkv"))
            operation.observe(random_layers()[0])
            os.kill(server.pid, signal.SIGTERM)
            deadline = time.monotonic() + 20
            while not client.draining and time.monotonic() < deadline:
                time.sleep(0.01)
            assert client.draining


@pytest.fixture(scope="module")
def device_server():
    """keepsetd over a driver of host memory: its address, that driver's library, its metrics page."""
    program = binary().parent.parent / "tests" / "gpu" / "host_device_server"
    if not program.exists():
        pytest.skip("this build has no CUDA")
    library = program.parent / "fake_driver" / "libcuda.so.1"
    with tempfile.TemporaryDirectory(prefix="keepset-") as directory:
        address = f"unix:{pathlib.Path(directory) / 'k.sock'}"
        process = subprocess.Popen(
            [str(program), "--listen", address, "--metrics-listen", "127.0.0.1:0"],
            stderr=subprocess.PIPE, text=True,
            env={**os.environ, "LD_LIBRARY_PATH": str(library.parent)},
        )
        try:
            ready = next(line for line in process.stderr if re.search(r"\bready\b", line))
            metrics = re.search(r"\bmetrics=(\S+)", ready).group(1)
            yield address, str(library), f"http://{metrics}/metrics"
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)


@pytest.mark.parametrize("kind", ["cuda_ipc", "cuda_vmm"])
def test_device_memory_is_mapped_and_takes_rows(device_server, kind):
    address, library, _ = device_server
    layers = random_layers()
    with keepset.Client.connect(address, transport="memfd") as client:
        region = client.allocate_region(MIB, kind=kind, device_uuid=FAKE_DEVICE, library=library)
        assert not any(ctypes.string_at(region.pointer, MIB))

        def place(array: np.ndarray) -> np.ndarray:
            placed = region.empty(array.shape, array.dtype)
            address = placed.__array_interface__["data"][0]
            ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)
            return placed

        placed = [keepset.Layer(place(layer.q_window), place(layer.k), place(layer.v))
                  for layer in layers]
        result = client.compress(layers=placed, gather="in_place", **spec(policy="snapkv"))
        assert result.outcome == "compressed"
        head_bytes = layers[0].k[0].nbytes
        for layer, own, kept in zip(layers, placed, result.layers, strict=True):
            begin = own.k.__array_interface__["data"][0]
            for head in range(MODEL.num_kv_heads):
                rows = layer.k[head][kept.sets[head % len(kept.sets)].indices]
                assert ctypes.string_at(begin + head * head_bytes, rows.nbytes) == rows.tobytes()
        client.retire(region)
        assert region.pointer == 0


# Ends its session without a retire, and goes on with the memory mapped.
FORGETFUL_CLIENT = """
import signal, sys
import keepset
from keepset.device_memory import ServiceDeviceRegion
from keepset.errors import KeepsetError
from keepset.v1 import session_pb2
client = keepset.Client.connect(sys.argv[1], transport="memfd")
region = client.allocate_region(1 << 20, kind="cuda_ipc", device_uuid=sys.argv[2], library=sys.argv[3])
client._sessions.CloseSession(session_pb2.CloseSessionRequest(session_id=client.session_id))
print("closed", flush=True)
signal.pause()
"""


def test_memory_of_a_session_that_ended_is_quarantined_while_its_process_lives(device_server):
    address, library, metrics = device_server
    worker = subprocess.Popen(
        [sys.executable, "-c", FORGETFUL_CLIENT, address, FAKE_DEVICE, library],
        stdout=subprocess.PIPE, text=True,
    )
    try:
        assert worker.stdout.readline() == "closed\n"
        assert await_metric(metrics, "keepset_quarantined_bytes", 2 * MIB, "cuda_ipc")
        assert await_metric(metrics, "keepset_quarantined_regions", 1, "cuda_ipc")
        assert await_metric(metrics, "keepset_owned_region_bytes", 2 * MIB, "cuda_ipc")
    finally:
        worker.kill()
        worker.communicate(timeout=30)
    assert await_metric(metrics, "keepset_quarantined_bytes", 0, "cuda_ipc")
    assert await_metric(metrics, "keepset_quarantined_regions", 0, "cuda_ipc")
    assert await_metric(metrics, "keepset_owned_region_bytes", 0, "cuda_ipc")


def test_a_device_that_is_not_here_is_named(device_server):
    address, library, _ = device_server
    with keepset.Client.connect(address, transport="memfd") as client:
        with pytest.raises(keepset.Refused, match=FAKE_DEVICE):
            client.allocate_region(MIB, kind="cuda_ipc", device_uuid="GPU-0", library=library)


# Allocates device memory as another process, which lives until its input ends.
EXPORTER = """
import ctypes, sys
driver, pointer = ctypes.CDLL(sys.argv[1]), ctypes.c_uint64()
handle = (ctypes.c_ubyte * 64)()
assert driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(2 << 20)) == 0
assert driver.cuIpcGetMemHandle(handle, pointer) == 0
print(bytes(handle).hex(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def mapped():
    """A device region of another process, over a driver of host memory, and that driver."""
    library = binary().parent.parent / "tests" / "service" / "memory" / "libfake_libcuda.so"
    exporter = subprocess.Popen([sys.executable, "-c", EXPORTER, str(library)], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        handle = bytes.fromhex(exporter.stdout.readline())
        yield ServiceDeviceRegion(handle, MIB, FAKE_DEVICE, str(library)), ctypes.CDLL(str(library))
    finally:
        exporter.communicate(timeout=30)


def test_a_closed_device_region_has_no_room(mapped):
    region, _ = mapped
    assert region.empty((4,), np.float32).size == 4
    region.close()
    with pytest.raises(keepset.InvalidInput, match="closed"):
        region.empty((4,), np.float32)


@pytest.fixture
def by_descriptor():
    """A device region of this process, mapped by descriptor, and its driver of host memory."""
    library = binary().parent.parent / "tests" / "service" / "memory" / "libfake_libcuda.so"
    driver, handle, fd = ctypes.CDLL(str(library)), ctypes.c_uint64(), ctypes.c_int(-1)
    size, none = ctypes.c_size_t(2 * MIB), ctypes.c_uint64(0)
    assert driver.cuMemCreate(ctypes.byref(handle), size, None, none) == 0
    assert driver.cuMemExportToShareableHandle(ctypes.byref(fd), handle, 1, none) == 0
    driver.cuMemRelease(handle)
    region = ServiceDeviceRegion.of_descriptor(fd.value, 2 * MIB, MIB, FAKE_DEVICE, str(library))
    os.close(fd.value)
    return region, driver


def test_a_region_by_descriptor_is_mapped_until_it_is_closed(by_descriptor):
    region, driver = by_descriptor
    mapped = driver.fake_cuda_mappings()
    placed = region.empty((MIB,), np.uint8)
    ctypes.memset(placed.__array_interface__["data"][0], 7, MIB)
    region.close()
    assert driver.fake_cuda_mappings() == mapped - 1
    assert driver.fake_cuda_context_depth() == 0


def test_a_region_by_descriptor_that_cannot_be_unmapped_says_so(by_descriptor):
    region, driver = by_descriptor
    assert driver.cuMemUnmap(ctypes.c_uint64(region.pointer), ctypes.c_size_t(2 * MIB)) == 0
    with pytest.raises(keepset.KeepsetError, match="cuMemUnmap"):
        region.close()


def test_a_descriptor_of_something_else_is_refused_and_leaves_nothing(by_descriptor):
    region, driver = by_descriptor
    mapped, fd = driver.fake_cuda_mappings(), os.memfd_create("something else")
    library = driver._name
    with pytest.raises(keepset.KeepsetError, match="cuMemImportFromShareableHandle"):
        ServiceDeviceRegion.of_descriptor(fd, 2 * MIB, MIB, FAKE_DEVICE, library)
    os.close(fd)
    assert driver.fake_cuda_mappings() == mapped
    region.close()


def test_memory_that_cannot_be_unmapped_is_not_retired(worker, mapped, monkeypatch):
    region, driver = mapped
    assert driver.cuIpcCloseMemHandle(ctypes.c_uint64(region.pointer)) == 0
    told = []
    monkeypatch.setattr(worker, "_retire_id", told.append)
    worker._regions.append((region, "r"))
    with pytest.raises(keepset.KeepsetError, match="cuIpcCloseMemHandle"):
        worker.retire(region)
    assert told == []


def test_a_failed_mapping_is_the_error_also_when_its_retire_fails(server, worker, monkeypatch):
    def no_descriptor(fd_token):
        raise KeepsetError("INTERNAL", "no descriptor")

    def no_retire(region_id):
        raise KeepsetError("UNAVAILABLE", "no answer")

    monkeypatch.setattr(worker._side, "fetch_fd", no_descriptor)
    monkeypatch.setattr(worker, "_retire_id", no_retire)
    with pytest.raises(KeepsetError, match="no descriptor"):
        worker.allocate_region(MIB)
