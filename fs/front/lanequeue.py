"""One lane's queue of FUSE over io_uring: requests come and replies go in one system call.

The kernel keeps a queue of requests for each processor. A lane registers places (`entries`) for
one queue: each has a header (struct fuse_uring_req_header, linux/fuse.h) and a payload folio. A
completion says that a request has been put into a place; the reply is put into the same place and
submitted, which asks for the next request. So a place is the kernel's until its completion and
ours until its submission; entries[.., N_UNIQUE] names the request while it is ours.

Only the queue's lane may submit. Other threads (trio, the pump) send their replies to the lane
through a socket pair, its relay: a header and the body, or the header alone when the body is in
the place already. Rings and headers lie in the arena (io_uring with the memory of the application).

FORGET and INTERRUPT do not come here but are read from /dev/fuse by another lane. A place ends
with an error in its completion (the connection ended); the queue ends when all places have.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import errno

import numpy as np

from alloc.atomic import load_acquire, store_release
from alloc.jit import helper
from alloc.libc import address, io_uring_enter, memcpy, monotonic_ns, peek_bytes, read_bytes, readv
from alloc.page import PAGE_SHIFT, PAGE_SIZE
from fs.front.lanestate import (
    M_ENTRY,
    M_HEAD,
    M_LEN,
    M_PAYLOAD,
    M_PAYLOAD_ORDER,
    M_QUEUE,
    M_REFUSED,
    M_SLOT,
    M_TIME,
    M_UNWANTED,
    N_HEADER,
    N_PAYLOAD,
    N_UNIQUE,
    S_ADDR,
    U_COUNT,
    U_CQ_HEAD_AT,
    U_CQ_MASK,
    U_CQ_TAIL_AT,
    U_CQES_AT,
    U_ERROR,
    U_FD,
    U_FIRST,
    U_FUSE,
    U_GONE,
    U_PENDING,
    U_RELAY,
    U_SQ_ARRAY_AT,
    U_SQ_MASK,
    U_SQ_TAIL_AT,
    U_SQES_AT,
)
from fs.front.wire import H_LEN, H_UNIQUE, IN_HEADER, OUT_HEADER

# struct fuse_uring_req_header
IN_OUT, OP_IN, OP_IN_BYTES = 0, 128, 128
COMMIT_ID, PAYLOAD_SIZE, HEADER_BYTES = 264, 272, 288
IOVECS = 320  # behind it: two struct iovec, for the registration
PLACE_BYTES = 512

REGISTER, COMMIT_AND_FETCH = 1, 2  # enum fuse_uring_cmd
OP_POLL_ADD, OP_URING_CMD, POLLIN = 6, 46, 1
SQE_BYTES, CQE_BYTES = 128, 16
GETEVENTS = 1
RELAY = -1  # user_data of the look at the relay

EINTR, EAGAIN, EBUSY, ENODEV = errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.ENODEV
ENDED = (errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED)


@helper
def room(l):
    """Bytes of a place's payload."""
    return PAGE_SIZE << l.me[M_PAYLOAD_ORDER]


# -- submitting ---------------------------------------------------------------------------------


@helper
def _submit(l, code, fd, detail, addr, length, user, commit):
    """Put one submission into the ring; the kernel sees it at the next `io_uring_enter`."""
    u = l.uring
    tail = np.int64(l.m4[u[U_SQ_TAIL_AT] >> 2])
    at = tail & u[U_SQ_MASK]
    sqe = (u[U_SQES_AT] + at * SQE_BYTES) >> 3
    for word in range(SQE_BYTES >> 3):
        l.s8[sqe + word] = 0
    l.s8[sqe] = code | fd << 32
    l.s8[sqe + 1] = detail
    l.s8[sqe + 2] = addr
    l.s8[sqe + 3] = length
    l.s8[sqe + 4] = user
    l.s8[sqe + 7] = commit
    l.s8[sqe + 8] = max(l.me[M_QUEUE], 0)
    l.m4[(u[U_SQ_ARRAY_AT] >> 2) + at] = at
    store_release(l.m4, u[U_SQ_TAIL_AT] >> 2, tail + 1)
    u[U_PENDING] += 1


@helper
def _watch_relay(l):
    """Have the lane told when a reply waits in the relay."""
    _submit(l, OP_POLL_ADD, l.uring[U_RELAY], 0, 0, POLLIN << 32, RELAY, 0)


@helper
def register(l):
    """Offer every place of the lane to the kernel."""
    u = l.uring
    for entry in range(u[U_FIRST], u[U_FIRST] + u[U_COUNT]):
        header = l.entries[entry, N_HEADER]
        iov = (header + IOVECS) >> 3
        l.s8[iov] = address(l.mem, header)
        l.s8[iov + 1] = HEADER_BYTES
        l.s8[iov + 2] = address(l.mem, l.entries[entry, N_PAYLOAD] << PAGE_SHIFT)
        l.s8[iov + 3] = room(l)
        place = address(l.mem, header + IOVECS)
        _submit(l, OP_URING_CMD, u[U_FUSE], REGISTER, place, 2, entry, 0)
    _watch_relay(l)


@helper
def _commit(l, entry, nbytes):
    """Submit the reply whose header and nbytes of body are in the place."""
    header = l.entries[entry, N_HEADER]
    l.m4[(header + PAYLOAD_SIZE) >> 2] = nbytes
    commit = l.s8[(header + COMMIT_ID) >> 3]
    l.entries[entry, N_UNIQUE] = 0
    _submit(l, OP_URING_CMD, l.uring[U_FUSE], COMMIT_AND_FETCH, 0, 0, entry, commit)


