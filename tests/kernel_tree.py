"""A tree that uses every form of the format, and snapshots of trees to compare.

`make_tree` builds it with ordinary system calls on any directory, usually one of a kernel-mounted
XFS; what the filesystem cannot do (reflink, punching, ACLs, attributes of a namespace) is left
out. `snapshot` describes a mounted directory, `snapshot_volume` does the same through our own
layers without FUSE, `diff` says in words what differs. All from a seed; nothing here sleeps.

Contents are compared by a hash over the 4 KiB pages that are not zero, so that holes, unwritten
extents and zeroes count as the same bytes; of files beyond LARGE only fixed probes are read.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import random
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume

Node = dict[str, Any]
Snapshot = dict[bytes, Node]

PAGE = 4096
READ_BYTES = 1 << 20
LARGE = 256 << 20  # bytes; larger files are compared at probes only
PROBE_BYTES = 64 << 10
ZERO_PAGE = bytes(PAGE)

FICLONE = 0x40049409
FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EPERM, errno.ENOSYS}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@dataclass
class Hints:
    """What the tree is sized for. Sizes in bytes."""

    block_size: int = 4096
    dir_block_size: int = 4096
    node: bool = True  # a directory in node form: dir_block_size / 7 links
    extents: int = 1000  # written pieces of the most fragmented file; 3000 make a tree of 2 levels


# -- making ------------------------------------------------------------------------------------


class Maker:
    """Builds the tree under `root`; one method for each family of forms."""

    def __init__(self, root: Path, seed: int, hints: Hints) -> None:
        self.root = os.fsencode(root)
        self.random = random.Random(seed)
        self.hints = hints

    def path(self, *names: bytes | str) -> bytes:
        parts = [os.fsencode(name) for name in names]
        return os.path.join(self.root, *parts)

    def write(self, path: bytes, data: bytes, offset: int = 0) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while data:
                done = os.pwrite(fd, data, offset)
                data, offset = data[done:], offset + done
        finally:
            os.close(fd)

    def make(self) -> None:
        """Build everything."""
        self.directories()
        self.files()
        self.extents()
        self.shared()
        self.symlinks()
        self.attributes()
        self.specials()
        self.names()
        self.stamps_and_owners()

    def directories(self) -> None:
        """Shortform, block, leaf and node, with room freed inside, and nested ones."""
        os.mkdir(self.path("empty"))
        target = self.path("linked")
        self.write(target, b"many names")
        # A leaf block holds dbs/8 names; a directory block some dbs/32 of this length.
        dbs = self.hints.dir_block_size
        sizes = {"short": 3, "block": dbs // 80, "leaf": dbs // 20}
        if self.hints.node:
            sizes["node"] = dbs // 7
        for form, count in sizes.items():
            where = self.path(form)
            os.mkdir(where)
            for i in range(count):
                stem = f"{form}-{i:06d}"
                pad = "x" * self.random.choice((0, 0, 1, 5, 12))
                os.link(target, self.path(form, stem + pad))
            names = sorted(os.listdir(where))
            for name in names[:: max(3, len(names) // 50)]:
                os.unlink(os.path.join(where, name))
        deep = self.root
        for i in range(12):
            deep = os.path.join(deep, b"level%d" % i)
            os.mkdir(deep)
        self.write(os.path.join(deep, b"leaf"), b"down here")
        drained = self.path("drained")  # grew, then lost almost everything
        os.mkdir(drained)
        for i in range(dbs // 40):
            os.link(target, os.path.join(drained, b"gone-%05d-and-some-more" % i))
        for i in range(dbs // 40 - 5):
            os.unlink(os.path.join(drained, b"gone-%05d-and-some-more" % i))

    def files(self) -> None:
        """Sizes around blocks and pages; holes in front, in the middle and behind; far offsets."""
        bs = self.hints.block_size
        os.mkdir(self.path("files"))
        for size in (0, 1, 7, 511, 512, bs - 1, bs, bs + 1, 3 * bs + 5, 100_003, 1 << 20):
            self.write(self.path("files", f"size-{size}"), self.random.randbytes(size))
        sparse = self.path("files", "sparse")
        self.write(sparse, b"front", 10 * bs)
        self.write(sparse, b"middle" * 100, 40 * bs - 3)
        os.truncate(sparse, 70 * bs + 1)
        self.write(self.path("files", "far"), b"far away", 1 << 40)
        self.write(self.path("files", "edge"), b"at the edge", (1 << 62) + 3)
        os.truncate(self.path("files", "edge"), (1 << 62) + PAGE)
        all_hole = self.path("files", "hole")
        self.write(all_hole, b"")
        os.truncate(all_hole, 5 * bs + 17)
        shrunk = self.path("files", "shrunk")
        self.write(shrunk, self.random.randbytes(9 * bs))
        os.truncate(shrunk, 2 * bs + 11)
        os.truncate(shrunk, 6 * bs)

    def extents(self) -> None:
        """Extent lists that fit the inode and that need trees; unwritten; beyond the end."""
        bs = self.hints.block_size
        os.mkdir(self.path("extents"))
        many = min(self.hints.extents, (24 << 20) // bs)
        for name, count in (("few", 8), ("dozen", 18), ("some", 60), ("many", many)):
            fd = os.open(self.path("extents", name), os.O_RDWR | os.O_CREAT, 0o600)
            block = self.random.randbytes(bs)
            for i in range(count):
                os.pwrite(fd, block[: bs - 8] + i.to_bytes(8, "big"), 2 * i * bs)
            os.close(fd)
        self.punched(bs)
        fd = os.open(self.path("extents", "unwritten"), os.O_RDWR | os.O_CREAT, 0o644)
        if fallocate(fd, 0, 0, 64 * bs):
            for i in (3, 4, 20, 41):
                os.pwrite(fd, self.random.randbytes(bs // 2), i * bs + 100)
        os.close(fd)
        fd = os.open(self.path("extents", "beyond"), os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(fd, b"short" * 50, 0)
        fallocate(fd, FALLOC_KEEP_SIZE, 0, 32 * bs)
        os.close(fd)

    def punched(self, bs: int) -> None:
        """A tree that shrank: many holes punched, then most of it truncated away."""
        for name, keep in (("punched", 200), ("cut", 12)):
            fd = os.open(self.path("extents", name), os.O_RDWR | os.O_CREAT, 0o644)
            os.pwrite(fd, self.random.randbytes(200 * bs), 0)
            for i in range(1, 200, 2):
                if not fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, i * bs, bs):
                    break
            os.ftruncate(fd, keep * bs)
            os.close(fd)

    def shared(self) -> None:
        """Files with shared extents, untouched, half overwritten, and with the source gone."""
        bs = self.hints.block_size
        os.mkdir(self.path("shared"))
        source = self.path("shared", "source")
        self.write(source, self.random.randbytes(40 * bs + 77))
        for name in ("copy", "changed", "orphan"):
            if not clone(source, self.path("shared", name)):
                return
        for at in (0, 7 * bs + 100, 30 * bs):
            self.write(self.path("shared", "changed"), self.random.randbytes(bs + 5), at)
        gone = self.path("shared", "gone")
        self.write(gone, self.random.randbytes(20 * bs))
        clone(gone, self.path("shared", "heir"))
        os.unlink(gone)
        os.truncate(self.path("shared", "orphan"), 11 * bs + 1)

    def symlinks(self) -> None:
        """Targets that fit the inode and that do not."""
        os.mkdir(self.path("links"))
        for size in (1, 59, 140, 300, 336, 337, 848, 849, 967, 968, 969, 1023):
            body = bytes(97 + (i * 7 + size) % 26 for i in range(size))
            os.symlink(body, self.path("links", f"link-{size}"))
        for size in (20, 320, 1000):
            where = self.path("links", f"labelled-{size}")
            os.symlink(b"t" * size, where)
            for i in range(4):
                set_attr(where, f"trusted.label{i}", self.random.randbytes(90))

    def attributes(self) -> None:
        """Shortform, leaf and node forks, values of their own, in three namespaces, and ACLs."""
        bs = self.hints.block_size
        os.mkdir(self.path("attrs"))
        node = max(120, 3 * bs // 120)
        counts = {"one": 1, "short": 4, "leaf": 14, "node": node}
        for form, count in counts.items():
            where = self.path("attrs", form)
            self.write(where, form.encode())
            for i in range(count):
                space = ("user", "trusted", "security")[i % 3]
                size = 5 if form == "short" else self.random.randrange(0, 200)
                set_attr(where, f"{space}.name{i}", self.random.randbytes(size))
            for i in range(0, count, 9):
                drop_attr(where, f"{('user', 'trusted', 'security')[i % 3]}.name{i}")
        values = self.path("attrs", "values")
        self.write(values, b"large values")
        for size in (0, 255, 256, 3040, 3072, 5000, 20_000, 65_535, 65_536):
            set_attr(values, f"user.value-{size}", self.random.randbytes(size))
        set_attr(values, "user.value-5000", self.random.randbytes(9000))
        directory = self.path("attrs", "directory")
        os.mkdir(directory)
        for i in range(30):
            set_attr(directory, "trusted." + "n" * (200 - i), self.random.randbytes(60))
        fragmented = self.path("attrs", "fragmented")  # a data fork tree beside attributes
        self.write(fragmented, b"")
        set_attr(fragmented, "user.before", b"1" * 40)
        for i in range(40):
            self.write(fragmented, b"data", 3 * i * bs)
        set_attr(fragmented, "user.after", b"2" * 600)
        self.acls()

    def acls(self) -> None:
        """An access and a default ACL."""
        entries = [(1, 7, -1), (2, 5, 1001), (4, 5, -1), (8, 6, 2002), (16, 7, -1), (32, 4, -1)]
        packed = b"".join(struct.pack("<HHI", tag, perm, who % 2**32) for tag, perm, who in entries)
        value = struct.pack("<I", 2) + packed
        where = self.path("attrs", "acl")
        os.mkdir(where)
        set_attr(where, "system.posix_acl_access", value)
        set_attr(where, "system.posix_acl_default", value)

    def specials(self) -> None:
        """Pipes, sockets and device nodes, with an attribute on one."""
        os.mkdir(self.path("special"))
        os.mkfifo(self.path("special", "fifo"), 0o640)
        set_attr(self.path("special", "fifo"), "trusted.pipe", b"dream")
        here = os.open(self.path("special"), os.O_RDONLY)
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"/proc/self/fd/{here}/socket")
        server.close()
        os.close(here)
        for name, kind, major, minor in (
            ("null", stat.S_IFCHR, 1, 3),
            ("wide", stat.S_IFCHR, 511, (1 << 18) - 1),
            ("wider", stat.S_IFCHR, 512, 1),
            ("disk", stat.S_IFBLK, 259, 70_000),
        ):
            try:
                os.mknod(self.path("special", name), kind | 0o600, os.makedev(major, minor))
            except OSError as error:
                if error.errno not in NOT_SUPPORTED:
                    raise

    def names(self) -> None:
        """Names of 1 and 255 bytes, of any bytes but two, and ones whose hashes are alike."""
        os.mkdir(self.path("names"))
        every = bytes(b for b in range(1, 256) if b != ord("/"))
        odd = [b"a", b"n" * 255, every[:127], every[127:], b"\xff\xfe\x80", b" ", b"...", b"-rf"]
        odd += ["grün".encode(), "日本語の名前".encode(), b"new\nline", b"tab\t", b"\xc3\x28"]
        for i, name in enumerate(odd):
            self.write(self.path("names", name), b"%d" % i)
        first = self.path("names", b"n" * 255)
        os.link(first, self.path("names", b"again"))
        os.link(first, self.path("again elsewhere"))

    def stamps_and_owners(self) -> None:
        """Modes, owners, and times before 1970, after 2038 and between two nanoseconds."""
        os.mkdir(self.path("meta"))
        for mode in (0o0, 0o400, 0o644, 0o4755, 0o2755, 0o6711, 0o1777, 0o7777):
            where = self.path("meta", f"mode-{mode:o}")
            self.write(where, b"")
            os.chown(where, mode + 1000, (1 << 32) - 5 - mode)
            os.chmod(where, mode)
        os.mkdir(self.path("meta", "sticky"))
        os.chmod(self.path("meta", "sticky"), 0o3770)
        moments = (0, 1, -1, -(10**18), 4 * 10**18 + 999_999_999, 2**31 * 10**9, 123_456_789)
        for i, moment in enumerate(moments):
            where = self.path("meta", f"time-{i}")
            self.write(where, b"")
            os.utime(where, ns=(moment + i, moment))
        os.utime(self.path("links", "link-59"), ns=(5, 77), follow_symlinks=False)


def make_tree(root: Path, seed: int, hints: Hints | None = None) -> None:
    """Build the tree in an existing directory."""
    Maker(root, seed, hints or Hints()).make()


def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2); False when the filesystem cannot do that. Raises OSError otherwise."""
    if _libc.fallocate(fd, mode, offset, length) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number))


