"""INIT: what the kernel offers, what pyfuse3 asks for, and what we add to that.

pyfuse3 speaks an older protocol than the kernel and asks for the least. Its reply passes through
our hands, so features that it does not know are set there, each only if the kernel offers it.
What it must not use on a socket (splice) is taken out of the offer it sees. POSIX and BSD locks
are not asked for: the kernel keeps them itself.

Only bytes in, bytes out; linux/fuse.h has the formats (struct fuse_init_in, fuse_init_out).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fs.front.wire import IN_HEADER, OUT_HEADER

PAGE_SIZE = 4096
# Flags of INIT, by name; the names are linux/fuse.h's without FUSE_.
FLAGS = {
    "ASYNC_READ": 0, "POSIX_LOCKS": 1, "FILE_OPS": 2, "ATOMIC_O_TRUNC": 3, "EXPORT_SUPPORT": 4,
    "BIG_WRITES": 5, "DONT_MASK": 6, "SPLICE_WRITE": 7, "SPLICE_MOVE": 8, "SPLICE_READ": 9,
    "FLOCK_LOCKS": 10, "HAS_IOCTL_DIR": 11, "AUTO_INVAL_DATA": 12, "DO_READDIRPLUS": 13,
    "READDIRPLUS_AUTO": 14, "ASYNC_DIO": 15, "WRITEBACK_CACHE": 16, "NO_OPEN_SUPPORT": 17,
    "PARALLEL_DIROPS": 18, "HANDLE_KILLPRIV": 19, "POSIX_ACL": 20, "ABORT_ERROR": 21,
    "MAX_PAGES": 22, "CACHE_SYMLINKS": 23, "NO_OPENDIR_SUPPORT": 24, "EXPLICIT_INVAL_DATA": 25,
    "MAP_ALIGNMENT": 26, "SUBMOUNTS": 27, "HANDLE_KILLPRIV_V2": 28, "SETXATTR_EXT": 29,
    "INIT_EXT": 30, "SECURITY_CTX": 32, "HAS_INODE_DAX": 33, "CREATE_SUPP_GROUP": 34,
    "HAS_EXPIRE_ONLY": 35, "DIRECT_IO_ALLOW_MMAP": 36, "PASSTHROUGH": 37, "NO_EXPORT_SUPPORT": 38,
    "HAS_RESEND": 39, "ALLOW_IDMAP": 40, "OVER_IO_URING": 41, "REQUEST_TIMEOUT": 42,
}  # fmt: skip
SPLICE = ("SPLICE_WRITE", "SPLICE_MOVE", "SPLICE_READ")
# What we add wherever the kernel offers it. ASYNC_DIO and BIG_WRITES are pyfuse3's wish as well.
WANTED = (
    *("ASYNC_READ", "BIG_WRITES", "ASYNC_DIO", "PARALLEL_DIROPS", "CACHE_SYMLINKS"),
    *("MAX_PAGES", "HANDLE_KILLPRIV_V2", "HAS_IOCTL_DIR"),
)
URING = "OVER_IO_URING"
SHARED_MMAP = "DIRECT_IO_ALLOW_MMAP"  # only without a page cache of the kernel's

# Offsets in the messages: the request's and the reply's.
I_FLAGS, I_FLAGS2 = IN_HEADER + 12, IN_HEADER + 16
O_READAHEAD, O_FLAGS = OUT_HEADER + 8, OUT_HEADER + 12
O_BACKGROUND, O_MAX_WRITE, O_MAX_PAGES = OUT_HEADER + 16, OUT_HEADER + 20, OUT_HEADER + 28
O_FLAGS2, O_END = OUT_HEADER + 32, OUT_HEADER + 64


def mask(*names: str) -> int:
    """The bits of these flags."""
    return sum(1 << FLAGS[name] for name in names)


def flag_names(bits: int) -> list[str]:
    """The names of the bits set; a bit without a name is called by its number."""
    known = {number: name for name, number in FLAGS.items()}
    return [known.get(bit, f"bit {bit}") for bit in range(64) if bits >> bit & 1]


@dataclass(frozen=True)
class Wish:
    """What a mount asks for beyond pyfuse3."""

    max_write: int
    max_background: int
    shared_mmap: bool
    uring: bool = False


@dataclass(frozen=True)
class Outcome:
    """What was agreed upon: shown by `nofailfs info`, kept in the run file."""

    protocol: str
    max_write: int
    max_pages: int
    max_readahead: int
    max_background: int
    congestion_threshold: int
    flags: list[str]


def offered(request: bytes) -> int:
    """The 64 flags of an INIT request."""
    flags: int = struct.unpack_from("=I", request, I_FLAGS)[0]
    if flags & mask("INIT_EXT") and len(request) >= I_FLAGS2 + 4:
        flags |= struct.unpack_from("=I", request, I_FLAGS2)[0] << 32
    return flags


def for_pyfuse3(request: bytes) -> bytes:
    """The offer as pyfuse3 shall see it."""
    seen = bytearray(request)
    flags = struct.unpack_from("=I", seen, I_FLAGS)[0]
    struct.pack_into("=I", seen, I_FLAGS, flags & ~mask(*SPLICE))
    return bytes(seen)


def is_good(reply: bytes) -> bool:
    """Whether pyfuse3 accepted, in the form that we know how to change."""
    return len(reply) == O_END and struct.unpack_from("=i", reply, 4)[0] == 0


def for_kernel(request: bytes, reply: bytes, wish: Wish) -> tuple[bytes, Outcome]:
    """pyfuse3's reply with our additions, and what that comes to."""
    offer = offered(request)
    wanted = mask(*WANTED) | (mask(SHARED_MMAP) if wish.shared_mmap else 0)
    wanted |= mask(URING) if wish.uring else 0
    agreed = offer & wanted
    agreed |= struct.unpack_from("=I", reply, O_FLAGS)[0]
    agreed |= offer & mask("INIT_EXT") if agreed >> 32 else 0
    if not agreed & mask("INIT_EXT"):
        agreed &= (1 << 32) - 1
    pages = wish.max_write // PAGE_SIZE
    if not wish.uring:
        pages += 1  # for buffers that begin inside a page; a place of a queue has no room for it
    if not agreed & mask("MAX_PAGES"):
        pages = 32
    max_write = min(wish.max_write, pages * PAGE_SIZE)
    threshold = max(wish.max_background * 3 // 4, 1)
    out = bytearray(reply)
    struct.pack_into("=I", out, O_FLAGS, agreed & 0xFFFFFFFF)
    struct.pack_into("=I", out, O_FLAGS2, agreed >> 32)
    struct.pack_into("=HH", out, O_BACKGROUND, wish.max_background, threshold)
    struct.pack_into("=I", out, O_MAX_WRITE, max_write)
    struct.pack_into("=H", out, O_MAX_PAGES, pages)
    major, minor = struct.unpack_from("=II", out, OUT_HEADER)
    readahead = struct.unpack_from("=I", out, O_READAHEAD)[0]
    return bytes(out), Outcome(
        protocol=f"{major}.{minor}",
        max_write=max_write,
        max_pages=pages,
        max_readahead=readahead,
        max_background=wish.max_background,
        congestion_threshold=threshold,
        flags=flag_names(agreed),
    )
