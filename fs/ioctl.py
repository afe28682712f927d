"""The ioctls that XFS users expect, as functions from the argument's bytes to the result's.

FUSE copies an argument by the size and direction that the command's number declares, so a handler
gets bytes and gives bytes. XFS_IOC_GOINGDOWN declares that it only returns something though it
takes a word; that word is read from the caller's memory.

A command that is not in `COMMANDS` is ENOTTY, as in every filesystem. Rights that the VFS does not
check for FUSE are checked here: those of the superuser, by uid.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import trio

from fs import fileattr, trim
from fs.fileattr import FileAttr
from fs.shutdown import Why
from fs.xfs import ag
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume

GETFLAGS, SETFLAGS = 0x80086601, 0x40086602
FSGETXATTR, FSSETXATTR = 0x801C581F, 0x401C5820
GETFSLABEL, SETFSLABEL = 0x81009431, 0x41009432
FITRIM = 0xC0185879
GOINGDOWN = 0x8004587D
FSGEOMETRY = 0x8100587E

FSXATTR = struct.Struct("=5I8x")
TRIM_RANGE = struct.Struct("=3Q")
WORD = struct.Struct("=I")
GEOMETRY = struct.Struct("=8I4Q16s4I6I136x")
GEOMETRY_VERSION = 5  # what the kernel's V5 interface says of itself
LABEL_MAX = 12  # bytes: XFS format, superblock

CHANGING = (SETFLAGS, FSSETXATTR, SETFSLABEL)  # wait while the filesystem is frozen

GOING_DEFAULT, GOING_LOGFLUSH, GOING_NOLOGFLUSH = 0, 1, 2

# XFS_FSOP_GEOM_FLAGS_: those of every V5 filesystem, then those of features.
ALWAYS = 0x2 | 0x40 | 0x80 | 0x100 | 0x400 | 0x800 | 0x4000 | 0x8000
G_ATTR, G_IALIGN, G_DALIGN, G_SECTOR, G_FTYPE, G_FINOBT = 0x1, 0x8, 0x10, 0x200, 1 << 16, 1 << 17
G_SPINODES, G_RMAPBT, G_REFLINK, G_BIGTIME = 1 << 18, 1 << 19, 1 << 20, 1 << 21
G_INOBTCNT, G_NREXT64 = 1 << 22, 1 << 23


class Caller(NamedTuple):
    """Who asks, and the pointer that was given as the argument."""

    uid: int
    pid: int
    argument: int

    def check_superuser(self) -> None:
        """Raises OSError(EPERM)."""
        if self.uid:
            raise PermissionError(errno.EPERM, "for the superuser only")


Command = Callable[["Volume", "Inode", bytes, Caller], Awaitable[bytes]]


async def run(vol: Volume, ip: Inode, command: int, data: bytes, caller: Caller) -> bytes:
    """Carry out a command. Raises OSError: ENOTTY for an unknown one, EINVAL, EPERM, EROFS ..."""
    vol.check_alive()
    handler = COMMANDS.get(command)
    if handler is None:
        raise OSError(errno.ENOTTY, f"ioctl {command:#x}")
    if command not in CHANGING:
        return await handler(vol, ip, data, caller)
    async with vol.freezer.writer():
        return await handler(vol, ip, data, caller)


def _unpack(form: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) < form.size:
        raise OSError(errno.EINVAL, f"argument of {len(data)} bytes")
    return form.unpack_from(data)


# -- flags --------------------------------------------------------------------------------------


async def _get_flags(vol: Volume, ip: Inode, data: bytes, caller: Caller) -> bytes:
    return WORD.pack(fileattr.flags_of(fileattr.get(vol, ip).xflags))


async def _set_flags(vol: Volume, ip: Inode, data: bytes, caller: Caller) -> bytes:
    await fileattr.set_flags(vol, ip, *_unpack(WORD, data), uid=caller.uid)
    return b""


async def _get_fsxattr(vol: Volume, ip: Inode, data: bytes, caller: Caller) -> bytes:
    return FSXATTR.pack(*fileattr.get(vol, ip))


async def _set_fsxattr(vol: Volume, ip: Inode, data: bytes, caller: Caller) -> bytes:
    await fileattr.set(vol, ip, FileAttr(*_unpack(FSXATTR, data)), uid=caller.uid)
    return b""


# -- the label ----------------------------------------------------------------------------------


async def _get_label(vol: Volume, ip: Inode, data: bytes, caller: Caller) -> bytes:
    async with vol.reader() as tp:
        return bytes((await ag.read_sb(tp)).rec(L.SB)["fname"])


async def _set_label(vol: Volume, ip: Inode, data: bytes, caller: Caller) -> bytes:
    """At most 12 bytes, into the superblock and its copies in the other AGs; stable at the end."""
    caller.check_superuser()
    label = data.split(b"\0", 1)[0]
    if len(label) > LABEL_MAX:
        raise OSError(errno.EINVAL, f"label of {len(label)} bytes")
    async with vol.transaction("sb") as tp:
        await tp.lock_space()
        buffers = [await ag.read_sb(tp, agno) for agno in range(vol.geo.agcount)]
        for buf in buffers:
            buf.rec(L.SB)["fname"] = label
            tp.log(buf)
    await vol.flush_metadata()
    return b""


# -- space and shutdown -------------------------------------------------------------------------


async def _trim(vol: Volume, ip: Inode, data: bytes, caller: Caller) -> bytes:
    """Tell the device what is free; the length in the result is what it was told of."""
    caller.check_superuser()
    start, length, minlen = _unpack(TRIM_RANGE, data)
    return TRIM_RANGE.pack(start, await trim.trim(vol, start, length, minlen), minlen)


def _read_word(caller: Caller) -> int:
    """The word that the caller's pointer leads to. Raises OSError."""
    fd = os.open(f"/proc/{caller.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(WORD.unpack(os.pread(fd, WORD.size, caller.argument))[0])
    finally:
        os.close(fd)


async def _going_down(vol: Volume, ip: Inode, data: bytes, caller: Caller) -> bytes:
    """Shut down: frozen, so with everything at home; with all that was committed; or at once."""
    caller.check_superuser()
    try:
        # In a thread: the page could be one of a file that only this thread can read in.
        flags = await trio.to_thread.run_sync(_read_word, caller)
    except (OSError, struct.error):
        raise OSError(errno.EFAULT, "the argument cannot be read") from None
    if flags not in (GOING_DEFAULT, GOING_LOGFLUSH, GOING_NOLOGFLUSH):
        raise OSError(errno.EINVAL, f"shutdown flags {flags}")
    if flags == GOING_DEFAULT and not vol.read_only and not vol.freezer.level:
        await vol.freezer.freeze()
    elif flags == GOING_LOGFLUSH and not vol.read_only:
        await vol.xlog.force()
    vol.shutdown("user-initiated shutdown", Why.ASKED_FOR)
    return b""


# -- geometry -----------------------------------------------------------------------------------


async def _geometry(vol: Volume, ip: Inode, data: bytes, caller: Caller) -> bytes:
    """struct xfs_fsop_geom of the V5 interface."""
    geo = vol.geo
    async with vol.reader() as tp:
        buf = await ag.read_sb(tp)
        sb = np.array(buf.rec(L.SB))
    version = int(sb["versionnum"])
    flags = ALWAYS | sum(
        bit
        for bit, has in (
            (G_ATTR, bool(version & L.VERSION_ATTR)),
            (G_IALIGN, bool(version & L.VERSION_ALIGN)),
            (G_DALIGN, bool(version & L.VERSION_DALIGN)),
            (G_SECTOR, bool(version & L.VERSION_SECTOR)),
            (G_FTYPE, geo.has_ftype),
            (G_FINOBT, geo.has_finobt),
            (G_SPINODES, geo.has_sparse),
            (G_RMAPBT, geo.has_rmap),
            (G_REFLINK, geo.has_reflink),
            (G_BIGTIME, geo.has_bigtime),
            (G_INOBTCNT, geo.has_inobtcount),
            (G_NREXT64, geo.has_nrext64),
        )
        if has
    )
    return GEOMETRY.pack(
        *(geo.block_size, int(sb["rextsize"]), geo.ag_blocks, geo.agcount, geo.log_blocks),
        *(geo.sector_size, geo.inode_size, geo.imax_pct),
        *(geo.dblocks, 0, 0, geo.log_start, geo.log_uuid, geo.stripe_unit, geo.stripe_width),
        *(GEOMETRY_VERSION, flags, geo.log_sector_size, geo.block_size, geo.dir_block_size),
        *(int(sb["logsunit"]), 0, 0),
    )


COMMANDS: dict[int, Command] = {
    GETFLAGS: _get_flags,
    SETFLAGS: _set_flags,
    FSGETXATTR: _get_fsxattr,
    FSSETXATTR: _set_fsxattr,
    GETFSLABEL: _get_label,
    SETFSLABEL: _set_label,
    FITRIM: _trim,
    GOINGDOWN: _going_down,
    FSGEOMETRY: _geometry,
}
