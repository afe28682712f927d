"""Blocks that are logged, told apart by their magic: the log's name for them, and their header.

XFS format, log: a buffer item says what its block is, and recovery chooses by that the verifier
that stamps LSN and CRC; it must fit the magic. The table below is the one place that knows. Blocks
of directories' and attributes' trees have their magic behind two siblings, all others in front;
those in front are looked for first. Inode clusters have no LSN of their own, their inodes have one
each. Values of attributes are in no log.

Kernels take a block as `(mem, addr)`; nothing here waits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np

from alloc.jit import kernel
from fs.xfs import layout as L
from fs.xfs.be import get16, get32

BTREE, AGF, AGFL, AGI, DINODE, SYMLINK = range(4, 10)
DIR_BLOCK, DIR_DATA, DIR_FREE, DIR_LEAF1, DIR_LEAFN, DA_NODE, ATTR_LEAF = range(10, 17)
SB = 18

Kinds = dict[int, tuple[int, np.dtype[Any]]]
IN_FRONT: Kinds = {
    L.MAGIC_SB: (SB, L.SB),
    L.MAGIC_AGF: (AGF, L.AGF),
    L.MAGIC_AGI: (AGI, L.AGI),
    L.MAGIC_AGFL: (AGFL, L.AGFL),
    L.MAGIC_BNOBT: (BTREE, L.SHORT_BLOCK),
    L.MAGIC_CNTBT: (BTREE, L.SHORT_BLOCK),
    L.MAGIC_INOBT: (BTREE, L.SHORT_BLOCK),
    L.MAGIC_FINOBT: (BTREE, L.SHORT_BLOCK),
    L.MAGIC_RMAPBT: (BTREE, L.SHORT_BLOCK),
    L.MAGIC_REFCOUNTBT: (BTREE, L.SHORT_BLOCK),
    L.MAGIC_BMBT: (BTREE, L.LONG_BLOCK),
    L.MAGIC_DIR_BLOCK: (DIR_BLOCK, L.DIR_DATA_HEADER),
    L.MAGIC_DIR_DATA: (DIR_DATA, L.DIR_DATA_HEADER),
    L.MAGIC_DIR_FREE: (DIR_FREE, L.DIR_FREE_HEADER),
    L.MAGIC_SYMLINK: (SYMLINK, L.SYMLINK_HEADER),
}
BEHIND_SIBLINGS: Kinds = {
    L.MAGIC_DIR_LEAF1: (DIR_LEAF1, L.DA_HEADER),
    L.MAGIC_DIR_LEAFN: (DIR_LEAFN, L.DA_HEADER),
    L.MAGIC_DA_NODE: (DA_NODE, L.DA_HEADER),
    L.MAGIC_ATTR_LEAF: (ATTR_LEAF, L.DA_HEADER),
}
DA_MAGIC = L.off(L.DA_HEADER, "magic")


def _rows(kinds: Kinds) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(magic, content type) of each."""
    return np.array([(magic, number) for magic, (number, _) in kinds.items()], np.int64)


_FRONT, _BEHIND = _rows(IN_FRONT), _rows(BEHIND_SIBLINGS)


@kernel("i8(u1[::1], i8)")
def content_type(mem, addr):
    """What the log calls the block at mem[addr:], by its magic; 0 if it is none that is logged."""
    magic = get32(mem, addr)
    for i in range(len(_FRONT)):
        if _FRONT[i, 0] == magic:
            return _FRONT[i, 1]
    magic = get16(mem, addr + DA_MAGIC)
    for i in range(len(_BEHIND)):
        if _BEHIND[i, 0] == magic:
            return _BEHIND[i, 1]
    return np.int64(DINODE if get16(mem, addr) == L.MAGIC_DINODE else 0)


def header_of(block: np.ndarray[Any, np.dtype[np.uint8]]) -> np.dtype[Any] | None:
    """The layout of a block's header; None if it has no LSN."""
    found = IN_FRONT.get(int.from_bytes(block[:4].tobytes(), "big"))
    if found is None:
        magic = block[DA_MAGIC : DA_MAGIC + 2].tobytes()
        found = BEHIND_SIBLINGS.get(int.from_bytes(magic, "big"))
    return found[1] if found else None
