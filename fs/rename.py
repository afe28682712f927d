"""Renaming: every case of rename(2) and renameat2(2), in one transaction.

A rename may replace a target (which loses a link, or is an empty directory that goes), may move a
directory (whose ".." and whose parents' link counts follow), and with EXCHANGE swaps two names.
With WHITEOUT the old name stays and names a new character device 0:0, by which overlayfs knows
that a name of a lower layer is gone. A directory must not move below itself: the target's
ancestors are walked up to the root, under a lock of the volume that keeps every directory where
it is.

Locking: the rename lock if two directories are involved, then IOLOCKs of both in ascending ino,
then the reservation, then the ILOCKs of up to four inodes in one call.
"""

from __future__ import annotations

import errno
import stat
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fs import links
from fs.xfs import bmap, inobt
from fs.xfs import dir as directory
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.volume import Volume
    from fs.xfs.geometry import Geometry

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4  # flags of renameat2(2)


@dataclass(slots=True)
class Move:
    """One rename: from name `oname` of `odp` to `nname` of `ndp`."""

    odp: Inode
    oname: bytes
    ndp: Inode
    nname: bytes
    flags: int
    source: Inode
    target: Inode | None
    owner: tuple[int, int]  # uid and gid of a whiteout

    @property
    def across(self) -> bool:
        return self.odp != self.ndp

    @property
    def exchange(self) -> bool:
        return bool(self.flags & EXCHANGE)

    @property
    def whiteout(self) -> bool:
        return bool(self.flags & WHITEOUT)


async def rename(
    vol: Volume,
    odp: Inode,
    oname: bytes,
    ndp: Inode,
    nname: bytes,
    flags: int = 0,
    uid: int = 0,
    gid: int = 0,
) -> None:
    """Rename; a whiteout belongs to `uid` and `gid`.

    Raises OSError: ENOENT EEXIST EISDIR ENOTDIR ENOTEMPTY EINVAL EMLINK ENOSPC ...
    """
    _check_arguments(odp, oname, ndp, nname, flags)
    await vol.inodegc.throttle()
    async with AsyncExitStack() as stack:
        if odp != ndp:
            await stack.enter_async_context(vol.dentries.rename_lock)
        for dp in sorted({odp, ndp}, key=lambda ip: int(ip.ino)):
            await stack.enter_async_context(vol.iolock(dp))
        source = await links.child(vol, odp, oname)
        stack.callback(vol.inodes.put, source)
        target = await links.find_child(vol, ndp, nname)
        if target is not None:
            stack.callback(vol.inodes.put, target)
        move = Move(odp, oname, ndp, nname, flags, source, target, (uid, gid))
        _check_presence(move)
        await _check_ancestry(vol, move)
        if source != target:
            _check_kinds(move)
            await _commit(vol, move)


def _check_arguments(odp: Inode, oname: bytes, ndp: Inode, nname: bytes, flags: int) -> None:
    links.check_name(oname)
    links.check_name(nname)
    links.check_directory(odp)
    links.check_directory(ndp)
    known = NOREPLACE | EXCHANGE | WHITEOUT
    if flags & ~known or (flags & EXCHANGE and flags != EXCHANGE):
        raise OSError(errno.EINVAL, f"rename flags {flags:#x}")
    if oname in links.OWN_NAMES or nname in links.OWN_NAMES:
        code = errno.EEXIST if flags & NOREPLACE and nname in links.OWN_NAMES else errno.EBUSY
        raise OSError(code, "'.' and '..' cannot be renamed")


def _check_presence(move: Move) -> None:
    """The flags may want a target, or none."""
    if move.exchange and move.target is None:
        raise FileNotFoundError(errno.ENOENT, f"no such entry: {move.nname!r}")
    if move.flags & NOREPLACE and move.target is not None:
        raise FileExistsError(errno.EEXIST, f"{move.nname!r} exists")


def _check_kinds(move: Move) -> None:
    """Source and target must be of kinds that go together."""
    target = move.target
    if target is None or move.exchange:
        return
    if stat.S_ISDIR(move.source.mode) and not stat.S_ISDIR(target.mode):
        raise NotADirectoryError(errno.ENOTDIR, f"{move.nname!r} is no directory")
    if stat.S_ISDIR(target.mode) and not stat.S_ISDIR(move.source.mode):
        raise IsADirectoryError(errno.EISDIR, f"{move.nname!r} is a directory")


async def _check_ancestry(vol: Volume, move: Move) -> None:
    """No directory may move below itself, and none be replaced by what is below it."""
    if not move.across:
        return
    above_new = await _ancestors(vol, move.ndp)
    if move.source.ino in above_new:
        raise OSError(errno.EINVAL, "a directory cannot move below itself")
    target = move.target
    if target is None or not stat.S_ISDIR(target.mode):
        return
    if target.ino in await _ancestors(vol, move.odp):
        code = errno.EINVAL if move.exchange else errno.ENOTEMPTY
        raise OSError(code, f"{move.nname!r} is above what would replace it")


async def _ancestors(vol: Volume, dp: Inode) -> set[int]:
    """Inode numbers of a directory and of all directories above it."""
    seen = {dp.ino}
    ino = dp.ino
    while ino != vol.geo.root_ino:
        ip = await vol.inodes.get(ino)
        try:
            links.check_directory(ip)
            async with vol.reader(ip) as tp:
                above = await directory.lookup(tp, ip, directory.DOTDOT)
        finally:
            vol.inodes.put(ip)
        if above is None or above[0] in seen:
            raise vol.corrupt("directory", f"inode {ino}", "it does not lead up to the root")
        ino = above[0]
        seen.add(ino)
    return seen


