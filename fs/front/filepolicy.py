"""A file's memory policy as its users see it: the attribute `system.nofailfs.mpol`.

    setfattr -n system.nofailfs.mpol -v bind:1 FILE

Its value is written as the option `mpol=` is, and wins over what the option says. It holds for
folios that the file gets from then on; those it has stay. As a policy of Linux's it belongs to the
inode in memory and not to the image: an open file keeps it, another one as long as its inode is
cached. So it is not listed, and nothing copies it. The owner's and root's to change, as an ACL is.
Regular files only: others have no folios.

Trio thread only; nothing here waits.
"""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

from alloc import mempolicy

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume

ATTRIBUTE = b"system.nofailfs.mpol"


def get(vol: Volume, ip: Inode) -> bytes:
    """The policy's text. Raises OSError(ENODATA) if the file has none of its own."""
    number = vol.pages.mempolicy(ip.handle)
    if number == mempolicy.NONE:
        raise OSError(errno.ENODATA, "no memory policy")
    return mempolicy.describe(number).encode()


def set(vol: Volume, ip: Inode, value: bytes, uid: int) -> None:
    """Give the file a policy.

    Raises OSError: EINVAL, EPERM, and EOPNOTSUPP if it is no regular file.
    """
    _check(ip, uid)
    text = value.strip(b" \t\n\0").decode("ascii", "replace")
    try:
        number = mempolicy.parse(text, len(vol.arena.nodes))
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from error
    vol.pages.set_mempolicy(ip.handle, number)


def remove(vol: Volume, ip: Inode, uid: int) -> None:
    """From now on as the mount says. Raises OSError: ENODATA if it is so already, and as `set`."""
    _check(ip, uid)
    get(vol, ip)
    vol.pages.set_mempolicy(ip.handle, mempolicy.NONE)


def _check(ip: Inode, uid: int) -> None:
    if not stat.S_ISREG(ip.mode):
        raise OSError(errno.EOPNOTSUPP, "only regular files have a memory policy")
    if uid not in (0, ip.uid):
        raise OSError(errno.EPERM, "neither the owner nor root")
