"""gfp flags and scopes."""

from __future__ import annotations

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
