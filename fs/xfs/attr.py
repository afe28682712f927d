"""Extended attributes of an inode, in every form: shortform, leaf, node, and values of their own.

An attribute fork begins as a list in the inode, becomes a leaf when the list does not fit, and a
tree of leaves after that; it goes back the same way, and disappears with its last attribute.
Setting is atomic for local values: one transaction takes the old entry out and puts the new one
in. A value too large for a leaf takes several (XFS format, remote values): its blocks are mapped
and its entry added INCOMPLETE, which nobody sees; the value is written and made stable; one
transaction makes the new entry visible and hides the old one; the hidden one is removed. What a
crash leaves hidden is removed when the same name is set or removed again, or with the inode.

Locking: `set` and `remove` take the IOLOCK exclusively, so attributes have one writer at a time;
each of their transactions takes the ILOCK. `get` and `names` need the ILOCK shared. Reservations:
what can need blocks reserves before it changes anything; removal works without any.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fs import enomem
from fs.xfs import attrblock, attrleaf, attrsf, attrvalue, bmap, danode, stamp
from fs.xfs import fork as forks
from fs.xfs import layout as L
from fs.xfs.attrblock import SHAPE
from fs.xfs.attrsf import INCOMPLETE, LOCAL, PARENT, ROOT, SECURE, Bytes
from fs.xfs.bmap import ATTR
from fs.xfs.datree import DaTree, Place, is_node

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.volume import Volume

__all__ = ["PARENT", "ROOT", "SECURE", "get", "inactivate", "names", "remove", "set"]

S_IFMT, S_IFLNK = 0o170000, 0o120000
NAME_MAX = 255
VALUE_MAX = attrleaf.VALUE_MAX
TREE_BLOCKS = 14  # leaf conversion, a new root, two leaf splits, five node splits twice
FORK_BLOCKS = 2  # the data fork may become a tree, or its root move down
EXTENT_SLACK = 64  # records that one change may add beside the value's


@dataclass(slots=True)
class Request:
    """An attribute that is being set."""

    ip: Inode
    flags: int
    name: Bytes
    value: Bytes
    create: bool
    replace: bool
    hash: int
    local: bool  # in a leaf, the value stands in the entry
    valueblk: int = 0
    exists: bool = False  # there is one to replace
    hid_old: bool = False  # the entry replaced is still there, INCOMPLETE

    @property
    def need(self) -> int:
        """Bytes of a leaf that the entry takes, with its slot in the table."""
        if self.local:
            return attrleaf.local_bytes(self.name.size, self.value.size)
        return attrleaf.remote_bytes(self.name.size)

    def check_existing(self, exists: bool) -> None:
        """Raises OSError(EEXIST) or OSError(ENODATA) as the caller of set asked for."""
        if exists and self.create:
            raise OSError(errno.EEXIST, "attribute exists")
        if not exists and self.replace:
            raise _no_data()


def _no_data() -> OSError:
    return OSError(errno.ENODATA, "no such attribute")


def _bytes(data: bytes) -> Bytes:
    """A writable array, which is what kernels were compiled for."""
    return np.frombuffer(bytearray(data), np.uint8)


def _hash(name: Bytes) -> int:
    return int(danode.da_hash(name, 0, name.size))


def _is_short(ip: Inode) -> bool:
    return bool(ip.forkoff and ip.aformat == L.FMT_LOCAL)


def _is_tree(ip: Inode) -> bool:
    """Has the fork blocks? A fork without, and not shortform, is empty."""
    return bool(ip.forkoff and ip.aformat != L.FMT_LOCAL and ip.anextents)


# -- reading -----------------------------------------------------------------------------------


async def get(tp: Transaction, ip: Inode, flags: int, name: bytes) -> bytes | None:
    """Value of an attribute, None if there is none. Raises Corrupt."""
    key, mem = _bytes(name), tp.vol.arena.mem
    if _is_short(ip):
        addr = ip.attr_fork[0]
        at = int(attrsf.find(mem, addr, flags, key))
        return attrsf.value_at(mem, addr, at) if at >= 0 else None
    if not _is_tree(ip):
        return None
    found = await _locate(DaTree(SHAPE, tp, ip), flags, key)
    if found is None:
        return None
    place, index = found
    entry = attrleaf.entry(mem, place.buf.addr, index)
    if entry.flags & LOCAL:
        return mem[entry.text : entry.text + entry.valuelen].tobytes()
    return await attrvalue.read(tp, ip, entry.valueblk, entry.valuelen)


async def names(tp: Transaction, ip: Inode) -> Sequence[tuple[int, bytes]]:
    """(namespace flags, name) of every attribute. Raises Corrupt."""
    mem = tp.vol.arena.mem
    if _is_short(ip):
        return tuple(attrsf.entries(mem, ip.attr_fork[0]))
    if not _is_tree(ip):
        return ()
    tree = DaTree(SHAPE, tp, ip)
    found: list[tuple[int, bytes]] = []
    place: Place | None = await tree.first()
    last_hash = 0
    for _ in range(tree.leaves_max):
        if place is None:
            return found
        for entry in attrleaf.entries(mem, place.buf.addr):
            if entry.hash < last_hash:
                raise tree.corrupt(place.block, "hash order between leaves")
            last_hash = entry.hash
            if not entry.flags & INCOMPLETE:
                found.append((entry.flags & ~LOCAL, entry.name))
        place = await tree.next(place)
    if place is not None:
        raise tree.corrupt(0, "leaves without end")
    return found


async def _locate(tree: DaTree, flags: int, name: Bytes) -> tuple[Place, int] | None:
    """The entry with this name; one hash may go on over several leaves."""
    hash_value = _hash(name)
    place: Place | None = await tree.seek(hash_value)
    for _ in range(tree.leaves_max):
        if place is None:
            return None
        mem, addr = place.buf.mem, place.buf.addr
        index = int(attrleaf.find(mem, addr, hash_value, flags, name))
        if index >= 0:
            return place, index
        if -1 - index < attrleaf.count(mem, addr):
            return None
        place = await tree.next(place)
    if place is not None:
        raise tree.corrupt(0, "leaves without end")
    return None


# -- setting -----------------------------------------------------------------------------------


async def set(
    vol: Volume,
    ip: Inode,
    flags: int,
    name: bytes,
    value: bytes,
    *,
    create: bool = False,
    replace: bool = False,
) -> None:
    """Create or replace an attribute.

    Raises OSError: EEXIST with `create`, ENODATA with `replace`, ENOSPC, ERANGE for the name,
    E2BIG for the value; Corrupt.
    """
    if not 0 < len(name) <= NAME_MAX:
        raise OSError(errno.ERANGE, f"attribute name of {len(name)} bytes")
    if len(value) > VALUE_MAX:
        raise OSError(errno.E2BIG, f"attribute value of {len(value)} bytes")
    key = _bytes(name)
    local = attrleaf.is_local(vol.geo.block_size, len(name), len(value))
    rq = Request(ip, flags, key, _bytes(value), create, replace, _hash(key), local)
    async with vol.iolock(ip):
        async with vol.transaction("attr_set") as tp:
            await tp.lock_inodes(ip)
            if await _set_short(tp, rq):
                return
        await _set_tree(vol, rq)


async def _set_short(tp: Transaction, rq: Request) -> bool:
    """Set the attribute in shortform if it fits; False, with nothing changed, if not."""
    ip, mem, geo = rq.ip, tp.vol.arena.mem, tp.vol.geo
    if _is_tree(ip):
        return False
    addr = ip.attr_fork[0]
    old, total, entries = -1, attrsf.HEADER, 1
    if _is_short(ip):
        old = int(attrsf.find(mem, addr, rq.flags, rq.name))
        total, entries = int(attrsf.total_size(mem, addr)), 1 + int(attrsf.count(mem, addr))
    rq.exists = old >= 0
    rq.check_existing(rq.exists)
    if old >= 0:
        total -= attrsf.entry_bytes(int(mem[addr + old]), int(mem[addr + old + 1]))
        entries -= 1
    total += attrsf.entry_bytes(rq.name.size, rq.value.size)
    if max(rq.value.size, entries) > attrsf.TEXT_MAX:
        return False
    forkoff = forks.shortform_fit(geo, ip, mem, total)
    if not forkoff:
        return False
    if not ip.forkoff:
        listed = ip.nextents * 16 if ip.format == L.FMT_EXTENTS else 0
        inline = ip.size if ip.format == L.FMT_LOCAL else 0
        if max(listed, inline) > 8 * forkoff and not tp.blocks:
            return False
        await forks.add_attr(tp, ip, total, _convert_local)
    if not _is_short(ip):
        attrsf.init(mem, ip.attr_fork[0])
        ip.aformat = L.FMT_LOCAL
    if old >= 0:
        attrsf.remove(mem, ip.attr_fork[0], old)
    forks.set_forkoff(tp, ip, forkoff)
    attrsf.add(mem, ip.attr_fork[0], rq.flags, rq.name, rq.value)
    _touch(tp, ip)
    return True


def _touch(tp: Transaction, ip: Inode) -> None:
    """The attributes changed: ctime and change counter."""
    ip.ctime = stamp.now()
    ip.changecount += 1
    tp.log_inode(ip)


async def _set_tree(vol: Volume, rq: Request) -> None:
    """Set an attribute that does not fit shortform."""
    while not await _add_entry(vol, rq):
        await _remove_hidden(vol, rq.ip, rq.flags, rq.name)
    with _chain(vol, rq.ip):
        if rq.valueblk:
            await attrvalue.write(vol, rq.ip, rq.valueblk, rq.value.tobytes())
            await _publish(vol, rq)
        if rq.hid_old:
            await _remove_hidden(vol, rq.ip, rq.flags, rq.name)


@contextmanager
def _chain(vol: Volume, ip: Inode) -> Iterator[None]:
    """Transactions that are one change: XFS shuts down when it cancels one of them, dirty or not.

    An OSError is the caller's: the next change of this attribute removes the hidden entry.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        enomem.force_shutdown(vol, f"attributes of inode {ip.ino} are half changed", error)
        raise


