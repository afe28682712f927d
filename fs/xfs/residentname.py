"""Making a file, removing a name and freeing an inode, each in one go when all is in memory.

A transaction that needs no block, no memory but the in-core inode's and no lock that is held, is
here one kernel: locks by try, look everything up, change, unlock. It returns MISS with nothing
changed when the general path has to do it, which takes the same steps with waiting in between:
`fs.namespace` asks here first.

Also `fill`, what a new inode's core is, for both paths.

Locking: as the general path, by try: IOLOCK and ILOCK of the directory and ILOCK of the child
exclusively; the space lock, which only tasks take, must be free, and stays so because nobody else
runs. Lanes are kept out by the words they look at. Tasks cannot come to wait for a lock meanwhile.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import stat

import numpy as np

from alloc.atomic import compare_exchange, store_release
from alloc.jit import helper, kernel
from fs.cache.lock import EXCLUSIVE, try_lock, unlock
from fs.cache.resident import (
    MISS,
    find_inode,
    log_inode,
    new_inode,
    remember,
    sample,
)
from fs.xfs import layout as L
from fs.xfs import residentdir as E
from fs.xfs import residentino as I
from fs.xfs.dirdata import NAME

READY = 0
SPINS = 64  # looks at a held lock: about a microsecond
IFMT, IFREG, IFDIR, IFLNK = stat.S_IFMT(0o177777), stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK
IFCHR, IFBLK = stat.S_IFCHR, stat.S_IFBLK
FIXED = L.DIFLAG_IMMUTABLE | L.DIFLAG_APPEND
INHERITED = L.DIFLAG_NOATIME | L.DIFLAG_NODUMP | L.DIFLAG_SYNC | L.DIFLAG_NODEFRAG
INHERITED_BY_DIRS = L.DIFLAG_PROJINHERIT | L.DIFLAG_EXTSZINHERIT | L.DIFLAG_RTINHERIT


# -- locks --------------------------------------------------------------------------------------


@helper
def _lock(words, i):
    """Take a lock; a lane that holds it gives it back in a moment."""
    spins = 0
    while spins < SPINS and not compare_exchange(words, i, 0, EXCLUSIVE):
        spins += 1
    return spins < SPINS


@helper
def lock_directory(r, dp):
    """IOLOCK and ILOCK of a directory, if both are free and the space lock is."""
    if r.space_lock[0] != 0 or not _lock(r.inodes["iolock"], dp):
        return False
    if _lock(r.inodes["ilock"], dp):
        return True
    store_release(r.inodes["iolock"], dp, 0)
    return False


@helper
def unlock_directory(r, dp):
    store_release(r.inodes["ilock"], dp, 0)
    store_release(r.inodes["iolock"], dp, 0)


# -- stamps and cores -----------------------------------------------------------------------------


@helper
def touch(r, i, now, modified):
    """ctime, mtime if it was modified, and the change count."""
    t = r.inodes[i]
    t.ctime = now
    if modified:
        t.mtime = now
    t.changecount += np.uint64(1)
    log_inode(r, i)


@helper
def _inherit(r, dp, ip, mode):
    """Flags, project and size hints that a directory hands on (XFS format: di_flags)."""
    d, t = r.inodes[dp], r.inodes[ip]
    held = np.int64(d.flags)
    flags = held & INHERITED
    kind = mode & IFMT
    if kind == IFDIR:
        flags |= held & INHERITED_BY_DIRS
    elif kind == IFREG and held & L.DIFLAG_EXTSZINHERIT:
        flags |= L.DIFLAG_EXTSIZE
    if flags & (L.DIFLAG_EXTSIZE | L.DIFLAG_EXTSZINHERIT):
        t.extsize = d.extsize
    if held & L.DIFLAG_PROJINHERIT:
        t.projid = d.projid
    if np.int64(d.flags2) & L.DIFLAG2_COWEXTSIZE and (kind in (IFDIR, IFREG)):
        t.flags2 |= np.uint64(L.DIFLAG2_COWEXTSIZE)
        t.cowextsize = d.cowextsize
    t.flags = flags


@kernel(lambda: (sample(), 1, 1, 1, 1, 1, 1, 1))
def fill(r, dp, ip, mode, uid, gid, rdev, now):
    """The core of a new inode, as far as it is not zero; some of it comes from the directory."""
    d, t = r.inodes[dp], r.inodes[ip]
    kind = mode & IFMT
    if np.int64(d.mode) & stat.S_ISGID:
        gid = np.int64(d.gid)
        mode |= stat.S_ISGID if kind == IFDIR else 0
    t.mode = mode
    t.uid = uid
    t.gid = gid
    t.nlink = 2 if kind == IFDIR else 1
    t.format = L.FMT_EXTENTS if kind in (IFREG, IFDIR, IFLNK) else L.FMT_DEV
    t.aformat = L.FMT_EXTENTS
    t.rdev = rdev if kind in (IFCHR, IFBLK) else 0
    t.flags2 = r.shape[E.R.G_FLAGS2]
    t.atime = now
    t.mtime = now
    t.ctime = now
    t.crtime = now
    t.changecount = 1
    _inherit(r, dp, ip, mode)


# -- looking ----------------------------------------------------------------------------------


@kernel(lambda: (sample(), 1, NAME))
def lookup(r, dp, name):
    """(FOUND, ino, ftype) of a name other than "." and "..", (ABSENT, 0, 0), or (MISS, 0, 0).

    The dentry cache remembers it.
    """
    if not try_lock(r.inodes["ilock"], dp, True):
        return np.int64(MISS), np.int64(0), np.int64(0)
    code, ino, ftype = E.lookup(r, dp, name)
    if code != MISS:
        remember(r, dp, name, ino, ftype)
    unlock(r.inodes["ilock"], dp, True)
    return code, ino, ftype


# -- making ---------------------------------------------------------------------------------------


@helper
def _create(r, dp, name, ftype, mode, uid, gid, rdev, now):
    d = r.inodes[dp]
    if d.nlink == 0 or d.flags & L.DIFLAG_IMMUTABLE or I.plan_take(r, np.int64(d.ino)) < 0:
        return np.int64(MISS)
    ino = r.plan[I.P_INO]
    if E.plan_add(r, dp, name, ino) != E.ABSENT:
        return np.int64(MISS)
    ip = new_inode(r, ino, r.plan[I.P_GEN])
    if ip == 0:
        return np.int64(MISS)
    I.take(r)
    fill(r, dp, ip, mode, uid, gid, rdev, now)
    log_inode(r, ip)
    E.add(r, dp, name, ino, ftype)
    touch(r, dp, now, True)
    remember(r, dp, name, ino, ftype)
    return ip


@kernel(lambda: (sample(), 1, NAME, 1, 1, 1, 1, 1, 1))
def create(r, dp, name, ftype, mode, uid, gid, rdev, now):
    """Make a file: the handle of its in-core inode, which has one reference; or MISS."""
    if not lock_directory(r, dp):
        return np.int64(MISS)
    ip = _create(r, dp, name, ftype, mode, uid, gid, rdev, now)
    unlock_directory(r, dp)
    return ip


# -- removing -------------------------------------------------------------------------------------


@helper
def _unlink(r, dp, ip, name, now):
    d, t = r.inodes[dp], r.inodes[ip]
    if (np.int64(d.flags) | np.int64(t.flags)) & FIXED or t.nlink == 0:
        return np.int64(MISS)
    last = t.nlink == 1
    if last and I.plan_list(r, np.int64(t.ino)) < 0:
        return np.int64(MISS)
    E.remove(r, dp)
    touch(r, dp, now, True)
    t.nlink -= np.uint32(1)
    touch(r, ip, now, False)
    if last:
        I.enlist(r, ip)
    remember(r, dp, name, np.int64(0), 0)
    return np.int64(READY)


@kernel(lambda: (sample(), 1, NAME, 1))
def unlink(r, dp, name, now):
    """Take a name away from an inode that is no directory.

    MISS; or the handle of its in-core inode if that has no links and references any more, else 0.
    """
    if not lock_directory(r, dp):
        return np.int64(MISS)
    code = np.int64(MISS)
    ino = E.plan_remove(r, dp, name)
    ip = find_inode(r, ino) if ino > 0 else np.int64(0)
    kind = np.int64(r.inodes["mode"][ip]) & IFMT
    if ip and kind not in (0, IFDIR) and _lock(r.inodes["ilock"], ip):
        code = _unlink(r, dp, ip, name, now)
        store_release(r.inodes["ilock"], ip, 0)
    unlock_directory(r, dp)
    if code == READY and r.inodes["nlink"][ip] == 0 and r.inodes["refs"][ip] == 0:
        return ip
    return code


# -- the end of an inode --------------------------------------------------------------------------


@helper
def _nothing_left(r, i):
    """Has an unlinked inode neither blocks nor cached pages, nor an attribute fork?"""
    t, m = r.inodes[i], r.inodes["mapping"][i]
    if t.nlink != 0 or t.nlookup != 0 or t.forkoff != 0 or t.nextents != 0 or t.nblocks != 0:
        return False
    if m.node or m.flags or m.ndirty or m.nrwriteback:
        return False
    return m.delalloc == 0 and m.pending == 0 and m.indirect == 0


@kernel(lambda: (sample(), 1))
def free_inode(r, i):
    """Free an unlinked inode that has nothing left but itself: READY, or MISS."""
    if r.space_lock[0] != 0 or not _lock(r.inodes["iolock"], i):
        return np.int64(MISS)
    code = np.int64(MISS)
    if _lock(r.inodes["ilock"], i):
        if _nothing_left(r, i):
            code = I.free_inode(r, i)
        store_release(r.inodes["ilock"], i, 0)
    store_release(r.inodes["iolock"], i, 0)
    return code