@helper
def put_body(l, entry, nbytes):
    """Put the body that was built in l.out into the place."""
    if nbytes > 0:
        memcpy(l.mem, l.entries[entry, N_PAYLOAD] << PAGE_SHIFT, l.out, OUT_HEADER, nbytes)


@helper
def commit(l, entry, nbytes):
    """Answer with the header in l.out and the nbytes of body in the place."""
    header = l.entries[entry, N_HEADER] >> 3
    l.s8[header] = l.out8[0]
    l.s8[header + 1] = l.out8[1]
    _commit(l, entry, nbytes)


# -- replies of other threads -------------------------------------------------------------------


@helper
def entry_of(entries, unique):
    """The place of a request in our hands, or -1; notifications, without a request, have none."""
    if unique != 0:
        for entry in range(entries.shape[0]):
            if load_acquire(entries.reshape(-1), entry * entries.shape[1] + N_UNIQUE) == unique:
                return np.int64(entry)
    return np.int64(-1)


@helper
def _take_replies(l):
    """Submit what other threads have answered; one message of the relay is one reply."""
    relay, most = l.uring[U_RELAY], room(l)
    while peek_bytes(relay, l.out, 0, OUT_HEADER) == OUT_HEADER:
        entry = entry_of(l.entries, l.out8[1])
        if entry < 0:
            read_bytes(relay, l.out, 0, OUT_HEADER)
            l.me[M_UNWANTED] += 1
            continue
        header = l.entries[entry, N_HEADER]
        l.iov[0] = address(l.mem, header)
        l.iov[1] = OUT_HEADER
        l.iov[2] = address(l.mem, l.entries[entry, N_PAYLOAD] << PAGE_SHIFT)
        l.iov[3] = most
        readv(relay, l.iov, 2)
        nbytes = np.int64(l.m4[header >> 2]) - OUT_HEADER
        _commit(l, entry, min(max(nbytes, 0), most))


# -- requests -----------------------------------------------------------------------------------


@helper
def owes(l):
    """Whether a request of this queue is in our hands."""
    first, found = l.uring[U_FIRST], False
    for entry in range(first, first + l.uring[U_COUNT]):
        found |= l.entries[entry, N_UNIQUE] != 0
    return found


@helper
def _wait(l):
    """Submit, and wait for a completion: 0 to look, or -errno if no more will come."""
    if l.uring[U_GONE] == l.uring[U_COUNT]:
        return np.int64(l.uring[U_ERROR])
    done = io_uring_enter(l.uring[U_FD], l.uring[U_PENDING], 1, GETEVENTS)
    if done >= 0:
        l.uring[U_PENDING] -= done
        return np.int64(0)
    return np.int64(0 if done == -EINTR or done == -EAGAIN or done == -EBUSY else done)


@helper
def _gone(l, result):
    """A place that the kernel has given up."""
    l.uring[U_GONE] += 1
    if -result not in ENDED:
        l.me[M_REFUSED] += 1
        l.uring[U_ERROR] = result
    elif l.uring[U_ERROR] == 0:
        l.uring[U_ERROR] = -ENODEV


@helper
def _have(l, entry):
    """Put the head of a place's request into the slot in hand; bytes of the whole message."""
    header = l.entries[entry, N_HEADER]
    n = np.int64(l.m4[(header + H_LEN) >> 2])
    rest = np.int64(l.m4[(header + PAYLOAD_SIZE) >> 2])
    arguments = min(max(n - IN_HEADER - rest, 0), OP_IN_BYTES)
    at = l.slots[l.me[M_SLOT], S_ADDR]
    memcpy(l.mem, at, l.mem, header, IN_HEADER)
    memcpy(l.mem, at + IN_HEADER, l.mem, header + OP_IN, arguments)
    l.me[M_HEAD] = IN_HEADER + arguments
    l.me[M_PAYLOAD] = l.entries[entry, N_PAYLOAD]
    l.me[M_ENTRY] = entry
    l.me[M_LEN] = IN_HEADER + arguments + rest
    l.me[M_TIME] = monotonic_ns()
    unique = l.s8[(header + H_UNIQUE) >> 3]
    store_release(l.entries.reshape(-1), entry * l.entries.shape[1] + N_UNIQUE, unique)
    return l.me[M_LEN]


@helper
def receive(l):
    """Take one completion: bytes of the request in hand, 0 to look again, -errno at the end."""
    u = l.uring
    head = np.int64(l.m4[u[U_CQ_HEAD_AT] >> 2])
    if head == np.int64(load_acquire(l.m4, u[U_CQ_TAIL_AT] >> 2)):
        return _wait(l)
    cqe = (u[U_CQES_AT] + (head & u[U_CQ_MASK]) * CQE_BYTES) >> 3
    entry = l.s8[cqe]
    result = l.s8[cqe + 1] << 32 >> 32
    store_release(l.m4, u[U_CQ_HEAD_AT] >> 2, head + 1)
    if entry == RELAY:
        _take_replies(l)
        if result >= 0:
            _watch_relay(l)
    elif result < 0:
        _gone(l, result)
    else:
        return _have(l, entry)
    return np.int64(0)