async def _add_entry(vol: Volume, rq: Request) -> bool:
    """Add the new entry, visible or, for a remote value, INCOMPLETE.

    False, with nothing changed, if a hidden entry of this name is in the way.
    """
    ip = rq.ip
    value_blocks = 0 if rq.local else attrvalue.blocks(vol.geo, rq.value.size)
    blocks = TREE_BLOCKS + value_blocks
    blocks += bmap.worst_indirect(vol.geo, blocks, ATTR) + FORK_BLOCKS
    async with vol.transaction("attr_set", blocks) as tp:
        await tp.lock_inodes(ip)
        if await _set_short(tp, rq):
            return True
        tree = DaTree(SHAPE, tp, ip)
        if _is_tree(ip):
            if await _locate(tree, rq.flags | INCOMPLETE, rq.name):
                return False
            rq.exists = await _locate(tree, rq.flags, rq.name) is not None
            rq.check_existing(rq.exists)
        if ip.anextents + value_blocks + EXTENT_SLACK > bmap.extents_max(ip, ATTR):
            raise OSError(errno.ENOSPC, "attribute fork full")
        if not _is_tree(ip):
            await _make_leaf(tp, ip)
        if not rq.local:
            rq.valueblk = await _map_value(tp, ip, value_blocks)
        elif rq.exists:
            await _retire(tree, rq)
        await _insert(tree, rq)
        _touch(tp, ip)
    return True


