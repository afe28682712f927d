"""Totals for statfs: kept until they are stale, and never kept when they became so meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from fs import file
from fs.front import statfs
from fs.space import T_AVAIL, T_BLOCKS, T_FFREE, T_FILES, T_FREE, T_VALID
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import a_file, opened


async def test_lanes_find_what_the_reply_said(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        assert not vol.space.totals[T_VALID]
        vol.space.open_stash()
        before = await statfs.statfs(vol)
        totals = vol.space.totals
        assert totals[T_VALID] == 1
        assert totals[T_BLOCKS] == before.f_blocks
        assert totals[T_FREE] == totals[T_AVAIL] == before.f_bavail == vol.space.available
        assert (totals[T_FILES], totals[T_FFREE]) == (before.f_files, before.f_ffree)
        await file.write(vol, ip, 0, bytes(100 * vol.geo.block_size))
        assert not totals[T_VALID]
        after = await statfs.statfs(vol)
        assert after.f_bfree <= before.f_bfree - 100
        await file.fsync(vol, ip)
        assert not totals[T_VALID]


async def test_a_change_while_counting_is_not_lost(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(support.mkfs(scratch)) as vol:
        count = statfs._count_inodes

        async def slowly(vol: Volume) -> tuple[int, int]:
            figures = await count(vol)
            vol.space.reserve_delalloc(10)
            await trio.lowlevel.checkpoint()
            return figures

        monkeypatch.setattr(statfs, "_count_inodes", slowly)
        await statfs.refresh(vol)
        assert not vol.space.totals[T_VALID]
        vol.space.release_delalloc(10)
        monkeypatch.setattr(statfs, "_count_inodes", count)
        await statfs.refresh(vol)
        assert vol.space.totals[T_VALID]
