"""Free-block accounting: promises are kept, and ENOSPC comes before anything changes."""

from __future__ import annotations

import errno
import random
from types import SimpleNamespace

import pytest

from alloc.jit import kernel
from fs import space as fs_space
from fs.space import SP_STASH, STASH_MAX, T_VALID, Space


@kernel("b1(i8[::1], i8)")
def take_stash(words, blocks):
    return fs_space.take_stash(words, blocks)


def make(free: int = 1000, unavailable: int = 100) -> Space:
    space = Space(lambda: unavailable)
    space.start(free, 100_000)
    return space


def test_the_pool_and_the_unavailable_are_held_back() -> None:
    space = make()
    assert space.pool == 50
    assert space.available == 850
    with pytest.raises(OSError) as caught:
        space.reserve(851)
    assert caught.value.errno == errno.ENOSPC
    assert space.reserved == 0
    space.reserve(850)
    assert space.available == 0
    space.reserve(50, from_pool=True)
    with pytest.raises(OSError):
        space.reserve(1, from_pool=True)
    space.reserve(0)


def test_delayed_blocks_become_a_reservation_and_then_allocated() -> None:
    space = make()
    space.reserve_delalloc(30)
    tp = SimpleNamespace(blocks=0)
    space.delalloc_to_reserved(20)
    tp.blocks = 20
    space.note_alloc(tp, 15)
    assert (space.free, space.reserved, space.delalloc, tp.blocks) == (985, 5, 10, 5)
    space.release(tp.blocks)
    space.release_delalloc(10)
    space.note_free(15)
    assert (space.free, space.reserved, space.delalloc) == (1000, 0, 0)


def test_allocating_more_than_reserved_is_a_bug() -> None:
    space = make()
    space.reserve(3)
    with pytest.raises(AssertionError, match="more than was reserved"):
        space.note_alloc(SimpleNamespace(blocks=3), 4)


def test_random_promises_never_exceed_what_is_free() -> None:
    space, rng = make(), random.Random(3)
    held: list[int] = []
    for _ in range(5000):
        if rng.random() < 0.6:
            want = rng.randrange(60)
            try:
                space.reserve_delalloc(want)
                held.append(want)
            except OSError:
                assert want > space.available
        elif held:
            space.release_delalloc(held.pop(rng.randrange(len(held))))
        assert space.delalloc == sum(held)
        assert space.unpromised >= space.pool or not held


# -- the stash ---------------------------------------------------------------------------------


def test_the_stash_is_an_eighth_and_free_to_users() -> None:
    space = make()
    space.refill_stash()
    assert space.stash == 0  # nobody has lanes
    space.open_stash()
    assert space.stash == space.delalloc == 850 // 8
    assert space.available == 850
    space.free = 1_000_000
    space.refill_stash()
    assert space.stash == STASH_MAX


def test_a_lane_takes_all_or_nothing() -> None:
    space = make()
    space.open_stash()
    full = space.stash
    assert not take_stash(space.words, full + 1)
    assert take_stash(space.words, 6)
    assert space.stash == full - 6
    assert space.delalloc == full  # the promise is the lane's now
    assert space.available == 850 - 6
    space.refill_stash()
    assert space.stash == full - 6  # above half: left alone
    assert take_stash(space.words, full - 6 - 30)
    space.refill_stash()
    assert space.stash == (850 - full + 30) // 8


def test_who_would_meet_enospc_gets_the_stash() -> None:
    space = make()
    space.open_stash()
    assert take_stash(space.words, 10)
    with pytest.raises(OSError):
        space.reserve(841)
    assert space.reserved == 0
    space.open_stash()
    space.reserve(840)
    assert (space.stash, space.delalloc, space.available) == (0, 10, 0)
    space.release(840)
    space.open_stash()
    space.reserve_delalloc(840)
    assert (space.stash, space.delalloc) == (0, 850)
    space.release_delalloc(850)
    space.open_stash()
    with pytest.raises(AssertionError):
        space.release_delalloc(1)  # nobody was promised it
    space.close_stash()
    assert (space.stash, space.delalloc) == (0, 0)
    space.refill_stash()
    assert space.words[SP_STASH] == 0


def test_every_change_makes_the_totals_stale() -> None:
    space = make()
    changes = [
        lambda: space.reserve(4),
        lambda: space.release(2),
        lambda: space.reserve_delalloc(3),
        lambda: space.release_delalloc(1),
        lambda: space.delalloc_to_reserved(1),
        lambda: space.note_free(1),
        space.changed,
    ]
    for change in changes:
        before = space.changes
        space.totals[T_VALID] = 1
        change()
        assert space.totals[T_VALID] == 0
        assert space.changes > before
