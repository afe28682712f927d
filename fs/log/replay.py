"""Replay: what the log's checkpoints say is brought home, on an image that nobody has mounted yet.

XFS format, log: two passes. The first reads everything, writes nothing, and collects CANCEL items,
of blocks that were freed: what is older about such a block must not be replayed, for it may be
somebody's data now. The second goes through the checkpoints in order; within one come buffers and
inode creations, then everything else, then unlinked pointers in inode clusters, then CANCELs.
Whatever on the device has an LSN from that checkpoint on (for inodes: later than it) is newer than
the item, and is left alone. What is written gets the LSN of the checkpoint's first record and a
CRC. Checkpoints that begin in the same record count as one there.

Intents without their done items are left over; who mounts the image finishes them. Blocks that
were changed are held, up to HELD_BYTES, for the log mostly speaks of the same ones again; beside
them memory is that of the largest checkpoint. What cannot be raises BadLog, in the first pass with
nothing written; in the second only if the device holds something else than the log's writer left
there. The log is as it was then, and may be replayed again, as after a crash.
"""

from __future__ import annotations

from collections import Counter
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fs.device.base import Device
from fs.log import blocks, items
from fs.log.checkpoints import Checkpoint, Item, committed
from fs.log.head import BadLog, Ends
from fs.log.intents import Pending
from fs.log.items import BufItem, CreateItem, InodeItem
from fs.log.region import Region
from fs.xfs import inode as inodes
from fs.xfs import layout as L
from fs.xfs.crc import crc_stamp
from fs.xfs.geometry import Geometry

Block = NDArray[np.uint8]
DIR_KINDS = range(blocks.DIR_BLOCK, blocks.DIR_LEAFN + 1)
HELD_BYTES = 8 << 20
STAMPS = ("atime", "mtime", "ctime", "crtime")


def _order(item: Item) -> int:
    """When in its checkpoint an item's turn comes."""
    kind = items.kind_of(item)
    if kind == items.ICREATE:
        return 0
    if kind != items.BUF:
        return 1
    flags = items.buffer(item).flags
    if flags & items.CANCEL:
        return 3
    return 2 if flags & items.INODE_BUF else 0


