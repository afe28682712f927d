"""Kernels over single blocks against naive twins that decode the whole block."""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fs.xfs import btblock as bt
from fs.xfs import btkind as K
from fs.xfs import freefit
from fs.xfs.btkind import Kind, Record
from tests.fs.test_btree import make, order
from tests.fs.treecheck import SHAPES, Shape, _rmap_high

SIZE = 1024
U64 = (1 << 64) - 1


def block_of(kind: Kind, records: list[Record], level: int = 0) -> np.ndarray[Any, Any]:
    """A leaf, built without the kernels."""
    mem = np.zeros(4 * SIZE, np.uint8)
    mem[4:8] = list(struct.pack(">HH", level, len(records)))
    for i, rec in enumerate(records):
        kind.pack(mem, kind.header_bytes + i * kind.rec_bytes, rec)
    return mem


def node_of(kind: Kind, entries: list[tuple[bytes, int]]) -> np.ndarray[Any, Any]:
    """A node of level 1, built without the kernels."""
    mem = np.zeros(4 * SIZE, np.uint8)
    mem[4:8] = list(struct.pack(">HH", 1, len(entries)))
    shape = SHAPES[kind.name]
    pointers = shape.header + kind.node_max(SIZE) * shape.key_bytes
    for i, (key, pointer) in enumerate(entries):
        mem[shape.header + i * len(key) :][: len(key)] = list(key)
        raw = pointer.to_bytes(shape.ptr_bytes, "big")
        mem[pointers + i * len(raw) :][: len(raw)] = list(raw)
    return mem


def naive_records(kind: Kind, mem: np.ndarray[Any, Any], at: int = 0) -> list[Record]:
    shape = SHAPES[kind.name]
    (n,) = struct.unpack_from(">H", mem, at + 6)
    raw = bytes(mem)
    start = at + shape.header
    return [shape.decode(raw[start + i * shape.rec_bytes :][: shape.rec_bytes]) for i in range(n)]


def naive_entries(kind: Kind, mem: np.ndarray[Any, Any], at: int = 0) -> list[tuple[bytes, int]]:
    shape: Shape = SHAPES[kind.name]
    (n,) = struct.unpack_from(">H", mem, at + 6)
    raw = bytes(mem)
    pointers = at + shape.header + kind.node_max(SIZE) * shape.key_bytes
    code = f">{n}{'Q' if shape.long else 'I'}"
    keys = [raw[at + shape.header + i * shape.key_bytes :][: shape.key_bytes] for i in range(n)]
    return list(zip(keys, struct.unpack_from(code, raw, pointers), strict=True))


def naive_key(kind: Kind, records: list[Record]) -> bytes:
    """The key that stands for a block of these (unsigned) records."""
    shape = SHAPES[kind.name]
    key = shape.node_key(records[0])
    if kind is K.RMAP:
        key += struct.pack(">IQQ", *max(_rmap_high(rec) for rec in records))
    return key


def unsigned(rec: Record) -> Record:
    return tuple(value & U64 for value in rec)


def some(kind: Kind, n: int, seed: int = 3) -> list[Record]:
    rng = random.Random(seed)
    records = [make(kind, i * 2 + 1, rng) for i in range(n)]
    return sorted(records, key=lambda rec: order(kind, rec))


every_kind = pytest.mark.parametrize("kind", K.KINDS, ids=lambda kind: kind.name)


@every_kind
def test_record_round_trip(kind: Kind) -> None:
    records = some(kind, 7)
    mem = block_of(kind, records)
    assert naive_records(kind, mem) == [unsigned(rec) for rec in records]
    at = kind.header_bytes + 3 * kind.rec_bytes
    assert kind.unpack(mem, at) == records[3]


