"""Shared memory for K, V and observations: a sealed memfd with a bump allocator of numpy arrays."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Sequence

import numpy as np

_ALIGN = 64
_F_ADD_SEALS = getattr(fcntl, "F_ADD_SEALS", 1033)
_F_SEAL_SHRINK = getattr(fcntl, "F_SEAL_SHRINK", 0x2)
_F_SEAL_GROW = getattr(fcntl, "F_SEAL_GROW", 0x4)


class SharedRegion:
    """A memfd mapped here, sealed against resizing so that the server may map it safely.

    Arrays made by `empty` or `place` lie inside; the client finds them by address and passes a reference
    instead of their bytes. Not thread-safe. Close it only after the client that registered it retired it
    (`Client.close` does).
    """

    owned_by_server = False

    def __init__(self, num_bytes: int, name: str = "keepset"):
        if num_bytes < 1:
            raise ValueError(f"num_bytes={num_bytes}, want at least 1")
        size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
        except BaseException:
            os.close(fd)
            raise
        self._take(fd, size)

    @classmethod
    def of_server(cls, fd: int, num_bytes: int) -> SharedRegion:
        """Memory that a server made (`Client.allocate_region`); takes the descriptor over."""
        region = cls.__new__(cls)
        region._take(fd, num_bytes)
        region.owned_by_server = True
        return region

    def _take(self, fd: int, size: int) -> None:
        try:
            self._map = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd
        self.size_bytes = size
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._base = self._bytes.__array_interface__["data"][0]
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: str | np.dtype | type) -> np.ndarray:
        """An uninitialised array inside the region. MemoryError when it does not fit."""
        dtype = np.dtype(dtype)
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        begin = -(-self._used // _ALIGN) * _ALIGN
        if begin + num_bytes > self.size_bytes:
            raise MemoryError(
                f"region of {self.size_bytes} bytes: {num_bytes} asked at offset {begin}, "
                f"{max(0, self.size_bytes - begin)} free"
            )
        self._used = begin + num_bytes
        return self._bytes[begin : begin + num_bytes].view(dtype).reshape(shape)

    def place(self, array: np.ndarray) -> np.ndarray:
        """A copy of `array` inside the region."""
        out = self.empty(array.shape, array.dtype)
        out[...] = array
        return out

    def reset(self) -> None:
        """Forgets all allocations; earlier arrays may be overwritten by the next ones."""
        self._used = 0

    def offset_of(self, array: np.ndarray) -> int | None:
        """Byte offset of the array's first element when it lies inside, else None."""
        begin = array.__array_interface__["data"][0]
        if self._base <= begin < self._base + self.size_bytes:
            return begin - self._base
        return None

    def close(self) -> None:
        """Closes the descriptor; the mapping goes when the last array of it goes."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
