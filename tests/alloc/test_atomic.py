"""Atomics in kernels: what each returns and leaves, on every width, and under real threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from alloc import atomic
from alloc.jit import DISABLED, probe

KINDS = ("u1", "i4", "u4", "i8", "u8")


@probe
def each_once(array):
    seen = np.zeros(8, np.int64)
    seen[0] = np.int64(atomic.load_acquire(array, 1))
    atomic.store_release(array, 1, 5)
    seen[1] = np.int64(atomic.fetch_add_acq_rel(array, 1, 3))
    seen[2] = np.int64(atomic.fetch_or_acq_rel(array, 1, 16))
    seen[3] = np.int64(atomic.fetch_and_acq_rel(array, 1, 17))
    seen[4] = np.int64(atomic.exchange_acq_rel(array, 1, 40))
    seen[5] = np.int64(atomic.compare_exchange_acq_rel(array, 1, 41, 1))
    seen[6] = np.int64(atomic.compare_exchange_acq_rel(array, 1, 40, 42))
    seen[7] = np.int64(array[1])
    return seen


@probe
def add_many(array, n):
    for _ in range(n):
        atomic.fetch_add_acq_rel(array, 0, 1)


@probe
def add_locked(words, n):
    """A plain counter under a spin lock, and another that only a successful trylock bumps."""
    for _ in range(n):
        atomic.spin_lock(words, 0)
        words[8] += 1
        atomic.spin_unlock(words, 0)
        if atomic.spin_trylock(words, 0):
            words[8] += 1
            words[9] += 1
            atomic.spin_unlock(words, 0)


@probe
def trailing(value):
    return atomic.count_trailing_zeros(value)


@probe
def mask(bits):
    return atomic.mask64(bits)


@pytest.mark.parametrize("kind", KINDS)
def test_each_operation_returns_the_old_value_and_leaves_the_new_one(kind: str) -> None:
    array = np.array([1, 2, 3], dtype=kind)
    assert each_once(array).tolist() == [2, 5, 8, 24, 16, 0, 1, 42]
    assert array.tolist() == [1, 42, 3]


def test_a_negative_step_wraps_an_unsigned_word() -> None:
    array = np.array([0, 7], dtype="i4")
    add_many(array, 3)
    assert array[0] == 3


@pytest.mark.parametrize("value", [1, 2, 3, 12, 1 << 31, 1 << 63, (1 << 64) - 1])
def test_trailing_zeros(value: int) -> None:
    assert trailing(np.uint64(value)) == (value & -value).bit_length() - 1


@pytest.mark.parametrize("bits", [0, 1, 8, 63, 64])
def test_masks(bits: int) -> None:
    assert int(mask(bits)) == (1 << bits) - 1


def in_threads(function, *args: object, count: int = 4) -> None:
    threads = [threading.Thread(target=function, args=args) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.skipif(DISABLED, reason="the Python twins are for one thread")
def test_additions_of_several_threads_are_all_there() -> None:
    array = np.zeros(1, np.int64)
    add_many(array, 1)
    in_threads(add_many, array, 100_000)
    assert array[0] == 400_001


@pytest.mark.skipif(DISABLED, reason="the Python twins are for one thread")
def test_a_spin_lock_excludes() -> None:
    words = np.zeros(16, np.int64)
    add_locked(words, 1)
    in_threads(add_locked, words, 20_000)
    assert words[8] == 80_001 + words[9]
    assert words[0] == 0
