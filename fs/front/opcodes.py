"""Parked requests, finished on the trio thread: what a lane could not answer at once, the opcodes
that pyfuse3 does not have, and the most frequent ones of those that it has.

`answer` serves the request in one slot: it finds the handler, runs it behind the same gate as
pyfuse3's handlers (errors become replies, nothing ends the mount), and writes the reply to the
descriptor that the request came from. A handler gets the message and gives the body of its reply,
or None if it has replied itself, as READ and WRITE do from the page cache. Slot and payload belong
to the caller, who gives them back afterwards.

Messages are parsed where they lie; nothing is read behind the end of one. Formats: linux/fuse.h.
Inode flags that the VFS would check if FUSE told it of them are checked here.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import pyfuse3

from fs import copyrange, fallocate, file, ioctl, seek, syncfs, tmpfile
from fs.front import attrs, handles, laneslow, procdir, wire
from fs.front.guard import error_of
from fs.front.laneslow import Front
from fs.front.lanestate import S_FD, S_LEN, S_LOCKED, SLOT_BYTES
from fs.front.operations import Operations
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.inode import Inode

REPLY = struct.Struct("=IiQ")  # fuse_out_header
HEADER = struct.Struct("=4xIQQIII4x")  # fuse_in_header without the length
FALLOCATE_IN = struct.Struct("=QQQI4x")
LSEEK_IN, LSEEK_OUT = struct.Struct("=QQI4x"), struct.Struct("=Q")
COPY_IN, COPY_OUT, COPY_OUT_64 = struct.Struct("=7Q"), struct.Struct("=I4x"), struct.Struct("=Q")
CREATE_IN, MKDIR_IN = struct.Struct("=4I"), struct.Struct("=II")
OPEN_IN, OPEN_OUT = struct.Struct("=II"), struct.Struct("=QI4x")
IOCTL_IN, IOCTL_OUT = struct.Struct("=QIIQII"), struct.Struct("=iIII")

OPEN_DIRECT_IO, OPEN_KEEP_CACHE = 1, 2
COPY_MOST = (1 << 31) - 4096  # bytes that the reply to the older COPY_FILE_RANGE can name
SYNC = handles.DATA_SYNC | handles.FULL_SYNC
# A lane may have left a lock with these, so they are never refused on the way.
ALWAYS_SERVED = (wire.READ, wire.WRITE)


class Request(NamedTuple):
    """The header of a message."""

    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int


def header(msg: memoryview) -> Request:
    """The message's header."""
    return Request(*HEADER.unpack_from(msg))


def fields(form: struct.Struct, msg: memoryview) -> tuple[Any, ...]:
    """The arguments behind the header. Raises OSError(EINVAL) if the message is too short."""
    if len(msg) < wire.BODY + form.size:
        raise OSError(errno.EINVAL, f"message of {len(msg)} bytes")
    return form.unpack_from(msg, wire.BODY)


# -- one request --------------------------------------------------------------------------------


def message(front: Front, slot: int) -> memoryview:
    """The request in a slot, without a large payload."""
    addr, length = front.slots[slot, : S_LEN + 1].tolist()
    return front.vol.pages.view[addr : addr + min(length, SLOT_BYTES)]


async def answer(front: Front, slot: int) -> None:
    """Finish the request in a slot. Raises nothing that a request can cause."""
    msg, fd = message(front, slot), int(front.slots[slot, S_FD])
    request = header(msg)
    name = wire.NAMES.get(request.opcode, str(request.opcode))
    gate = front.ops.gate
    work = _serve(front, msg, slot, request.opcode)
    ticket = gate.enter(name, request.node, work)
    # A write that a lane began holds the IOLOCK: it is not held back where others wait for that.
    apart = procdir.owns(request.node) or bool(front.slots[slot, S_LOCKED])
    try:
        async with gate.writing(name, apart=apart):
            body = await work
    except Exception as error:
        send(front, fd, request.unique, error_of(gate, name, error), b"")
    else:
        if body is not None:
            send(front, fd, request.unique, 0, body)
    finally:
        work.close()  # if it was never begun
        gate.leave(ticket)


async def _serve(front: Front, msg: memoryview, slot: int, opcode: int) -> file.Buffer | None:
    if opcode not in ALWAYS_SERVED:
        front.vol.check_alive()
    handler = HANDLERS.get(opcode)
    if handler is None:
        raise OSError(errno.ENOSYS, f"opcode {opcode}")
    return await handler(front, msg, slot)


