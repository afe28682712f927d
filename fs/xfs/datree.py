"""Trees of da blocks: the walk, and how a tree grows and shrinks around its leaves.

A tree has its root at a fixed file block of a fork. The root is a leaf while that is enough, and a
da node afterwards; children are anywhere in the fork. What a leaf is, where blocks come from and
how a block is read belongs to a `Shape`; this module knows nodes (danode.py), sibling chains and
hashes: a node's entry carries the largest hash of its child, exactly.

An unverified image may lie about the structure between blocks, so a walk checks that levels go
down by one, that no child reaches beyond its parent's hash, and that it ends.

Locking: the inode's ILOCK, exclusive to modify. The steps of one modification await (blocks are
allocated and read), which only the holder of the ILOCK can see. A modifying call that meets
corruption raises in a dirty transaction, which shuts the filesystem down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fs.xfs import danode
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.buf import Buf
    from fs.cache.inode import Inode
    from fs.errors import Corrupt
    from fs.log.transaction import Transaction

LINKS = L.off(L.DA_HEADER, "crc")  # forw, back, magic, pad: what a copied block takes along
IDENTITY_END = L.DA_HEADER.itemsize


class Shape(Protocol):
    """What differs between an attribute tree and a directory's hash tree."""

    name: str
    root: int

    async def read(self, tp: Transaction, ip: Inode, block: int) -> Buf:
        """Verified node or leaf at a file block. Raises Corrupt for a hole, too."""

    async def alloc(self, tp: Transaction, ip: Inode) -> tuple[int, Buf]:
        """A new file block from the reservation: zeroed, with uuid, blkno and owner set."""

    async def free(self, tp: Transaction, ip: Inode, block: int, buf: Buf) -> None:
        """Invalidate the buffer (before any await), unmap and free the block."""

    def count(self, buf: Buf) -> int:
        """Entries of a leaf."""

    def last_hash(self, buf: Buf) -> int:
        """Largest hash of a leaf that is not empty."""

    def joinable(self, left: Buf, right: Buf) -> bool:
        """Would one leaf hold both, with room to grow again?"""

    def join(self, left: Buf, right: Buf) -> None:
        """Move all of the right leaf into the left one."""


@dataclass(slots=True)
class Step:
    """A node on the way down, and which of its children was taken."""

    block: int
    buf: Buf
    index: int


@dataclass(slots=True)
class Place:
    """A leaf and the nodes above it, the root first."""

    path: list[Step]
    block: int
    buf: Buf


def is_node(buf: Buf) -> bool:
    """Is the block a da node rather than a leaf?"""
    return bool(danode.magic(buf.mem, buf.addr) == L.MAGIC_DA_NODE)


