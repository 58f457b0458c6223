"""The Python package's exporter of device memory against the driver of this machine: JSON lines on stdout.

Usage: exporter_check.py [PACKAGE_DIRECTORY]. PACKAGE_DIRECTORY holds `keepset`, else `python` beside this file.
Needs no gRPC and no numpy: of the package only what exports memory is loaded. KEEPSET_LIBCUDA: the driver's
library. Exit codes: 0 every check passed, 1 one failed, 3 no driver or no device (stderr says which).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable, Iterator

LIBRARY = os.environ.get("KEEPSET_LIBCUDA", "libcuda.so.1")
MIB = 1 << 20
CHUNK = 2 * MIB
NO_HANDLE, POSIX_FD = 0, 1
PINNED, ON_DEVICE, READ_WRITE = 1, 1, 3
LAZY_PEER_ACCESS = 1


class Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class AllocationProperties(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int), ("handle_types", ctypes.c_int), ("location", Location),
        ("windows_only", ctypes.c_void_p), ("flags", ctypes.c_ubyte * 8),
    ]  # fmt: skip


class Access(ctypes.Structure):
    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


class IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


class Driver:
    """The driver with device 0 current on this thread."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise SystemExit(no_device(error)) from error
        context, count = ctypes.c_void_p(), ctypes.c_int()
        if self.status("cuInit", 0) or self.status("cuDeviceGetCount", ctypes.byref(count)):
            raise SystemExit(no_device("the driver does not start"))
        if count.value < 1:
            raise SystemExit(no_device("the driver sees none"))
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxPushCurrent_v2", context)

    def has(self, name: str) -> bool:
        return hasattr(self._library, name)

    def status(self, name: str, *arguments: object) -> int:
        return getattr(self._library, name)(*arguments)

    def call(self, name: str, *arguments: object) -> None:
        if status := self.status(name, *arguments):
            raise RuntimeError(f"{name}: error {status}")

    def write(self, pointer: int, data: bytes) -> None:
        """Done when it returns; the copy alone, of pageable memory, is staged then."""
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(pointer), data, ctypes.c_size_t(len(data)))
        self.call("cuCtxSynchronize")

    def read(self, pointer: int, size: int) -> bytes:
        data = ctypes.create_string_buffer(size)
        self.call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(pointer), ctypes.c_size_t(size))
        return data.raw

    @contextlib.contextmanager
    def plain(self, size: int) -> Iterator[int]:
        """As cudaMalloc gives it."""
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        try:
            yield pointer.value
        finally:
            self.call("cuMemFree_v2", pointer)

    @contextlib.contextmanager
    def segments(self, count: int, handle_types: int) -> Iterator[int]:
        """Chunks of the virtual memory management API, one behind the other."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t(count * CHUNK)
        zero = ctypes.c_uint64(0)
        self.call("cuMemAddressReserve", ctypes.byref(base), size, ctypes.c_size_t(0), zero, zero)
        properties = AllocationProperties(PINNED, handle_types, Location(ON_DEVICE, 0))
        access, chunk = Access(Location(ON_DEVICE, 0), READ_WRITE), ctypes.c_size_t(CHUNK)
        addresses = [ctypes.c_uint64(base.value + i * CHUNK) for i in range(count)]
        for address in addresses:
            handle = ctypes.c_uint64()
            self.call("cuMemCreate", ctypes.byref(handle), chunk, ctypes.byref(properties), zero)
            self.call("cuMemMap", address, chunk, ctypes.c_size_t(0), handle, zero)
            self.call("cuMemSetAccess", address, chunk, ctypes.byref(access), ctypes.c_size_t(1))
            self.call("cuMemRelease", handle)
        try:
            yield base.value
        finally:
            for address in addresses:
                self.call("cuMemUnmap", address, chunk)
            self.call("cuMemAddressFree", base, size)

    def range_of(self, pointer: int) -> tuple[int, int]:
        """Base and size of the allocation."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self.call(
            "cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(pointer)
        )
        return base.value, size.value

    def uuid(self) -> str:
        raw = (ctypes.c_ubyte * 16)()
        self.call("cuDeviceGetUuid_v2", ctypes.byref(raw), 0)
        return bytes(raw).hex()


