"""gfp flags and scopes."""

from __future__ import annotations

import pytest
import trio

from alloc import gfp


def test_scopes_add_flags_and_nest() -> None:
    assert gfp.effective(gfp.KERNEL) == gfp.KERNEL
    with gfp.nofs():
        assert gfp.effective(gfp.ZERO) == gfp.ZERO | gfp.NOFS
        with gfp.memalloc():
            assert gfp.effective(0) == gfp.NOFS | gfp.MEMALLOC
            with gfp.nofs():
                pass
            assert gfp.effective(0) == gfp.NOFS | gfp.MEMALLOC
        assert gfp.effective(0) == gfp.NOFS
    assert gfp.effective(0) == 0


def test_noio_implies_nofs() -> None:
    with gfp.noio():
        assert gfp.effective(0) & gfp.NOFS
    assert gfp.describe(gfp.NOIO) == "NOIO"


def test_descriptions() -> None:
    assert gfp.describe(gfp.KERNEL) == "KERNEL"
    assert gfp.describe(gfp.NOFS | gfp.ZERO | gfp.MEMALLOC) == "NOFS|MEMALLOC|ZERO"
    assert gfp.describe(gfp.NOFAIL | gfp.NOFS) == "NOFS|NOFAIL"
    assert gfp.describe(gfp.ATOMIC) == "ATOMIC"
    assert gfp.describe(gfp.NOWAIT | gfp.RETRY_MAYFAIL) == "NOWAIT|RETRY_MAYFAIL"


async def test_each_task_has_its_own_scope() -> None:
    seen: list[int] = []

    async def child() -> None:
        seen.append(gfp.effective(0))
        with gfp.memalloc():
            await trio.lowlevel.checkpoint()
            seen.append(gfp.effective(0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(child)
        with gfp.nofs():
            await trio.lowlevel.checkpoint()
            assert gfp.effective(0) == gfp.NOFS
    assert seen == [0, gfp.MEMALLOC]


@pytest.mark.parametrize("flag", [gfp.NOWAIT, gfp.NORETRY, gfp.RETRY_MAYFAIL, gfp.ATOMIC])
def test_nofail_without_permission_to_wait_is_a_bug(flag: int) -> None:
    with pytest.raises(AssertionError, match="must be allowed to wait"):
        gfp.effective(gfp.NOFAIL | flag)


def test_no_scope_turns_nofail_into_may_fail() -> None:
    for flag in (gfp.NOWAIT, gfp.NORETRY, gfp.RETRY_MAYFAIL, gfp.ATOMIC, gfp.NOFAIL, gfp.ZERO):
        with pytest.raises(AssertionError, match="no matter of a scope"):
            gfp.Scope(flag)
    with gfp.nofs(), gfp.noio(), gfp.memalloc():
        narrowed = gfp.effective(gfp.NOFAIL)
    assert narrowed & gfp.NOFAIL
    assert not narrowed & gfp.FAILABLE


def test_unknown_flags_are_refused() -> None:
    with pytest.raises(AssertionError, match="unknown gfp flags 0x1000"):
        gfp.effective(0x1000)
