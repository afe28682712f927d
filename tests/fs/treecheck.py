"""A checker of whole B+trees and AGs that shares no code with the filesystem.

It reads blocks as bytes, from an image file or from memory, and reports every broken invariant of
the format as a line of text: keys, order, fill, levels, sibling chains, identity of blocks, and
for AGs the sums in the headers, that both free-space trees agree, that free extents are merged,
and that reverse map and reference counts describe the same owners.

Cost: linear in blocks and records. Tests call it; nothing in the packages does.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NULL32, NULL64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
Key = tuple[int, ...]
Rec = tuple[int, ...]


def _extent(raw: bytes) -> Rec:
    high, low = struct.unpack(">QQ", raw)
    fsbno = (high & 0x1FF) << 43 | low >> 21
    return high >> 9 & (1 << 54) - 1, fsbno, low & (1 << 21) - 1, high >> 63


def _plain(fmt: str) -> Callable[[bytes], Rec]:
    return lambda raw: struct.unpack(fmt, raw)


def _rmap_low(rec: Rec) -> Key:
    return rec[0], rec[2], rec[3] & ~(1 << 61)


def _rmap_high(rec: Rec) -> Key:
    start, length, owner, offset = rec
    offset &= ~(1 << 61)
    if not owner >> 63 and not offset >> 62 & 1:
        offset += length - 1
    return start + length - 1, owner, offset


@dataclass(frozen=True)
class Shape:
    """Widths and meanings of one kind of tree."""

    name: str
    magic: bytes
    rec_bytes: int
    key_bytes: int
    decode: Callable[[bytes], Rec]
    sort_key: Callable[[Rec], Key]
    node_key: Callable[[Rec], bytes]  # what a parent must hold for a child's first record
    long: bool = False

    @property
    def header(self) -> int:
        return 72 if self.long else 56

    @property
    def ptr_bytes(self) -> int:
        return 8 if self.long else 4


def _first32(rec: Rec) -> bytes:
    return struct.pack(">I", rec[0])


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("bnobt", b"AB3B", 8, 8, _plain(">II"), lambda r: r[:1],
              lambda r: struct.pack(">II", *r)),
        Shape("cntbt", b"AB3C", 8, 8, _plain(">II"), lambda r: (r[1], r[0]),
              lambda r: struct.pack(">II", *r)),
        Shape("inobt", b"IAB3", 16, 4, _plain(">IHBBQ"), lambda r: r[:1], _first32),
        Shape("finobt", b"FIB3", 16, 4, _plain(">IHBBQ"), lambda r: r[:1], _first32),
        Shape("rmapbt", b"RMB3", 24, 40, _plain(">IIQQ"), _rmap_low,
              lambda r: struct.pack(">IQQ", *_rmap_low(r))),
        Shape("refcountbt", b"R3FC", 12, 4, _plain(">III"), lambda r: r[:1], _first32),
        Shape("bmbt", b"BMA3", 16, 8, _extent, lambda r: r[:1],
              lambda r: struct.pack(">Q", r[0]), long=True),
    )
}  # fmt: skip


@dataclass
class Tree:
    """What a walk found."""

    records: list[Rec] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass
class _Block:
    number: int
    raw: bytes
    entries: list[tuple[bytes, int]] = field(default_factory=list)  # nodes: key, pointer
    records: list[Rec] = field(default_factory=list)
    low: bytes = b""
    high: Key = ()


class TreeChecker:
    """Walks one tree: `read(block)` gives bytes, `identity(block)` its daddr and owner."""

    def __init__(
        self,
        shape: Shape,
        block_size: int,
        read: Callable[[int], bytes],
        identity: Callable[[int], tuple[int, int]] | None = None,
        uuid: bytes = b"",
    ) -> None:
        self.shape, self.size, self.read = shape, block_size, read
        self.identity, self.uuid = identity, uuid
        self.tree = Tree()
        self.leaf_max = (block_size - shape.header) // shape.rec_bytes
        self.node_max = (block_size - shape.header) // (shape.key_bytes + shape.ptr_bytes)

    def fault(self, block: int, text: str) -> None:
        self.tree.faults.append(f"{self.shape.name} block {block}: {text}")

    def from_block(self, top: int, levels: int) -> Tree:
        """A tree whose root is a block."""
        self._level([top], levels - 1, least=1 if levels == 1 else 2, root=True)
        return self._finish()

    def from_area(self, area: bytes) -> Tree:
        """A tree whose root lies in an inode's fork."""
        level, n = struct.unpack_from(">HH", area)
        most = (len(area) - 4) // 16
        if level < 1 or not 1 <= n <= most:
            self.tree.faults.append(f"inode root: level {level}, {n} of {most} entries")
            return self.tree
        keys = [area[4 + 8 * i : 12 + 8 * i] for i in range(n)]
        at = 4 + 8 * most
        pointers = [int(p) for p in struct.unpack_from(f">{n}Q", area, at)]
        children = self._level(pointers, level - 1, least=1 if n == 1 else 0, root=n == 1)
        self._match(-1, list(zip(keys, pointers, strict=True)), children)
        return self._finish()

    def _finish(self) -> Tree:
        keys = [self.shape.sort_key(rec) for rec in self.tree.records]
        for a, b in zip(keys, keys[1:], strict=False):
            if a >= b:
                self.tree.faults.append(f"{self.shape.name}: key {b} behind {a}")
        if len(set(self.tree.blocks)) != len(self.tree.blocks):
            self.tree.faults.append(f"{self.shape.name}: a block is used twice")
        return self.tree

    def _level(self, numbers: list[int], level: int, least: int, root: bool) -> list[_Block]:
        """Check the blocks of one level, in order, then everything below them."""
        blocks = []
        for i, number in enumerate(numbers):
            left = numbers[i - 1] if i else -1
            right = numbers[i + 1] if i + 1 < len(numbers) else -1
            block = self._block(number, level, left, right)
            most = self.node_max if level else self.leaf_max
            floor = most // 2
            if root:
                floor = 0 if level == 0 else least
            n = len(block.entries) if level else len(block.records)
            if not floor <= n <= most:
                self.fault(number, f"{n} entries, must be {floor} to {most}")
            blocks.append(block)
        if level == 0:
            for block in blocks:
                self.tree.records.extend(block.records)
            return blocks
        pointers = [pointer for block in blocks for _, pointer in block.entries]
        children = self._level(pointers, level - 1, 0, root=False)
        at = 0
        for block in blocks:
            mine = children[at : at + len(block.entries)]
            at += len(block.entries)
            self._match(block.number, block.entries, mine)
            if mine:
                block.low = mine[0].low
                block.high = max(child.high for child in mine)
        return blocks

    def _match(self, number: int, entries: list[tuple[bytes, int]], below: list[_Block]) -> None:
        for i, ((key, _), child) in enumerate(zip(entries, below, strict=True)):
            wanted = child.low
            if self.shape.name == "rmapbt" and child.high:
                wanted += struct.pack(">IQQ", *child.high)
            if key != wanted:
                self.fault(number, f"key {i} is {key.hex()}, its child's {wanted.hex()}")

    def _block(self, number: int, level: int, left: int, right: int) -> _Block:
        shape = self.shape
        raw = self.read(number)
        block = _Block(number, raw)
        self.tree.blocks.append(number)
        found, n = struct.unpack_from(">HH", raw, 4)
        if raw[:4] != shape.magic or found != level:
            self.fault(number, f"magic {raw[:4]!r}, level {found} instead of {level}")
            return block
        self._check_identity(block, left, right)
        most = self.node_max if level else self.leaf_max
        if n > most:
            self.fault(number, f"{n} entries, at most {most} fit")
            n = most
        if level:
            at = shape.header + self.node_max * shape.key_bytes
            code = f">{n}{'Q' if shape.long else 'I'}"
            for i, pointer in enumerate(struct.unpack_from(code, raw, at)):
                key = raw[shape.header + i * shape.key_bytes :][: shape.key_bytes]
                block.entries.append((key, pointer))
            return block
        for i in range(n):
            rec = raw[shape.header + i * shape.rec_bytes :][: shape.rec_bytes]
            block.records.append(shape.decode(rec))
        if block.records:
            block.low = shape.node_key(block.records[0])
            if shape.name == "rmapbt":
                block.high = max(_rmap_high(rec) for rec in block.records)
        return block

    def _check_identity(self, block: _Block, left: int, right: int) -> None:
        null = NULL64 if self.shape.long else NULL32
        links = struct.unpack_from(">QQ" if self.shape.long else ">II", block.raw, 8)
        wanted = (null if left < 0 else left, null if right < 0 else right)
        if links != wanted:
            self.fault(block.number, f"siblings {links} instead of {wanted}")
        if self.identity is None:
            return
        at = 24 if self.shape.long else 16
        blkno, _, uuid = struct.unpack_from(">QQ16s", block.raw, at)
        code = ">Q" if self.shape.long else ">I"
        owner = struct.unpack_from(code, block.raw, at + 32)[0]
        if (blkno, owner) != self.identity(block.number) or uuid != self.uuid:
            self.fault(block.number, f"says block {blkno}, owner {owner}, uuid {uuid.hex()}")


