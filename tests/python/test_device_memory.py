"""Exporting device memory, over a driver of host memory (tests/fakes/fake_libcuda.cc)."""

import ctypes
import os
import pathlib

import numpy as np
import pytest

import keepset

BYTES = 2 << 20


@pytest.fixture(scope="module")
def library() -> str:
    build = os.environ.get("KEEPSET_BUILD")
    if not build:
        pytest.skip("KEEPSET_BUILD is not set: run `make test`")
    return str(pathlib.Path(build) / "tests" / "service" / "memory" / "libfake_libcuda.so")


@pytest.fixture
def plain(library):
    """A device pointer of a plain allocation."""
    driver, pointer = ctypes.CDLL(library), ctypes.c_uint64()
    assert driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(BYTES)) == 0
    yield pointer.value
    driver.cuMemFree_v2(pointer)


@pytest.fixture
def vmm(library):
    driver = ctypes.CDLL(library)
    handle, pointer = ctypes.c_uint64(), ctypes.c_uint64()
    size, zero = ctypes.c_size_t(BYTES), ctypes.c_uint64(0)
    assert driver.cuMemCreate(ctypes.byref(handle), size, None, zero) == 0
    assert driver.cuMemAddressReserve(ctypes.byref(pointer), size, ctypes.c_size_t(0), zero, zero) == 0
    assert driver.cuMemMap(pointer, size, ctypes.c_size_t(0), handle, zero) == 0
    yield pointer.value
    driver.cuMemUnmap(pointer, size)
    driver.cuMemRelease(handle)


class Tensor:
    """What a torch tensor shows."""

    def __init__(self, pointer, shape, stride, dtype="torch.bfloat16", item=2):
        self.shape, self.dtype = shape, dtype
        self._pointer, self._stride, self._item = pointer, stride, item

    def data_ptr(self):
        return self._pointer

    def stride(self):
        return self._stride

    def element_size(self):
        return self._item


def test_plain_allocation_is_shared_by_ipc_with_its_offset(library, plain):
    region = keepset.DeviceRegion(plain + 4096, 1024, library)
    assert region.kind == "cuda_ipc"
    assert (region.offset, region.allocation_bytes) == (4096, BYTES)
    assert len(region.ipc_handle) == 64
    assert region.device_uuid == "GPU-00112233-4455-6677-8899-aabbccddeeff"


def test_two_allocations_have_two_generations(library, plain, vmm):
    first = keepset.DeviceRegion(plain, 16, library)
    second = keepset.DeviceRegion(vmm, 16, library)
    assert first.generation != second.generation
    second.close()


def test_vmm_memory_is_shared_by_descriptor(library, vmm):
    region = keepset.DeviceRegion(vmm, BYTES, library)
    assert region.kind == "cuda_vmm"
    assert os.fstat(region.fd).st_size == BYTES
    region.close()
    assert region.fd == -1


def test_bytes_beyond_the_allocation_name_the_fix(library, plain):
    with pytest.raises(keepset.InvalidInput, match="expandable_segments:False"):
        keepset.DeviceRegion(plain, BYTES + 1, library)


def test_small_allocation_is_refused_for_its_neighbours(library):
    driver, pointer = ctypes.CDLL(library), ctypes.c_uint64()
    assert driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(BYTES - 1)) == 0
    with pytest.raises(keepset.KeepsetError, match="neighbours.*at least 2097152 bytes") as refusal:
        keepset.DeviceRegion(pointer.value, 64, library)
    assert refusal.value.code == "FAILED_PRECONDITION"
    driver.cuMemFree_v2(pointer)


def test_host_memory_is_refused(library):
    array = np.zeros(64)
    pointer = array.ctypes.data // 16 * 16
    with pytest.raises(keepset.InvalidInput, match="SharedRegion"):
        keepset.DeviceRegion(pointer, 16, library)


def test_misaligned_pointer_is_refused(library, plain):
    with pytest.raises(keepset.InvalidInput, match="multiple of 16"):
        keepset.DeviceRegion(plain + 8, 16, library)


def test_host_without_a_driver_says_so():
    with pytest.raises(keepset.KeepsetError, match="no CUDA driver"):
        keepset.DeviceRegion(16, 16, "libcuda-that-is-not-there.so")


def test_tensor_becomes_addresses_with_its_strides(library, plain):
    tensor = Tensor(plain, (2, 8, 4), (64, 8, 1))
    region = keepset.DeviceRegion.of(tensor, library)
    assert region.size_bytes == (64 + 7 * 8 + 3 + 1) * 2
    array = region.array(tensor)
    assert array.dtype == np.uint16
    assert array.strides == (128, 16, 2)
    assert region.offset_of(array) == 0


def test_tensor_of_another_allocation_is_refused(library, plain):
    region = keepset.DeviceRegion(plain, 64, library)
    with pytest.raises(keepset.InvalidInput, match="does not lie in this region"):
        region.array(Tensor(plain + 64, (4,), (1,)))


def test_server_without_a_device_names_its_transports(server, library, plain):
    with keepset.Client.connect(server.address) as client:
        region = keepset.DeviceRegion(plain, 64, library)
        with pytest.raises(keepset.Refused, match="this server has no device.*memfd"):
            client.register(region)
