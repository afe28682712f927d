"""Access times, by the policy of the mount.

FUSE leaves them to us. `relatime` (the default, as the kernel's XFS mounts) moves atime only if it
is not newer than mtime or ctime, or a day old; `strictatime` moves it at every access; `noatime`
never. Inodes with XFS's own no-atime flag are left alone.

The change is a small transaction after the access; with `lazytime` it is made in memory only, and
the flusher decides when it is logged. It never makes the access fail: reading a full
or shut down filesystem is not an error of the reader.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fs.cache.inode import Inode
from fs.front import attrs
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.volume import Volume

DAY_NS = 24 * 3600 * 10**9


def is_due(policy: str, atime: int, mtime: int, ctime: int, now: int) -> bool:
    """Whether an access at `now` moves atime. All times in nanoseconds of one epoch."""
    if policy == "noatime" or atime == now:
        return False
    if policy == "strictatime":
        return True
    return atime <= mtime or atime <= ctime or now - atime >= DAY_NS


class AccessTimes:
    """The policy of one mount."""

    def __init__(self, vol: Volume, policy: str, *, directories: bool = True) -> None:
        self._vol = vol
        self._policy = "noatime" if vol.read_only else policy
        self._directory_policy = self._policy if directories else "noatime"

    async def touch(self, ip: Inode, *, directory: bool = False) -> None:
        """The inode was read."""
        policy = self._directory_policy if directory else self._policy
        if policy == "noatime" or ip.flags & L.DIFLAG_NOATIME or self._vol.freezer.level:
            return
        now = attrs.now_bigtime()
        if not is_due(policy, ip.atime, ip.mtime, ip.ctime, now):
            return
        if self._vol.flusher.lazytime:
            self._vol.pages.note_access(ip, now)
            return
        try:
            async with self._vol.transaction("update_time") as tp:
                await tp.lock_inodes(ip)
                ip.atime = now
                tp.log_inode(ip)
        except OSError as error:
            self._vol.log.debug("atime of inode %d not updated: %s", ip.ino, error)
