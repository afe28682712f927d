"""Directories: look a name up, add, remove and replace it, list them all; every form.

A directory is shortform (in the inode), block form (one block), leaf form or node form; it grows
and shrinks through them as XFS does. This module decides by form: shortform and block form are
done here with the kernels of `dirsf` and `dirblock`, the others by `dirtree.TreeDir`.

Callers hold the directory's ILOCK, exclusive to modify. They have reserved `enter_blocks` for an
addition; removal and lookup need nothing. Names are bytes of 1 to 255; callers have checked that
an added name is not there. Only link counts and times are left to them (`fs.namespace`).

An unverified image may claim anything: every function raises Corrupt, writing one log line, where
blocks contradict each other. XFS format: directories.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fs.cache.buf import Buf
from fs.cache.resident import MISS
from fs.log.budget import CANCELS
from fs.xfs import bmap, danode, dirbuf, residentdir
from fs.xfs import dirblock as B
from fs.xfs import dirdata as D
from fs.xfs import dirsf as S
from fs.xfs import layout as L
from fs.xfs.dirtree import TreeDir
from fs.xfs.inode import limits

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.volume import Volume
    from fs.xfs.geometry import Geometry

DOT, DOTDOT = b".", b".."
COOKIE_MASK = 0x7FFFFFFF
LIST_BATCH = 256
FTYPES = {
    stat.S_IFREG: L.FT_REG,
    stat.S_IFDIR: L.FT_DIR,
    stat.S_IFCHR: L.FT_CHR,
    stat.S_IFBLK: L.FT_BLK,
    stat.S_IFIFO: L.FT_FIFO,
    stat.S_IFSOCK: L.FT_SOCK,
    stat.S_IFLNK: L.FT_SYMLINK,
}
MODES = {ftype: mode for mode, ftype in FTYPES.items()}


class Entry(NamedTuple):
    """One name as readdir gives it; `next_cookie` is where to go on behind it."""

    name: bytes
    ino: int
    ftype: int
    next_cookie: int


def ftype_of(mode: int) -> int:
    """File type that a directory records for an inode of this mode."""
    return FTYPES.get(stat.S_IFMT(mode), L.FT_UNKNOWN)


def enter_blocks(geo: Geometry) -> int:
    """Blocks to reserve for adding one name.

    A data block, a free index block, a leaf and a node on every level, and the extent map's blocks
    for each (XFS format: dir enter reservation).
    """
    blocks = danode.DEPTH_MAX + 2
    return blocks * (geo.dir_block_blocks + bmap.worst_indirect(geo, geo.dir_block_blocks))


def shrink_blocks(geo: Geometry) -> int:
    """Blocks worth reserving for a removal, so that poor leaves are joined; 0 is enough to work."""
    return (danode.DEPTH_MAX + 1) * dirbuf.split_blocks(geo)


# -- forms --------------------------------------------------------------------------------------


def _is_short(tp: Transaction, dp: Inode) -> bool:
    """Is it shortform? Then it is sound, too. Raises Corrupt."""
    if dp.format != L.FMT_LOCAL:
        return False
    addr, room = dp.data_fork
    geo = tp.vol.geo
    code = 1
    if dp.size <= room:
        code = S.verify(tp.vol.arena.mem, addr, dp.size, geo.dir_block_size, limits(geo))
    if code:
        raise dirbuf.fault(tp, dp, f"shortform: {S.REASONS[code]}")
    return True


async def _open(tp: Transaction, dp: Inode) -> Buf | TreeDir:
    """The only block of a block-form directory, or the larger directory."""
    geo = tp.vol.geo
    if dp.size & (geo.dir_block_size - 1) or not 0 < dp.size <= dirbuf.LEAF_SPACE:
        raise dirbuf.fault(tp, dp, f"size {dp.size}")
    one_block = dp.size == geo.dir_block_size
    if one_block and await bmap.lookup(tp, dp, geo.dir_block_blocks) is None:
        return await _block(tp, dp)
    root = await dirbuf.read_leaf(tp, dp, dirbuf.leaf_root(geo))
    return TreeDir(tp, dp, root)


async def _block(tp: Transaction, dp: Inode) -> Buf:
    buf = await dirbuf.read_data(tp, dp, 0)
    if not D.is_block_form(buf.mem, buf.addr):
        raise dirbuf.fault(tp, dp, "its only block has no leaf")
    return buf


# -- lookup -------------------------------------------------------------------------------------


async def lookup(tp: Transaction, dp: Inode, name: bytes) -> tuple[int, int] | None:
    """(ino, ftype) of a name, "." and ".." included; None if there is none."""
    if name not in (DOT, DOTDOT):
        code, ino, ftype = residentdir.lookup(tp.vol.resident, dp.handle, name)
        if code != MISS:
            return (ino, ftype) if code == residentdir.FOUND else None
    if _is_short(tp, dp):
        return _lookup_short(tp, dp, name)
    form = await _open(tp, dp)
    if isinstance(form, Buf):
        index, offset = B.find(form.mem, form.addr, form.size, name)
        if index < 0:
            return None
        ino, ftype = D.entry_ino(form.mem, form.addr, offset)
        return int(ino), int(ftype)
    found = await form.find(name)
    if found is None:
        return None
    ino, ftype = D.entry_ino(found.data.mem, found.data.addr, found.offset)
    return int(ino), int(ftype)


def _lookup_short(tp: Transaction, dp: Inode, name: bytes) -> tuple[int, int] | None:
    mem, (addr, _) = tp.vol.arena.mem, dp.data_fork
    if name == DOT:
        return dp.ino, L.FT_DIR
    if name == DOTDOT:
        return int(S.parent(mem, addr)), L.FT_DIR
    at = S.find(mem, addr, name)
    if not at:
        return None
    ino, ftype = S.entry_ino(mem, addr, at)
    return int(ino), int(ftype)


async def is_empty(tp: Transaction, dp: Inode) -> bool:
    """Has it no names but "." and ".."?"""
    if _is_short(tp, dp):
        return bool(S.count(tp.vol.arena.mem, dp.data_fork[0]) == 0)
    return len(await read(tp, dp, 0, 3)) <= 2


# -- changing -----------------------------------------------------------------------------------


def init(tp: Transaction, dp: Inode, parent_ino: int) -> None:
    """Make a fresh inode an empty directory."""
    dp.format = L.FMT_LOCAL
    dirbuf.set_size(dp, int(S.init(tp.vol.arena.mem, dp.data_fork[0], parent_ino)))
    tp.log_inode(dp)


async def add(tp: Transaction, dp: Inode, name: bytes, ino: int, ftype: int) -> None:
    """Add a name that is not there. The transaction has `enter_blocks` reserved."""
    if _is_short(tp, dp):
        mem, (addr, room) = tp.vol.arena.mem, dp.data_fork
        limit = tp.vol.geo.dir_block_size
        if S.fits(mem, addr, dp.size, name, ino, room, limit):
            dirbuf.set_size(dp, int(S.add(mem, addr, dp.size, name, ino, ftype, limit)))
            tp.log_inode(dp)
            return
        await convert_local(tp, dp)
    form = await _open(tp, dp)
    if isinstance(form, Buf):
        if B.add(form.mem, form.addr, form.size, name, ino, ftype) >= 0:
            tp.log(form)
            return
        form = await _to_leaf(tp, dp, form)
    await form.add(name, ino, ftype)


async def remove(tp: Transaction, dp: Inode, name: bytes, ino: int) -> None:
    """Remove a name that refers to `ino`. Works without a reservation; raises OSError(ENOENT)."""
    if _is_short(tp, dp):
        mem, (addr, _) = tp.vol.arena.mem, dp.data_fork
        at = S.find(mem, addr, name)
        _expect(tp, dp, name, ino, S.entry_ino(mem, addr, at) if at else None)
        dirbuf.set_size(dp, int(S.remove(mem, addr, dp.size, at)))
        tp.log_inode(dp)
        return
    form = await _open(tp, dp)
    block: Buf | None = None
    if isinstance(form, Buf):
        block = form
        index, offset = B.find(block.mem, block.addr, block.size, name)
        here = D.entry_ino(block.mem, block.addr, offset) if index >= 0 else None
        _expect(tp, dp, name, ino, here)
        B.remove(block.mem, block.addr, block.size, index, offset)
        tp.log(block)
    else:
        found = await form.find(name)
        data = found.data if found else None
        here = D.entry_ino(data.mem, data.addr, found.offset) if found and data else None
        _expect(tp, dp, name, ino, here)
        assert found is not None
        block = await form.remove(found)
    if block is not None:
        await _to_short(tp, dp, block)


def _expect(
    tp: Transaction, dp: Inode, name: bytes, ino: int, here: tuple[int, int] | None
) -> None:
    """The caller looked the name up under the same lock, so it must be there and mean `ino`."""
    if here is None:
        raise FileNotFoundError(2, f"no such entry in directory {dp.ino}: {name!r}")
    if here[0] != ino:
        raise dirbuf.fault(tp, dp, f"{name!r} is inode {here[0]}, not {ino}")


async def replace(tp: Transaction, dp: Inode, name: bytes, ino: int, ftype: int) -> None:
    """Point a name, or "..", at another inode. Shortform may grow: reserve `enter_blocks`."""
    if _is_short(tp, dp):
        mem, (addr, room) = tp.vol.arena.mem, dp.data_fork
        if name != DOTDOT and not S.find(mem, addr, name):
            raise FileNotFoundError(2, f"no such entry in directory {dp.ino}: {name!r}")
        if S.replace_fits(mem, addr, dp.size, ino, room):
            dirbuf.set_size(dp, int(S.replace(mem, addr, dp.size, name, ino, ftype)))
            tp.log_inode(dp)
            return
        await convert_local(tp, dp)
    form = await _open(tp, dp)
    if isinstance(form, Buf):
        index, offset = B.find(form.mem, form.addr, form.size, name)
        buf = form if index >= 0 else None
    else:
        found = await form.find(name)
        buf, offset = (found.data, found.offset) if found else (None, 0)
    if buf is None:
        raise FileNotFoundError(2, f"no such entry in directory {dp.ino}: {name!r}")
    D.set_entry(buf.mem, buf.addr, offset, ino, ftype)
    tp.log(buf)


# -- conversions --------------------------------------------------------------------------------


async def convert_local(tp: Transaction, dp: Inode) -> None:
    """Shortform becomes block form. Needs a directory block and its extent reserved."""
    assert dp.format == L.FMT_LOCAL
    mem, (addr, room) = tp.vol.arena.mem, dp.data_fork
    contents = mem[addr : addr + dp.size].tobytes()
    mem[addr : addr + room] = 0
    dp.format, dp.nextents = L.FMT_EXTENTS, 0
    dirbuf.set_size(dp, 0)
    buf = await dirbuf.new_data(tp, dp, 0, L.MAGIC_DIR_BLOCK)
    S.to_block(contents, buf.mem, buf.addr, buf.size, dp.ino)
    tp.log(buf)


async def _to_leaf(tp: Transaction, dp: Inode, block: Buf) -> TreeDir:
    """Block form becomes leaf form."""
    _, leaf = await dirbuf.new_leaf(tp, dp, L.MAGIC_DIR_LEAF1)
    B.to_leaf(block.mem, block.addr, leaf.addr, block.size)
    tp.log(block)
    tp.log(leaf)
    return TreeDir(tp, dp, leaf)


async def _to_short(tp: Transaction, dp: Inode, block: Buf) -> None:
    """Block form becomes shortform as soon as the inode has room for it."""
    size = int(S.size_of_block(block.mem, block.addr, block.size))
    if size < 0 or size > dp.data_fork[1]:
        return
    contents = np.zeros(size, np.uint8)
    S.from_block(block.mem, block.addr, block.size, contents)
    await dirbuf.free(tp, dp, 0, block)
    addr, room = dp.data_fork
    mem = tp.vol.arena.mem
    mem[addr : addr + room] = 0
    mem[addr : addr + size] = contents
    dp.format = L.FMT_LOCAL
    dirbuf.set_size(dp, size)
    tp.log_inode(dp)


# -- listing ------------------------------------------------------------------------------------


async def read(tp: Transaction, dp: Inode, cookie: int, limit: int) -> list[Entry]:
    """Up to `limit` names at or behind a position, in the kernel's order with its cookies.

    A cookie is an entry's byte address / 8; 0 begins. Entries keep theirs through all forms, so
    one may go on where another call ended while names come and go.
    """
    short = _is_short(tp, dp)
    rows = _list_short(tp, dp, cookie) if short else await _list_blocks(tp, dp, cookie, limit + 1)
    for _, name, _, _ in rows:
        if b"/" in name or b"\0" in name:
            raise dirbuf.fault(tp, dp, f"not a name: {name!r}")
    places = [place for place, _, _, _ in rows]
    places.append(_end(tp.vol.geo, rows, short))
    entries = [
        Entry(name, ino, ftype, places[i + 1] & COOKIE_MASK)
        for i, (_, name, ino, ftype) in enumerate(rows)
    ]
    return entries[:limit]


Row = tuple[int, bytes, int, int]  # place / 8, name, ino, ftype


def _list_short(tp: Transaction, dp: Inode, cookie: int) -> list[Row]:
    mem, (addr, _) = tp.vol.arena.mem, dp.data_fork
    rows: list[Row] = []
    if cookie <= S.DOT >> 3:
        rows.append((S.DOT >> 3, DOT, dp.ino, L.FT_DIR))
    if cookie <= S.DOTDOT >> 3:
        rows.append((S.DOTDOT >> 3, DOTDOT, int(S.parent(mem, addr)), L.FT_DIR))
    out = np.empty((LIST_BATCH, 5), np.int64)
    n = S.list_entries(mem, addr, cookie << 3, out)
    for offset, ino, namelen, ftype, at in out[:n].tolist():
        start = addr + at
        rows.append((offset >> 3, mem[start : start + namelen].tobytes(), ino, ftype))
    return rows


async def _list_blocks(tp: Transaction, dp: Inode, cookie: int, limit: int) -> list[Row]:
    """Rows of at most `limit` entries from the data blocks, holes skipped."""
    geo = tp.vol.geo
    rows: list[Row] = []
    db, start = divmod(cookie << 3, geo.dir_block_size)
    out = np.empty((LIST_BATCH, 4), np.int64)
    while len(rows) < limit and (db + 1) << geo.dir_block_log <= dp.size:
        found = await bmap.lookup(tp, dp, db * geo.dir_block_blocks)
        if found is None or found.offset >= dirbuf.leaf_root(geo):
            break
        if found.offset > db * geo.dir_block_blocks:
            db, start = found.offset // geo.dir_block_blocks, 0
            continue
        buf = await dirbuf.read_data(tp, dp, db)
        _list_block(buf, db, start, limit, rows, out)
        tp.release(buf)
        db, start = db + 1, 0
    return rows


def _list_block(
    buf: Buf, db: int, start: int, limit: int, rows: list[Row], out: np.ndarray
) -> None:
    mem, base = buf.mem, db * buf.size
    while len(rows) < limit:
        batch = out[: limit - len(rows)]
        n = D.list_entries(mem, buf.addr, buf.size, start, batch)
        for offset, ino, namelen, ftype in batch[:n].tolist():
            at = buf.addr + offset + D.NAME_AT
            rows.append(((base + offset) >> 3, mem[at : at + namelen].tobytes(), ino, ftype))
        if n < batch.shape[0]:
            return
        start = int(batch[n - 1, 0]) + 1


def _end(geo: Geometry, rows: list[Row], short: bool) -> int:
    """The position behind the last entry: where the next directory block would start."""
    if not rows:
        return 0
    block = geo.dir_block_size >> 3
    return block if short else (rows[-1][0] // block + 1) * block


# -- the end of a directory ---------------------------------------------------------------------


async def inactivate(vol: Volume, dp: Inode) -> None:
    """Free the blocks of an empty directory that goes: there are some if shrinking had to wait."""
    if dp.format == L.FMT_LOCAL:
        return
    done = False
    while not done:
        async with vol.transaction("dir_inactive") as tp:
            await tp.lock_inodes(dp)
            done = await _drop_extent(tp, dp)


async def _drop_extent(tp: Transaction, dp: Inode) -> bool:
    """Free the last extent, or much of it, and its buffers; True when nothing is left."""
    geo = tp.vol.geo
    end = await bmap.last_offset(tp, dp)
    if not end:
        dirbuf.set_size(dp, 0)
        tp.log_inode(dp)
        return True
    found = await bmap.lookup(tp, dp, end - 1)
    assert found is not None
    blocks = geo.dir_block_blocks
    at = first = max(found.offset, (found.end // blocks - CANCELS) * blocks)
    while at < found.end:  # what of each directory block lies here
        n = min(blocks - at % blocks, found.end - at)
        tp.forget(geo.fsb_to_daddr(found.fsbno + at - found.offset), n << geo.block_log)
        at += n
    while not await bmap.unmap(tp, dp, first, found.end - first):
        pass
    tp.log_inode(dp)
    return False
