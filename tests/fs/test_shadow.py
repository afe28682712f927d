"""Shadows on a volume: what leaves them, what comes back by them, and who takes them away."""

from __future__ import annotations

from pathlib import Path

from alloc import gfp
from alloc.page import ACTIVE
from fs import file
from fs.cache.inode import Inode
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import a_file, opened

KIB, MIB = 1 << 10, 1 << 20


def evict_all(vol: Volume) -> None:
    for _ in range(20):
        vol.arena.reclaim.shrink_all(0, gfp.KERNEL, "direct", 1 << 20)


async def written(vol: Volume, ip: Inode, size: int) -> None:
    """A file on the device, and nothing of it cached."""
    await file.write(vol, ip, 0, bytes(size))
    await file.fsync(vol, ip)
    evict_all(vol)
    assert not vol.pages.next(ip.handle, 0, 1 << 40)


def counts(vol: Volume) -> tuple[int, int]:
    return vol.arena.vmstat["workingset_refault_file"], vol.arena.vmstat["workingset_activate_file"]


async def test_what_is_read_again_soon_is_active(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip, a_file(vol, b"other") as other:
        await file.write(vol, other, 0, bytes(MIB))
        await file.fsync(vol, other)
        for pfn in vol.pages.gang(other.handle, 0, 1000):
            vol.arena.lru.activate(pfn)
            vol.arena.get_folio(pfn)
        held = vol.pages.gang(other.handle, 0, 1000)
        await written(vol, ip, 64 * KIB)
        for pfn in held:
            vol.arena.lru.activate(pfn)
        assert vol.pages.shadows.nr_nodes == vol.arena.vmstat["workingset_nodes"] > 0
        await file.read(vol, ip, 0, 64 * KIB)
        assert counts(vol) == (16, 16)
        for pfn in vol.pages.gang(ip.handle, 0, 1000):
            assert vol.arena.pages.flags[pfn] & ACTIVE
        for pfn in held:
            vol.arena.put_folio(pfn)
        vol.arena.check()


async def test_what_is_read_again_late_is_not(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await written(vol, ip, 64 * KIB)
        await file.read(vol, ip, 0, 64 * KIB)  # nothing is active
        assert counts(vol) == (16, 0)
        assert vol.arena.lru.nr_active == 0


async def test_what_is_written_again_shows_no_working_set(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await written(vol, ip, 64 * KIB)
        await file.write(vol, ip, 0, bytes(64 * KIB))
        assert counts(vol) == (0, 0)


async def test_truncation_forgets(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await written(vol, ip, MIB)
        await file.truncate(vol, ip, 512 * KIB)
        await file.truncate(vol, ip, MIB)
        await file.write(vol, ip, 768 * KIB, b"x")
        await file.fsync(vol, ip)
        evict_all(vol)
        await file.read(vol, ip, 0, MIB)
        assert 128 < counts(vol)[0] < 192  # half a MiB, and a folio around what was written since
        await file.truncate(vol, ip, 0)
        assert not vol.pages.state(ip.handle)["node"]


async def test_shadows_leave_with_their_inode(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await written(vol, ip, 4 * MIB)
        assert vol.pages.shadows.nr_nodes > 0
        vol.pages.evict(ip.handle)
        assert vol.pages.shadows.nr_nodes == 0
        assert not vol.pages.state(ip.handle)["node"]


async def test_the_shrinker_keeps_a_node_for_eight_pages(scratch: Path) -> None:
    async with opened(support.mkfs(scratch), 16 << 20) as vol, a_file(vol) as ip:
        bound = vol.arena.nr_pages // 8
        for page in range(bound + 100):
            await file.write(vol, ip, page * 64 * 4096, b"x")
        await file.fsync(vol, ip)
        before = vol.arena.vmstat["workingset_nodereclaim"]
        assert vol.pages.shadows.count_objects() == 0
        evict_all(vol)
        assert vol.pages.shadows.nr_nodes <= bound + 1
        assert vol.arena.vmstat["workingset_nodereclaim"] - before >= 99
        assert vol.pages.shadows.nr_nodes > bound // 2
        vol.pages.evict(ip.handle)
        assert vol.pages.shadows.nr_nodes == 0
        vol.arena.check()
