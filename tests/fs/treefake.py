"""A make-believe transaction and tree roots in a small array of bytes, for B+tree tests.

Blocks are as small as a test likes, so that a few hundred records make a deep tree. The fake
counts holds on nothing and reads without waiting; what it does check is that no freed block is
ever used again.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from fs.xfs.btkind import Kind
from fs.xfs.btree import Cursor, Root
from tests.fs.treecheck import SHAPES, Tree, TreeChecker

UUID = bytes(range(16))
OWNER = 7


class FakeBuf:
    """A block of the fake arena."""

    def __init__(self, world: World, block: int) -> None:
        self.mem, self.addr, self.size = world.mem, block * world.block_size, world.block_size
        self.block = block


class World:
    """Memory, allocator and transaction in one."""

    def __init__(self, block_size: int, blocks: int) -> None:
        self.block_size = block_size
        self.mem = np.zeros(block_size * blocks + 4096, np.uint8)
        self.vol = SimpleNamespace(arena=SimpleNamespace(mem=self.mem))
        self.unused = list(range(blocks - 1, 0, -1))
        self.used: set[int] = set()
        self.area_addr = block_size * blocks
        self.logged = 0

    async def read(self, daddr: int, bbs: int, ops: Any, owner: int) -> FakeBuf:
        assert daddr in self.used, f"block {daddr} was freed"
        return FakeBuf(self, daddr)

    async def get(self, daddr: int, bbs: int, ops: Any, owner: int) -> FakeBuf:
        buf = FakeBuf(self, daddr)
        self.mem[buf.addr : buf.addr + buf.size] = 0
        return buf

    def log(self, buf: FakeBuf) -> None:
        self.logged += 1

    def invalidate(self, buf: FakeBuf) -> None:
        self.mem[buf.addr : buf.addr + buf.size] = 0xEE


class FakeRoot(Root):
    """Root of either kind; a tree in an inode starts with one empty leaf below its root."""

    def __init__(self, world: World, kind: Kind, area_bytes: int = 0) -> None:
        self.tp: Any = world
        self.world = world
        self.kind = kind
        self.owner = OWNER
        self.block_size = world.block_size
        self.in_inode = area_bytes > 0
        self.area_bytes = area_bytes
        block = self._take()
        header = kind.magic.to_bytes(4, "big") + bytes(4) + b"\xff" * (16 if kind.long else 8)
        tail = block.to_bytes(8, "big") + bytes(8) + UUID
        raw = np.frombuffer(header + tail + OWNER.to_bytes(8 if kind.long else 4, "big"), np.uint8)
        world.mem[block * self.block_size :][: raw.size] = raw
        self._top, self._levels = block, 1
        if self.in_inode:
            at = world.area_addr
            world.mem[at : at + 4] = (0, 1, 0, 1)
            pointers = at + 4 + 8 * ((area_bytes - 4) // 16)
            world.mem[pointers : pointers + 8] = list(block.to_bytes(8, "big"))

    def _take(self) -> int:
        block = self.world.unused.pop()
        self.world.used.add(block)
        return block

    @property
    def levels(self) -> int:
        if self.in_inode:
            return int(self.world.mem[self.world.area_addr + 1]) + 1
        return self._levels

    @property
    def top(self) -> int:
        return self._top

    def set_top(self, block: int, levels: int) -> None:
        self._top, self._levels = block, levels

    def area(self) -> tuple[int, int]:
        return self.world.area_addr - 4, self.area_bytes + 4

    def log_area(self) -> None:
        self.world.logged += 1

    def daddr(self, block: int) -> int:
        return block

    async def alloc_block(self, near: int) -> int:
        return self._take()

    async def free_block(self, block: int) -> None:
        self.world.used.remove(block)
        self.world.unused.append(block)

    @property
    def uuid(self) -> bytes:
        return UUID

    def corrupt(self, where: str, reason: str) -> Exception:
        return ValueError(f"{where}: {reason}")

    def cursor(self) -> Cursor:
        return Cursor(self)

    def check(self) -> Tree:
        """Walk the whole tree; a leaked block is a fault, too."""

        def read(block: int) -> bytes:
            assert block in self.world.used
            return bytes(self.world.mem[block * self.block_size :][: self.block_size])

        walk = TreeChecker(
            SHAPES[self.kind.name], self.block_size, read, lambda block: (block, OWNER), UUID
        )
        if self.in_inode:
            at = self.world.area_addr
            tree = walk.from_area(bytes(self.world.mem[at : at + self.area_bytes]))
        else:
            tree = walk.from_block(self._top, self._levels)
        if set(tree.blocks) != self.world.used:
            tree.faults.append("blocks leaked")
        return tree
