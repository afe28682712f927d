"""Extended attributes as users name them, on top of the attributes that XFS stores.

"user.", "trusted." and "security." are namespaces of the attribute fork; the prefix is not
stored. The two POSIX ACLs have names of their own: they are stored as trusted attributes in XFS's
own form and converted here. An access ACL and the mode are one thing: setting it sets the mode's
permission bits, and one that says no more than a mode can is not stored at all.

Everything here takes the locks it needs; callers hold none. Permission checks are the kernel's
(default_permissions); so is ERANGE for a caller's buffer.

Formats: the xattr is little-endian u32 version 2, then {u16 tag, u16 perm, u32 id}; XFS stores
big-endian u32 count, then {u32 tag, u32 id, u16 perm, u16 pad}.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fs.cache.incore import S_NOSEC
from fs.xfs import attr, stamp
from fs.xfs.attr import ROOT, SECURE

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume

XATTR_CREATE = 1
XATTR_REPLACE = 2

PREFIXES = ((b"user.", 0), (b"trusted.", ROOT), (b"security.", SECURE))
ACL_ACCESS = b"system.posix_acl_access"
ACL_DEFAULT = b"system.posix_acl_default"
CAPABILITY = b"security.capability"
ACLS = {ACL_ACCESS: b"SGI_ACL_FILE", ACL_DEFAULT: b"SGI_ACL_DEFAULT"}

ACL_VERSION = 2
ACL_ID_NONE = 0xFFFFFFFF
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
TAGS = (USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER)
ENTRIES_MAX = (attr.VALUE_MAX - 4) // 12

S_IFMT, S_IFDIR, S_IFLNK, S_ISGID = 0o170000, 0o040000, 0o120000, 0o2000


class AclEntry(NamedTuple):
    """Who (tag, and id for USER and GROUP) may do what."""

    tag: int
    perm: int
    id: int


def _split(name: bytes) -> tuple[int, bytes]:
    """Namespace flags and stored name. Raises OSError(EOPNOTSUPP, EINVAL)."""
    for prefix, flags in PREFIXES:
        if name.startswith(prefix):
            if len(name) == len(prefix):
                raise OSError(errno.EINVAL, "attribute name without a name")
            return flags, name[len(prefix) :]
    raise OSError(errno.EOPNOTSUPP, "unknown attribute namespace")


def stored_as(name: bytes) -> tuple[int, bytes]:
    """Namespace and name of an attribute in the image. Raises OSError(EOPNOTSUPP, EINVAL)."""
    return (ROOT, ACLS[name]) if name in ACLS else _split(name)


async def get(vol: Volume, ip: Inode, name: bytes) -> bytes:
    """Value of an attribute. Raises OSError(ENODATA, EOPNOTSUPP, EINVAL), Corrupt."""
    flags, stored = stored_as(name)
    async with vol.reader(ip) as tp:
        value = await attr.get(tp, ip, flags, stored)
    if value is None:
        raise OSError(errno.ENODATA, "no such attribute")
    if name in ACLS:
        entries = _from_disk(value)
        if entries is None:
            raise vol.corrupt("access control list", f"ino {ip.ino}", "size, count or tags")
        return _to_xattr(entries)
    return value


async def names(vol: Volume, ip: Inode) -> Sequence[bytes]:
    """Full names of all attributes. Raises Corrupt."""
    async with vol.reader(ip) as tp:
        stored = await attr.names(tp, ip)
    found: list[bytes] = []
    prefixes = {flags: prefix for prefix, flags in PREFIXES}
    for flags, name in stored:
        found += [full for full, acl in ACLS.items() if flags == ROOT and name == acl]
        if flags in prefixes:
            found.append(prefixes[flags] + name)
    return found


async def set(vol: Volume, ip: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
    """Create or replace an attribute.

    Raises OSError: EEXIST with XATTR_CREATE, ENODATA with XATTR_REPLACE, EOPNOTSUPP for an unknown
    namespace, ENOSPC, E2BIG, ERANGE, EINVAL for a malformed ACL; Corrupt.
    """
    if name in ACLS:
        await _set_acl(vol, ip, name, _from_xattr(value))
        return
    namespace, stored = _split(name)
    create, replace = bool(flags & XATTR_CREATE), bool(flags & XATTR_REPLACE)
    await attr.set(vol, ip, namespace, stored, value, create=create, replace=replace)
    if name == CAPABILITY:
        ip.state &= ~S_NOSEC


async def drop_capability(vol: Volume, ip: Inode) -> None:
    """The file's content or owner changes: its capabilities go. Cheap when it has none."""
    if ip.forkoff and not ip.state & S_NOSEC:
        try:
            await remove(vol, ip, CAPABILITY)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
        ip.state |= S_NOSEC


