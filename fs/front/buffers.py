"""The buffers that requests are read into: slots and payload folios, all of the arena's memory.

A lane reads only with a slot (8 KiB) and a payload folio (room for the largest write) in hand, so
whatever arrives can be parked: then they go to trio with the request, and the lane takes others
from two stacks. When a stack is empty the lane sleeps, which slows the readers of /dev/fuse and
loses nothing. The stacks are guarded by the spin lock in control[C_SLOT_LOCK], held for a few
instructions; who has taken a slot or a payload owns it.

Sizes follow memory: buffers that are always there take about a twentieth of the arena. Slots, which
small requests wait in, grow to an eighth of it when many wait and memory is there; and so do
payload folios, with which large writes are held back.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import spin_lock, spin_unlock
from alloc.jit import helper, kernel
from fs.front.lanestate import (
    C_NR_FREE_PAYLOADS,
    C_NR_FREE_SLOTS,
    C_SLOT_LOCK,
    SLOT_BYTES,
)

MAX_WRITE = 1 << 20
MAX_WRITE_LEAST = 128 << 10  # the kernel's largest setxattr fits, too
SHARE = 20  # of memory, for the buffers
SLOTS_LEAST, SLOTS_MOST = 16, 256
GROWN_SHARE, GROWN_MOST = 8, 2048  # of memory, and slots, when many requests wait
PAYLOADS_MOST = 16
PAYLOADS_GROWN = 64

_WORDS = "i8[::1]"


def sizes(memory_bytes: int, lanes: int, max_write: int = 0) -> tuple[int, int, int]:
    """Largest write, payload folios and slots for an arena; `max_write` 0 chooses.

    A lane holds one payload; one more lets a request wait.
    """
    room = memory_bytes // SHARE
    chosen = max_write or MAX_WRITE
    while not max_write and chosen > MAX_WRITE_LEAST and chosen * (lanes + 1) > room:
        chosen >>= 1
    payloads = min(max(lanes + 1, room // 2 // chosen), PAYLOADS_MOST)
    slots = min(max(room // 8 // SLOT_BYTES, SLOTS_LEAST + lanes), SLOTS_MOST)
    return chosen, payloads, slots


def slots_most(memory_bytes: int, slots: int) -> int:
    """How many slots there may be in the end."""
    return max(min(memory_bytes // GROWN_SHARE // SLOT_BYTES, GROWN_MOST), slots)


def payloads_most(memory_bytes: int, max_write: int, payloads: int) -> int:
    """How many payload folios there may be while writers are held back with one each."""
    return max(min(memory_bytes // GROWN_SHARE // max_write, PAYLOADS_GROWN), payloads)


@helper
def pop(control, count, stack):
    """Take the top of a stack; -1 if it is empty."""
    spin_lock(control, C_SLOT_LOCK)
    n = control[count]
    taken = np.int64(-1)
    if n > 0:
        control[count] = n - 1
        taken = stack[n - 1]
    spin_unlock(control, C_SLOT_LOCK)
    return taken


@helper
def push(control, count, stack, value):
    """Put something on a stack."""
    spin_lock(control, C_SLOT_LOCK)
    n = control[count]
    stack[n] = value
    control[count] = n + 1
    spin_unlock(control, C_SLOT_LOCK)


@kernel(f"i8({_WORDS}, {_WORDS})")
def take_slot(control, free_slots):
    """A free slot's number, or -1."""
    return pop(control, C_NR_FREE_SLOTS, free_slots)


@kernel(f"void({_WORDS}, {_WORDS}, i8)")
def give_slot(control, free_slots, slot):
    """A slot is free again."""
    push(control, C_NR_FREE_SLOTS, free_slots, slot)


@kernel(f"i8({_WORDS}, {_WORDS})")
def take_payload(control, free_payloads):
    """The pfn of a free payload folio, or -1."""
    return pop(control, C_NR_FREE_PAYLOADS, free_payloads)


@kernel(f"void({_WORDS}, {_WORDS}, i8)")
def give_payload(control, free_payloads, pfn):
    """A payload folio is free again."""
    push(control, C_NR_FREE_PAYLOADS, free_payloads, pfn)
