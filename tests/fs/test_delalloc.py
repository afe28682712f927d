"""Promises to dirty data: the kernels against naive twins, and lanes that promise meanwhile."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc.atomic import fetch_add, load_acquire, spin_lock, spin_unlock
from alloc.jit import DISABLED, kernel
from fs import delalloc
from fs.cache.mapping import W_DELALLOC, W_INDIRECT, W_PENDING
from fs.cache.radix import R_LOCK
from fs.xfs import layout as L
from tests import support
from tests.fs.imagefiles import a_file, opened

LEVELS, RECORDS_MIN = 5, 125


@kernel("i8(u4[::1], i8, i8[::1], i8, i8, i8, i8, i8, i8)")
def promise_words(m4, root, stash, form, nextents, data, pending, levels, least):
    spin_lock(m4, root + R_LOCK)
    taken = delalloc.promise_words(m4, root, stash, form, nextents, data, pending, levels, least)
    spin_unlock(m4, root + R_LOCK)
    return taken


def naive_worst_tree(form: int, nextents: int, pending: int, levels: int, least: int) -> int:
    records = nextents + delalloc.RECORDS_EACH * pending
    if not pending or (form == L.FMT_EXTENTS and records <= delalloc.INLINE_MIN):
        return 0
    total, level = 1, records
    while level > 1:
        level = -(-level // least)
        total += level
    return min(total, pending * delalloc.RECORDS_EACH * levels)


@given(
    st.sampled_from([L.FMT_EXTENTS, L.FMT_BTREE]),
    st.integers(0, 100_000),
    st.integers(0, 100_000),
    st.integers(1, 9),
    st.integers(2, 2000),
)
def test_worst_tree_equals_the_naive_twin(
    form: int, nextents: int, pending: int, levels: int, least: int
) -> None:
    got = delalloc._worst_tree(form, nextents, pending, levels, least)
    assert got == naive_worst_tree(form, nextents, pending, levels, least)


class Twin:
    """The three words of a mapping, counted by plain Python."""

    def __init__(self) -> None:
        self.data = self.pending = self.indirect = 0

    def worst(self, nextents: int, pending: int) -> int:
        return naive_worst_tree(L.FMT_EXTENTS, nextents, pending, LEVELS, RECORDS_MIN)

    def promise(self, nextents: int, data: int, pending: int) -> int:
        tree = max(self.worst(nextents, self.pending + pending) - self.indirect, 0)
        self.data, self.pending = self.data + data, self.pending + pending
        self.indirect += tree
        return data + tree

    def forget(self, nextents: int, data: int, pending: int) -> int:
        if data > self.data or pending > self.pending:
            return -1
        self.data, self.pending = self.data - data, self.pending - pending
        surplus = max(self.indirect - self.worst(nextents, self.pending), 0)
        self.indirect -= surplus
        return data + surplus


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 30))
def test_promises_equal_the_naive_twin(seed: int) -> None:
    rng, twin, m4 = random.Random(seed), Twin(), np.zeros(32, np.uint32)
    nextents = 0
    for _ in range(60):
        nextents = max(0, nextents + rng.randint(-3, 20))
        data = rng.randrange(50)
        pending = data + rng.randrange(10)
        what = rng.choice(("promise", "promise", "forget", "lane"))
        words = (L.FMT_EXTENTS, nextents, data, pending, LEVELS, RECORDS_MIN)
        if what == "promise":
            assert delalloc._promise(m4, 0, *words) == twin.promise(nextents, data, pending)
        elif what == "forget":
            assert delalloc._forget(m4, 0, *words) == twin.forget(nextents, data, pending)
        else:
            stash = np.array([rng.randrange(100)] + [0] * 7, np.int64)
            before = int(stash[0])
            needed = data + max(
                twin.worst(nextents, twin.pending + pending) - twin.indirect, 0
            )
            got = promise_words(m4, 0, stash, *words)
            assert got == (needed if needed <= before else -1)
            assert stash[0] == before - max(got, 0)
            if got >= 0:
                twin.promise(nextents, data, pending)
        assert m4[[W_DELALLOC, W_PENDING, W_INDIRECT]].tolist() == [
            twin.data,
            twin.pending,
            twin.indirect,
        ]
        assert not m4[R_LOCK]


async def test_no_space_changes_nothing(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        delalloc.promise(vol, ip, 5, 7)
        words = (vol.pages.m4, vol.pages.root(ip.handle))
        before = [int(words[0][words[1] + w]) for w in (W_DELALLOC, W_PENDING, W_INDIRECT)]
        assert before[:2] == [5, 7]
        assert before[2] == delalloc.worst_tree_blocks(vol, ip, 7) > 0
        promised = vol.space.delalloc
        with pytest.raises(OSError, match="no space"):
            delalloc.promise(vol, ip, vol.space.available + 1, 3)
        after = [int(words[0][words[1] + w]) for w in (W_DELALLOC, W_PENDING, W_INDIRECT)]
        assert (after, vol.space.delalloc) == (before, promised)
        with pytest.raises(AssertionError, match="never promised"):
            delalloc.forget(vol, ip, 6, 0)
        delalloc.forget(vol, ip, 5, 7)
        assert vol.space.delalloc == 0


# -- lanes -------------------------------------------------------------------------------------


@kernel("void(u4[::1], i8, i8[::1], i8[::1], i8, i8, i8, i8)")
def promise_often(m4, root, stash, out, me, rounds, levels, records_min):
    """A lane that promises a little, again and again. out[me]: promises made."""
    n = 0
    while n < rounds and load_acquire(out, 0) == 0:
        taken = promise_words(m4, root, stash, L.FMT_EXTENTS, 0, 1, 1, levels, records_min)
        if taken >= 0:
            n += 1
            fetch_add(out, me, 1)


@pytest.mark.skipif(DISABLED, reason="needs threads without the GIL")
async def test_lanes_promise_while_tasks_do(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        pages, space, rng = vol.pages, vol.space, random.Random(5)
        out = np.zeros(8, np.int64)
        args: tuple[Any, ...] = (pages.m4, pages.root(ip.handle), space.words, out)
        shape = (pages.tree_levels, pages.tree_records_min)
        promise_often(*args, 7, 0, *shape)  # compiled
        threads = [
            threading.Thread(target=promise_often, args=(*args, me, 6000, *shape))
            for me in (1, 2)
        ]
        space.open_stash()
        for thread in threads:
            thread.start()
        data = 0
        while any(thread.is_alive() for thread in threads):
            n = rng.randrange(4)
            delalloc.promise(vol, ip, n, n)
            data += n
            if data > 20 and rng.random() < 0.3:
                delalloc.forget(vol, ip, 20, 20)
                data -= 20
            if rng.random() < 0.1:
                space.recall_stash()
            space.refill_stash()
            await trio.sleep(0)
        made = int(out[1] + out[2])
        assert made == 12_000
        state = pages.state(ip.handle)
        assert (state["delalloc"], state["pending"]) == (made + data, made + data)
        # Whatever was topped up meanwhile: enough for the worst, and all of it counted.
        assert state["indirect"] >= delalloc.worst_tree_blocks(vol, ip, made + data)
        assert space.delalloc == space.stash + int(state["delalloc"]) + int(state["indirect"])
        delalloc.forget(vol, ip, made + data, made + data)
        assert (state["delalloc"], state["pending"], state["indirect"]) == (0, 0, 0)
        assert space.delalloc == space.stash
