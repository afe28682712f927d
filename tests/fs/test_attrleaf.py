"""Attribute kernels, leaf and shortform, against lists of Python tuples and a naive encoder."""

from __future__ import annotations

import random
import struct
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fs.xfs import attrleaf, attrsf
from fs.xfs import layout as L
from tests.fs.test_danode import naive_hash

SIZE = 1024
NAMESPACES = (0, attrsf.ROOT, attrsf.SECURE)


def buffer(data: bytes) -> np.ndarray:
    """Bytes as kernels take them."""
    return np.frombuffer(bytearray(data), np.uint8)


class Attr(NamedTuple):
    """An entry of the model; a remote one has its file block instead of the value."""

    hash: int
    flags: int
    name: bytes
    value: bytes
    block: int = 0

    def size(self) -> int:
        fixed = 11 if self.block else 3
        return (fixed + len(self.name) + len(self.value) * (not self.block) + 3) // 4 * 4


def attr(flags: int, name: bytes, value: bytes, block: int = 0) -> Attr:
    return Attr(naive_hash(name), flags, name, value, block)


def naive_leaf(attrs: list[Attr], gaps: random.Random | None = None) -> np.ndarray:
    """Encode a leaf as the kernel may leave it: parts in any order, with holes between."""
    raw = bytearray(SIZE)
    attrs = sorted(attrs, key=lambda a: a.hash)
    order = list(range(len(attrs)))
    spare = SIZE - 80 - sum(8 + a.size() for a in attrs)
    assert spare >= 0
    if gaps:
        gaps.shuffle(order)
    at, first, table = SIZE, SIZE, {}
    for i in order:
        if gaps and spare >= 4:
            gap = gaps.randrange(0, min(spare, 24), 4)
            at, spare = at - gap, spare - gap
        a = attrs[i]
        at -= a.size()
        head = (
            struct.pack(">IIB", a.block, len(a.value), len(a.name))
            if a.block
            else struct.pack(">HB", len(a.value), len(a.name))
        )
        text = head + a.name + (b"" if a.block else a.value)
        raw[at : at + len(text)] = text
        first, table[i] = at, at
    for i, a in enumerate(attrs):
        flags = a.flags | (0 if a.block else 1)
        struct.pack_into(">IHBB", raw, 80 + 8 * i, a.hash, table[i], flags, 0)
    struct.pack_into(">H", raw, 8, 0x3BEE)
    used = sum(a.size() for a in attrs)
    holes = int(SIZE - first != used)
    struct.pack_into(">HHHB", raw, 56, len(attrs), used, first, holes)
    return buffer(bytes(raw))


def decode(mem: np.ndarray, addr: int) -> list[Attr]:
    """What the leaf says, through the kernels' own decoder."""
    found = []
    for e in attrleaf.entries(mem, addr):
        if e.flags & attrsf.LOCAL:
            value = mem[e.text : e.text + e.valuelen].tobytes()
        else:
            value = b"\0" * e.valuelen
        found.append(Attr(e.hash, e.flags & ~attrsf.LOCAL, e.name, value, e.valueblk))
    return found


def check(mem: np.ndarray, addr: int, model: list[Attr]) -> None:
    """The leaf holds exactly the model, verifies, and is compact."""
    assert attrleaf.REASONS[attrleaf.verify(mem, addr, SIZE)] == ""
    found = decode(mem, addr)
    assert sorted(found) == sorted(model)
    assert [a.hash for a in found] == sorted(a.hash for a in model)
    n, used, first, holes = struct.unpack_from(">HHHB", mem[addr + 56 : addr + 63].tobytes())
    assert (n, used) == (len(model), sum(a.size() for a in model))
    assert (first, holes) == (SIZE - used, 0)
    freemap = struct.unpack(">6H", mem[addr + 64 : addr + 76].tobytes())
    assert freemap == (80 + 8 * n, first - 80 - 8 * n, 0, 0, 0, 0)
    assert not mem[addr + 80 + 8 * n : addr + first].any()
    assert attrleaf.room(mem, addr, SIZE) == first - 80 - 8 * n
    assert attrleaf.taken(mem, addr) == 8 * n + used
    assert attrleaf.last_hash(mem, addr) == max((a.hash for a in model), default=0)


def add(mem: np.ndarray, addr: int, a: Attr) -> bool:
    """Insert through the kernels; False when the leaf is full."""
    at = attrleaf.find(mem, addr, a.hash, a.flags, buffer(a.name))
    assert at < 0
    if a.block:
        code = attrleaf.add_remote(
            mem, addr, SIZE, -1 - at, a.hash, a.flags, buffer(a.name), a.block, len(a.value)
        )
    else:
        code = attrleaf.add_local(
            mem, addr, SIZE, -1 - at, a.hash, a.flags, buffer(a.name), buffer(a.value)
        )
    return bool(code == 0)


names = st.binary(min_size=1, max_size=24)
attrs = st.builds(
    attr,
    st.sampled_from(NAMESPACES),
    names,
    st.binary(max_size=60),
    st.sampled_from([0, 0, 0, 7]),
).map(lambda a: a._replace(value=b"\0" * (len(a.value) + 1)) if a.block else a)
distinct = st.lists(attrs, max_size=14, unique_by=lambda a: (a.flags, a.name))


