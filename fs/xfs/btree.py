"""The generic B+tree: one cursor for every tree of XFS.

A `Cursor` walks and changes the tree that its `Root` stands for. Roots differ in where the root
pointer is kept (AG header, or a root block inside the inode fork) and in where blocks come from;
they live in ag.py and btroots.py. The kernels in btblock.py do all work inside blocks.

Invariants kept (XFS format): keys in nodes are exactly those of their children's first records
(and the largest high keys in the reverse map), siblings are chained, every block but the root is
at least half full, the root of an AG tree has at least two children or is a leaf.

Rules: the caller holds the lock that guards the tree (space lock, or ILOCK of the inode) for as
long as it uses the cursor, because operations may wait for blocks half-way. One cursor at a time
may change a tree; a cursor keeps its path only as long as no other one changes the tree.
An error after the first change is fatal for the transaction, as everywhere.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from fs.cache.buf import Buf
from fs.log.transaction import Transaction
from fs.xfs import btblock as bt
from fs.xfs import layout as L
from fs.xfs.btkind import Kind, Record

_SHORT = struct.Struct(">IHHIIQQ16sI")  # magic level numrecs left right blkno lsn uuid agno
_LONG = struct.Struct(">IHHQQQQ16sQ")
_U32, _U64 = struct.Struct(">I"), struct.Struct(">Q")
_SCRATCH = np.zeros(32, np.uint8)  # one record on its way into a block; never kept over an await
_SIGN, _WRAP = 1 << 63, 1 << 64


class Root(ABC):
    """Where a tree begins and where its blocks come from."""

    kind: Kind
    tp: Transaction
    owner: int  # agno, or ino
    block_size: int
    in_inode = False

    @property
    @abstractmethod
    def levels(self) -> int:
        """Number of levels; a root leaf is 1. For an inode root, the root itself counts."""

    @property
    @abstractmethod
    def top(self) -> int:
        """Block number of the root block (AG trees)."""

    @abstractmethod
    def set_top(self, block: int, levels: int) -> None:
        """Another root block, another height (AG trees)."""

    def area(self) -> tuple[int, int]:
        """Address and size of the inode's root, as a block of kind BMAP_ROOT."""
        raise AssertionError("only inode roots have an area")

    def log_area(self) -> None:
        """The inode's root changed."""
        raise AssertionError("only inode roots have an area")

    @abstractmethod
    def daddr(self, block: int) -> int:
        """Where a block is. Raises Corrupt if there can be none."""

    @abstractmethod
    async def alloc_block(self, near: int) -> int:
        """A new block of the tree, near another one; counters follow."""

    @abstractmethod
    async def free_block(self, block: int) -> None:
        """Give a block back; counters follow. Its buffer was invalidated before."""

    @property
    @abstractmethod
    def uuid(self) -> bytes:
        """What blocks of this filesystem carry."""

    @abstractmethod
    def corrupt(self, where: str, reason: str) -> Exception:
        """The error to raise for a broken tree; logs one line."""


class _Step:
    """One level of a cursor's path: a block and the position in it."""

    __slots__ = ("addr", "block", "buf", "i", "kind", "n", "size")

    def __init__(self) -> None:
        self.block = -1  # -1: nothing loaded; the inode's root has no number
        self.buf: Buf | None = None
        self.addr = self.size = self.kind = 0
        self.i = 0  # index of the record or entry
        self.n = 0  # number of them


