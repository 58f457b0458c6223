"""Sharing device memory with a server, over ctypes: of this process by CUDA IPC or by VMM descriptor, of the
server's own by either.

The driver library is loaded when first needed; torch is never imported, a tensor is read through `data_ptr`,
`shape`, `stride` and `dtype`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from keepset.errors import InvalidInput, KeepsetError

LIBCUDA = "libcuda.so.1"

_ALIGNMENT = 16
_DEVICE_MEMORY = 2
_POSIX_FD = 1
_LAZY_PEER_ACCESS = 1
_LOCATION_DEVICE, _READ_WRITE = 1, 3
# The driver's blocks: smaller plain allocations share one (CUDA C++ Programming Guide, "Interprocess Communication").
_BLOCK_BYTES = 2 << 20
# CUpointer_attribute of NVIDIA's driver API reference.
_MEMORY_TYPE, _BUFFER_ID, _DEVICE_ORDINAL = 2, 7, 9
_IS_LEGACY_IPC_CAPABLE, _ALLOWED_HANDLE_TYPES = 10, 14
# numpy has no bfloat16: its bits travel as uint16, Layer.dtype says what they are.
_NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


class _AccessDescriptor(ctypes.Structure):
    _fields_ = [("location_type", ctypes.c_int), ("location_id", ctypes.c_int), ("flags", ctypes.c_int)]


@functools.cache
def _driver(library: str) -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL(library)
    except OSError as error:
        raise KeepsetError("NOT_FOUND", f"no CUDA driver: {error}") from error
    if driver.cuInit(0) != 0:
        raise KeepsetError("FAILED_PRECONDITION", "the CUDA driver does not start: no device")
    return driver


def _check(status: int, call: str) -> None:
    if status != 0:
        raise KeepsetError("INTERNAL", f"{call}: error {status}")


@contextlib.contextmanager
def _current_device(driver: ctypes.CDLL, ordinal: int) -> Iterator[ctypes.c_int]:
    """The device, its primary context current on this thread, which may have had none."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(driver.cuDeviceGet(ctypes.byref(device), ordinal), "cuDeviceGet")
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    try:
        _check(driver.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent")
        try:
            yield device
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(context))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


def _uuid_of(driver: ctypes.CDLL, device: ctypes.c_int) -> str:
    uuid = (ctypes.c_ubyte * 16)()
    _check(driver.cuDeviceGetUuid_v2(ctypes.byref(uuid), device), "cuDeviceGetUuid")
    digits = bytes(uuid).hex()
    return "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _digits_of(uuid: str) -> str:
    """Without what tools print before them: "GPU-" of a device, "MIG-" of an instance."""
    return uuid.removeprefix("GPU-").removeprefix("MIG-").lower()


