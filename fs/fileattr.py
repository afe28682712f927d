"""Flags, extent size hints and project of an inode, as chattr(1) and FS_IOC_FSSETXATTR see them.

Two spellings name the same bits: the flags of FS_IOC_GETFLAGS (what lsattr shows) and the xflags
of FS_IOC_FSGETXATTR, which are more. What may be set when is XFS's rule (xfs_fileattr_set): hints
are whole blocks, not longer than half an AG, on regular files only before they have data; a
directory hands its own on. There is no realtime device, so nothing can be put there.

Who may change flags is the VFS's to decide (owner; CAP_LINUX_IMMUTABLE for immutable and append).
A change is one transaction under the inode's ILOCK; the IOLOCK, held exclusively, keeps out writers
who found no hint and would have their data's allocation delayed.
"""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING, NamedTuple

from fs import delalloc
from fs.xfs import layout as L
from fs.xfs import stamp

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume

# FS_XFLAG_ bits beside the inode flags they are.
X_REALTIME, X_PREALLOC, X_IMMUTABLE, X_APPEND, X_SYNC = 0x1, 0x2, 0x8, 0x10, 0x20
X_NOATIME, X_NODUMP, X_RTINHERIT, X_PROJINHERIT = 0x40, 0x80, 0x100, 0x200
X_NOSYMLINKS, X_EXTSIZE, X_EXTSZINHERIT, X_NODEFRAG = 0x400, 0x800, 0x1000, 0x2000
X_FILESTREAM, X_DAX, X_COWEXTSIZE, X_HASATTR = 0x4000, 0x8000, 0x10000, 0x80000000

FOR_ALL = (
    (X_IMMUTABLE, L.DIFLAG_IMMUTABLE),
    (X_APPEND, L.DIFLAG_APPEND),
    (X_SYNC, L.DIFLAG_SYNC),
    (X_NOATIME, L.DIFLAG_NOATIME),
    (X_NODUMP, L.DIFLAG_NODUMP),
    (X_NODEFRAG, L.DIFLAG_NODEFRAG),
    (X_FILESTREAM, L.DIFLAG_FILESTREAM),
)
FOR_DIRECTORIES = (
    (X_RTINHERIT, L.DIFLAG_RTINHERIT),
    (X_NOSYMLINKS, L.DIFLAG_NOSYMLINKS),
    (X_EXTSZINHERIT, L.DIFLAG_EXTSZINHERIT),
    (X_PROJINHERIT, L.DIFLAG_PROJINHERIT),
)
FOR_FILES = ((X_REALTIME, L.DIFLAG_REALTIME), (X_EXTSIZE, L.DIFLAG_EXTSIZE))
KEPT = ((X_PREALLOC, L.DIFLAG_PREALLOC),)
SECOND = ((X_DAX, L.DIFLAG2_DAX), (X_COWEXTSIZE, L.DIFLAG2_COWEXTSIZE))
SECOND_KEPT = L.DIFLAG2_REFLINK | L.DIFLAG2_BIGTIME | L.DIFLAG2_NREXT64

# FS_IOC_GETFLAGS bits and the xflags they are.
SPELLINGS = (
    (0x00000008, X_SYNC),
    (0x00000010, X_IMMUTABLE),
    (0x00000020, X_APPEND),
    (0x00000040, X_NODUMP),
    (0x00000080, X_NOATIME),
    (0x02000000, X_DAX),
    (0x20000000, X_PROJINHERIT),
)
SETTABLE = sum(flag for flag, _ in SPELLINGS)
COMMON = sum(xflag for _, xflag in SPELLINGS)

EXTENT_MAX = (1 << 21) - 1  # blocks: XFS format, extent records
HINTED = L.DIFLAG_EXTSIZE | L.DIFLAG_EXTSZINHERIT
SET_ID = stat.S_ISUID | stat.S_ISGID


class FileAttr(NamedTuple):
    """struct fsxattr; sizes in bytes."""

    xflags: int
    extsize: int = 0
    nextents: int = 0
    projid: int = 0
    cowextsize: int = 0


def get(vol: Volume, ip: Inode) -> FileAttr:
    """What FS_IOC_FSGETXATTR says of a file or directory."""
    flags, flags2, size = ip.flags, ip.flags2, vol.geo.block_size
    found = sum(x for x, bit in FOR_ALL + FOR_DIRECTORIES + FOR_FILES + KEPT if flags & bit)
    found += sum(x for x, bit in SECOND if flags2 & bit)
    return FileAttr(
        xflags=found | (X_HASATTR if ip.forkoff else 0),
        extsize=ip.extsize * size if flags & HINTED else 0,
        nextents=ip.nextents,
        projid=ip.projid,
        cowextsize=ip.cowextsize * size if flags2 & L.DIFLAG2_COWEXTSIZE else 0,
    )


