"""The front's memory and words: what lanes and trio share, made from the arena at mount.

`Front.start` takes slots, payload folios, the ring and each lane's own page from the arena;
`make_lane` ties them together with the volume's arrays into the tuple that a lane works on. Lanes
and the trio side get one each (trio's finishes parked requests with the lanes' own functions).

Nobody but the trio thread makes, grows or gives back this memory, and only when no lane runs or
when it owns the slot concerned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from alloc import gfp
from alloc.page import PAGE_SIZE
from alloc.rows import TRIO
from fs.cache.folio import PageCache
from fs.front import buffers, ring
from fs.front import lanestate as S
from fs.front import queues as queuing
from fs.front import wire as W
from fs.front.userpolicy import UserPolicies

if TYPE_CHECKING:
    from fs.volume import Volume

LANE_BYTES = 8 * PAGE_SIZE  # out: a page; iov: four pages; spare nodes: one
OUT_BYTES = PAGE_SIZE
IOV_AT, IOV_WORDS = PAGE_SIZE, 2 * 1024
NODES_AT = 5 * PAGE_SIZE
RING_SHARE = 1 << 17  # bytes of memory for each ring entry
GROW = 16  # slots made at a time
RING_LEAST, RING_MOST = 64, 1024


def order_of(nbytes: int) -> int:
    """The smallest folio order with room for nbytes."""
    return max(0, (nbytes - 1).bit_length() - 12)


class Front:
    """What the lanes of one mount share with trio."""

    def __init__(self, vol: Volume, lanes: int, max_write: int = 0, queues: int = 0) -> None:
        """`lanes` read /dev/fuse, one more for each of `queues` serves that."""
        self.vol = vol
        self.nr_lanes = lanes + queues
        memory, places = vol.arena.memory_bytes, 0
        if queues:
            max_write, places = queuing.sizes(memory, queues, max_write)
        self.max_write, self.nr_payloads, self.nr_slots = buffers.sizes(memory, lanes, max_write)
        self.payload_order = order_of(self.max_write)
        self.queues = queuing.Queues(queues, places, self.payload_order)
        self.control = np.zeros(S.C_WORDS, np.int64)
        self.users = UserPolicies(self.control)
        self.geo = _geo_words(vol)
        most = buffers.slots_most(memory, self.nr_slots)
        self.slots = np.zeros((most, S.S_WORDS), np.int64)
        self.slots[:, S.S_ENTRY] = -1
        self.free_slots = np.zeros(most, np.int64)
        self._unused = list(range(self.nr_slots, most))  # slots that have no memory now
        room = buffers.payloads_most(memory, self.max_write, self.nr_payloads)
        self.free_payloads = np.zeros(room, np.int64)
        self._grown_payloads = 0
        self.lanes: list[S.Lane] = []  # the last one is trio's own
        self.ring: Any = None
        self.ops: Any = None  # fs.front.operations, once they exist
        self._folios: list[int] = []
        self._rooms: list[Any] = []

    async def start(self) -> None:
        """Take the memory; no lane runs yet."""
        self.vol.arena.set_lanes(self.nr_lanes)
        entries = self.vol.arena.memory_bytes // RING_SHARE
        entries = min(max(1 << entries.bit_length() - 1, RING_LEAST), RING_MOST)
        self.ring = (await self._room(entries * 64)).view(np.int64).reshape(entries, 8)
        ring.init(self.control, self.ring)
        for slot in range(self.nr_slots):
            self.slots[slot, S.S_ADDR] = await self._new_folio(order_of(S.SLOT_BYTES)) << 12
            buffers.give_slot(self.control, self.free_slots, slot)
        for _ in range(self.nr_payloads):
            pfn = await self.vol.arena.alloc_folio(self.payload_order, gfp.MOVABLE)
            buffers.give_payload(self.control, self.free_payloads, pfn)
        await self.queues.start(self._new_folio)
        self._rooms = [await self._room(LANE_BYTES) for _ in range(self.nr_lanes + 1)]
        for number in range(self.nr_lanes + 1):
            self.lanes.append(make_lane(self.vol, self, number))
            me = self.lanes[number].me
            me[S.M_NUMBER] = self.vol.arena.rcu.register()
            me[S.M_ROW] = 1 + number if number < self.nr_lanes else TRIO
            me[S.M_HOME] = number % len(self.vol.arena.nodes) if number < self.nr_lanes else 0
        self.vol.arena.rcu.serves = self.serves

    async def _new_folio(self, order: int) -> int:
        pfn = await self.vol.arena.alloc_folio(order, gfp.KERNEL | gfp.ZERO)
        self._folios.append(pfn)
        return pfn

    async def _room(self, nbytes: int) -> Any:
        """nbytes of zeroed arena, whole pages."""
        at = await self._new_folio(order_of(nbytes)) << 12
        return self.vol.arena.mem[at : at + nbytes]

    def room(self, number: int) -> Any:
        """The memory of one lane's own."""
        return self._rooms[number]

    @property
    def free_slot_count(self) -> int:
        return int(self.control[S.C_NR_FREE_SLOTS])

    @property
    def free_payload_count(self) -> int:
        return int(self.control[S.C_NR_FREE_PAYLOADS])

    def equip(self, lane: S.Lane) -> None:
        """Put a slot and a payload folio into a lane's hands, as its loop does."""
        lane.me[S.M_SLOT] = buffers.take_slot(self.control, self.free_slots)
        lane.me[S.M_PAYLOAD] = buffers.take_payload(self.control, self.free_payloads)

    def grow(self) -> None:
        """Requests wait for slots: make more while memory is there."""
        arena = self.vol.arena
        for _ in range(min(GROW, len(self._unused))):
            # A lane without a slot sleeps until one is given back, so it can do with what there is.
            pfn = arena.try_alloc_folio(order_of(S.SLOT_BYTES), gfp.NORETRY)
            if pfn is None:
                return
            slot = self._unused.pop()
            self.slots[slot, S.S_ADDR] = pfn << 12
            buffers.give_slot(self.control, self.free_slots, slot)

    def grow_payloads(self) -> None:
        """Large writes are held back, each with a payload folio: one more for the lanes."""
        if self.nr_payloads + self._grown_payloads >= len(self.free_payloads):
            return
        # A lane without one sleeps until one is given back, so it can do with what there is.
        order, flags = self.payload_order, gfp.NORETRY | gfp.MOVABLE
        pfn = self.vol.arena.try_alloc_folio(order, flags)
        if pfn is not None:
            self._grown_payloads += 1
            buffers.give_payload(self.control, self.free_payloads, pfn)

    def _give_payload(self, pfn: int) -> None:
        """Back to the lanes, or to the arena if they have enough."""
        if self._grown_payloads and self.free_payload_count >= self.nr_payloads:
            self._grown_payloads -= 1
            self.vol.arena.put_folio(pfn)
        else:
            buffers.give_payload(self.control, self.free_payloads, pfn)

    def serves(self, reader: int) -> str:
        """What the lane is at that RCU knows by this number; a look at moving words."""
        for number, lane in enumerate(self.lanes):
            slot = int(lane.me[S.M_SLOT])
            if int(lane.me[S.M_NUMBER]) == reader and slot >= 0:
                at = int(self.slots[slot, S.S_ADDR])
                opcode = int(lane.m4[(at + W.H_OPCODE) >> 2])
                name = W.NAMES.get(opcode, f"opcode {opcode}")
                return f"lane {number} in {name} of inode {lane.m8[(at + W.H_NODEID) >> 3]}"
        return f"reader {reader}"

    def give_back(self, slot: int) -> None:
        """A request is finished: its payload folio and its slot are free."""
        payload = int(self.slots[slot, S.S_PAYLOAD])
        if payload:
            self.slots[slot, S.S_PAYLOAD] = 0
        if payload and self.slots[slot, S.S_ENTRY] < 0:
            self._give_payload(payload)
        if slot < self.nr_slots or self.free_slot_count < self.nr_slots:
            buffers.give_slot(self.control, self.free_slots, slot)
        else:
            self._drop_slot(slot)

    def _drop_slot(self, slot: int) -> None:
        self.vol.arena.put_folio(int(self.slots[slot, S.S_ADDR]) >> 12)
        self.slots[slot, S.S_ADDR] = 0
        self._unused.append(slot)

    def stop(self) -> None:
        """Give the memory back; no lane runs any more and nothing is parked."""
        put = self.vol.arena.put_folio
        for lane in self.lanes:
            self.vol.arena.rcu.unregister(int(lane.me[S.M_NUMBER]))
            if lane.me[S.M_PAYLOAD] and lane.me[S.M_QUEUE] < 0:
                put(int(lane.me[S.M_PAYLOAD]))
            for node in lane.nodes[: int(lane.me[S.M_NR_NODES])]:
                self.vol.pages.nodes.free(int(node))
        while (pfn := int(buffers.take_payload(self.control, self.free_payloads))) > 0:
            put(pfn)
        for slot in set(range(self.nr_slots, len(self.slots))) - set(self._unused):
            self._drop_slot(slot)
        self.queues.close()
        for pfn in self._folios:
            put(pfn)
        self._folios.clear()
        self.lanes.clear()
        self.vol.arena.set_lanes(0)


