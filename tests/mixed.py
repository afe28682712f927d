"""Seeded mixed operations on two directories at once, compared as they go.

One directory is on the file system under test, the other (the mirror) on a tmpfs. Every operation
is carried out on both and must give the same result or the same errno; then the attributes of
what it touched must agree. What the mirror may lack is kept in a model instead: extended
attributes. What file systems may choose is not compared: sizes of directories, block counts,
times that nobody set. One liberty of POSIX is taken by XFS: a rename over a directory that is not
empty gives EEXIST there and ENOTEMPTY on tmpfs.

By hand:  python -m tests.mixed OURS MIRROR --seed 1 --ops 20000
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import random
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2
XATTR_CREATE, XATTR_REPLACE = os.XATTR_CREATE, os.XATTR_REPLACE
IO_MAX, FILE_MAX, OPEN_MAX = 128 << 10, 2 << 20, 16
PHASES = 5  # growth and shrinkage take turns: directories pass through all forms, and end grown
LATER = 2**33  # seconds; past 2038, so that stamps need more than 32 bits

# operation: (weight while growing, weight while shrinking)
WEIGHTS = {
    "create": (30, 5),
    "write": (12, 12),
    "truncate": (5, 6),
    "read": (6, 6),
    "rename": (7, 7),
    "rename2": (2, 2),
    "link": (4, 2),
    "symlink": (4, 1),
    "readlink": (2, 2),
    "unlink": (5, 36),
    "mkdir": (5, 1),
    "rmdir": (2, 7),
    "chmod": (3, 3),
    "chown": (3, 3),
    "utimens": (3, 3),
    "setxattr": (6, 4),
    "removexattr": (1, 4),
    "readxattr": (2, 2),
    "mknod": (2, 1),
    "orphan": (2, 2),
    "held": (5, 5),
    "list": (1, 1),
    "missing": (2, 2),
}
_libc = ctypes.CDLL(None, use_errno=True)


class Difference(AssertionError):
    """The two directories, or a directory and the model, do not agree."""


@dataclass(eq=False)
class Node:
    """A name in the tree: a directory has children; `key` names the inode (hard links share it)."""

    name: bytes
    parent: Node | None
    kind: str
    key: int = 0
    children: dict[bytes, Node] | None = None

    @property
    def path(self) -> bytes:
        parts = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            parts.append(node.name)
            node = node.parent
        return b"/".join(reversed(parts))

    def inside(self, other: Node) -> bool:
        """Is this node `other`, or below it?"""
        node: Node | None = self
        while node is not None:
            if node is other:
                return True
            node = node.parent
        return False


class Tree:
    """What exists, for choosing targets. Random choice is in constant time."""

    def __init__(self) -> None:
        self.root = Node(b"", None, "dir", 0, {})
        self.lists: dict[str, list[Node]] = {"dir": [self.root]}
        self._place: dict[Node, int] = {self.root: 0}

    def add(self, parent: Node, name: bytes, kind: str, key: int) -> Node:
        node = Node(name, parent, kind, key, {} if kind == "dir" else None)
        self._attach(node, parent, name)
        self._place[node] = len(self.lists.setdefault(kind, []))
        self.lists[kind].append(node)
        return node

    def _attach(self, node: Node, parent: Node, name: bytes) -> None:
        assert parent.children is not None
        assert name not in parent.children
        node.parent, node.name = parent, name
        parent.children[name] = node

    def detach(self, node: Node) -> None:
        assert node.parent is not None
        assert node.parent.children is not None
        del node.parent.children[node.name]

    def remove(self, node: Node) -> None:
        self.detach(node)
        place, mates = self._place.pop(node), self.lists[node.kind]
        last = mates.pop()
        if last is not node:
            mates[place] = last
            self._place[last] = place

    def move(self, node: Node, parent: Node, name: bytes) -> None:
        self.detach(node)
        self._attach(node, parent, name)


@dataclass
class Outcome:
    """What a call gave: a value, or an errno."""

    value: object = None
    errno: int = 0

    def __str__(self) -> str:
        if self.errno:
            return errno.errorcode.get(self.errno, str(self.errno))
        text = repr(self.value)
        return text if len(text) < 200 else text[:200] + "..."


def attempt(call: Callable[[], object]) -> Outcome:
    try:
        return Outcome(call())
    except OSError as error:
        return Outcome(errno=error.errno or -1)


def attributes(status: os.stat_result) -> tuple[int, ...]:
    """The attributes on which every file system agrees."""
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    device = status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0
    return (status.st_mode, status.st_nlink, status.st_uid, status.st_gid, size, device)


def renameat2(old: bytes, new: bytes, flags: int) -> None:
    if _libc.renameat2(AT_FDCWD, old, AT_FDCWD, new, flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@dataclass
class Held:
    """A file kept open on both sides; `node` is None once its last known name is gone."""

    fds: tuple[int, int]
    node: Node | None


@dataclass
class Mixed:
    """A run; `xattrs` is the model: inode key -> name -> value."""

    ours: bytes
    mirror: bytes
    seed: int
    rng: random.Random = field(init=False)
    tree: Tree = field(init=False)
    xattrs: dict[int, dict[str, bytes]] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)
    number: int = 0
    text: str = ""
    names: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    failures: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.tree = Tree()
        self.tree.root.key = os.lstat(self.mirror).st_ino

    # --- comparing

    def differ(self, what: str) -> Difference:
        where = f"seed {self.seed}, operation {self.number}: {self.text}"
        return Difference(f"{where}\n  {what}")

    def both(self, call: Callable[[bytes], object], *same: set[int]) -> Outcome:
        """Carry `call` out on both roots and demand one outcome; `same` are equal errnos."""
        ours = attempt(lambda: call(self.ours))
        mirror = attempt(lambda: call(self.mirror))
        equal = ours.errno == mirror.errno and ours.value == mirror.value
        if not equal and not any({ours.errno, mirror.errno} <= errnos for errnos in same):
            raise self.differ(f"ours gave {ours}, the mirror {mirror}")
        self.failures += bool(mirror.errno)
        return mirror

    def agree(self, *paths: bytes) -> None:
        """The attributes of these paths are the same on both sides."""
        for path in paths:
            self.both(lambda root, path=path: attributes(os.lstat(self.at(root, path))))

    @staticmethod
    def at(root: bytes, path: bytes) -> bytes:
        return root + b"/" + path if path else root

    def key(self, path: bytes) -> int:
        return os.lstat(self.at(self.mirror, path)).st_ino

    # --- choosing

    def any_dir(self) -> Node:
        """Half the time the root, which so grows large; else any directory."""
        return (
            self.tree.root if self.rng.random() < 0.5 else self.rng.choice(self.tree.lists["dir"])
        )

    def any_of(self, *kinds: str) -> Node | None:
        lists = [self.tree.lists[kind] for kind in kinds if self.tree.lists.get(kind)]
        if not lists:
            return None
        pick = self.rng.randrange(sum(map(len, lists)))
        for nodes in lists:
            if pick < len(nodes):
                return nodes[pick]
            pick -= len(nodes)
        return None

    def any_node(self) -> Node | None:
        return self.any_of(*self.tree.lists)

    def new_name(self, parent: Node) -> bytes:
        """Mostly a fresh name of any length; now and then one that exists, or is too long."""
        rng, luck = self.rng, self.rng.random()
        if luck < 0.08 and parent.children:
            return rng.choice(list(parent.children)[:50])
        self.names += 1
        stem = b"%d" % self.names
        if luck < 0.09:
            return stem + b"x" * (256 - len(stem))
        if luck < 0.2:
            return (stem + bytes(rng.choices(range(0x80, 0x100), k=250)))[: rng.randrange(8, 256)]
        return stem + b"-" * rng.randrange(24)

    def join(self, parent: Node, name: bytes) -> bytes:
        return parent.path + b"/" + name if parent.parent is not None else name

    def place(self) -> tuple[Node, bytes, bytes]:
        parent = self.any_dir()
        name = self.new_name(parent)
        return parent, name, self.join(parent, name)

    def data(self, length: int) -> bytes:
        return self.rng.randbytes(length)

    def length(self, top: int = IO_MAX) -> int:
        return int(2 ** self.rng.uniform(0, top.bit_length() - 1))

    # --- operations: each sets self.text, acts on both sides and updates the tree

    def op_create(self) -> None:
        parent, name, path = self.place()
        mode = self.rng.choice((0o644, 0o600, 0o755, 0o4755, 0o2711))
        data = self.data(self.length(32 << 10)) if self.rng.random() < 0.5 else b""
        exclusive = os.O_EXCL if self.rng.random() < 0.7 else os.O_TRUNC
        self.text = f"create {path!r} {mode:o} {len(data)} bytes"

        def act(root: bytes) -> int:
            flags = os.O_CREAT | os.O_WRONLY | exclusive | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(self.at(root, path), flags, mode)
            try:
                return os.write(fd, data) if data else 0
            finally:
                os.close(fd)

        assert parent.children is not None
        there = parent.children.get(name)
        if there is not None and there.kind not in ("file", "dir", "symlink"):
            return self.op_list()  # opening a device or a pipe is not about the file system
        if not self.both(act).errno and there is None:
            self.tree.add(parent, name, "file", self.key(path))
        self.agree(path, parent.path)

    def op_write(self) -> None:
        node = self.any_of("file")
        if node is None:
            return
        offset, data = self.rng.randrange(FILE_MAX - IO_MAX), self.data(self.length())
        if self.rng.random() < 0.5:
            offset = self.rng.choice((0, offset & ~4095, offset >> 6))
        self.text = f"write {node.path!r} {offset:#x} {len(data):#x}"

        def act(root: bytes) -> int:
            fd = os.open(self.at(root, node.path), os.O_RDWR)
            try:
                done = os.pwrite(fd, data, offset)
                if len(data) % 16 == 0:
                    os.fsync(fd)
                return done
            finally:
                os.close(fd)

        self.both(act)
        self.agree(node.path)

    def op_truncate(self) -> None:
        node = self.any_of("file")
        if node is None:
            return
        size = self.rng.choice((0, self.rng.randrange(FILE_MAX), self.length(FILE_MAX)))
        self.text = f"truncate {node.path!r} {size:#x}"
        self.both(lambda root: os.truncate(self.at(root, node.path), size))
        self.agree(node.path)

    def op_read(self) -> None:
        node = self.any_of("file")
        if node is None:
            return
        offset, length = self.rng.choice((0, self.rng.randrange(FILE_MAX))), self.length()
        self.text = f"read {node.path!r} {offset:#x} {length:#x}"

        def act(root: bytes) -> bytes:
            fd = os.open(self.at(root, node.path), os.O_RDONLY)
            try:
                return os.pread(fd, length, offset)
            finally:
                os.close(fd)

        self.both(act)

    def _renamed(self, node: Node, parent: Node, name: bytes) -> None:
        """The tree after a rename that worked."""
        assert parent.children is not None
        target = parent.children.get(name)
        if target is node or (target is not None and target.key == node.key):
            return  # two names of one inode: a rename does nothing
        if target is not None:
            self.forget(target)
        self.tree.move(node, parent, name)

    def forget(self, node: Node) -> None:
        """A name is gone; so are the model's attributes if it was the last one."""
        self.tree.remove(node)
        for held in self.held:
            if held.node is node:
                held.node = None

    def op_rename(self) -> None:
        node = self.any_node()
        if node is None or node.parent is None:
            return
        parent, name, path = self.place()
        target = self.any_node()
        if self.rng.random() < 0.2 and target is not None and target.parent is not None:
            parent, name, path = target.parent, target.name, target.path
        old, old_parent = node.path, node.parent
        self.text = f"rename {old!r} {path!r}"
        outcome = self.both(
            lambda root: os.rename(self.at(root, old), self.at(root, path)),
            {errno.EEXIST, errno.ENOTEMPTY},
        )
        if not outcome.errno:
            self._renamed(node, parent, name)
        self.agree(old, path, old_parent.path, parent.path)

    def op_rename2(self) -> None:
        """RENAME_NOREPLACE and RENAME_EXCHANGE."""
        node, other = self.any_node(), self.any_node()
        if node is None or other is None or node.parent is None or other.parent is None:
            return
        exchange = self.rng.random() < 0.5
        flags = RENAME_EXCHANGE if exchange else RENAME_NOREPLACE
        parent, name, path = self.place()
        if exchange or self.rng.random() < 0.3:
            parent, name, path = other.parent, other.name, other.path
        old = node.path
        self.text = f"renameat2 {old!r} {path!r} {flags}"
        outcome = self.both(lambda root: renameat2(self.at(root, old), self.at(root, path), flags))
        if not outcome.errno and not exchange:
            self._renamed(node, parent, name)
        elif not outcome.errno and node is not other and node.key != other.key:
            self._exchanged(node, other)
        self.agree(old, path)

    def _exchanged(self, node: Node, other: Node) -> None:
        here, there = (node.parent, node.name), (other.parent, other.name)
        assert here[0] is not None
        assert there[0] is not None
        self.tree.detach(node)
        self.tree.detach(other)
        self.tree._attach(node, there[0], there[1])
        self.tree._attach(other, here[0], here[1])

    def op_link(self) -> None:
        node = self.any_node()
        if node is None:
            return
        parent, name, path = self.place()
        self.text = f"link {node.path!r} {path!r}"
        outcome = self.both(
            lambda root: os.link(
                self.at(root, node.path), self.at(root, path), follow_symlinks=False
            )
        )
        if not outcome.errno:
            self.tree.add(parent, name, node.kind, node.key)
        self.agree(node.path, path)

    def op_symlink(self) -> None:
        parent, name, path = self.place()
        target = b"t" * self.rng.choice((1, self.length(256), self.length(1 << 10) % 1000 + 1))
        self.text = f"symlink {path!r} of {len(target)} bytes"
        if not self.both(lambda root: os.symlink(target, self.at(root, path))).errno:
            self.tree.add(parent, name, "symlink", self.key(path))
        self.agree(path, parent.path)

    def op_readlink(self) -> None:
        node = self.any_of("symlink") or self.any_node()
        if node is None:
            return
        self.text = f"readlink {node.path!r}"
        self.both(lambda root: os.readlink(self.at(root, node.path)))

    def op_unlink(self) -> None:
        node = (
            self.any_node() if self.rng.random() < 0.1 else self.any_of("file", "symlink", "node")
        )
        if node is None or node.parent is None:
            return
        path, parent = node.path, node.parent
        self.text = f"unlink {path!r}"
        if not self.both(lambda root: os.unlink(self.at(root, path))).errno:
            self.forget(node)
        self.agree(path, parent.path)

    def op_mkdir(self) -> None:
        parent, name, path = self.place()
        mode = self.rng.choice((0o755, 0o700, 0o2755, 0o1777))
        self.text = f"mkdir {path!r} {mode:o}"
        if not self.both(lambda root: os.mkdir(self.at(root, path), mode)).errno:
            self.tree.add(parent, name, "dir", self.key(path))
        self.agree(path, parent.path)

    def op_rmdir(self) -> None:
        node = self.any_of("dir") if self.rng.random() < 0.9 else self.any_node()
        if node is None or node.parent is None:
            return
        path, parent = node.path, node.parent
        self.text = f"rmdir {path!r}"
        if not self.both(lambda root: os.rmdir(self.at(root, path))).errno:
            self.forget(node)
        self.agree(path, parent.path)

    def op_chmod(self) -> None:
        node = self.any_of("file", "dir", "node")
        if node is None or node is self.tree.root:
            return
        mode = self.rng.randrange(0o10000)
        self.text = f"chmod {node.path!r} {mode:o}"
        self.both(lambda root: os.chmod(self.at(root, node.path), mode))
        self.agree(node.path)

    def op_chown(self) -> None:
        node = self.any_node()
        if node is None or node is self.tree.root:
            return
        uid, gid = (self.rng.choice((-1, 0, 1000, 65534, 2**31 + 5)) for _ in range(2))
        if os.geteuid():
            uid, gid = -1, os.getgid()
        self.text = f"chown {node.path!r} {uid} {gid}"
        self.both(lambda root: os.lchown(self.at(root, node.path), uid, gid))
        self.agree(node.path)

    def op_utimens(self) -> None:
        node = self.any_node()
        if node is None:
            return
        times = self.rng.randrange(LATER * 10**9), self.rng.randrange(LATER * 10**9)
        self.text = f"utimens {node.path!r} {times}"

        def act(root: bytes) -> tuple[int, int]:
            path = self.at(root, node.path)
            os.utime(path, ns=times, follow_symlinks=False)
            status = os.lstat(path)
            return status.st_atime_ns, status.st_mtime_ns

        self.both(act)

    def op_setxattr(self) -> None:
        node = self.any_of("file", "dir")
        if node is None:
            return
        have = self.xattrs.setdefault(node.key, {})
        fresh = f"user.{self.rng.randrange(40)}" + "n" * (self.rng.random() < 0.1) * 200
        name = self.rng.choice([*have, fresh])
        value = self.data(0 if self.rng.random() < 0.1 else self.length(64 << 10))
        flags = self.rng.choice((0, 0, 0, XATTR_CREATE, XATTR_REPLACE))
        if self.rng.random() < 0.7:
            value = value[:100]
        self.text = f"setxattr {node.path!r} {name} {len(value)} bytes, flags {flags}"
        want = 0
        if flags == XATTR_CREATE and name in have:
            want = errno.EEXIST
        if flags == XATTR_REPLACE and name not in have:
            want = errno.ENODATA
        path = self.at(self.ours, node.path)
        got = attempt(lambda: os.setxattr(path, name, value, flags, follow_symlinks=False))
        if got.errno != want:
            raise self.differ(f"ours gave {got}, must be {Outcome(errno=want)}")
        if not want:
            have[name] = value
        self.check_xattrs(node)

    def op_removexattr(self) -> None:
        node = self.any_of("file", "dir")
        if node is None:
            return
        have = self.xattrs.get(node.key, {})
        name = self.rng.choice([*have, "user.none"])
        self.text = f"removexattr {node.path!r} {name}"
        path = self.at(self.ours, node.path)
        got = attempt(lambda: os.removexattr(path, name, follow_symlinks=False))
        want = 0 if name in have else errno.ENODATA
        if got.errno != want:
            raise self.differ(f"ours gave {got}, must be {Outcome(errno=want)}")
        have.pop(name, None)
        self.check_xattrs(node)

    def op_readxattr(self) -> None:
        node = self.any_of("file", "dir")
        if node is not None:
            self.text = f"listxattr {node.path!r}"
            self.check_xattrs(node)

    def check_xattrs(self, node: Node) -> None:
        """The extended attributes of a node are those of the model."""
        path, want = self.at(self.ours, node.path), self.xattrs.get(node.key, {})
        got = {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
            if name.startswith("user.")
        }
        if got != want:
            sizes = [{name: len(value) for name, value in each.items()} for each in (got, want)]
            raise self.differ(f"xattrs of {node.path!r}: ours {sizes[0]}, must be {sizes[1]}")

    def op_mknod(self) -> None:
        parent, name, path = self.place()
        kinds = [stat.S_IFIFO, stat.S_IFSOCK]
        if os.geteuid() == 0:
            kinds += [stat.S_IFCHR, stat.S_IFBLK]
        mode = self.rng.choice(kinds) | 0o640
        device = os.makedev(self.rng.randrange(200), self.rng.randrange(2**16))
        self.text = f"mknod {path!r} {mode:o} {device:#x}"
        if not self.both(lambda root: os.mknod(self.at(root, path), mode, device)).errno:
            self.tree.add(parent, name, "node", self.key(path))
        self.agree(path, parent.path)

    def op_orphan(self) -> None:
        """Open a file and unlink it at once, or only hold it open."""
        node = self.any_of("file")
        if node is None or len(self.held) >= OPEN_MAX:
            return self.op_held()
        path = node.path
        self.text = f"hold {path!r}"
        fds = [os.open(self.at(root, path), os.O_RDWR) for root in (self.ours, self.mirror)]
        self.held.append(Held((fds[0], fds[1]), node))
        if self.rng.random() < 0.7:
            self.text = f"unlink {path!r} while open"
            self.both(lambda root: os.unlink(self.at(root, path)))
            self.forget(node)
        return None

    def op_held(self) -> None:
        """Use, or close, one of the files that are held open."""
        if not self.held:
            return
        held, rng = self.rng.choice(self.held), self.rng
        fds = {self.ours: held.fds[0], self.mirror: held.fds[1]}
        action = rng.choice(("write", "read", "truncate", "stat", "close"))
        offset, data = rng.randrange(1 << 20), self.data(self.length(32 << 10))
        self.text = f"{action} of an open file, {offset:#x} {len(data):#x}"
        if action == "write":
            self.both(lambda root: os.pwrite(fds[root], data, offset))
        elif action == "truncate":
            self.both(lambda root: os.ftruncate(fds[root], offset))
        elif action == "read":
            self.both(lambda root: os.pread(fds[root], len(data), offset))
        self.both(lambda root: attributes(os.fstat(fds[root])))
        if action == "close":
            self.close(held)

    def close(self, held: Held) -> None:
        self.held.remove(held)
        for fd in held.fds:
            os.close(fd)

    def op_list(self) -> None:
        node = self.any_dir()
        self.text = f"list {node.path!r}"
        self.both(lambda root: sorted(os.listdir(self.at(root, node.path))))
        want = sorted(node.children or ())
        if sorted(os.listdir(self.at(self.mirror, node.path))) != want:
            raise self.differ("the tree of this program is wrong")

    def op_missing(self) -> None:
        """Calls that must fail, the same way."""
        node, parent = self.any_node(), self.any_dir()
        assert node is not None
        wrong = self.rng.choice((self.join(parent, b"no such"), self.join(node, b"below")))
        self.text = f"calls on {wrong!r}"
        self.both(lambda root: os.lstat(self.at(root, wrong)))
        self.both(lambda root: os.unlink(self.at(root, wrong)))
        self.both(lambda root: os.rmdir(self.at(root, wrong)))
        self.both(lambda root: os.truncate(self.at(root, wrong), 5))

    # --- the run

    def run(self, ops: int, tick: Callable[[], None] = lambda: None) -> None:
        """Carry out `ops` operations; Difference at the first disagreement."""
        names = list(WEIGHTS)
        for step in range(ops):
            shrinking = step * PHASES // ops % 2
            weights = [WEIGHTS[name][shrinking] for name in names]
            name = self.rng.choices(names, weights)[0]
            self.number += 1
            self.text = name
            self.counts[name] = self.counts.get(name, 0) + 1
            getattr(self, f"op_{name}")()
            tick()

    def finish(self) -> None:
        """Close what is open and compare the whole trees and all extended attributes."""
        for held in list(self.held):
            self.close(held)
        self.text = "at the end"
        ours, mirror = survey(self.ours), survey(self.mirror)
        for path in sorted(ours.keys() | mirror.keys()):
            if ours.get(path) != mirror.get(path):
                raise self.differ(f"{path!r}: ours {ours.get(path)}, mirror {mirror.get(path)}")
        for kind in ("file", "dir"):
            for node in self.tree.lists.get(kind, []):
                self.check_xattrs(node)


def survey(root: bytes) -> dict[bytes, tuple[object, ...]]:
    """Path -> attributes and content, for everything under `root`."""
    found: dict[bytes, tuple[object, ...]] = {}
    pending = [b""]
    while pending:
        path = pending.pop()
        where = root + b"/" + path if path else root
        status = os.lstat(where)
        content = b""
        if stat.S_ISREG(status.st_mode):
            with open(where, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(where)
        elif stat.S_ISDIR(status.st_mode):
            pending += [path + b"/" + name if path else name for name in os.listdir(where)]
        found[path] = (*attributes(status), content)
    return found


def main() -> int:
    import argparse

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ours", type=Path)
    parser.add_argument("mirror", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ops", type=int, default=20_000)
    options = parser.parse_args()
    for path in (options.ours, options.mirror):
        path.mkdir(exist_ok=True)
    run = Mixed(os.fsencode(options.ours), os.fsencode(options.mirror), options.seed)
    try:
        run.run(options.ops)
        run.finish()
    except Difference as difference:
        print(difference)
        return 1
    print(f"{run.number} operations, {run.failures} of the calls failed alike; trees are equal")
    print(dict(sorted(run.counts.items())))
    print({kind: len(nodes) for kind, nodes in run.tree.lists.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
