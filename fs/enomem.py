"""Allocations that failed, where they end: only under the policies that break the promise.

Under `irix` none fails and nothing here is ever called. Under the others (`alloc/policy.py`) the
allocator raises AllocationFailed, which is no OSError, so it passes every handler on its way to one
of these ends, and everything in between is tidied by `finally` and context managers:

- the reply to a request: ENOMEM (`fs/front/guard.py`), or of a write what was copied before;
- a transaction that is dirty, or a chain of them that is one change: a forced shutdown, and the
  reply;
- the writing of a folio: it stays dirty and its mapping keeps the error for the next fsync
  (`fs/writepages.py`), as it would keep an error of the device;
- work in the background: `insist` tries it again, for a while, and then shuts down.

`tests/test_no_handlers.py` knows these functions by name and allows no other.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from alloc.policy import AllocationFailed

if TYPE_CHECKING:
    from fs.volume import Volume

ERRNO = errno.ENOMEM  # what a request, or a mapping, is told
REPLY, SHUTDOWN, WRITEBACK, RETRY = ENDS = ("reply", "shutdown", "writeback", "retry")
RETRY_S = 0.1  # Linux's pause before write-back that lacked memory is tried again
TRIES = 50


class Failures:
    """How many allocations failed, by end and by site. Trio thread."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {end: Counter() for end in ENDS}

    def note(self, end: str, failed: AllocationFailed) -> None:
        """One more. A dirty transaction's counts as a shutdown and as a reply."""
        self.counts[end][f"{failed.what} {failed.site}"] += 1

    def figures(self) -> dict[str, dict[str, int]]:
        """Ends that something came to, each with its sites."""
        return {end: dict(sites) for end, sites in self.counts.items() if sites}


def failed_allocation(error: BaseException) -> AllocationFailed | None:
    """The failed allocation that an exception is, or that a nursery's group consists of."""
    if isinstance(error, BaseExceptionGroup):
        failed, rest = error.split(AllocationFailed)
        return None if failed is None or rest is not None else _first(failed)
    return error if isinstance(error, AllocationFailed) else None


def _first(group: BaseExceptionGroup[AllocationFailed]) -> AllocationFailed:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def told_less(vol: Volume, error: BaseException) -> None:
    """A request that ended early is answered with what it did, as if there had been no error."""
    failed = failed_allocation(error)
    if failed is not None:
        vol.failures.note(REPLY, failed)


def force_shutdown(vol: Volume, what: str, error: BaseException) -> None:
    """An error came where nothing can be taken back."""
    failed = failed_allocation(error)
    if failed is not None:
        vol.failures.note(SHUTDOWN, failed)
    vol.shutdown(f"{what}: {error!r}")


async def insist(vol: Volume, work: Callable[[], Awaitable[None]], what: str) -> None:
    """Do work that nobody waits for with an error in hand; a failed allocation is tried again.

    `work` begins anew each time. What still fails after some seconds is a shutdown, `what` its
    reason. Raises what the work raises otherwise.
    """
    for _ in range(TRIES):
        try:
            return await work()
        except AllocationFailed as failed:
            vol.failures.note(RETRY, failed)
        if vol.shut_down:
            return None
        await trio.sleep(RETRY_S)
    vol.shutdown(f"{what}: no memory after {TRIES} tries")
    return None