class DaTree:
    """One tree inside one transaction."""

    def __init__(self, shape: Shape, tp: Transaction, ip: Inode) -> None:
        self.shape, self.tp, self.ip = shape, tp, ip

    def corrupt(self, block: int, reason: str) -> Corrupt:
        """The error to raise: one log line is written."""
        where = f"ino {self.ip.ino} file block {block}"
        return self.tp.vol.corrupt(self.shape.name, where, reason)

    # -- walking --------------------------------------------------------------------------------

    async def seek(self, hash_value: int) -> Place:
        """The first leaf that may hold this hash, or where it would be inserted."""
        path: list[Step] = []
        block = self.shape.root
        buf = await self.shape.read(self.tp, self.ip, block)
        while is_node(buf):
            self._check_level(path, block, buf)
            index = int(danode.search(buf.mem, buf.addr, hash_value))
            index = min(index, int(danode.count(buf.mem, buf.addr)) - 1)
            path.append(Step(block, buf, index))
            block, buf = await self._child(path)
        self._check_leaf(path, block)
        return Place(path, block, buf)

    async def first(self) -> Place:
        """The leaf with the smallest hashes."""
        return await self.seek(0)

    async def next(self, place: Place) -> Place | None:
        """The leaf behind this one, None at the end of the tree.

        `place` is not changed. Whoever loops over `next` bounds the loop, see `leaves_max`.
        """
        path = [Step(step.block, step.buf, step.index) for step in place.path]
        while path:
            step = path[-1]
            if step.index + 1 < danode.count(step.buf.mem, step.buf.addr):
                break
            path.pop()
        if not path:
            return None
        path[-1].index += 1
        block, buf = await self._child(path)
        while is_node(buf):
            self._check_level(path, block, buf)
            path.append(Step(block, buf, 0))
            block, buf = await self._child(path)
        self._check_leaf(path, block)
        return Place(path, block, buf)

    @property
    def leaves_max(self) -> int:
        """More leaves than the inode has blocks is a loop."""
        return int(self.ip.nblocks)

    def _check_level(self, path: list[Step], block: int, buf: Buf) -> None:
        if path and danode.level(buf.mem, buf.addr) != self._level(path[-1]) - 1:
            raise self.corrupt(block, "node level does not fit its parent's")

    def _check_leaf(self, path: list[Step], block: int) -> None:
        if path and self._level(path[-1]) != 1:
            raise self.corrupt(block, "leaf under a node above level 1")

    def _level(self, step: Step) -> int:
        return int(danode.level(step.buf.mem, step.buf.addr))

    async def _child(self, path: list[Step]) -> tuple[int, Buf]:
        """The block under the last step, checked against it."""
        step = path[-1]
        block = int(danode.child_at(step.buf.mem, step.buf.addr, step.index))
        if block == self.shape.root or any(block == above.block for above in path):
            raise self.corrupt(step.block, "node points at its own ancestor")
        buf = await self.shape.read(self.tp, self.ip, block)
        bound = danode.hash_at(step.buf.mem, step.buf.addr, step.index)
        if self._count(buf) and self._last_hash(buf) > bound:
            raise self.corrupt(block, "hash beyond the parent's")
        return block, buf

    def _count(self, buf: Buf) -> int:
        return int(danode.count(buf.mem, buf.addr)) if is_node(buf) else self.shape.count(buf)

    def _last_hash(self, buf: Buf) -> int:
        if is_node(buf):
            return int(danode.last_hash(buf.mem, buf.addr))
        return self.shape.last_hash(buf)

    # -- hashes ---------------------------------------------------------------------------------

    def fix_hashes(self, place: Place) -> None:
        """Carry the leaf's largest hash up, after an insertion behind its last entry."""
        below = place.buf
        for step in reversed(place.path):
            mem, addr = step.buf.mem, step.buf.addr
            value = self._last_hash(below)
            if danode.hash_at(mem, addr, step.index) == value:
                return
            danode.set_hash(mem, addr, step.index, value)
            self.tp.log(step.buf)
            if step.index + 1 != danode.count(mem, addr):
                return
            below = step.buf

    # -- growing --------------------------------------------------------------------------------

    async def deepen(self, place: Place) -> None:
        """Move the root's contents to a new block under a root of one entry.

        `place` is updated: the leaf, or the path, goes through the new block.
        """
        shape, tp = self.shape, self.tp
        root = place.path[0].buf if place.path else place.buf
        level = int(danode.level(root.mem, root.addr)) if place.path else 0
        if level == danode.DEPTH_MAX:
            raise self.corrupt(shape.root, "tree as deep as a tree can be")
        block, buf = await shape.alloc(tp, self.ip)
        self._copy(root, buf)
        root.data[:LINKS] = 0
        root.data[IDENTITY_END:] = 0
        danode.init(root.mem, root.addr, level + 1)
        danode.insert(root.mem, root.addr, root.size, 0, self._last_hash(buf), block)
        tp.log(root)
        tp.log(buf)
        if place.path:
            place.path[0].block, place.path[0].buf = block, buf
        else:
            place.block, place.buf = block, buf
        place.path.insert(0, Step(shape.root, root, 0))

    @staticmethod
    def _copy(source: Buf, target: Buf) -> None:
        """Copy a block's contents but not its identity (CRC, blkno, lsn, uuid, owner)."""
        target.data[:LINKS] = source.data[:LINKS]
        target.data[IDENTITY_END:] = source.data[IDENTITY_END:]

    async def add_leaf(self, place: Place) -> tuple[int, Buf]:
        """A new block in the chain right behind the leaf; `adopt` puts it into the tree.

        The caller makes it a leaf, distributes entries and logs it, all before it awaits. The
        leaf must not be the root: `deepen` first.
        """
        assert place.path
        return await self._new_sibling(place.block, place.buf)

    async def _new_sibling(self, left_block: int, left: Buf) -> tuple[int, Buf]:
        """A new block behind `left` in its level's chain, not logged yet."""
        after = int(danode.forw(left.mem, left.addr))
        right = await self._sibling(left_block, after, danode.back) if after else None
        block, buf = await self.shape.alloc(self.tp, self.ip)
        danode.set_forw(left.mem, left.addr, block)
        danode.set_back(buf.mem, buf.addr, left_block)
        danode.set_forw(buf.mem, buf.addr, after)
        self.tp.log(left)
        if right is not None:
            danode.set_back(right.mem, right.addr, block)
            self.tp.log(right)
        return block, buf

    async def _sibling(self, block: int, other: int, pointer: Callable[..., int]) -> Buf:
        """The neighbour `other` of a block; its pointer must lead back to the block."""
        buf = await self.shape.read(self.tp, self.ip, other)
        if pointer(buf.mem, buf.addr) != block:
            raise self.corrupt(other, f"sibling pointer does not lead back to block {block}")
        return buf

    async def adopt(self, place: Place, block: int, buf: Buf) -> None:
        """Enter a new right neighbour of the leaf into the nodes; both are filled already."""
        await self._adopt(place, len(place.path) - 1, place.buf, block, buf)

    async def _adopt(self, place: Place, depth: int, left: Buf, block: int, buf: Buf) -> None:
        step = place.path[depth]
        mem, addr = step.buf.mem, step.buf.addr
        danode.set_hash(mem, addr, step.index, self._last_hash(left))
        self.tp.log(step.buf)
        value = self._last_hash(buf)
        if danode.insert(mem, addr, step.buf.size, step.index + 1, value, block) == 0:
            self._fix_above(place, depth)
            return
        if depth == 0:
            await self.deepen(place)
            depth, step = 1, place.path[1]
        await self._split_node(place, depth, block, value)

    async def _split_node(self, place: Place, depth: int, child: int, value: int) -> None:
        """Halve a full node that is not the root, inserting (value, child) behind its index."""
        step = place.path[depth]
        mem, addr, size = step.buf.mem, step.buf.addr, step.buf.size
        block, buf = await self._new_sibling(step.block, step.buf)
        danode.init(mem, buf.addr, danode.level(mem, addr))
        n = int(danode.count(mem, addr))
        half = n // 2
        danode.move(mem, addr, half, n - half, buf.addr, 0)
        at = step.index + 1
        if at <= half:
            danode.insert(mem, addr, size, at, value, child)
        else:
            danode.insert(mem, buf.addr, size, at - half, value, child)
        await self._adopt(place, depth - 1, step.buf, block, buf)

    def _fix_above(self, place: Place, depth: int) -> None:
        """Carry a node's largest hash up."""
        self.fix_hashes(Place(place.path[:depth], place.path[depth].block, place.path[depth].buf))

    # -- shrinking ------------------------------------------------------------------------------

    async def rebalance(self, place: Place) -> None:
        """Repair the tree above a leaf that lost entries: drop it if empty, join, lower the root.

        Afterwards `place` is stale. A tree of one leaf ends as a root that is this leaf, possibly
        empty. No node is ever left without entries across an await.
        """
        path = place.path
        if any(danode.count(step.buf.mem, step.buf.addr) > 1 for step in path):
            block, buf = place.block, place.buf
            gone = self.shape.count(buf) == 0
            for step in reversed(path):
                if gone:
                    gone = await self._drop(step, step.index, block, buf)
                else:
                    danode.set_hash(step.buf.mem, step.buf.addr, step.index, self._last_hash(buf))
                    self.tp.log(step.buf)
                    await self._join(step, block, buf)
                block, buf = step.block, step.buf
        await self._lower_root()

    async def _drop(
        self, step: Step, index: int, block: int, buf: Buf, heir: Buf | None = None
    ) -> bool:
        """Take a child out of its chain and its parent, and free it; True if the parent goes, too.

        With `heir`, its left neighbour, it hands over its entries first.
        """
        forw, back = int(danode.forw(buf.mem, buf.addr)), int(danode.back(buf.mem, buf.addr))
        left = await self._sibling(block, back, danode.forw) if back else None
        right = await self._sibling(block, forw, danode.back) if forw else None
        mem, addr = step.buf.mem, step.buf.addr
        if heir is not None:
            self._hand_over(heir, buf)
            danode.set_hash(mem, addr, index - 1, self._last_hash(heir))
            self.tp.log(heir)
        if left is not None:
            danode.set_forw(mem, left.addr, forw)
            self.tp.log(left)
        if right is not None:
            danode.set_back(mem, right.addr, back)
            self.tp.log(right)
        emptied = bool(danode.count(mem, addr) == 1)
        if not emptied:
            danode.delete(mem, addr, index)
            self.tp.log(step.buf)
        await self.shape.free(self.tp, self.ip, block, buf)
        return emptied

    async def _join(self, step: Step, block: int, buf: Buf) -> None:
        """Join a child with a neighbour under the same node when both are rather empty."""
        mem, addr = step.buf.mem, step.buf.addr
        for left_index in (step.index, step.index - 1):
            if left_index < 0 or left_index + 1 >= danode.count(mem, addr):
                continue
            here = left_index == step.index
            other_block = int(danode.child_at(mem, addr, left_index + (1 if here else 0)))
            other = await self.shape.read(self.tp, self.ip, other_block)
            if is_node(other) != is_node(buf):
                raise self.corrupt(other_block, "siblings of different kinds")
            left, right = (buf, other) if here else (other, buf)
            if self._joinable(left, right):
                right_block = other_block if here else block
                await self._drop(step, left_index + 1, right_block, right, heir=left)
                return

    def _joinable(self, left: Buf, right: Buf) -> bool:
        """Would one block hold both, with a quarter of it left to grow?"""
        if not is_node(left):
            return self.shape.joinable(left, right)
        both = danode.count(left.mem, left.addr) + danode.count(right.mem, right.addr)
        return bool(both <= (left.size - danode.HEADER) // danode.ENTRY * 3 // 4)

    def _hand_over(self, left: Buf, right: Buf) -> None:
        if not is_node(left):
            self.shape.join(left, right)
            return
        n, more = danode.count(left.mem, left.addr), danode.count(right.mem, right.addr)
        danode.move(left.mem, right.addr, 0, more, left.addr, n)

    async def _lower_root(self) -> None:
        """While the root has one child, take the child's contents and free its block."""
        root = await self.shape.read(self.tp, self.ip, self.shape.root)
        while is_node(root) and danode.count(root.mem, root.addr) == 1:
            block, buf = await self._child([Step(self.shape.root, root, 0)])
            if danode.forw(buf.mem, buf.addr) or danode.back(buf.mem, buf.addr):
                raise self.corrupt(block, "only child with a sibling")
            self._copy(buf, root)
            self.tp.log(root)
            await self.shape.free(self.tp, self.ip, block, buf)
