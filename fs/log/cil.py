"""The CIL: what transactions changed, collected until a checkpoint takes it to the log.

A context collects for one checkpoint. Each object that was changed has one item in it, with a log
vector: the object as the last transaction left it that committed. Committing copies the object
again, so whoever changes it next, before or after the context is sealed, disturbs nobody. Memory
for vectors is taken before that; afterwards nothing waits and nothing allocates.

Items of a buffer: all of it; of an inode cluster only the unlinked pointers, or nothing at all if
it was just made (ICREATE says what recovery needs, the item only keeps the log until the cluster is
at home). A block that was freed has an item that cancels what the log says about it; if it is used
again in the same shape in the same context, the new buffer's item takes the place of that one.

Invariants: an object has at most one item in the open context (`item`) and one in the sealed one
(`going`); objects of contexts that are not stable are pinned by their `seq`. One context is sealed
at a time. An item whose object is gone has no owner, and its vector is written all the same.

Locking: trio thread only; committing and sealing are atomic between awaits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alloc import gfp
from alloc.jit import kernel
from fs.cache.buf import BUF, keep_in_log
from fs.cache.incore import INODE
from fs.log import ail, blocks, formats, items
from fs.log.busy import Busy
from fs.log.changes import (
    BUFFER,
    CANCEL,
    INODE_ITEM,
    LOOSE,
    ORDERED,
    POINTERS,
    Changes,
    Place,
)
from fs.xfs import inobt
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.log.grant import Context, Ticket
    from fs.log.vectors import Vectors
    from fs.volume import Volume

ITEM = np.dtype(
    [
        ("vector", "i8"),  # address in the arena; 0: the item has none
        ("room", "u4"),  # bytes of memory at it
        ("used", "u4"),
        ("regions", "u4"),
        ("owner", "u4"),  # the object's handle, or 0
        ("next", "u4"),  # in the context
        ("cost", "u4"),  # bytes of the log that it has been counted with
        ("kind", "u1"),
        ("pad", "u1", (31,)),
    ]
)
assert ITEM.itemsize == 64
OPERATION_BYTES = 8  # that a region's operation header has more than the length in the vector
INODE_REGIONS = 4
# An inode's vector is larger than the inode by its head, four lengths, two roots' headers.
INODE_MORE = items.INODE_HEAD.size + 4 * formats.LENGTH + 2 * (L.LONG_BLOCK.itemsize + 4)
# What a transaction changes at most that is one kernel (fs/xfs/residentname.py).
QUICK_BLOCKS, QUICK_DIR_BLOCKS, QUICK_CLUSTERS, QUICK_INODES = 6, 8, 2, 3

_EMPTY = np.zeros((), ITEM)

class Need(NamedTuple):
    """What an item needs: memory for its vector, and bytes of the log at most."""

    kind: int
    owner: int  # handle of the object, 0: none
    size: int
    cost: int


class Spare(NamedTuple):
    """An item without owner and memory for its vector, of `room` bytes."""

    item: int
    vector: int
    room: int


class Batch(NamedTuple):
    """A sealed context."""

    seq: int
    first: int  # item
    vectors: NDArray[np.int64]  # (n, 3): address, bytes, regions
    ticket: Context
    releases: list[int]


# -- kernels --------------------------------------------------------------------------------------


def _tables(*rest: Any):
    return lambda: (np.zeros(1, ITEM), np.zeros(1, BUF), np.zeros(1, INODE), *rest)


@kernel(_tables(1, np.zeros((1, 3), np.int64)))
def _seal(items, bufs, inodes, first, out):
    """Objects' items are on their way now. Fills `out` with vectors; returns how many."""
    n, i = 0, first
    while i != 0:
        item = items[i]
        if item.owner != 0:
            if item.kind == INODE_ITEM:
                inodes["item"][item.owner], inodes["going"][item.owner] = 0, i
            else:
                bufs["item"][item.owner], bufs["going"][item.owner] = 0, i
        if item.regions != 0:
            out[n, 0], out[n, 1], out[n, 2] = item.vector, item.used, item.regions
            n += 1
        i = np.int64(item.next)
    return n


@kernel(_tables(ail.sample(), 1, 1, 1))
def _settle(items, bufs, inodes, held, first, seq, lsn):
    """The checkpoint is stable: its objects hold it, instead of an older one if all is in it."""
    i = first
    while i != 0:
        h, kind = np.int64(items["owner"][i]), items["kind"][i]
        i = np.int64(items["next"][i])
        if h == 0:
            continue
        if kind == INODE_ITEM:
            inodes["going"][h] = 0
            inodes["lsn"][h] = lsn
            ail.hold(held, seq)
            ail.release(held, inodes["held"][h])
            inodes["held"][h] = seq
            continue
        bufs["going"][h] = 0
        bufs["lsn"][h] = lsn
        if kind == BUFFER:
            ail.release(held, bufs["held"][h])
            bufs["held"][h] = 0
        keep_in_log(bufs, held, h, seq)


