"""Kernels over packed extent records, against lists of tuples."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fs.xfs import extents as X

Row = tuple[int, int, int, int]
ADDR = 48
compiles = settings(deadline=None)  # a first example may compile a kernel

LIMITS = np.zeros(X.LIMITS, np.int64)
LIMITS[X.AGCOUNT] = 4
LIMITS[X.AG_BLOCKS] = 20480
LIMITS[X.AG_BLOCK_LOG] = 15
LIMITS[X.LAST_AG_BLOCKS] = 1000
LIMITS[X.AG_HEADER_BLOCKS] = 1


def naive_bytes(row: Row) -> bytes:
    offset, fsbno, count, unwritten = row
    return (unwritten << 127 | offset << 73 | fsbno << 21 | count).to_bytes(16, "big")


def packed(rows: list[Row], spare: int = 0) -> np.ndarray:
    raw = b"\xaa" * ADDR + b"".join(map(naive_bytes, rows)) + bytes(16 * spare) + b"\x55" * 16
    return np.frombuffer(bytearray(raw), np.uint8)


def unpacked(mem: np.ndarray, n: int) -> list[Row]:
    return [tuple(X.unpack(mem, ADDR + 16 * i)) for i in range(n)]


@st.composite
def rows(draw: st.DrawFn, least: int = 0, most: int = 24) -> list[Row]:
    gaps = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=least,
                         max_size=most))  # fmt: skip
    found, at = [], 0
    for gap, count in gaps:
        at += gap
        fsbno = draw(st.integers(0, (1 << 52) - 1))
        found.append((at, fsbno, count, draw(st.integers(0, 1))))
        at += count
    return found


@compiles
@given(
    st.integers(0, (1 << 54) - 1),
    st.integers(0, (1 << 52) - 1),
    st.integers(0, (1 << 21) - 1),
    st.integers(0, 1),
)
def test_record_bytes(offset: int, fsbno: int, count: int, unwritten: int) -> None:
    row = (offset, fsbno, count, unwritten)
    mem = packed([(0, 0, 0, 0)])
    X.pack(mem, ADDR, *row)
    assert bytes(mem[ADDR : ADDR + 16]) == naive_bytes(row)
    assert tuple(X.unpack(mem, ADDR)) == row
    assert bytes(mem[:ADDR]) == b"\xaa" * ADDR
    assert bytes(mem[ADDR + 16 :]) == b"\x55" * 16


@compiles
@given(rows(), st.integers(0, 400))
def test_search_and_lookup(listed: list[Row], offset: int) -> None:
    mem = packed(listed)
    starts = [i for i, row in enumerate(listed) if row[0] <= offset]
    assert X.search(mem, ADDR, len(listed), offset) == (starts[-1] if starts else -1)
    wanted = next((row for row in listed if row[0] + row[2] > offset), None)
    found = tuple(X.lookup(mem, ADDR, len(listed), offset))
    assert found == wanted if wanted else found[0] == -1


def naive_first_hole(listed: list[Row], start: int, count: int) -> int:
    used = {b for row in listed for b in range(row[0], row[0] + row[2])}
    at = start
    while any(at + k in used for k in range(count)):
        at += 1
    return at


@compiles
@given(rows(), st.integers(0, 60), st.integers(1, 8))
def test_first_hole(listed: list[Row], start: int, count: int) -> None:
    found = X.first_hole(packed(listed), ADDR, len(listed), start, count)
    assert found == naive_first_hole(listed, start, count)


@compiles
@given(rows(), rows(), st.data())
def test_splice(listed: list[Row], new: list[Row], data: st.DataObject) -> None:
    i = data.draw(st.integers(0, len(listed)))
    removed = data.draw(st.integers(0, len(listed) - i))
    mem = packed(listed, len(new))
    table = np.array(new, np.int64).reshape(len(new), 4)
    X.splice(mem, ADDR, len(listed), i, removed, table)
    wanted = listed[:i] + new + listed[i + removed :]
    assert unpacked(mem, len(wanted)) == wanted
    assert not mem[ADDR + 16 * len(wanted) : ADDR + 16 * (len(listed) + len(new))].any()
    assert bytes(mem[:ADDR]) == b"\xaa" * ADDR
    assert bytes(mem[-16:]) == b"\x55" * 16


def naive_fault(listed: list[Row], attr: bool) -> int:
    for row in listed:
        agno, agbno = row[1] >> 15, row[1] & 0x7FFF
        if row[2] == 0 or row[0] + row[2] > 1 << 54:
            return X.SHAPE
        length = 1000 if agno == 3 else 20480
        if agno > 3 or agbno < 1 or agbno + row[2] > length:
            return X.PLACE
        if attr and row[3]:
            return X.UNWRITTEN
    return X.GOOD


def code(listed: list[Row], floor: int = 0, attr: int = 0) -> int:
    return int(X.check(packed(listed), ADDR, len(listed), floor, attr, LIMITS)[0])


@compiles
@given(rows(least=1, most=3), st.booleans())
def test_check_agrees_with_the_rules(listed: list[Row], attr: bool) -> None:
    listed = [(o, f % (1 << 17), c, u) for o, f, c, u in listed]
    ok = naive_fault(listed, attr) == X.GOOD
    assert (code(listed, 0, int(attr)) == X.GOOD) == ok


def test_check_names_each_fault() -> None:
    good = [(0, 8, 4, 0), (4, 40, 4, 1), (9, 3 << 15 | 996, 4, 0)]
    assert all(a[0] + a[2] <= b[0] for a, b in pairwise(good))
    assert tuple(X.check(packed(good), ADDR, 3, 0, 0, LIMITS)) == (X.GOOD, 12)
    assert code(good, floor=1) == X.ORDER
    assert code([good[1], good[0]]) == X.ORDER
    assert code([(0, 8, 5, 0), good[1]]) == X.ORDER
    assert code([(0, 8, 0, 0)]) == X.SHAPE
    assert code([((1 << 54) - 1, 8, 2, 0)]) == X.SHAPE
    assert code([(0, 0, 1, 0)]) == X.PLACE  # AG header
    assert code([(0, 20479, 2, 0)]) == X.PLACE  # across the AG's end
    assert code([(0, 3 << 15 | 997, 4, 0)]) == X.PLACE  # short last AG
    assert code([(0, 4 << 15 | 8, 1, 0)]) == X.PLACE
    assert code(good, attr=1) == X.UNWRITTEN
