"""Who owns blocks: what the reverse map records about every allocated extent.

XFS format: owners below zero are metadata that no inode owns; for the rest the owner is the ino
and the offset a file block, with flag bits for the attribute fork, extent-tree blocks and
unwritten extents.
"""

from __future__ import annotations

from typing import NamedTuple

from fs.xfs.btblock import OFFSET_ATTR, OFFSET_BMBT, OFFSET_UNWRITTEN

OWN_NULL = -1
OWN_UNKNOWN = -2
OWN_FS = -3  # AG headers
OWN_LOG = -4
OWN_AG = -5  # blocks of bnobt, cntbt, rmapbt and the AGFL
OWN_INOBT = -6  # inobt and finobt
OWN_INODES = -7  # inode chunks
OWN_REFC = -8  # refcountbt
OWN_COW = -9  # copy-on-write staging


class Owner(NamedTuple):
    """Owner of an extent: OWN_* or an ino; for an inode's mappings the file block `offset`."""

    owner: int
    offset: int = 0
    attr: bool = False
    bmbt: bool = False
    unwritten: bool = False

    def packed(self) -> int:
        """The reverse map's offset field: file block and flags."""
        value = self.offset
        if self.attr:
            value |= OFFSET_ATTR
        if self.bmbt:
            value |= OFFSET_BMBT
        if self.unwritten:
            value |= OFFSET_UNWRITTEN
        return value

    @property
    def has_offsets(self) -> bool:
        """Do file blocks advance with disk blocks in this owner's extents?"""
        return self.owner >= 0 and not self.bmbt

    def shifted(self, blocks: int) -> Owner:
        """The owner of a piece that begins so many blocks into the extent."""
        return self._replace(offset=self.offset + blocks) if self.has_offsets else self


AG = Owner(OWN_AG)
INOBT = Owner(OWN_INOBT)
INODES = Owner(OWN_INODES)
REFC = Owner(OWN_REFC)
