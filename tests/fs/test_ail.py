"""The AIL's counts and busy extents against models that look at everything again."""

from __future__ import annotations

import random

import pytest

from fs.log.ail import RING, Ail
from fs.log.busy import Busy


@pytest.mark.parametrize("seed", range(20))
def test_the_tail_is_the_first_that_somebody_holds(seed: int) -> None:
    rng = random.Random(seed)
    found = Ail()
    lsns: dict[int, int] = {}
    held: list[int] = []  # by object
    for step in range(400):
        seq = found.stable + 1
        found.became_stable(seq, lsns.setdefault(seq, (step + 1) << 9))
        for _ in range(rng.randrange(4)):
            found.hold(seq)
            held.append(seq)
        rng.shuffle(held)
        for _ in range(rng.randrange(4)):
            if held:
                found.release(held.pop())
        assert found.objects == len(held)
        assert found.tail() == (lsns[min(held)] if held else 0)
        assert found.first == (min(held) if held else seq + 1)


def test_nobody_holds_nothing() -> None:
    found = Ail()
    found.release(0)
    assert (found.objects, found.tail(), found.first) == (0, 0, 1)


def test_a_floor_keeps_the_log() -> None:
    found = Ail()
    found.floor = 77
    found.became_stable(1, 512)
    found.hold(1)
    assert found.tail() == 77
    found.floor = 0
    assert found.tail() == 512


def test_the_ring_has_an_end() -> None:
    found = Ail()
    found.became_stable(1, 512)
    found.hold(1)
    for seq in range(2, RING + 1):
        assert found.is_crowded == (seq > RING // 2 + 2)
        found.became_stable(seq, seq << 9)
    assert found.tail() == 512
    with pytest.raises(AssertionError, match="more checkpoints"):
        found.became_stable(RING + 1, RING + 1 << 9)
    found.release(1)
    assert not found.is_crowded
    assert found.tail() == 0


@pytest.mark.parametrize("seed", range(20))
def test_busy_extents(seed: int) -> None:
    rng = random.Random(seed)
    busy, model, stable = Busy(), list[tuple[int, int, int]](), 0
    for seq in range(1, 200):
        for _ in range(rng.choice((0, 1, 3, 300))):
            fsbno, n = rng.randrange(5000), rng.randrange(1, 40)
            busy.add(fsbno, n, seq)
            model.append((fsbno, n, seq))
        if rng.random() < 0.4:
            stable = rng.randrange(stable, seq + 1)
            busy.stable(stable)
            model = [extent for extent in model if extent[2] > stable]
        assert busy.count == len(model)
        for _ in range(5):
            low, n = rng.randrange(5000), rng.randrange(1, 60)
            hit = [s for at, count, s in model if at < low + n and low < at + count]
            assert busy.until(low, n) == max(hit, default=0)