async def _map_value(tp: Transaction, ip: Inode, count: int) -> int:
    """Allocate the blocks of a remote value; returns the first file block."""
    first = await bmap.first_hole(tp, ip, ATTR, count)
    at = first
    while at < first + count:
        found = await bmap.alloc(tp, ip, at, first + count - at, ATTR)
        at += found.count
    return first


async def _retire(tree: DaTree, rq: Request) -> None:
    """Take the old visible entry away, or hide it when its value has blocks of its own."""
    found = await _locate(tree, rq.flags, rq.name)
    assert found is not None
    place, index = found
    if attrleaf.entry(place.buf.mem, place.buf.addr, index).flags & LOCAL:
        _take_out(tree, place, index)
        await tree.rebalance(place)
    else:
        attrleaf.set_flags(place.buf.mem, place.buf.addr, index, rq.flags | INCOMPLETE)
        tree.tp.log(place.buf)
        rq.hid_old = True


def _take_out(tree: DaTree, place: Place, index: int) -> None:
    """Remove an entry from its leaf."""
    buf = place.buf
    if attrleaf.remove(buf.mem, buf.addr, buf.size, index) < 0:
        raise tree.corrupt(place.block, "names overlap")
    tree.tp.log(buf)


async def _insert(tree: DaTree, rq: Request) -> None:
    """Insert the request's entry, splitting the leaf where it belongs if that is full."""
    place = await tree.seek(rq.hash)
    buf = place.buf
    mem, addr, size = buf.mem, buf.addr, buf.size
    flags = rq.flags if rq.local else rq.flags | INCOMPLETE
    at = -1 - int(attrleaf.find(mem, addr, rq.hash, flags, rq.name))
    assert at >= 0, "attribute entry added twice"
    if attrleaf.room(mem, addr, size) >= rq.need:
        _put(tree, place.block, buf.addr, at, rq)
        tree.tp.log(buf)
        tree.fix_hashes(place)
        return
    if not place.path:
        await tree.deepen(place)
        addr = place.buf.addr
    stay = int(attrleaf.split_point(mem, addr, size, at, rq.need))
    n = int(attrleaf.count(mem, addr))
    first = at if stay < 0 else stay if stay <= at else stay - 1
    block, right = await tree.add_leaf(place)
    attrleaf.init(mem, right.addr, size)
    if attrleaf.move(mem, addr, first, n - first, right.addr, 0, size) < 0:
        raise tree.corrupt(place.block, "names overlap")
    if stay >= 0 and at < stay:
        _put(tree, place.block, addr, at, rq)
    elif stay >= 0:
        _put(tree, block, right.addr, at - first, rq)
    tree.tp.log(place.buf)
    tree.tp.log(right)
    await tree.adopt(place, block, right)
    if stay < 0:  # neither half has room beside its neighbours: the entry gets a leaf of its own
        await _insert(tree, rq)


