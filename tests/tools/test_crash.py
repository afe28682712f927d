"""The crash tester: a short run of it, and proof that it finds what is broken on purpose.

Each mutation takes one thing away that keeps acknowledged data, or the format, whole. Where one is
found is seeded; which one of many points finds it does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fs.log import ail
from fs.log.cil import Cil
from fs.log.log import Log
from tests import support
from tests.conftest import AllowLogs
from tools.crash import campaign

pytestmark = [support.needs_root, pytest.mark.slow]


def tell(line: str) -> None:
    print(line)


@pytest.mark.parametrize("geometry", ["default", "1k blocks", "4k sectors"])
def test_nothing_is_lost(geometry: str) -> None:
    outcome = campaign.run(campaign.Plan(range(1, 2), 4, (geometry,)), tell)
    assert outcome.points == 4
    assert outcome.acks > 20
    assert not outcome.failures


def test_the_same_seed_gives_the_same_run(scratch: Any) -> None:
    plan = campaign.Plan(range(1))
    runs = [campaign.record("default", 5, plan, scratch) for _ in range(2)]
    places = [[(w.offset, len(w.data), w.begun, w.done) for w in r.record.writes] for r in runs]
    assert places[0] == places[1]
    assert runs[0].record.flushes == runs[1].record.flushes
    assert campaign.draw(runs[0], 3).moment == campaign.draw(runs[1], 3).moment


# -- what is broken on purpose --------------------------------------------------------------------


class Deaf:
    """A device that does not flush the n-th time it is asked to."""

    def __init__(self, inner: Any, skip: int) -> None:
        self._inner, self._left = inner, skip

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def flush(self) -> None:
        self._left -= 1
        if self._left:
            await self._inner.flush()


def no_flush(patch: pytest.MonkeyPatch, which: int) -> None:
    real = Log._write

    async def write(self: Log) -> None:
        vol = self._vol
        inner = vol.dev
        vol.dev = Deaf(inner, which)
        try:
            await real(self)
        finally:
            vol.dev = inner

    patch.setattr(Log, "_write", write)


def no_flush_after_records(patch: pytest.MonkeyPatch) -> None:
    no_flush(patch, 2)


def no_cancels(patch: pytest.MonkeyPatch) -> None:
    real = Cil._rows

    def rows(self: Cil, changes: Any) -> Any:
        changes.cancels.clear()
        return real(self, changes)

    patch.setattr(Cil, "_rows", rows)


def early_tail(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ail.Ail, "tail", lambda self: 0)


def freed_is_written_at_once(patch: pytest.MonkeyPatch) -> None:
    async def wait_freed(self: Log, fsbno: int, n: int) -> None:
        return

    patch.setattr(Log, "wait_freed", wait_freed)


def fsync_without_log(patch: pytest.MonkeyPatch) -> None:
    async def force_inode(self: Log, ip: Any) -> bool:
        return False

    patch.setattr(Log, "force_inode", force_inode)


Mutation = Callable[[pytest.MonkeyPatch], None]
MUTATIONS: list[tuple[Mutation, str]] = [
    (no_flush_after_records, "default"),
    (no_cancels, "1k blocks"),
    (early_tail, "default"),
    (freed_is_written_at_once, "default"),
    (fsync_without_log, "default"),
]


@pytest.mark.parametrize(("mutation", "geometry"), MUTATIONS)
def test_what_is_broken_is_found(
    mutation: Mutation, geometry: str, monkeypatch: pytest.MonkeyPatch, allow_logs: AllowLogs
) -> None:
    allow_logs("")
    mutation(monkeypatch)
    plan = campaign.Plan(range(1, 6), 10, (geometry,), first=True)
    outcome = campaign.run(plan, tell)
    assert any(failure.point >= 0 for failure in outcome.failures)
