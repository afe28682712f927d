"""The lane: a loop without the GIL that reads /dev/fuse and answers what needs no waiting.

Each turn: have a slot and a payload folio in hand, read one request into them (80 bytes into the
slot, the rest into the payload; or take it from the lane's queue, `fs/front/lanequeue.py`), serve
it inside an RCU section, and settle what serving came to: answered, parked for trio, or forwarded
to pyfuse3. Whatever may block (the read, the full ring, the socket to pyfuse3, the want of buffers)
happens outside of the section, so the top of the loop is RCU's quiescent state. A request is in
one place at any time, so it is answered once: by its lane, by trio, which owns the slot from the
ring entry on, or by pyfuse3.

INTERRUPT is answered with ENOSYS, after which the kernel sends no more: our requests cannot be
interrupted, like XFS's, and for what was forwarded pyfuse3 would only note it. A client that is
killed waits until its request ends. FLUSH is answered likewise: closing a file writes nothing.

The loop ends when the connection does (ENODEV), or when it is told to by control[C_STOP] and a
signal. After a shutdown nothing is answered here but what gives things back.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import errno

import numpy as np

from alloc.atomic import load_acquire
from alloc.jit import helper, kernel
from alloc.libc import address, memcpy, monotonic_ns, readv, usleep, writev
from alloc.page import PAGE_SHIFT, PAGE_SIZE
from alloc.rcu import rcu_enter, rcu_exit
from fs.front import lanename, lanequeue, wire
from fs.front.buffers import pop
from fs.front.laneread import serve_read
from fs.front.lanereply import bell, message, note_turn, reply, u32, u64
from fs.front.lanestate import (
    ANSWERED,
    B_LEFT,
    B_RING,
    B_SLOTS,
    BROKEN,
    C_FORWARD_FD,
    C_NR_FREE_PAYLOADS,
    C_NR_FREE_SLOTS,
    C_SHUTDOWN,
    C_STOP,
    FORWARD,
    GIVE_UP,
    HIST_BUCKETS,
    K_FORGET,
    K_FORGETS,
    K_MARKER,
    K_PARKED,
    K_RELEASE,
    M_DONE,
    M_ENTRY,
    M_FD,
    M_HEAD,
    M_HOME,
    M_LEFT,
    M_LEN,
    M_LOCKED,
    M_MARKED,
    M_MARKED_INO,
    M_NUMBER,
    M_PAYLOAD,
    M_PAYLOAD_ORDER,
    M_QUEUE,
    M_REASON,
    M_SLOT,
    M_TIME,
    PARK,
    R_OPCODE,
    R_SHUTDOWN,
    S_DONE,
    S_ENTRY,
    S_FD,
    S_LEN,
    S_LOCKED,
    S_NODE,
    S_PAYLOAD,
    S_TIME,
    SLOT_BYTES,
    ST_ANSWERED,
    ST_BROKEN,
    ST_FORWARDED,
    ST_PARKED,
    sample,
)
from fs.front.lanewrite import serve_write
from fs.front.ring import post
from fs.front.wire import BODY, H_LEN, H_NODEID, H_OPCODE, IN_HEADER, RW_ARGS_END, RW_SIZE

SLEEP_US = 100
READDIR_MOST = 64 << 10  # bytes of a listing: a reply must fit into the socket's buffer
EINTR, EAGAIN, ENODEV, ENOENT = errno.EINTR, errno.EAGAIN, errno.ENODEV, errno.ENOENT
EIO, ENOSYS, ENOTTY = errno.EIO, errno.ENOSYS, errno.ENOTTY

# What a lane does with an opcode; what is not named goes to pyfuse3.
O_FORWARD, O_SERVE, O_PARK, O_RELEASE, O_FORGET, O_FORGETS, O_REFUSE, O_LIST = range(8)
_WAYS = {
    O_SERVE: ("LOOKUP", "GETATTR", "READ", "WRITE", "STATFS", "GETXATTR", "ACCESS", "STATX"),
    O_PARK: (
        *("FALLOCATE", "LSEEK", "COPY_FILE_RANGE", "COPY_FILE_RANGE_64", "TMPFILE"),
        *("SYNCFS", "IOCTL", "CREATE", "MKDIR", "UNLINK", "RMDIR", "OPEN"),
    ),
    O_RELEASE: ("RELEASE", "RELEASEDIR"),
    O_FORGET: ("FORGET",),
    O_FORGETS: ("BATCH_FORGET",),
    O_REFUSE: ("FLUSH", "INTERRUPT"),
    O_LIST: ("READDIR", "READDIRPLUS"),
}
# The least bytes of a request's arguments, where somebody here reads them.
_ARGUMENTS = {
    "READ": 40, "WRITE": 40, "READDIR": 40, "READDIRPLUS": 40, "LOOKUP": 2, "GETXATTR": 10,
    "RELEASE": 24, "RELEASEDIR": 24, "FORGET": 8, "BATCH_FORGET": 8, "FALLOCATE": 32,
    "LSEEK": 24, "COPY_FILE_RANGE": 56, "COPY_FILE_RANGE_64": 56, "TMPFILE": 18, "SYNCFS": 8,
    "IOCTL": 32, "STATX": 24, "CREATE": 18, "MKDIR": 10, "UNLINK": 2, "RMDIR": 2, "OPEN": 8,
}
WAY = np.zeros(wire.OPCODES, np.int64)
LEAST = np.full(wire.OPCODES, IN_HEADER, np.int64)
for _way, _names in _WAYS.items():
    WAY[[getattr(wire, name) for name in _names]] = _way
for _name, _bytes in _ARGUMENTS.items():
    LEAST[getattr(wire, _name)] += _bytes


# -- reading ------------------------------------------------------------------------------------


@helper
def _goes_on(l):
    """Whether the lane is to look for more: it was not told to stop, or owes a queue answers."""
    stop = load_acquire(l.control, C_STOP)
    return stop == 0 or (stop < GIVE_UP and l.me[M_QUEUE] >= 0 and lanequeue.owes(l))


@helper
def _equip(l):
    """Have a slot and a payload folio in hand, waiting for them; False when told to stop."""
    asked = False
    while True:
        if l.me[M_SLOT] < 0:
            l.me[M_SLOT] = pop(l.control, C_NR_FREE_SLOTS, l.free_slots)
        if l.me[M_PAYLOAD] == 0 and l.me[M_QUEUE] < 0:
            l.me[M_PAYLOAD] = max(pop(l.control, C_NR_FREE_PAYLOADS, l.free_payloads), 0)
        if l.me[M_SLOT] >= 0 and (l.me[M_PAYLOAD] != 0 or l.me[M_QUEUE] >= 0):
            return True
        if not _goes_on(l):
            return False
        if not asked:
            asked = True
            bell(l, B_SLOTS)
        usleep(SLEEP_US)


@helper
def _vector(l, rest):
    """Two iovecs: the message's head in the slot, and `rest` bytes of the payload folio."""
    l.iov[0] = address(l.mem, message(l))
    l.iov[1] = l.me[M_HEAD]
    l.iov[2] = address(l.mem, l.me[M_PAYLOAD] << PAGE_SHIFT)
    l.iov[3] = rest


