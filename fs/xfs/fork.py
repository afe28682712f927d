"""The two forks of an inode: how they share the literal area, and how the border moves.

The data fork begins at byte 176 of the inode's image; with `forkoff` set the attribute fork
begins 8 * forkoff bytes behind it, else there is none (XFS format: forkoff). A fork in EXTENTS
format is a packed list of records, one in BTREE format the root of a B+tree whose pointers stand
behind the place of its last possible key: they move when the fork's size does.

Callers hold the inode's ILOCK exclusively. What is not async does not wait and is atomic.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from alloc.jit import kernel
from fs.xfs import ag
from fs.xfs import layout as L
from fs.xfs.be import get16, get64, put64
from fs.xfs.extents import REC_BYTES
from fs.xfs.geometry import Geometry
from fs.xfs.inode import ATTR, DATA, bmbt_maxrecs

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction

ConvertLocal = Callable[["Transaction", "Inode"], Awaitable[None]]

ROOT_HEADER = L.BMBT_ROOT.itemsize
DATA_ROOT_MIN = ROOT_HEADER + 3 * 16  # a data fork keeps room for a root of three pointers,
ATTR_ROOT_MIN = ROOT_HEADER + 2 * 16  # an attribute fork for one of two
DEFAULT_DATA_BYTES = ROOT_HEADER + 6 * 2 * 16


def fmt(ip: Inode, fork: int) -> int:
    """Format of a fork, one of layout.FMT_*."""
    return ip.aformat if fork == ATTR else ip.format


def set_fmt(ip: Inode, fork: int, value: int) -> None:
    if fork == ATTR:
        ip.aformat = value
    else:
        ip.format = value


def count(ip: Inode, fork: int) -> int:
    """Extent records of a fork."""
    return ip.anextents if fork == ATTR else ip.nextents


def set_count(ip: Inode, fork: int, value: int) -> None:
    if fork == ATTR:
        ip.anextents = value
    else:
        ip.nextents = value


def area(ip: Inode, fork: int) -> tuple[int, int]:
    """Byte address in the arena and size in bytes of a fork's literal area."""
    return ip.attr_fork if fork == ATTR else ip.data_fork


def default_forkoff(geo: Geometry) -> int:
    """Where the border goes when nothing else decides (XFS format: default attr offset)."""
    return DEFAULT_DATA_BYTES >> 3


def _root_bytes(mem: Any, addr: int) -> int:
    """Bytes that a B+tree root needs for the entries it has."""
    return ROOT_HEADER + 16 * (int(mem[addr + 2]) << 8 | int(mem[addr + 3]))


def _data_bytes_min(ip: Inode, geo: Geometry, mem: Any) -> int:
    """Bytes that the data fork must keep."""
    need = 0
    if ip.format == L.FMT_LOCAL:
        need = ip.size
    elif ip.format == L.FMT_EXTENTS:
        need = ip.nextents * REC_BYTES
        if not ip.forkoff and need > DEFAULT_DATA_BYTES:
            need = 0  # the list becomes a tree anyway, so room for the root is enough
    elif ip.format == L.FMT_BTREE:
        need = _root_bytes(mem, ip.data_fork[0])
    return max(need, DATA_ROOT_MIN)


def shortform_fit(geo: Geometry, ip: Inode, mem: Any, size: int) -> int:
    """The forkoff with which `size` bytes of short attributes fit, 0 if they cannot.

    XFS format: fork split. Keeps the present border while they fit; otherwise moves it down as
    far as needed, up to what the data fork has in use.
    """
    literal = geo.literal_size
    if size > literal:
        return 0
    offset = (literal - size) >> 3
    if ip.format == L.FMT_DEV:
        return 1 if offset >= 1 else 0
    if ip.forkoff and size <= literal - 8 * ip.forkoff:
        return ip.forkoff
    if ip.format == L.FMT_BTREE and ip.forkoff:
        return ip.forkoff if offset >= ip.forkoff else 0
    least = (_data_bytes_min(ip, geo, mem) + 7) >> 3
    most = (literal - ATTR_ROOT_MIN) >> 3
    if offset >= most:
        return most
    return offset if offset >= least else 0


