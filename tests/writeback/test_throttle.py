"""Writers and a device that is only a number, by a mock clock: rates, shares, pauses, limits."""

from __future__ import annotations

import numpy as np
import pytest
import trio
import trio.testing

from tests.writeback import counts
from writeback.dirty import Dirty
from writeback.throttle import CREDIT_MS, FIRST_PAGES, WRITERS_MOST, Throttle

MEMORY = 15_000  # pages that may be dirty in part
BW = 6400  # pages a second: 25 MiB/s
STEP = 4  # pages of one write
CHUNK = 64  # pages that the device writes in one go


class Machine:
    """Memory, a device and its flusher; `steps` has what each writer dirtied."""

    def __init__(self) -> None:
        self.dirty = Dirty(lambda: MEMORY)
        self.throttle = Throttle(self.dirty, np.zeros(1 << 20, np.int32))
        self.bw = BW
        self.steps: dict[int, int] = {}
        self.most = 0  # pages ever dirty or written at a time, beyond the limit of then
        self.times: list[float] = []  # seconds that each write took

    async def device(self) -> None:
        while True:
            pages = min(self.dirty.nr_dirty, CHUNK)
            if not self.dirty.over_background():
                await trio.sleep(0.001)
                continue
            self.throttle.submitting()
            counts.start_writeback(self.dirty, pages)
            await trio.sleep(pages / self.bw)
            counts.end_writeback(self.dirty, pages)
            self.throttle.completed()

    def make_dirty(self, handle: int, pages: int) -> None:
        counts.dirtied(self.dirty, pages)
        self.throttle.dirtied(handle, pages)
        self.steps[handle] = self.steps.get(handle, 0) + pages

    async def write(self, handle: int, pages: int = STEP) -> None:
        began = trio.current_time()
        if self.throttle.must_balance(handle):
            await self.throttle.balance(handle)
        self.make_dirty(handle, pages)
        self.most = max(self.most, self.dirty.busy - self.dirty.limit)
        self.times.append(trio.current_time() - began)

    async def writer(self, handle: int) -> None:
        while True:
            await self.write(handle)
            await trio.lowlevel.checkpoint()

    def measure(self) -> None:
        """What comes now is to be looked at."""
        self.steps, self.most, self.times = {}, 0, []
        self.throttle.longest_ms = 0

    def judge(self, seconds: float) -> None:
        """Since `measure`: the device is kept busy, the writers are equal, nobody waits long."""
        assert sum(self.steps.values()) / seconds == pytest.approx(self.bw, rel=0.05)
        assert max(self.steps.values()) < 1.15 * min(self.steps.values())
        assert self.most <= STEP * len(self.steps)
        assert self.throttle.longest_ms <= 200
        assert sorted(self.times)[len(self.times) * 999 // 1000] < 0.25


@pytest.mark.parametrize("writers", [1, 8])
async def test_writers_get_what_the_device_sustains(
    writers: int, autojump_clock: trio.testing.MockClock
) -> None:
    machine = Machine()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.device)
        for handle in range(1, writers + 1):
            nursery.start_soon(machine.writer, handle)
        await trio.sleep(10)
        machine.measure()
        await trio.sleep(20)
        machine.judge(20)
        assert machine.throttle.bandwidth.avg == pytest.approx(BW, rel=0.05)
        machine.bw = BW // 5
        await trio.sleep(20)
        machine.measure()
        await trio.sleep(20)
        machine.judge(20)
        nursery.cancel_scope.cancel()


async def test_many_small_files_are_held_back_as_one_large_one_is(
    autojump_clock: trio.testing.MockClock,
) -> None:
    machine = Machine()

    async def untar() -> None:
        handle = 0
        while True:
            handle += 1
            await machine.write(handle, 1)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.device)
        nursery.start_soon(untar)
        await trio.sleep(10)
        machine.measure()
        await trio.sleep(5)
        assert sum(machine.steps.values()) / 5 == pytest.approx(BW, rel=0.05)
        assert machine.most <= 1
        assert machine.dirty.busy < machine.dirty.thresh
        nursery.cancel_scope.cancel()