# -- contexts -------------------------------------------------------------------------------------


class Cil:
    """The open context of a volume, and how it is filled and sealed."""

    def __init__(self, vol: Volume, vectors: Vectors, open_ticket: Any) -> None:
        self._vol, self._vectors, self._open_ticket = vol, vectors, open_ticket
        self._slab = vol.arena.slab("xfs_log_item", ITEM, reclaimable=False)
        self.items = self._slab.table
        self._ail = vol.bufs.ail
        self.seq = self._ail.stable + 1
        pointers = np.zeros(-(-vol.geo.cluster_bytes // formats.WORD_BYTES), np.uint32)
        inodes = vol.geo.cluster_bytes >> vol.geo.inode_log
        for index in range(inodes):
            formats.mark_unlinked(pointers, 0, index, vol.geo.inode_size)
        self._pointers, self._pointer_regions = pointers, 1 + inodes
        self._classes = self._stock_up()
        self._stock: dict[int, list[Spare]] = {size: [] for size, _ in self._classes}
        self.busy = Busy()
        self._open()

    def _open(self) -> None:
        self._first = self._last = 0
        self.count = 0  # items
        self._releases: list[int] = []
        self._cancels: dict[Place, int] = {}  # items
        self._ticket: Context = self._open_ticket(f"checkpoint {self.seq}")

    @property
    def payload(self) -> int:
        """Bytes that the open context would write."""
        return self._ticket.payload

    @property
    def tables(self) -> tuple[Any, Any, Any]:
        return self.items, self._vol.bufs.table, self._vol.inodes.table

    # -- committing -----------------------------------------------------------------------------

    async def commit(self, changes: Changes, ticket: Ticket) -> None:
        """Put what a transaction changed, and still holds, into the open context.

        Raises Overrun, with the context as it was, for more than the ticket promised.
        """
        needs = self._needs(changes)
        spare: dict[int, Spare] = {}
        try:
            while True:  # a context that is sealed meanwhile takes its memory along
                seq = self.seq
                for index in self._lacking(needs, spare):
                    spare[index] = await self._new(needs[index].size)
                if seq == self.seq:
                    break
            self._pay(needs, changes, ticket)
        except BaseException:
            self._give_back(spare)
            raise
        self._insert(changes, needs, spare)

    def commit_now(self, changes: Changes, ticket: Ticket) -> None:
        """The same with the memory in stock: `stocked` was true when the transaction began."""
        needs = self._needs(changes)
        spare = {i: self._from_stock(needs[i].size) for i in self._lacking(needs, {})}
        self._pay(needs, changes, ticket)
        self._insert(changes, needs, spare)

    @property
    def stocked(self) -> bool:
        """Is there memory for whatever a transaction changes that waits for nothing?"""
        for size, count in self._classes:
            stock = self._stock[size]
            while len(stock) < count:
                item = self._slab.try_alloc(gfp.NOWAIT)  # who finds nothing waits elsewhere
                if item is None:
                    return False
                vector = self._vectors.try_now(size)
                if vector is None:
                    self._slab.free(item)
                    return False
                stock.append(Spare(item, vector, size))
        return bool(self._classes)

    def _from_stock(self, size: int) -> Spare:
        for room, _ in self._classes:
            if room >= size and self._stock[room]:
                return self._stock[room].pop()
        raise AssertionError(f"no log vector of {size} bytes in stock")

    def _stock_up(self) -> list[tuple[int, int]]:
        """(bytes, count) of vectors that the largest such transaction needs; none if too much."""
        geo = self._vol.geo
        wanted: dict[int, int] = {}
        for size, count in (
            (formats.whole_bytes(geo.sector_size), 1),
            (formats.whole_bytes(geo.block_size), QUICK_BLOCKS),
            (formats.whole_bytes(geo.dir_block_size), QUICK_DIR_BLOCKS),
            (formats.chunks_bytes(geo.cluster_bytes, self._pointers, 0), QUICK_CLUSTERS),
            (geo.inode_size + INODE_MORE, QUICK_INODES),
        ):
            wanted[int(size)] = wanted.get(int(size), 0) + count
        total = sum(size * count for size, count in wanted.items())
        return sorted(wanted.items()) if total <= self._vol.arena.memory_bytes // 16 else []

    def _lacking(self, needs: list[Need], spare: dict[int, Spare]) -> list[int]:
        """Which needs nobody has memory for."""
        return [i for i, need in enumerate(needs) if i not in spare and not self._has_room(need)]

    def _needs(self, changes: Changes) -> list[Need]:
        needs = [self._buffer_need(h, kind) for h, kind in changes.bufs.items()]
        needs += [self._inode_need(h) for h in changes.inodes]
        needs += [Need(LOOSE, 0, len(v), len(v) + OPERATION_BYTES) for v in changes.loose]
        for _, size in changes.cancels:
            nbytes = int(formats.cancel_bytes(size))
            needs.append(Need(CANCEL, 0, nbytes, nbytes + OPERATION_BYTES))
        return needs

    def _buffer_need(self, handle: int, kind: int) -> Need:
        if kind == ORDERED:
            return Need(kind, handle, 0, 0)
        if kind == POINTERS:
            size = int(formats.chunks_bytes(self._vol.geo.cluster_bytes, self._pointers, 0))
            return Need(kind, handle, size, size + OPERATION_BYTES * self._pointer_regions)
        parts = self._vol.bufs.parts(handle)
        size = sum(int(formats.whole_bytes(nbytes)) for _, _, nbytes in parts)
        return Need(kind, handle, size, size + 2 * OPERATION_BYTES * len(parts))

    def _inode_need(self, handle: int) -> Need:
        vol = self._vol
        image = vol.inodes.view(handle).image_addr
        size = int(formats.inode_bytes(vol.arena.mem, vol.inodes.table, handle, image))
        return Need(INODE_ITEM, handle, size, size + INODE_REGIONS * OPERATION_BYTES)

    def _item_of(self, need: Need) -> int:
        """The item that an object has in the open context, or 0."""
        if not need.owner:
            return 0
        table = self._vol.inodes.table if need.kind == INODE_ITEM else self._vol.bufs.table
        return int(table["item"][need.owner])

    def _has_room(self, need: Need) -> bool:
        item = self._item_of(need)
        return item != 0 and int(self.items["room"][item]) >= need.size

    async def _new(self, size: int) -> Spare:
        """An item, and memory for its vector."""
        item = await self._slab.alloc(gfp.KERNEL | gfp.NOFAIL)
        try:
            return Spare(item, await self._vectors.alloc(size) if size else 0, size)
        except BaseException:
            self._slab.free(item)
            raise

    def _give_back(self, spare: dict[int, Spare]) -> None:
        for found in spare.values():
            self._free(*found)

    def _free(self, item: int, vector: int, room: int) -> None:
        if vector:
            self._vectors.free(vector, room)
        self._slab.free(item)

    def _pay(self, needs: list[Need], changes: Changes, ticket: Ticket) -> None:
        """The ticket pays for what the context will be larger by. Raises Overrun."""
        replaced = (self._item_of(need) for need in needs)
        before = sum(int(self.items["cost"][item]) for item in replaced if item)
        self._ticket.take(ticket, sum(need.cost for need in needs) - before)

    # -- nothing waits and nothing allocates from here on ---------------------------------------

    def _insert(
        self, changes: Changes, needs: list[Need], spare: dict[int, Spare]
    ) -> None:
        self._detach(changes)
        loose, cancels = iter(changes.loose), iter(changes.cancels)
        for index, need in enumerate(needs):
            item = self._adopt(need, *spare[index]) if index in spare else self._item_of(need)
            self.items["cost"][item] = need.cost
            if need.kind == CANCEL:
                self._put_cancel(item, next(cancels))
            elif need.kind == LOOSE:
                self._put_loose(item, next(loose))
            else:
                self._put_object(item, need)
        self._releases += changes.releases
        for fsbno, n in changes.extents:
            self.busy.add(fsbno, n, self.seq)

    def _detach(self, changes: Changes) -> None:
        """Buffers of freed blocks own nothing any more; what they held is held until then."""
        bufs = self._vol.bufs.table
        for handle in changes.stale:
            changes.releases.append(self._disown(bufs, handle))
        for handle in changes.bufs:
            if not bufs["item"][handle]:
                self._uncancel(handle)

    def _disown(self, table: Any, handle: int) -> int:
        """An object goes: its items stay without it. What it held."""
        for name in ("item", "going"):
            item = int(table[name][handle])
            if item:
                self.items["owner"][item] = 0
            table[name][handle] = 0
        held = int(table["held"][handle])
        table["held"][handle] = 0
        return held

    def forget_inode(self, handle: int) -> int:
        """The inode's cluster is freed: what it held, for `Changes.releases`."""
        return self._disown(self._vol.inodes.table, handle)

    def _uncancel(self, handle: int) -> None:
        """A block is used again in the same shape: the log brings its new content back."""
        for daddr, _, size in self._vol.bufs.parts(handle):
            item = self._cancels.pop((daddr, size), 0)
            if item:
                self.items["regions"][item] = self.items["used"][item] = 0

    def _adopt(self, need: Need, item: int, vector: int, room: int) -> int:
        """Give an object its first item, or the one that it has more memory."""
        table, old = self.items, self._item_of(need)
        if old:
            self._slab.free(item)
            if table["vector"][old]:
                self._vectors.free(int(table["vector"][old]), int(table["room"][old]))
            item = old
        else:
            table[item] = _EMPTY
            table["owner"][item] = need.owner
            self._append(item)
        table["vector"][item], table["room"][item] = vector, room
        return item

    def _append(self, item: int) -> None:
        if self._last:
            self.items["next"][self._last] = item
        else:
            self._first = item
        self._last = item
        self.count += 1

    def _put_object(self, item: int, need: Need) -> None:
        vol, handle = self._vol, need.owner
        table = vol.inodes.table if need.kind == INODE_ITEM else vol.bufs.table
        table["item"][handle], table["seq"][handle] = item, self.seq
        at, regions = int(self.items["vector"][item]), 0
        if need.kind == INODE_ITEM:
            ip = vol.inodes.view(handle)
            place, mem = inobt.imap(vol.geo, ip.ino), vol.arena.mem
            args = mem, at, vol.inodes.table, handle, ip.image_addr, place
            regions = formats.put_inode(vol.geo, *args)
        elif need.kind == POINTERS:
            regions = self._put_pointers(at, handle)
        elif need.kind == BUFFER:
            regions = self._put_buffer(at, handle)
        kind = int(self.items["kind"][item])
        if not (need.kind == ORDERED and kind == POINTERS):
            self.items["kind"][item] = need.kind
            self.items["used"][item], self.items["regions"][item] = need.size, regions

    def _put_pointers(self, at: int, handle: int) -> int:
        geo, mem = self._vol.geo, self._vol.arena.mem
        ((daddr, addr, size),) = self._vol.bufs.parts(handle)
        args = mem, at, daddr, addr, size, geo.inode_size, self._pointers, 0
        regions = int(formats.put_unlinked(*args))
        assert regions, f"the cluster at {daddr} has an unlinked pointer of 0"
        return regions

    def _put_buffer(self, at: int, handle: int) -> int:
        mem, regions = self._vol.arena.mem, 0
        parts = self._vol.bufs.parts(handle)
        kind = blocks.content_type(mem, parts[0][1])
        assert kind, f"the block at {parts[0][0]} is of no kind that is logged"
        if len(parts) > 1:  # no part is a block that recovery could stamp: it is logged as it goes
            kind = 0
            self._vol.bufs.stamp_crc(handle)
        for daddr, addr, size in parts:
            regions += int(formats.put_whole(mem, at, kind, daddr, addr, size))
            at += int(formats.whole_bytes(size))
        return regions

    def _put_loose(self, item: int, vector: bytes) -> None:
        at = int(self.items["vector"][item])
        self._vol.arena.mem[at : at + len(vector)] = np.frombuffer(vector, np.uint8)
        self._finish(item, LOOSE, len(vector))

    def _put_cancel(self, item: int, place: Place) -> None:
        daddr, size = place
        formats.put_cancel(self._vol.arena.mem, int(self.items["vector"][item]), daddr, size)
        self._finish(item, CANCEL, int(formats.cancel_bytes(size)))
        self._cancels[place] = item

    def _finish(self, item: int, kind: int, used: int) -> None:
        self.items["kind"][item], self.items["used"][item] = kind, used
        self.items["regions"][item] = 1

    # -- sealing --------------------------------------------------------------------------------

    def seal(self) -> Batch:
        """End the open context, which is to be written, and begin the next one."""
        vectors = np.zeros((self.count, 3), np.int64)
        n = _seal(*self.tables, self._first, vectors)
        batch = Batch(self.seq, self._first, vectors[:n], self._ticket, self._releases)
        self.seq += 1
        self._open()
        return batch

    def settle(self, batch: Batch, lsn: int) -> None:
        """A sealed context is stable: unpin its objects, who hold it from now on."""
        self._ail.became_stable(batch.seq, lsn)
        _settle(*self.tables, self._ail.held, batch.first, batch.seq, lsn)
        for seq in batch.releases:
            self._ail.release(seq)
        self.busy.stable(batch.seq)
        item = batch.first
        while item:
            record = self.items[item]
            after, vector, room = int(record["next"]), int(record["vector"]), int(record["room"])
            self._free(item, vector, room)
            item = after
