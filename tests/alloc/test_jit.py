"""Loading compiled kernels: what is kept of them, and that they still serve who compiles more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alloc import jit
from tests.source import ROOT

# A process of its own: here others compile kernels for which the intermediate code is wanted.
LATE = """
from alloc.arena import Arena
from alloc.buddy import get_page
from alloc.jit import kernel

arena = Arena(16 << 20)

@kernel(lambda: (*arena.buddy, 1))
def twice(words, flags, order, refs, following, preceding, pfn):
    get_page(words, flags, order, refs, following, preceding, pfn)
    return get_page(words, flags, order, refs, following, preceding, pfn)
"""
PROGRAM = """
import re, sys
from pathlib import Path
from typing import Any
from alloc import jit
import alloc.arena
from alloc.gfp import NOWAIT
how = sys.argv[1]

def peak():  # of this program: getrusage also counts who started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
count = jit.load() if how == "load" else jit.warm()
grown = peak() - before
from late import arena, twice
pfn = arena.try_alloc_folio(0, NOWAIT)
print(twice(*arena.buddy, pfn), arena.pages.refs[pfn], grown // count)
"""


@pytest.mark.skipif(jit.DISABLED, reason="nothing is compiled")
def test_loaded_kernels_take_less_and_can_be_called_by_new_ones(tmp_path: Path) -> None:
    kib = {}
    for how in ("warm", "load"):
        place = tmp_path / how  # two places, two entries in the cache: it is compiled twice
        place.mkdir()
        (place / "late.py").write_text(LATE)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, how],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{place}"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        *result, kib[how] = map(int, done.stdout.split())
        assert result == [2, 3]
    print(f"\n  jit: {kib['load']} KiB a kernel, with what numba keeps {kib['warm']}")
    assert kib["load"] < 0.95 * kib["warm"]


@jit.helper
def rarely(n):
    return n + 1


@jit.inlined
def often(n):
    return rarely(n) if n > 10 else n


@jit.kernel("i8(i8)")
def entry(n):
    return often(n)


@pytest.mark.skipif(jit.DISABLED, reason="nothing is compiled")
def test_what_an_inlined_function_calls_is_not_inlined_for_that() -> None:
    for function in (rarely, often, entry):  # what was loaded knows nothing of what went into it
        function._cache.flush()
    entry.recompile()
    assert [entry(n) for n in (10, 11)] == [10, 12]
    inline = [
        [made.fndesc.inline for made in function.overloads.values()] for function in (often, rarely)
    ]
    assert inline == [[True], [False]]


# -- compiled or interpreted -------------------------------------------------------------------

RECORD = np.dtype([("size", "i8"), ("inner", [("flags", "u4")]), ("name", "u1", (4,))])


@jit.kernel("UniTuple(i8, 2)(i8[::1])")
def first_two(numbers: Any) -> Any:
    return numbers[0], numbers[1]


@jit.probe
def grow(table: Any, i: int) -> Any:
    record = table[i]
    record.size += 1
    return record.inner.flags


def test_a_kernel_returns_the_numbers_of_python() -> None:
    found = first_two(np.array([1 << 40, -7]))
    assert found == (1 << 40, -7)
    assert [type(number) for number in found] == [int, int]


def test_a_field_is_an_attribute_whatever_its_name() -> None:
    table = jit.record_table(np.zeros(3, RECORD))
    table["inner"]["flags"][1] = 5
    assert grow(table, 1) == 5
    assert table["size"].tolist() == [0, 1, 0]
    assert table[1].nbytes == RECORD.itemsize