async def remove(vol: Volume, ip: Inode, name: bytes) -> None:
    """Remove an attribute. Raises OSError(ENODATA, EOPNOTSUPP), Corrupt.

    An ACL that is not there is removed already.
    """
    if name in ACLS:
        try:
            await attr.remove(vol, ip, ROOT, ACLS[name])
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
        return
    namespace, stored = _split(name)
    await attr.remove(vol, ip, namespace, stored)


# -- ACLs --------------------------------------------------------------------------------------


def _from_xattr(value: bytes) -> list[AclEntry]:
    """Entries of the system call's form; an empty value is an empty list. Raises OSError."""
    if not value:
        return []
    if len(value) < 4 or (len(value) - 4) % 8:
        raise OSError(errno.EINVAL, "malformed ACL")
    if struct.unpack_from("<I", value)[0] != ACL_VERSION:
        raise OSError(errno.EOPNOTSUPP, "ACL version")
    entries = []
    for at in range(4, len(value), 8):
        tag, perm, who = struct.unpack_from("<HHI", value, at)
        entries.append(AclEntry(tag, perm, who if tag in (USER, GROUP) else ACL_ID_NONE))
    if entries and not _is_valid(entries):
        raise OSError(errno.EINVAL, "invalid ACL")
    if len(entries) > ENTRIES_MAX:
        raise OSError(errno.EINVAL, "ACL too long")
    return entries


def _to_xattr(entries: list[AclEntry]) -> bytes:
    packed = (struct.pack("<HHI", e.tag, e.perm, e.id) for e in entries)
    return struct.pack("<I", ACL_VERSION) + b"".join(packed)


def _from_disk(value: bytes) -> list[AclEntry] | None:
    """Entries of XFS's form, None when it is malformed."""
    if len(value) < 4 or (len(value) - 4) % 12:
        return None
    count = struct.unpack_from(">I", value)[0]
    if count != (len(value) - 4) // 12:
        return None
    entries = []
    for at in range(4, len(value), 12):
        tag, who, perm = struct.unpack_from(">IIH", value, at)
        if tag not in TAGS or perm > 7:
            return None
        entries.append(AclEntry(tag, perm, who if tag in (USER, GROUP) else ACL_ID_NONE))
    return entries


def _to_disk(entries: list[AclEntry]) -> bytes:
    packed = (struct.pack(">IIHH", e.tag, e.id, e.perm, 0) for e in entries)
    return struct.pack(">I", len(entries)) + b"".join(packed)


def _is_valid(entries: list[AclEntry]) -> bool:
    """POSIX 1003.1e: the three base entries once, in order, a mask where named entries are."""
    tags = [e.tag for e in entries]
    if any(tag not in TAGS for tag in tags) or any(e.perm > 7 for e in entries):
        return False
    if tags != sorted(tags):
        return False
    if any(tags.count(tag) != 1 for tag in (USER_OBJ, GROUP_OBJ, OTHER)) or tags.count(MASK) > 1:
        return False
    return MASK in tags or not (USER in tags or GROUP in tags)


def _mode_bits(entries: list[AclEntry]) -> int:
    """Permission bits of the mode: the group's are the mask's when there is one."""
    perm = {e.tag: e.perm for e in entries if e.tag not in (USER, GROUP)}
    return perm[USER_OBJ] << 6 | perm.get(MASK, perm[GROUP_OBJ]) << 3 | perm[OTHER]


async def _set_acl(vol: Volume, ip: Inode, name: bytes, entries: list[AclEntry]) -> None:
    """Store an ACL, or drop it when it is empty or says what the mode says."""
    kind = ip.mode & S_IFMT
    if kind == S_IFLNK:
        raise OSError(errno.EOPNOTSUPP, "symbolic links have no ACL")
    if name == ACL_DEFAULT and kind != S_IFDIR:
        raise OSError(errno.EACCES, "only directories have a default ACL")
    stored = entries
    if name == ACL_ACCESS and entries and len(entries) == 3:
        stored = []
    if stored:
        await attr.set(vol, ip, ROOT, ACLS[name], _to_disk(stored))
    else:
        try:
            await attr.remove(vol, ip, ROOT, ACLS[name])
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
    if name == ACL_ACCESS and entries:
        await _set_mode_bits(vol, ip, _mode_bits(entries))


async def _set_mode_bits(vol: Volume, ip: Inode, bits: int) -> None:
    """Give the mode an access ACL's permission bits; the type and special bits stay."""
    async with vol.transaction("acl_chmod") as tp:
        await tp.lock_inodes(ip)
        ip.mode = ip.mode & ~0o777 | bits
        ip.ctime = stamp.now()
        ip.changecount += 1
        tp.log_inode(ip)
