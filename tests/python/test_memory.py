"""SharedRegion: what the server relies on and what callers rely on."""

import fcntl
import os

import numpy as np
import pytest

from keepset import _codec
from keepset._request import raw_bytes
from keepset.memory import SharedRegion


def test_region_is_sealed_against_shrinking():
    region = SharedRegion(4096)
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, 0)
    region.close()


def test_region_rounds_up_to_pages_and_refuses_what_does_not_fit():
    region = SharedRegion(5000)
    assert region.size_bytes == 8192
    region.empty((1000,), np.float32)
    with pytest.raises(MemoryError, match="free"):
        region.empty((2000,), np.float32)
    region.close()


def test_offset_of_finds_slices_and_not_strangers():
    region = SharedRegion(4096)
    region.empty((3,), np.uint8)
    array = region.empty((4, 8), np.float32)
    assert region.offset_of(array) == 64
    assert region.offset_of(array[2]) == 64 + 2 * 32
    assert region.offset_of(np.zeros(4)) is None
    region.close()


def test_closing_twice_is_harmless_and_arrays_stay_readable():
    region = SharedRegion(4096)
    array = region.place(np.arange(5.0))
    region.close()
    region.close()
    assert array.sum() == 10.0


def test_raw_bytes_of_a_strided_view_cover_first_to_last_element():
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    view = base.transpose(1, 0, 2)[1:]
    raw = raw_bytes(view, _codec.span_bytes(view))
    assert np.array_equal(raw.view(np.float32), np.arange(4, 24, dtype=np.float32))


def test_new_region_descriptor_is_not_inherited():
    region = SharedRegion(4096)
    assert fcntl.fcntl(region.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    region.close()