@settings(max_examples=60, deadline=None)
@given(distinct, st.randoms(use_true_random=False), st.booleans())
def test_add_find_remove(items: list[Attr], rng: random.Random, scattered: bool) -> None:
    start = items[: len(items) // 2]
    mem = naive_leaf(start, rng if scattered else None)
    assert attrleaf.verify(mem, 0, SIZE) == 0
    model = list(start)
    for a in items[len(start) :]:
        fits = 80 + sum(8 + b.size() for b in [*model, a]) <= SIZE
        assert add(mem, 0, a) == fits
        if fits:
            model.append(a)
            check(mem, 0, model)
    rng.shuffle(model)
    while model:
        a = model.pop()
        at = attrleaf.find(mem, 0, a.hash, a.flags, buffer(a.name))
        assert attrleaf.entry(mem, 0, at).name == a.name
        assert attrleaf.find(mem, 0, a.hash, a.flags | 0x80, buffer(a.name)) < 0
        assert attrleaf.remove(mem, 0, SIZE, at) == 0
        check(mem, 0, model)


@settings(max_examples=40, deadline=None)
@given(distinct, st.randoms(use_true_random=False))
def test_compact_and_move(items: list[Attr], rng: random.Random) -> None:
    items.sort(key=lambda a: a.hash)
    cut = rng.randint(0, len(items))
    source = naive_leaf(items, rng)
    mem = np.concatenate([source, naive_leaf([])])
    assert attrleaf.move(mem, 0, cut, len(items) - cut, SIZE, 0, SIZE) == 0
    check(mem, 0, items[:cut])
    check(mem, SIZE, items[cut:])
    assert attrleaf.move(mem, SIZE, 0, len(items) - cut, 0, cut, SIZE) == 0
    check(mem, 0, items)
    check(mem, SIZE, [])


def test_compact_refuses_overlap() -> None:
    mem = naive_leaf([attr(0, b"alpha", b"1" * 20), attr(0, b"beta", b"2" * 20)], random.Random(3))
    table = [struct.unpack_from(">IHBB", mem[80 + 8 * i : 88 + 8 * i].tobytes()) for i in (0, 1)]
    lower = min(table, key=lambda e: e[1])
    which = table.index(lower)
    mem[80 + 8 * which + 4 : 80 + 8 * which + 6] = buffer(struct.pack(">H", lower[1] + 8))
    mem[62] = 1
    before = decode(mem, 0)
    assert attrleaf.compact(mem, 0, SIZE) == -1
    assert decode(mem, 0) == before


@settings(deadline=None)
@given(distinct.filter(bool), st.integers(0, 14), st.integers(12, 768))
def test_split_point(items: list[Attr], index: int, need: int) -> None:
    items.sort(key=lambda a: a.hash)
    index = min(index, len(items))
    sizes = [8 + a.size() for a in items]
    sizes.insert(index, need)
    mem = naive_leaf(items)
    splits = {
        k: abs(sum(sizes[:k]) - sum(sizes[k:]))
        for k in range(1, len(sizes))
        if sum(sizes[:k]) <= SIZE - 80 and sum(sizes[k:]) <= SIZE - 80
    }
    got = attrleaf.split_point(mem, 0, SIZE, index, need)
    if splits:
        assert splits[got] == min(splits.values())
    else:
        assert got == -1


def naive_shortform(items: list[Attr]) -> bytes:
    body = b"".join(bytes([len(a.name), len(a.value), a.flags]) + a.name + a.value for a in items)
    return struct.pack(">HBB", 4 + len(body), len(items), 0) + body


@settings(deadline=None)
@given(distinct)
def test_shortform_against_naive(items: list[Attr]) -> None:
    items = [a._replace(block=0) for a in items]
    mem = np.zeros(4096, np.uint8)
    attrsf.init(mem, 16)
    model: list[Attr] = []
    for a in items:
        assert attrsf.find(mem, 16, a.flags, buffer(a.name)) == -1
        attrsf.add(mem, 16, a.flags, buffer(a.name), buffer(a.value))
        model.append(a)
    assert mem[16 : 16 + attrsf.total_size(mem, 16)].tobytes() == naive_shortform(model)
    assert attrsf.verify(mem, 16, 2048) == 0
    assert list(attrsf.entries(mem, 16)) == [(a.flags, a.name) for a in model]
    for a in items[::2]:
        at = attrsf.find(mem, 16, a.flags, buffer(a.name))
        assert attrsf.value_at(mem, 16, at) == a.value
        assert attrsf.remove(mem, 16, at) == 3 + len(a.name) + len(a.value)
        model.remove(a)
        assert mem[16 : 16 + attrsf.total_size(mem, 16)].tobytes() == naive_shortform(model)
    assert attrsf.count(mem, 16) == len(model)


@settings(deadline=None)
@given(distinct)
def test_shortform_and_back(items: list[Attr]) -> None:
    items = [a._replace(block=0) for a in items]
    if 80 + sum(8 + a.size() for a in items) > SIZE:
        return
    mem = np.zeros(2 * SIZE, np.uint8)
    mem[SIZE:] = naive_leaf([])
    attrleaf.from_shortform(buffer(naive_shortform(items)), mem, SIZE, SIZE)
    check(mem, SIZE, items)
    if items:  # an incomplete entry is left behind
        hidden = decode(mem, SIZE)[0]
        attrleaf.set_flags(mem, SIZE, 0, hidden.flags | attrsf.INCOMPLETE)
        items = [a for a in items if (a.flags, a.name) != (hidden.flags, hidden.name)]
    want = len(naive_shortform(items))
    assert attrleaf.shortform_size(mem, SIZE) == want
    out = np.zeros(want, np.uint8)
    assert attrleaf.to_shortform(mem, SIZE, out) == want
    assert attrsf.verify(out, 0, want) == 0
    assert sorted(attrsf.entries(out, 0)) == sorted((a.flags, a.name) for a in items)
    for a in items:
        assert attrsf.value_at(out, 0, attrsf.find(out, 0, a.flags, buffer(a.name))) == a.value


def test_large_values_do_not_go_back() -> None:
    big = naive_leaf([attr(0, b"n", b"v" * 256)])
    assert attrleaf.shortform_size(big, 0) == -1
    remote = naive_leaf([attr(0, b"n", b"v" * 16, block=5)])
    assert attrleaf.shortform_size(remote, 0) == -1


def test_64k_leaf() -> None:
    size = 65536
    mem = np.zeros(size, np.uint8)
    attrleaf.init(mem, 0, size)
    assert attrleaf.verify(mem, 0, size) == 0
    assert struct.unpack(">H", mem[60:62].tobytes()) == (0,)
    value = bytes(1000)
    for i in range(60):
        name = buffer(b"name%d" % i)
        h = naive_hash(name.tobytes())
        at = -1 - attrleaf.find(mem, 0, h, 0, name)
        assert attrleaf.add_local(mem, 0, size, at, h, 0, name, buffer(value)) == 0
    assert attrleaf.verify(mem, 0, size) == 0
    assert attrleaf.count(mem, 0) == 60
    while attrleaf.count(mem, 0):
        assert attrleaf.remove(mem, 0, size, 0) == 0
    assert attrleaf.verify(mem, 0, size) == 0
    assert struct.unpack(">H", mem[60:62].tobytes()) == (0,)


@pytest.mark.parametrize(
    ("offset", "fmt", "value", "reason"),
    [
        (8, ">H", 0x3EBE, "magic"),
        (56, ">H", 200, "entry count"),
        (60, ">H", 90, "first used byte"),
        (60, ">H", 1025, "first used byte"),
        (58, ">H", 4, "used bytes"),
        (80, ">I", 0xFFFFFFFF, "hash order"),
        (84, ">H", 100, "name index"),
        (84, ">H", 1023, "name index"),
        (86, ">B", 0x07, "flags"),
        (86, ">B", 0x41, "flags"),
        (64, ">H", 1025, "free map"),
    ],
)
def test_verify_names_the_fault(offset: int, fmt: str, value: int, reason: str) -> None:
    mem = naive_leaf([attr(0, b"one", b"1"), attr(2, b"two", b"2"), attr(4, b"three", b"3")])
    mem[offset : offset + struct.calcsize(fmt)] = buffer(struct.pack(fmt, value))
    assert attrleaf.REASONS[attrleaf.verify(mem, 0, SIZE)] == reason


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_verified_noise_is_harmless(data: st.DataObject) -> None:
    """Whatever passes verify can be searched, compacted and emptied without leaving the block."""
    mem = np.zeros(3 * SIZE, np.uint8)
    mem[SIZE : 2 * SIZE] = naive_leaf([attr(0, bytes([65 + i]) * 5, b"v" * i) for i in range(6)])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.one_of(st.integers(56, 128), st.integers(56, SIZE - 1)))
        mem[SIZE + at] = data.draw(st.integers(0, 255))
    if attrleaf.verify(mem, SIZE, SIZE) != 0:
        return
    decode(mem, SIZE)
    attrleaf.shortform_size(mem, SIZE)
    while attrleaf.count(mem, SIZE):
        if attrleaf.remove(mem, SIZE, SIZE, 0) != 0:
            break
    assert not mem[:SIZE].any()
    assert not mem[2 * SIZE :].any()


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_shortform_noise(raw: bytes) -> None:
    mem = np.zeros(512, np.uint8)
    mem[: len(raw)] = buffer(raw)
    if attrsf.verify(mem, 0, len(raw)) == 0:
        listed = list(attrsf.entries(mem, 0))
        assert len(listed) == attrsf.count(mem, 0)
        assert all(name for _, name in listed)
        assert attrsf.total_size(mem, 0) <= len(raw)


def test_layout_constants() -> None:
    assert (attrleaf.HEADER, attrleaf.ENTRY) == (80, 8)
    assert L.off(L.ATTR_LEAF_HEADER, "freemap") == 64
    assert attrleaf.is_local(4096, 10, 3050)
    assert not attrleaf.is_local(4096, 10, 3060)
