"""gfp flags: how an allocation may obtain its memory, and the scopes that narrow it.

Every flag *restricts* (or, MEMALLOC, lifts) what a plain request may do, so flags combine with
`|` and KERNEL, the plain request, is 0: it may wait, reclaim, do I/O and call into the filesystem.

A scope is entered where the reason lies (a transaction, the writeback path) and holds for every
allocation of that task until it is left; scopes nest and only ever add flags. They live in a
context variable, so each trio task has its own. A scope changes how memory is found, never
whether: nothing turns a request that cannot fail into one that can.

| flag     | meaning                                                                       |
| -------- | ----------------------------------------------------------------------------- |
| NOFS     | reclaim must not enter the filesystem; a waiter may use half of `min`         |
| NOIO     | reclaim must not cause I/O either (implies NOFS)                              |
| NOWAIT   | try_* only: the free lists as they are, plus a nudge to kswapd                |
| NORETRY  | try_* only: one light round of direct reclaim, then None                      |
| MAYFAIL  | try_* only: all of direct reclaim, then None                                  |
| MEMALLOC | the caller's work frees memory: the whole reserve is open to it              |
| ZERO     | the memory comes back zeroed                                                  |
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from types import TracebackType

KERNEL = 0
NOFS = 1
NOIO = 2 | NOFS
NOWAIT = 4
NORETRY = 8
MAYFAIL = 16
MEMALLOC = 32
ZERO = 64

FAILABLE = NOWAIT | NORETRY | MAYFAIL
ALL = NOIO | FAILABLE | MEMALLOC | ZERO

_scope: ContextVar[int] = ContextVar("gfp_scope", default=0)
current_scope = _scope.get


class Scope:
    """`with nofs(): ...`: adds its flags to every request of this task until it is left."""

    __slots__ = ("_flags", "_token")

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._token: Token[int] | None = None

    def __enter__(self) -> None:
        assert self._token is None, "a gfp scope is entered once"
        self._token = _scope.set(_scope.get() | self._flags)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._token is not None, "a gfp scope is left by who entered it"
        _scope.reset(self._token)
        self._token = None


def nofs() -> Scope:
    """Reclaim on behalf of this task stays out of the filesystem (a transaction is open)."""
    return Scope(NOFS)


def noio() -> Scope:
    """Reclaim on behalf of this task causes no I/O."""
    return Scope(NOIO)


def memalloc() -> Scope:
    """This task frees memory for others: the reserve is open to it."""
    return Scope(MEMALLOC)


def effective(gfp: int) -> int:
    """The flags of a request as narrowed by the scopes of the current task."""
    assert gfp & ~ALL == 0, f"unknown gfp flags {gfp:#x}"
    return gfp | _scope.get()


def describe(gfp: int) -> str:
    """Flags by name, as they stand in stall reports: `NOFS|ZERO`, `KERNEL`."""
    words = ["NOIO"] if gfp & 2 else ["NOFS"] if gfp & NOFS else []
    for name, bit in (
        ("NOWAIT", NOWAIT),
        ("NORETRY", NORETRY),
        ("MAYFAIL", MAYFAIL),
        ("MEMALLOC", MEMALLOC),
        ("ZERO", ZERO),
    ):
        if gfp & bit:
            words.append(name)
    return "|".join(words) or "KERNEL"
