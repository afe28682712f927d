"""Buffers of parked requests: what is made while many wait is given back afterwards."""

from __future__ import annotations

from pathlib import Path

from fs.front import buffers, park
from fs.front import lanestate as S
from tests import support
from tests.fs.imagefiles import opened


async def test_payloads_grow_while_large_writes_wait(scratch: Path) -> None:
    async with opened(support.mkfs(scratch), 64 << 20) as vol:
        before = vol.arena.free_pages
        front = park.Front(vol, 2)
        await front.start()
        idle = vol.arena.free_pages
        most = buffers.payloads_most(vol.arena.memory_bytes, front.max_write, front.nr_payloads)
        assert most > front.nr_payloads
        slots = list(range(most))
        for slot in slots:
            if not front.free_payload_count:
                front.grow_payloads()
            taken = buffers.take_slot(front.control, front.free_slots)
            pfn = buffers.take_payload(front.control, front.free_payloads)
            assert pfn > 0
            front.slots[taken, S.S_PAYLOAD] = pfn
            slots[slot] = taken
        front.grow_payloads()
        assert front.free_payload_count == 0, "not more than its share of memory"
        for slot in slots:
            front.give_back(slot)
        assert front.free_payload_count == front.nr_payloads
        assert vol.arena.free_pages == idle
        front.stop()
        assert vol.arena.free_pages >= before - 64  # what lists of pages keep
