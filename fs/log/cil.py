"""The CIL: what transactions changed, collected until a checkpoint takes it to the log.

A context collects for one checkpoint. Each object that was changed has one item in it, with a log
vector: the object as the last transaction left it that committed. Committing copies the object
again, so whoever changes it next, before or after the context is sealed, disturbs nobody. Memory
for vectors is taken before that; afterwards nothing waits and nothing allocates.

Items of a buffer: all of it; of an inode cluster only the unlinked pointers, or nothing at all if
it was just made (ICREATE says what recovery needs, the item only keeps the log until the cluster is
at home). A block that was freed has an item that cancels what the log says about it, instead of
its buffer's; if it is used again in the same shape in the same context, the new buffer's item takes
the place of that one.

Invariants: an object has at most one item in the open context (`item`) and one in the sealed one
(`going`); objects of contexts that are not stable are pinned by their `seq`. One context is sealed
at a time. An item whose object is gone has no owner; an inode's is written all the same.

Locking: trio thread only; committing and sealing are atomic between awaits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alloc import gfp
from alloc.jit import kernel
from fs.cache.buf import BUF, F_PIECES, keep_in_log
from fs.cache.incore import INODE
from fs.cache.resident import TOUCHED
from fs.log import ail, commit, formats, items
from fs.log.busy import Busy
from fs.log.changes import BUFFER, CANCEL, INODE_ITEM, LOOSE, Changes, Place
from fs.log.commit import (
    C_CLUSTER_BYTES,
    C_CLUSTER_OPS,
    C_COUNT,
    C_FIRST,
    C_LAST,
    C_POINTER_BYTES,
    C_POINTER_REGIONS,
    C_SEQ,
    COLUMNS,
    ITEM,
    OPERATION_BYTES,
    R_ITEM,
    R_KIND,
    R_LACKS,
    R_OWN,
    R_OWNER,
    R_PLACE,
    R_SIZE,
    S_ITEM,
    S_ROOM,
    S_VECTOR,
    STOCK,
    WORDS,
    insert,
    insert_touched,
    measure,
)
from fs.xfs import inode
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.log.grant import Context, Ticket
    from fs.log.vectors import Vectors
    from fs.volume import Volume

# An inode's vector is larger than the inode by its head, four lengths, two roots' headers.
INODE_MORE = items.INODE_HEAD.size + 4 * formats.LENGTH + 2 * (L.LONG_BLOCK.itemsize + 4)
# What a transaction changes at most that is one kernel (fs/xfs/residentname.py).
QUICK_BLOCKS, QUICK_DIR_BLOCKS, QUICK_CLUSTERS, QUICK_INODES = 6, 8, 2, 3

Rows = NDArray[np.int64]  # (n, COLUMNS), of fs/log/commit.py


class Batch(NamedTuple):
    """A sealed context."""

    seq: int
    first: int  # item
    items: int
    vectors: NDArray[np.int64]  # (n, 3): address, bytes, regions
    ticket: Context
    releases: list[int]


# -- kernels --------------------------------------------------------------------------------------


def _tables(*rest: Any) -> Any:
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


@kernel(_tables(ail.sample(), 1, 1, 1, np.zeros((1, 3), np.int64)))
def _settle(items, bufs, inodes, held, first, seq, lsn, out):
    """The checkpoint is stable: its objects hold it, instead of an older one if all is in it.

    Fills `out` with what can be freed: item, vector and its room.
    """
    i, n = first, 0
    while i != 0:
        out[n, 0], out[n, 1], out[n, 2] = i, items["vector"][i], items["room"][i]
        n += 1
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
        self._context = self._new_context()
        self._taken = len(self._context.stock) or 1  # vectors that the stock lacks
        self.busy = Busy()
        self._open()

    def _new_context(self) -> commit.Context:
        vol, geo = self._vol, self._vol.geo
        words = np.zeros(WORDS, np.int64)
        words[C_CLUSTER_OPS] = vol.bufs.number_of(inode.INODE_OPS)
        words[C_CLUSTER_BYTES] = geo.cluster_bytes
        words[C_POINTER_BYTES] = formats.chunks_bytes(geo.cluster_bytes, self._pointers, 0)
        words[C_POINTER_REGIONS] = self._pointer_regions
        tables = vol.arena.mem, *self.tables
        numbers = inode.limits(geo), inode.uuid_bytes(geo)
        rows = np.zeros((2 * TOUCHED, COLUMNS), np.int64)
        return commit.Context(*tables, words, self._pointers, *numbers, self._empty_stock(), rows)

    def _open(self) -> None:
        words = self._context.words
        words[C_SEQ], words[C_FIRST], words[C_LAST], words[C_COUNT] = self.seq, 0, 0, 0
        self._releases: list[int] = []
        self._cancels: dict[Place, int] = {}  # items
        self._ticket: Context = self._open_ticket(f"checkpoint {self.seq}")

    @property
    def count(self) -> int:
        """Items in the open context."""
        return int(self._context.words[C_COUNT])

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
        rows = self._rows(changes)
        try:
            while True:  # a context that is sealed meanwhile takes its memory along
                seq, growth = self.seq, measure(self._context, rows)
                for i in np.flatnonzero(rows[:, R_LACKS]).tolist():
                    rows[i, R_ITEM:R_LACKS] = await self._new(int(rows[i, R_SIZE]))
                if seq == self.seq:
                    break
            self._pay(growth, ticket)
        except BaseException:
            self._free_spare(rows)
            raise
        self._insert(changes, rows)
        self._free_spare(rows)

    def commit_now(self, bufs_touched: Rows, inodes_touched: Rows, ticket: Ticket) -> None:
        """The same for what kernels put on these lists, with the memory in stock.

        `stocked` was true when the transaction began. Raises Overrun, when it is too late.
        """
        if self._cancels:
            for handle in bufs_touched[1 : 1 + bufs_touched[0]].tolist():
                self._uncancel(handle)
        n, growth, taken, spare = insert_touched(self._context, bufs_touched, inodes_touched)
        self._taken += taken
        assert n >= 0, "no log vector in stock, or a block of no kind that is logged"
        if spare:
            self._free_spare(self._context.rows[:n])
        self._pay(growth, ticket)

    def _pay(self, growth: int, ticket: Ticket) -> None:
        """The ticket pays for what the context is larger by. Raises Overrun."""
        if growth or not self._ticket.total:
            self._ticket.take(ticket, growth)

    # -- memory ---------------------------------------------------------------------------------

    @property
    def stocked(self) -> bool:
        """Is there memory for whatever a transaction changes that waits for nothing?"""
        return not self._taken or self._restock()

    def _restock(self) -> bool:
        stock = self._context.stock
        for i in np.flatnonzero(stock[:, S_ITEM] == 0).tolist():
            item = self._slab.try_alloc(gfp.NOWAIT)  # who finds nothing waits elsewhere
            if item is None:
                return False
            vector = self._vectors.try_now(int(stock[i, S_ROOM]))
            if vector is None:
                self._slab.free(item)
                return False
            stock[i, S_ITEM], stock[i, S_VECTOR] = item, vector
            self._taken -= 1
        return bool(len(stock))

    def _empty_stock(self) -> Rows:
        """A row for each vector that the largest such transaction needs; none if too much."""
        geo = self._vol.geo
        sizes: list[int] = []
        for size, count in (
            (formats.whole_bytes(geo.sector_size), 1),
            (formats.whole_bytes(geo.block_size), QUICK_BLOCKS),
            (formats.whole_bytes(geo.dir_block_size), QUICK_DIR_BLOCKS),
            (formats.chunks_bytes(geo.cluster_bytes, self._pointers, 0), QUICK_CLUSTERS),
            (geo.inode_size + INODE_MORE, QUICK_INODES),
        ):
            sizes += [int(size)] * count
        if sum(sizes) > self._vol.arena.memory_bytes // 16:
            sizes = []
        stock = np.zeros((len(sizes), STOCK), np.int64)
        stock[:, S_ROOM] = sorted(sizes)
        return stock

    async def _new(self, size: int) -> tuple[int, int, int]:
        """An item without owner, memory for its vector, and how many bytes that has."""
        item = await self._slab.alloc(gfp.KERNEL | gfp.NOFAIL)
        try:
            return item, await self._vectors.alloc(size) if size else 0, size
        except BaseException:
            self._slab.free(item)
            raise

    def _free_spare(self, rows: Rows) -> None:
        """Whatever memory is left in rows."""
        for item, vector, room in rows[:, R_ITEM:R_LACKS].tolist():
            self._free(item, vector, room)

    def _free(self, item: int, vector: int, room: int) -> None:
        if vector:
            self._vectors.free(vector, room)
        if item:
            self._slab.free(item)

    # -- what there is to commit ----------------------------------------------------------------

    def _rows(self, changes: Changes) -> Rows:
        """One for each item, in the order of its changes; sizes only of what kernels cannot see."""
        found = [self._buffer_row(h, kind) for h, kind in changes.bufs.items()]
        found += [(INODE_ITEM, h, 0, 0, 0) for h in changes.inodes]
        found += [(LOOSE, 0, 1, len(v), len(v) + OPERATION_BYTES) for v in changes.loose]
        for _, size in changes.cancels:
            nbytes = int(formats.cancel_bytes(size))
            found.append((CANCEL, 0, 1, nbytes, nbytes + OPERATION_BYTES))
        rows = np.zeros((len(found), COLUMNS), np.int64)
        rows[:, :R_ITEM] = np.array(found, np.int64).reshape(-1, R_ITEM)
        return rows

    def _buffer_row(self, handle: int, kind: int) -> tuple[int, int, int, int, int]:
        if kind != BUFFER or not self._vol.bufs.flags[handle] & F_PIECES:
            return kind, handle, 0, 0, 0
        parts = self._vol.bufs.parts(handle)
        size = sum(int(formats.whole_bytes(nbytes)) for _, _, nbytes in parts)
        return kind, handle, 1, size, size + 2 * OPERATION_BYTES * len(parts)

    # -- nothing waits and nothing allocates from here on ---------------------------------------

    def _insert(self, changes: Changes, rows: Rows) -> None:
        self._detach(changes)
        n = insert(self._context, rows)
        assert n == len(rows), f"buffer {rows[n].tolist()} is of no kind that is logged"
        loose, cancels = iter(changes.loose), iter(changes.cancels)
        for i in np.flatnonzero(rows[:, R_OWN]).tolist():
            kind, handle, item = (int(rows[i, k]) for k in (R_KIND, R_OWNER, R_PLACE))
            if kind == CANCEL:
                self._put_cancel(item, next(cancels))
            elif kind == LOOSE:
                self._put_loose(item, next(loose))
            else:
                self._put_pieces(item, handle)
        self._releases += changes.releases
        for fsbno, n in changes.extents:
            self.busy.add(fsbno, n, self.seq)

    def _detach(self, changes: Changes) -> None:
        """Buffers of freed blocks own nothing any more; what they held is held until then."""
        bufs = self._vol.bufs.table
        for handle in changes.stale:
            self._leave_out(int(bufs["item"][handle]))
            changes.releases.append(self._disown(bufs, handle))
        for handle in changes.bufs if self._cancels else ():
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
        if self._vol.bufs.table["item"][handle]:
            return
        for daddr, _, size in self._vol.bufs.parts(handle):
            self._leave_out(self._cancels.pop((daddr, size), 0))

    def _leave_out(self, item: int) -> None:
        """Nothing of the item is written; 0 is none."""
        if item:
            self.items["regions"][item] = self.items["used"][item] = 0

    def _put_pieces(self, item: int, handle: int) -> None:
        """No part is a block that recovery could stamp: it is logged as it goes home."""
        self._vol.bufs.stamp_crc(handle)
        at, regions = int(self.items["vector"][item]), 0
        start = at
        for daddr, addr, size in self._vol.bufs.parts(handle):
            regions += int(formats.put_whole(self._context.mem, at, 0, daddr, addr, size))
            at += int(formats.whole_bytes(size))
        self._finish(item, BUFFER, at - start, regions)

    def _put_loose(self, item: int, vector: bytes) -> None:
        at = int(self.items["vector"][item])
        self._vol.arena.mem[at : at + len(vector)] = np.frombuffer(vector, np.uint8)
        self._finish(item, LOOSE, len(vector), 1)

    def _put_cancel(self, item: int, place: Place) -> None:
        daddr, size = place
        formats.put_cancel(self._vol.arena.mem, int(self.items["vector"][item]), daddr, size)
        self._finish(item, CANCEL, int(formats.cancel_bytes(size)), 1)
        self._cancels[place] = item

    def _finish(self, item: int, kind: int, used: int, regions: int) -> None:
        self.items["kind"][item], self.items["used"][item] = kind, used
        self.items["regions"][item] = regions

    # -- sealing --------------------------------------------------------------------------------

    def seal(self) -> Batch:
        """End the open context, which is to be written, and begin the next one."""
        first, vectors = int(self._context.words[C_FIRST]), np.zeros((self.count, 3), np.int64)
        n = _seal(*self.tables, first, vectors)
        batch = Batch(self.seq, first, self.count, vectors[:n], self._ticket, self._releases)
        self.seq += 1
        self._open()
        return batch

    def settle(self, batch: Batch, lsn: int) -> None:
        """A sealed context is stable: unpin its objects, who hold it from now on."""
        self._ail.became_stable(batch.seq, lsn)
        memory = np.zeros((batch.items, 3), np.int64)
        _settle(*self.tables, self._ail.held, batch.first, batch.seq, lsn, memory)
        for seq in batch.releases:
            self._ail.release(seq)
        self.busy.stable(batch.seq)
        for item, vector, room in memory.tolist():
            self._free(item, vector, room)