@helper
def _receive(l):
    """Read one request; its bytes, or -errno when there are no more to come, or 0 to look again."""
    if l.me[M_QUEUE] >= 0:
        return lanequeue.receive(l)
    l.me[M_HEAD] = RW_ARGS_END
    _vector(l, PAGE_SIZE << l.me[M_PAYLOAD_ORDER])
    n = readv(l.me[M_FD], l.iov, 2)
    if n > 0:
        l.me[M_TIME] = monotonic_ns()
        l.me[M_LEN] = n
        return n
    if n == -EINTR or n == -EAGAIN or n == -ENOENT:
        return 0
    return n if n < 0 else -ENODEV


@helper
def _complete(l):
    """Copy the rest of a message that fits to the head in the slot."""
    start, at = l.me[M_PAYLOAD] << PAGE_SHIFT, l.me[M_HEAD]
    memcpy(l.mem, message(l) + at, l.mem, start, l.me[M_LEN] - at)


@helper
def _opcode(l):
    """The opcode of a request that is whole, with everything but a large payload in the slot.

    -1: too short for what it says it is.
    """
    n = l.me[M_LEN]
    if n < IN_HEADER or u32(l, H_LEN) != n:
        return -1
    op = u32(l, H_OPCODE)
    if op >= wire.OPCODES:
        return 0
    if n < LEAST[op]:
        return -1
    if op == wire.WRITE and l.me[M_HEAD] != RW_ARGS_END:
        return -1
    if op == wire.READ and l.me[M_ENTRY] >= 0 and u32(l, RW_SIZE) > lanequeue.room(l):
        return -1
    if l.me[M_HEAD] < n <= SLOT_BYTES and op != wire.WRITE:
        _complete(l)
    return op