def _put(tree: DaTree, block: int, addr: int, index: int, rq: Request) -> None:
    """Write the entry into a leaf that has room."""
    mem, size = tree.tp.vol.arena.mem, tree.tp.vol.geo.block_size
    if rq.local:
        code = attrleaf.add_local(mem, addr, size, index, rq.hash, rq.flags, rq.name, rq.value)
    else:
        flags = rq.flags | INCOMPLETE
        code = attrleaf.add_remote(
            mem, addr, size, index, rq.hash, flags, rq.name, rq.valueblk, rq.value.size
        )
    if code < 0:
        raise tree.corrupt(block, "names overlap")


async def _publish(vol: Volume, rq: Request) -> None:
    """Make the new entry visible and hide the old one, in one step."""
    async with vol.transaction("attr_flip") as tp:
        await tp.lock_inodes(rq.ip)
        tree = DaTree(SHAPE, tp, rq.ip)
        new = await _locate(tree, rq.flags | INCOMPLETE, rq.name)
        old = await _locate(tree, rq.flags, rq.name)
        assert new is not None, "the entry just added is gone"
        rq.hid_old = old is not None
        for found, flags in ((new, rq.flags), (old, rq.flags | INCOMPLETE)):
            if found is not None:
                place, index = found
                attrleaf.set_flags(place.buf.mem, place.buf.addr, index, flags)
                tp.log(place.buf)
        _touch(tp, rq.ip)


# -- from shortform to a leaf and back ---------------------------------------------------------