def flags_of(xflags: int) -> int:
    """What FS_IOC_GETFLAGS says of xflags."""
    return sum(flag for flag, xflag in SPELLINGS if xflags & xflag)


async def set_flags(vol: Volume, ip: Inode, flags: int, *, uid: int = 0) -> None:
    """FS_IOC_SETFLAGS. Raises OSError(EOPNOTSUPP) for a flag that XFS does not have."""
    if flags & ~SETTABLE:
        raise OSError(errno.EOPNOTSUPP, f"inode flags {flags:#x}")
    before = get(vol, ip)
    chosen = sum(xflag for flag, xflag in SPELLINGS if flags & flag)
    await set(vol, ip, before._replace(xflags=before.xflags & ~COMMON | chosen), uid=uid)


async def set(vol: Volume, ip: Inode, wanted: FileAttr, *, uid: int = 0) -> None:
    """FS_IOC_FSSETXATTR. Raises OSError(EINVAL) with nothing changed, OSError(EROFS)."""
    async with vol.iolock(ip), vol.transaction("ioctl_setattr") as tp:
        await tp.lock_inodes(ip)
        flags, flags2 = _inode_flags(ip, _wanted_xflags(wanted))
        extsize = _hint(vol, wanted.extsize, bool(flags & HINTED))
        cowextsize = _hint(vol, wanted.cowextsize, bool(flags2 & L.DIFLAG2_COWEXTSIZE))
        _check(vol, ip, flags, flags2, extsize)
        if uid and ip.mode & SET_ID:
            ip.mode &= ~SET_ID
        ip.flags, ip.flags2, ip.projid = flags, flags2, wanted.projid
        ip.extsize, ip.cowextsize = extsize, cowextsize
        ip.ctime = stamp.now()
        ip.changecount += 1
        tp.log_inode(ip)


def _wanted_xflags(wanted: FileAttr) -> int:
    """A hint of zero turns its flag off, as in the VFS."""
    xflags = wanted.xflags
    if not wanted.extsize:
        xflags &= ~(X_EXTSIZE | X_EXTSZINHERIT)
    return xflags if wanted.cowextsize else xflags & ~X_COWEXTSIZE


def _inode_flags(ip: Inode, xflags: int) -> tuple[int, int]:
    """Both words of inode flags that xflags ask for; those of other types are ignored."""
    table: tuple[tuple[int, int], ...] = FOR_ALL
    if stat.S_ISDIR(ip.mode):
        table += FOR_DIRECTORIES
    elif stat.S_ISREG(ip.mode):
        table += FOR_FILES
    flags = sum(bit for x, bit in table if xflags & x) | ip.flags & L.DIFLAG_PREALLOC
    flags2 = sum(bit for x, bit in SECOND if xflags & x) | ip.flags2 & SECOND_KEPT
    return flags, flags2


def _hint(vol: Volume, nbytes: int, wanted: bool) -> int:
    """A hint in blocks. It is there exactly when its flag is. Raises OSError(EINVAL)."""
    blocks, rest = divmod(nbytes, vol.geo.block_size)
    if rest or blocks > min(EXTENT_MAX, vol.geo.ag_blocks // 2) or wanted != (blocks > 0):
        raise OSError(errno.EINVAL, f"extent size hint of {nbytes} bytes")
    return blocks


def _check(vol: Volume, ip: Inode, flags: int, flags2: int, extsize: int) -> None:
    """What the inode and the image allow. Raises OSError(EINVAL)."""
    has_data = bool(ip.nextents or delalloc.promised_blocks(vol, ip))
    if flags & L.DIFLAG_REALTIME:
        raise OSError(errno.EINVAL, "there is no realtime device")
    if stat.S_ISREG(ip.mode) and has_data and extsize != ip.extsize:
        raise OSError(errno.EINVAL, "the file has data: its extent size hint stays")
    if flags2 & L.DIFLAG2_COWEXTSIZE and not vol.geo.has_reflink:
        raise OSError(errno.EINVAL, "the image has no reflink")
    if not (stat.S_ISDIR(ip.mode) or stat.S_ISREG(ip.mode)):
        raise OSError(errno.ENOTTY, "neither a file nor a directory")
