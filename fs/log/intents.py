"""Intents: changes that the log says were begun, in chains longer than one checkpoint.

XFS format, log: an intent says what is going to be done to some extents, its done item, which has
the same number, that it was done. What has no done item by the end of the log must be finished by
whoever replays it, in the order in which it was logged. Who does a part of an intent logs, in the
same transaction, that it is done, and the rest as a new one: no part is ever done twice.

Little-endian. Units: filesystem blocks. Extents are checked to lie in one AG of the filesystem.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from fs.log import formats, items
from fs.log.checkpoints import Item
from fs.log.head import BadLog
from fs.xfs.geometry import Geometry

FREE, REVERSE, COUNT, MAP = items.EFI, items.RUI, items.CUI, items.BUI
DONE_OF = {FREE: items.EFD, REVERSE: items.RUD, COUNT: items.CUD, MAP: items.BUD}
INTENT_OF = {done: kind for kind, done in DONE_OF.items()}
HEAD = struct.Struct("<HHIQ")  # type, regions, extents, number
EXTENT = struct.Struct("<QII")  # block, length, flags of a COUNT
MAPPING = struct.Struct("<qQQII")  # owner, block, file block, length, flags
ACTION = 0xFF  # the flags' part that says what to do
INCREASE, DECREASE, ALLOC_COW, FREE_COW = range(1, 5)
R_MAP, R_MAP_SHARED, R_UNMAP, R_UNMAP_SHARED, R_CONVERT, R_CONVERT_SHARED, R_ALLOC, R_FREE = range(
    1, 9
)
B_MAP, B_UNMAP = 1, 2
ACTIONS = {FREE: 0, COUNT: FREE_COW, REVERSE: R_FREE, MAP: B_UNMAP}  # the last ones known
R_ATTR, R_BMBT, R_UNWRITTEN = 1 << 31, 1 << 30, 1 << 29
B_ATTR, B_UNWRITTEN, B_REALTIME = 1 << 31, 1 << 30, 1 << 29


class Work(NamedTuple):
    """One extent of an intent; `owner` and `offset` say what the mapping is of REVERSE and MAP."""

    kind: int
    action: int
    fsbno: int
    count: int  # type: ignore[assignment]  # not the method of tuples
    owner: int
    offset: int
    flags: int

    def behind(self, count: int) -> Work:
        """What is left when the first `count` blocks are done."""
        offset = self.offset + count if self.kind in (REVERSE, MAP) else self.offset
        return self._replace(fsbno=self.fsbno + count, count=self.count - count, offset=offset)


class Intent(NamedTuple):
    """What is to be done under one number; `lsn`: where the checkpoint begins that says so."""

    kind: int
    number: int
    extents: tuple[Work, ...]
    lsn: int = 0

    def vector(self) -> bytes:
        """The intent as a log vector."""
        return formats.vector_of(begin(self.kind, self.number, self.extents))

    def done(self) -> bytes:
        """The item, likewise, that says that it was done, or that another has taken its place."""
        return formats.vector_of(done(self.kind, self.number, self.extents))

    def behind(self, count: int, number: int) -> Intent:
        """The rest under a new number, when `count` blocks of the first extent are done."""
        first = self.extents[0]
        cut = (first.behind(count),) if count < first.count else ()
        return Intent(self.kind, number, (*cut, *self.extents[1:]))


class Pending:
    """Intents whose done items have not been seen, oldest first."""

    def __init__(self, geo: Geometry) -> None:
        self._geo = geo
        self._left: dict[tuple[int, int], Intent] = {}

    def take(self, kind: int, item: Item, lsn: int) -> bool:
        """Note an intent, or that it was done; False for items of other types.

        `lsn` is that of the checkpoint. Raises BadLog.
        """
        if kind not in ACTIONS and kind not in INTENT_OF:
            return False
        if len(item[0]) < HEAD.size:
            raise BadLog(f"an intent of {len(item[0])} bytes")
        _, _, count, number = HEAD.unpack_from(item[0])
        if kind in INTENT_OF:
            self._left.pop((INTENT_OF[kind], number), None)
        else:
            extents = tuple(self._parse(kind, item[0], count))
            self._left[kind, number] = Intent(kind, number, extents, lsn)
        return True

    def _parse(self, kind: int, raw: bytes, count: int) -> list[Work]:
        form = EXTENT if kind in (FREE, COUNT) else MAPPING
        if len(raw) != HEAD.size + count * form.size:
            raise BadLog(f"an intent of {count} extents has {len(raw)} bytes")
        found = []
        for at in range(HEAD.size, len(raw), form.size):
            if form is EXTENT:
                owner, offset = 0, 0
                fsbno, n, flags = EXTENT.unpack_from(raw, at)
            else:
                owner, fsbno, offset, n, flags = MAPPING.unpack_from(raw, at)
            flags = 0 if kind == FREE else flags
            work = Work(kind, flags & ACTION, fsbno, n, owner, offset, flags)
            if not self._geo.valid_fsb(fsbno, n) or not self._is_known(work):
                raise BadLog(f"an intent of type {kind:#x} for {n} blocks at {fsbno}")
            found.append(work)
        return found

    def _is_known(self, work: Work) -> bool:
        least = 0 if work.kind == FREE else 1
        if work.kind == MAP and work.flags & B_REALTIME:
            return False
        return least <= work.action <= ACTIONS[work.kind]

    def left(self) -> list[Intent]:
        """What is still to be done."""
        return list(self._left.values())


def begin(kind: int, number: int, work: Sequence[Work]) -> Item:
    """The item that says what is going to be done."""
    packed = HEAD.pack(kind, 1, len(work), number)
    for one in work:
        if kind in (FREE, COUNT):
            packed += EXTENT.pack(one.fsbno, one.count, one.flags)
        else:
            packed += MAPPING.pack(one.owner, one.fsbno, one.offset, one.count, one.flags)
    return [packed]


def done(kind: int, number: int, work: Sequence[Work]) -> Item:
    """The item that says that it was done; of a FREE it names the extents again."""
    if kind == FREE:
        packed = begin(kind, number, work)[0]
        return [struct.pack("<H", items.EFD) + packed[2:]]
    return [HEAD.pack(DONE_OF[kind], 1, 0, number)]
