"""Da-node kernels against a plain list of (hash, child) pairs."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fs.xfs import danode
from fs.xfs import layout as L

SIZE = 512
ROOM = (SIZE - 64) // 8


def naive_hash(name: bytes) -> int:
    """The hash one group of four bytes at a time, in Python integers."""

    def rotl(value: int, turn: int) -> int:
        return ((value << turn) | (value >> (32 - turn))) & 0xFFFFFFFF

    h = 0
    while len(name) >= 4:
        a, b, c, d = name[:4]
        h = (a << 21) ^ (b << 14) ^ (c << 7) ^ d ^ rotl(h, 28)
        name = name[4:]
    word = 0
    for byte in name:
        word = (word << 7) ^ byte
    return word ^ rotl(h, 7 * len(name)) if name else h


def make(pairs: list[tuple[int, int]], level: int = 1, where: int = 0) -> np.ndarray:
    """A node of `pairs` at byte `where` of an array that holds two."""
    mem = np.zeros(2 * SIZE, np.uint8)
    danode.init(mem, where, level)
    for i, (h, child) in enumerate(pairs):
        assert danode.insert(mem, where, SIZE, i, h, child) == 0
    return mem


def entries(mem: np.ndarray, where: int = 0) -> list[tuple[int, int]]:
    """The node's pairs, and a check that nothing lies behind them."""
    n = danode.count(mem, where)
    raw = mem[where + 64 : where + SIZE].tobytes()
    assert not any(raw[8 * n :])
    return [struct.unpack_from(">II", raw, 8 * i) for i in range(n)]


@pytest.mark.parametrize(("name", "value"), [(b".", 0x2E), (b"..", 0x172E), (b"file1", 0x6D3B32B7)])
def test_known_hashes(name: bytes, value: int) -> None:
    mem = np.frombuffer(bytearray(b"x" + name), np.uint8)
    assert danode.da_hash(mem, 1, len(name)) == value == naive_hash(name)


@settings(deadline=None)
@given(st.binary(max_size=255))
def test_hash_equals_naive(name: bytes) -> None:
    mem = np.frombuffer(bytearray(name + b"!"), np.uint8)
    assert danode.da_hash(mem, 0, len(name)) == naive_hash(name)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 0xFFFFFFFF), max_size=ROOM + 5), st.integers(0, 0xFFFFFFFF))
def test_insert_search_delete(hashes: list[int], probe: int) -> None:
    mem, model = make([]), []
    for child, h in enumerate(hashes, 1):
        at = danode.search(mem, 0, h)
        assert at == sum(other < h for other, _ in model)
        full = danode.insert(mem, 0, SIZE, at, h, child)
        assert full == (-1 if len(model) == ROOM else 0)
        if full == 0:
            model.insert(at, (h, child))
    assert entries(mem) == model
    assert danode.search(mem, 0, probe) == sum(other < probe for other, _ in model)
    assert danode.find_child(mem, 0, len(hashes) + 1) == -1
    for _, child in list(model):
        at = danode.find_child(mem, 0, child)
        assert model[at][1] == child
        danode.delete(mem, 0, at)
        del model[at]
    assert entries(mem) == []


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.data())
def test_move(n_left: int, n_right: int, data: st.DataObject) -> None:
    left = [(i, i + 1) for i in range(n_left)]
    right = [(100 + i, 100 + i) for i in range(n_right)]
    mem = make(left)
    mem[SIZE:] = make(right)[:SIZE]
    first = data.draw(st.integers(0, n_left))
    n = data.draw(st.integers(0, n_left - first))
    index = data.draw(st.integers(0, n_right))
    danode.move(mem, 0, first, n, SIZE, index)
    assert entries(mem, 0) == left[:first] + left[first + n :]
    assert entries(mem, SIZE) == right[:index] + left[first : first + n] + right[index:]


def test_accessors() -> None:
    mem = make([(5, 50), (9, 90)], level=3)
    danode.set_forw(mem, 0, 0xFFFFFFF0)
    danode.set_back(mem, 0, 7)
    danode.set_hash(mem, 0, 1, 11)
    assert (danode.forw(mem, 0), danode.back(mem, 0)) == (0xFFFFFFF0, 7)
    assert (danode.level(mem, 0), danode.count(mem, 0)) == (3, 2)
    assert danode.magic(mem, 0) == L.MAGIC_DA_NODE
    assert danode.last_hash(mem, 0) == danode.hash_at(mem, 0, 1) == 11
    assert danode.child_at(mem, 0, 0) == 50


def test_verify_names_the_fault() -> None:
    good = make([(5, 50), (5, 51), (9, 90)])
    assert danode.REASONS[danode.verify(good, 0, SIZE)] == ""
    for offset, value, reason in [
        (8, 0x3EBF, "magic"),
        (56, 0, "entry count"),
        (56, ROOM + 1, "entry count"),
        (58, 0, "level"),
        (58, 6, "level"),
    ]:
        bad = good.copy()
        struct.pack_into(">H", bad, offset, value)
        assert danode.REASONS[danode.verify(bad, 0, SIZE)] == reason
    danode.set_hash(good, 0, 0, 6)
    assert danode.REASONS[danode.verify(good, 0, SIZE)] == "hash order"
    danode.set_hash(good, 0, 0, 5)
    struct.pack_into(">I", good, danode.HEADER + danode.ENTRY + 4, 0)
    assert danode.REASONS[danode.verify(good, 0, SIZE)] == "child block"