@every_kind
def test_search_in_leaf_and_node(kind: Kind) -> None:
    records = some(kind, 15)
    mem = block_of(kind, records)
    keys = [order(kind, rec) for rec in records]
    entries = [(naive_key(kind, [unsigned(rec)]), 100 + i) for i, rec in enumerate(records)]
    node = node_of(kind, entries)
    for n in range(34):
        rec = make(kind, n, random.Random(n))
        key = order(kind, rec)
        words = [k - (1 << 64) if k >= 1 << 63 else k for k in kind.key(rec)]
        i, equal, count = bt.step(mem, 0, SIZE, kind.id, 0, *words)
        assert (i, bool(equal), count) == (sum(k < key for k in keys), key in keys, 15)
        i, pointer, count = bt.step(node, 0, SIZE, kind.id, 1, *words)
        wanted = max(0, sum(k <= key for k in keys) - 1)
        assert (i, pointer, count) == (wanted, 100 + wanted, 15)
        assert bt.pointer(node, 0, SIZE, kind.id, i) == pointer


def test_search_reports_broken_blocks() -> None:
    assert bt.step(block_of(K.BNO, []), 0, SIZE, bt.BNO, 1, 0, 0, 0)[0] == -1
    assert bt.step(node_of(K.BNO, []), 0, SIZE, bt.BNO, 1, 0, 0, 0)[0] == -2
    assert bt.step(block_of(K.BNO, []), 0, SIZE, bt.BNO, 0, 5, 0, 0) == (0, 0, 0)


@every_kind
def test_insert_write_delete_records(kind: Kind) -> None:
    records = some(kind, 9)
    rec = np.zeros(32, np.uint8)
    wanted = [unsigned(r) for r in records[:-1]]
    for i in range(9):
        mem = block_of(kind, records[:-1])
        kind.pack(rec, 0, records[-1])
        bt.insert_rec(mem, 0, kind.id, i, rec)
        assert naive_records(kind, mem) == [*wanted[:i], unsigned(records[-1]), *wanted[i:]]
        bt.delete_rec(mem, 0, kind.id, i)
        assert naive_records(kind, mem) == wanted
        if i < 8:
            bt.write_rec(mem, 0, kind.id, i, rec)
            assert naive_records(kind, mem)[i] == unsigned(records[-1])


@every_kind
def test_insert_refresh_delete_children(kind: Kind) -> None:
    entries = [(naive_key(kind, [unsigned(rec)]), 50 + i) for i, rec in enumerate(some(kind, 6))]
    child = 2 * SIZE
    records = some(kind, 5, seed=8)
    for i in range(7):
        mem = node_of(kind, entries)
        mem[child : child + SIZE] = block_of(kind, records)[:SIZE]
        bt.insert_child(mem, 0, SIZE, kind.id, i, 99, child, SIZE)
        key = naive_key(kind, [unsigned(rec) for rec in records])
        assert naive_entries(kind, mem) == [*entries[:i], (key, 99), *entries[i:]]
        assert not bt.refresh_key(mem, 0, SIZE, kind.id, i, child, SIZE)
        bt.delete_rec(mem, child, kind.id, 0)
        assert bt.refresh_key(mem, 0, SIZE, kind.id, i, child, SIZE)
        key = naive_key(kind, [unsigned(rec) for rec in records[1:]])
        assert naive_entries(kind, mem)[i] == (key, 99)
        bt.delete_child(mem, 0, SIZE, kind.id, i)
        assert naive_entries(kind, mem) == entries


@every_kind
def test_move_between_blocks(kind: Kind) -> None:
    left, right = some(kind, 8), some(kind, 5, seed=9)
    for first, n, to in ((0, 8, 0), (5, 3, 0), (0, 4, 5), (2, 3, 2)):
        mem = block_of(kind, left)
        mem[SIZE : 2 * SIZE] = block_of(kind, right)[:SIZE]
        bt.move(mem, 0, SIZE, kind.id, first, n, SIZE, SIZE, kind.id, to)
        a, b = [unsigned(r) for r in left], [unsigned(r) for r in right]
        assert naive_records(kind, mem, SIZE) == b[:to] + a[first : first + n] + b[to:]
        assert naive_records(kind, mem) == a[:first] + a[first + n :]
        entries = [(naive_key(kind, [rec]), 10 + i) for i, rec in enumerate(a)]
        others = [(naive_key(kind, [rec]), 70 + i) for i, rec in enumerate(b)]
        mem = node_of(kind, entries)
        mem[SIZE : 2 * SIZE] = node_of(kind, others)[:SIZE]
        bt.move(mem, 0, SIZE, kind.id, first, n, SIZE, SIZE, kind.id, to)
        merged = others[:to] + entries[first : first + n] + others[to:]
        assert naive_entries(kind, mem, SIZE) == merged
        assert naive_entries(kind, mem) == entries[:first] + entries[first + n :]


