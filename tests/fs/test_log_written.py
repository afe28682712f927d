"""Logs that we wrote with the log's writer: xfs_logprint reads them, the kernel replays them.

Checkpoints set times of inodes, one of them in each and more by chance. Beside those they log the
unlinked pointers of inode clusters as they are, which does nothing and takes any place: regions
from 128 bytes to a whole cluster, checkpoints of one record and of many. The tail is moved along,
so what is lost when the ring goes round was not to be replayed. Two copies are recovered, one by
the kernel and one by us; both must then say of each inode what the last checkpoint did that counts.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from alloc.arena import Arena
from fs.device.image import ImageFile
from fs.log import checkpoints, head, items
from fs.log.head import Ends
from fs.log.region import Region, lsn_of, place_of
from fs.log.stream import Stream
from fs.volume import Volume
from fs.xfs import inobt
from fs.xfs import layout as L
from tests import support
from tests.fs import logwriter
from tests.fs.logwriter import LogWriter
from tests.fs.test_log_reader import printed
from tests.fs.test_log_stream import Vectors
from tests.fs.volatile import Volatile

KIB = 1024
FILES = 100
POINTERS = 8 << items.TYPE_SHIFT | items.INODE_BUF  # of inode clusters
BIGTIME_EPOCH_NS = (1 << 31) * 10**9
SMALL = ("--unsupported", "-l", "size=13m")
GEOMETRIES = {
    "default": ((), 32 * KIB),
    "256k iclogs": ((), 256 * KIB),
    "1k blocks": (("-b", "size=1k"), 32 * KIB),
    "64k blocks": (("-b", "size=64k"), 64 * KIB),
    "su=32k": (("-l", "su=32k"), 32 * KIB),
    "su=256k": (("-l", "su=256k"), 32 * KIB),
    "sectors": (("-s", "size=4096"), 32 * KIB),
    "large sectors": (("-s", "size=4096"), 256 * KIB),
    "small": (SMALL, 32 * KIB),
    "small, 256k iclogs": (SMALL, 256 * KIB),
    "small, stripes": (("--unsupported", "-l", "size=13m,su=32k"), 128 * KIB),
}


class Written:
    """An image with files, and a stream of checkpoints into its log."""

    def __init__(self, log: LogWriter, stream: Stream, vectors: Vectors, seed: int) -> None:
        self.log, self.stream = log, stream
        self._vectors, self._rng = vectors, random.Random(seed)
        self._cores: dict[int, np.ndarray] = {}
        self._clusters: dict[tuple[int, int], np.ndarray] = {}
        self.logged: list[tuple[int, dict[int, int], int]] = []  # LSN, times by ino, regions
        self.times: dict[int, int] = {}  # before

    async def look(self, inos: list[int]) -> None:
        """Learn the inodes whose times will be set."""
        for ino in inos:
            daddr, bbs, at = inobt.imap(self.log.geo, ino)
            if (daddr, bbs) not in self._clusters:
                raw = np.zeros(bbs << L.BB_LOG, np.uint8)
                await self.log.device.read(daddr << L.BB_LOG, [raw.data])
                self._clusters[daddr, bbs] = raw
            core = self._clusters[daddr, bbs][at:][: L.DINODE.itemsize].view(L.DINODE)
            assert core["ino"][0] == ino
            self._cores[ino] = core.astype(L.DINODE.newbyteorder("<"))
            self.times[ino] = int(core["mtime"][0]) - BIGTIME_EPOCH_NS

    async def go_on(self, ends: Ends) -> None:
        """Behind other ends than those to which it came."""
        arena, logbsize = self._vectors.arena, self.stream.shape.size
        self.stream.stop()
        self.stream = Stream(self.log.region, arena, ends, logbsize)
        await self.stream.start()

    def _time(self, ino: int, times: dict[int, int]) -> list[bytes]:
        times[ino] = self._rng.randrange(1 << 60)
        core = self._cores[ino].copy()
        core["mtime"] = times[ino] + BIGTIME_EPOCH_NS
        core["next_unlinked"] = L.NULL32
        return logwriter.inode(ino, inobt.imap(self.log.geo, ino), core.tobytes())

    def _pointers(self) -> list[bytes]:
        """Some of the chunks of a cluster, of which nothing but unlinked pointers counts."""
        (daddr, bbs), raw = self._rng.choice(list(self._clusters.items()))
        share = self._rng.choice((0.1, 0.5, 1.0))
        chosen = [n for n in range(len(raw) // items.CHUNK) if self._rng.random() < share]
        cut = {n: raw[n * items.CHUNK :][: items.CHUNK].tobytes() for n in chosen}
        return logwriter.buffer(daddr, bbs, POINTERS, cut)

    async def checkpoint(self, ino: int, tail: int, fillers: int) -> int:
        """Log an inode's time, with or without company; returns the start LSN."""
        times: dict[int, int] = {}
        others = self._rng.sample(list(self._cores), self._rng.choice((0, 0, 3)))
        logged = [self._time(one, times) for one in {ino, *others}]
        logged += [self._pointers() for _ in range(fillers)]
        self._rng.shuffle(logged)
        free, end = self.stream.bbs_free(tail), self.stream.head
        regions = [region for item in logged for region in item]
        need = self.stream.bbs_for(sum(map(len, regions)), len(regions))
        lsn = await self.stream.write(self._vectors.put(logged), tail)
        assert lsn == end
        assert free - need <= self.stream.bbs_free(tail) < free
        self.logged.append((lsn, times, len(regions)))
        return lsn

    async def go_round(self, rounds: int, keep: int) -> int:
        """Checkpoints of all sizes until the ring went round; the last tail. `keep` stay in it."""
        inos, n = list(self._cores), 0
        cycle = place_of(self.stream.head)[0] + rounds
        tail = self.stream.head
        # a few more behind the end, so that the tail is in the cycle before
        while place_of(self.stream.head) < (cycle, 200):
            fillers = self._rng.choice((0, 2, 30, 400 * 16384 // self._cluster_bytes))
            tail = self.logged[-keep][0] if len(self.logged) > keep else tail
            tail = self.make_room(tail)
            await self.checkpoint(inos[n % len(inos)], tail, fillers)
            n += 1
        return tail

    def make_room(self, tail: int) -> int:
        """The tail, or one behind it, so that a third of the ring is free."""
        while self.stream.bbs_free(tail) < self.log.region.bbs // 3:
            tail = next(lsn for lsn, *_ in self.logged if lsn > tail)
        return tail

    @property
    def _cluster_bytes(self) -> int:
        return len(next(iter(self._clusters.values())))

    def expected(self, tail: int, end: int) -> dict[int, int]:
        """The times after a replay of checkpoints from one LSN up to another."""
        after = dict(self.times)
        for lsn, times, _ in self.logged:
            after |= times if tail <= lsn < end else {}
        return after


@asynccontextmanager
async def written(
    scratch: Path,
    args: tuple[str, ...],
    logbsize: int,
    seed: int = 1,
    device: type[ImageFile] = ImageFile,
) -> AsyncIterator[Written]:
    image = support.mkfs(scratch, *args)
    with support.kernel_mount(image, scratch / "mnt") as mnt:
        for n in range(FILES):
            (mnt / f"file{n}").touch()
        inos = [(mnt / f"file{n}").stat().st_ino for n in range(FILES)]
    log = await LogWriter(image, device).open()
    assert log.ends.clean
    arena = Arena(64 << 20)
    stream = Stream(log.region, arena, log.ends, logbsize)
    await stream.start()
    vectors = Vectors(arena, random.Random(seed))
    await vectors.start()
    result = Written(log, stream, vectors, seed)
    await result.look(inos)
    yield result
    log.device.close()
    arena.close()


async def times_of(image: Path, inos: list[int]) -> dict[int, int]:
    """What the inodes say, in the image itself."""
    log = LogWriter(image)
    found = Written(await log.open(), None, None, 0)  # type: ignore[arg-type]
    await found.look(inos)
    log.device.close()
    return found.times


async def judge(scratch: Path, image: Path, expected: dict[int, int]) -> None:
    """The kernel recovers one copy and we another; the checkers are content with both."""
    theirs, ours = scratch / "theirs", scratch / "ours"
    shutil.copyfile(image, theirs)
    shutil.copyfile(image, ours)
    with support.kernel_mount(theirs, scratch / "mnt", "loop,noatime") as mnt:
        seen = {entry.stat().st_ino: entry.stat().st_mtime_ns for entry in mnt.iterdir()}
    assert seen == expected
    async with Volume.open(ImageFile(str(ours)), 64 << 20):
        pass
    for copy in (theirs, ours):
        support.assert_clean(copy)
        assert await times_of(copy, list(expected)) == expected
        copy.unlink()


@pytest.mark.parametrize(("args", "logbsize"), GEOMETRIES.values(), ids=GEOMETRIES.keys())
@support.needs_root
async def test_the_kernel_replays_it(args: tuple[str, ...], logbsize: int, scratch: Path) -> None:
    """Small rings several times, others once; the last record straddles, or does not."""
    rounds = 4 if "--unsupported" in args else 1
    async with written(scratch, args, logbsize) as log:
        tail = await log.go_round(rounds, keep=20)
        end = log.stream.head
        assert place_of(tail)[0] < place_of(end)[0]
        kept = [count for lsn, _, count in log.logged if lsn >= tail]
        assert len(kept) > 3
        unit = max(log.log.geo.log_sunit, log.log.geo.log_sector_size) >> L.BB_LOG
        assert not any(place_of(lsn)[1] % unit for lsn, *_ in log.logged)
    image = scratch / "image"
    assert printed(image) == kept
    await judge(scratch, image, log.expected(tail, end))


@support.needs_root
async def test_torn(scratch: Path) -> None:
    """What comes with a record that is not whole does not count, nor does what comes behind it."""
    async with written(scratch, SMALL, 32 * KIB) as log:
        tail = await log.go_round(1, keep=20)
        ends = []
        for ino in list(log.times)[:3]:
            ends.append(await log.checkpoint(ino, tail, 2))
        region = log.log.region
        for lsn in reversed(ends[1:]):
            bb = place_of(lsn)[1]
            block = await region.read(bb + 2, 1)
            block[0][100] ^= 1
            await region.write(bb + 2, block)
            found = await head.find(region)
            assert found.head == bb
            await judge(scratch, scratch / "image", log.expected(tail, lsn))


@pytest.mark.slow
@support.needs_root
async def test_power_failures(scratch: Path) -> None:
    """In the middle of a large checkpoint; the log goes on behind what the kernel would replay."""
    rng, cuts = random.Random(4), 0
    async with written(scratch, SMALL, 32 * KIB, device=Volatile) as log:
        device, region = log.log.device, log.log.region
        assert isinstance(device, Volatile)
        tail = await log.go_round(1, keep=20)
        await region.flush()
        for limit in (10, 40, 80, 200):
            await log.checkpoint(rng.choice(list(log.times)), tail, 1)
            await region.flush()
            tail, stable = log.make_room(tail), [lsn for lsn, *_ in log.logged]
            device.left = rng.randrange(limit // 2, limit)
            with suppress(OSError):
                await log.checkpoint(rng.choice(list(log.times)), tail, 350)
            device.lose(rng)
            ends = await head.find(region)
            found = checkpoints.committed(region, ends.tail, ends.head)
            read = [checkpoint.lsn async for checkpoint in found]
            assert {lsn for lsn in stable if lsn >= tail} <= set(read)
            log.logged = [entry for entry in log.logged if entry[0] in (*stable, *read)]
            end = lsn_of(ends.cycle, ends.head)
            await judge(scratch, scratch / "image", log.expected(read[0], end))
            cuts += log.stream.dead is not None
            await log.go_on(ends)
        assert cuts > 1


@support.needs_root
async def test_unmounted(scratch: Path) -> None:
    """A log with an unmount record is clean: nothing of it is replayed."""
    async with written(scratch, ("-l", "su=32k"), 32 * KIB) as log:
        tail = log.stream.head
        for ino in list(log.times)[:3]:
            await log.checkpoint(ino, tail, 5)
        await log.stream.unmount(tail)
        assert (await head.find(Region(log.log.device, log.log.geo))).clean
    await judge(scratch, scratch / "image", log.times)