# -- serving ------------------------------------------------------------------------------------


@helper
def _serve(l, op):
    """Answer it if that needs no waiting. In an RCU section."""
    if l.control[C_SHUTDOWN] != 0:
        l.me[M_REASON] = R_SHUTDOWN
        kept = op == wire.READ or op == wire.WRITE or op == wire.STATX
        return np.int64(PARK if kept else FORWARD)
    if op == wire.READ:
        return np.int64(serve_read(l))
    if op == wire.WRITE:
        return np.int64(serve_write(l))
    if op == wire.LOOKUP:
        return np.int64(lanename.serve_lookup(l))
    if op == wire.GETATTR:
        return np.int64(lanename.serve_getattr(l))
    if op == wire.GETXATTR:
        return np.int64(lanename.serve_getxattr(l))
    if op == wire.STATFS:
        return np.int64(lanename.serve_statfs(l))
    if op == wire.STATX:
        return np.int64(lanename.serve_statx(l))
    return np.int64(lanename.serve_access(l))


@helper
def _post(l, kind, a, b, c):
    post(l.control, l.ring, kind, a, b, c, l.me[M_TIME])
    bell(l, B_RING)


@helper
def _forget_many(l):
    """A BATCH_FORGET goes to trio with its slot, or to pyfuse3 if it does not fit into one."""
    n = l.me[M_LEN]
    if n > SLOT_BYTES:
        return FORWARD
    if u32(l, BODY) * 16 + BODY + 8 > n:
        return BROKEN
    slot = l.me[M_SLOT]
    l.slots[slot, S_LEN] = n
    l.me[M_SLOT] = -1
    _post(l, K_FORGETS, slot, 0, 0)
    return ANSWERED


@helper
def _post_marker(l):
    """The READ came upon readahead's marker: trio reads the next window."""
    pages = (u32(l, RW_SIZE) + PAGE_SIZE - 1) >> PAGE_SHIFT
    _post(l, K_MARKER, l.me[M_MARKED_INO], l.me[M_MARKED] - 1, pages)
    l.me[M_MARKED] = 0


@helper
def _take(l, op):
    """What becomes of a request, by its opcode: ANSWERED, PARK, FORWARD or BROKEN."""
    way = WAY[op]
    l.me[M_DONE] = 0
    l.me[M_LOCKED] = 0
    l.me[M_REASON] = R_OPCODE
    code = np.int64(FORWARD)
    if way == O_SERVE:
        rcu_enter(l.rcu, l.me[M_NUMBER])
        code = _serve(l, op)
        rcu_exit(l.rcu, l.me[M_NUMBER])
        if l.me[M_MARKED] != 0:
            _post_marker(l)
    elif way == O_PARK:
        code = np.int64(PARK)
    elif way == O_RELEASE:
        _post(l, K_RELEASE, u64(l, BODY), op, 0)
        code = reply(l, 0, 0)
    elif way == O_FORGET:
        _post(l, K_FORGET, u64(l, H_NODEID), 0, u64(l, BODY))
        code = np.int64(ANSWERED)
    elif way == O_FORGETS:
        code = np.int64(_forget_many(l))
    elif way == O_REFUSE:
        code = reply(l, ENOSYS, 0)
    elif way == O_LIST and u32(l, RW_SIZE) > READDIR_MOST:
        l.m4[(message(l) + RW_SIZE) >> 2] = READDIR_MOST
    return code


