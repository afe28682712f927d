"""Unlinked lists: inodes without a name that are still in use.

Each AGI has 64 buckets; an inode without links hangs in bucket agino % 64, new ones at the head,
linked through `next_unlinked` in the inode clusters (XFS format: unlinked lists). The links live
in the cluster buffers only, each change stamps that inode's CRC. In-core inodes remember who is
in front of them, so that taking one out of a long list needs no walk; the list is believed over
the memory.

Everything is under the space lock, which the functions take. At a mount a list is only non-empty
on an image that was not unmounted: recovery frees who is on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fs.xfs import ag, inobt, inode
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.buf import Buf
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction

BUCKETS = 64


async def insert(tp: Transaction, ip: Inode) -> None:
    """Put an inode whose last link goes in this transaction on its list."""
    await tp.lock_space()
    geo = tp.vol.geo
    agno, agino = geo.ino_agno(ip.ino), geo.ino_agino(ip.ino)
    agi = await ag.read_agi(tp, agno)
    heads = agi.rec(L.AGI)["unlinked"]
    head = int(heads[agino % BUCKETS])
    if head == agino:
        raise tp.vol.corrupt("unlinked list", f"inode {ip.ino}", "the inode is on it already")
    buf, addr = await _cluster(tp, ip.ino)
    if inode.next_unlinked(buf.mem, addr) != head:
        inode.set_next_unlinked(buf.mem, addr, head, geo.inode_size)
        tp.log(buf)
    heads[agino % BUCKETS] = agino
    tp.log(agi)
    ip.unlinked_prev = 0
    _remember(tp, agno, head, agino)


async def remove(tp: Transaction, ip: Inode) -> None:
    """Take an inode off its list; raises Corrupt if it is not on it."""
    await tp.lock_space()
    geo = tp.vol.geo
    agno, agino = geo.ino_agno(ip.ino), geo.ino_agino(ip.ino)
    agi = await ag.read_agi(tp, agno)
    heads = agi.rec(L.AGI)["unlinked"]
    buf, addr = await _cluster(tp, ip.ino)
    behind = inode.next_unlinked(buf.mem, addr)
    before = 0
    if int(heads[agino % BUCKETS]) == agino:
        heads[agino % BUCKETS] = behind
        tp.log(agi)
    else:
        before = await _before(tp, agno, ip, int(heads[agino % BUCKETS]))
        front, front_addr = await _cluster(tp, geo.ino(agno, before))
        inode.set_next_unlinked(front.mem, front_addr, behind, geo.inode_size)
        tp.log(front)
    if behind != L.NULL32:
        inode.set_next_unlinked(buf.mem, addr, L.NULL32, geo.inode_size)
        tp.log(buf)
    ip.unlinked_prev = 0
    _remember(tp, agno, behind, before)


async def list_bucket(tp: Transaction, agno: int, bucket: int) -> list[int]:
    """aginos on one list, from its head on. Raises Corrupt for a loop or a wrong bucket."""
    agi = await ag.read_agi(tp, agno)
    found: list[int] = []
    agino = int(agi.rec(L.AGI)["unlinked"][bucket])
    while agino != L.NULL32:
        if agino % BUCKETS != bucket or agino in found:
            raise tp.vol.corrupt("unlinked list", f"AG {agno} bucket {bucket}", "it has no end")
        found.append(agino)
        buf, addr = await _cluster(tp, tp.vol.geo.ino(agno, agino))
        agino = inode.next_unlinked(buf.mem, addr)
    return found


async def _cluster(tp: Transaction, ino: int) -> tuple[Buf, int]:
    """The cluster buffer of an inode, and the inode's address in it."""
    daddr, bbs, offset = inobt.imap(tp.vol.geo, ino)
    buf = await tp.read(daddr, bbs, inode.INODE_OPS)
    return buf, buf.addr + offset


async def _before(tp: Transaction, agno: int, ip: Inode, head: int) -> int:
    """agino of the inode in front of `ip` on its list."""
    geo = tp.vol.geo
    agino = geo.ino_agino(ip.ino)
    hint = ip.unlinked_prev
    if hint:
        buf, addr = await _cluster(tp, geo.ino(agno, hint))
        if inode.next_unlinked(buf.mem, addr) == agino:
            return hint
    for found in await list_bucket(tp, agno, agino % BUCKETS):
        buf, addr = await _cluster(tp, geo.ino(agno, found))
        if inode.next_unlinked(buf.mem, addr) == agino:
            return found
    raise tp.vol.corrupt("unlinked list", f"inode {ip.ino}", "the inode is not on it")


def _remember(tp: Transaction, agno: int, agino: int, before: int) -> None:
    """Tell the in-core inode `agino`, if there is one, who is in front of it now."""
    if agino == L.NULL32:
        return
    ip = tp.vol.inodes.find(tp.vol.geo.ino(agno, agino))
    if ip is not None:
        ip.unlinked_prev = before
        tp.vol.inodes.put(ip)
