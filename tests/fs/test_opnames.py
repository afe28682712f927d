"""Parked names without a task: the same replies as with one, or none at all."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path

from fs import namespace
from fs.front import lanestate as S
from fs.front import opnames, wire
from fs.xfs import layout as L
from tests.fs.lanes import HEADER, REPLY, UNIQUE, Desk
from tests.fs.test_opcodes import ask, ready


def ask_now(desk: Desk, op: int, node: int, body: bytes, uid: int = 0) -> bytes | None:
    """Body of the reply of `serve_now`, None if it refused."""
    slot = int(desk.lane.me[S.M_SLOT])
    place = desk.slots[slot]
    message = HEADER.pack(HEADER.size + len(body), op, UNIQUE, node, uid, uid, 1, 0, 0) + body
    at = int(place[S.S_ADDR])
    desk.vol.pages.view[at : at + len(message)] = message
    place[S.S_LEN], place[S.S_FD] = len(message), desk.fd
    served = opnames.serve_now(desk, slot)
    whole = os.pread(desk.fd, 1 << 16, 0)
    os.ftruncate(desk.fd, 0)
    os.lseek(desk.fd, 0, os.SEEK_SET)
    assert served == bool(whole)
    if not whole:
        return None
    assert REPLY.unpack_from(whole) == (len(whole), 0, UNIQUE)
    return whole[REPLY.size :]


CREATE = struct.pack("=4I", os.O_WRONLY, stat.S_IFREG | 0o640, 0o22, 0)


async def test_replies_are_those_of_the_handlers(scratch: Path) -> None:
    async with ready(scratch) as (vol, desk, ip):
        assert ask_now(desk, wire.LOOKUP, 1, b"nobody\0") == (
            await ask(desk, wire.LOOKUP, 1, b"nobody\0")
        )[1]
        long = b"n" * 200 + b"\0"  # never in the dentry cache
        assert ask_now(desk, wire.LOOKUP, 1, long) == (await ask(desk, wire.LOOKUP, 1, long))[1]
        found = ask_now(desk, wire.LOOKUP, 1, b"file\0")
        assert (0, found) == await ask(desk, wire.LOOKUP, 1, b"file\0")
        assert ip.nlookup == 2
        made = ask_now(desk, wire.CREATE, 1, CREATE + b"new\0", uid=7)
        assert made is not None
        fh = struct.unpack_from("=Q", made, 128)[0]
        new = desk.ops.opened(fh)
        assert (new.mode, new.uid, new.gid) == (stat.S_IFREG | 0o640, 7, 7)
        assert (new.refs, new.nlookup) == (1, 1)
        again = await ask(desk, wire.LOOKUP, 1, b"new\0")
        assert again == (0, made[:128])
        assert ask_now(desk, wire.UNLINK, 1, b"new\0") == b""
        assert new.nlink == 0
        assert new.mode, "it is open"
        desk.ops.closed(fh)
        desk.ops.forgotten(new.ino, 2)
        assert not new.mode, "freed at once"
        desk.ops.forgotten(ip.ino, 2)


async def test_what_it_refuses_stays_undone(scratch: Path) -> None:
    async with ready(scratch) as (vol, desk, ip):
        root = await vol.inodes.get(vol.geo.root_ino)
        vol.inodes.put(await namespace.mkdir(vol, root, b"dir", 0o755, 0, 0))
        before = root.changecount, root.refs, ip.refs, ip.nlookup
        for op, body in (
            (wire.CREATE, CREATE + b"file\0"),  # exists
            (wire.CREATE, CREATE + b".\0"),
            (wire.CREATE, CREATE + b"endless"),
            (wire.UNLINK, b"dir\0"),
            (wire.UNLINK, b"nobody\0"),
            (wire.UNLINK, b"n" * 256 + b"\0"),
            (wire.LOOKUP, b"..\0"),
            (wire.MKDIR, struct.pack("=II", 0o755, 0) + b"other\0"),
        ):
            assert ask_now(desk, op, 1, body) is None
        assert ask_now(desk, wire.CREATE, ip.ino, CREATE + b"x\0") is None
        assert ask_now(desk, wire.LOOKUP, 1 << 40, b"x\0") is None
        for table in (vol.iolocks, vol.ilocks):
            assert table.try_acquire(root.handle, False)
            assert ask_now(desk, wire.CREATE, 1, CREATE + b"x\0") is None
            assert ask_now(desk, wire.UNLINK, 1, b"file\0") is None
            table.release(root.handle)
        root.flags = L.DIFLAG_IMMUTABLE
        assert ask_now(desk, wire.CREATE, 1, CREATE + b"x\0") is None
        root.flags = 0
        assert (root.changecount, root.refs, ip.refs, ip.nlookup) == before
        assert (await ask(desk, wire.CREATE, 1, CREATE + b"file\0"))[0] == errno.EEXIST
        vol.inodes.put(root)
