"""Default ACLs of directories, handed to what is made in them.

With FUSE the kernel enforces ACLs but leaves their inheritance to the filesystem. A new file gets
the directory's default ACL as its access ACL, limited by the mode it was made with (POSIX 1003.1e,
object creation); a new directory also keeps it as its own default.

One difference to the kernel's XFS: where a default ACL exists the umask should not count, but FUSE
has applied it before we are asked and pyfuse3 cannot decline that. What comes out permits the same
or less. Setting the ACLs is a transaction after the one that makes the file.
"""

from __future__ import annotations

import errno
import stat
import struct
from typing import TYPE_CHECKING

from fs import xattr

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume

HEADER = struct.Struct("<I")
ENTRY = struct.Struct("<HHI")


def _with_bits(value: bytes, mode: int, keep: int) -> bytes:
    """An ACL as an xattr value, its base entries set to the bits of `mode` and those in `keep`.

    The group bits are the mask's where there is one, else the group's.
    """
    entries = list(ENTRY.iter_unpack(value[HEADER.size :]))
    has_mask = any(tag == xattr.MASK for tag, _, _ in entries)
    bits = {
        xattr.USER_OBJ: mode >> 6 & 7,
        xattr.MASK if has_mask else xattr.GROUP_OBJ: mode >> 3 & 7,
        xattr.OTHER: mode & 7,
    }
    packed = (
        ENTRY.pack(tag, bits[tag] & (perm | keep) if tag in bits else perm, who)
        for tag, perm, who in entries
    )
    return value[: HEADER.size] + b"".join(packed)


def limited(value: bytes, mode: int) -> bytes:
    """An ACL that permits no more than it did and than the bits of `mode`."""
    return _with_bits(value, mode, 0)


def following(value: bytes, mode: int) -> bytes:
    """An ACL whose base entries say what `mode` says."""
    return _with_bits(value, mode, 7)


async def _get(vol: Volume, ip: Inode, name: bytes) -> bytes:
    """An ACL as an xattr value; empty if there is none."""
    try:
        return await xattr.get(vol, ip, name) if ip.forkoff else b""
    except OSError as error:
        if error.errno == errno.ENODATA:
            return b""
        raise


async def inherit(vol: Volume, dp: Inode, ip: Inode) -> None:
    """Give a new inode what its directory hands on. Raises OSError(ENOSPC), Corrupt."""
    value = await _get(vol, dp, xattr.ACL_DEFAULT)
    if not value:
        return
    if stat.S_ISDIR(ip.mode):
        await xattr.set(vol, ip, xattr.ACL_DEFAULT, value)
    await xattr.set(vol, ip, xattr.ACL_ACCESS, limited(value, ip.mode))


async def follow_mode(vol: Volume, ip: Inode) -> None:
    """After chmod: the access ACL, if there is one, says what the mode says."""
    value = await _get(vol, ip, xattr.ACL_ACCESS)
    if value:
        await xattr.set(vol, ip, xattr.ACL_ACCESS, following(value, ip.mode))
