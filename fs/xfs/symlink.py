"""Symbolic links: the target inside the inode, or in blocks of its own.

A target that fits the data fork is inline (LOCAL). A longer one fills one to three extents, each
one buffer with one header and one CRC for the whole extent. Either way `size` is the target's
length, 1 to 1023 bytes. A link is written once, when it is made; only an attribute fork that
needs its inline room moves it later.

Locking: the ILOCK, shared to read, exclusive to write. Blocks come from the caller's reservation.

XFS format: header 56 bytes 'XSLM' {offset in the target, bytes, crc, uuid, owner, blkno, lsn}.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from fs.cache.buf import Buf, BufOps
from fs.errors import Corrupt
from fs.xfs import bmap
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.volume import Volume
    from fs.xfs.geometry import Geometry

HEADER = L.SYMLINK_HEADER.itemsize
TARGET_MAX = 1023


def _verify(geo: Geometry, buf: Buf, owner: int | None) -> str:
    """What is wrong with one extent of a remote target; "" when nothing is."""
    header = buf.rec(L.SYMLINK_HEADER)
    if header["magic"] != L.MAGIC_SYMLINK:
        return "magic"
    if header["uuid"].tobytes() != geo.uuid:
        return "uuid"
    if header["blkno"] != buf.daddr:
        return "block number"
    if owner is not None and header["owner"] != owner:
        return "owner"
    nbytes = int(header["bytes"])
    if not 0 < nbytes <= buf.size - HEADER or int(header["offset"]) + nbytes > TARGET_MAX:
        return "length"
    return ""


_CRC, _LSN = L.off(L.SYMLINK_HEADER, "crc"), L.off(L.SYMLINK_HEADER, "lsn")
SYMLINK_OPS = BufOps("symbolic link", _CRC, _verify, _LSN)


def blocks(geo: Geometry, length: int) -> int:
    """Blocks that a remote target of `length` bytes takes."""
    return -(-length // (geo.block_size - HEADER))


def _corrupt(tp: Transaction, ip: Inode, reason: str) -> Corrupt:
    return tp.vol.corrupt("symbolic link", f"ino {ip.ino}", reason)


async def read(tp: Transaction, ip: Inode) -> bytes:
    """The target. Raises Corrupt."""
    length = ip.size
    if not 0 < length <= TARGET_MAX:
        raise _corrupt(tp, ip, f"length {length}")
    if ip.format == L.FMT_LOCAL:
        addr, room = ip.data_fork
        if length > room:
            raise _corrupt(tp, ip, "longer than the data fork")
        return tp.vol.arena.mem[addr : addr + length].tobytes()
    geo = tp.vol.geo
    target = b""
    for found in await bmap.read(tp, ip, 0, blocks(geo, length)):
        if found.fsbno == bmap.HOLE or found.unwritten or len(target) == length:
            raise _corrupt(tp, ip, "extents do not fit the length")
        bbs = found.count * geo.block_bbs
        buf = await tp.read(geo.fsb_to_daddr(found.fsbno), bbs, SYMLINK_OPS, ip.ino)
        header = buf.rec(L.SYMLINK_HEADER)
        if header["offset"] != len(target):
            raise _corrupt(tp, ip, "pieces out of order")
        target += buf.data[HEADER : HEADER + int(header["bytes"])].tobytes()
    if len(target) != length:
        raise _corrupt(tp, ip, "shorter than its size")
    return target


async def write(tp: Transaction, ip: Inode, target: bytes) -> None:
    """Store the target of a new link: sets format, size and the data fork.

    Raises OSError(ENAMETOOLONG) before anything is changed. A target longer than the data fork
    needs `blocks` and the extents' worst case from the reservation.
    """
    if len(target) > TARGET_MAX:
        raise OSError(errno.ENAMETOOLONG, f"target of {len(target)} bytes")
    mem, (addr, room) = tp.vol.arena.mem, ip.data_fork
    mem[addr : addr + room] = 0
    ip.size = ip.disk_size = len(target)
    if len(target) <= room:
        mem[addr : addr + len(target)] = np.frombuffer(target, np.uint8)
        ip.format, ip.nextents = L.FMT_LOCAL, 0
        tp.log_inode(ip)
        return
    ip.format, ip.nextents = L.FMT_EXTENTS, 0
    tp.log_inode(ip)
    await _write_blocks(tp, ip, target)


async def _write_blocks(tp: Transaction, ip: Inode, target: bytes) -> None:
    geo = tp.vol.geo
    done, at, total = 0, 0, blocks(geo, len(target))
    while at < total:
        found = await bmap.alloc(tp, ip, at, total - at)
        at += found.count
        daddr, bbs = geo.fsb_to_daddr(found.fsbno), found.count * geo.block_bbs
        buf = await tp.get(daddr, bbs, SYMLINK_OPS)
        part = target[done : done + buf.size - HEADER]
        header = buf.rec(L.SYMLINK_HEADER)
        header["magic"], header["offset"], header["bytes"] = L.MAGIC_SYMLINK, done, len(part)
        header["uuid"] = np.void(geo.uuid)
        header["owner"], header["blkno"] = ip.ino, daddr
        buf.data[HEADER : HEADER + len(part)] = np.frombuffer(part, np.uint8)
        tp.log(buf)
        done += len(part)


async def convert_local(tp: Transaction, ip: Inode) -> None:
    """Move an inline target to blocks, because an attribute fork needs the room."""
    mem, (addr, room) = tp.vol.arena.mem, ip.data_fork
    target = mem[addr : addr + ip.size].tobytes()
    mem[addr : addr + room] = 0
    ip.format, ip.nextents = L.FMT_EXTENTS, 0
    await _write_blocks(tp, ip, target)


async def inactivate(vol: Volume, ip: Inode) -> None:
    """Free the blocks of a link that is going away."""
    if ip.format != L.FMT_EXTENTS or not ip.nextents:
        return
    async with vol.transaction("symlink_inactive", from_pool=True) as tp:
        await tp.lock_inodes(ip)
        end = await bmap.last_offset(tp, ip)
        for found in await bmap.read(tp, ip, 0, end):
            if found.fsbno != bmap.HOLE:
                tp.forget(vol.geo.fsb_to_daddr(found.fsbno), found.count << vol.geo.block_log)
        while not await bmap.unmap(tp, ip, 0, end):
            pass
        ip.size = ip.disk_size = 0
        tp.log_inode(ip)