async def _make_leaf(tp: Transaction, ip: Inode) -> None:
    """Give an inode whose fork is shortform, empty or absent a leaf at block 0."""
    mem, geo = tp.vol.arena.mem, tp.vol.geo
    if not ip.forkoff:
        await forks.add_attr(tp, ip, _leaf_fork_bytes(tp, ip), _convert_local)
    saved = None
    if _is_short(ip):
        addr, size = ip.attr_fork
        saved = mem[addr : addr + int(attrsf.total_size(mem, addr))].copy()
        mem[addr : addr + size] = 0
        ip.aformat, ip.anextents = L.FMT_EXTENTS, 0
        default = forks.default_forkoff(geo)
        if ip.format not in (L.FMT_DEV, L.FMT_BTREE) and ip.forkoff < default:
            forks.set_forkoff(tp, ip, default)
    tp.log_inode(ip)
    block, buf = await SHAPE.alloc(tp, ip)
    assert block == 0
    attrleaf.init(mem, buf.addr, buf.size)
    if saved is not None:
        attrleaf.from_shortform(saved, mem, buf.addr, buf.size)
    tp.log(buf)


def _leaf_fork_bytes(tp: Transaction, ip: Inode) -> int:
    """Size of a new attribute fork that holds extents: the default, or less for inline data.

    Inline data that is longer than the default data fork stays inline if the smallest attribute
    fork leaves it room.
    """
    least = tp.vol.geo.literal_size - forks.ATTR_ROOT_MIN
    default = 8 * forks.default_forkoff(tp.vol.geo)
    if ip.format == L.FMT_LOCAL and default < ip.size <= least & ~7:
        return forks.ATTR_ROOT_MIN
    return tp.vol.geo.literal_size


async def _convert_local(tp: Transaction, ip: Inode) -> None:
    """Move inline data that the attribute fork pushes out into blocks."""
    if ip.mode & S_IFMT == S_IFLNK:
        from fs.xfs import symlink

        await symlink.convert_local(tp, ip)
    else:
        from fs.xfs import dir as directory

        await directory.convert_local(tp, ip)


async def _shrink(tree: DaTree) -> None:
    """Go back to shortform when the only leaf fits it; drop the fork when nothing is left."""
    tp, ip = tree.tp, tree.ip
    mem, geo = tp.vol.arena.mem, tp.vol.geo
    root = await SHAPE.read(tp, ip, 0)
    if is_node(root):
        return
    size = int(attrleaf.shortform_size(mem, root.addr))
    end = await bmap.last_offset(tp, ip, ATTR)
    if size == attrsf.HEADER:
        if await attrblock.unmap(tp, ip, 0, end):
            _drop_fork(tp, ip)
        return
    forkoff = forks.shortform_fit(geo, ip, mem, size) if size > 0 and end == 1 else 0
    if not forkoff:
        return
    short = np.zeros(size, np.uint8)
    attrleaf.to_shortform(mem, root.addr, short)
    await SHAPE.free(tp, ip, 0, root)
    assert ip.anextents == 0
    forks.set_forkoff(tp, ip, forkoff)
    addr = ip.attr_fork[0]
    mem[addr : addr + size] = short
    ip.aformat = L.FMT_LOCAL
    tp.log_inode(ip)


# -- removing ----------------------------------------------------------------------------------


async def remove(vol: Volume, ip: Inode, flags: int, name: bytes) -> None:
    """Remove an attribute. Raises OSError(ENODATA), Corrupt; OSError(ENOSPC) see `_cut`."""
    key = _bytes(name)
    async with vol.iolock(ip):
        async with vol.transaction("attr_rm") as tp:
            await tp.lock_inodes(ip)
            if not _is_tree(ip):
                _remove_short(tp, ip, flags, key)
                return
            tree = DaTree(SHAPE, tp, ip)
            found = await _locate(tree, flags, key)
            if found is None:
                raise _no_data()
            place, index = found
            if attrleaf.entry(place.buf.mem, place.buf.addr, index).flags & LOCAL:
                await _cut(tree, place, index)
                _touch(tp, ip)
                return
            _touch(tp, ip)
            attrleaf.set_flags(place.buf.mem, place.buf.addr, index, flags | INCOMPLETE)
            tp.log(place.buf)
        with _chain(vol, ip):
            await _remove_hidden(vol, ip, flags, key)


