"""Parked requests on the trio thread: messages in, replies out, without /dev/fuse."""

from __future__ import annotations

import errno
import functools
import os
import stat
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from fs import file, ioctl, namespace
from fs.cache.inode import Inode
from fs.front import attrs, handles, opcodes, opnames, wire
from fs.front import lanestate as S
from fs.volume import Volume
from fs.xfs import layout as L
from tests import support
from tests.conftest import AllowLogs
from tests.fs.dirimages import opened, using
from tests.fs.lanes import HEADER, REPLY, UNIQUE, Desk, a_desk

PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
MIB = 1 << 20


async def ask(
    desk: Desk, op: int, node: int, body: bytes, uid: int = 0, now: bool = False
) -> tuple[int, bytes]:
    """(errno, body of the reply) of a parked request; `now`: tried without a task first."""
    slot = int(desk.lane.me[S.M_SLOT])
    place = desk.slots[slot]
    message = HEADER.pack(HEADER.size + len(body), op, UNIQUE, node, uid, uid, 1, 0, 0) + body
    at = int(place[S.S_ADDR])
    desk.vol.pages.view[at : at + len(message)] = message
    place[S.S_LEN], place[S.S_FD], place[S.S_PAYLOAD] = len(message), desk.fd, 0
    place[S.S_DONE] = place[S.S_LOCKED] = 0
    if not (now and opnames.serve_now(desk, slot)):
        await opcodes.answer(desk, slot)
    size = os.fstat(desk.fd).st_size
    whole = os.pread(desk.fd, size, 0)
    os.ftruncate(desk.fd, 0)
    os.lseek(desk.fd, 0, os.SEEK_SET)
    length, error, unique = REPLY.unpack_from(whole)
    assert (length, unique) == (size, UNIQUE)
    assert not desk.ops.gate.running
    return -error, whole[REPLY.size :]


def handle(ip: Inode, flags: int = os.O_RDWR) -> int:
    return handles.pack(ip.handle, flags)


@asynccontextmanager
async def ready(scratch: Path, *mkfs: str) -> AsyncIterator[tuple[Volume, Desk, Inode]]:
    """A volume with a file of 1 MiB, and a desk."""
    image = support.mkfs(scratch, *mkfs)
    async with opened(image) as vol, a_desk(vol) as desk, using(vol) as dp:
        ip = await namespace.create(vol, dp, b"file", 0o644, 0, 0)
        await file.write(vol, ip, 0, b"x" * MIB)
        yield vol, desk, ip
        vol.inodes.put(ip)
    support.assert_clean(image)


async def test_fallocate_and_lseek(scratch: Path) -> None:
    async with ready(scratch) as (vol, desk, ip):
        hole = struct.pack("=QQQII", handle(ip), 65536, 65536, PUNCH, 0)
        assert await ask(desk, wire.FALLOCATE, ip.ino, hole) == (0, b"")
        assert bytes(await file.read(vol, ip, 65535, 65538)) == b"x" + bytes(65536) + b"x"
        for at, whence, answer in ((0, 4, 65536), (65536, 3, 131072), (131072, 4, MIB)):
            question = struct.pack("=QQII", handle(ip), at, whence, 0)
            assert await ask(desk, wire.LSEEK, ip.ino, question) == (0, struct.pack("=Q", answer))
        question = struct.pack("=QQII", handle(ip), MIB, 3, 0)
        assert (await ask(desk, wire.LSEEK, ip.ino, question))[0] == errno.ENXIO
        longer = struct.pack("=QQQII", handle(ip, os.O_RDWR | os.O_SYNC), 0, 2 * MIB, 0, 0)
        assert await ask(desk, wire.FALLOCATE, ip.ino, longer) == (0, b"")
        assert ip.size == 2 * MIB
        assert not vol.pages.state(ip.handle)["ndirty"], "O_SYNC"


async def test_fallocate_minds_flags_and_set_id_bits(scratch: Path) -> None:
    async with ready(scratch) as (vol, desk, ip):
        more = struct.pack("=QQQII", handle(ip), MIB, MIB, 0, 0)
        hole = struct.pack("=QQQII", handle(ip), 0, 65536, PUNCH, 0)
        await namespace.setattr(vol, ip, {"mode": 0o4755})
        assert await ask(desk, wire.FALLOCATE, ip.ino, more) == (0, b"")
        assert stat.S_IMODE(ip.mode) == 0o4755
        assert await ask(desk, wire.FALLOCATE, ip.ino, hole, uid=1) == (0, b"")
        assert stat.S_IMODE(ip.mode) == 0o755
        ip.flags = L.DIFLAG_APPEND
        assert (await ask(desk, wire.FALLOCATE, ip.ino, more))[0] == 0
        assert (await ask(desk, wire.FALLOCATE, ip.ino, hole))[0] == errno.EPERM
        ip.flags = L.DIFLAG_IMMUTABLE
        assert (await ask(desk, wire.FALLOCATE, ip.ino, more))[0] == errno.EPERM
        ip.flags = 0


