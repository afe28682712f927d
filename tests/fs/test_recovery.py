"""Logs that the kernel left dirty in the middle of a load: we recover one copy, the kernel another.

Afterwards both hold the same tree, down to the bytes of the inodes, and the checkers are as content
with ours as with the kernel's (whom an attribute that was being set can leave half-done).
`python -m tests.fs.test_recovery SEED...` runs more seeds than the suite does, on all geometries,
and keeps the dirty image where something differs: threads do not meet in the same way again.
"""

from __future__ import annotations

import errno
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import trio

from fs.device.base import Views
from fs.device.image import ImageFile
from fs.errors import UserError
from fs.log import checkpoints, head, items
from fs.log.intents import Intent, Pending
from fs.log.region import Region
from fs.log.replay import Replay
from fs.log.transaction import Transaction
from fs.volume import Volume
from fs.xfs import inobt
from fs.xfs import layout as L
from tests import crashload, kernel_tree, support
from tests.fs import test_log_reader
from tests.fs.test_log_reader import read_log
from tools.targets import repair, scratch_dir

GEOMETRIES = {
    **test_log_reader.GEOMETRIES,
    "wide": ("-l", "su=256k"),
    "plain": ("-m", "reflink=0,finobt=0,inobtcount=0", "-i", "sparse=0"),
    "8k directories": ("-n", "size=8k", "-m", "rmapbt=1"),
    "old times": ("-m", "bigtime=0", "-i", "size=1024"),
    "full log": ("--unsupported", "-l", "size=13m", "-m", "rmapbt=1"),
}
FULL = GEOMETRIES["full log"]  # of which the ring was once around
MOMENTS = 2  # that are tried of one log
VOLATILE = ("crc", "lsn")


def leave_dirty(
    scratch: Path, args: tuple[str, ...], seed: int, seconds: float = 1.0, *, chains: bool = False
) -> Path:
    """An image whose log must be recovered, in a state that no sync ever saw."""
    image = support.mkfs(scratch, *args)
    with support.kernel_mount(image, scratch / "mnt") as mnt:
        if args is FULL:
            crashload.go_round(mnt)
        crashload.cut_off(mnt, seed, seconds, chains=chains)
    return image


async def recover(image: Path) -> None:
    async with Volume.open(ImageFile(str(image)), 64 << 20):
        pass


def complaints(image: Path) -> list[str]:
    """What xfs_repair -n says of an unclean image, in no order; nothing of a clean one."""
    clean, text = repair(image)
    return [] if clean else sorted(text.splitlines())


async def look(image: Path) -> tuple[kernel_tree.Snapshot, dict[int, bytes]]:
    """The tree, and all its inodes as they are on the image."""
    device = ImageFile(str(image), read_only=True)
    async with Volume.open(device, 64 << 20, read_only=True) as vol:
        tree = await kernel_tree.snapshot_volume(vol, exact=True)
        raw = {}
        for ino in {node["ino"] for node in tree.values()}:
            daddr, bbs, at = inobt.imap(vol.geo, ino)
            cluster = bytearray(bbs << L.BB_LOG)
            await device.read(daddr << L.BB_LOG, [memoryview(cluster)])
            inode = cluster[at : at + vol.geo.inode_size]
            for name in VOLATILE:
                first = L.off(L.DINODE, name)
                size = L.DINODE[name].itemsize
                inode[first : first + size] = bytes(size)
            raw[ino] = bytes(inode)
    device.close()
    return tree, raw


async def compare(scratch: Path, image: Path) -> int:
    """Recover both copies and compare them; returns how many names there are."""
    theirs = scratch / "theirs"
    shutil.copyfile(image, theirs)
    await recover(image)
    with support.kernel_mount(theirs, scratch / "mnt", "loop,noatime"):
        pass
    found = complaints(image)
    assert found == complaints(theirs), "\n".join(found)
    (our_tree, our_inodes), (their_tree, their_inodes) = await look(image), await look(theirs)
    assert not kernel_tree.diff(our_tree, their_tree)
    assert our_inodes == their_inodes
    with support.kernel_mount(image, scratch / "mnt"):
        pass
    assert complaints(image) == found
    return len(our_tree)


