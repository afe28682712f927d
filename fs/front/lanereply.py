"""What serving a request in a lane needs of the message: its words, the reply, the doorbell.

`l` is a Lane everywhere (fs/front/lanestate.py). The message lies in the slot in hand, whole but
for the payload of a large WRITE. A reply is a 16-byte header and a body; small ones are built in
`l.out`, whose first 16 bytes are the header's. Words of a body are stored through `l.out4` and
`l.out8`. It is one write(2) to the descriptor that the request came from, or, for a request that
came through a queue, a submission of the lane that serves the queue (`fs/front/lanequeue.py`).

The kernel may have given up waiting for a reply (its connection was aborted): that is counted
and otherwise as good as answered. Kernels only; no lock is held across a write that needs one.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import fetch_or_acq_rel
from alloc.jit import helper
from alloc.libc import write_bytes
from fs.front import lanequeue
from fs.front.lanestate import (
    ANSWERED,
    B_BUSY,
    BUSY_TURNS,
    C_BELL,
    C_BELL_FD,
    C_BUSY_NS,
    M_BUSY,
    M_ENTRY,
    M_FD,
    M_ONE,
    M_QUEUE,
    M_REFUSED,
    M_SLOT,
    M_TIME,
    M_TURNS,
    M_UNWANTED,
    S_ADDR,
)
from fs.front.wire import H_UNIQUE, OUT_HEADER

ENOENT = 2
OUT_BODY4, OUT_BODY8 = OUT_HEADER >> 2, OUT_HEADER >> 3  # where a body begins in out4 and out8


@helper
def message(l):
    """Byte address of the request in the arena."""
    return l.slots[l.me[M_SLOT], S_ADDR]


@helper
def u32(l, at):
    """The 32-bit word at a message offset."""
    return np.int64(l.m4[(message(l) + at) >> 2])


@helper
def u64(l, at):
    """The 64-bit word at a message offset, signed."""
    return l.s8[(message(l) + at) >> 3]


@helper
def head(l, error, nbytes):
    """Build the reply's header for a body of nbytes; `error` is a positive errno or 0."""
    l.out4[0] = np.uint32(OUT_HEADER + nbytes)
    l.out4[1] = np.uint32(-error & 0xFFFFFFFF)
    l.out8[1] = u64(l, H_UNIQUE)


@helper
def note_reply(l, put):
    """Count a reply that the kernel did not take; `put` is what write(2) returned."""
    if put == -ENOENT:
        l.me[M_UNWANTED] += 1
    elif put < 0:
        l.me[M_REFUSED] += 1
    return np.int64(ANSWERED)


@helper
def reply(l, error, nbytes):
    """Answer with an error or with the nbytes that stand in l.out behind the header."""
    head(l, error, nbytes)
    if l.me[M_QUEUE] >= 0:
        lanequeue.put_body(l, l.me[M_ENTRY], nbytes)
        return send_placed(l, nbytes)
    return note_reply(l, write_bytes(l.me[M_FD], l.out, 0, OUT_HEADER + nbytes))


@helper
def send_placed(l, nbytes):
    """Answer with the header in l.out and the nbytes that stand in the queue entry's payload."""
    if l.me[M_QUEUE] >= 0:
        lanequeue.commit(l, l.me[M_ENTRY], nbytes)
        return np.int64(ANSWERED)
    return note_reply(l, write_bytes(l.me[M_FD], l.out, 0, OUT_HEADER))  # to the queue's lane


@helper
def bell(l, bits):
    """Wake trio for what `bits` say; store first what it shall find."""
    if fetch_or_acq_rel(l.control, C_BELL, bits) == 0:
        write_bytes(l.control[C_BELL_FD], l.me, M_ONE, 8)


@helper
def note_turn(l):
    """A request was read, at M_TIME: count it, and tell trio when they come quickly."""
    l.me[M_TURNS] += 1
    if l.me[M_TURNS] & (BUSY_TURNS - 1) == 0:
        if l.me[M_TIME] - l.me[M_BUSY] < l.control[C_BUSY_NS]:
            bell(l, B_BUSY)
        l.me[M_BUSY] = l.me[M_TIME]
