"""READ and WRITE that a lane parked, finished on the trio thread, which may wait.

`read` answers with the lanes' own kernel, again and again, and has filled in between what was
missing. If memory is so short that pages leave before the others have come, it goes on with the
copying reader of `fs/file.py`, which makes progress with any memory. `write` is that of
`fs/file.py`, from where the lane left the payload; a write that a lane began goes on under the
IOLOCK that the lane left held, so nobody comes between both parts.

They are handlers of `fs/front/opcodes.py`: they give the body of the reply, or None if they have
replied, and raise OSError for what the request is to fail with.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from alloc.policy import AllocationFailed
from fs import enomem, file, xattr
from fs.cache import readahead
from fs.front import handles, procdir
from fs.front.laneread import send
from fs.front.lanestate import (
    ANSWERED,
    M_DONE,
    M_ENTRY,
    M_FD,
    M_MARKED,
    M_SLOT,
    S_ADDR,
    S_DONE,
    S_ENTRY,
    S_FD,
    S_LOCKED,
    S_PAYLOAD,
    Lane,
)
from fs.front.wire import RW_ARGS_END, RW_FH, WRITE_KILL_SUIDGID

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.front.operations import Operations
    from fs.volume import Volume

ARGS = struct.Struct("=QqII")  # file handle, offset, size, flags
WRITTEN = struct.Struct("=I4x")


class Front(Protocol):
    """What this module needs of fs.front.park's Front."""

    vol: Volume
    ops: Operations
    slots: Any
    lanes: list[Lane]  # the last one is the trio thread's own


async def read(front: Front, msg: memoryview, slot: int) -> file.Buffer | None:
    """Finish a READ. Raises OSError: EINVAL, EIO; Corrupt, ShutDown."""
    fh, offset, size, _ = ARGS.unpack_from(msg, RW_FH)
    if procdir.is_open(fh):
        return front.ops.proc.read(fh, offset, size)
    vol, ip = front.vol, front.ops.opened(fh)
    vol.check_alive()
    if offset < 0:
        raise OSError(errno.EINVAL, "negative position")
    if offset < ip.size:
        await front.ops.times.touch(ip)
    async with vol.iolock(ip, shared=True):
        return await _read_held(front, slot, ip, offset, size)


async def _read_held(
    front: Front, slot: int, ip: Inode, offset: int, size: int
) -> file.Buffer | None:
    vol, lane = front.vol, front.lanes[-1]
    end = min(offset + size, ip.size)
    reached = -1
    while True:
        lane.me[M_SLOT], lane.me[M_FD] = slot, front.slots[slot, S_FD]
        lane.me[M_ENTRY] = front.slots[slot, S_ENTRY]
        code = send(lane, ip.handle, offset, size)
        if lane.me[M_MARKED]:
            vol.ahead.hit(ip, int(lane.me[M_MARKED]) - 1, (size + 4095) >> 12)
        if code == ANSWERED:
            return None
        at = offset + int(lane.me[M_DONE])
        if at <= reached:  # what was filled is gone again, or its map is a tree
            return await file.read_slowly(vol, ip, offset, end - offset)
        reached = at
        await readahead.fill(vol, ip, at, end)
        vol.check_alive()


async def write(front: Front, msg: memoryview, slot: int) -> bytes:
    """Finish a WRITE: all of it, or what was possible before space ran out or the device failed.

    Raises OSError: EFBIG, ENOSPC, EINVAL, EIO; Corrupt, ShutDown.
    """
    fh, offset, size, flags = ARGS.unpack_from(msg, RW_FH)
    vol, place = front.vol, front.slots[slot]
    payload = int(place[S_PAYLOAD]) << 12 or int(place[S_ADDR]) + RW_ARGS_END
    data = vol.pages.view[payload : payload + size]
    if procdir.is_open(fh):
        return WRITTEN.pack(await front.ops.proc.write(fh, bytes(data)))
    ip = front.ops.opened(fh)
    if place[S_LOCKED]:
        done = await _go_on(vol, ip, offset, data, int(place[S_DONE]))
    else:
        await xattr.drop_capability(vol, ip)
        # Without a page cache the kernel leaves set-id bits to us.
        ordinary = front.ops.direct and fh & handles.ORDINARY
        kill = bool(ordinary or flags & WRITE_KILL_SUIDGID)
        done = await file.write(vol, ip, offset, data, kill_privileges=kill)
    if fh & (handles.DATA_SYNC | handles.FULL_SYNC):
        await file.fsync(vol, ip, not fh & handles.FULL_SYNC, fh)
    return WRITTEN.pack(done)


async def _go_on(vol: Volume, ip: Inode, offset: int, data: memoryview, done: int) -> int:
    """The rest of a write of which `done` bytes are in the cache; gives the IOLOCK back."""
    vol.iolocks.adopt(ip.handle)
    source = np.frombuffer(data.toreadonly(), np.uint8)
    try:
        vol.check_writable()
        return done + await file.write_held(vol, ip, offset + done, source[done:])
    except (OSError, AllocationFailed) as error:
        enomem.told_less(vol, error)
        return done  # the next write meets the error with nothing done
    finally:
        vol.iolocks.release(ip.handle)
