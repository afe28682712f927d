"""Where a file's folios lie when memory has nodes: lanes and tasks agree, and reclaim goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio.testing

from alloc import gfp, mempolicy
from alloc.topology import topology
from fs import file, namespace
from fs.cache.inode import INODE, Inode
from fs.front.lanestate import M_HOME
from fs.volume import Volume
from tests import support
from tests.fs.dirimages import using
from tests.fs.imagefiles import a_file, opened
from tests.fs.lanes import a_desk
from tests.fs.test_file import contents, drop_caches

MIB = 1 << 20
TWO = topology(2)
DATA = bytes(range(256)) * 16


def places(vol: Volume, ip: Inode) -> list[tuple[int, int]]:
    """Of each folio of a file: which one of its order it is, and its node."""
    pages, last = vol.pages.pages, (1 << 32) - 1
    pfns = vol.pages.gang(ip.handle, 0, last)
    return [
        (int(pages.index[pfn]) >> int(pages.order[pfn]), vol.arena.node_of(pfn)) for pfn in pfns
    ]


@pytest.mark.parametrize("who", ["inode", "user", "mount"])
async def test_lanes_and_tasks_interleave_alike(
    scratch: Path, who: str, autojump_clock: trio.testing.MockClock
) -> None:
    image = support.mkfs(scratch)
    async with (
        opened(image, 64 * MIB, nodes=TWO) as vol,
        a_file(vol) as ip,
        a_file(vol, b"other") as other,
        a_desk(vol) as desk,
    ):
        number = mempolicy.parse("weighted", 2)
        vol.arena.set_weights([2, 1])
        vol.arena.balancer.enable(False)  # where folios are put, not where they go
        if who == "mount":
            vol.arena.set_mempolicy(number)
        for each in (ip, other):
            if who == "inode":
                vol.pages.set_mempolicy(each.handle, number)
        if who == "user":
            desk.users.set(0, number)
        for k in range(60):
            with desk.users.applied(0):  # what the lane parks is the user's, too
                await desk.write(ip, k * 4096, DATA)
                await file.write(vol, other, k * 4096, DATA)
        assert desk.codes["answered"] > 30
        for each in (ip, other):
            found = places(vol, each)
            assert len(found) == 60
            for at, node in found:
                assert node == (0, 0, 1)[(each.handle + at) % 3], at
        assert await contents(vol, ip) == DATA * 60
    support.assert_clean(image)


async def test_a_lane_takes_from_its_home(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    image = support.mkfs(scratch)
    async with (
        opened(image, 64 * MIB, nodes=TWO) as vol,
        a_file(vol) as ip,
        a_desk(vol) as desk,
    ):
        desk.lane.me[M_HOME] = 1
        for k in range(40):
            await desk.write(ip, k * 4096, DATA)
        homes = [node for _, node in places(vol, ip)]
        assert homes.count(1) >= desk.codes["answered"] > 20
    support.assert_clean(image)


@pytest.mark.parametrize("policy", ["local", "bind:1", "interleave"])
async def test_more_than_fits(
    scratch: Path, policy: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Four times the memory through 16 MiB of two nodes, some of it bound to one of them."""
    image = support.mkfs(scratch)
    async with opened(image, 16 * MIB, nodes=TWO) as vol, a_file(vol) as ip:
        vol.arena.set_mempolicy(mempolicy.parse(policy, 2))
        for k in range(64):
            await file.write(vol, ip, k * MIB, bytes([k]) * MIB)
        for k in range(0, 64, 5):
            assert await file.read(vol, ip, k * MIB + 5000, 100) == bytes([k]) * 100
        await drop_caches(vol)
        vol.arena.check()
    support.assert_clean(image)


async def test_names_and_inodes_are_given_back_by_node(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image, 64 * MIB, nodes=TWO) as vol, using(vol) as root:
        arena = vol.arena
        for k in range(60):
            arena.set_mempolicy(mempolicy.policy("bind", [k // 30]))
            ip = await namespace.create(vol, root, b"file%d" % k, 0o644, 0, 0)
            assert arena.node_of(ip.handle * INODE.itemsize >> 12) == k // 30
            vol.inodes.put(ip)
        arena.set_mempolicy(mempolicy.NONE)
        await vol.flusher.sync()
        await vol.flush_metadata()

        def counts(name: str) -> list[int]:
            known = [s for s in arena.reclaim.shrinkers if s.shrinker.name == name]
            assert [state.nid for state in known] == [0, 1]
            return [state.shrinker.count_objects() for state in known]

        before = counts("dentry"), counts("xfs_inode")
        assert all(min(parts) >= 30 for parts in before)
        for _ in range(3):
            arena.reclaim.shrink_all(0, gfp.KERNEL, "direct", 1 << 20, (1,), common=False)
        assert counts("dentry") == [before[0][0], 0]
        assert counts("xfs_inode") == [before[1][0], 0]
        for k in range(60):
            vol.inodes.put(await namespace.lookup(vol, root, b"file%d" % k))
    support.assert_clean(image)
