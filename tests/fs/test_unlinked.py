"""Unlinked lists: many inodes in one bucket, taken off in any order."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fs.cache.inode import Inode
from fs.errors import Corrupt
from fs.volume import Volume
from fs.xfs import ag, inobt, unlinked
from fs.xfs import layout as L
from tests import support
from tests.fs.test_inobt import drop, make, opened


async def lists(vol: Volume) -> dict[tuple[int, int], list[int]]:
    """Every list that is not empty."""
    found = {}
    async with vol.reader() as tp:
        for agno in range(vol.geo.agcount):
            heads = (await ag.read_agi(tp, agno)).rec(L.AGI)["unlinked"]
            for bucket in range(unlinked.BUCKETS):
                if heads[bucket] != L.NULL32:
                    found[agno, bucket] = await unlinked.list_bucket(tp, agno, bucket)
    return found


def model(vol: Volume, made: list[Inode]) -> dict[tuple[int, int], list[int]]:
    """The lists that these inodes, in order of insertion, must be on."""
    wanted: dict[tuple[int, int], list[int]] = {}
    for ip in made:
        agno, agino = vol.geo.ino_agno(ip.ino), vol.geo.ino_agino(ip.ino)
        wanted.setdefault((agno, agino % 64), []).insert(0, agino)
    return wanted


@pytest.mark.parametrize("remember", [True, False], ids=["hints", "walks"])
async def test_any_order(tmp_path: Path, remember: bool) -> None:
    """Taken off by the in-core hint, and by walking when there is none or a wrong one."""
    path = support.mkfs(tmp_path)
    rng = random.Random(5)
    async with opened(path) as vol:
        made = [await make(vol, vol.geo.root_ino) for _ in range(400)]
        assert await lists(vol) == model(vol, made)
        assert max(map(len, (await lists(vol)).values())) > 4
        while made:
            ip = made.pop(rng.randrange(len(made)))
            if not remember:
                ip.unlinked_prev = rng.choice([0, vol.geo.ino_agino(vol.geo.root_ino)])
            await drop(vol, ip)
            if len(made) % 40 == 0:
                await vol.flush_metadata()
                assert await lists(vol) == model(vol, made)
        assert await lists(vol) == {}
    support.assert_clean(path)


async def test_pack_keeps_the_link(tmp_path: Path) -> None:
    """Writing an inode back does not touch the link that its cluster holds."""
    path = support.mkfs(tmp_path)
    async with opened(path) as vol:
        made = [await make(vol, vol.geo.root_ino) for _ in range(200)]
        for ip in made:
            async with vol.transaction("setattr") as tp:
                await tp.lock_inodes(ip)
                ip.mtime = 7 * 10**18
                tp.log_inode(ip)
        await vol.flush_metadata()
        assert await lists(vol) == model(vol, made)
        for ip in made:
            await drop(vol, ip)
    support.assert_clean(path)


async def test_faults(tmp_path: Path, allow_logs: Any) -> None:
    """Twice on the list, or not on it: corruption, before anything is changed."""
    allow_logs("corrupt unlinked list")
    path = support.mkfs(tmp_path)
    async with opened(path) as vol:
        ip = await make(vol, vol.geo.root_ino)
        with pytest.raises(Corrupt, match="on it already"):
            async with vol.transaction("truncate") as tp:
                await unlinked.insert(tp, ip)
        await drop_list(vol, ip)
        with pytest.raises(Corrupt, match="not on it"):
            async with vol.transaction("truncate") as tp:
                await unlinked.remove(tp, ip)
        assert not vol.shut_down
        async with vol.transaction("truncate", inobt.free_blocks(vol.geo)) as tp:
            await inobt.free(tp, ip)
        vol.inodes.put(ip)
    support.assert_clean(path)


async def drop_list(vol: Volume, ip: Inode) -> None:
    async with vol.transaction("truncate") as tp:
        await unlinked.remove(tp, ip)
