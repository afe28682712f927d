"""What must be there after a crash: the history of names and contents, and who was promised what.

Names, modes, attributes and link counts change in transactions, and the log keeps their order. So
each worker's part of the tree is, after a crash, as it was after one of its operations (a `State`):
not before the last one that was promised, not after the last one that had begun. And the states
of all workers fit together: what was done before something else began is there if that is.

Content is not logged. A file is known by its versions, one for each operation that changed it,
and each sector of it is as in one of them: from the last that was promised to the last that had
begun. So is its size between theirs. Every byte names its file, version and place, so that nothing
else matches.

Promises: syncfs promises all that was done when it began. fsync promises the file's content, and
that the log is stable up to the inode's last change: so with it all that was done before that
change began. fdatasync promises the content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.crash.disk import NEVER

SECTOR = 512
CELL = np.dtype([("file", "<u4"), ("version", "<u4"), ("place", "<u8")])
FILE, DIRECTORY, SYMLINK = "file", "directory", "symlink"


def pattern(ident: int, version: int, offset: int, length: int) -> bytes:
    """Bytes that name a file, a version of it, and where in it they are."""
    first, last = offset // CELL.itemsize, -(-(offset + length) // CELL.itemsize)
    cells = np.zeros(last - first, CELL)
    cells["file"], cells["version"] = ident, version
    cells["place"] = np.arange(first, last, dtype=np.uint64)
    at = offset - first * CELL.itemsize
    return cells.tobytes()[at : at + length]


def told(data: bytes, at: int) -> str:
    """What the bytes of a sector say of themselves."""
    part = data[at : at + SECTOR]
    if not any(part):
        return "zeros"
    cells = np.frombuffer(part[: len(part) // CELL.itemsize * CELL.itemsize], CELL)
    if not len(cells):
        return part.hex()
    return f"file {cells['file'][0]} version {cells['version'][0]} cell {cells['place'][0]}"


class Entry(NamedTuple):
    """What a name leads to, as far as it is logged; `mate` is the first name of the same inode."""

    kind: str
    mode: int
    nlink: int
    xattrs: frozenset[tuple[bytes, bytes]]
    target: bytes
    mate: bytes


Names = dict[bytes, Entry]


class Span(NamedTuple):
    """An operation's moments."""

    begun: int
    ended: int


@dataclass(eq=False)
class Version:
    """A content, and the operation that led to it."""

    data: bytes
    what: str
    begun: int
    ended: int = NEVER
    holes: bool = False  # on the way there any sector may have been a hole


@dataclass(eq=False)
class Object:
    """An inode of the model."""

    ident: int
    kind: str
    mode: int
    ino: int = 0
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    versions: list[Version] = field(default_factory=list)
    changes: list[list[int]] = field(default_factory=list)  # moments of operations: begun, ended

    @property
    def data(self) -> bytes:
        return self.versions[-1].data

    def last_change(self, moment: int) -> int:
        """When the last change began that had ended at a moment."""
        return max((begun for begun, ended in self.changes if ended <= moment), default=0)


@dataclass(eq=False)
class State:
    """A worker's names after one of its operations."""

    names: Names
    files: dict[bytes, Object]
    what: str
    begun: int
    ended: int = NEVER


class Ack(NamedTuple):
    """A sync that returned: of an object, or of everything."""

    begun: int
    acked: int
    of: Object | None
    datasync: bool


class Part:
    """One worker's part of the tree: the directory and names that begin with his name."""

    def __init__(self, name: bytes, top: Object) -> None:
        self.name = name
        self.tree: dict[bytes, Object] = {name: top}
        self.states: list[State] = [State(*self.snapshot(), "the beginning", 0, 0)]

    def owns(self, path: bytes) -> bool:
        return path.split(b"/")[0] == self.name or path.startswith(b"shared/%s-" % self.name)

    def paths(self, *kinds: str) -> list[bytes]:
        return [path for path, obj in self.tree.items() if obj.kind in kinds]

    def below(self, path: bytes) -> list[bytes]:
        return [other for other in self.tree if other.startswith(path + b"/")]

    def snapshot(self) -> tuple[Names, dict[bytes, Object]]:
        """All names as they are now."""
        names: Names = {}
        first: dict[int, bytes] = {}
        links: dict[int, int] = {}
        for path in sorted(self.tree):
            obj = self.tree[path]
            first.setdefault(obj.ident, path)
            links[obj.ident] = links.get(obj.ident, 1 if obj.kind == DIRECTORY else 0) + 1
        for path, obj in self.tree.items():
            if obj.kind == DIRECTORY:
                above = self.tree.get(path.rpartition(b"/")[0])
                if above is not None:
                    links[above.ident] += 1
        for path, obj in self.tree.items():
            xattrs = frozenset(obj.xattrs.items())
            mate, nlink = first[obj.ident], links[obj.ident]
            names[path] = Entry(obj.kind, obj.mode, nlink, xattrs, obj.target, mate)
        return names, {path: obj for path, obj in self.tree.items() if obj.kind == FILE}


@dataclass
class Found:
    """What a recovered filesystem has under a name."""

    entry: Entry
    ino: int
    size: int
    times: tuple[int, ...]
    data: bytes


Tree = dict[bytes, Found]


