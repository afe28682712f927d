"""Allocation group headers: superblock, AGF, AGI and AGFL sectors.

Each structure fills one sector at the start of its AG. `read_agf` and its sisters give the held
buffer; fields are read and written with `get` and `put` at offsets from layout, or through
`buf.rec(DTYPE)`. All of them are guarded by the space lock.

The AGFL is a ring of blocks kept for the free-space and reverse-map trees, which must not
allocate from themselves: `agfl_get` and `agfl_put` move blocks between the ring and such a tree;
filling and emptying it is freespace's work. `AgRoot` is the root of a tree that lives on it.

`Summary` is what allocation knows about every AG without reading: derived from the AGFs when they
are first read and at the end of every change, never a source.
"""

from __future__ import annotations

import errno
import struct

from fs.cache.buf import Buf, BufOps
from fs.log.transaction import Transaction
from fs.xfs import btkind
from fs.xfs import layout as L
from fs.xfs.btkind import Kind
from fs.xfs.btree import Root
from fs.xfs.geometry import Geometry

SB, AGF, AGI, AGFL = range(4)  # sector of each header in its AG
UNLINKED_BUCKETS = 64
SET_ASIDE = 8  # blocks an AG that are promised to nobody, for refilling its AGFL

_U32 = struct.Struct(">I")
_AGF_HEAD = struct.Struct(">16I")  # magic .. btreeblks
_AGF_TAIL = struct.Struct(">4I")  # rmap_blocks .. refcount_level

AGF_LENGTH = L.off(L.AGF, "length")
AGF_FLFIRST, AGF_FLLAST = L.off(L.AGF, "flfirst"), L.off(L.AGF, "fllast")
AGF_FLCOUNT, AGF_FREEBLKS = L.off(L.AGF, "flcount"), L.off(L.AGF, "freeblks")
AGF_LONGEST, AGF_BTREEBLKS = L.off(L.AGF, "longest"), L.off(L.AGF, "btreeblks")
AGF_RMAP_BLOCKS = L.off(L.AGF, "rmap_blocks")
AGF_REFCOUNT_BLOCKS = L.off(L.AGF, "refcount_blocks")
AGI_FBLOCKS = L.off(L.AGI, "fblocks")
# (root, level) fields of each tree kind in its header
ROOT_FIELDS = {
    btkind.BNO: (L.off(L.AGF, "bno_root"), L.off(L.AGF, "bno_level")),
    btkind.CNT: (L.off(L.AGF, "cnt_root"), L.off(L.AGF, "cnt_level")),
    btkind.RMAP: (L.off(L.AGF, "rmap_root"), L.off(L.AGF, "rmap_level")),
    btkind.REFC: (L.off(L.AGF, "refcount_root"), L.off(L.AGF, "refcount_level")),
    btkind.INO: (L.off(L.AGI, "root"), L.off(L.AGI, "level")),
    btkind.FINO: (L.off(L.AGI, "free_root"), L.off(L.AGI, "free_level")),
}


def get(buf: Buf, offset: int) -> int:
    """A 32-bit header field."""
    return int(_U32.unpack_from(buf.mem, buf.addr + offset)[0])


def put(buf: Buf, offset: int, value: int) -> None:
    """Set a 32-bit header field; the caller logs the buffer."""
    _U32.pack_into(buf.mem, buf.addr + offset, value)


def add(buf: Buf, offset: int, delta: int) -> None:
    """Add to a 32-bit header field; the caller logs the buffer."""
    put(buf, offset, get(buf, offset) + delta)


# -- verifiers ------------------------------------------------------------------------------------


def _verify_sb(geo: Geometry, buf: Buf, owner: int | None) -> str:
    sb = buf.rec(L.SB)
    if sb["magic"] != L.MAGIC_SB:
        return f"magic {int(sb['magic']):#x}"
    if sb["agblocks"] != geo.ag_blocks or sb["blocksize"] != geo.block_size:
        return "another geometry than at mount"
    if sb["agcount"] != geo.agcount or sb["dblocks"] != geo.dblocks:
        return "another size than at mount"
    return ""


