"""Free-block accounting: promises are kept, and ENOSPC comes before anything changes."""

from __future__ import annotations

import errno
import random
from types import SimpleNamespace

import pytest

from fs.space import Space


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
