"""What one transaction changed: buffers, inodes, freed blocks, and what the log is to say besides.

Kinds of items: a whole buffer; the unlinked pointers of an inode cluster; a cluster that recovery
builds anew, which only has to be home before the log forgets how; an inode; a freed block; bytes.
"""

from __future__ import annotations

BUFFER, POINTERS, ORDERED, INODE_ITEM, CANCEL, LOOSE = range(1, 7)

ITEM_BYTES = 128  # that an item takes beside what it copies (fs/log/reservation.py)

Place = tuple[int, int]  # daddr and bytes of a block, or of a part of one


class Changes:
    """What one transaction changed, and what it wants the log to say besides."""

    def __init__(self) -> None:
        self.bufs: dict[int, int] = {}  # kind by handle
        self.inodes: dict[int, None] = {}  # handles, in order
        self.stale: dict[int, None] = {}  # handles of buffers whose blocks were freed
        self.cancels: dict[Place, None] = {}  # blocks that the log must not bring back
        self.loose: list[bytes] = []  # vectors
        self.extents: list[tuple[int, int]] = []  # (fsbno, blocks) that were freed
        self.releases: list[int] = []  # checkpoints held by what is gone
        self.nbytes = 0  # of the log, about: as reservations count

    def add_buffer(self, handle: int, kind: int, size: int) -> None:
        """A buffer of `size` bytes is changed; ordering it changes nothing that is logged."""
        if handle not in self.bufs:
            self.nbytes += size + ITEM_BYTES
        if kind != ORDERED or handle not in self.bufs:
            self.bufs[handle] = kind

    def add_inode(self, handle: int, size: int) -> None:
        """An inode of `size` bytes on the device is changed."""
        if handle not in self.inodes:
            self.nbytes += size + ITEM_BYTES
        self.inodes[handle] = None

    def __bool__(self) -> bool:
        return bool(self.bufs or self.inodes or self.cancels or self.loose)
