"""Names and attributes in the lane: byte for byte what pyfuse3's path says, or left to it."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pyfuse3
import pytest
import trio

from alloc.jit import kernel
from alloc.rcu import rcu_enter, rcu_exit
from fs import file, namespace, xattr
from fs.cache.inode import Inode
from fs.front import attrs, lanename, wire
from fs.front import lanestate as S
from fs.front.statfs import statfs
from fs.volume import Volume
from fs.xfs import layout as L
from tests import support
from tests.fs.dirimages import opened, using
from tests.fs.lanes import HEADER, REPLY, UNIQUE, Desk, a_desk

ROOT = pyfuse3.ROOT_INODE
DAY = 24 * 3600 * 10**9


@kernel(lambda: (S.sample(), 1))
def serve(lane, op):
    """What a lane's loop does with these opcodes."""
    rcu_enter(lane.rcu, lane.me[S.M_NUMBER])
    code = S.BROKEN
    if op == wire.LOOKUP:
        code = lanename.serve_lookup(lane)
    elif op == wire.GETATTR:
        code = lanename.serve_getattr(lane)
    elif op == wire.STATX:
        code = lanename.serve_statx(lane)
    elif op == wire.STATFS:
        code = lanename.serve_statfs(lane)
    elif op == wire.GETXATTR:
        code = lanename.serve_getxattr(lane)
    elif op == wire.ACCESS:
        code = lanename.serve_access(lane)
    rcu_exit(lane.rcu, lane.me[S.M_NUMBER])
    return code


@kernel(lambda: (S.sample(), 1))
def be_in_a_section(lane, inside):
    """A lane that has got so far, or is out again."""
    if inside:
        rcu_enter(lane.rcu, lane.me[S.M_NUMBER])
    else:
        rcu_exit(lane.rcu, lane.me[S.M_NUMBER])


def ask(desk: Desk, op: int, node: int, body: bytes = b"") -> tuple[int, int, bytes]:
    """(code, errno, body of the reply) of one request."""
    lane, me = desk.lane, desk.lane.me
    at = int(lane.slots[me[S.M_SLOT], S.S_ADDR])
    me[S.M_LEN] = HEADER.size + len(body)
    message = HEADER.pack(me[S.M_LEN], op, UNIQUE, node, 1000, 1000, 1, 0, 0) + body
    desk.vol.pages.view[at : at + len(message)] = message
    lane.out[:] = 0xA5  # what is not written is not zero
    code = int(serve(lane, op))
    size = os.fstat(desk.fd).st_size
    if code != S.ANSWERED:
        assert size == 0, "a reply to what was not answered"
        return code, 0, b""
    whole = os.pread(desk.fd, size, 0)
    os.ftruncate(desk.fd, 0)
    os.lseek(desk.fd, 0, os.SEEK_SET)
    length, error, unique = REPLY.unpack_from(whole)
    assert (length, unique) == (size, UNIQUE)
    return code, -error, whole[REPLY.size :]