# -- settling -----------------------------------------------------------------------------------


@helper
def _park(l, op):
    """Hand the request to trio with its slot, and with the payload folio if it is large."""
    n, slot = l.me[M_LEN], l.me[M_SLOT]
    payload = np.int64(0)
    if n > SLOT_BYTES:
        payload = l.me[M_PAYLOAD]
        l.me[M_PAYLOAD] = 0
    elif op == wire.WRITE and n > RW_ARGS_END:
        _complete(l)
    l.slots[slot, S_LEN] = n
    l.slots[slot, S_PAYLOAD] = payload
    l.slots[slot, S_DONE] = l.me[M_DONE]
    l.slots[slot, S_LOCKED] = l.me[M_LOCKED]
    l.slots[slot, S_TIME] = l.me[M_TIME]
    l.slots[slot, S_FD] = l.me[M_FD]
    l.slots[slot, S_ENTRY] = l.me[M_ENTRY]
    l.slots[slot, S_NODE] = l.me[M_HOME]
    l.me[M_SLOT] = -1
    l.reasons[op, l.me[M_REASON]] += 1
    _post(l, K_PARKED, slot, op, 0)


@helper
def _forward(l):
    """Send the request to pyfuse3 as it came; answer with EIO if nobody is there."""
    n = l.me[M_LEN]
    put = np.int64(-EINTR)
    while put == -EINTR and load_acquire(l.control, C_STOP) < GIVE_UP:
        _vector(l, max(n - l.me[M_HEAD], 0))
        l.iov[1] = min(n, l.me[M_HEAD])
        put = writev(l.control[C_FORWARD_FD], l.iov, 2 if n > l.me[M_HEAD] else 1)
    if put != n and u32(l, H_OPCODE) != wire.BATCH_FORGET:
        reply(l, EIO, 0)


@helper
def _bucket(ns):
    """log2 of a time, within the histogram."""
    bucket = 0
    while ns > 1 and bucket < HIST_BUCKETS - 1:
        ns >>= 1
        bucket += 1
    return bucket


@helper
def _settle(l, op, code):
    """Do what serving came to, and count it."""
    if code == PARK and l.me[M_LEN] > SLOT_BYTES and op != wire.WRITE:
        code = np.int64(BROKEN)
    if code == ANSWERED:
        l.counts[op, ST_ANSWERED] += 1
        l.hist[op, 0, _bucket(monotonic_ns() - l.me[M_TIME])] += 1
    elif code == PARK:
        l.counts[op, ST_PARKED] += 1
        _park(l, op)
    elif code == FORWARD:
        l.counts[op, ST_FORWARDED] += 1
        _forward(l)
    else:
        l.counts[op, ST_BROKEN] += 1
        reply(l, ENOTTY if op == wire.IOCTL else EIO, 0)


@kernel(lambda: (sample(),))
def run(l):
    """Serve requests until the connection ends or control[C_STOP] says so."""
    left = np.int64(-1)
    if l.me[M_QUEUE] >= 0 and load_acquire(l.control, C_STOP) == 0:
        lanequeue.register(l)
    while _goes_on(l) and _equip(l):
        n = _receive(l)
        if n < 0:
            left = -n
            break
        if n == 0:
            continue
        note_turn(l)
        op = _opcode(l)
        if op < 0:
            _settle(l, 0, np.int64(BROKEN))
        else:
            _settle(l, op, _take(l, op))
    l.me[M_LEFT] = left
    bell(l, B_LEFT)