def clone(source: bytes, target: bytes) -> bool:
    """Share all extents of a file with a new one; False when the filesystem cannot."""
    with open(source, "rb") as src, open(target, "wb") as dst:
        try:
            fcntl.ioctl(dst.fileno(), FICLONE, src.fileno())
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            os.unlink(target)
            return False
    return True


def set_attr(path: bytes, name: str, value: bytes) -> None:
    """setxattr(2), unless the filesystem has no such namespace."""
    try:
        os.setxattr(path, name, value, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def drop_attr(path: bytes, name: str) -> None:
    """removexattr(2) of what set_attr may have set."""
    try:
        os.removexattr(path, name, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED | {errno.ENODATA}:
            raise


# -- snapshots ---------------------------------------------------------------------------------


class Content:
    """Hash of a file's bytes in which absent and zero pages are the same."""

    def __init__(self, size: int) -> None:
        self.digest = hashlib.sha256(b"%d" % size)

    def feed(self, offset: int, data: bytes) -> None:
        """Bytes at a page-aligned offset."""
        if not any(data):
            return
        for at in range(0, len(data), PAGE):
            page = data[at : at + PAGE].ljust(PAGE, b"\0")
            if page != ZERO_PAGE:
                self.digest.update(b"%d:" % (offset + at))
                self.digest.update(page)


def probes(size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) to compare of a file: all of it, or of a large one certain places."""
    if size <= LARGE:
        for at in range(0, size, READ_BYTES):
            yield at, min(READ_BYTES, size - at)
        return
    starts = {0} | {1 << k for k in range(16, 63)} | {(size - PROBE_BYTES) & ~(PAGE - 1)}
    for at in sorted(start for start in starts if start < size):
        yield at, min(2 * PROBE_BYTES if at > size - 2 * PROBE_BYTES else PROBE_BYTES, size - at)


def _hash_file(path: bytes, size: int) -> str:
    content = Content(size)
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
    try:
        for at, length in probes(size):
            content.feed(at, os.pread(fd, length, at))
    finally:
        os.close(fd)
    return content.digest.hexdigest()


def _list_attrs(path: bytes) -> dict[str, str]:
    found = {}
    for name in os.listxattr(path, follow_symlinks=False):
        value = os.getxattr(path, name, follow_symlinks=False)
        found[name] = f"{len(value)}:{hashlib.sha256(value).hexdigest()[:16]}"
    return found


def _describe(path: bytes, exact: bool) -> Node:
    st = os.lstat(path)
    kind = stat.S_IFMT(st.st_mode)
    node: Node = {
        "type": kind,
        "mode": stat.S_IMODE(st.st_mode),
        "uid": st.st_uid,
        "gid": st.st_gid,
        "nlink": st.st_nlink,
        "mtime_ns": st.st_mtime_ns,
        "xattrs": _list_attrs(path),
    }
    if kind != stat.S_IFDIR or exact:
        node["size"] = st.st_size
    if kind == stat.S_IFREG:
        node["content"] = _hash_file(path, st.st_size)
    if kind == stat.S_IFLNK:
        node["target"] = os.readlink(path)
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        node["rdev"] = st.st_rdev
    if exact:
        node["ino"], node["blocks"] = st.st_ino, st.st_blocks
        node["atime_ns"], node["ctime_ns"] = st.st_atime_ns, st.st_ctime_ns
    return node


def snapshot(root: Path, *, exact: bool = False) -> Snapshot:
    """Everything below a mounted directory, by path relative to it; b"." is the root.

    `exact` adds what only the same image can have in common: inode numbers, block counts,
    directory sizes, access and change times (mount with noatime).
    """
    top = os.fsencode(root)
    found: Snapshot = {b".": _describe(top, exact)}
    waiting = [b""]
    while waiting:
        where = waiting.pop()
        with os.scandir(os.path.join(top, where)) as entries:
            for entry in entries:
                relative = os.path.join(where, entry.name)
                found[relative] = node = _describe(os.path.join(top, relative), exact)
                if node["type"] == stat.S_IFDIR:
                    waiting.append(relative)
    return found


async def snapshot_volume(vol: Volume, *, exact: bool = False) -> Snapshot:
    """The same description of an open volume, through our own layers without FUSE."""
    found: Snapshot = {}
    waiting = [(b".", vol.geo.root_ino)]
    described: dict[int, Node] = {}
    while waiting:
        path, ino = waiting.pop()
        if ino in described:  # a hard link
            found[path] = described[ino]
            continue
        ip = await vol.inodes.get(ino)
        try:
            found[path] = described[ino] = node = await _describe_inode(vol, ip, exact)
            if node["type"] == stat.S_IFDIR:
                prefix = b"" if path == b"." else path + b"/"
                waiting += [(prefix + name, ino) for name, ino in await _entries(vol, ip, node)]
        finally:
            vol.inodes.put(ip)
    return found


async def _entries(vol: Volume, ip: Inode, node: Node) -> list[tuple[bytes, int]]:
    """A directory's entries but the dots, read in small portions by cookie."""
    from fs.xfs import dir as directory

    found: dict[bytes, int] = {}
    cookie = 0
    while True:
        async with vol.reader(ip) as tp:
            batch = await directory.read(tp, ip, cookie, 100)
        if not batch:
            break
        for name, ino, ftype, _ in batch:
            assert name not in found, f"{name!r} twice in a directory"
            assert ftype, "entry without a type"
            found[name] = ino
        cookie = batch[-1][3]
    assert found.pop(b".") == ip.ino
    found.pop(b"..")
    return list(found.items())


async def _describe_inode(vol: Volume, ip: Inode, exact: bool) -> Node:
    from fs import file
    from fs.xfs import stamp, symlink

    kind, size = stat.S_IFMT(ip.mode), ip.size
    node: Node = {
        "type": kind,
        "mode": stat.S_IMODE(ip.mode),
        "uid": ip.uid,
        "gid": ip.gid,
        "nlink": ip.nlink,
        "mtime_ns": stamp.to_unix_ns(ip.mtime),
        "xattrs": await _inode_attrs(vol, ip),
    }
    if kind != stat.S_IFDIR or exact:
        node["size"] = size
    if kind == stat.S_IFREG:
        node["content"] = await hash_with(size, lambda at, n: file.read(vol, ip, at, n))
    if kind == stat.S_IFLNK:
        async with vol.reader(ip) as tp:
            node["target"] = await symlink.read(tp, ip)
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        node["rdev"] = os.makedev(ip.rdev >> 18 & 0x1FF, ip.rdev & 0x3FFFF)
    if exact:
        node["ino"] = ip.ino
        node["blocks"] = ip.nblocks << (vol.geo.block_log - 9)
        node["atime_ns"], node["ctime_ns"] = map(stamp.to_unix_ns, (ip.atime, ip.ctime))
    return node


async def hash_with(size: int, read: Callable[[int, int], Awaitable[Any]]) -> str:
    """Content hash through a read function of our own."""
    content = Content(size)
    for at, length in probes(size):
        data = bytes(await read(at, length))
        assert len(data) == length, "short read inside the file"
        content.feed(at, data)
    return content.digest.hexdigest()


async def _inode_attrs(vol: Volume, ip: Inode) -> dict[str, str]:
    from fs import xattr

    found = {}
    for name in await xattr.names(vol, ip):
        value = await xattr.get(vol, ip, name)
        found[os.fsdecode(name)] = f"{len(value)}:{hashlib.sha256(value).hexdigest()[:16]}"
    return found


def diff(a: Snapshot, b: Snapshot) -> list[str]:
    """What differs between two snapshots, one line a difference; empty when nothing does."""
    lines = [f"{path!r}: only in the first" for path in sorted(a.keys() - b.keys())]
    lines += [f"{path!r}: only in the second" for path in sorted(b.keys() - a.keys())]
    for path in sorted(a.keys() & b.keys()):
        for field in sorted(a[path].keys() | b[path].keys()):
            left, right = a[path].get(field), b[path].get(field)
            if left == right:
                continue
            if field == "xattrs":
                for name in sorted(left.keys() | right.keys()):
                    if left.get(name) != right.get(name):
                        lines.append(f"{path!r} {name}: {left.get(name)} != {right.get(name)}")
            else:
                lines.append(f"{path!r} {field}: {left!r} != {right!r}")
    return lines