def attr_bytes(a: pyfuse3.EntryAttributes) -> bytes:
    """struct fuse_attr, as libfuse makes it of a struct stat."""
    stamps = (a.st_atime_ns, a.st_mtime_ns, a.st_ctime_ns)
    return struct.pack(
        "=3Q3q10I",
        *(a.st_ino, a.st_size, a.st_blocks),
        *(stamp // 10**9 for stamp in stamps),
        *(stamp % 10**9 for stamp in stamps),
        *(a.st_mode, a.st_nlink, a.st_uid, a.st_gid, a.st_rdev, a.st_blksize, 0),
    )


def entry_bytes(a: pyfuse3.EntryAttributes) -> bytes:
    """struct fuse_entry_out."""
    head = (a.st_ino, a.generation, int(a.entry_timeout), int(a.attr_timeout), 0, 0)
    return struct.pack("=4Q2I", *head) + attr_bytes(a)


def statx_bytes(ip: Inode, a: pyfuse3.EntryAttributes) -> bytes:
    """struct fuse_statx_out (linux/fuse.h 7.39)."""

    def sx_time(ns: int) -> bytes:
        return struct.pack("=qIi", ns // 10**9, ns % 10**9, 0)

    shown = bool(ip.flags & L.DIFLAG_IMMUTABLE) * 0x10 | bool(ip.flags & L.DIFLAG_APPEND) * 0x20
    shown |= bool(ip.flags & L.DIFLAG_NODUMP) * 0x40
    out = struct.pack("=QIIQQ", 3600, 0, 0, 0, 0)
    out += struct.pack("=IIQIII", 0xFFF, a.st_blksize, shown, a.st_nlink, a.st_uid, a.st_gid)
    out += struct.pack("=HHQQQQ", a.st_mode, 0, a.st_ino, a.st_size, a.st_blocks, 0x70)
    born = ip.crtime - attrs.EPOCH_NS
    out += b"".join(map(sx_time, (a.st_atime_ns, born, a.st_ctime_ns, a.st_mtime_ns)))
    out += struct.pack("=4I", os.major(a.st_rdev), os.minor(a.st_rdev), 0, 0)
    return out + bytes(14 * 8)


def put_root(vol: Volume, *inodes: Inode) -> None:
    for ip in inodes:
        vol.inodes.put(ip)


KINDS = (
    stat.S_IFREG | 0o4755,
    stat.S_IFIFO | 0o600,
    stat.S_IFSOCK | 0o777,
    stat.S_IFCHR | 0o620,
    stat.S_IFBLK | 0o660,
)


async def make_all(vol: Volume, dp: Inode) -> dict[bytes, int]:
    """One inode of each kind and some with odd contents; name -> ino."""
    made: dict[bytes, Inode] = {}
    for i, mode in enumerate(KINDS):
        rdev = attrs.stored_rdev(os.makedev(300 + i, 0x2FEDC + i)) if i > 2 else 0
        name = b"kind%d" % i
        made[name] = await namespace.create(vol, dp, name, mode, 0xFFFFFFF0, 70000, rdev)
    made[b"dir"] = await namespace.mkdir(vol, dp, b"dir", 0o1777, 1, 2)
    made[b"link"] = await namespace.symlink(vol, dp, b"link", b"t" * 700, 3, 4)
    made[b"written"] = await namespace.create(vol, dp, b"written", 0o644, 5, 6)
    await file.write(vol, made[b"written"], 12345, b"x" * 50000)  # delayed blocks
    made[b"sparse"] = await namespace.create(vol, dp, b"sparse", 0o644, 7, 8)
    await file.truncate(vol, made[b"sparse"], 1 << 45)
    made[b"old"] = await namespace.create(vol, dp, b"old", 0o644, 0, 0)
    stamps = {"atime": 0, "mtime": attrs.EPOCH_NS - 1, "ctime": (1 << 63) + 5}
    await namespace.setattr(vol, made[b"old"], stamps)
    made[b"fixed"] = await namespace.create(vol, dp, b"fixed", 0o444, 0, 0)
    made[b"fixed"].flags |= L.DIFLAG_IMMUTABLE | L.DIFLAG_NODUMP
    inos = {name: ip.ino for name, ip in made.items()}
    put_root(vol, *made.values())
    return inos


@asynccontextmanager
async def ready(image: Path) -> AsyncIterator[tuple[Volume, Desk, Inode, dict[bytes, int]]]:
    """A volume with one of everything, a lane, and the root."""
    async with opened(image) as vol, a_desk(vol) as desk, using(vol) as dp:
        yield vol, desk, dp, await make_all(vol, dp)


async def test_what_waits_for_a_lane_names_its_request(scratch: Path) -> None:
    async with ready(support.mkfs(scratch)) as (vol, desk, dp, inos):
        node = inos[b"fixed"]
        vol.dentries.insert(dp, b"gone", 0, 0)
        assert ask(desk, wire.GETATTR, node, bytes(16))[0] == S.ANSWERED
        be_in_a_section(desk.lane, True)
        before, rcu = vol.dentries.statistics()["entries"], vol.arena.rcu
        vol.dentries.forget(dp, b"gone")
        assert vol.dentries.statistics()["entries"] == before - 1
        assert (rcu.pending, rcu.deferred_bytes) == (1, 128)
        assert rcu.readers() == [f"lane 0 in getattr of inode {node}"]
        be_in_a_section(desk.lane, False)
        with trio.fail_after(5):
            while rcu.pending:
                await trio.sleep(0.001)


@support.geometries
async def test_attributes_are_those_of_the_slow_path(
    scratch: Path, mkfs_args: tuple[str, ...]
) -> None:
    async with ready(support.mkfs(scratch, *mkfs_args)) as (vol, desk, dp, inos):
        for node in (ROOT, *inos.values()):
            ip = await vol.inodes.get(attrs.ino_of(vol, node))
            wanted = attrs.entry(vol, ip, ip.ino)
            reply = struct.pack("=QII", 3600, 0, 0) + attr_bytes(wanted)
            assert ask(desk, wire.GETATTR, node, bytes(16)) == (S.ANSWERED, 0, reply)
            reply = statx_bytes(ip, wanted)
            assert ask(desk, wire.STATX, node, bytes(24)) == (S.ANSWERED, 0, reply)
            assert attrs.statx_out(vol, ip) == reply
            vol.inodes.put(ip)
        assert not vol.ilocks.held(dp.handle)


async def test_names_are_those_of_the_slow_path(scratch: Path) -> None:
    async with ready(support.mkfs(scratch)) as (vol, desk, dp, inos):
        for name, ino in inos.items():
            ip = await vol.inodes.get(ino)
            before = ip.nlookup
            wanted = entry_bytes(attrs.entry(vol, ip, ino))
            assert ask(desk, wire.LOOKUP, ROOT, name + b"\0") == (S.ANSWERED, 0, wanted)
            assert attrs.entry_out(attrs.entry(vol, ip, ino)) == wanted
            assert ip.nlookup == before + 1
            assert not vol.ilocks.held(ip.handle)
            vol.inodes.put(ip)


async def test_a_name_that_is_known_to_be_missing(scratch: Path) -> None:
    async with ready(support.mkfs(scratch)) as (vol, desk, dp, inos):
        assert ask(desk, wire.LOOKUP, ROOT, b"nobody\0")[0] == S.PARK
        with pytest.raises(FileNotFoundError):
            await namespace.lookup(vol, dp, b"nobody")
        code, error, body = ask(desk, wire.LOOKUP, ROOT, b"nobody\0")
        assert (code, error) == (S.ANSWERED, 0)
        assert body == struct.pack("=4Q", 0, 0, 3600, 0) + bytes(96)
        vol.inodes.put(await namespace.create(vol, dp, b"nobody", 0o600, 0, 0))
        assert struct.unpack_from("=Q", ask(desk, wire.LOOKUP, ROOT, b"nobody\0")[2]) != (0,)


async def test_names_left_to_the_slow_path(scratch: Path) -> None:
    async with ready(support.mkfs(scratch)) as (vol, desk, dp, inos):
        assert ask(desk, wire.LOOKUP, inos[b"dir"], b".\0")[0] == S.PARK
        assert ask(desk, wire.LOOKUP, inos[b"dir"], b"..\0")[0] == S.PARK
        assert ask(desk, wire.LOOKUP, ROOT, b"n" * 89 + b"\0")[0] == S.PARK
        assert ask(desk, wire.LOOKUP, ROOT, b"n" * 300 + b"\0")[0] == S.PARK
        assert ask(desk, wire.LOOKUP, inos[b"dir"], b"dir\0")[0] == S.PARK, "another directory"
        assert ask(desk, wire.LOOKUP, 1 << 60, b"dir\0")[0] == S.PARK, "no such directory"
        for malformed in (b"\0", b"", b"dir", b"d\0r\0"):
            assert ask(desk, wire.LOOKUP, ROOT, malformed)[0] == S.BROKEN, malformed


async def test_the_generation_of_the_directory_is_part_of_a_name(scratch: Path) -> None:
    async with ready(support.mkfs(scratch)) as (vol, desk, dp, inos):
        dp.gen += 1
        assert ask(desk, wire.LOOKUP, ROOT, b"dir\0")[0] == S.PARK
        dp.gen -= 1
        assert ask(desk, wire.LOOKUP, ROOT, b"dir\0")[0] == S.ANSWERED


async def test_a_removed_name_is_not_found(scratch: Path) -> None:
    async with ready(support.mkfs(scratch)) as (vol, desk, dp, inos):
        ip = await vol.inodes.get(inos[b"written"])
        await namespace.unlink(vol, dp, b"written")
        code, _, body = ask(desk, wire.LOOKUP, ROOT, b"written\0")
        assert (code, body[:8]) == (S.ANSWERED, bytes(8))
        code, _, body = ask(desk, wire.GETATTR, inos[b"written"], bytes(16))
        assert code == S.ANSWERED, "it is open"
        assert body[16:] == attr_bytes(attrs.entry(vol, ip, ip.ino))
        vol.dentries.insert(dp, b"written", ip.ino, 1)  # a stale entry must not revive it
        assert ask(desk, wire.LOOKUP, ROOT, b"written\0")[0] == S.PARK
        assert ip.nlookup == 0
        vol.dentries.insert(dp, b"written", 0, 0)
        vol.inodes.put(ip)


async def test_a_busy_inode_is_left_to_the_slow_path(scratch: Path) -> None:
    async with ready(support.mkfs(scratch)) as (vol, desk, dp, inos):
        ip = await vol.inodes.get(inos[b"dir"])
        async with vol.transaction("truncate") as tp:
            await tp.lock_inodes(ip)
            assert ask(desk, wire.GETATTR, ip.ino, bytes(16))[0] == S.PARK
            assert ask(desk, wire.STATX, ip.ino, bytes(24))[0] == S.PARK, "pyfuse3 has no STATX"
            assert ask(desk, wire.LOOKUP, ROOT, b"dir\0")[0] == S.PARK
        async with vol.reader(ip):
            assert ask(desk, wire.GETATTR, ip.ino, bytes(16))[0] == S.ANSWERED, "readers share"
        assert not vol.ilocks.held(ip.handle)
        vol.inodes.put(ip)


async def test_what_is_not_cached_is_left_to_the_slow_path(scratch: Path) -> None:
    async with ready(support.mkfs(scratch)) as (vol, desk, dp, inos):
        assert ask(desk, wire.GETATTR, 1 << 60, bytes(16))[0] == S.PARK
        assert ask(desk, wire.GETXATTR, 1 << 60, bytes(8) + b"user.x\0")[0] == S.FORWARD
        ip = await vol.inodes.get(inos[b"dir"])
        ip.state &= ~1  # being read
        assert ask(desk, wire.GETATTR, ip.ino, bytes(16))[0] == S.PARK
        assert ask(desk, wire.LOOKUP, ROOT, b"dir\0")[0] == S.PARK
        ip.state |= 1
        vol.inodes.put(ip)


async def test_totals_when_they_are_known(scratch: Path) -> None:
    async with ready(support.mkfs(scratch)) as (vol, desk, dp, inos):
        vol.inodes.put(await namespace.create(vol, dp, b"another", 0o600, 0, 0))
        assert ask(desk, wire.STATFS, ROOT)[0] == S.FORWARD
        s = await statfs(vol)
        wanted = struct.pack("=5Q", s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree)
        wanted += struct.pack("=4I24x", s.f_bsize, s.f_namemax, s.f_frsize, 0)
        assert ask(desk, wire.STATFS, ROOT) == (S.ANSWERED, 0, wanted)


async def test_absent_attributes(scratch: Path) -> None:
    async with ready(support.mkfs(scratch)) as (vol, desk, dp, inos):
        question = struct.pack("=II", 0, 0) + b"security.capability\0"
        assert ask(desk, wire.GETXATTR, inos[b"dir"], question) == (S.ANSWERED, errno.ENODATA, b"")
        assert ask(desk, wire.GETXATTR, ROOT, question)[0] == S.FORWARD, "it has virtual ones"
        for name in (b"user.a", b"trusted.a", b"system.posix_acl_access"):
            assert ask(desk, wire.GETXATTR, inos[b"dir"], bytes(8) + name + b"\0")[1:] == (
                errno.ENODATA,
                b"",
            )
        for name in (b"user.", b"user", b"system.a", b"other.a", b"trusted."):
            assert ask(desk, wire.GETXATTR, inos[b"dir"], bytes(8) + name + b"\0")[0] == S.FORWARD
        ip = await vol.inodes.get(inos[b"dir"])
        await xattr.set(vol, ip, b"user.x", b"y")
        assert ask(desk, wire.GETXATTR, ip.ino, question)[0] == S.FORWARD
        await xattr.remove(vol, ip, b"user.x")
        vol.inodes.put(ip)
        ip = await vol.inodes.get(inos[b"old"])
        ip.forkoff, ip.aformat = 24, L.FMT_EXTENTS  # an empty fork, as the kernel makes it
        assert ask(desk, wire.GETXATTR, ip.ino, question) == (S.ANSWERED, errno.ENODATA, b"")
        ip.anextents = 1
        assert ask(desk, wire.GETXATTR, ip.ino, question)[0] == S.FORWARD
        ip.anextents = 0
        async with vol.transaction("truncate") as tp:
            await tp.lock_inodes(ip)
            assert ask(desk, wire.GETXATTR, ip.ino, question)[0] == S.FORWARD, "may be changing"
        ip.forkoff = 0
        vol.inodes.put(ip)


async def test_access_is_granted(scratch: Path) -> None:
    async with ready(support.mkfs(scratch)) as (vol, desk, dp, inos):
        assert ask(desk, wire.ACCESS, inos[b"fixed"], bytes(8)) == (S.ANSWERED, 0, b"")