def test_inode_root_is_a_block_with_a_short_header() -> None:
    """Moving a node's entries into the fork re-spaces keys and pointers."""
    entries = [(struct.pack(">Q", 10 * i), 500 + i) for i in range(4)]
    mem = node_of(K.BMAP, entries)
    area, nbytes = 2 * SIZE, 4 + 16 * 6
    mem[area : area + 4] = (0, 1, 0, 0)
    bt.move(mem, 0, SIZE, bt.BMAP, 0, 4, area - 4, nbytes + 4, bt.BMAP_ROOT, 0)
    assert struct.unpack_from(">HH4Q", mem, area) == (1, 4, 0, 10, 20, 30)
    assert struct.unpack_from(">4Q", mem, area + 4 + 6 * 8) == (500, 501, 502, 503)
    bt.set_level(mem, area - 4, 2)
    assert struct.unpack_from(">H", mem, area) == (2,)
    assert bt.step(mem, area - 4, nbytes + 4, bt.BMAP_ROOT, 2, 25, 0, 0) == (2, 502, 4)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 9), st.integers(0, 12), st.integers(0, 40))
def test_fits_never_breaks_the_order(i: int, length: int, start: int) -> None:
    some_free: list[Record] = [(n * 4, 1 + n % 5) for n in range(10)]
    records = sorted(some_free, key=lambda r: (r[1], r[0]))
    mem = block_of(K.CNT, records)
    new = (length, start)
    if bt.fits(mem, 0, bt.CNT, i, 10, length, start, 0):
        keys = [(r[1], r[0]) for r in records]
        keys[i] = new
        assert keys == sorted(set(keys))
        assert i > 0 or new >= (records[0][1], records[0][0])
        assert i < 9 or new <= (records[9][1], records[9][0])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 12), st.integers(0, 70), st.integers(0, 9), st.integers(0, 99))
def test_next_overlap(i: int, first: int, n: int, seed: int) -> None:
    rng = random.Random(seed)
    starts = sorted(rng.sample(range(60), 12))
    records: list[Record] = [(start, 1 + rng.randrange(20), 131, 0) for start in starts]
    hits = [
        j for j, r in enumerate(records) if j >= i and r[0] <= first + n and r[0] + r[1] > first
    ]
    wanted = hits[0] if hits else 12
    assert bt.next_overlap(block_of(K.RMAP, records), 0, bt.RMAP, i, first, first + n) == wanted
    entries = [(naive_key(K.RMAP, [rec]), 9) for rec in records]
    assert bt.next_overlap(node_of(K.RMAP, entries), 0, bt.RMAP, i, first, first + n) == wanted


@every_kind
def test_check_accepts_sound_blocks(kind: Kind) -> None:
    records = some(kind, 12)
    assert bt.check_records(block_of(kind, records), 0, SIZE, kind.id, 1 << 20) == bt.GOOD
    entries = [(naive_key(kind, [unsigned(rec)]), 9) for rec in records]
    assert bt.check_records(node_of(kind, entries), 0, SIZE, kind.id, 1 << 20) == bt.GOOD


