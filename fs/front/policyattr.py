"""Memory policies as users see them: attributes of files, and of the root for users.

    setfattr -n system.nofailfs.mpol -v bind:1 FILE
    setfattr -n system.nofailfs.mpol.1000 -v interleave DIR     # of user 1000, DIR: the mount

Values are written as the option `mpol=` is. A file's wins over its user's, a user's over the
option; each holds for memory that is taken from then on. As a policy of Linux's it belongs to what
is in memory, not to the image: an open file keeps it, another one as long as its inode is cached,
a user until the unmount. So they are not listed, and nothing copies them. Who may set them: root,
the file's owner, the user. Regular files only: others have no folios. Users' need lanes, because
pyfuse3 does not say who writes.

Trio thread only; nothing here waits.
"""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

from alloc import mempolicy

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.front.operations import Operations

ATTRIBUTE = b"system.nofailfs.mpol"
USER = ATTRIBUTE + b"."


def owns(name: bytes) -> bool:
    """Whether an attribute is one of these."""
    return name == ATTRIBUTE or (name.startswith(USER) and name[len(USER) :].isdigit())


def _user(ops: Operations, ip: Inode, name: bytes) -> int | None:
    """Whose policy it is; None: the file's. Raises OSError(EOPNOTSUPP) where there is none."""
    if name == ATTRIBUTE:
        if not stat.S_ISREG(ip.mode):
            raise OSError(errno.EOPNOTSUPP, "only regular files have a memory policy")
        return None
    if ops.users is None or ip.ino != ops.vol.geo.root_ino:
        raise OSError(errno.EOPNOTSUPP, "users have theirs at the root of a mount with lanes")
    return int(name[len(USER) :])


def get(ops: Operations, ip: Inode, name: bytes) -> bytes:
    """A policy's text. Raises OSError(ENODATA) if there is none, EOPNOTSUPP."""
    user = _user(ops, ip, name)
    if user is None:
        number = ops.vol.pages.mempolicy(ip.handle)
    else:
        assert ops.users is not None
        number = ops.users.get(user)
    if number == mempolicy.NONE:
        raise OSError(errno.ENODATA, "no memory policy")
    return mempolicy.describe(number).encode()


def set(ops: Operations, ip: Inode, name: bytes, value: bytes, uid: int) -> None:
    """Give a policy, asked by `uid`. Raises OSError: EINVAL, EPERM, EOPNOTSUPP, ENOSPC."""
    text = value.strip(b" \t\n\0").decode("ascii", "replace")
    try:
        number = mempolicy.parse(text, len(ops.vol.arena.nodes))
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from error
    _change(ops, ip, name, number, uid)


def remove(ops: Operations, ip: Inode, name: bytes, uid: int) -> None:
    """Take a policy away. Raises OSError: ENODATA if there is none, EPERM, EOPNOTSUPP."""
    get(ops, ip, name)
    _change(ops, ip, name, mempolicy.NONE, uid)


def _change(ops: Operations, ip: Inode, name: bytes, number: int, uid: int) -> None:
    user = _user(ops, ip, name)
    if uid not in (0, ip.uid if user is None else user):
        raise OSError(errno.EPERM, "neither root nor whose it is")
    if user is None:
        ops.vol.pages.set_mempolicy(ip.handle, number)
    else:
        assert ops.users is not None
        ops.users.set(user, number)