def _geo_words(vol: Volume) -> Any:
    """The constants of a mount that lanes need."""
    geo, pages = vol.geo, vol.pages
    words = np.zeros(S.G_WORDS, np.int64)
    words[S.G_BLOCK_LOG] = geo.block_log
    words[S.G_BLOCK_SIZE] = geo.block_size
    words[S.G_BLKSIZE] = max(PAGE_SIZE, geo.block_size)
    words[S.G_ORDER_MIN], words[S.G_ORDER_MAX] = pages.order_min, pages.order_max
    words[S.G_INODE_LOG] = geo.inode_log
    words[S.G_TREE_LEVELS] = pages.tree_levels
    words[S.G_TREE_RECORDS_MIN] = pages.tree_records_min
    words[S.G_ROOT_INO] = geo.root_ino
    words[S.G_NODE_SLAB] = pages.nodes.number
    return words


def make_lane(vol: Volume, front: Front, number: int) -> S.Lane:
    """The tuple of lane `number`; its memory is the front's room of that number."""
    arena, room = vol.arena, front.room(number)
    assert isinstance(vol.pages, PageCache)
    me = np.zeros(S.M_WORDS, np.int64)
    me[S.M_SLOT], me[S.M_ONE] = -1, 1
    me[S.M_PAYLOAD_ORDER] = front.payload_order
    me[S.M_ENTRY] = -1
    queue = number - (front.nr_lanes - front.queues.number)
    serves = 0 <= queue < front.queues.number
    me[S.M_QUEUE] = queue if serves else -1
    out = room[:OUT_BYTES]
    return S.Lane(
        mem=arena.mem,
        m4=arena.mem.view(np.uint32),
        m8=arena.mem.view(np.uint64),
        s8=arena.mem.view(np.int64),
        **arena.slabs._asdict(),
        index=arena.pages.index,
        blocks=arena.pages.blocks,
        ibuckets=vol.inodes.buckets,
        dbuckets=vol.dentries.buckets,
        dirty=vol.pages.dirty.counts,
        space=vol.space.words,
        totals=vol.space.totals,
        rcu=arena.rcu.words,
        geo=front.geo,
        control=front.control,
        ring=front.ring,
        slots=front.slots,
        free_slots=front.free_slots,
        free_payloads=front.free_payloads,
        entries=front.queues.entries,
        me=me,
        uring=front.queues.words[queue] if serves else np.zeros(S.U_WORDS, np.int64),
        nodes=room[NODES_AT : NODES_AT + 4 * S.LANE_NODES].view(np.uint32),
        iov=room[IOV_AT : IOV_AT + 8 * IOV_WORDS].view(np.uint64),
        out=out,
        out4=out.view(np.uint32),
        out8=out.view(np.int64),
        counts=np.zeros((W.OPCODES, S.ST_KINDS), np.int64),
        reasons=np.zeros((W.OPCODES, S.R_NR), np.int64),
        hist=np.zeros((W.OPCODES, 2, S.HIST_BUCKETS), np.int64),
    )