@pytest.mark.parametrize("args", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@support.needs_root
async def test_cut_off(args: tuple[str, ...], scratch: Path) -> None:
    image = leave_dirty(scratch, args, seed=7, seconds=0.2)
    if args is FULL:
        assert (await read_log(image))[1].cycle > 1
    assert await compare(scratch, image) > 50


@support.needs_root
async def test_torn(scratch: Path) -> None:
    """One of the last records is not whole: the log ends there, and no rest lies in its way."""
    image = leave_dirty(scratch, (), seed=8, seconds=0.2)
    region, ends, _ = await read_log(image)
    writable = Region(ImageFile(str(image)), region.geo)
    headers = [header async for header, _ in checkpoints.records(writable, ends.tail, ends.head)]
    last = [header for header in headers[-head.RECORDS_UNDER_WAY :] if header.bbs > 4][-1]
    block = await writable.read(last.bb + last.bbs - 1, 1)
    block[0][100] ^= 1
    await writable.write(last.bb + last.bbs - 1, block)
    assert (await read_log(image))[1].head == last.bb
    await compare(scratch, image)


async def moments(image: Path) -> dict[int, list[Intent]]:
    """The BBs before which the log may have ended, with the intents that were under way then."""
    region, ends, _ = await read_log(image)
    region = Region(ImageFile(str(image), read_only=True), region.geo)
    found, tail = {}, ends.tail
    async for header, _ in checkpoints.records(region, ends.tail, ends.head):
        pending = Pending(region.geo)
        if header.lsn > tail:
            async for checkpoint in checkpoints.committed(region, tail, header.bb):
                for item in checkpoint.items():
                    pending.take(items.kind_of(item), item, checkpoint.lsn)
        if pending.left():
            found[header.bb] = pending.left()
        tail = header.tail_lsn
    return found


async def left_over(image: Path) -> list[Intent]:
    """The intents that a log does not say the end of."""
    region, ends, _ = await read_log(image)
    region = Region(ImageFile(str(image), read_only=True), region.geo)
    pending = Pending(region.geo)
    async for checkpoint in checkpoints.committed(region, ends.tail, ends.head):
        for item in checkpoint.items():
            pending.take(items.kind_of(item), item, checkpoint.lsn)
    return pending.left()


async def end_log(image: Path, bb: int) -> None:
    """As if a crash had come before what is behind a BB was written: none of it is at home yet."""
    geo = (await read_log(image))[0].geo
    region = Region(ImageFile(str(image)), geo)
    await region.write(bb, np.zeros((region.bbs - bb, L.BB_SIZE), np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["default", "rmapbt", "plain"])
@support.needs_root
async def test_in_the_midst_of_intents(form: str, scratch: Path) -> None:
    """Whatever moment the log ends at, among those at which something was begun and not done."""
    image = leave_dirty(scratch, GEOMETRIES[form], seed=11, seconds=0.3, chains=True)
    whole = scratch / "whole"
    image.rename(whole)
    begun = await moments(whole)
    for bb in random.Random(11).sample(sorted(begun), min(MOMENTS, len(begun))):
        shutil.copyfile(whole, image)
        await end_log(image, bb)
        assert await compare(scratch, image) > 5


class Failing(ImageFile):
    """A device that takes so many writes and then no more."""

    def __init__(self, path: Path, writes: int) -> None:
        super().__init__(str(path))
        self.left = writes

    async def write(self, offset: int, views: Views) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.EIO, "enough")
        await super().write(offset, views)


@support.needs_root
async def test_replay_that_was_cut_off_itself(scratch: Path) -> None:
    """However far it came: the next one finds the same log, and comes to the same end."""
    image = leave_dirty(scratch, GEOMETRIES["rmapbt"], seed=9, seconds=0.2)
    region, ends, _ = await read_log(image)
    shutil.copyfile(image, scratch / "copy")
    device = Failing(scratch / "copy", 0x1000000)
    await Replay(device, region.geo).run(Region(device, region.geo), ends)
    device.close()
    needed = 0x1000000 - device.left
    for writes in sorted({0, needed // 2, needed - 1}):
        shutil.copyfile(image, scratch / "copy")
        device = Failing(scratch / "copy", writes)
        with pytest.raises(UserError, match="tries again"):
            async with Volume.open(device, 32 << 20):
                pass
        device.close()
        assert (await read_log(scratch / "copy"))[1] == ends
    await compare(scratch, scratch / "copy")


class CutOff:
    """What a crash leaves behind in the middle of recovery's second half.

    Of each transaction that begins, by its turn, if it is in `turns`: a copy of the image, with all
    that was committed before in its log.
    """

    def __init__(self, image: Path, turns: Sequence[int] = ()) -> None:
        self.image, self.turns = image, turns
        self.begun = 0
        self.copies: list[Path] = []

    async def recover(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Up to the end, with copies on the way."""
        entering = Transaction.__aenter__

        async def enter(tp: Transaction) -> Transaction:
            if tp._write:
                self.begun += 1
                if self.begun in self.turns:
                    await tp.vol.xlog.force()
                    self.copies.append(self.image.with_name(f"cut-{self.begun}"))
                    shutil.copyfile(self.image, self.copies[-1])
            return await entering(tp)

        with monkeypatch.context() as patch:
            patch.setattr(Transaction, "__aenter__", enter)
            await recover(self.image)


@pytest.mark.parametrize("form", ["default", "rmapbt"])
@support.needs_root
async def test_what_is_left_to_do_was_cut_off(
    form: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in the second half it was: nothing is done twice, and nothing is left out.

    What we began we can finish, and so can the kernel, as if there had been no crash.
    """
    image = leave_dirty(scratch, GEOMETRIES[form], seed=10, seconds=0.3, chains=True)
    begun = await moments(image)
    if begun:  # the one with the most to do
        await end_log(image, max(begun, key=lambda bb: sum(len(i.extents) for i in begun[bb])))
    whole = scratch / "whole"
    shutil.copyfile(image, whole)
    counted = CutOff(image)
    await counted.recover(monkeypatch)
    expected = await look(image)
    steps = sum(len(intent.extents) for intent in await left_over(whole))
    early, late = range(1, steps + 2), range(steps + 2, counted.begun)
    rng = random.Random(10)
    turns = [*rng.sample(early, min(2, len(early))), *rng.sample(late, min(1, len(late)))]
    shutil.copyfile(whole, image)
    cut = CutOff(image, turns)
    await cut.recover(monkeypatch)
    assert await look(image) == expected
    for copy in cut.copies:
        assert not (await read_log(copy))[1].clean
        await compare(scratch, copy)
        assert await look(copy) == expected
        copy.unlink()


def main(seeds: list[int]) -> None:
    for seed in seeds:
        for name, args in GEOMETRIES.items():
            with scratch_dir() as scratch:
                image = leave_dirty(scratch, args, seed, 0.1 + 0.1 * (seed % 5))
                kept = Path(f"dirty-{seed}-{name.replace(' ', '-')}.img").absolute()
                shutil.copyfile(image, kept)
                print(seed, name, trio.run(compare, scratch, image), flush=True)
                kept.unlink()


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
