"""Pressure accounting against golden values, a naive worker that is never late, and real waits."""

from __future__ import annotations

import math
import random

import pytest
import trio
from trio.testing import MockClock

from alloc.arena import Arena
from alloc.gfp import NOWAIT
from alloc.pressure import DECAY, FIXED_1, PERIOD_NS, Pressure, fixed_power, serves_requests

PERIOD_S = PERIOD_NS / 1e9


def parse(text: str) -> dict[str, dict[str, float]]:
    lines = {}
    for line in text.splitlines():
        name, *words = line.split()
        lines[name] = {key: float(value) for key, value in (word.split("=") for word in words)}
    return lines


@pytest.fixture
def clock() -> MockClock:
    return MockClock()


async def test_golden_averages_of_a_stall_and_of_the_calm_after_it(clock: MockClock) -> None:
    """Worked by hand: one period at 100 % gives (204800 * 371 + 2047) / 2048 = 37100 / 2048."""
    pressure = Pressure()
    assert pressure.text() == (
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    )
    pressure.request_begins()
    with pressure:
        clock.jump(PERIOD_S + 0.001)
    assert pressure.text() == (
        "some avg10=18.11 avg60=3.27 avg300=0.68 total=2002000\n"
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    )
    # the millisecond above is less than a percent of the next period: 37100 * 1677 / 2048 = 30379
    clock.jump(PERIOD_S)
    assert parse(pressure.text())["some"]["avg10"] == 14.83


async def test_averages_are_exponential(clock: MockClock) -> None:
    pressure = Pressure()
    with pressure:
        clock.jump(60.1)
    got = parse(pressure.text())["some"]
    for name, window in (("avg10", 10), ("avg60", 60), ("avg300", 300)):
        # a window's decay is rounded to 1/2048, which is most in the longest one
        assert got[name] == pytest.approx(100 * (1 - math.exp(-58 / window)), abs=2.5)
    clock.jump(3600)
    calm = parse(pressure.text())["some"]
    assert calm["avg10"] == calm["avg60"] == calm["avg300"] == 0.0
    assert calm["total"] == got["total"]


def test_fixed_power_is_a_power() -> None:
    for decay in DECAY.values():
        for n in range(50):
            power = fixed_power(decay, n) / FIXED_1
            assert power == pytest.approx((decay / FIXED_1) ** n, abs=0.02)


async def test_some_and_full(clock: MockClock) -> None:
    """full needs every request to wait; a task that runs none counts for some only."""
    pressure = Pressure()
    pressure.request_begins()
    pressure.request_begins()
    with pressure:  # a background task
        clock.jump(1)
        serves_requests.set(True)
        with pressure:
            clock.jump(1)
            with pressure:
                clock.jump(1)
                pressure.request_begins()
                clock.jump(1)
                pressure.request_ends()
        clock.jump(1)
        serves_requests.set(False)
    assert pressure.totals_us() == (5_000_000, 1_000_000)


class Naive:
    """The worker of every period, and the state of every millisecond between."""

    def __init__(self) -> None:
        self.ms = self.stalled = self.sampled = 0
        self.averages = [0.0, 0.0, 0.0]

    def run(self, ms: int, waits: bool) -> None:
        for _ in range(ms):
            self.ms += 1
            self.stalled += waits
            if self.ms % (PERIOD_NS // 10**6) == 0:
                share = 100 * (self.stalled - self.sampled) / (PERIOD_NS / 1e6)
                self.sampled = self.stalled
                for i, window in enumerate((10, 60, 300)):
                    keep = math.exp(-PERIOD_S / window)
                    self.averages[i] = self.averages[i] * keep + share * (1 - keep)


@pytest.mark.parametrize("seed", range(3))
async def test_like_the_naive_worker(clock: MockClock, seed: int) -> None:
    dice = random.Random(seed)
    pressure, naive = Pressure(), Naive()
    pressure.totals_us()
    for _ in range(60):
        busy, calm = dice.randrange(1, 8000), dice.randrange(1, 8000)
        with pressure:
            clock.jump(busy / 1000)
        naive.run(busy, True)
        clock.jump(calm / 1000)
        naive.run(calm, False)
        got = parse(pressure.text())["some"]
        assert got["total"] == pytest.approx(naive.stalled * 1000, abs=5)
        for i, name in enumerate(DECAY):
            assert got[name] == pytest.approx(naive.averages[i], abs=3)


async def test_a_task_that_waits_for_memory_is_a_stall(autojump_clock: MockClock) -> None:
    arena = Arena(8 << 20)
    held = []
    while pfn := arena.try_alloc_folio(0, NOWAIT):
        held.append(pfn)
    assert arena.pressure.totals_us() == (0, 0)
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            held.append(await arena.alloc_folio(0))

        nursery.start_soon(wait)
        await trio.sleep(1.5)
        assert arena.pressure.waiting == 1
        for _ in range(8):
            arena.put_folio(held.pop())
    some, full = arena.pressure.totals_us()
    assert arena.pressure.waiting == 0
    assert some == full == pytest.approx(1_500_000, abs=1000)
    for pfn in held:
        arena.put_folio(pfn)
    arena.close()
