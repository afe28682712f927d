"""The directory of reports at the mount's root: /proc's files about memory, and sys/ to tune it.

It exists in requests only. A lookup of its name in the root finds it, listing the root does not
show it, and nothing of it is on the image. Its nodes have numbers that no inode has (from NODES
up), so every other part of the front refuses them by itself: an inode of that number is not found
in any cache, and `Operations.using` names the reason. The name never comes to the dentry cache, and
a lane knows nothing of it: it parks what it does not know. If the image has something of that name
in its root, there is no such directory, and the log says so.

A file's text is made when it is opened, all of it at one moment, and belongs to that open; its size
is 0, as in /proc, so it is read without the kernel's cache. The handles of open files carry APART,
at which lanes park a READ; FULL_SYNC, at which they park a WRITE; and a number.

Trio thread only; nothing but a write to sys/ awaits.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pyfuse3

from alloc.shrinker import NO_NODE
from alloc.vmstat import meminfo_text, vmstat_text
from fs.cache.folios import folios_text
from fs.device.sizes import io_text
from fs.device.stack import sizes
from fs.front import handles, sysctl
from fs.front.attrs import CACHE_SECONDS, PAGE_SIZE
from fs.xfs import dir as directory
from writeback.stats import stats_text

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.front.sysctl import Tunable
    from fs.volume import Volume

NODES = 1 << 60  # the first node; inode numbers have at most 56 bits
OPEN_MOST = 1024  # of its files at a time: their text is not the arena's
DIRECTORY, READABLE, TUNABLE = stat.S_IFDIR | 0o555, stat.S_IFREG | 0o444, stat.S_IFREG | 0o644


def owns(node: int) -> bool:
    """Whether a node is one of the directory's."""
    return node >= NODES


def is_open(fh: int) -> bool:
    """Whether a handle is that of one of its files or directories."""
    return bool(fh & handles.APART)


class Node:
    """A directory, which has entries; a report, which can be read; or a tunable."""

    __slots__ = ("entries", "mode", "number", "parent", "read", "tunable")

    def __init__(self, number: int, parent: Node | None, mode: int) -> None:
        self.number = number
        self.parent = parent or self
        self.mode = mode
        self.entries: dict[bytes, Node] = {}
        self.read: Callable[[], str] = str
        self.tunable: Tunable | None = None


def shrinkers(vol: Volume) -> str:
    """A line for each cache that gives memory back, under the names of the kernel's structures."""
    out = f"{'# name':<16} {'count':>10} {'seeks':>6} {'batch':>6} {'nr_deferred':>12}  node\n"
    for known in vol.arena.reclaim.shrinkers:
        count = known.shrinker.count_objects()
        out += f"{known.shrinker.name:<16} {count:10d} {known.seeks:6d} {known.batch:6d}"
        out += f" {known.deferred:12d} {'-' if known.nid == NO_NODE else known.nid:>5}\n"
    return out


def waiters(vol: Volume) -> str:
    """A line for each task that waits for memory, oldest first; nothing when none does."""
    return "".join(f"{line}\n" for line in vol.arena.waiters())


def reports(vol: Volume) -> dict[str, Callable[[], str]]:
    """What can be read, by path."""
    arena = vol.arena
    return {
        "meminfo": lambda: meminfo_text(arena.meminfo()),
        "vmstat": lambda: vmstat_text(arena.vmstat),
        "buddyinfo": lambda: arena.buddyinfo() + "\n",
        "pagetypeinfo": arena.pagetypeinfo,
        "zoneinfo": arena.zoneinfo,
        "slabinfo": arena.slabinfo,
        "shrinkers": lambda: shrinkers(vol),
        "waiters": lambda: waiters(vol),
        "folios": lambda: folios_text(vol.pages),
        "io": lambda: io_text(sizes(vol.dev)),
        "writeback": lambda: stats_text(vol.pages.throttle, vol.flusher),
        "pressure/memory": arena.pressure.text,
    }


