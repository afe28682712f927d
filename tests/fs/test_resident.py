"""Making and removing in one go against the general path: the same operations, the same image.

A run from a seed is done twice on copies of one image, once with the short way closed, with time
and generation numbers the same; then both images must be equal, byte for byte. The general path is
the naive twin of all kernels in fs/xfs/resident*.py, and is itself judged elsewhere. What the
short way takes is counted, so that it cannot pass by doing nothing.
"""

from __future__ import annotations

import random
import shutil
import stat
from pathlib import Path

import pytest

from fs import namespace, volume
from fs.cache.inode import Inode
from fs.device.image import ImageFile
from fs.volume import Volume
from fs.xfs import inobt, residentino, residentname, stamp
from fs.xfs import layout as L
from tests import support
from tests.fs.dirimages import opened, using

IMAGES = {
    **support.GEOMETRIES,
    "no finobt": ("-m", "finobt=0,reflink=0"),
    "no sparse inodes": ("-i", "sparse=0"),
    "no bigtime": ("-m", "bigtime=0"),
    "1k, rmapbt": ("-b", "size=1k", "-m", "rmapbt=1"),
}
KINDS = [stat.S_IFREG] * 8 + [stat.S_IFIFO, stat.S_IFCHR]
Files = dict[tuple[Inode, bytes], Inode | None]


async def _make(vol: Volume, rng: random.Random, dirs: list[Inode], files: Files) -> None:
    dp = rng.choice(dirs)
    name = b"%d" % rng.getrandbits(24) + b"n" * rng.choice((1, 3, 9, 9, 30, 200))
    if (dp, name) in files:
        return
    mode = rng.choice(KINDS) | rng.choice((0o644, 0o755))
    ip = await namespace.create(vol, dp, name, mode, 5, 6, rdev=259)
    files[dp, name] = None
    if rng.random() < 0.02:
        files[dp, name] = ip  # stays open
    else:
        vol.inodes.put(ip)


async def _remove(vol: Volume, rng: random.Random, files: Files) -> None:
    dp, name = rng.choice(list(files))
    await namespace.unlink(vol, dp, name)
    opened = files.pop((dp, name))
    if opened is not None:
        vol.inodes.put(opened)
    await vol.drain_inactive()


async def _other(vol: Volume, rng: random.Random, dirs: list[Inode], files: Files) -> None:
    """Something that only the general path does, in between."""
    dp = rng.choice(dirs)
    if files and rng.random() < 0.5:
        dp, old = rng.choice(list(files))
        new = b"moved%d" % rng.getrandbits(24)
        await namespace.rename(vol, dp, old, dp, new)
        files[dp, new] = files.pop((dp, old))
    elif rng.random() < 0.5:
        name = b"link%d" % rng.getrandbits(24)
        vol.inodes.put(await namespace.symlink(vol, dp, name, b"t" * rng.choice((5, 600)), 0, 0))
        files[dp, name] = None
    elif files:
        dp, name = rng.choice(list(files))
        ip = await namespace.lookup(vol, dp, name)
        new = b"hard%d" % rng.getrandbits(24)
        await namespace.link(vol, dp, new, ip)
        files[dp, new] = None
        vol.inodes.put(ip)


def _first_dirty(vol: Volume) -> int:
    """In the place of `flush`: leave every inode to the general path."""
    ip = vol.inodes.first_dirty()
    return ip.handle if ip else 0


async def _run(path: Path, seed: int, operations: int, short: bool, mp: pytest.MonkeyPatch) -> None:
    """Grow directories of every form and empty them again."""
    rng = random.Random(seed)
    ticks = iter(range(10**18, 10**19, 1000))
    now = [0]
    mp.setattr(stamp, "now", lambda: now[0])
    mp.setattr(volume, "METADATA_PERIOD_S", 10**6)  # freed blocks keep what was written last
    inobt._generations.seed(seed)
    inobt._rotors.clear()
    device = ImageFile(str(path))
    async with Volume.open(device, 64 << 20, paranoid=True) as vol:
        if not short:
            mp.setattr(vol, "admits", lambda name, blocks=0: None)
            mp.setattr(residentino, "flush", lambda core, looks, most: _first_dirty(vol))
        root = await vol.inodes.get(vol.geo.root_ino)
        dirs = [await namespace.mkdir(vol, root, b"d%d" % i, 0o755, 0, 0) for i in range(3)]
        dirs[1].flags, dirs[1].projid = L.DIFLAG_PROJINHERIT | L.DIFLAG_NOATIME, 42
        dirs[2].mode |= stat.S_ISGID
        files: Files = {}
        for turn in range(operations):
            now[0] = next(ticks)
            grows = 0.9 if turn < operations // 2 else 0.1
            if rng.random() < 0.02:
                await _other(vol, rng, dirs, files)
            elif rng.random() < grows or not files:
                await _make(vol, rng, dirs[: 1 if rng.random() < 0.8 else 3], files)
            else:
                await _remove(vol, rng, files)
        for ip in [root, *dirs, *(ip for ip in files.values() if ip is not None)]:
            vol.inodes.put(ip)
        assert not vol.shut_down
    device.close()