def _common(geo: Geometry, buf: Buf, magic: int, uuid_at: int, seqno: int) -> str:
    if get(buf, 0) != magic:
        return f"magic {get(buf, 0):#x} instead of {magic:#x}"
    if bytes(buf.mem[buf.addr + uuid_at :][:16]) != geo.uuid:
        return "uuid of another filesystem"
    if seqno >= geo.agcount or geo.ag_daddr(seqno, 0) > buf.daddr:
        return f"it says that it belongs to AG {seqno}"
    if buf.daddr - geo.ag_daddr(seqno, 0) > 3 * geo.sector_bbs:
        return f"it says that it belongs to AG {seqno}"
    return ""


def agfl_slots(geo: Geometry) -> int:
    """Slots of the free list's ring."""
    return (geo.sector_size - L.AGFL.itemsize) // 4


def _verify_agf(geo: Geometry, buf: Buf, owner: int | None) -> str:
    words = _AGF_HEAD.unpack_from(buf.mem, buf.addr)
    _, version, seqno, length, *roots_levels = words[:10]
    first, last, count, free, longest, btreeblks = words[10:]
    if fault := _common(geo, buf, L.MAGIC_AGF, L.off(L.AGF, "uuid"), seqno):
        return fault
    if version != 1 or length != geo.ag_length(seqno):
        return f"version {version}, length {length}"
    slots = agfl_slots(geo)
    if first >= slots or last >= slots or count > slots:
        return f"free list {first}..{last}, {count} blocks of {slots}"
    if free > length or longest > free or btreeblks > length:
        return f"{free} free blocks, longest extent {longest}, {btreeblks} in trees"
    roots, levels = list(roots_levels[:2]), list(roots_levels[3:5])
    if geo.has_rmap:
        roots.append(roots_levels[2])
        levels.append(roots_levels[5])
    if geo.has_reflink:
        _, _, root, level = _AGF_TAIL.unpack_from(buf.mem, buf.addr + AGF_RMAP_BLOCKS)
        roots.append(root)
        levels.append(level)
    return _verify_roots(roots, levels, length)


def _verify_roots(roots: list[int], levels: list[int], length: int) -> str:
    for root, level in zip(roots, levels, strict=True):
        if not 0 < root < length or not 0 < level <= btkind.LEVELS_MAX:
            return f"tree root {root} of {level} levels"
    return ""


def _verify_agi(geo: Geometry, buf: Buf, owner: int | None) -> str:
    agi = buf.rec(L.AGI)
    seqno, length = int(agi["seqno"]), int(agi["length"])
    if fault := _common(geo, buf, L.MAGIC_AGI, L.off(L.AGI, "uuid"), seqno):
        return fault
    if agi["version"] != 1 or length != geo.ag_length(seqno):
        return f"version {agi['version']}, length {length}"
    if agi["freecount"] > agi["count"] or int(agi["count"]) > length * geo.inopblock:
        return f"{agi['count']} inodes, {agi['freecount']} free"
    roots, levels = [int(agi["root"])], [int(agi["level"])]
    if geo.has_finobt:
        roots.append(int(agi["free_root"]))
        levels.append(int(agi["free_level"]))
    if fault := _verify_roots(roots, levels, length):
        return fault
    last = length * geo.inopblock
    for bucket, agino in enumerate(agi["unlinked"].tolist()):
        if agino != L.NULL32 and (not 0 < agino < last or agino % UNLINKED_BUCKETS != bucket):
            return f"unlinked list {bucket} begins at inode {agino}"
    return ""


def _verify_agfl(geo: Geometry, buf: Buf, owner: int | None) -> str:
    header = buf.rec(L.AGFL)
    seqno = int(header["seqno"])
    if fault := _common(geo, buf, L.MAGIC_AGFL, L.off(L.AGFL, "uuid"), seqno):
        return fault
    slots = buf.data[L.AGFL.itemsize :][: 4 * agfl_slots(geo)].view(">u4")
    bad = slots[(slots != L.NULL32) & (slots >= geo.ag_length(seqno))]
    return f"block {int(bad[0])} outside the AG" if bad.size else ""