def _ordinal_of(driver: ctypes.CDLL, uuid: str) -> int:
    count, device = ctypes.c_int(), ctypes.c_int()
    _check(driver.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    for ordinal in range(count.value):
        _check(driver.cuDeviceGet(ctypes.byref(device), ordinal), "cuDeviceGet")
        if _digits_of(_uuid_of(driver, device)) == _digits_of(uuid):
            return ordinal
    raise KeepsetError(
        "FAILED_PRECONDITION",
        f"device {uuid!r} is none of the {count.value} devices of this process: let its "
        "CUDA_VISIBLE_DEVICES list it",
    )


class DeviceRegion:
    """`num_bytes` of device memory from `pointer` on, to be registered with `Client.register`.

    `pointer` may lie anywhere inside an allocation, aligned to 16 bytes; the memory stays the caller's, must
    outlive the registration, and the stream that wrote it must have been synchronised before a call names it:
    a cudaMemcpy from pageable memory alone makes nothing ready, it returns when the bytes are staged
    (`torch.cuda.synchronize()` covers both).
    Raises KeepsetError: NOT_FOUND no driver; INVALID_ARGUMENT no device memory, or bytes beyond the allocation;
    FAILED_PRECONDITION memory its allocator made impossible to share, or a plain allocation of less than 2 MiB, whose
    neighbours CUDA IPC would expose; with what to change.
    """

    owned_by_server = False

    def __init__(self, pointer: int, num_bytes: int, library: str = LIBCUDA):
        self.pointer, self.size_bytes = pointer, num_bytes
        self.kind, self.ipc_handle, self.fd = "", b"", -1
        if num_bytes < 1:
            raise InvalidInput("INVALID_ARGUMENT", f"num_bytes={num_bytes}, want at least 1")
        if pointer % _ALIGNMENT:
            raise InvalidInput(
                "INVALID_ARGUMENT", f"device pointer is not a multiple of {_ALIGNMENT}"
            )
        driver = _driver(library)
        if self._attribute(driver, _MEMORY_TYPE, ctypes.c_uint) != _DEVICE_MEMORY:
            raise InvalidInput(
                "INVALID_ARGUMENT",
                "the pointer is not of device memory; host memory goes through SharedRegion",
            )
        ordinal = self._attribute(driver, _DEVICE_ORDINAL, ctypes.c_int) or 0
        with _current_device(driver, ordinal) as device:
            self.device_uuid = _uuid_of(driver, device)
            # The driver's number of the allocation: unique while this process lives.
            self.generation = self._attribute(driver, _BUFFER_ID, ctypes.c_uint64) or 0
            self._export(driver, self._locate(driver))

    def _attribute(self, driver: ctypes.CDLL, which: int, kind: type) -> int | None:
        value = kind()
        address = ctypes.c_uint64(self.pointer)
        status = driver.cuPointerGetAttribute(ctypes.byref(value), which, address)
        return value.value if status == 0 else None

    def _locate(self, driver: ctypes.CDLL) -> int:
        """Sets offset and allocation_bytes; the base of the allocation."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        _check(
            driver.cuMemGetAddressRange_v2(
                ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(self.pointer)
            ),
            "cuMemGetAddressRange",
        )
        self.offset, self.allocation_bytes = self.pointer - base.value, size.value
        left = size.value - self.offset
        if self.size_bytes > left:
            raise InvalidInput(
                "INVALID_ARGUMENT",
                f"num_bytes={self.size_bytes} reaches beyond its allocation, which has {left} bytes left: "
                "memory that grows in segments (PyTorch's expandable_segments:True) cannot be shared "
                "as one region; start the engine with expandable_segments:False",
            )
        return base.value

    def _export(self, driver: ctypes.CDLL, base: int) -> None:
        """Sets kind and ipc_handle or fd."""
        if self._attribute(driver, _IS_LEGACY_IPC_CAPABLE, ctypes.c_uint):
            if self.allocation_bytes < _BLOCK_BYTES:
                raise KeepsetError(
                    "FAILED_PRECONDITION",
                    f"an allocation of {self.allocation_bytes} bytes: the driver packs small ones in one "
                    "block, and CUDA IPC would expose the neighbours; make it part of an allocation of "
                    f"at least {_BLOCK_BYTES} bytes",
                )
            handle = _IpcHandle()
            status = driver.cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(base))
            _check(status, "cuIpcGetMemHandle")
            self.kind, self.ipc_handle = "cuda_ipc", bytes(handle.reserved)
            return
        if not (self._attribute(driver, _ALLOWED_HANDLE_TYPES, ctypes.c_uint64) or 0) & _POSIX_FD:
            raise KeepsetError(
                "FAILED_PRECONDITION",
                "this memory can be shared neither by CUDA IPC nor by descriptor: it comes from a "
                "stream-ordered pool (cudaMallocAsync) or from segments made without an exportable "
                "handle; start the engine with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False and "
                "the native allocator, or allocate the KV pool with cudaMalloc",
            )
        retained, fd = ctypes.c_uint64(), ctypes.c_int(-1)
        status = driver.cuMemRetainAllocationHandle(ctypes.byref(retained), ctypes.c_void_p(base))
        _check(status, "cuMemRetainAllocationHandle")
        try:
            status = driver.cuMemExportToShareableHandle(
                ctypes.byref(fd), retained, _POSIX_FD, ctypes.c_uint64(0)
            )
            _check(status, "cuMemExportToShareableHandle")
        finally:
            driver.cuMemRelease(retained)
        self.kind, self.fd = "cuda_vmm", fd.value

    @staticmethod
    def of(tensor, library: str = LIBCUDA) -> DeviceRegion:
        """The memory of a torch tensor (or anything with data_ptr, shape, stride and element_size)."""
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        return DeviceRegion(
            tensor.data_ptr(), (last + 1) * tensor.element_size(), library
        )

    def array(self, tensor) -> np.ndarray:
        """The tensor as an array of device addresses: for Layer's fields, never to be read here.

        bfloat16 comes as uint16; name it in Layer.dtype.
        """
        name = str(tensor.dtype).rsplit(".", maxsplit=1)[-1]
        if name not in _NUMPY_TYPES:
            raise InvalidInput(
                "INVALID_ARGUMENT", f"dtype {name}, want one of: {', '.join(_NUMPY_TYPES)}"
            )
        dtype = np.dtype(_NUMPY_TYPES[name])
        strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
        array = np.asarray(_Addresses(tensor.data_ptr(), tuple(tensor.shape), strides, dtype))
        if self.offset_of(array) is None:
            raise InvalidInput("INVALID_ARGUMENT", "the tensor does not lie in this region")
        return array

    def offset_of(self, array: np.ndarray) -> int | None:
        """Where in the region `array` begins; None when it does not lie inside."""
        begin = array.__array_interface__["data"][0] - self.pointer
        extent = sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True))
        inside = 0 <= begin and begin + extent + array.itemsize <= self.size_bytes
        return begin if inside else None

    def close(self) -> None:
        """Gives the descriptor back; the memory is not touched."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class ServiceDeviceRegion:
    """Device memory that a server made for this client, mapped here by CUDA IPC or by descriptor
    (`Client.allocate_region`).

    `pointer` is its address here. Work on the device that uses it must have ended before `Client.retire` or
    `Client.close`, which unmap it. Not thread-safe.
    Raises KeepsetError: NOT_FOUND no driver; FAILED_PRECONDITION this process does not see the device.
    """

    owned_by_server = True

    def __init__(self, ipc_handle: bytes, num_bytes: int, device_uuid: str, library: str = LIBCUDA):
        self.kind = "cuda_ipc"
        self._mapped_bytes = 0  # by descriptor
        self._open(num_bytes, device_uuid, library, lambda: self._map_ipc(ipc_handle))

    @classmethod
    def of_descriptor(cls, fd: int, allocation_bytes: int, num_bytes: int, device_uuid: str,
                      library: str = LIBCUDA) -> ServiceDeviceRegion:
        """Of kind "cuda_vmm": `num_bytes` at the beginning of an allocation; `fd` stays the caller's."""
        region = cls.__new__(cls)
        region.kind = "cuda_vmm"
        region._mapped_bytes = allocation_bytes
        region._open(num_bytes, device_uuid, library, lambda: region._map_vmm(fd))
        return region

    def _open(self, num_bytes: int, device_uuid: str, library: str,
              map_memory: Callable[[], int]) -> None:
        self.size_bytes, self.device_uuid, self.pointer = num_bytes, device_uuid, 0
        self._used = 0
        self._driver = _driver(library)
        self._ordinal = _ordinal_of(self._driver, device_uuid)
        # Mapped for as long as its context lives, which this retain sees to.
        self._device, context = ctypes.c_int(), ctypes.c_void_p()
        _check(self._driver.cuDeviceGet(ctypes.byref(self._device), self._ordinal), "cuDeviceGet")
        status = self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._device)
        _check(status, "cuDevicePrimaryCtxRetain")
        try:
            with _current_device(self._driver, self._ordinal):
                self.pointer = map_memory()
        except BaseException:
            self._driver.cuDevicePrimaryCtxRelease_v2(self._device)
            raise

    def _map_ipc(self, ipc_handle: bytes) -> int:
        pointer = ctypes.c_uint64()
        status = self._driver.cuIpcOpenMemHandle_v2(
            ctypes.byref(pointer), _IpcHandle.from_buffer_copy(ipc_handle), _LAZY_PEER_ACCESS
        )
        _check(status, "cuIpcOpenMemHandle")
        return pointer.value

    def _map_vmm(self, fd: int) -> int:
        handle, pointer = ctypes.c_uint64(), ctypes.c_uint64()
        size, none = ctypes.c_size_t(self._mapped_bytes), ctypes.c_uint64(0)
        with contextlib.ExitStack() as undo:
            # The descriptor travels in the pointer argument.
            status = self._driver.cuMemImportFromShareableHandle(
                ctypes.byref(handle), ctypes.c_void_p(fd), _POSIX_FD
            )
            _check(status, "cuMemImportFromShareableHandle")
            try:
                status = self._driver.cuMemAddressReserve(
                    ctypes.byref(pointer), size, ctypes.c_size_t(0), none, none
                )
                _check(status, "cuMemAddressReserve")
                undo.callback(self._driver.cuMemAddressFree, pointer, size)
                status = self._driver.cuMemMap(pointer, size, ctypes.c_size_t(0), handle, none)
                _check(status, "cuMemMap")
                undo.callback(self._driver.cuMemUnmap, pointer, size)
                access = _AccessDescriptor(_LOCATION_DEVICE, self._device.value, _READ_WRITE)
                status = self._driver.cuMemSetAccess(
                    pointer, size, ctypes.byref(access), ctypes.c_size_t(1)
                )
                _check(status, "cuMemSetAccess")
            finally:
                # The mapping keeps the memory.
                self._driver.cuMemRelease(handle)
            undo.pop_all()
        return pointer.value

    def empty(self, shape: Sequence[int], dtype: str | np.dtype | type) -> np.ndarray:
        """Room inside the region as an array of device addresses: for Layer's fields, never to be read here.

        MemoryError when it does not fit, InvalidInput once the region is closed.
        """
        if not self.pointer:
            raise InvalidInput("INVALID_ARGUMENT", "this region is closed, allocate another")
        dtype = np.dtype(dtype)
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        begin = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if begin + num_bytes > self.size_bytes:
            raise MemoryError(
                f"region of {self.size_bytes} bytes: {num_bytes} asked at offset {begin}, "
                f"{max(0, self.size_bytes - begin)} free"
            )
        self._used = begin + num_bytes
        strides = tuple(
            int(np.prod(shape[axis + 1 :], dtype=np.int64)) * dtype.itemsize
            for axis in range(len(shape))
        )
        return np.asarray(_Addresses(self.pointer + begin, tuple(shape), strides, dtype))

    def offset_of(self, array: np.ndarray) -> int | None:
        """Where in the region `array` begins; None when it does not lie inside."""
        begin = array.__array_interface__["data"][0] - self.pointer
        extent = sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True))
        inside = 0 <= begin and begin + extent + array.itemsize <= self.size_bytes
        return begin if inside and self.pointer else None

    def close(self) -> None:
        """Unmaps the memory. The server frees it upon the retire that comes after.

        KeepsetError INTERNAL: the driver refused, the memory may still be mapped and must not be retired.
        """
        if not self.pointer:
            return
        pointer, self.pointer = self.pointer, 0
        try:
            with _current_device(self._driver, self._ordinal):
                if self.kind == "cuda_ipc":
                    status = self._driver.cuIpcCloseMemHandle(ctypes.c_uint64(pointer))
                    _check(status, "cuIpcCloseMemHandle")
                    return
                size = ctypes.c_size_t(self._mapped_bytes)
                _check(self._driver.cuMemUnmap(ctypes.c_uint64(pointer), size), "cuMemUnmap")
                # Addresses alone: the memory is not mapped any more.
                self._driver.cuMemAddressFree(ctypes.c_uint64(pointer), size)
        finally:
            self._driver.cuDevicePrimaryCtxRelease_v2(self._device)


class _Addresses:
    """numpy's array interface over memory that this process cannot read."""

    def __init__(self, pointer: int, shape: tuple[int, ...], strides: tuple[int, ...],
                 dtype: np.dtype):
        self.__array_interface__ = {
            "version": 3, "shape": shape, "typestr": dtype.str, "data": (pointer, True),
            "strides": strides,
        }