def _blocks(geo: Geometry, move: Move) -> int:
    """Blocks for the new name, and for shortforms that inode numbers of 8 bytes push out."""
    push_out = geo.dir_block_blocks + bmap.worst_indirect(geo, geo.dir_block_blocks)
    new = directory.enter_blocks(geo) if move.target is None else 0
    if move.whiteout:
        new += inobt.alloc_blocks(geo)
    return new + 3 * push_out


async def _commit(vol: Volume, move: Move) -> None:
    """The transaction. Replacing needs no space that a user must have."""
    inodes = [move.odp, move.ndp, move.source]
    if move.target is not None:
        inodes.append(move.target)
    replaces = move.target is not None and not move.whiteout
    async with vol.transaction("rename", _blocks(vol.geo, move), from_pool=replaces) as tp:
        await tp.lock_inodes(*inodes)
        await _check_locked(tp, move)
        if move.exchange:
            await _exchange(tp, move)
        else:
            whiteout = await _make_whiteout(tp, move) if move.whiteout else None
            try:
                await _move(tp, move, whiteout)
            finally:
                if whiteout is not None:
                    vol.inodes.put(whiteout)


async def _make_whiteout(tp: Transaction, move: Move) -> Inode:
    """What takes the source's place. Raises OSError(ENOSPC) with nothing changed."""
    whiteout = await links.new_inode(tp, move.odp, stat.S_IFCHR, *move.owner)
    tp.log_inode(whiteout)
    return whiteout


async def _check_locked(tp: Transaction, move: Move) -> None:
    """What can only be relied on under the ILOCKs."""
    odp, ndp, source, target = move.odp, move.ndp, move.source, move.target
    links.check_open(ndp)
    links.check_removable(odp, source)
    if target is not None:
        links.check_removable(ndp, target)
    for parent, ip in ((ndp, source), (odp, target if move.exchange else None)):
        if ip is not None and parent.flags & L.DIFLAG_PROJINHERIT and parent.projid != ip.projid:
            raise OSError(errno.EXDEV, "the directory hands on another project")
    _check_link_counts(move)
    if target is None or move.exchange or not stat.S_ISDIR(target.mode):
        return
    if target.nlink > 2 or not await directory.is_empty(tp, target):
        raise OSError(errno.ENOTEMPTY, f"{move.nname!r} is not empty")


def _check_link_counts(move: Move) -> None:
    """A directory that comes alone brings its new parent a link."""
    if not move.across:
        return
    comes = stat.S_ISDIR(move.source.mode)
    goes = move.target is not None and stat.S_ISDIR(move.target.mode)
    if comes and not goes:
        links.check_link_count(move.ndp)
    elif goes and not comes:
        links.check_link_count(move.odp)


async def _move(tp: Transaction, move: Move, whiteout: Inode | None) -> None:
    """Enter the new name, or point it at the source; then take the old one away."""
    odp, ndp, source, target = move.odp, move.ndp, move.source, move.target
    ftype = directory.ftype_of(source.mode)
    is_dir = stat.S_ISDIR(source.mode)
    if target is None:
        await directory.add(tp, ndp, move.nname, source.ino, ftype)
    else:
        await directory.replace(tp, ndp, move.nname, source.ino, ftype)
    if is_dir and move.across:
        await directory.replace(tp, source, directory.DOTDOT, ndp.ino, L.FT_DIR)
        links.add_link(tp, ndp)
    if is_dir and (move.across or target is not None):
        # The link of its ".." leaves the old parent, or that of the target's ".." does.
        await links.drop_link(tp, odp)
    if is_dir and move.across and target is not None:
        await links.drop_link(tp, ndp)
    dentries = tp.vol.dentries
    if whiteout is not None:
        await directory.replace(tp, odp, move.oname, whiteout.ino, L.FT_CHR)
        dentries.insert(odp, move.oname, whiteout.ino, L.FT_CHR)
    else:
        await directory.remove(tp, odp, move.oname, source.ino)
        dentries.insert(odp, move.oname, 0, 0)
    if target is not None:
        await links.drop_link(tp, target, 2 if stat.S_ISDIR(target.mode) else 1)
    links.touch(tp, source, modified=False)
    links.touch(tp, *{odp, ndp})
    dentries.insert(ndp, move.nname, source.ino, ftype)


async def _exchange(tp: Transaction, move: Move) -> None:
    """Swap what two names refer to."""
    odp, ndp, source, target = move.odp, move.ndp, move.source, move.target
    assert target is not None
    for dp, name, ip, parent in (
        (ndp, move.nname, source, odp),
        (odp, move.oname, target, ndp),
    ):
        ftype = directory.ftype_of(ip.mode)
        await directory.replace(tp, dp, name, ip.ino, ftype)
        if stat.S_ISDIR(ip.mode) and move.across:
            await directory.replace(tp, ip, directory.DOTDOT, dp.ino, L.FT_DIR)
            links.add_link(tp, dp)
            await links.drop_link(tp, parent)
        tp.vol.dentries.insert(dp, name, ip.ino, ftype)
    if move.across:
        _touch_moved(tp, source, target)
    links.touch(tp, *{odp, ndp})


def _touch_moved(tp: Transaction, source: Inode, target: Inode) -> None:
    """Stamps of what changed places, as XFS sets them: a directory's, and its counterpart's."""
    for ip, other in ((source, target), (target, source)):
        if stat.S_ISDIR(ip.mode):
            links.touch(tp, ip)
        elif stat.S_ISDIR(other.mode):
            links.touch(tp, ip, modified=False)