def no_device(reason: object) -> int:
    print(f"no device: {reason}", file=sys.stderr)
    return 3


def load_exporter(package: pathlib.Path) -> types.ModuleType:
    """`keepset.device_memory` without `keepset` itself, which wants all that a client needs."""
    if not (package / "keepset" / "device_memory.py").is_file():
        raise SystemExit(f"exporter_check: no keepset in {package}")
    keepset = types.ModuleType("keepset")
    keepset.__path__ = [str(package / "keepset")]
    sys.modules["keepset"] = keepset
    # Named when the modules load; no check here comes near them.
    absent = {
        "grpc": {"StatusCode": (), "RpcError": Exception},
        "numpy": {"float32": None, "float16": None, "uint16": None},
    }
    for name, members in absent.items():
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(members)
    return importlib.import_module("keepset.device_memory")


class NotHereError(Exception):
    """This driver has no such memory."""


class Checks:
    """Each method is one check; a docstring says of what."""

    def __init__(self, driver: Driver, exporter: types.ModuleType):
        self._driver, self._exporter = driver, exporter
        self._errors = importlib.import_module("keepset.errors")

    def _export(self, pointer: int, size: int):
        return self._exporter.DeviceRegion(pointer, size, LIBRARY)

    def _refusal(self, pointer: int, size: int, code: str, part: str) -> None:
        try:
            self._export(pointer, size).close()
        except self._errors.KeepsetError as error:
            if error.code != code or part not in error.message:
                raise AssertionError(f"want {code} with {part!r}, got {error}") from error
            return
        raise AssertionError(f"exported, want {code}")

    def _expect_place(self, region: object, pointer: int) -> None:
        base, size = self._driver.range_of(pointer)
        got = (region.offset, region.allocation_bytes, region.device_uuid.replace("-", ""))
        want = (pointer - base, size, "GPU" + self._driver.uuid())
        if got != want:
            raise AssertionError(f"offset, allocation and device {got}, want {want}")

    def plain_memory_is_shared_by_handle(self) -> None:
        """Base, size and device as the driver has them; another process reads what is there."""
        with self._driver.plain(4 * MIB) as base:
            pattern = os.urandom(64)
            self._driver.write(base + 4096, pattern)
            region = self._export(base + 4096, MIB)
            if region.kind != "cuda_ipc" or len(region.ipc_handle) != 64 or region.fd != -1:
                raise AssertionError(f"kind {region.kind}, {len(region.ipc_handle)} bytes of handle")
            self._expect_place(region, base + 4096)
            other = subprocess.run(
                [sys.executable, __file__, "--read", region.ipc_handle.hex(), str(region.offset)],
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            if other.stdout.strip() != pattern.hex():
                raise AssertionError(f"read elsewhere: {other.stdout}{other.stderr}")

    def exportable_segment_is_shared_by_descriptor(self) -> None:
        """The descriptor imports, and holds what is there."""
        driver = self._driver
        with driver.segments(1, POSIX_FD) as base:
            pattern = os.urandom(64)
            driver.write(base + 64, pattern)
            region = self._export(base + 64, MIB)
            if region.kind != "cuda_vmm" or region.fd < 0:
                raise AssertionError(f"kind {region.kind}, descriptor {region.fd}")
            self._expect_place(region, base + 64)
            handle, again = ctypes.c_uint64(), ctypes.c_uint64()
            size, zero = ctypes.c_size_t(CHUNK), ctypes.c_uint64(0)
            descriptor = ctypes.c_void_p(region.fd)
            driver.call("cuMemImportFromShareableHandle", ctypes.byref(handle), descriptor, POSIX_FD)
            driver.call(
                "cuMemAddressReserve", ctypes.byref(again), size, ctypes.c_size_t(0), zero, zero
            )
            driver.call("cuMemMap", again, size, ctypes.c_size_t(0), handle, zero)
            access = Access(Location(ON_DEVICE, 0), READ_WRITE)
            driver.call("cuMemSetAccess", again, size, ctypes.byref(access), ctypes.c_size_t(1))
            read = driver.read(again.value + region.offset, len(pattern))
            driver.call("cuMemUnmap", again, size)
            driver.call("cuMemAddressFree", again, size)
            driver.call("cuMemRelease", handle)
            region.close()
            if read != pattern:
                raise AssertionError("the descriptor is of other memory")

    def segment_without_a_handle_is_refused(self) -> None:
        """What PyTorch's expandable segments are unless they are told otherwise."""
        with self._driver.segments(1, NO_HANDLE) as base:
            self._refusal(base, MIB, "FAILED_PRECONDITION", "expandable_segments:False")

    def region_over_two_segments_is_refused(self) -> None:
        with self._driver.segments(2, POSIX_FD) as base:
            self._refusal(base, CHUNK + MIB, "INVALID_ARGUMENT", "expandable_segments:False")

    def memory_of_a_pool_is_refused(self) -> None:
        """Stream-ordered allocations."""
        if not self._driver.has("cuMemAllocAsync"):
            raise NotHereError("no cuMemAllocAsync")
        pointer, stream = ctypes.c_uint64(), ctypes.c_void_p(0)
        self._driver.call("cuMemAllocAsync", ctypes.byref(pointer), ctypes.c_size_t(CHUNK), stream)
        self._driver.call("cuCtxSynchronize")
        try:
            self._refusal(pointer.value, MIB, "FAILED_PRECONDITION", "cudaMallocAsync")
        finally:
            self._driver.call("cuMemFreeAsync", pointer, stream)

    def bytes_beyond_the_allocation_are_refused(self) -> None:
        with self._driver.plain(4 * MIB) as base:
            _, size = self._driver.range_of(base)
            self._refusal(base + 16, size, "INVALID_ARGUMENT", "beyond its allocation")

    def misaligned_pointer_is_refused(self) -> None:
        with self._driver.plain(4 * MIB) as base:
            self._refusal(base + 8, 64, "INVALID_ARGUMENT", "multiple of 16")

    def no_bytes_are_refused(self) -> None:
        with self._driver.plain(4 * MIB) as base:
            self._refusal(base, 0, "INVALID_ARGUMENT", "at least 1")

    def host_memory_is_refused(self) -> None:
        host = ctypes.create_string_buffer(4096)
        address = (ctypes.addressof(host) + 15) // 16 * 16
        self._refusal(address, 64, "INVALID_ARGUMENT", "SharedRegion")

    def freed_memory_is_refused(self) -> None:
        with self._driver.plain(4 * MIB) as base:
            pass
        self._refusal(base, 64, "INVALID_ARGUMENT", "SharedRegion")


def read_elsewhere(handle: str, offset: int) -> int:
    """What a process that imports the handle finds: 64 bytes, in hex."""
    driver, pointer = Driver(), ctypes.c_uint64()
    raw = IpcHandle.from_buffer_copy(bytes.fromhex(handle))
    driver.call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), raw, LAZY_PEER_ACCESS)
    print(driver.read(pointer.value + offset, 64).hex())
    driver.call("cuIpcCloseMemHandle", pointer)
    return 0


def main() -> int:
    if sys.argv[1:2] == ["--read"]:
        return read_elsewhere(sys.argv[2], int(sys.argv[3]))
    default = pathlib.Path(__file__).resolve().parent / "python"
    package = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default
    driver = Driver()
    checks = Checks(driver, load_exporter(package))
    all_passed = True
    names = [name for name in vars(Checks) if not name.startswith("_")]
    for name in names:
        check: Callable[[], None] = getattr(checks, name)
        line: dict[str, object] = {"check": name, "passed": True}
        try:
            check()
        except NotHereError as reason:
            line = {"check": name, "skipped": str(reason)}
        except Exception as error:  # noqa: BLE001 - each check is reported, whatever becomes of it
            line.update(passed=False, error=f"{type(error).__name__}: {error}")
            all_passed = False
        print(json.dumps(line), flush=True)
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
