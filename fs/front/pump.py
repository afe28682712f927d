"""The pump: pyfuse3's replies, copied from the socket pair to /dev/fuse without the GIL.

pyfuse3 writes each reply as one message of a SOCK_SEQPACKET pair, and the pump writes it as one
message to where the request came from: /dev/fuse, or the relay of a queue's lane. A reply
that the kernel does not want any more (ENOENT) is dropped, as pyfuse3 itself drops it. One that it
refuses for another reason would leave its request without an answer, so the request is answered
with EIO. Ends when pyfuse3's side is closed or the connection is gone.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import errno

from alloc.jit import helper, kernel
from alloc.libc import read_bytes, write_bytes
from fs.front.lanequeue import entry_of
from fs.front.lanestate import N_RELAY
from fs.front.wire import OUT_HEADER

REPLY_MOST = (64 << 10) + 4096  # an attribute's value or a listing, and its header
P_FORWARDED, P_UNWANTED, P_REFUSED, P_WORDS = 0, 1, 2, 4
EINTR, ENOENT, ENODEV, EIO = errno.EINTR, errno.ENOENT, errno.ENODEV, errno.EIO


@helper
def _refused(to, words):
    """Answer the request whose reply was refused; notifications have no request."""
    if words[1] != 0:
        words[0] = OUT_HEADER | (-EIO << 32)
        write_bytes(to, words, 0, OUT_HEADER)


@kernel("void(i8, i8, i8[::1], i8[::1], i8[:,::1])")
def run(source, fuse, words, counts, entries):
    """Copy messages from `source` to `fuse` through `words` until there are no more."""
    while True:
        n = read_bytes(source, words, 0, words.size * 8)
        if n == -EINTR:
            continue
        if n <= 0:
            return
        entry = entry_of(entries, words[1])
        to = fuse if entry < 0 else entries[entry, N_RELAY]
        put = write_bytes(to, words, 0, n)
        if put == n:
            counts[P_FORWARDED] += 1
        elif put == -ENOENT or put == -ENODEV:
            counts[P_UNWANTED] += 1
        else:
            counts[P_REFUSED] += 1
            _refused(to, words)
