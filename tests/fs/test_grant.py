"""The grant heads: order of service, what is never exceeded, and the sums, against naive models."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc import lockdep
from fs.errors import ShutDown
from fs.log import grant, reservation
from fs.log.grant import Context, Grant, Overrun, Ticket

BB = 512
RING = 1 << 20
START = 5 << 32 | 7


@pytest.fixture(autouse=True)
def no_validator() -> Iterator[None]:
    """Here one task has several tickets, which would deadlock anywhere else."""
    with lockdep.using(None):
        yield


def plain(payload: int) -> int:
    """A payload costs nothing more."""
    return payload


def make(
    ring: int = RING,
    unit: Callable[[int], int] = plain,
    push: Callable[[int], None] = lambda lsn: None,
) -> Grant:
    return Grant(ring, unit, push, START, START)


def move_tail(heads: Grant, nbytes: int) -> None:
    heads.moved_tail(grant.lsn_add(heads.tail, nbytes, heads.ring))


async def write(heads: Grant, nbytes: int) -> None:
    """Put bytes into the log, as somebody who reserves them, commits, and is checkpointed."""
    ticket = await heads.reserve("write", nbytes)
    context = heads.context("checkpoint")
    context.take(ticket, nbytes)
    ticket.release()
    context.wrote(nbytes)
    context.release()


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked()


# -- LSNs -----------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 400), st.integers(0, 400))
def test_lsns_count_like_numbers(bbs: int, start: int, more: int) -> None:
    def lsn(position: int) -> int:
        return 1 + position // bbs << 32 | position % bbs

    ring = bbs * BB
    assert grant.lsn_add(lsn(start), more * BB, ring) == lsn(start + more)
    assert grant.lsn_distance(lsn(start), lsn(start + more), ring) == more * BB


# -- lines ----------------------------------------------------------------------------------------


async def test_first_come_first_served() -> None:
    """The first waiter needs the whole log; the others would fit, and do not pass it."""
    heads = make()
    served: dict[str, Ticket] = {}

    async def come(name: str, nbytes: int) -> None:
        served[name] = await heads.reserve(name, nbytes)

    first = await heads.reserve("holder", RING // 2)
    async with trio.open_nursery() as nursery:
        for name, nbytes in (("large", heads.size), ("small", BB), ("tiny", 1)):
            nursery.start_soon(come, name, nbytes)
            await settled()
        assert not served
        assert heads.try_now("lane", 1) is None, "nobody passes, not by trying either"
        assert [w.name for w in heads.waiters()] == ["large", "small", "tiny"]
        assert {w.head for w in heads.waiters()} == {"reserve"}
        assert (heads.xs_try_logspace, heads.xs_sleep_logspace) == (5, 3)
        first.release()
        await settled()
        assert list(served) == ["large"]
        served["large"].release()
    assert served.keys() == {"large", "small", "tiny"}
    assert heads.waiters() == []


async def test_the_line_ends_where_space_does() -> None:
    heads = make()
    first = await heads.reserve("holder", heads.size)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(heads.reserve, "one", heads.size // 2)
        await settled()
        first.release()
        await settled()
        assert len(heads.waiters()) == 1
        nursery.cancel_scope.cancel()
    assert heads.waiters() == []


async def test_a_cancelled_waiter_lets_the_next_one_in() -> None:
    heads = make()
    await heads.reserve("holder", RING // 2)
    scope = trio.CancelScope()

    async def come_and_go() -> None:
        with scope:
            await heads.reserve("large", RING // 2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come_and_go)
        await settled()
        nursery.start_soon(heads.reserve, "small", BB)
        await settled()
        assert len(heads.waiters()) == 2
        scope.cancel()
        await settled()
        assert heads.waiters() == []
    assert heads.reserve_head == RING // 2 + BB, "the small one has what it was promised"


async def test_waiting_has_a_name_and_a_beginning(autojump_clock: object) -> None:
    heads = make()
    ticket = await heads.reserve("holder", heads.size)
    async with trio.open_nursery() as nursery:
        await trio.sleep(3)
        since = trio.current_time()
        nursery.start_soon(heads.reserve, "truncate", 1000)
        await trio.sleep(5)
        assert heads.waiters() == [grant.Waiter("truncate", "reserve", 1000, since)]
        ticket.release()


async def test_after_a_shutdown_nobody_waits() -> None:
    heads = make()
    ticket = await heads.reserve("chain", RING // 2)
    errors: list[str] = []

    async def come(name: str, call: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(ShutDown):
            await call()
        errors.append(name)

    async with trio.open_nursery() as nursery:
        other = await heads.reserve("holder", RING // 4)
        nursery.start_soon(come, "new", lambda: heads.reserve("new", RING // 2))
        await settled()
        heads.give_up()
    heads.give_up()
    await come("late", lambda: heads.reserve("late", 1))
    await come("rolling", ticket.regrant)
    with pytest.raises(ShutDown):
        heads.try_now("lane", 1)
    assert errors == ["new", "late", "rolling"]
    for held in (ticket, other, ticket):
        held.release()
    assert (heads.reserve_head, heads.write_head) == (0, 0)


async def test_too_much_for_any_log() -> None:
    heads = make()
    with pytest.raises(AssertionError, match="never fit"):
        await heads.reserve("giant", RING // 4, 4)


async def test_the_validator_knows_who_has_log_space() -> None:
    heads = make()
    task = trio.lowlevel.current_task()
    with lockdep.using(lockdep.Lockdep()):
        assert lockdep.current is not None
        with lockdep.holding("outer"):
            ticket = await heads.reserve("one", BB)
        assert lockdep.held_by(task) == [grant.LOG_SPACE]
        await ticket.regrant()
        with lockdep.holding("inner"):
            pass
        ticket.release()
        ticket.release()
        assert lockdep.held_by(task) == []
        found = heads.try_now("lane", BB)
        assert found is not None
        assert lockdep.held_by(task) == [grant.LOG_SPACE]
        found.release()
        orders = lockdep.current.orders()
        assert sorted(orders) == [(grant.LOG_SPACE, "inner"), ("outer", grant.LOG_SPACE)]
        assert lockdep.current.reports == []


# -- rolling --------------------------------------------------------------------------------------


async def test_units_in_hand_need_no_waiting() -> None:
    heads = make()
    ticket = await heads.reserve("chain", heads.size // 4, 3)
    other = await heads.reserve("other", heads.size // 4)
    context = heads.context("checkpoint")
    for more in (2, 1, 0):
        assert ticket.more == more
        assert ticket.left == ticket.unit
        context.take(ticket, 1000)
        if more:
            await ticket.regrant()
    assert heads.write_head == ticket.unit - 1000 + 3000 + other.unit
    ticket.release()
    assert heads.reserve_head == heads.write_head == 3000 + other.unit


async def test_rolling_comes_before_newcomers() -> None:
    """Its promise is in the reserve head while it waits, so no newcomer takes the space."""
    heads = make()
    await write(heads, RING // 2)
    ticket = await heads.reserve("chain", RING // 4)
    context = heads.context("checkpoint")
    context.take(ticket, RING // 4)
    context.wrote(RING // 4)
    other = await heads.reserve("other", RING // 8)
    served: list[str] = []

    async def roll() -> None:
        await ticket.regrant()
        served.append("roll")

    async def come() -> None:
        await heads.reserve("new", RING // 8)
        served.append("new")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(roll)
        await settled()
        nursery.start_soon(come)
        await settled()
        assert [(w.name, w.head) for w in heads.waiters()] == [
            ("chain", "write"),
            ("new", "reserve"),
        ]
        assert heads.reserve_head == heads.write_head + ticket.unit
        other.release()  # enough for the newcomer, if it were alone
        await settled()
        assert served == []
        move_tail(heads, RING // 8)
        await settled()
        assert served == ["roll"]
        assert ticket.left == ticket.unit
        move_tail(heads, RING // 4)
    assert served == ["roll", "new"]


async def test_a_cancelled_chain_keeps_nothing() -> None:
    heads = make()
    await write(heads, RING // 2)
    ticket = await heads.reserve("chain", RING // 4)
    context = heads.context("checkpoint")
    context.take(ticket, RING // 4)
    context.wrote(RING // 4)
    other = await heads.reserve("other", RING // 8)
    with trio.move_on_after(0):
        await ticket.regrant()
    assert (ticket.left, heads.waiters()) == (0, [])
    assert heads.reserve_head == heads.write_head == other.unit
    ticket.release()
    other.release()
    assert (heads.reserve_head, heads.write_head) == (0, 0)


# -- checkpoints ----------------------------------------------------------------------------------


def unit_of(sunit: int, iclog_size: int) -> Callable[[int], int]:
    geo: Any = SimpleNamespace(log_sunit=sunit)
    return lambda payload: reservation.unit_bytes(geo, payload, iclog_size)


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 300_000), min_size=1, max_size=30),
    st.sampled_from([0, 4096, 32768, 262144]),
    st.sampled_from([16384, 32768, 262144]),
)
def test_a_unit_pays_for_its_part_of_any_checkpoint(
    payloads: list[int], sunit: int, iclog_size: int
) -> None:
    """Whatever is collected already, a payload costs no more than it does alone."""
    unit = unit_of(sunit, iclog_size)
    heads = make(1 << 30, unit)
    context = heads.context("checkpoint")
    for payload in payloads:
        ticket = heads.try_now("one", payload)
        assert ticket is not None
        context.take(ticket, payload)
        ticket.release()
        assert heads.write_head == heads.reserve_head == context.left == unit(context.payload)


async def test_smaller_vectors_give_back() -> None:
    unit = unit_of(0, 32768)
    heads = make(unit=unit)
    context = heads.context("checkpoint")
    first = await heads.reserve("first", 100_000)
    context.take(first, 100_000)
    assert first.left == 0
    context.take(first, -60_000)
    assert context.left == unit(40_000)
    assert first.left == unit(100_000) - unit(40_000)
    first.release()
    context.wrote(512 * (unit(40_000) // 512))
    context.release()
    assert (heads.reserve_head, heads.write_head) == (0, 0)
    assert heads.head == grant.lsn_add(START, heads.occupied, RING)


async def test_overruns_report_and_change_nothing() -> None:
    heads = make(unit=unit_of(0, 32768))
    ticket = await heads.reserve("truncate", 1000, 2)
    context = heads.context("checkpoint 7")
    with pytest.raises(Overrun) as found:
        context.take(ticket, 1100)
    cost = heads.unit(1100)
    assert str(found.value).splitlines() == [
        "Transaction log reservation overrun: truncate",
        "  log items: 1100 bytes",
        f"  record headers: {cost - 1100} bytes",
        "  ctx ticket: 0 bytes",
        "ticket reservation summary: truncate",
        f"  unit res    = {ticket.unit} bytes",
        f"  current res = {ticket.unit} bytes",
        "  original count  = 2",
        "  remaining count = 2",
    ]
    assert (context.left, ticket.left) == (0, ticket.unit)
    context.take(ticket, 1000)
    with pytest.raises(Overrun, match="ctx ticket reservation ran out") as found:
        context.wrote(context.left // 512 * 512 + 512)
    assert "checkpoint 7" in str(found.value)
    assert heads.occupied == 0


# -- pushing --------------------------------------------------------------------------------------


async def test_the_tail_is_pushed_below_a_quarter() -> None:
    pushed: list[int] = []
    heads = make(push=pushed.append)
    await write(heads, RING // 2)
    assert pushed == []
    await write(heads, RING // 4)
    assert pushed, "less than a quarter is free"
    lacking = grant.lsn_distance(heads.tail, pushed[-1], RING)
    assert 0 <= lacking - (heads.size // 4 - (heads.size - RING * 3 // 4)) < BB
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heads.reserve, "large", RING // 2)
        await settled()
        lacking = grant.lsn_distance(heads.tail, pushed[-1], RING)
        assert 0 <= lacking - (RING // 2 - heads.free) < BB, "as much as the waiter needs"
        move_tail(heads, lacking)


async def test_a_tail_that_moved_too_little_is_pushed_again() -> None:
    pushed: list[int] = []
    heads = make(push=pushed.append)
    await write(heads, RING // 2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heads.reserve, "large", RING * 3 // 4)
        await settled()
        target = pushed[-1]
        pushed.clear()
        move_tail(heads, RING // 8)
        assert len(heads.waiters()) == 1
        assert pushed == [target], "it is still the same that is lacking"
        move_tail(heads, RING // 4)


async def test_what_only_a_checkpoint_has_is_pushed_too() -> None:
    """Nothing is written yet, so nothing can go home: the target is the head."""
    pushed: list[int] = []
    heads = make(push=pushed.append)
    ticket = await heads.reserve("one", RING // 2)
    context = heads.context("checkpoint")
    context.take(ticket, RING // 2)
    ticket.release()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heads.reserve, "two", RING // 2)
        await settled()
        assert pushed[-1] == heads.head
        context.wrote(RING // 2)
        context.release()
        move_tail(heads, RING // 2)


# -- against a model ------------------------------------------------------------------------------


class Model:
    """Lists of who has what; served by looking at everything again."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.occupied = 0
        self.collected = 0
        self.had: dict[int, list[int]] = {}  # [unit, left, more]
        self.line: list[tuple[int, int, int]] = []  # (who, unit, count)
        self.rolling: list[int] = []

    def written(self) -> int:
        return sum(left + unit * more for unit, left, more in self.had.values()) + self.collected

    def promised(self) -> int:
        return self.written() + sum(self.had[who][0] for who in self.rolling)

    def serve(self) -> None:
        while self.rolling:
            mine = self.had[self.rolling[0]]
            if self.occupied + self.written() + mine[0] > self.size:
                break
            mine[1] = mine[0]
            self.rolling.pop(0)
        while self.line:
            who, unit, count = self.line[0]
            if self.occupied + self.promised() + unit * count > self.size:
                break
            self.had[who] = [unit, unit, count - 1]
            self.line.pop(0)