def held_back(dirty: int | None = None) -> Machine:
    """A machine above free run, at its setpoint: the rate is the start's."""
    machine = Machine()
    some = machine.dirty
    counts.dirtied(some, (some.freerun + some.thresh) // 2 if dirty is None else dirty)
    machine.throttle._balanced_at = some.nr_dirtied
    return machine


async def test_free_run_knows_no_writers(autojump_clock: trio.testing.MockClock) -> None:
    machine = held_back(dirty=0)
    machine.make_dirty(1, 100)
    assert not machine.throttle.must_balance(1)
    with trio.fail_after(0):
        await machine.throttle.balance(1)
    assert machine.throttle.paused == 0


async def test_a_pause_pays_for_what_was_dirtied(autojump_clock: trio.testing.MockClock) -> None:
    machine = held_back()
    throttle = machine.throttle
    assert not throttle.must_balance(1)
    throttle._credit[1] -= 1024
    assert throttle.must_balance(1)
    began = trio.current_time()
    await throttle.balance(1)
    paused = trio.current_time() - began
    assert paused == pytest.approx(throttle.longest_ms / 1000)
    assert 0.010 <= paused <= 0.060
    assert not throttle.must_balance(1)


async def owe(throttle: Throttle, pages: int) -> None:
    """Have writer 1 pay for pages that are written already."""
    throttle._writer(1)
    throttle._credit[1] -= pages
    await throttle.balance(1)


async def test_time_spent_otherwise_is_credited(autojump_clock: trio.testing.MockClock) -> None:
    machine = held_back()
    throttle = machine.throttle
    throttle.bandwidth.start(0, 0, 0)
    await owe(throttle, 1024)
    await trio.sleep(CREDIT_MS / 1000 / 2)
    before = throttle.paused
    for _ in range(3):
        await owe(throttle, 1024)
    assert throttle.paused == before, "0.5 s are worth 12800 pages"
    await trio.sleep(2 * CREDIT_MS / 1000)
    await owe(throttle, 1024)
    assert throttle.paused == before, "too long ago, and forgotten"
    await owe(throttle, 1024)
    assert throttle.paused == before + 1


async def test_at_the_limit_nobody_goes_on(autojump_clock: trio.testing.MockClock) -> None:
    machine = held_back()
    machine.make_dirty(9, machine.dirty.limit - machine.dirty.busy)
    done: list[int] = []

    async def writer(handle: int) -> None:
        await machine.write(handle, 1)
        done.append(handle)

    async with trio.open_nursery() as nursery:
        for handle in (1, 2):
            nursery.start_soon(writer, handle)
        await trio.sleep(60)
        assert not done
        assert machine.throttle.sleeping == 2
        counts.throw_away(machine.dirty, 100)
        await trio.sleep(0.025)
        assert sorted(done) == [1, 2], "room came, and nobody looked"
    assert machine.throttle.longest_ms <= 25


async def test_a_cancelled_writer_leaves(autojump_clock: trio.testing.MockClock) -> None:
    machine = held_back(dirty=10_000)
    with trio.move_on_after(5) as scope:
        await machine.throttle.balance(1)
    assert scope.cancelled_caught
    assert machine.throttle.sleeping == 0


async def test_debts_of_the_forgotten_are_inherited(
    autojump_clock: trio.testing.MockClock,
) -> None:
    machine = held_back()
    throttle = machine.throttle
    machine.make_dirty(1, FIRST_PAGES - 1)
    for handle in range(2, WRITERS_MOST + 2):
        machine.make_dirty(handle, 0)
    throttle._balanced_at = machine.dirty.nr_dirtied
    machine.make_dirty(2, 1)
    assert throttle.must_balance(2)
    assert not throttle.must_balance(3)
