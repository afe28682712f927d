"""Values of attributes that are too large for a leaf: blocks of their own, never buffered.

Each block has a header with the piece's place in the value and a CRC. They are not metadata for
the log: they are written straight from arena memory and made stable before the entry that names
them becomes visible, and read the same way, verified each time. The blocks are mapped by the
attribute fork, possibly in several extents.

Readers hold the ILOCK; a writer needs none, because the entry is still INCOMPLETE and so
invisible, and the inode's IOLOCK keeps other writers of attributes away.

XFS format: header 56 bytes 'XARM' {offset, bytes, crc, uuid, owner ino, blkno daddr, lsn all
ones}, payload block size - 56, the rest of the last block zero.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np

from alloc import gfp
from fs.xfs import bmap
from fs.xfs import layout as L
from fs.xfs.bmap import ATTR, Mapping
from fs.xfs.crc import crc_ok, crc_stamp

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.volume import Volume
    from fs.xfs.geometry import Geometry

HEADER = L.REMOTE_ATTR_HEADER.itemsize
CRC = L.off(L.REMOTE_ATTR_HEADER, "crc")
PAGE_SIZE = 4096
CHUNK_BYTES = 65536  # device transfer: the largest block, the largest value


def blocks(geo: Geometry, length: int) -> int:
    """Blocks that a value of `length` bytes takes."""
    return -(-length // (geo.block_size - HEADER))


@asynccontextmanager
async def _bounce(vol: Volume, nbytes: int) -> AsyncIterator[tuple[int, int]]:
    """Arena memory for transfers: byte address and size."""
    size = max(PAGE_SIZE, vol.geo.block_size, min(nbytes, CHUNK_BYTES))
    order = (size // PAGE_SIZE - 1).bit_length()
    pfn = await vol.arena.alloc_folio(order, gfp.KERNEL | gfp.NOFAIL)  # a buffer, in XFS
    try:
        yield pfn * PAGE_SIZE, PAGE_SIZE << order
    finally:
        vol.arena.put_folio(pfn)


def _pieces(geo: Geometry, mappings: list[Mapping], room: int) -> list[Mapping]:
    """Mappings cut into transfers of at most `room` bytes."""
    step = room >> geo.block_log
    cut = []
    for found in mappings:
        for at in range(0, found.count, step):
            count = min(step, found.count - at)
            cut.append(Mapping(found.offset + at, found.fsbno + at, count))
    return cut


async def _mapped(tp: Transaction, ip: Inode, valueblk: int, length: int) -> list[Mapping]:
    """Where the value's blocks are. Raises Corrupt for a hole."""
    count = blocks(tp.vol.geo, length)
    found = await bmap.read(tp, ip, valueblk, count, ATTR)
    if any(m.fsbno == bmap.HOLE for m in found):
        where = f"ino {ip.ino} file block {valueblk}"
        raise tp.vol.corrupt("attribute value", where, "not mapped")
    return found


async def read(tp: Transaction, ip: Inode, valueblk: int, length: int) -> bytes:
    """The value, verified block by block. Raises Corrupt."""
    geo, mem = tp.vol.geo, tp.vol.arena.mem
    value = bytearray(length)
    done = 0
    mappings = await _mapped(tp, ip, valueblk, length)
    async with _bounce(tp.vol, blocks(geo, length) << geo.block_log) as (start, room):
        for piece in _pieces(geo, mappings, room):
            nbytes = piece.count << geo.block_log
            await tp.vol.dev.read(geo.fsb_to_bytes(piece.fsbno), [mem[start : start + nbytes].data])
            daddr = geo.fsb_to_daddr(piece.fsbno)
            for addr in range(start, start + nbytes, geo.block_size):
                want = min(length - done, geo.block_size - HEADER)
                fault = _fault(geo, mem, addr, ip.ino, daddr, done, want)
                if fault:
                    raise tp.vol.corrupt("attribute value", f"daddr {daddr}", fault)
                value[done : done + want] = mem[addr + HEADER : addr + HEADER + want].data
                done += want
                daddr += geo.block_bbs
    return bytes(value)


def _fault(
    geo: Geometry,
    mem: np.ndarray[tuple[int], np.dtype[np.uint8]],
    addr: int,
    ino: int,
    daddr: int,
    offset: int,
    nbytes: int,
) -> str:
    """What is wrong with a value block; "" when nothing is."""
    header = mem[addr : addr + HEADER].view(L.REMOTE_ATTR_HEADER)[0]
    if header["magic"] != L.MAGIC_ATTR_REMOTE:
        return "magic"
    if not crc_ok(mem, addr, geo.block_size, CRC):
        return "wrong checksum"
    if header["uuid"].tobytes() != geo.uuid:
        return "uuid"
    if header["owner"] != ino:
        return "owner"
    if header["blkno"] != daddr:
        return "block number"
    if header["offset"] != offset or header["bytes"] != nbytes:
        return "place in the value"
    return ""


async def write(vol: Volume, ip: Inode, valueblk: int, value: bytes) -> None:
    """Write the value to its mapped blocks and make it stable.

    Raises OSError from the device: the entry must then stay INCOMPLETE.
    """
    geo, mem = vol.geo, vol.arena.mem
    async with vol.reader(ip) as tp:
        mappings = await _mapped(tp, ip, valueblk, len(value))
    done = 0
    async with _bounce(vol, blocks(geo, len(value)) << geo.block_log) as (start, room):
        for piece in _pieces(geo, mappings, room):
            nbytes = piece.count << geo.block_log
            mem[start : start + nbytes] = 0
            daddr = geo.fsb_to_daddr(piece.fsbno)
            for addr in range(start, start + nbytes, geo.block_size):
                part = value[done : done + geo.block_size - HEADER]
                _fill(geo, mem, addr, ip.ino, daddr, done, part)
                done += len(part)
                daddr += geo.block_bbs
            await vol.xlog.wait_freed(piece.fsbno, piece.count)
            await vol.dev.write(geo.fsb_to_bytes(piece.fsbno), [mem[start : start + nbytes].data])
    await vol.dev.flush()


def _fill(
    geo: Geometry,
    mem: np.ndarray[tuple[int], np.dtype[np.uint8]],
    addr: int,
    ino: int,
    daddr: int,
    offset: int,
    part: bytes,
) -> None:
    """Make one value block."""
    header = mem[addr : addr + HEADER].view(L.REMOTE_ATTR_HEADER)[0]
    header["magic"] = L.MAGIC_ATTR_REMOTE
    header["offset"], header["bytes"] = offset, len(part)
    header["uuid"] = np.void(geo.uuid)
    header["owner"], header["blkno"], header["lsn"] = ino, daddr, L.NULL64
    mem[addr + HEADER : addr + HEADER + len(part)] = np.frombuffer(part, np.uint8)
    crc_stamp(mem, addr, geo.block_size, CRC)