def send(front: Front, fd: int, unique: int, error: int, body: file.Buffer) -> None:
    """Reply with a positive errno, or with 0 and a body."""
    head = REPLY.pack(REPLY.size + len(body), -error, unique)
    try:
        os.writev(fd, (head, body))
    except OSError as failure:
        if failure.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits for it any more
            front.vol.log.error("reply to request %d refused: %s", unique, failure)


# -- files --------------------------------------------------------------------------------------


def _check_changeable(ip: Inode) -> None:
    """Raises OSError(EPERM) for an immutable file."""
    if ip.flags & L.DIFLAG_IMMUTABLE:
        raise PermissionError(errno.EPERM, "the file is immutable")


async def _changed(front: Front, ip: Inode, fh: int) -> None:
    """With O_SYNC the change is on the device when the call returns."""
    if fh & SYNC:
        await file.fsync(front.vol, ip, not fh & handles.FULL_SYNC, fh)


async def _fallocate(front: Front, msg: memoryview, slot: int) -> bytes:
    fh, offset, length, mode = fields(FALLOCATE_IN, msg)
    ip = front.ops.opened(fh)
    _check_changeable(ip)
    if ip.flags & L.DIFLAG_APPEND and mode & ~fallocate.KEEP_SIZE:
        raise PermissionError(errno.EPERM, "the file is append-only")
    kill = bool(header(msg).uid)
    await fallocate.fallocate(front.vol, ip, offset, length, mode, kill_privileges=kill)
    await _changed(front, ip, fh)
    return b""


async def _lseek(front: Front, msg: memoryview, slot: int) -> bytes:
    if front.ops.enable_writeback_cache:
        # The kernel asks without writing what it caches, so holes here may be data there.
        raise OSError(errno.ENOSYS, "with cache=writeback only the kernel knows what is data")
    fh, offset, whence = fields(LSEEK_IN, msg)
    return LSEEK_OUT.pack(await seek.seek(front.vol, front.ops.opened(fh), offset, whence))


async def _copy(front: Front, msg: memoryview, most: int) -> int:
    fh_in, at_in, _, fh_out, at_out, length, flags = fields(COPY_IN, msg)
    if flags:
        raise OSError(errno.EINVAL, f"flags {flags:#x}")
    source, target = front.ops.opened(fh_in), front.ops.opened(fh_out)
    _check_changeable(target)
    kill = bool(header(msg).uid)
    done = await copyrange.copy(
        front.vol, source, at_in, target, at_out, min(length, most), kill_privileges=kill
    )
    await _changed(front, target, fh_out)
    return done


async def _copy_file_range(front: Front, msg: memoryview, slot: int) -> bytes:
    return COPY_OUT.pack(await _copy(front, msg, COPY_MOST))


async def _copy_file_range_64(front: Front, msg: memoryview, slot: int) -> bytes:
    return COPY_OUT_64.pack(await _copy(front, msg, 1 << 62))


async def _tmpfile(front: Front, msg: memoryview, slot: int) -> bytes:
    """A file without a name, opened; `linkat` may give it one unless it was opened with O_EXCL."""
    flags, mode, _, _ = fields(CREATE_IN, msg)
    request, ops, vol = header(msg), front.ops, front.vol
    async with ops.using(request.node) as dp:
        mode = stat.S_IFREG | stat.S_IMODE(mode)
        linkable = not flags & os.O_EXCL
        ip = await tmpfile.create(vol, dp, mode, request.uid, request.gid, linkable)
        with ops.made(ip):
            await ops.complete(dp, ip)
        info = ops.file_info(vol.inodes.hold(ip.handle), flags, request.uid)
        return attrs.entry_out(ops.looked_up(ip)) + open_out(info)


def open_out(info: pyfuse3.FileInfo) -> bytes:
    """struct fuse_open_out."""
    how = (OPEN_DIRECT_IO if info.direct_io else 0) | (OPEN_KEEP_CACHE if info.keep_cache else 0)
    return OPEN_OUT.pack(info.fh, how)


# -- names: what pyfuse3's handlers do, without the way through pyfuse3 -------------------------


def _plain(name: str) -> Callable[..., Any]:
    """A handler of pyfuse3's without the guard: `answer` has done its work already."""
    handler: Callable[..., Any] = getattr(Operations, name).__wrapped__
    return handler