@kernel("void(u1[::1], i8, i8, i8)")
def respace_root(mem, addr, old_bytes, new_bytes):
    """Move a B+tree root's pointers to their place for another fork size."""
    count = get16(mem, addr + 2)
    source = addr + 4 + 8 * ((old_bytes - 4) // 16)
    target = addr + 4 + 8 * ((new_bytes - 4) // 16)
    if target < source:
        for i in range(count):
            put64(mem, target + 8 * i, get64(mem, source + 8 * i))
    else:
        for i in range(count - 1, -1, -1):
            put64(mem, target + 8 * i, get64(mem, source + 8 * i))


def _fits(ip: Inode, fork: int, mem: Any, size: int) -> bool:
    """Would the fork's present contents fit in `size` bytes?"""
    form, (addr, _) = fmt(ip, fork), area(ip, fork)
    if form == L.FMT_EXTENTS:
        return count(ip, fork) * REC_BYTES <= size
    if form == L.FMT_BTREE:
        return _root_bytes(mem, addr) <= size
    if form == L.FMT_LOCAL:
        used = ip.size if fork == DATA else int(mem[addr]) << 8 | int(mem[addr + 1])
        return used <= size
    return size >= 4


def set_forkoff(tp: Transaction, ip: Inode, forkoff: int) -> None:
    """Move the border between the forks; both forks' contents must fit.

    A border of 0 takes the (empty) attribute fork away. A data fork in BTREE format must not be
    given room for all its records as a list: XFS keeps its border while it has that format.
    """
    mem, geo = tp.vol.arena.mem, tp.vol.geo
    if forkoff == ip.forkoff:
        return
    addr, old_data = ip.data_fork
    attr_addr, old_attr = ip.attr_fork
    new_data = 8 * forkoff or geo.literal_size
    new_attr = geo.literal_size - new_data
    assert _fits(ip, DATA, mem, new_data), "data fork does not fit its new size"
    assert ip.format != L.FMT_BTREE or new_data < old_data, "a tree's fork must not grow"
    assert not old_attr or _fits(ip, ATTR, mem, new_attr), "attributes do not fit their new size"
    moved = mem[attr_addr : attr_addr + old_attr].copy()
    if ip.format == L.FMT_BTREE:
        respace_root(mem, addr, old_data, new_data)
    if new_data > old_data:
        mem[addr + old_data : addr + new_data] = 0
    if new_attr:
        _place_attr(mem, addr + new_data, new_attr, moved, ip.aformat == L.FMT_BTREE)
    ip.forkoff = forkoff
    tp.log_inode(ip)


def _place_attr(mem: Any, at: int, size: int, contents: Any, tree: bool) -> None:
    """Put the old attribute fork's bytes at its new place and zero the rest."""
    mem[at : at + size] = 0
    if not tree:
        keep = min(size, contents.size)
        mem[at : at + keep] = contents[:keep]
        return
    scratch = np.zeros(max(size, contents.size), np.uint8)
    scratch[: contents.size] = contents
    respace_root(scratch, 0, contents.size, size)
    mem[at : at + size] = scratch[:size]
    used = ROOT_HEADER + 8 * bmbt_maxrecs(size) + 8 * ((_root_bytes(mem, at) - ROOT_HEADER) // 16)
    mem[at + used : at + size] = 0


def drop_attr(tp: Transaction, ip: Inode) -> None:
    """Take an empty attribute fork away and give its room to the data fork.

    A data fork in BTREE format keeps its size, so there an empty EXTENTS fork remains.
    """
    assert ip.anextents == 0
    mem = tp.vol.arena.mem
    addr, size = ip.attr_fork
    mem[addr : addr + size] = 0
    ip.aformat = L.FMT_EXTENTS
    if ip.format != L.FMT_BTREE:
        set_forkoff(tp, ip, 0)
    tp.log_inode(ip)


async def note_attributes(tp: Transaction) -> None:
    """Set the superblock's ATTR bit: some inode has an attribute fork (XFS format)."""
    buf = await ag.read_sb(tp)
    record = buf.rec(L.SB)
    if not int(record["versionnum"]) & L.VERSION_ATTR:
        record["versionnum"] |= L.VERSION_ATTR
        tp.log(buf)


async def add_attr(
    tp: Transaction, ip: Inode, size: int, convert_local: ConvertLocal | None = None
) -> None:
    """Give an inode an attribute fork with room for `size` bytes of short attributes, if it can.

    Does nothing if it has one. A data fork that does not fit its new size is converted: a list
    of extents becomes a tree, a root is pushed down a level, and inline data is left to
    `convert_local`, which must leave it in EXTENTS format. The transaction needs blocks for that.
    """
    from fs.xfs import bmap

    if ip.forkoff:
        return
    mem, geo = tp.vol.arena.mem, tp.vol.geo
    forkoff = shortform_fit(geo, ip, mem, size) or default_forkoff(geo)
    if ip.format == L.FMT_DEV:
        forkoff = 1  # room for the device number, and nothing else is allowed
    if ip.format == L.FMT_LOCAL and not _fits(ip, DATA, mem, 8 * forkoff):
        assert convert_local is not None, "inline data does not fit and nobody converts it"
        ip.aformat = L.FMT_EXTENTS
        await convert_local(tp, ip)
    elif ip.format == L.FMT_EXTENTS and not _fits(ip, DATA, mem, 8 * forkoff):
        await bmap.to_btree(tp, ip, DATA)
    elif ip.format == L.FMT_BTREE and not _fits(ip, DATA, mem, 8 * forkoff):
        await bmap.push_root(tp, ip, DATA)
    ip.aformat, ip.anextents = L.FMT_EXTENTS, 0
    set_forkoff(tp, ip, forkoff)
    await note_attributes(tp)
    tp.log_inode(ip)
