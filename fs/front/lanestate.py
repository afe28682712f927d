"""What a lane works on: one NamedTuple of arrays, and the words in them that lanes and trio share.

The tuple is made once for each lane (`fs/front/park.py`); all but the last group of arrays are the
volume's own and the same for every lane. Who may change which word, and how, is said beside it;
docs/concurrency.md has the whole picture. Data only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

# What serving a request in the lane comes to.
ANSWERED = 0  # replied, or needs no reply
PARK = 1  # nothing was changed that trio may not continue; trio finishes it (fs/front/opcodes.py)
FORWARD = 2  # pyfuse3's
BROKEN = 3  # malformed: answered with EIO and counted

# control: one array for the whole mount. Each group has a 64-byte line of its own.
C_STOP = 0  # written by trio: lanes leave their loop; GIVE_UP: and wait for pyfuse3 no longer
C_SHUTDOWN = 1  # written by trio: everything is parked or forwarded, nothing answered here
C_READ_ONLY = 2
C_ATIME = 3  # 0 never, 1 relative, 2 strict
C_FORWARD_FD = 4  # lanes send what is pyfuse3's here
C_BELL_FD = 5  # eventfd that wakes trio
C_BUSY_NS = 6  # written by trio: a lane that reads BUSY_TURNS requests in less rings B_BUSY
C_NR_USERS = 7  # written by trio: how many have a memory policy
C_BELL = 8  # doorbell: atomic or of the B_ bits; a lane that finds it 0 writes the eventfd
C_SLOT_LOCK = 16  # spin lock of the stacks of free slots and payloads
C_NR_FREE_SLOTS = 17
C_NR_FREE_PAYLOADS = 18
C_RING_TAIL = 24  # ring: producers' ticket, atomic add
C_RING_HEAD = 32  # ring: the consumer's (trio)
C_USERS = 40  # written by trio: user and policy, by turns (fs/front/userpolicy.py)
USERS_MOST = 16
C_WORDS = C_USERS + 2 * USERS_MOST

GIVE_UP = 2
B_RING = 1  # there is something in the ring
B_LOCKS = 2  # a sleeping lock was released that trio tasks wait for
B_MEMORY = 4  # memory was freed and tasks wait for memory
B_KSWAPD = 8  # free memory is below low
B_FLUSHER = 16  # look at the dirty thresholds
B_SLOTS = 32  # a lane sleeps because no slot, or no payload folio, is free
B_LEFT = 64  # a lane has left its loop
B_BUSY = 128  # requests come quickly (fs/front/latency.py)

BUSY_TURNS = 64  # a power of two

# geo: constants of the mount
G_BLOCK_LOG, G_ORDER_MIN, G_ORDER_MAX, G_INODE_LOG, G_TREE_LEVELS = 0, 1, 2, 3, 4
G_TREE_RECORDS_MIN, G_ROOT_INO, G_BLOCK_SIZE, G_NODE_SLAB, G_BLKSIZE = 5, 6, 7, 8, 9
G_WORDS = 16

# ring entries: 8 words
E_SEQ, E_KIND, E_A, E_B, E_C, E_TIME = 0, 1, 2, 3, 4, 5
# A: slot | fh | nodeid | slot with a BATCH_FORGET | ino; B: - | opcode | count | - | page index
# C: - | - | count | - | pages that the reader wants
K_PARKED, K_RELEASE, K_FORGET, K_FORGETS, K_MARKER = 1, 2, 3, 4, 5

# slots: 8 words for each parked-request buffer
S_ADDR = 0  # byte address in the arena of 8 KiB: the message without a large payload
S_LEN = 1  # bytes of the whole message
S_PAYLOAD = 2  # pfn of the folio with the bytes from RW_ARGS_END on; 0: they are in the slot
S_DONE = 3  # READ, WRITE: bytes already served; WRITE: they are in the page cache
S_LOCKED = 4  # 1: the lane left the inode's IOLOCK held (WRITE: exclusive, READ: shared)
S_TIME = 5  # CLOCK_MONOTONIC ns when the lane read it
S_FD = 6  # where its reply goes: /dev/fuse, or the relay of the queue that it came from
S_ENTRY = 7  # the queue entry that it came from, which owns the payload folio, or -1
S_NODE = 8  # the home of the lane that read it
S_WORDS = 9
SLOT_BYTES = 8192

# me: words of one lane, its own
M_NUMBER = 0
M_FD = 1
M_SLOT = 2  # the slot in hand, -1 if none
M_PAYLOAD = 3  # pfn of the payload folio in hand, 0 if none
M_PAYLOAD_ORDER = 4
M_NR_NODES = 5  # spare radix nodes in hand
M_TIME = 6  # CLOCK_MONOTONIC ns when the present request was read
M_LEN = 7  # bytes of the present request
M_DONE = 8  # what S_DONE is to be when it is parked
M_LOCKED = 9  # what S_LOCKED is to be
M_REASON = 10  # why it is parked: R_
M_ONE = 11  # always 1: what an eventfd is rung with
M_UNWANTED = 12  # replies that the kernel no longer waited for (ENOENT)
M_REFUSED = 13  # replies that the kernel did not take for another reason: a bug
M_LEFT = 14  # the errno with which the lane left its loop, or -1: it was told to stop
M_BELLS = 15  # READ, WRITE: the B_ bits to ring when their locks are dropped
M_HINT = 16  # two words: what blocks.copy_ready tells beside its result
M_HEAD = 18  # bytes of the present message in the slot, before those in the payload folio
M_QUEUE = 19  # the queue of requests that the lane serves, or -1: it reads /dev/fuse
M_ENTRY = 20  # the queue entry of the present request, or -1
M_TURNS = 21  # requests read
M_BUSY = 22  # M_TIME when M_TURNS was last a multiple of BUSY_TURNS
M_ROW = 23  # the row of free pages and objects (alloc/rows.py) that it uses
M_HOME = 24  # the node that it is at home on
M_MARKED = 25  # READ: page index + 1 of a folio on which it found readahead's marker, or 0
M_MARKED_INO = 26  # the file's
M_WORDS = 27

# uring: words of one lane's io_uring; "at" is a byte address in the arena (fs/front/lanequeue.py)
U_FD = 0
U_FUSE = 1  # the descriptor of /dev/fuse
U_RELAY = 2  # the end that the lane reads of the socket pair with replies of other threads
U_FIRST, U_COUNT = 3, 4  # the lane's entries
U_GONE = 5  # how many of them the kernel has given up
U_PENDING = 6  # submissions that the kernel has not seen
U_ERROR = 7  # why: -ENODEV, or what else the kernel said
U_SQ_TAIL_AT, U_SQ_MASK, U_SQ_ARRAY_AT, U_SQES_AT = 8, 9, 10, 11
U_CQ_HEAD_AT, U_CQ_TAIL_AT, U_CQ_MASK, U_CQES_AT = 12, 13, 14, 15
U_WORDS = 16

# entries: 8 words for each place of a queue
N_HEADER = 0  # byte address of its struct fuse_uring_req_header
N_PAYLOAD = 1  # pfn of its payload folio
N_UNIQUE = 2  # the request that is in our hands, or 0
N_RELAY = 3  # where a thread other than the queue's lane sends its reply
N_WORDS = 8

LANE_NODES = 24  # spare radix nodes a lane holds at most

# reasons for parking
(
    R_OPCODE, R_MISS, R_LOCK, R_MEMORY, R_DIRTY, R_MAP, R_SPACE, R_LIST, R_TIMES, R_SYNC,
    R_PRIVILEGES, R_SHUTDOWN, R_NR,
) = range(13)  # fmt: skip
REASONS = (
    "opcode", "miss", "lock", "memory", "dirty", "map", "space", "list", "times", "sync",
    "privileges", "shutdown",
)  # fmt: skip

# stats: by lane, opcode and kind
ST_ANSWERED, ST_PARKED, ST_FORWARDED, ST_BROKEN = 0, 1, 2, 3
ST_KINDS = 4
HIST_BUCKETS = 32  # bucket b: [2^b, 2^(b+1)) ns


class Lane(NamedTuple):
    """Shapes: n pages, the arena of n * 4096 bytes."""

    # memory: the arena in four views
    mem: Any  # u1
    m4: Any  # u4
    m8: Any  # u8
    s8: Any  # i8: the same bytes as m8, signed, for arithmetic
    # the allocator (alloc.page): Buddy, then Slabs' rest, then what the page cache needs
    words: Any  # i8
    flags: Any  # u4 [n]
    order: Any  # u1 [n]
    refs: Any  # i4 [n]
    lru_next: Any  # u4 [n]
    lru_prev: Any  # u4 [n]
    mapping: Any  # u4 [n]
    free_low: Any  # u8 [n]
    free_high: Any  # u8 [n]
    index: Any  # i8 [n]: the same memory as free_high
    blocks: Any  # u4 [n]
    # the filesystem
    ibuckets: Any  # u4: hash of the inode cache
    dbuckets: Any  # u4: hash of the dentry cache
    dirty: Any  # i8: writeback.dirty counts
    space: Any  # i8: fs.space words
    totals: Any  # i8: figures for STATFS (fs.space T_)
    rcu: Any  # i8: alloc.rcu words
    geo: Any  # i8 [G_WORDS]
    # the front
    control: Any  # i8 [C_WORDS]
    ring: Any  # i8 [entries, 8]
    slots: Any  # i8 [slots, S_WORDS]
    free_slots: Any  # i8 [slots]: a stack
    free_payloads: Any  # i8 [payloads]: a stack of pfns
    entries: Any  # i8 [entries of all queues, N_WORDS]
    # this lane's own
    me: Any  # i8 [M_WORDS]
    uring: Any  # i8 [U_WORDS]
    nodes: Any  # u4 [LANE_NODES]: spare radix nodes
    iov: Any  # u8 [2 * 1024]: struct iovec for readv and writev
    out: Any  # u1 [4096]: the reply's header and small bodies
    out4: Any  # u4: the same bytes
    out8: Any  # i8: the same bytes
    counts: Any  # i8 [OPCODES, ST_KINDS]
    reasons: Any  # i8 [OPCODES, R_NR]
    hist: Any  # i8 [OPCODES, 2, HIST_BUCKETS]: answered here, finished by trio


def sample() -> Lane:
    """A Lane of the smallest arrays: what kernels that take one are compiled for."""
    kinds = {"mem": "u1", "m4": "u4", "m8": "u8", "flags": "u4", "order": "u1", "refs": "i4"}
    kinds |= dict.fromkeys(("lru_next", "lru_prev", "mapping", "blocks"), "u4")
    kinds |= dict.fromkeys(("free_low", "free_high", "iov"), "u8")
    kinds |= dict.fromkeys(("ibuckets", "dbuckets", "nodes", "out4"), "u4") | {"out": "u1"}
    tables = ("ring", "slots", "entries", "counts", "reasons")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(tables, (1, 1)) | {"hist": (1, 1, 1)}
    return Lane(*(np.zeros(shapes.get(f, 1), kinds.get(f, "i8")) for f in Lane._fields))