class Run:
    """The same steps for the model and for the heads, whose tasks wait where they must."""

    def __init__(self, seed: int, nursery: trio.Nursery) -> None:
        self.random = random.Random(seed)
        self.nursery = nursery
        self.heads = make(64 * BB)
        self.model = Model(self.heads.size)
        self.context: Context = self.heads.context("checkpoint")
        self.tickets: dict[int, Ticket] = {}
        self.scopes: dict[int, trio.CancelScope] = {}
        self.number = 0

    async def _wait(self, who: int, call: Callable[[], Awaitable[Ticket | None]]) -> None:
        with trio.CancelScope() as self.scopes[who]:
            ticket = await call()
            if ticket is not None:
                self.tickets[who] = ticket
        del self.scopes[who]

    def reserve(self) -> None:
        self.number += 1
        who, unit, count = self.number, self.random.randint(1, 20 * BB), self.random.randint(1, 3)
        self.model.line.append((who, unit, count))
        self.nursery.start_soon(self._wait, who, lambda: self.heads.reserve(str(who), unit, count))

    def try_now(self) -> None:
        self.number += 1
        unit = self.random.randint(1, 20 * BB)
        found = self.heads.try_now(str(self.number), unit)
        fits = self.model.occupied + self.model.promised() + unit <= self.model.size
        assert (found is not None) == (fits and not self.model.line)
        if found is not None:
            self.tickets[self.number] = found
            self.model.had[self.number] = [unit, unit, 0]

    def _someone(self) -> int | None:
        idle = sorted(self.tickets.keys() - set(self.model.rolling))
        return self.random.choice(idle) if idle else None

    def commit(self) -> None:
        if (who := self._someone()) is not None:
            nbytes = self.random.randint(0, self.tickets[who].left)
            self.context.take(self.tickets[who], nbytes)
            self.model.had[who][1] -= nbytes
            self.model.collected += nbytes

    def roll(self) -> None:
        if (who := self._someone()) is None:
            return
        mine, ticket = self.model.had[who], self.tickets[who]
        mine[1] = 0
        if mine[2]:
            mine[1:] = [mine[0], mine[2] - 1]
        else:
            self.model.rolling.append(who)
        self.nursery.start_soon(self._wait, who, ticket.regrant)

    def release(self) -> None:
        if (who := self._someone()) is not None:
            self.tickets.pop(who).release()
            del self.model.had[who]

    def checkpoint(self) -> None:
        nbytes = self.context.left // BB * BB
        self.context.wrote(nbytes)
        self.context.release()
        self.context = self.heads.context("checkpoint")
        self.model.occupied += nbytes
        self.model.collected = 0

    def move_tail(self) -> None:
        nbytes = self.random.randint(0, self.model.occupied // BB) * BB
        move_tail(self.heads, nbytes)
        self.model.occupied -= nbytes

    def cancel(self) -> None:
        if self.scopes:
            who = self.random.choice(sorted(self.scopes))
            self.scopes[who].cancel()
            self.model.line = [entry for entry in self.model.line if entry[0] != who]
            if who in self.model.rolling:
                self.model.rolling.remove(who)

    def compare(self) -> None:
        heads, model = self.heads, self.model
        assert (heads.occupied, heads.write_head) == (model.occupied, model.written())
        assert heads.reserve_head == model.promised()
        assert heads.occupied + heads.write_head <= heads.size
        assert {who: [t.unit, t.left, t.more] for who, t in self.tickets.items()} == model.had
        names = [str(who) for who in model.rolling] + [str(who) for who, *_ in model.line]
        assert [w.name for w in heads.waiters()] == names


@pytest.mark.parametrize("seed", range(40))
async def test_random_steps_agree_with_the_model(seed: int) -> None:
    async with trio.open_nursery() as nursery:
        run = Run(seed, nursery)
        steps = [
            run.reserve, run.reserve, run.try_now, run.commit, run.commit, run.roll, run.release,
            run.checkpoint, run.move_tail, run.cancel,
        ]  # fmt: skip
        for _ in range(300):
            run.random.choice(steps)()
            await settled()
            run.model.serve()
            run.compare()
        nursery.cancel_scope.cancel()