# -- images ---------------------------------------------------------------------------------------


class ImageChecker:
    """Free space, reverse map and reference counts of an unmounted image."""

    def __init__(self, path: Path) -> None:
        self.raw = path.open("rb")
        sb = self._pread(0, 512)
        (self.block_size,) = struct.unpack_from(">I", sb, 4)
        (self.dblocks,) = struct.unpack_from(">Q", sb, 8)
        self.uuid = sb[32:48]
        self.ag_blocks, self.agcount = struct.unpack_from(">II", sb, 84)
        (self.sector,) = struct.unpack_from(">H", sb, 102)
        (self.fdblocks,) = struct.unpack_from(">Q", sb, 144)
        (self.ro_compat,) = struct.unpack_from(">I", sb, 212)
        self.faults: list[str] = []
        self.free: list[list[Rec]] = []
        self.heights: list[dict[str, int]] = []

    def _pread(self, offset: int, n: int) -> bytes:
        self.raw.seek(offset)
        return self.raw.read(n)

    def check(self) -> list[str]:
        """All faults of all AGs."""
        total = sum(self._check_ag(agno) for agno in range(self.agcount))
        if total != self.fdblocks:
            self.faults.append(f"superblock: fdblocks {self.fdblocks}, the AGs have {total}")
        self.raw.close()
        return self.faults

    def tree(self, name: str, agno: int, root: int, levels: int) -> Tree:
        """Walk one tree of an AG."""
        base = agno * self.ag_blocks

        def read(block: int) -> bytes:
            return self._pread((base + block) * self.block_size, self.block_size)

        def identity(block: int) -> tuple[int, int]:
            return (base + block) * self.block_size // 512, agno

        walk = TreeChecker(SHAPES[name], self.block_size, read, identity, self.uuid)
        tree = walk.from_block(root, levels)
        self.faults += [f"AG {agno} {fault}" for fault in tree.faults]
        return tree

    def _check_ag(self, agno: int) -> int:
        base = agno * self.ag_blocks * self.block_size
        words: Any = struct.unpack_from(">16I", self._pread(base + self.sector, 512))
        tail = struct.unpack_from(">4I", self._pread(base + self.sector, 512), 80)
        length = min(self.ag_blocks, self.dblocks - agno * self.ag_blocks)
        bno = self.tree("bnobt", agno, words[4], words[7])
        cnt = self.tree("cntbt", agno, words[5], words[8])
        self.heights.append({"bnobt": words[7], "cntbt": words[8], "rmapbt": words[9]})
        self.free.append(bno.records)
        trees = len(bno.blocks) + len(cnt.blocks) - 2
        agfl = self._agfl(agno, base, words)
        if self.ro_compat & 2:
            rmap = self.tree("rmapbt", agno, words[6], words[9])
            trees += len(rmap.blocks) - 1
            self._same(agno, "rmap_blocks", tail[0], len(rmap.blocks))
            mine = [*bno.blocks, *cnt.blocks, *rmap.blocks, *agfl]
            self._check_owners(agno, length, bno.records, rmap.records, mine, tail)
        elif self.ro_compat & 4:
            refc = self.tree("refcountbt", agno, tail[2], tail[3])
            self._same(agno, "refcount_blocks", tail[1], len(refc.blocks))
        self._check_free(agno, length, bno.records, cnt.records)
        self._same(agno, "freeblks", words[13], sum(r[1] for r in bno.records))
        self._same(agno, "longest", words[14], max((r[1] for r in bno.records), default=0))
        self._same(agno, "btreeblks", words[15], trees)
        busy = {b for r in bno.records for b in range(r[0], r[0] + r[1])}
        for block in [*agfl, *bno.blocks, *cnt.blocks]:
            if block in busy:
                self.faults.append(f"AG {agno}: block {block} is free and in use")
        return int(words[13] + words[12] + words[15])

    def _same(self, agno: int, what: str, found: int, wanted: int) -> None:
        if found != wanted:
            self.faults.append(f"AG {agno}: {what} is {found}, must be {wanted}")

    def _agfl(self, agno: int, base: int, words: Any) -> list[int]:
        first, last, count = words[10:13]
        slots = (self.sector - 36) // 4
        raw = self._pread(base + 3 * self.sector, self.sector)
        ring = struct.unpack_from(f">{slots}I", raw, 36)
        agfl = [ring[(first + i) % slots] for i in range(count)]
        if count and (first + count - 1) % slots != last:
            self.faults.append(f"AG {agno}: AGFL {first}..{last} with {count}")
        if len(set(agfl)) != count:
            self.faults.append(f"AG {agno}: the AGFL has a block twice")
        return agfl

    def _check_free(self, agno: int, length: int, bno: list[Rec], cnt: list[Rec]) -> None:
        if sorted(bno) != sorted(cnt):
            self.faults.append(f"AG {agno}: bnobt and cntbt differ")
        end = 0
        for start, n in bno:
            if start <= end and end:
                self.faults.append(f"AG {agno}: free extent {start} touches the one before")
            end = start + n
        if end > length:
            self.faults.append(f"AG {agno}: free space beyond the end")

    def _check_owners(
        self, agno: int, length: int, free: list[Rec], rmap: list[Rec], mine: list[int], tail: Any
    ) -> None:
        """Every block is free or has owners, as many as the reference counts say."""
        owners: Counter[int] = Counter()
        for start, n in free:
            owners.update(range(start, start + n))
        own_ag: set[int] = set()
        for start, n, owner, _ in rmap:
            owners.update(range(start, start + n))
            if owner == (1 << 64) - 5:
                own_ag.update(range(start, start + n))
        shared = {}
        if self.ro_compat & 4:
            refc = self.tree("refcountbt", agno, tail[2], tail[3])
            self._same(agno, "refcount_blocks", tail[1], len(refc.blocks))
            for start, n, count in refc.records:
                shared.update(dict.fromkeys(range(start, start + n), count))
        for block in range(length):
            if owners[block] != shared.get(block, 1):
                self.faults.append(f"AG {agno}: block {block} has {owners[block]} owners")
                break
        if own_ag != set(mine):
            odd = sorted(own_ag ^ set(mine))[:5]
            self.faults.append(f"AG {agno}: the AG's own blocks differ in the rmapbt: {odd}")
        before = None
        for rec in rmap:
            if before is not None and self._mergeable(before, rec):
                self.faults.append(f"AG {agno}: rmap records {before} and {rec} are not merged")
            before = rec

    @staticmethod
    def _mergeable(a: Rec, b: Rec) -> bool:
        if a[0] + a[1] != b[0] or a[2] != b[2]:
            return False
        moves = 0 if a[2] >> 63 or a[3] >> 62 & 1 else a[1]
        return a[3] + moves == b[3]