class ProcDir:
    """The directory of one mount; an empty name is that there is none."""

    def __init__(self, vol: Volume, name: str) -> None:
        self._vol = vol
        self.name = os.fsencode(name)
        self._nodes: list[Node] = []
        self._open: dict[int, tuple[Node, bytes]] = {}
        self._numbers = itertools.count(1)
        self._began_ns = time.time_ns()
        self._add(None, DIRECTORY)
        for path, read in reports(vol).items():
            self._at(path, READABLE).read = read
        for path, tunable in sysctl.tunables(vol).items():
            node = self._at(f"sys/{path}", TUNABLE)
            node.tunable = tunable

    def _add(self, parent: Node | None, mode: int) -> Node:
        node = Node(NODES + len(self._nodes), parent, mode)
        self._nodes.append(node)
        return node

    def _at(self, path: str, mode: int) -> Node:
        """A new file, with the directories that lead to it."""
        node, (*above, last) = self._nodes[0], path.encode().split(b"/")
        for name in above:
            if name not in node.entries:
                node.entries[name] = self._add(node, DIRECTORY)
            node = node.entries[name]
        node.entries[last] = made = self._add(node, mode)
        return made

    async def start(self, root: Inode) -> None:
        """Step back if the image has the name."""
        if not self.name:
            return
        async with self._vol.reader(root) as tp:
            found = await directory.lookup(tp, root, self.name)
        if found:
            self._vol.log.warning(
                "the image has a %s of its own: nothing is shown there; choose another procdir=",
                os.fsdecode(self.name),
            )
            self.name = b""

    # -- names ----------------------------------------------------------------------------------

    def claims(self, parent: int, name: bytes) -> bool:
        """Whether a name in a directory is for us to look up."""
        return owns(parent) or (parent == pyfuse3.ROOT_INODE and name == self.name != b"")

    def lookup(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        """The entry of a name that we claim. Raises OSError(ENOENT, ENOTDIR, ESTALE)."""
        if not owns(parent):
            return self.attributes(NODES)
        dp = self._node(parent)
        if not stat.S_ISDIR(dp.mode):
            raise OSError(errno.ENOTDIR, "not a directory")
        own = {b".": dp, b"..": dp.parent}
        node = own.get(name) or dp.entries.get(name)
        if node is None:
            raise OSError(errno.ENOENT, f"no such entry: {name!r}")
        return self.attributes(node.number)

    def refuse(self, parent: int, name: bytes) -> None:
        """Raises OSError: our name in the root is busy, below it is nothing to make or remove."""
        if owns(parent):
            raise OSError(errno.EPERM, "reports are not made and not removed")
        if self.claims(parent, name):
            raise OSError(errno.EBUSY, f"{os.fsdecode(name)} is the directory of reports")

    def attributes(self, number: int) -> pyfuse3.EntryAttributes:
        """A node's attributes. Raises OSError(ESTALE)."""
        node = self._node(number)
        out = pyfuse3.EntryAttributes()
        out.st_ino = number
        out.generation = 0
        out.entry_timeout = out.attr_timeout = CACHE_SECONDS
        out.st_mode = node.mode
        out.st_nlink = 1
        if stat.S_ISDIR(node.mode):
            out.st_nlink = 2 + sum(stat.S_ISDIR(below.mode) for below in node.entries.values())
        out.st_uid, out.st_gid = os.geteuid(), os.getegid()
        out.st_rdev = out.st_size = out.st_blocks = 0
        out.st_blksize = PAGE_SIZE
        out.st_atime_ns = out.st_mtime_ns = out.st_ctime_ns = self._began_ns
        return out

    def _node(self, number: int) -> Node:
        if not NODES <= number < NODES + len(self._nodes):
            raise OSError(errno.ESTALE, f"no node {number}")
        return self._nodes[number - NODES]

    # -- open files -----------------------------------------------------------------------------

    def open(self, number: int) -> pyfuse3.FileInfo:
        """Open a file or directory; its text is that of now. Raises OSError(ENFILE, ESTALE)."""
        node = self._node(number)
        if len(self._open) >= OPEN_MOST:
            raise OSError(errno.ENFILE, f"{OPEN_MOST} reports are open")
        handle = next(self._numbers) & handles.HANDLE_MASK
        self._open[handle] = node, self._text(node)
        fh = handles.APART | handles.FULL_SYNC | handle
        return pyfuse3.FileInfo(fh=fh, direct_io=True, keep_cache=False)

    def _text(self, node: Node) -> bytes:
        if node.tunable is not None:
            return b"%d\n" % node.tunable.read()
        return node.read().encode()

    def _opened(self, fh: int) -> tuple[Node, bytes]:
        known = self._open.get(handles.inode_handle(fh))
        if known is None:
            raise OSError(errno.EBADF, "not open")
        return known

    def read(self, fh: int, offset: int, size: int) -> bytes:
        """A piece of the text. Raises OSError(EBADF, EINVAL)."""
        if offset < 0:
            raise OSError(errno.EINVAL, "negative position")
        return self._opened(fh)[1][offset : offset + size]

    async def write(self, fh: int, data: bytes) -> int:
        """Set a tunable, wherever the file position is. Raises OSError(EINVAL, EPERM)."""
        node, _ = self._opened(fh)
        if node.tunable is None:
            raise OSError(errno.EPERM, "a report is not written")
        await sysctl.write(node.tunable, data)
        self._open[handles.inode_handle(fh)] = node, self._text(node)
        return len(data)

    def close(self, fh: int) -> None:
        """The last user of an open file has gone."""
        self._open.pop(handles.inode_handle(fh), None)

    def entries(self, fh: int, after: int) -> Iterator[tuple[int, bytes, int]]:
        """(cookie, name, node) of what stands behind a cookie in an open directory."""
        node, _ = self._opened(fh)
        own = [(b".", node), (b"..", node.parent)]
        for cookie, (name, below) in enumerate([*own, *node.entries.items()], 1):
            if cookie > after:
                yield cookie, name, below.number
