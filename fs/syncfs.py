"""syncfs: everything that is dirty goes to the device, and who asks hears what was lost.

The volume keeps the last error of any file's write-back as a word (`writeback/errseq.py`), beside
the file's own. syncfs(2) returns, once, an error that came since the last one, whether or not an
fsync was told of it, too: they are two words. Linux remembers that for each open file;
FUSE_SYNCFS names none, so here the mount is the one who is told. No lock is held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fs.volume import Volume


async def syncfs(vol: Volume) -> None:
    """What is dirty now is on stable storage when this returns; nothing on a read-only volume.

    Raises the error of a write-back since the last call; ShutDown; OSError from the device.
    """
    if vol.read_only:
        return
    await vol.flusher.sync()
    if not await vol.xlog.force():
        await vol.dev.flush()
    error, vol.wb_error = vol.told.tell(0, vol.wb_error)
    if error:
        raise OSError(error, "write-back failed since the last syncfs")