@pytest.mark.parametrize(
    ("kind", "records", "ag_blocks", "code"),
    [
        (K.BNO, [(8, 2), (4, 1)], 99, bt.UNORDERED),
        (K.BNO, [(8, 2), (9, 1)], 99, bt.OVERLAP),
        (K.BNO, [(8, 0)], 99, bt.EMPTY_REC),
        (K.BNO, [(98, 2)], 99, bt.OUT_OF_AG),
        (K.BNO, [(98, 2)], 0, bt.GOOD),
        (K.CNT, [(8, 2), (4, 2)], 99, bt.UNORDERED),
        (K.INO, [(64, 0, 64, 65, 0)], 99, bt.BAD_VALUE),
        (K.INO, [(64, 0, 64, 1, 1), (96, 0, 64, 1, 1)], 99, bt.OVERLAP),
        (K.REFC, [(8, 2, 1)], 99, bt.BAD_VALUE),
        (K.REFC, [(8, 2, 2), (9, 2, 3)], 99, bt.OVERLAP),
        (K.REFC, [(8, 2, 2), (1 << 31 | 4, 2, 1)], 99, bt.GOOD),
        (K.REFC, [(1 << 31 | 4, 2, 2)], 99, bt.BAD_VALUE),
        (K.RMAP, [(8, 4, -7, 0), (8, 4, -5, 0)], 99, bt.GOOD),
        (K.RMAP, [(8, 4, -5, 0), (8, 4, 131, 0)], 99, bt.UNORDERED),
        (K.BMAP, [(8, 1, 0, 0)], 0, bt.EMPTY_REC),
        (K.BMAP, [(8, 1, 4, 0), (10, 9, 1, 0)], 0, bt.OVERLAP),
    ],
)
def test_check_refuses(kind: Kind, records: list[Record], ag_blocks: int, code: int) -> None:
    assert bt.check_records(block_of(kind, records), 0, SIZE, kind.id, ag_blocks) == code


def test_check_refuses_bad_nodes() -> None:
    keys = [struct.pack(">II", n, 1) for n in (4, 8)]
    for pointers, code in (((5, 6), bt.GOOD), ((5, 0), bt.BAD_PTR), ((5, 99), bt.BAD_PTR)):
        node = node_of(K.BNO, list(zip(keys, pointers, strict=True)))
        assert bt.check_records(node, 0, SIZE, bt.BNO, 99) == code


# -- choosing free extents ------------------------------------------------------------------------


def naive_places(
    records: list[Record], want: int, align: int, above: int, below: int
) -> dict[int, list[int]]:
    """For each record the aligned blocks at which `want` blocks fit."""
    return {
        i: [
            at
            for at in range(max(start, above), min(start + n, below) - want + 1)
            if at % align == 0
        ]
        for i, (start, n) in enumerate(records)
    }


free_leaf = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=8)
bounds = st.tuples(st.integers(0, 40), st.integers(40, 120))


@settings(max_examples=100, deadline=None)
@given(free_leaf, st.integers(1, 8), st.integers(0, 100), st.sampled_from([1, 2, 4]), bounds)
def test_nearest(
    gaps: list[tuple[int, int]], want: int, near: int, align: int, bound: tuple[int, int]
) -> None:
    records: list[Record] = []
    at = 0
    for gap, n in gaps:
        records.append((at + gap, n))
        at += gap + n
    mem = block_of(K.BNO, records)
    found = freefit.nearest(mem, 0, len(records), want, near, align, *bound)
    places = naive_places(records, want, align, *bound)
    everywhere = [at for found_at in places.values() for at in found_at]
    if not everywhere:
        assert found == -1
        return
    assert found in everywhere
    behind = [at for at in everywhere if at >= near]
    if behind and found >= near:
        assert found == min(behind)
    if behind and found < near:
        assert 2 * (near - found) <= min(behind) - near


@settings(max_examples=100, deadline=None)
@given(free_leaf, st.integers(1, 8), st.integers(0, 7), st.sampled_from([1, 2, 4]), bounds)
def test_roomy(
    pairs: list[tuple[int, int]], want: int, i: int, align: int, bound: tuple[int, int]
) -> None:
    unique: set[Record] = {(n * 13, length) for n, length in pairs}
    records = sorted(unique, key=lambda r: (r[1], r[0]))
    mem, count = block_of(K.CNT, records), len(records)
    i = min(i, count - 1)
    fitting = [j for j, at in naive_places(records, want, align, *bound).items() if at]
    up = [j for j in fitting if j >= i]
    down = [j for j in fitting if j <= i]
    found = freefit.roomy_above(mem, 0, i, count, want, align, *bound)
    assert found == (min(up) if up else -1)
    found = freefit.roomy_below(mem, 0, i, want, align, *bound)
    assert found == (max(down) if down else -1)