class Model:
    """The parts of all workers, and the promises."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.acks: list[Ack] = []
        self.start = 0  # the moment from which on crashes are examined

    # -- what was promised at a moment ------------------------------------------------------------

    def _sure(self, moment: int) -> int:
        """All names that were there before this moment are there."""
        sure = self.start
        for ack in self.acks:
            if ack.acked <= moment and ack.of is None:
                sure = max(sure, ack.begun)
        return sure

    def floors(self, moment: int) -> list[int]:
        """For each part the first state that it may be in after a crash at a moment."""
        sure = self._sure(moment)
        floors = [_count(part.states, sure) - 1 for part in self.parts]
        for ack in self.acks:
            if ack.acked > moment or ack.of is None or ack.datasync:
                continue
            change = ack.of.last_change(ack.begun)
            for i, part in enumerate(self.parts):
                done = (n for n, s in enumerate(part.states) if _before(s, change))
                floors[i] = max(floors[i], *done)
        return floors

    def window(self, obj: Object, moment: int) -> list[Version]:
        """The versions that a file's sectors may be of."""
        sure = self._sure(moment)
        for ack in self.acks:
            if ack.acked <= moment and ack.of is obj:
                sure = max(sure, ack.begun)
        first = max(_count(obj.versions, sure) - 1, 0)
        return [version for version in obj.versions[first:] if version.begun <= moment]

    # -- comparing --------------------------------------------------------------------------------

    def problems(self, tree: Tree, moment: int) -> list[str]:
        """What is wrong with what was recovered after a crash at a moment."""
        found: list[str] = []
        fitting: list[list[int]] = []
        floors = self.floors(moment)
        for part, floor in zip(self.parts, floors, strict=True):
            names = {path: have for path, have in tree.items() if part.owns(path)}
            top = sum(state.begun <= moment for state in part.states) - 1
            states = range(floor, top + 1)
            alike = [i for i in states if not _differing(part.states[i], names)]
            whys = {i: self._contents(part.states[i], names, moment) for i in alike}
            fits = [i for i in alike if not whys[i]]
            fitting.append(fits)
            if not alike:
                found += self._no_state(part, states, names)
            elif not fits:
                found += whys[alike[-1]]
        found += [f"{path!r}: nobody made it" for path in tree if not self._known(path)]
        if not found and not self._cut(fitting):
            found.append("the parts of the tree are of different times")
        return found

    def _known(self, path: bytes) -> bool:
        return path in (b"", b"shared") or any(part.owns(path) for part in self.parts)

    def _no_state(self, part: Part, states: range, names: Tree) -> list[str]:
        near = min(states, key=lambda i: len(_differing(part.states[i], names)))
        state = part.states[near]
        found = [
            f"{part.name!r} is in none of its states {states.start} to {states.stop - 1}; the "
            f"nearest is {near}, after: {state.what}"
        ]
        for path in _differing(state, names)[:5]:
            have = names[path].entry if path in names else None
            found.append(f"  {path!r}: {have}, must be {state.names.get(path)}")
        return found

    def _contents(self, state: State, names: Tree, moment: int) -> list[str]:
        found = []
        for path, obj in state.files.items():
            if state.names[path].mate == path:
                window = self.window(obj, moment)
                found += [f"{path!r}: {why}" for why in wrong_content(obj, window, names[path])]
        return found

    def _cut(self, fitting: list[list[int]]) -> bool:
        """Is there a state for each part so that nothing is there without what was before it?"""
        chosen = [fits[-1] for fits in fitting]
        while True:
            for i, part in enumerate(self.parts):
                began = max(other.states[n].begun for other, n in self._pairs(chosen))
                need = _count(part.states, began) - 1
                if chosen[i] >= need:
                    continue
                # Somebody else must be in an earlier state.
                missing = part.states[chosen[i] + 1].ended
                for j, other in enumerate(self.parts):
                    if other.states[chosen[j]].begun >= missing:
                        less = [n for n in fitting[j] if other.states[n].begun < missing]
                        if not less:
                            return False
                        chosen[j] = less[-1]
                break
            else:
                return True

    def _pairs(self, chosen: list[int]) -> Iterator[tuple[Part, int]]:
        return zip(self.parts, chosen, strict=True)


def _count(history: Iterable[State] | Iterable[Version], moment: int) -> int:
    """How many had ended by a moment."""
    return sum(one.ended <= moment for one in history)


def _before(state: State, change: int) -> bool:
    """Is this state there if a change is that began at a moment?"""
    return state.ended <= change or state.begun == change


def _differing(state: State, names: Tree) -> list[bytes]:
    """Paths that are not as in a state."""
    paths = sorted(state.names.keys() | names.keys())
    return [p for p in paths if p not in names or names[p].entry != state.names.get(p)]


def wrong_content(obj: Object, window: list[Version], found: Found) -> list[str]:
    """Whether each sector, and the size, are of one of the versions."""
    sizes = [len(version.data) for version in window]
    if not min(sizes) <= found.size <= max(sizes):
        return [f"{found.size} bytes, must be {min(sizes)} to {max(sizes)}; {_window(window)}"]
    have = _sectors(found.data, found.size)
    fine = np.zeros(len(have), bool)
    for version in window:
        fine |= (have == _sectors(version.data, found.size)).all(axis=1)
    if any(version.holes for version in window[1:]):
        fine |= ~have.any(axis=1)
    if fine.all():
        return []
    at = int(np.argmin(fine)) * SECTOR
    return [
        f"file {obj.ident}, ino {obj.ino}: {int((~fine).sum())} sectors are of no version, the "
        f"first at byte {at} of {found.size}: {told(found.data, at)}; {_window(window)}; there: "
        + ", ".join(f"{told(version.data, at)}" for version in window[:5])
    ]


def _window(window: list[Version]) -> str:
    last = ", ".join(version.what for version in window[:8])
    return f"{len(window)} versions from the last promised one: {last}"


def _sectors(data: bytes, size: int) -> NDArray[np.uint8]:
    """Content up to a size, and zeros to the end of its last sector."""
    room = -(-size // SECTOR) * SECTOR
    return np.frombuffer(data[:size].ljust(room, b"\0"), np.uint8).reshape(-1, SECTOR)
