"""Parked LOOKUP, CREATE and UNLINK in one go, without a task, if nothing has to be waited for.

`serve_now` is asked as soon as the request comes off the ring: it finds, makes or removes the name
with the functions of `fs.namespace` that do not wait, and writes the reply. It refuses what it
cannot do, and whatever is an error, with nothing changed; `fs/front/opcodes.py` does that in a
task, with the handlers that pyfuse3 calls.

Locking: trio thread; nothing here awaits. Formats: linux/fuse.h.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from fs import namespace
from fs.front import attrs, opcodes, wire
from fs.front.guard import error_of
from fs.front.lanestate import S_FD
from fs.front.opcodes import CREATE_IN, Request

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.front.laneslow import Front


def serve_now(front: Front, slot: int) -> bool:
    """Answer the request in a slot if that needs no waiting; False if it is not answered."""
    msg = opcodes.message(front, slot)
    request = opcodes.header(msg)
    step = STEPS.get(request.opcode)
    vol, ops = front.vol, front.ops
    dp = vol.inodes.find(attrs.ino_of(vol, request.node)) if step else None
    if step is None or dp is None:
        return False
    error, body = 0, None
    try:
        if stat.S_ISDIR(dp.mode) and not vol.shut_down:
            body = step(front, dp, msg, request)
    except OSError:
        return False  # the handler finds the same, and says so
    except Exception as failure:
        error = error_of(ops.gate, wire.NAMES[request.opcode], failure)
    finally:
        vol.inodes.put(dp)
    if body is None and not error:
        return False
    ops.gate.handled += 1
    opcodes.send(front, int(front.slots[slot, S_FD]), request.unique, error, body or b"")
    return True


def _lookup(front: Front, dp: Inode, msg: memoryview, request: Request) -> bytes | None:
    name = opcodes.name_at(msg)
    if front.ops.proc.claims(request.node, name):
        return None
    known = namespace.look_now(front.vol, dp, name) if len(name) <= 255 else None
    if known is None:
        return None
    if not known[0]:
        return attrs.entry_out(front.ops.absent())
    ip = front.vol.inodes.find(known[0])
    return None if ip is None else attrs.entry_out(front.ops.looked_up(ip))


def _create(front: Front, dp: Inode, msg: memoryview, request: Request) -> bytes | None:
    """None, too, where a default ACL or `dirsync` asks for more than making the file."""
    vol, ops = front.vol, front.ops
    if ops.dirsync or (ops.enable_acl and dp.forkoff):
        return None
    flags, mode, _, _ = opcodes.fields(CREATE_IN, msg)
    name = opcodes.name_at(msg, wire.BODY + CREATE_IN.size)
    if not stat.S_ISREG(mode):
        return None
    ip = namespace.create_now(vol, dp, name, mode, request.uid, request.gid, 0)
    if ip is None:
        return None
    info = ops.file_info(vol.inodes.hold(ip.handle), flags, request.uid)
    return attrs.entry_out(ops.looked_up(ip)) + opcodes.open_out(info)


def _unlink(front: Front, dp: Inode, msg: memoryview, request: Request) -> bytes | None:
    if front.ops.dirsync:
        return None
    return b"" if namespace.unlink_now(front.vol, dp, opcodes.name_at(msg)) else None


Step = Callable[["Front", "Inode", memoryview, Request], bytes | None]

STEPS: dict[int, Step] = {wire.LOOKUP: _lookup, wire.CREATE: _create, wire.UNLINK: _unlink}
