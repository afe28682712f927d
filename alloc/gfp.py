"""gfp flags: how an allocation may obtain its memory, and the scopes that narrow it.

KERNEL is 0: wait, reclaim, do I/O, enter the filesystem; the other flags restrict that or lift a
bound. A scope (a transaction, write-back) adds its flags to every request of its task until it is
left; it nests, follows the trio task, and changes how memory is found, never whether: nothing turns
a request that cannot fail into one that can.

| flag          | sleeps | direct reclaim   | I/O, fs | reserve         | may fail (then try_*)    |
| ------------- | ------ | ---------------- | ------- | --------------- | ------------------------ |
| KERNEL        | yes    | yes              | yes yes | none            | policy=linux: order > 3  |
| NOFAIL        | yes    | without end      | yes yes | half, if stuck  | never                    |
| RETRY_MAYFAIL | no     | all of it        | yes yes | none            | when little is left      |
| NORETRY       | no     | one light round  | yes yes | none            | common                   |
| NOWAIT        | no     | no, wakes kswapd | -       | none            | common                   |
| ATOMIC        | no     | no, wakes kswapd | -       | 5/8 of `min`    | seldom                   |
| NOFS, NOIO    | -      | NOIO: clean only | NO: off | irix: as NOFAIL | as without it            |
| MEMALLOC      | -      | never            | -       | everything      | policy=linux: when empty |
| NOMEMALLOC    | -      | -                | -       | not MEMALLOC's  | as without it            |
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from types import TracebackType

KERNEL = 0
NOFS = 1
NOIO = 2 | NOFS
NOWAIT = 4
NORETRY = 8
RETRY_MAYFAIL = 16
MEMALLOC = 32
ZERO = 64
NOFAIL = 128
ATOMIC = 256 | NOWAIT
NOMEMALLOC = 512  # a scope's MEMALLOC is not for this request; of try_* only

COSTLY_ORDER = 3  # larger requests are costly: Linux gives up on them after one round

FAILABLE = NOWAIT | NORETRY | RETRY_MAYFAIL
SCOPED = NOIO | MEMALLOC

# Where memory lies, not how it is obtained: among what can be evicted, or what a shrinker gives
# back; by itself if neither is said.
MOVABLE = 1 << 16
RECLAIMABLE = 2 << 16
MT_SHIFT = 16

ALL = NOIO | FAILABLE | MEMALLOC | ZERO | NOFAIL | ATOMIC | NOMEMALLOC | MOVABLE | RECLAIMABLE

_scope: ContextVar[int] = ContextVar("gfp_scope", default=0)
current_scope = _scope.get


class Scope:
    """`with nofs(): ...`: adds its flags to every request of this task until it is left."""

    __slots__ = ("_flags", "_token")

    def __init__(self, flags: int) -> None:
        assert flags & ~SCOPED == 0, f"{describe(flags)} is no matter of a scope"
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


def check(gfp: int) -> None:
    """AssertionError for flags that contradict each other or do not exist: a caller's bug."""
    assert gfp & ~ALL == 0, f"unknown gfp flags {gfp:#x}"
    assert not (gfp & NOFAIL and gfp & FAILABLE), (
        f"{describe(gfp)}: a request that cannot fail must be allowed to wait as long as it takes"
    )
    assert not gfp & ATOMIC & ~NOWAIT or gfp & NOWAIT, "ATOMIC implies NOWAIT"


def effective(gfp: int) -> int:
    """The flags of a request as narrowed by the scopes of the current task."""
    check(gfp)
    gfp |= _scope.get()
    return gfp & ~MEMALLOC if gfp & NOMEMALLOC else gfp


def describe(gfp: int) -> str:
    """Flags by name, as they stand in stall reports: `NOFS|ZERO`, `KERNEL`."""
    words = ["NOIO"] if gfp & 2 else ["NOFS"] if gfp & NOFS else []
    for name, bit in (
        ("NOFAIL", NOFAIL),
        ("ATOMIC", ATOMIC & ~NOWAIT),
        ("NOWAIT", 0 if gfp & ATOMIC & ~NOWAIT else NOWAIT),
        ("NORETRY", NORETRY),
        ("RETRY_MAYFAIL", RETRY_MAYFAIL),
        ("MEMALLOC", MEMALLOC),
        ("NOMEMALLOC", NOMEMALLOC),
        ("ZERO", ZERO),
    ):
        if gfp & bit:
            words.append(name)
    return "|".join(words) or "KERNEL"
