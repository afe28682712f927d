"""Leaf form and node form: directories whose hash index has blocks of its own.

In leaf form one LEAF1 block holds all hashes and the bests table. In node form the hashes are in
LEAFN blocks under da nodes (or in one LEAFN that is the root) and the bests in free index blocks.
`TreeDir` is one such directory inside one transaction; it changes its form when it must.

Adding reads what decides about the place of the name before anything is changed, then takes new
blocks from the reservation. Removing works without any reservation: what could then not be undone
(an empty data block inside an extent, a poor leaf) stays, which XFS allows.

Locking: the directory's ILOCK, exclusive to modify. Steps of one change await between them, which
only the holder can see. A contradiction found after the first change shuts the filesystem down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fs.cache.buf import Buf
from fs.xfs import danode, dirbuf
from fs.xfs import dirblock as B
from fs.xfs import dirdata as D
from fs.xfs import dirleaf as F
from fs.xfs import layout as L
from fs.xfs.datree import DaTree, Place

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction


class Found(NamedTuple):
    """An entry and its hash slot. `place` is None in leaf form."""

    data: Buf
    db: int
    offset: int
    leaf: Buf
    slot: int
    place: Place | None


class Space(NamedTuple):
    """Where a name goes in node form; without `data` block db has yet to be made."""

    db: int
    fb: int
    free: Buf | None
    data: Buf | None


class TreeDir:
    """A directory in leaf or node form. `root` is the block at the hash tree's root."""

    def __init__(self, tp: Transaction, dp: Inode, root: Buf) -> None:
        self.tp, self.dp, self.root = tp, dp, root
        self.geo = tp.vol.geo
        self.size = self.geo.dir_block_size
        self.tree = DaTree(dirbuf.HashTree(self.geo), tp, dp)

    @property
    def is_leaf(self) -> bool:
        return bool(danode.magic(self.root.mem, self.root.addr) == L.MAGIC_DIR_LEAF1)

    # -- lookup ---------------------------------------------------------------------------------

    async def find(self, name: bytes) -> Found | None:
        """The entry of a name. Names of one hash may go on into the next leaves."""
        hash_value = int(D.name_hash(name))
        if self.is_leaf:
            return await self._find_in(self.root, None, hash_value, name)
        place: Place | None = await self.tree.seek(hash_value)
        for _ in range(self.tree.leaves_max):
            assert place is not None
            self._expect_leafn(place)
            found = await self._find_in(place.buf, place, hash_value, name)
            if found is not None or F.last_hash(place.buf.mem, place.buf.addr) != hash_value:
                return found
            place = await self.tree.next(place)
            if place is None:
                return None
        raise dirbuf.fault(self.tp, self.dp, "hash leaves form a loop")

    def _expect_leafn(self, place: Place) -> None:
        if danode.magic(place.buf.mem, place.buf.addr) != L.MAGIC_DIR_LEAFN:
            raise dirbuf.fault(self.tp, self.dp, f"hash block {place.block} is no leaf")

    async def _find_in(
        self, leaf: Buf, place: Place | None, hash_value: int, name: bytes
    ) -> Found | None:
        index, at = F.find(leaf.mem, leaf.addr, hash_value)
        while index >= 0:
            db, offset = divmod(at << 3, self.size)
            data = await self.data_block(db)
            if not D.entry_at(data.mem, data.addr, data.size, offset):
                raise dirbuf.fault(self.tp, self.dp, f"hash points at no entry: {at << 3:#x}")
            if D.matches(data.mem, data.addr, offset, name):
                return Found(data, db, offset, leaf, index, place)
            index, at = F.find_next(leaf.mem, leaf.addr, index)
        return None

    async def data_block(self, db: int) -> Buf:
        """Data block db, which must have no leaf inside."""
        data = await dirbuf.read_data(self.tp, self.dp, db)
        if D.is_block_form(data.mem, data.addr):
            raise dirbuf.fault(self.tp, self.dp, f"data block {db} is of another form")
        return data

    # -- adding ---------------------------------------------------------------------------------

    async def add(self, name: bytes, ino: int, ftype: int) -> None:
        """Add a name that is not there. Blocks come from the reservation."""
        if self.is_leaf:
            if await self._add_to_leaf(name, ino, ftype):
                return
            await self._to_node()
        await self._add_to_node(name, ino, ftype)

    async def _add_to_leaf(self, name: bytes, ino: int, ftype: int) -> bool:
        """False when the leaf has no room for the hash or for another best."""
        leaf, mem = self.root, self.root.mem
        need = D.entry_bytes(len(name))
        db = int(F.best_fit(mem, leaf.addr, leaf.size, need))
        fresh = db < 0
        if fresh:
            db = int(F.best_hole(mem, leaf.addr, leaf.size))
        longer = db < 0
        if longer:
            db = int(F.bestcount(mem, leaf.addr, leaf.size))
        if not F.fits(mem, leaf.addr, leaf.size, longer):
            return False
        if longer and db != self.dp.size >> self.geo.dir_block_log:
            raise dirbuf.fault(self.tp, self.dp, "bests table does not cover the directory")
        data = await dirbuf.new_data(self.tp, self.dp, db) if fresh else await self.data_block(db)
        if longer:
            F.add_best(mem, leaf.addr, leaf.size)
        offset = self._put(data, db, name, ino, ftype)
        F.set_best(mem, leaf.addr, leaf.size, db, D.longest(mem, data.addr))
        hash_value = D.name_hash(name)
        F.insert(mem, leaf.addr, leaf.size, hash_value, (db * self.size + offset) >> 3)
        self.tp.log(leaf)
        return True

    def _put(self, data: Buf, db: int, name: bytes, ino: int, ftype: int) -> int:
        """Write the entry into a data block that must have room; its offset."""
        offset = int(D.add(data.mem, data.addr, data.size, name, ino, ftype))
        if offset < 0:
            raise dirbuf.fault(self.tp, self.dp, f"data block {db} is fuller than its best says")
        self.tp.log(data)
        return offset

    async def _to_node(self) -> None:
        """Leaf form becomes node form: the bests move to the first free index block."""
        free = await dirbuf.new_free(self.tp, self.dp, 0)
        F.leaf_to_node(self.root.mem, self.root.addr, free.addr, self.size)
        self.tp.log(free)
        self.tp.log(self.root)

    async def _add_to_node(self, name: bytes, ino: int, ftype: int) -> None:
        hash_value = int(D.name_hash(name))
        place = await self.tree.seek(hash_value)
        self._expect_leafn(place)
        space = await self._find_space(D.entry_bytes(len(name)))
        data, free = space.data, space.free
        if data is None:
            data = await dirbuf.new_data(self.tp, self.dp, space.db)
        if free is None:
            free = await dirbuf.new_free(self.tp, self.dp, space.fb)
        offset = self._put(data, space.db, name, ino, ftype)
        slot = space.db - int(F.free_first(free.mem, free.addr))
        F.set_free(free.mem, free.addr, slot, D.longest(data.mem, data.addr))
        self.tp.log(free)
        await self._insert(place, hash_value, (space.db * self.size + offset) >> 3)

    async def _find_space(self, need: int) -> Space:
        """A data block with room, looked for from the directory's end; else where to make one."""
        new: Space | None = None
        capacity = dirbuf.free_capacity(self.geo)
        count = -(-(self.dp.size >> self.geo.dir_block_log) // capacity)
        for fb in range(count - 1, -1, -1):
            free = await dirbuf.read_free(self.tp, self.dp, fb)
            if free is None:
                new = Space(fb * capacity, fb, None, None)
                continue
            i = int(F.free_fit(free.mem, free.addr, need))
            if i >= 0:
                db = fb * capacity + i
                return Space(db, fb, free, await self.data_block(db))
            i = int(F.free_hole(free.mem, free.addr, free.size))
            if i >= 0:
                new = Space(fb * capacity + i, fb, free, None)
        if new is not None:
            return new
        free = await dirbuf.read_free(self.tp, self.dp, count)  # left by removals, or none
        return Space(count * capacity, count, free, None)

    async def _insert(self, place: Place, hash_value: int, at: int) -> None:
        """Insert a hash slot into a leaf, splitting it when it is full."""
        leaf = place.buf
        if F.insert(leaf.mem, leaf.addr, leaf.size, hash_value, at) == 0:
            self.tp.log(leaf)
            self.tree.fix_hashes(place)
            return
        if not place.path:
            await self.tree.deepen(place)
            leaf = place.buf
        block, right = await self.tree.add_leaf(place)
        F.init_leaf(right.mem, right.addr, L.MAGIC_DIR_LEAFN)
        F.split(leaf.mem, leaf.addr, right.addr)
        target = leaf if hash_value <= F.last_hash(leaf.mem, leaf.addr) else right
        F.insert(target.mem, target.addr, target.size, hash_value, at)
        self.tp.log(leaf)
        self.tp.log(right)
        await self.tree.adopt(place, block, right)

    # -- removing -------------------------------------------------------------------------------

    async def remove(self, found: Found) -> Buf | None:
        """Remove an entry and shrink; the data block when the directory now is block form."""
        data, leaf = found.data, found.leaf
        free = await self._free_of(found.db)
        alone = D.is_alone(data.mem, data.addr, data.size, found.offset)
        gone = bool(alone) and found.db > 0 and await self._can_free_data(found.db)
        D.remove(data.mem, data.addr, data.size, found.offset)
        F.make_stale(leaf.mem, leaf.addr, found.slot)
        self.tp.log(leaf)
        best = F.NULL_BEST if gone else int(D.longest(data.mem, data.addr))
        if gone:
            await dirbuf.free_data(self.tp, self.dp, found.db, data)
        else:
            self.tp.log(data)
        if free is None:
            self._note_best(found.db, best)
        else:
            await self._note_free(free, found.db, best)
            assert found.place is not None
            await self._shrink_tree(found.place)
            if not await self._to_leaf():
                return None
        return await self._to_block()

    async def _free_of(self, db: int) -> Buf | None:
        """The free index block of a data block, None in leaf form."""
        if self.is_leaf:
            if db >= F.bestcount(self.root.mem, self.root.addr, self.size):
                raise dirbuf.fault(self.tp, self.dp, "bests table does not cover the directory")
            return None
        fb, slot = divmod(db, dirbuf.free_capacity(self.geo))
        free = await dirbuf.read_free(self.tp, self.dp, fb)
        if free is None or F.free_best(free.mem, free.addr, slot) == F.NULL_BEST:
            raise dirbuf.fault(self.tp, self.dp, f"free index does not know data block {db}")
        return free

    async def _can_free_data(self, db: int) -> bool:
        return await dirbuf.can_free(self.tp, self.dp, db * self.geo.dir_block_blocks)

    def _note_best(self, db: int, best: int) -> None:
        """Leaf form: record a data block's best; a table that ends in missing blocks is cut."""
        leaf = self.root
        F.set_best(leaf.mem, leaf.addr, leaf.size, db, best)
        if best == F.NULL_BEST:
            F.trim_bests(leaf.mem, leaf.addr, leaf.size)
        self.tp.log(leaf)

    async def _note_free(self, free: Buf, db: int, best: int) -> None:
        """Node form: the same in the free index, whose block goes when it describes nothing."""
        fb, slot = divmod(db, dirbuf.free_capacity(self.geo))
        block = dirbuf.free_root(self.geo) + fb * self.geo.dir_block_blocks
        last = best == F.NULL_BEST and F.free_used(free.mem, free.addr) == 1
        if last and await dirbuf.can_free(self.tp, self.dp, block):
            await dirbuf.free(self.tp, self.dp, block, free)
            return
        F.set_free(free.mem, free.addr, slot, best)
        self.tp.log(free)

    async def _shrink_tree(self, place: Place) -> None:
        """Join or drop leaves when one has become poor, if blocks are reserved for that."""
        poor = F.live(place.buf.mem, place.buf.addr) < dirbuf.leaf_capacity(self.size) // 2
        depth = len(place.path) + 1
        if poor and place.path and self.tp.blocks >= depth * dirbuf.split_blocks(self.geo):
            await self.tree.rebalance(place)

    async def _to_leaf(self) -> bool:
        """Node form becomes leaf form when one leaf and one free index block are left and fit."""
        if danode.magic(self.root.mem, self.root.addr) != L.MAGIC_DIR_LEAFN:
            return False
        await self._trim_free()
        if await dirbuf.count_free(self.tp, self.dp) != 1:
            return False
        free = await dirbuf.read_free(self.tp, self.dp, 0)
        if free is None:
            raise dirbuf.fault(self.tp, self.dp, "free index 0 is missing")
        root = self.root
        if F.node_to_leaf(root.mem, root.addr, free.addr, self.size) < 0:
            return False
        self.tp.log(root)
        await dirbuf.free(self.tp, self.dp, dirbuf.free_root(self.geo), free)
        return True

    async def _trim_free(self) -> None:
        """Free empty free index blocks at the end, which removals without reservation left."""
        count = await dirbuf.count_free(self.tp, self.dp)
        while count > 1:
            count -= 1
            free = await dirbuf.read_free(self.tp, self.dp, count)
            if free is None or F.free_used(free.mem, free.addr):
                return
            block = dirbuf.free_root(self.geo) + count * self.geo.dir_block_blocks
            await dirbuf.free(self.tp, self.dp, block, free)

    async def _to_block(self) -> Buf | None:
        """Leaf form becomes block form when only data block 0 is left and takes the hashes in."""
        leaf = self.root
        while self.dp.size > self.size:
            db = int(F.bestcount(leaf.mem, leaf.addr, leaf.size)) - 1
            empty = self.size - D.HEADER
            if db < 1 or F.best(leaf.mem, leaf.addr, leaf.size, db) != empty:
                return None
            await dirbuf.free_data(self.tp, self.dp, db, await self.data_block(db))
            self._note_best(db, F.NULL_BEST)
        data = await self.data_block(0)
        if B.from_leaf(data.mem, data.addr, leaf.addr, self.size) < 0:
            return None
        self.tp.log(data)
        await dirbuf.free(self.tp, self.dp, dirbuf.leaf_root(self.geo), leaf)
        return data