@pytest.mark.parametrize("reflink", ["0", "1"])
@pytest.mark.parametrize("opcode", [wire.COPY_FILE_RANGE, wire.COPY_FILE_RANGE_64])
async def test_copy_file_range(scratch: Path, reflink: str, opcode: int) -> None:
    async with ready(scratch, "-m", f"reflink={reflink}") as (vol, desk, ip):
        async with using(vol) as dp:
            copy = await namespace.create(vol, dp, b"copy", 0o644, 0, 0)
        body = struct.pack("=7Q", handle(ip), 4096, copy.ino, handle(copy), 8192, 1 << 40, 0)
        form = "=Q" if opcode == wire.COPY_FILE_RANGE_64 else "=I4x"
        expected = struct.pack(form, MIB - 4096)
        assert await ask(desk, opcode, ip.ino, body) == (0, expected)
        assert bytes(await file.read(vol, copy, 0, MIB * 2)) == bytes(8192) + b"x" * (MIB - 4096)
        odd = body[:-8] + struct.pack("=Q", 1)
        assert (await ask(desk, opcode, ip.ino, odd))[0] == errno.EINVAL
        vol.inodes.put(copy)


async def test_a_cancelled_file_without_a_name_is_freed(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else knows of it: what is not given back here stays on the unlinked list."""

    async def complete(dp: Inode, ip: Inode) -> None:
        await trio.sleep_forever()

    async with ready(scratch) as (vol, desk, _):
        monkeypatch.setattr(desk.ops, "complete", complete)
        body = struct.pack("=4I", os.O_RDWR, stat.S_IFREG | 0o640, 0o22, 0) + b"#1\0"
        with trio.move_on_after(0.05) as scope:
            await ask(desk, wire.TMPFILE, 1, body)
        assert scope.cancelled_caught
        await vol.drain_inactive()
        assert not desk.ops.gate.running


async def test_a_file_without_a_name(scratch: Path) -> None:
    async with ready(scratch) as (vol, desk, _), using(vol) as dp:
        body = struct.pack("=4I", os.O_RDWR, stat.S_IFREG | 0o640, 0o22, 0) + b"#1\0"
        error, reply = await ask(desk, wire.TMPFILE, 1, body, uid=1000)
        assert not error
        ino, (fh, how) = struct.unpack_from("=Q", reply)[0], struct.unpack_from("=QI4x", reply, 128)
        ip = desk.ops.opened(fh)
        assert (ip.ino, ip.nlink, ip.nlookup, ip.refs) == (ino, 0, 1, 1)
        assert (ip.mode, ip.uid, ip.gid) == (stat.S_IFREG | 0o640, 1000, 1000)
        assert reply[:128] == attrs.entry_out(attrs.entry(vol, ip, ip.ino))
        assert how == opcodes.OPEN_DIRECT_IO
        await file.write(vol, ip, 0, b"kept")
        await namespace.link(vol, dp, b"named", ip)
        desk.ops.forgotten(ino, 1)
        desk.ops.closed(fh)
        async with using(vol, b"named") as ip:
            assert bytes(await file.read(vol, ip, 0, 9)) == b"kept"
        exclusive = struct.pack("=4I", os.O_RDWR | os.O_EXCL, 0o600, 0, 0) + b"#2\0"
        error, reply = await ask(desk, wire.TMPFILE, 1, exclusive)
        ino, (fh, _) = struct.unpack_from("=Q", reply)[0], struct.unpack_from("=QI4x", reply, 128)
        with pytest.raises(FileNotFoundError):
            await namespace.link(vol, dp, b"never", desk.ops.opened(fh))
        desk.ops.forgotten(ino, 1)
        desk.ops.closed(fh)


@pytest.mark.parametrize("now", [False, True])
async def test_names_as_pyfuse3_would_answer(scratch: Path, now: bool) -> None:
    async with ready(scratch) as (vol, desk, ip), using(vol) as dp:
        query = functools.partial(ask, desk, now=now)
        found = attrs.entry_out(attrs.entry(vol, ip, ip.ino))
        assert await query(wire.LOOKUP, 1, b"file\0") == (0, found)
        assert ip.nlookup == 1
        shown = struct.pack("=QII", 3600, 0, 0) + found[40:]
        assert await query(wire.GETATTR, ip.ino, bytes(16)) == (0, shown)
        absent = await query(wire.LOOKUP, 1, b"nobody\0")
        assert (absent[0], absent[1][:24]) == (0, struct.pack("=3Q", 0, 0, 3600))
        body = struct.pack("=4I", os.O_WRONLY, 0o4640, 0o22, 0) + b"new\0"
        error, reply = await query(wire.CREATE, 1, body, uid=7)
        fh = struct.unpack_from("=Q", reply, 128)[0]
        new = desk.ops.opened(fh)
        assert (error, new.mode, new.uid, new.nlookup) == (0, stat.S_IFREG | 0o4640, 7, 1)
        assert reply == attrs.entry_out(attrs.entry(vol, new, new.ino)) + reply[128:]
        assert (await query(wire.CREATE, 1, body))[0] == errno.EEXIST
        desk.ops.closed(fh)
        ino = new.ino
        error, reply = await query(wire.OPEN, ino, struct.pack("=II", os.O_RDWR, 0))
        fh, how = struct.unpack("=QI4x", reply)
        assert (error, how) == (0, opcodes.OPEN_DIRECT_IO)
        desk.ops.closed(fh)
        assert await query(wire.UNLINK, 1, b"new\0") == (0, b"")
        assert await query(wire.UNLINK, 1, b"new\0") == (errno.ENOENT, b"")
        error, reply = await query(wire.MKDIR, 1, struct.pack("=II", 0o1750, 0) + b"dir\0")
        assert (error, struct.unpack_from("=I", reply, 40 + 60)[0]) == (0, stat.S_IFDIR | 0o1750)
        assert await query(wire.UNLINK, 1, b"dir\0") == (errno.EISDIR, b"")
        assert await query(wire.RMDIR, 1, b"dir\0") == (0, b"")
        desk.ops.forgotten(ino, 1)
        desk.ops.forgotten(struct.unpack_from("=Q", reply)[0], 1)
        for malformed in (b"\0", b"", b"endless"):
            assert await query(wire.UNLINK, 1, malformed) == (errno.EINVAL, b"")
        assert not vol.iolocks.held(dp.handle)


async def test_statx_and_syncfs(scratch: Path) -> None:
    async with ready(scratch) as (vol, desk, ip):
        assert await ask(desk, wire.STATX, ip.ino, bytes(24)) == (0, attrs.statx_out(vol, ip))
        assert vol.pages.state(ip.handle)["ndirty"]
        assert await ask(desk, wire.SYNCFS, 1, bytes(8)) == (0, b"")
        assert not vol.pages.state(ip.handle)["ndirty"]


def ioctl_message(ip: Inode, command: int, data: bytes, out_size: int) -> bytes:
    return struct.pack("=QIIQII", handle(ip), 0, command, 0, len(data), out_size) + data


async def test_ioctl_replies_are_as_long_as_the_kernel_expects(scratch: Path) -> None:
    async with ready(scratch) as (vol, desk, ip):
        body = ioctl_message(ip, ioctl.SETFLAGS, struct.pack("=I", 0x80), 0)
        assert await ask(desk, wire.IOCTL, ip.ino, body) == (0, bytes(16))
        for size in (4, 8):  # the kernel's own request, and a program's
            body = ioctl_message(ip, ioctl.GETFLAGS, b"", size)
            flags = b"\x80".ljust(size, b"\0")
            assert await ask(desk, wire.IOCTL, ip.ino, body) == (0, bytes(16) + flags)
        body = ioctl_message(ip, ioctl.FSGETXATTR, b"", 28)
        assert len((await ask(desk, wire.IOCTL, ip.ino, body))[1]) == 16 + 28
        body = ioctl_message(ip, 0x5401, b"", 0)
        assert await ask(desk, wire.IOCTL, ip.ino, body) == (errno.ENOTTY, b"")
        cut = ioctl_message(ip, ioctl.FSSETXATTR, bytes(28), 0)[:-1]
        assert await ask(desk, wire.IOCTL, ip.ino, cut) == (errno.EINVAL, b"")


async def test_messages_that_are_too_short_are_refused(scratch: Path) -> None:
    async with ready(scratch) as (_, desk, ip):
        for op in (wire.FALLOCATE, wire.LSEEK, wire.COPY_FILE_RANGE, wire.TMPFILE, wire.IOCTL):
            assert await ask(desk, op, ip.ino, bytes(12)) == (errno.EINVAL, b""), op
        assert await ask(desk, wire.POLL, ip.ino, bytes(24)) == (errno.ENOSYS, b"")


@pytest.mark.parametrize("now", [False, True])
async def test_a_failing_handler_is_a_reply_and_a_shutdown(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, allow_logs: AllowLogs, now: bool
) -> None:
    allow_logs("unexpected error in lookup|unexpected KeyError|unmounted after a shutdown")

    async def fails(*_: Any) -> bytes:
        raise KeyError("oops")

    def fails_now(*_: Any) -> bytes:
        raise KeyError("oops")

    device = support.mkfs(scratch)
    monkeypatch.setitem(opcodes.HANDLERS, wire.LOOKUP, fails)
    monkeypatch.setitem(opnames.STEPS, wire.LOOKUP, fails_now)
    with pytest.RaisesGroup(AssertionError):  # `opened` finds it shut down
        async with opened(device) as vol, a_desk(vol) as desk, using(vol) as dp:
            assert await ask(desk, wire.LOOKUP, dp.ino, b"name\0", now=now) == (errno.EIO, b"")
            assert vol.shut_down
            assert await ask(desk, wire.LOOKUP, dp.ino, b"name\0", now=now) == (errno.EIO, b"")
            assert await ask(desk, wire.STATX, dp.ino, bytes(24)) == (errno.EIO, b"")