class Cursor:
    """A position in a tree, and the operations there.

    After a successful lookup, `first`, `last`, `next`, `prev`, `settle`, `overlap` or `insert` the
    cursor stands on a record. Methods that move return whether there is one.
    """

    def __init__(self, root: Root) -> None:
        self.root = root
        self.kind = root.kind
        self.tp = root.tp
        self.mem: np.ndarray[Any, np.dtype[np.uint8]] = root.tp.vol.arena.mem
        self.block_bbs = root.block_size >> L.BB_LOG
        self._path: list[_Step] = []
        self._leaf_max = root.kind.leaf_max(root.block_size)
        self._node_max = root.kind.node_max(root.block_size)

    # -- walking --------------------------------------------------------------------------------

    async def _load(self, s: _Step, block: int) -> None:
        """Make a step stand on a block."""
        buf = await self.tp.read(
            self.root.daddr(block), self.block_bbs, self.kind.ops, self.root.owner
        )
        s.buf, s.block, s.addr, s.size, s.kind = buf, block, buf.addr, buf.size, self.kind.id

    async def _load_top(self) -> int:
        """Fit the path to the tree's height and load its top; returns the top level."""
        root, path = self.root, self._path
        levels = root.levels
        if len(path) != levels:
            path[:] = [_Step() for _ in range(levels)]
        s = path[-1]
        if root.in_inode:
            s.buf, s.block, s.kind = None, -1, bt.BMAP_ROOT
            s.addr, s.size = root.area()
        elif s.block != root.top:
            await self._load(s, root.top)
        return levels - 1

    def _broken(self, level: int, code: int) -> Exception:
        reason = "unexpected level" if code == -1 else "empty block"
        return self.root.corrupt(f"block {self._path[level].block}", reason)

    async def _descend(self, k0: int, k1: int, k2: int) -> bool:
        """Go to the first record of a leaf whose key is >= the key; returns whether it is equal."""
        level = await self._load_top()
        path, mem = self._path, self.mem
        if k2 >= _SIGN:
            k2 -= _WRAP
        while True:
            s = path[level]
            i, found, n = bt.step(mem, s.addr, s.size, s.kind, level, k0, k1, k2)
            if i < 0:
                raise self._broken(level, i)
            s.i, s.n = i, n
            if level == 0:
                return bool(found)
            level -= 1
            s = path[level]
            if s.block != found:
                await self._load(s, found)

    async def _run_down(self, level: int, last: bool) -> None:
        """From the entry at `level` go down along the first or last entries to a leaf."""
        path = self._path
        while level > 0:
            s = path[level]
            block = bt.pointer(self.mem, s.addr, s.size, s.kind, s.i)
            level -= 1
            child = path[level]
            if child.block != block:
                await self._load(child, block)
            code, _, n = bt.step(self.mem, child.addr, child.size, child.kind, level, 0, 0, 0)
            if code < 0 or n == 0:
                raise self._broken(level, code if code < 0 else -2)
            child.n, child.i = n, n - 1 if last else 0

    async def _edge(self, last: bool) -> bool:
        level = await self._load_top()
        s = self._path[level]
        code, _, s.n = bt.step(self.mem, s.addr, s.size, s.kind, level, 0, 0, 0)
        if code < 0:
            raise self._broken(level, code)
        s.i = s.n - 1 if last else 0
        if s.n == 0:
            return False
        await self._run_down(level, last)
        return True

    async def first(self) -> bool:
        """To the first record; False if the tree is empty."""
        return await self._edge(False)

    async def last(self) -> bool:
        """To the last record; False if the tree is empty."""
        return await self._edge(True)

    async def lookup_eq(self, k0: int, k1: int = 0, k2: int = 0) -> bool:
        """To the record with exactly this key."""
        return await self._descend(k0, k1, k2)

    async def lookup_ge(self, k0: int, k1: int = 0, k2: int = 0) -> bool:
        """To the first record whose key is at or after this one."""
        await self._descend(k0, k1, k2)
        return await self.settle()

    async def lookup_le(self, k0: int, k1: int = 0, k2: int = 0) -> bool:
        """To the last record whose key is at or before this one."""
        if await self._descend(k0, k1, k2):
            return True
        return await self.prev()

    async def settle(self) -> bool:
        """Stand on a record after a position behind a leaf's end (after delete); False: no more."""
        s = self._path[0]
        if s.i < s.n:
            return True
        return await self._climb(1)

    async def next(self) -> bool:
        """To the following record; False (and nothing moves) at the end."""
        s = self._path[0]
        if s.i + 1 < s.n:
            s.i += 1
            return True
        return await self._climb(1)

    async def prev(self) -> bool:
        """To the preceding record; False (and nothing moves) at the beginning."""
        s = self._path[0]
        if s.i > 0:
            s.i -= 1
            return True
        return await self._climb(-1)

    async def _climb(self, step: int) -> bool:
        """Over the leaf's edge into a neighbouring leaf."""
        path = self._path
        for level in range(1, len(path)):
            s = path[level]
            if 0 <= s.i + step < s.n:
                s.i += step
                await self._run_down(level, step < 0)
                return True
        return False

    async def overlap(self, first: int, last: int, *, again: bool = False) -> bool:
        """To the first (or, `again`, to the next) record that overlaps blocks first..last.

        For the reverse map, whose records may overlap: a descent guided by high keys.
        """
        top = len(self._path) - 1 if again else await self._load_top()
        path, level = self._path, 0 if again else top
        if not again:
            path[top].i = -1
        while level <= top:
            s = path[level]
            code, _, s.n = bt.step(self.mem, s.addr, s.size, s.kind, level, 0, 0, 0)
            if code < 0:
                raise self._broken(level, code)
            s.i = bt.next_overlap(self.mem, s.addr, s.kind, s.i + 1, first, last)
            if s.i >= s.n:
                level += 1
            elif level == 0:
                return True
            else:
                block = bt.pointer(self.mem, s.addr, s.size, s.kind, s.i)
                level -= 1
                if path[level].block != block:
                    await self._load(path[level], block)
                path[level].i = -1
        return False

    def record(self) -> Record:
        """The record under the cursor."""
        s = self._path[0]
        assert 0 <= s.i < s.n
        kind = self.kind
        return kind.unpack(self.mem, s.addr + kind.header_bytes + s.i * kind.rec_bytes)

    def leaf(self) -> tuple[int, int, int]:
        """Address of the leaf under the cursor, the index in it and its number of records.

        For kernels that scan a leaf; `place` goes to an index they found.
        """
        s = self._path[0]
        return s.addr, s.i, s.n

    def place(self, i: int) -> None:
        """Stand on record i of the present leaf."""
        s = self._path[0]
        assert 0 <= i < s.n
        s.i = i

    # -- changing -------------------------------------------------------------------------------

    def _log(self, s: _Step) -> None:
        if s.buf is None:
            self.root.log_area()
        else:
            self.tp.log(s.buf)

    def _refresh(self, level: int) -> None:
        """A block's first record or high key may have changed: make its ancestors' keys follow."""
        path, mem = self._path, self.mem
        child = path[level]
        for s in path[level + 1 :]:
            if not bt.refresh_key(mem, s.addr, s.size, s.kind, s.i, child.addr, child.size):
                return
            self._log(s)
            if s.i and not self.kind.overlapping:
                return
            child = s

    async def update(self, rec: Record) -> None:
        """Overwrite the record under the cursor; its key stays between its neighbours'."""
        s = self._path[0]
        assert 0 <= s.i < s.n
        self.kind.pack(_SCRATCH, 0, rec)
        bt.write_rec(self.mem, s.addr, s.kind, s.i, _SCRATCH)
        self._log(s)
        if s.i == 0 or self.kind.overlapping:
            self._refresh(0)

    async def replace(self, rec: Record) -> None:
        """Put `rec` in the place of the record under the cursor, moving it if its key asks."""
        s = self._path[0]
        k0, k1, k2 = self.kind.key(rec)
        if k2 >= _SIGN:
            k2 -= _WRAP
        if bt.fits(self.mem, s.addr, s.kind, s.i, s.n, k0, k1, k2):
            await self.update(rec)
        else:
            await self.delete()
            await self.insert(rec)

    async def insert(self, rec: Record) -> None:
        """Insert a record at its place, wherever the cursor was, and stand on it."""
        if await self._descend(*self.kind.key(rec)):
            raise self.root.corrupt(f"record {rec}", "the key exists already")
        await self._make_room(0)
        s = self._path[0]
        self.kind.pack(_SCRATCH, 0, rec)
        bt.insert_rec(self.mem, s.addr, s.kind, s.i, _SCRATCH)
        s.n += 1
        self._log(s)
        if s.i == 0 or self.kind.overlapping:
            self._refresh(0)

    async def delete(self) -> None:
        """Delete the record under the cursor, which then stands before the following one.

        That may be behind a leaf's end: `settle` before the next use.
        """
        s = self._path[0]
        assert 0 <= s.i < s.n
        bt.delete_rec(self.mem, s.addr, s.kind, s.i)
        s.n -= 1
        self._log(s)
        if s.n and (s.i == 0 or self.kind.overlapping):
            self._refresh(0)
        await self._balance(0)

    def _capacity(self, level: int) -> int:
        """Entries that a block of this level holds."""
        s = self._path[level]
        if s.kind == bt.BMAP_ROOT:
            return (s.size - bt.ROOT_HEADER) // 16
        return self._node_max if level else self._leaf_max

    # -- growing --------------------------------------------------------------------------------

    async def _make_room(self, level: int) -> None:
        """Make sure that the path's block at `level` takes one more entry."""
        s = self._path[level]
        if s.n < self._capacity(level):
            return
        if level == len(self._path) - 1:
            await self._grow_root(level)
            s = self._path[level]
            if s.n < self._capacity(level):
                return  # an inode's root moved into a block, which is larger
        parent = self._path[level + 1]
        if parent.i + 1 < parent.n and await self._spill_right(level):
            return
        if parent.i > 0 and await self._spill_left(level):
            return
        await self._make_room(level + 1)
        await self._split(level)

    async def _sibling(self, level: int, step: int) -> _Step:
        """The neighbouring child of the same parent."""
        parent = self._path[level + 1]
        block = bt.pointer(self.mem, parent.addr, parent.size, parent.kind, parent.i + step)
        other = _Step()
        await self._load(other, block)
        code, _, other.n = bt.step(self.mem, other.addr, other.size, other.kind, level, 0, 0, 0)
        if code < 0:
            raise self.root.corrupt(f"block {block}", "unexpected level")
        return other

    def _transfer(self, a: _Step, first: int, n: int, b: _Step, to: int) -> None:
        """Move n entries between two blocks of a level."""
        bt.move(self.mem, a.addr, a.size, a.kind, first, n, b.addr, b.size, b.kind, to)
        a.n -= n
        b.n += n
        self._log(a)
        self._log(b)

    def _rekey(self, parent: _Step, i: int, child: _Step) -> None:
        """Entry i of the parent follows its child."""
        bt.refresh_key(self.mem, parent.addr, parent.size, parent.kind, i, child.addr, child.size)
        self._log(parent)

    async def _spill_right(self, level: int) -> bool:
        """Even out with the right sibling; the cursor goes with its entry.

        Needs room for two there: for what moves, and for the entry that is to come.
        """
        s, parent = self._path[level], self._path[level + 1]
        right = await self._sibling(level, 1)
        room = self._capacity(level) - right.n
        if room < 2:
            return False
        n = (room + 1) // 2
        self._transfer(s, s.n - n, n, right, 0)
        self._rekey(parent, parent.i, s)
        self._rekey(parent, parent.i + 1, right)
        if s.i >= s.n + (level == 0):
            right.i = s.i - s.n
            self._path[level] = right
            parent.i += 1
        return True

    async def _spill_left(self, level: int) -> bool:
        """Even out with the left sibling, if it has room.

        While records are appended the left one is filled up, so that such trees end nearly full.
        """
        s, parent = self._path[level], self._path[level + 1]
        left = await self._sibling(level, -1)
        room = self._capacity(level) - left.n
        appending = s.i >= s.n - (level > 0)
        if room < (1 if appending else 2):
            return False
        n = min(room, s.n - s.n // 2) if appending else (room + 1) // 2
        before = left.n
        self._transfer(s, 0, n, left, before)
        self._rekey(parent, parent.i - 1, left)
        self._rekey(parent, parent.i, s)
        if s.i < n:
            left.i = before + s.i
            self._path[level] = left
            parent.i -= 1
        else:
            s.i -= n
        return True

    async def _new_block(self, level: int, near: int, left: int, right: int) -> _Step:
        """Allocate and initialise an empty block."""
        root = self.root
        block = await root.alloc_block(near)
        daddr = root.daddr(block)
        buf = await self.tp.get(daddr, self.block_bbs, self.kind.ops, root.owner)
        header = _LONG if self.kind.long else _SHORT
        none = L.NULL64 if self.kind.long else L.NULL32
        left, right = left if left >= 0 else none, right if right >= 0 else none
        header.pack_into(
            buf.mem, buf.addr, self.kind.magic, level, 0, left, right, daddr, 0, root.uuid,
            root.owner,
        )  # fmt: skip
        s = _Step()
        s.buf, s.block, s.addr, s.size, s.kind = buf, block, buf.addr, buf.size, self.kind.id
        return s

    def _link(self, s: _Step, side: int) -> int:
        """Block number of a sibling (side 0 left, 1 right), or -1."""
        at = s.addr + bt.SIBLINGS
        if self.kind.long:
            block = int(_U64.unpack_from(self.mem, at + 8 * side)[0])
            return -1 if block == L.NULL64 else block
        block = int(_U32.unpack_from(self.mem, at + 4 * side)[0])
        return -1 if block == L.NULL32 else block

    def _set_link(self, s: _Step, side: int, block: int) -> None:
        at = s.addr + bt.SIBLINGS
        if self.kind.long:
            _U64.pack_into(self.mem, at + 8 * side, L.NULL64 if block < 0 else block)
        else:
            _U32.pack_into(self.mem, at + 4 * side, L.NULL32 if block < 0 else block)
        self._log(s)

    async def _set_far_link(self, block: int, side: int, to: int) -> None:
        """Set a link in a block that is not on the path; block -1: there is none."""
        if block >= 0:
            s = _Step()
            await self._load(s, block)
            self._set_link(s, side, to)

    async def _split(self, level: int) -> None:
        """Move half of a full block to a new right sibling; the parent has room."""
        s, parent = self._path[level], self._path[level + 1]
        right_link = self._link(s, 1)
        new = await self._new_block(level, s.block, s.block, right_link)
        n = s.n // 2
        if s.n & 1 and s.i <= s.n // 2:
            n += 1  # the half that does not take the new entry gets the odd one
        self._transfer(s, s.n - n, n, new, 0)
        self._set_link(s, 1, new.block)
        await self._set_far_link(right_link, 0, new.block)
        self._rekey(parent, parent.i, s)
        self._adopt(parent, parent.i + 1, new)
        if s.i >= s.n + (level == 0):
            new.i = s.i - s.n
            self._path[level] = new
            parent.i += 1

    def _adopt(self, parent: _Step, i: int, child: _Step) -> None:
        """Insert a child as entry i."""
        bt.insert_child(
            self.mem, parent.addr, parent.size, parent.kind, i, child.block, child.addr, child.size
        )
        parent.n += 1
        self._log(parent)

    async def _grow_root(self, level: int) -> None:
        """Add a level on top; the new root has one entry, and the caller splits next."""
        s = self._path[level]
        if self.root.in_inode:
            near = bt.pointer(self.mem, s.addr, s.size, s.kind, 0)
            new = await self._new_block(level, near, -1, -1)
            new.i = s.i
            self._transfer(s, 0, s.n, new, 0)
            bt.set_level(self.mem, s.addr, level + 1)
            self._path[level] = new
            self._path.append(s)
            self._adopt(s, 0, new)
            s.i = 0
        else:
            new = await self._new_block(level + 1, s.block, -1, -1)
            self._adopt(new, 0, s)
            self.root.set_top(new.block, level + 2)
            self._path.append(new)

    # -- shrinking ------------------------------------------------------------------------------

    async def _balance(self, level: int) -> None:
        """After a deletion: refill the block from a sibling, or join them."""
        s = self._path[level]
        if level == len(self._path) - 1:
            await self._shrink_root()
            return
        if s.n >= self._capacity(level) // 2:
            return
        parent = self._path[level + 1]
        if parent.n == 1:  # only below the root in an inode, which may have one child
            await self._shrink_root()
            return
        most = self._capacity(level)
        left = await self._sibling(level, -1) if parent.i > 0 else None
        if left is not None and left.n + s.n <= most:
            await self._join(level, left, s, parent.i)
            return
        right = await self._sibling(level, 1) if parent.i + 1 < parent.n else None
        if right is not None and right.n + s.n <= most:
            await self._join(level, s, right, parent.i + 1)
            return
        if left is not None:
            n = (left.n - s.n) // 2
            self._transfer(left, left.n - n, n, s, 0)
            s.i += n
            self._rekey(parent, parent.i - 1, left)
            self._rekey(parent, parent.i, s)
        else:
            assert right is not None
            n = (right.n - s.n) // 2
            self._transfer(right, 0, n, s, s.n)
            self._rekey(parent, parent.i, s)
            self._rekey(parent, parent.i + 1, right)
        self._refresh(level + 1)

    async def _join(self, level: int, left: _Step, right: _Step, i: int) -> None:
        """Move all of the right block, the parent's entry i, to the left one and free it."""
        parent = self._path[level + 1]
        assert parent.n > 1
        before = left.n
        self._transfer(right, 0, right.n, left, before)
        beyond = self._link(right, 1)
        self._set_link(left, 1, beyond)
        await self._set_far_link(beyond, 0, left.block)
        bt.delete_child(self.mem, parent.addr, parent.size, parent.kind, i)
        parent.n -= 1
        self._rekey(parent, i - 1, left)
        if parent.i == i:  # the cursor was in the right block
            left.i = before + right.i
            self._path[level] = left
            parent.i -= 1
        await self._drop(right)
        self._refresh(level + 1)
        await self._balance(level + 1)

    async def _drop(self, s: _Step) -> None:
        """Free a block that nothing points to any more."""
        assert s.buf is not None
        self.tp.invalidate(s.buf)
        await self.root.free_block(s.block)
        s.block, s.buf = -1, None

    async def _shrink_root(self) -> None:
        """Take levels away while the root has one child that can stand in for it."""
        path = self._path
        while len(path) > 1 and path[-1].n == 1:
            top, child = path[-1], path[-2]
            level = len(path) - 2
            if not self.root.in_inode:
                self.root.set_top(child.block, level + 1)
                path.pop()
                await self._drop(top)
                continue
            if level == 0 or child.n > (top.size - bt.ROOT_HEADER) // 16:
                return
            bt.delete_child(self.mem, top.addr, top.size, top.kind, 0)
            top.n = 0
            bt.set_level(self.mem, top.addr, level)
            self._transfer(child, 0, child.n, top, 0)
            top.i = child.i
            path.pop()
            path[-1] = top
            await self._drop(child)
