"""Folios of files migrate to the node of the lanes and tasks that use them; data stays whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from alloc import mempolicy
from alloc.balance import THRESHOLD, TICK_S
from alloc.topology import topology
from fs import file
from fs.cache.inode import Inode
from fs.front.lanestate import M_HOME
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import a_file, opened
from tests.fs.lanes import Desk, a_desk
from tests.fs.test_numa import places

MIB = 1 << 20
SIZE = 128 << 10
TWO = topology(2)
DATA = bytes(range(256)) * (SIZE >> 8)


def nodes(vol: Volume, ip: Inode) -> set[int]:
    return {node for _, node in places(vol, ip)}


async def use(vol: Volume, ip: Inode, desk: Desk, how: str) -> None:
    """Once all of the file, by somebody at home on node 1."""
    if how == "lane reads":
        assert await desk.read(ip, 0, SIZE) == DATA
    elif how == "lane writes":
        for pos in range(0, SIZE, 4096):
            await desk.write(ip, pos, DATA[pos : pos + 4096])
    elif how == "task reads":
        assert await file.read(vol, ip, 0, SIZE) == DATA
    else:
        await file.write(vol, ip, 0, DATA)


@pytest.mark.parametrize("how", ["lane reads", "lane writes", "task reads", "task writes"])
@pytest.mark.parametrize("step", [4096, SIZE])
async def test_a_file_follows_its_users(
    scratch: Path, how: str, step: int, autojump_clock: trio.testing.MockClock
) -> None:
    image = support.mkfs(scratch)
    async with (
        opened(image, 64 * MIB, nodes=TWO) as vol,
        a_file(vol) as ip,
        a_desk(vol) as desk,
    ):
        for pos in range(0, SIZE, step):
            await file.write(vol, ip, pos, DATA[pos : pos + step])
        await file.fsync(vol, ip)
        assert nodes(vol, ip) == {0}
        desk.lane.me[M_HOME] = 1
        with mempolicy.at_home(1):
            for _ in range(2 * THRESHOLD):
                await use(vol, ip, desk, how)
        assert how.startswith("task") or desk.codes["answered"] > THRESHOLD
        await trio.sleep(2 * TICK_S)
        assert nodes(vol, ip) == {1}
        assert vol.arena.vmstat["numa_pages_migrated"] >= SIZE >> 12
        assert await file.read(vol, ip, 0, SIZE) == DATA
        vol.arena.check()
    async with opened(image) as vol, a_file(vol) as ip:
        assert await file.read(vol, ip, 0, SIZE) == DATA
    support.assert_clean(image)


async def test_an_inodes_policy_keeps_it_where_it_says(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    image = support.mkfs(scratch)
    async with opened(image, 64 * MIB, nodes=TWO) as vol, a_file(vol) as ip:
        vol.pages.set_mempolicy(ip.handle, mempolicy.parse("bind:0", 2))
        await file.write(vol, ip, 0, DATA)
        await file.fsync(vol, ip)
        with mempolicy.at_home(1):
            for _ in range(2 * THRESHOLD):
                await file.read(vol, ip, 0, SIZE)
        await trio.sleep(2 * TICK_S)
        assert nodes(vol, ip) == {0}
        assert vol.arena.vmstat["numa_migrate_policy"] > 0
        assert vol.arena.vmstat["numa_pages_migrated"] == 0