def _remove_short(tp: Transaction, ip: Inode, flags: int, name: Bytes) -> None:
    mem, addr = tp.vol.arena.mem, ip.attr_fork[0]
    at = int(attrsf.find(mem, addr, flags, name)) if _is_short(ip) else -1
    if at < 0:
        raise _no_data()
    attrsf.remove(mem, addr, at)
    if not attrsf.count(mem, addr):
        _drop_fork(tp, ip)
    _touch(tp, ip)


def _drop_fork(tp: Transaction, ip: Inode) -> None:
    """The last attribute is gone, and so is the fork.

    A symbolic link that attributes pushed out of the inode keeps an empty one: xfs_repair insists
    that a target which fits the data fork is there.
    """
    fits = ip.size <= tp.vol.geo.literal_size
    if ip.mode & S_IFMT == S_IFLNK and ip.format == L.FMT_EXTENTS and fits:
        addr, size = ip.attr_fork
        tp.vol.arena.mem[addr : addr + size] = 0
        ip.aformat = L.FMT_EXTENTS
        tp.log_inode(ip)
    else:
        forks.drop_attr(tp, ip)


async def _remove_hidden(vol: Volume, ip: Inode, flags: int, name: Bytes) -> None:
    """Remove the INCOMPLETE entry of a name, and its value's blocks; nothing if there is none."""
    while True:
        async with vol.transaction("attr_rm") as tp:
            await tp.lock_inodes(ip)
            if not _is_tree(ip):
                return
            tree = DaTree(SHAPE, tp, ip)
            found = await _locate(tree, flags | INCOMPLETE, name)
            if found is None or not _may_unmap(tp, ip, 1):
                return
            place, index = found
            entry = attrleaf.entry(place.buf.mem, place.buf.addr, index)
            count = attrvalue.blocks(vol.geo, entry.valuelen)
            if entry.valueblk and not await attrblock.unmap(tp, ip, entry.valueblk, count):
                continue
            await _cut(tree, place, index)
            return


def _may_unmap(tp: Transaction, ip: Inode, extents: int) -> bool:
    """Can blocks be freed now, if that adds so many extent records at most?

    Cutting an extent in two may need a block for the extent tree. The reserve pool gives it,
    unless even that is empty; then the records must find room where records are already.
    """
    if not tp.blocks:
        wanted = bmap.worst_indirect(tp.vol.geo, TREE_BLOCKS, ATTR)
        tp.take_pool(max(0, min(wanted, tp.vol.space.unpromised)))
        if tp.blocks < wanted:
            return extents <= bmap.spare_records(tp, ip, ATTR)
    return True


async def _cut(tree: DaTree, place: Place, index: int) -> None:
    """Take an entry out of the tree and let the tree shrink.

    Without a single block to spare the tree keeps its form. A leaf must not stay behind empty,
    so then the last entry of one cannot be removed: OSError(ENOSPC), with nothing changed.
    """
    leaf = place.buf
    may_shrink = _may_unmap(tree.tp, tree.ip, 2 * len(place.path) + 1)
    if not may_shrink and attrleaf.count(leaf.mem, leaf.addr) == 1:
        raise OSError(errno.ENOSPC, "no block for the extent tree")
    _take_out(tree, place, index)
    if may_shrink:
        await tree.rebalance(place)
        await _shrink(tree)
    else:
        tree.fix_hashes(place)


async def inactivate(vol: Volume, ip: Inode) -> None:
    """Free the whole attribute fork of an inode that is going away."""
    while ip.forkoff:
        async with vol.transaction("attr_inactive", from_pool=True) as tp:
            await tp.lock_inodes(ip)
            if _is_tree(ip):
                _may_unmap(tp, ip, 0)
                end = await bmap.last_offset(tp, ip, ATTR)
                if not await attrblock.unmap(tp, ip, 0, end):
                    continue
            forks.drop_attr(tp, ip)
            if ip.forkoff:
                return
