"""Log items: what their first regions say, and how they lie in memory.

XFS format, log: little-endian, but for ICREATE and for what is copied from blocks as it is there.
Each item names what it changes: a buffer by address and length, an inode by number and the place of
its cluster. Parsing raises BadLog for what cannot be; nothing is believed of lengths.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fs.log.checkpoints import ITEM, Item
from fs.log.head import BadLog

BUF, INODE, ICREATE = 0x123C, 0x123B, 0x123F
EFI, EFD = 0x1236, 0x1237
RUI, RUD, CUI, CUD, BUI, BUD = range(0x1240, 0x1246)
ATTRI, ATTRD = 0x1246, 0x1247
CHUNK = 128  # bytes for each bit of a buffer's map
BUF_HEAD = struct.Struct("<HHHHqI")  # type, regions, flags, BBs, daddr, words
INODE_HEAD = struct.Struct("<HHIHHIQ16xqii")
ICREATE_HEAD = struct.Struct("<HH").size
ICREATE_BODY = struct.Struct(">IIIIII")  # AG, block, inodes, bytes of one, blocks, generation
INODE_BUF, CANCEL, DQUOT = 0x1, 0x2, 0x1C
TYPE_SHIFT = 11
CORE, DDATA, DEXT, DBROOT, DEV = 1, 2, 4, 8, 0x10
ADATA, AEXT, ABROOT = 0x40, 0x80, 0x100
DOWNER, AOWNER = 0x200, 0x400


@dataclass(frozen=True)
class BufItem:
    """Changed chunks of a buffer: (first byte, bytes of data)."""

    daddr: int
    bbs: int
    flags: int
    runs: tuple[tuple[int, bytes], ...]

    @property
    def kind(self) -> int:
        """What the block is, for the verifier that it needs."""
        return self.flags >> TYPE_SHIFT

    @property
    def cancels(self) -> bool:
        """Whether the block was freed: what is older about it must not be replayed."""
        return bool(self.flags & CANCEL)


@dataclass(frozen=True)
class InodeItem:
    """A core, and forks where `fields` says so."""

    ino: int
    fields: int
    daddr: int  # of the cluster, and the inode's place in it
    bbs: int
    offset: int
    core: bytes
    data: bytes  # forks
    attr: bytes
    rdev: int


@dataclass(frozen=True)
class CreateItem:
    """Inodes that were made in new blocks."""

    agno: int
    agbno: int
    count: int
    inode_bytes: int
    blocks: int
    generation: int


def kind_of(item: Item) -> int:
    """An item's type."""
    return int(ITEM.unpack_from(item[0])[0])


def buffer(item: Item) -> BufItem:
    """Raises BadLog."""
    if len(item[0]) < BUF_HEAD.size:
        raise BadLog(f"a buffer item of {len(item[0])} bytes")
    _, _, flags, bbs, daddr, words = BUF_HEAD.unpack_from(item[0])
    where = f"the buffer item of {bbs} blocks at {daddr}"
    if daddr < 0 or not bbs or len(item[0]) < BUF_HEAD.size + 4 * words:
        raise BadLog(where)
    if flags & CANCEL:
        return BufItem(daddr, bbs, flags, ())
    bitmap = int.from_bytes(item[0][BUF_HEAD.size : BUF_HEAD.size + 4 * words], "little")
    rest = b"".join(item[1:])
    runs, at = [], 0
    while bitmap >> at:
        if not bitmap >> at & 1:
            at += 1
            continue
        end = at
        while bitmap >> end & 1:
            end += 1
        size = (end - at) * CHUNK
        if len(rest) < size or end * CHUNK > bbs << 9:
            raise BadLog(f"{where} has {len(rest)} bytes of {size} for chunk {at}")
        runs.append((at * CHUNK, rest[:size]))
        rest, at = rest[size:], end
    if rest:
        raise BadLog(f"{where} has {len(rest)} bytes too many")
    return BufItem(daddr, bbs, flags, tuple(runs))


def inode(item: Item) -> InodeItem:
    """Raises BadLog."""
    if len(item[0]) < INODE_HEAD.size or len(item) < 2:
        raise BadLog(f"an inode item of {len(item)} regions")
    _, _, fields, asize, dsize, _, ino, daddr, bbs, offset = INODE_HEAD.unpack_from(item[0])
    forks = item[2:]
    data = _fork(ino, dsize, forks) if fields & (DDATA | DEXT | DBROOT) else b""
    attr = _fork(ino, asize, forks) if fields & (ADATA | AEXT | ABROOT) else b""
    rdev = int.from_bytes(item[0][24:28], "little")
    return InodeItem(ino, fields, daddr, bbs, offset, item[1], data, attr, rdev)


def _fork(ino: int, size: int, regions: list[bytes]) -> bytes:
    """The next region, which is a fork of so many bytes, and at its end perhaps padding."""
    if not regions or len(regions[0]) < size:
        raise BadLog(f"the item of inode {ino} lacks a fork of {size} bytes")
    return regions.pop(0)


def create(item: Item) -> CreateItem:
    """Raises BadLog."""
    if len(item[0]) < ICREATE_HEAD + ICREATE_BODY.size:
        raise BadLog(f"an inode create item of {len(item[0])} bytes")
    return CreateItem(*ICREATE_BODY.unpack_from(item[0], ICREATE_HEAD))