LOOKUP, GETATTR, CREATE, MKDIR, UNLINK, RMDIR, OPEN = map(
    _plain, ("lookup", "getattr", "create", "mkdir", "unlink", "rmdir", "open")
)


def name_at(msg: memoryview, at: int = wire.BODY) -> bytes:
    """The string at a message offset. Raises OSError(EINVAL) if it has no end."""
    name, end, _ = bytes(msg[at:]).partition(b"\0")
    if not (name and end):
        raise OSError(errno.EINVAL, "message without a name")
    return name


async def _lookup(front: Front, msg: memoryview, slot: int) -> bytes:
    request = header(msg)
    return attrs.entry_out(await LOOKUP(front.ops, request.node, name_at(msg), request))


async def _getattr(front: Front, msg: memoryview, slot: int) -> bytes:
    request = header(msg)
    return attrs.attr_out(await GETATTR(front.ops, request.node, request))


async def _create(front: Front, msg: memoryview, slot: int) -> bytes:
    flags, mode, _, _ = fields(CREATE_IN, msg)
    request, name = header(msg), name_at(msg, wire.BODY + CREATE_IN.size)
    info, entry = await CREATE(front.ops, request.node, name, mode, flags, request)
    return attrs.entry_out(entry) + open_out(info)


async def _mkdir(front: Front, msg: memoryview, slot: int) -> bytes:
    mode, _ = fields(MKDIR_IN, msg)
    request, name = header(msg), name_at(msg, wire.BODY + MKDIR_IN.size)
    mode = stat.S_IFDIR | stat.S_IMODE(mode)
    return attrs.entry_out(await MKDIR(front.ops, request.node, name, mode, request))


async def _unlink(front: Front, msg: memoryview, slot: int) -> bytes:
    request = header(msg)
    await UNLINK(front.ops, request.node, name_at(msg), request)
    return b""


async def _rmdir(front: Front, msg: memoryview, slot: int) -> bytes:
    request = header(msg)
    await RMDIR(front.ops, request.node, name_at(msg), request)
    return b""


async def _open(front: Front, msg: memoryview, slot: int) -> bytes:
    flags, _ = fields(OPEN_IN, msg)
    request = header(msg)
    return open_out(await OPEN(front.ops, request.node, flags, request))


# -- the rest -----------------------------------------------------------------------------------


async def _statx(front: Front, msg: memoryview, slot: int) -> bytes:
    node = header(msg).node
    if procdir.owns(node):
        reply = front.ops.proc.attributes(node)
        return attrs.statx_bytes(reply, reply.st_ctime_ns, 0)
    async with front.ops.using(node) as ip:
        return attrs.statx_out(front.vol, ip)


async def _syncfs(front: Front, msg: memoryview, slot: int) -> bytes:
    await syncfs.syncfs(front.vol)
    return b""


async def _ioctl(front: Front, msg: memoryview, slot: int) -> bytes:
    fh, _, command, argument, in_size, out_size = fields(IOCTL_IN, msg)
    at = wire.BODY + IOCTL_IN.size
    if len(msg) < at + in_size:
        raise OSError(errno.EINVAL, f"message of {len(msg)} bytes for {in_size} bytes of argument")
    request = header(msg)
    caller = ioctl.Caller(request.uid, request.pid, argument)
    data = bytes(msg[at : at + in_size])
    out = await ioctl.run(front.vol, front.ops.opened(fh), command, data, caller)
    # The kernel's own requests for flags expect exactly as many bytes as they have room for.
    return IOCTL_OUT.pack(0, 0, 0, 0) + out[:out_size].ljust(out_size, b"\0")


Handler = Callable[[Front, memoryview, int], Awaitable[file.Buffer | None]]

HANDLERS: dict[int, Handler] = {
    wire.LOOKUP: _lookup,
    wire.GETATTR: _getattr,
    wire.CREATE: _create,
    wire.MKDIR: _mkdir,
    wire.UNLINK: _unlink,
    wire.RMDIR: _rmdir,
    wire.OPEN: _open,
    wire.READ: laneslow.read,
    wire.WRITE: laneslow.write,
    wire.FALLOCATE: _fallocate,
    wire.LSEEK: _lseek,
    wire.COPY_FILE_RANGE: _copy_file_range,
    wire.COPY_FILE_RANGE_64: _copy_file_range_64,
    wire.TMPFILE: _tmpfile,
    wire.STATX: _statx,
    wire.SYNCFS: _syncfs,
    wire.IOCTL: _ioctl,
}