def _count(mp: pytest.MonkeyPatch, counts: dict[str, list[int]]) -> None:
    """Count how often each kernel is asked and how often it says yes."""

    def counting(name: str) -> None:
        kernel = getattr(residentname, name)

        def counted(*args: object) -> object:
            result = kernel(*args)
            counts[name][0] += 1
            counts[name][1] += result != residentname.MISS
            return result

        mp.setattr(residentname, name, counted)

    for name in counts:
        counting(name)


@pytest.mark.compiled
@pytest.mark.parametrize("arguments", IMAGES.values(), ids=IMAGES.keys())
async def test_same_image(
    tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,000 operations in three directories, two of them small."""
    path = support.mkfs(tmp_path, *arguments)
    twin = tmp_path / "twin"
    shutil.copyfile(path, twin)
    counts = {"create": [0, 0], "unlink": [0, 0], "free_inode": [0, 0]}
    with monkeypatch.context() as mp:
        await _run(twin, 7, 3000, False, mp)
    with monkeypatch.context() as mp:
        _count(mp, counts)
        await _run(path, 7, 3000, True, mp)
    support.assert_clean(path)
    assert path.read_bytes() == twin.read_bytes()
    if arguments != IMAGES["no finobt"]:
        for name, (asked, done) in counts.items():
            assert done > 0.6 * asked, (name, asked, done)


# -- a new inode's core ---------------------------------------------------------------------------

KEPT = L.DIFLAG_NOATIME | L.DIFLAG_NODUMP | L.DIFLAG_SYNC | L.DIFLAG_NODEFRAG
KEPT_BY_DIRS = L.DIFLAG_PROJINHERIT | L.DIFLAG_EXTSZINHERIT | L.DIFLAG_RTINHERIT


def _core(dp: Inode, mode: int, rdev: int) -> dict[str, int]:
    """What a new inode's core must be, said in another way than the kernel says it."""
    kind = stat.S_IFMT(mode)
    core = {"mode": mode, "uid": 5, "gid": 6, "nlink": 1, "aformat": L.FMT_EXTENTS, "rdev": 0}
    core["format"] = L.FMT_EXTENTS
    core["flags"] = dp.flags & (KEPT | KEPT_BY_DIRS if kind == stat.S_IFDIR else KEPT)
    if kind == stat.S_IFREG and dp.flags & L.DIFLAG_EXTSZINHERIT:
        core["flags"] |= L.DIFLAG_EXTSIZE
    sized = core["flags"] & (L.DIFLAG_EXTSIZE | L.DIFLAG_EXTSZINHERIT)
    core["extsize"] = dp.extsize if sized else 0
    core["projid"] = dp.projid if dp.flags & L.DIFLAG_PROJINHERIT else 0
    copied = dp.flags2 & L.DIFLAG2_COWEXTSIZE and kind in (stat.S_IFREG, stat.S_IFDIR)
    core["cowextsize"] = dp.cowextsize if copied else 0
    core["flags2"] = L.DIFLAG2_BIGTIME | L.DIFLAG2_NREXT64 | (copied and L.DIFLAG2_COWEXTSIZE)
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        core["rdev"] = rdev
    if kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
        core["format"] = L.FMT_DEV
    if kind == stat.S_IFDIR:
        core["nlink"] = 2
    if dp.mode & stat.S_ISGID:
        core["gid"] = dp.gid
        core["mode"] |= stat.S_ISGID if kind == stat.S_IFDIR else 0
    return core | {"atime": 77, "mtime": 77, "ctime": 77, "crtime": 77, "changecount": 1}


async def test_core_of_a_new_inode(tmp_path: Path) -> None:
    """Every kind of file under directories that hand on all combinations of what they can."""
    path = support.mkfs(tmp_path, "-i", "nrext64=1")
    rng = random.Random(3)
    kinds = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO)
    async with opened(path) as vol, using(vol) as dp:
        ip = await namespace.create(vol, dp, b"f", 0o644, 0, 0)
        before = {name: getattr(dp, name) for name in ("mode", "gid", "flags", "flags2")}
        for _ in range(500):
            dp.flags, dp.flags2 = rng.getrandbits(14), rng.getrandbits(3)
            dp.extsize, dp.cowextsize, dp.projid = 11, 12, 13
            dp.gid, dp.mode = 9, stat.S_IFDIR | rng.choice((0o755, 0o2755))
            ip.projid = ip.extsize = ip.cowextsize = 0
            mode = rng.choice(kinds) | 0o640
            residentname.fill(vol.resident, dp.handle, ip.handle, mode, 5, 6, 259, 77)
            wanted = _core(dp, mode, 259)
            assert {name: getattr(ip, name) for name in wanted} == wanted
        for name, value in before.items():
            setattr(dp, name, value)
        dp.extsize = dp.cowextsize = dp.projid = 0
        ip.projid = ip.extsize = ip.cowextsize = 0
        residentname.fill(vol.resident, dp.handle, ip.handle, stat.S_IFREG | 0o644, 0, 0, 0, 77)
        vol.inodes.put(ip)
    support.assert_clean(path)
