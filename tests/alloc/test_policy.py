"""Policies: how they are spelled, what they decide, and that a failure says what and where."""

from __future__ import annotations

import numpy as np
import pytest
import trio

from alloc.arena import Arena
from alloc.gfp import KERNEL, MEMALLOC, NOFAIL, NOFS, NOWAIT
from alloc.policy import IRIX, AllocationFailed, Policy, parse
from tests.alloc.caches import FolioCache

RECORD = np.dtype([("key", "u8", (32,))])


@pytest.mark.parametrize(
    "text",
    [
        "irix",
        "linux",
        "mayfail",
        "inject:p=0.001,seed=7",
        "inject:nth=3",
        "inject:nth=3,order=0,site=fs.xfs.bmap",
        "inject:p=1",
    ],
)
def test_a_policy_is_printed_as_it_is_read(text: str) -> None:
    assert str(parse(text)) == text


def test_defaults() -> None:
    assert parse("irix") == IRIX == Policy("irix")
    assert parse("inject:seed=2,p=.5,") == Policy("inject", p=0.5, seed=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("solaris", "not one of irix, linux, mayfail, inject:p="),
        ("", "not one of"),
        ("linux:p=1", "linux takes no settings"),
        ("inject", "one of p= and nth= is needed"),
        ("inject:", "one of p= and nth= is needed"),
        ("inject:p=0.5,nth=3", "one of p= and nth= is needed"),
        ("inject:p=2", "p=2 is no chance"),
        ("inject:p=0", "p=0 is no chance"),
        ("inject:p=nan", "p=nan is no chance"),
        ("inject:p=often", "p=often is no chance"),
        ("inject:nth=0", "nth=0 is no number from 1"),
        ("inject:nth=1.5", "nth=1.5 is no number"),
        ("inject:nth=1,order=11", "order=11 is no number from 0 to 10"),
        ("inject:nth=1,seed=x", "seed=x is no number"),
        ("inject:nth=1,nth=2", "nth is set twice"),
        ("inject:nth=1,size=2", "'size=2' is no setting"),
        ("inject:nth", "'nth' is no setting"),
        ("inject:nth=1,site=", "'site=' is no setting"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_who_gives_up() -> None:
    """(order, flags): irix, linux, mayfail, inject."""
    table = {
        (0, KERNEL): (False, False, True, False),
        (3, KERNEL): (False, False, True, False),
        (4, KERNEL): (False, True, True, False),
        (0, MEMALLOC): (False, True, True, False),
        (0, MEMALLOC | NOFAIL): (False, False, True, False),
        (4, NOFS): (False, True, True, False),
        (4, NOFAIL): (False, False, True, False),
        (10, NOFAIL | NOFS): (False, False, True, False),
    }
    policies = [parse(text) for text in ("irix", "linux", "mayfail", "inject:nth=1")]
    found = {request: tuple(p.gives_up(*request) for p in policies) for request in table}
    assert found == table


def test_chance_depends_on_the_seed_and_the_call_alone() -> None:
    picked = {seed: [parse(f"inject:p=0.1,seed={seed}").picks(n) for n in range(1000)]
              for seed in (1, 2)}  # fmt: skip
    assert picked[1] == [parse("inject:p=0.1,seed=1").picks(n) for n in range(1000)]
    assert picked[1] != picked[2]
    assert 60 < sum(picked[1]) < 140
    assert all(parse("inject:p=1").picks(n) for n in range(10))


async def test_the_nth_call_fails_and_says_where() -> None:
    arena = Arena(8 << 20, parse("inject:nth=3"))
    pfns = [await arena.alloc_folio(0), await arena.alloc_folio(1)]
    with pytest.raises(AllocationFailed, match="page allocation failure: order:2, mode:NOFS") as e:
        await arena.alloc_folio(2, NOFS)
    assert (e.value.what, e.value.gfp) == ("order:2", NOFS)
    assert e.value.site.startswith("tests.alloc.test_policy:test_the_nth_call")
    assert not isinstance(e.value, OSError)
    pfns.append(await arena.alloc_folio(2))
    assert arena.vmstat["alloc_failed"] == 1
    for pfn in pfns:
        arena.put_folio(pfn)
    arena.check()


async def test_what_inject_counts(arena: Arena) -> None:
    """By order, by part of the site, by part of what is wanted; never a try_* request."""
    slab = arena.slab("records", RECORD)
    arena.set_policy(parse("inject:p=1,order=2"))
    arena.put_folio(await arena.alloc_folio(1))
    slab.free(await slab.alloc())
    with pytest.raises(AllocationFailed):
        await arena.alloc_folio(2)
    arena.set_policy(parse("inject:p=1,site=slab:records"))
    arena.put_folio(await arena.alloc_folio(0))
    with pytest.raises(AllocationFailed, match="slab:records"):
        await slab.alloc(NOFAIL)
    arena.set_policy(parse("inject:p=1,site=test_policy:elsewhere"))
    arena.put_folio(await arena.alloc_folio(0))

    async def elsewhere() -> int:
        return await arena.alloc_folio(0)

    arena.set_policy(parse("inject:p=1,site=elsewhere"))
    with pytest.raises(AllocationFailed):
        await elsewhere()
    arena.set_policy(parse("inject:p=1"))
    pfn = arena.try_alloc_folio(0, NOWAIT)
    assert pfn is not None
    arena.put_folio(pfn)


@pytest.mark.parametrize("policy", ["linux", "mayfail"])
async def test_a_costly_request_fails_when_nothing_can_be_reclaimed(
    arena: Arena, policy: str, allow_logs
) -> None:
    allow_logs("page allocation failure: order:4, mode:KERNEL")
    cache = FolioCache(arena)
    cache.fill(dirty=True)
    arena.set_policy(parse(policy))
    with trio.fail_after(10), pytest.raises(AllocationFailed) as e:
        await arena.alloc_folio(4)
    assert e.value.what == "order:4"
    assert len(arena.queue) == 0
    cache.drop()


async def test_nofail_is_honoured_by_linux_and_not_by_mayfail(
    arena: Arena, autojump_clock: object, allow_logs
) -> None:
    allow_logs("page allocation failure: order:0, mode:NOFAIL")
    cache = FolioCache(arena)
    cache.fill(dirty=True)
    arena.set_policy(parse("linux"))
    with trio.move_on_after(1) as waited:
        await arena.alloc_folio(7, NOFAIL)  # more than the reserve
    assert waited.cancelled_caught
    arena.set_policy(parse("mayfail"))
    with trio.fail_after(10), pytest.raises(AllocationFailed):
        while True:
            cache.insert(await arena.alloc_folio(0, NOFAIL), dirty=True)
    assert arena.free_pages >= arena.marks.min // 2
    cache.drop()