SB_OPS = BufOps("superblock", L.off(L.SB, "crc"), _verify_sb, L.off(L.SB, "lsn"))
AGF_OPS = BufOps("AGF", L.off(L.AGF, "crc"), _verify_agf, L.off(L.AGF, "lsn"))
AGI_OPS = BufOps("AGI", L.off(L.AGI, "crc"), _verify_agi, L.off(L.AGI, "lsn"))
AGFL_OPS = BufOps("AGFL", L.off(L.AGFL, "crc"), _verify_agfl, L.off(L.AGFL, "lsn"))


# -- reading --------------------------------------------------------------------------------------


async def _read(tp: Transaction, agno: int, sector: int, ops: BufOps) -> Buf:
    geo = tp.vol.geo
    assert 0 <= agno < geo.agcount
    return await tp.read(geo.ag_daddr(agno, sector), geo.sector_bbs, ops, agno)


async def read_sb(tp: Transaction, agno: int = 0) -> Buf:
    """The superblock (of AG 0 unless told)."""
    return await _read(tp, agno, SB, SB_OPS)


async def read_agf(tp: Transaction, agno: int) -> Buf:
    """The AGF of an AG. The summary learns from the first reading."""
    buf = await _read(tp, agno, AGF, AGF_OPS)
    if not tp.vol.ags.known[agno]:
        tp.vol.ags.learn(agno, buf)
    return buf


async def read_agi(tp: Transaction, agno: int) -> Buf:
    """The AGI of an AG."""
    return await _read(tp, agno, AGI, AGI_OPS)


async def read_agfl(tp: Transaction, agno: int) -> Buf:
    """The AGFL of an AG."""
    return await _read(tp, agno, AGFL, AGFL_OPS)


# -- the free list --------------------------------------------------------------------------------


async def agfl_get(tp: Transaction, agno: int, agf: Buf) -> int:
    """Take the first block off the free list. Raises OSError(ENOSPC) if it is empty."""
    count, first = get(agf, AGF_FLCOUNT), get(agf, AGF_FLFIRST)
    if count == 0:
        raise OSError(errno.ENOSPC, f"the free list of AG {agno} is empty")
    agfl = await read_agfl(tp, agno)
    block = get(agfl, L.AGFL.itemsize + 4 * first)
    geo = tp.vol.geo
    if not geo.ag_header_blocks <= block < geo.ag_length(agno):
        raise tp.vol.corrupt("AGFL", f"AG {agno}", f"slot {first} holds block {block}")
    put(agf, AGF_FLFIRST, (first + 1) % agfl_slots(geo))
    put(agf, AGF_FLCOUNT, count - 1)
    tp.log(agf)
    return block


async def agfl_put(tp: Transaction, agno: int, agf: Buf, block: int) -> None:
    """Append a block to the free list. Raises Corrupt if the ring is full."""
    slots = agfl_slots(tp.vol.geo)
    count, last = get(agf, AGF_FLCOUNT), (get(agf, AGF_FLLAST) + 1) % slots
    if count == slots:
        raise tp.vol.corrupt("AGFL", f"AG {agno}", "the free list is full")
    agfl = await read_agfl(tp, agno)
    put(agfl, L.AGFL.itemsize + 4 * last, block)
    put(agf, AGF_FLLAST, last)
    put(agf, AGF_FLCOUNT, count + 1)
    tp.log(agfl)
    tp.log(agf)


class HeaderRoot(Root):
    """The part that all trees rooted in an AG header share."""

    def __init__(self, tp: Transaction, kind: Kind, agno: int, header: Buf) -> None:
        self.tp = tp
        self.kind = kind
        self.owner = agno
        self.header = header
        self.block_size = tp.vol.geo.block_size
        self._root_at, self._level_at = ROOT_FIELDS[kind]

    @property
    def levels(self) -> int:
        return get(self.header, self._level_at)

    @property
    def top(self) -> int:
        return get(self.header, self._root_at)

    def set_top(self, block: int, levels: int) -> None:
        put(self.header, self._root_at, block)
        put(self.header, self._level_at, levels)
        self.tp.log(self.header)

    @property
    def uuid(self) -> bytes:
        return self.tp.vol.geo.uuid

    def daddr(self, block: int) -> int:
        geo = self.tp.vol.geo
        if not geo.ag_header_blocks <= block < geo.ag_length(self.owner):
            raise self.corrupt(f"block {block}", "outside the AG")
        return geo.agb_to_daddr(self.owner, block)

    def corrupt(self, where: str, reason: str) -> Exception:
        return self.tp.vol.corrupt(self.kind.name, f"AG {self.owner} {where}", reason)