class Replay:
    """One replay of one image."""

    def __init__(self, device: Device, geo: Geometry) -> None:
        self._device = device
        self._geo = geo
        self._cancelled: Counter[tuple[int, int]] = Counter()
        self._lsn = 0  # of the checkpoints under way
        self._fresh: set[int] = set()  # daddrs of buffers that have that LSN from us
        self._held: dict[tuple[int, int], Block] = {}  # changed, by daddr and BBs
        self._held_bytes = 0
        self.intents = Pending(geo)
        self.checkpoints = self.replayed = self.skipped = 0

    async def run(self, region: Region, ends: Ends) -> None:
        """Both passes. Raises BadLog, OSError."""
        async for checkpoint in committed(region, ends.tail, ends.head):
            for item in checkpoint.items():
                self._collect(item, checkpoint.lsn)
        async for checkpoint in committed(region, ends.tail, ends.head):
            await self._replay(checkpoint)
        await self._write_held()
        await self._device.flush()

    # -- first pass -----------------------------------------------------------------------------

    def _collect(self, item: Item, lsn: int) -> None:
        kind = items.kind_of(item)
        if kind == items.BUF:
            self._collect_buffer(items.buffer(item))
        elif kind == items.INODE:
            found = items.inode(item)
            self._check_place(found.daddr, found.bbs, f"the cluster of inode {found.ino}")
            self._check_inode(found)
        elif kind == items.ICREATE:
            self._check_create(items.create(item))
        elif kind in (items.ATTRI, items.ATTRD):
            raise BadLog("changes of extended attributes are under way (ATTRI)")
        elif not self.intents.take(kind, item, lsn):
            raise BadLog(f"items of type {kind:#x} are not known")

    def _collect_buffer(self, buf: BufItem) -> None:
        self._check_place(buf.daddr, buf.bbs, "a buffer")
        if buf.flags & items.DQUOT:
            raise BadLog("quota blocks are not known")
        if buf.cancels:
            self._cancelled[buf.daddr, buf.bbs] += 1
        elif buf.kind in DIR_KINDS and buf.bbs << L.BB_LOG != self._geo.dir_block_size:
            raise BadLog(f"the directory block at {buf.daddr} lies in several pieces")

    def _check_place(self, daddr: int, bbs: int, what: str) -> None:
        if daddr < 0 or bbs <= 0 or (daddr + bbs) << L.BB_LOG > self._device.size:
            raise BadLog(f"{what}, {bbs} basic blocks at {daddr}, lies outside of the image")

    def _check_inode(self, item: InodeItem) -> None:
        size = self._geo.inode_size
        if item.offset % size or not 0 <= item.offset <= (item.bbs << L.BB_LOG) - size:
            raise BadLog(f"inode {item.ino} at byte {item.offset} of its cluster")
        if len(item.core) != L.DINODE.itemsize:
            raise BadLog(f"the core of inode {item.ino} has {len(item.core)} bytes")
        if item.fields & (items.DOWNER | items.AOWNER):
            raise BadLog(f"inode {item.ino} was given the extent tree of another")

    def _check_create(self, item: CreateItem) -> None:
        geo = self._geo
        fits = item.agno < geo.agcount and item.agbno + item.blocks <= geo.ag_length(item.agno)
        if not fits or not item.agbno or item.inode_bytes != geo.inode_size:
            raise BadLog(f"new inodes at block {item.agbno} of AG {item.agno}")
        if item.count != item.blocks * geo.inopblock or item.blocks % geo.cluster_blocks:
            raise BadLog(f"{item.count} new inodes in {item.blocks} blocks")

    # -- second pass ----------------------------------------------------------------------------

    async def _replay(self, checkpoint: Checkpoint) -> None:
        self.checkpoints += 1
        if checkpoint.lsn != self._lsn:
            self._lsn = checkpoint.lsn
            self._fresh.clear()
        for item in sorted(checkpoint.items(), key=_order):
            kind = items.kind_of(item)
            if kind == items.BUF:
                await self._buffer(items.buffer(item))
            elif kind == items.INODE:
                await self._inode(items.inode(item))
            elif kind == items.ICREATE:
                await self._create(items.create(item))

    async def _read(self, daddr: int, bbs: int) -> Block:
        held = self._held.get((daddr, bbs))
        if held is not None:
            return held
        block = np.zeros(bbs << L.BB_LOG, np.uint8)
        await self._device.read(daddr << L.BB_LOG, [block.data])
        return block

    async def _write(self, daddr: int, block: Block) -> None:
        place = daddr, len(block) >> L.BB_LOG
        if place not in self._held:
            self._held_bytes += len(block)
        self._held[place] = block
        self.replayed += 1
        if self._held_bytes > HELD_BYTES:
            await self._write_held()

    async def _write_held(self) -> None:
        """Write what is held, neighbours together."""
        start = end = 0
        run: list[memoryview] = []
        for (daddr, bbs), block in sorted(self._held.items(), key=itemgetter(0)):
            if run and daddr != end:
                await self._device.write(start << L.BB_LOG, run)
                run = []
            if not run:
                start = daddr
            run.append(block.data)
            end = daddr + bbs
        if run:
            await self._device.write(start << L.BB_LOG, run)
        self._held.clear()
        self._held_bytes = 0

    # -- buffers --------------------------------------------------------------------------------

    async def _buffer(self, buf: BufItem) -> None:
        place = buf.daddr, buf.bbs
        if buf.cancels:
            self._cancelled[place] -= 1
            return
        if self._cancelled[place] > 0:
            self.skipped += 1
            return
        block = await self._read(buf.daddr, buf.bbs)
        if buf.flags & items.INODE_BUF:
            self._unlinked(buf, block)
        elif self._is_newer(buf.daddr, block):
            self.skipped += 1
            return
        else:
            for at, data in buf.runs:
                block[at : at + len(data)] = np.frombuffer(data, np.uint8)
            self._stamp(block)
            self._fresh.add(buf.daddr)
        await self._write(buf.daddr, block)

    def _is_newer(self, daddr: int, block: Block) -> bool:
        """Whether what is on the device was written after the checkpoint, or with it."""
        layout = blocks.header_of(block)
        if layout is None or daddr in self._fresh:
            return False
        header = block[: layout.itemsize].view(layout)[0]
        if layout is L.SB:
            ours = header["uuid"].tobytes() == self._geo.log_uuid
        else:
            ours = header["uuid"].tobytes() == self._geo.uuid
        return ours and int(header["lsn"]) not in (0, L.NULL64) and int(header["lsn"]) >= self._lsn

    def _stamp(self, block: Block) -> None:
        layout = blocks.header_of(block)
        if layout is None:
            return  # inodes, or an attribute's value: logged with their CRC
        block[: layout.itemsize].view(layout)["lsn"] = self._lsn
        crc_stamp(block, 0, len(block), L.off(layout, "crc"))

    def _unlinked(self, buf: BufItem, block: Block) -> None:
        """Only the pointers of unlinked lists are the buffer's; the rest is the inodes' own."""
        size, at = self._geo.inode_size, L.off(L.DINODE, "next_unlinked")
        for first, data in buf.runs:
            for base in range(0, len(block), size):
                place = base + at
                if first <= place and place + 4 <= first + len(data):
                    pointer = data[place - first : place - first + 4]
                    if not any(pointer):
                        raise BadLog(f"an unlinked pointer of 0 in the cluster at {buf.daddr}")
                    block[place : place + 4] = np.frombuffer(pointer, np.uint8)
                    crc_stamp(block, base, size, L.off(L.DINODE, "crc"))

    # -- inodes ---------------------------------------------------------------------------------

    async def _inode(self, item: InodeItem) -> None:
        if self._cancelled[item.daddr, item.bbs] > 0:
            self.skipped += 1
            return
        cluster = await self._read(item.daddr, item.bbs)
        inode = cluster[item.offset : item.offset + self._geo.inode_size]
        core = inode[: L.DINODE.itemsize].view(L.DINODE)
        if core["magic"][0] != L.MAGIC_DINODE:
            raise BadLog(f"inode {item.ino} was never made on the device")
        if int(core["lsn"][0]) > self._lsn and int(core["lsn"][0]) != L.NULL64:
            self.skipped += 1
            return
        _copy_core(item, core)
        _copy_forks(item, inode)
        core["lsn"] = self._lsn
        crc_stamp(cluster, item.offset, self._geo.inode_size, L.off(L.DINODE, "crc"))
        if fault := inodes.verify(self._geo, cluster, item.offset, item.ino):
            raise BadLog(f"inode {item.ino} as logged: {fault}")
        await self._write(item.daddr, cluster)

    async def _create(self, item: CreateItem) -> None:
        """Clusters of free inodes, unless their blocks were freed again."""
        geo = self._geo
        size = geo.cluster_blocks << geo.block_log
        count, bbs = size >> geo.inode_log, size >> L.BB_LOG
        daddr = geo.agb_to_daddr(item.agno, item.agbno)
        first = geo.ino(item.agno, item.agbno << geo.inopblog)
        clusters = range(item.count // count)
        if any(self._cancelled[daddr + n * bbs, bbs] > 0 for n in clusters):
            self.skipped += 1
            return
        for n in clusters:
            template = np.zeros(size, np.uint8)
            inodes.init_chunk(geo, template, 0, count, first + n * count, item.generation)
            await self._write(daddr + n * bbs, template)


def _copy_core(item: InodeItem, core: Any) -> None:
    """All but the pointer of the unlinked list, which is not the inode's own."""
    logged = np.frombuffer(item.core, L.DINODE.newbyteorder("<"))
    if logged["magic"][0] != L.MAGIC_DINODE or logged["ino"][0] != item.ino:
        raise BadLog(f"the core of inode {item.ino} is another's")
    bigtime = int(logged["flags2"][0]) & L.DIFLAG2_BIGTIME
    for name in L.DINODE.names or ():
        if name in STAMPS and not bigtime:  # seconds come first on the device, and lower here
            both = int(logged[name][0])
            core[name] = (both & 0xFFFFFFFF) << 32 | both >> 32
        elif name not in ("next_unlinked", "crc"):
            core[name] = logged[name]


def _copy_forks(item: InodeItem, inode: Block) -> None:
    literal = inode[L.LITERAL :]
    forkoff = int(inode[L.off(L.DINODE, "forkoff")]) * 8
    if forkoff > len(literal):
        raise BadLog(f"the attribute fork of inode {item.ino} begins at {forkoff}")
    if item.fields & items.DEV:
        literal[:4] = np.frombuffer(item.rdev.to_bytes(4, "big"), np.uint8)
    data, attr = literal[: forkoff or len(literal)], literal[forkoff or len(literal) :]
    for place, logged, root in (
        (data, item.data, item.fields & items.DBROOT),
        (attr, item.attr, item.fields & items.ABROOT),
    ):
        if logged and root:
            _copy_root(item.ino, logged, place)
        elif len(logged) > len(place):
            raise BadLog(f"a fork of inode {item.ino} has {len(logged)} bytes")
        else:
            place[: len(logged)] = np.frombuffer(logged, np.uint8)


def _copy_root(ino: int, logged: bytes, place: Block) -> None:
    """The root of an extent tree: with a short header, and pointers behind room for all keys."""
    header = L.LONG_BLOCK.itemsize
    if len(logged) < header:
        raise BadLog(f"the tree root of inode {ino} has {len(logged)} bytes")
    view = np.frombuffer(logged[:header], L.LONG_BLOCK)[0]
    n, capacity, most = int(view["numrecs"]), (len(logged) - header) // 16, (len(place) - 4) // 16
    if n > capacity or n > most:
        raise BadLog(f"the tree root of inode {ino} has {n} records in {len(logged)} bytes")
    place[: L.BMBT_ROOT.itemsize].view(L.BMBT_ROOT)[0] = (view["level"], n)
    keys, pointers = L.BMBT_ROOT.itemsize, L.BMBT_ROOT.itemsize + 8 * most
    raw = np.frombuffer(logged, np.uint8)
    place[keys : keys + 8 * n] = raw[header : header + 8 * n]
    place[pointers : pointers + 8 * n] = raw[header + 8 * capacity : header + 8 * (capacity + n)]
