"""The C library in kernels: positioned I/O, errors as negated errno, block memory operations."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

from alloc import libc
from alloc.jit import probe


@probe
def copy_and_compare(mem, other):
    libc.memcpy(other, 10, mem, 20, 30)
    same = libc.memcmp(other, 10, mem, 20, 30)
    other[15] += np.uint8(1)
    libc.memset(mem, 0, 0xAB, 4)
    return same, libc.memcmp(other, 10, mem, 20, 30)


def test_write_and_read_at_an_offset(tmp_path: Path) -> None:
    mem = np.arange(256, dtype=np.uint8)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert libc.write_at(fd, mem, 16, 64, 1000) == 64
        assert libc.read_at(fd, mem, 128, 100, 1000) == 64
        assert libc.read_at(fd, mem, 0, 10, 5000) == 0
    finally:
        os.close(fd)
    assert mem[128:192].tolist() == list(range(16, 80))
    assert mem[192:].tolist() == list(range(192, 256))


def test_errors_are_negated_errnos() -> None:
    mem = np.zeros(16, np.uint8)
    assert libc.read_at(-1, mem, 0, 16, 0) == -errno.EBADF
    assert libc.write_at(-1, mem, 0, 16, 0) == -errno.EBADF


def test_zero_and_move() -> None:
    mem = np.arange(64, dtype=np.uint8)
    libc.zero(mem, 8, 8)
    assert mem[7:17].tolist() == [7, *[0] * 8, 16]
    libc.move(mem, 34, 32, 16)
    assert mem[32:50].tolist() == [32, 33, *range(32, 48)]


def test_copy_compare_set() -> None:
    mem = np.arange(64, dtype=np.uint8)
    other = np.zeros(64, np.uint8)
    same, different = copy_and_compare(mem, other)
    assert same == 0
    assert different > 0
    assert other[10:15].tolist() == list(range(20, 25))
    assert mem[:5].tolist() == [0xAB] * 4 + [4]