class AgRoot(HeaderRoot):
    """bnobt, cntbt and rmapbt: rooted in the AGF, blocks from and to the free list."""

    def _count(self, delta: int) -> None:
        add(self.header, AGF_BTREEBLKS, delta)
        if self.kind is btkind.RMAP:
            add(self.header, AGF_RMAP_BLOCKS, delta)
        self.tp.log(self.header)

    async def alloc_block(self, near: int) -> int:
        block = await agfl_get(self.tp, self.owner, self.header)
        self._count(1)
        return block

    async def free_block(self, block: int) -> None:
        await agfl_put(self.tp, self.owner, self.header, block)
        self._count(-1)


# -- what is known of all AGs ---------------------------------------------------------------------


class Summary:
    """Free space of every AG at a glance, and the sums that the block counters need.

    `usable` is what data may take from an AG: what is free, less the free list's minimum (at
    least SET_ASIDE) and less `held`, which is kept for the growth of finobt, refcountbt and
    rmapbt, as the kernel does. `unavailable` is what the filesystem's free count holds beyond it.
    """

    def __init__(self, geo: Geometry) -> None:
        n = geo.agcount
        self.limits = btkind.limits(geo)
        self._has_rmap = geo.has_rmap
        self.known = [False] * n
        self.freeblks = [0] * n
        self.longest = [0] * n
        self.need = [0] * n  # minimum length of the free list
        self.usable = [0] * n
        self.usable_by_trees = [0] * n
        self.finobt_blocks = [1] * n
        self.free = 0  # sum of freeblks + flcount + btreeblks
        self.unavailable = 0
        self._free_of = [0] * n

    def learn(self, agno: int, agf: Buf) -> None:
        """Take over the figures of an AGF that was read or changed."""
        words = _AGF_HEAD.unpack_from(agf.mem, agf.addr)
        flcount, freeblks, longest, btreeblks = words[12:]
        need = self._minimum(*words[7:10])
        held = self._held(agno, agf)
        have = freeblks + min(flcount, need)
        hidden = self._free_of[agno] - self.usable[agno]
        free = freeblks + flcount + btreeblks
        self.free += free - self._free_of[agno]
        self._free_of[agno] = free
        self.freeblks[agno], self.longest[agno], self.need[agno] = freeblks, longest, need
        self.usable[agno] = max(0, have - max(SET_ASIDE, need) - held)
        self.usable_by_trees[agno] = max(0, have - need)
        self.unavailable += free - self.usable[agno] - hidden
        self.known[agno] = True

    def _minimum(self, bno: int, cnt: int, rmap: int) -> int:
        """Blocks the free list must have before a change (XFS format: two splits a tree)."""
        most = self.limits.alloc_levels
        need = 2 * min(bno + 1, most) + 2 * min(cnt + 1, most) - 4
        if self._has_rmap:
            need += 2 * min(rmap + 1, self.limits.rmap_levels) - 2
        return need

    def _held(self, agno: int, agf: Buf) -> int:
        """Blocks kept back for the growth of the AG's trees."""
        limits = self.limits
        held = max(0, limits.finobt_reserve - self.finobt_blocks[agno])
        if limits.rmap_reserve or limits.refcount_reserve:
            tail = _AGF_TAIL.unpack_from(agf.mem, agf.addr + AGF_RMAP_BLOCKS)
            held += max(0, limits.rmap_reserve - tail[0])
            held += max(0, limits.refcount_reserve - tail[1])
        return held
