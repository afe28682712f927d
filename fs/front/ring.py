"""The ring through which lanes hand requests to trio: bounded, many producers, one consumer.

A producer takes a ticket by an atomic add; the ticket names a cell, and the cell's E_SEQ says
whose turn it is: equal to the ticket, the cell is free for that ticket; one more, it is filled.
The consumer sets it to the ticket of the next round. So entries of one lane stay in order, and
nothing is lost when the ring is full: the producer, outside of any RCU section, sleeps until trio
has come that far. A ticket that was taken is always filled.

Trio is the only consumer and goes on consuming until the last lane has ended.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import (
    exchange_acq_rel,
    fetch_add_acq_rel,
    fetch_or_acq_rel,
    load_acquire,
    store_release,
)
from alloc.jit import helper, kernel
from alloc.libc import usleep
from fs.front.lanestate import (
    C_BELL,
    C_RING_HEAD,
    C_RING_TAIL,
    E_A,
    E_B,
    E_C,
    E_KIND,
    E_SEQ,
    E_TIME,
)

CELL_WORDS = 8
FULL_US = 100

_RING = "i8[:,::1]"


@kernel(f"void(i8[::1], {_RING})")
def init(control, ring):
    """An empty ring."""
    for i in range(ring.shape[0]):
        ring[i, E_SEQ] = i
    control[C_RING_HEAD] = control[C_RING_TAIL] = 0


@helper
def post(control, ring, kind, a, b, c, time):
    """Append an entry; sleeps while the ring is full."""
    cells = ring.reshape(-1)
    ticket = fetch_add_acq_rel(control, C_RING_TAIL, 1)
    at = (ticket % ring.shape[0]) * CELL_WORDS
    while load_acquire(cells, at + E_SEQ) != ticket:
        usleep(FULL_US)
    cells[at + E_KIND] = kind
    cells[at + E_A] = a
    cells[at + E_B] = b
    cells[at + E_C] = c
    cells[at + E_TIME] = time
    store_release(cells, at + E_SEQ, ticket + 1)


@kernel(f"i8(i8[::1], {_RING}, i8[:,::1])")
def take(control, ring, out):
    """Move entries into `out`, oldest first; how many."""
    head, size, n = control[C_RING_HEAD], ring.shape[0], 0
    cells = ring.reshape(-1)
    while n < out.shape[0]:
        at = (head % size) * CELL_WORDS
        if load_acquire(cells, at + E_SEQ) != head + 1:
            break
        for word in range(CELL_WORDS):
            out[n, word] = cells[at + word]
        store_release(cells, at + E_SEQ, head + size)
        head += 1
        n += 1
    control[C_RING_HEAD] = head
    return np.int64(n)


@kernel("i8(i8[::1], i8)")
def ring_bell(control, bits):
    """Ring for somebody who is no lane in its loop; write the eventfd afterwards."""
    return fetch_or_acq_rel(control, C_BELL, bits)


@kernel("i8(i8[::1])")
def answer_bell(control):
    """Take the bits that were rung since the last time; read the eventfd first."""
    return exchange_acq_rel(control, C_BELL, 0)
