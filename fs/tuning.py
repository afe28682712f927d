"""Kernel settings of one FUSE mount that pyfuse3 cannot negotiate, set from outside.

Root only and best effort: a mount works without them, and what could not be set is said in the
log. Measured on 2 cores: buffered reads of 128 KiB become 1 MiB with read_ahead_kb=1024 (1.5 to
2.2 GB/s, dd); max_background 12 holds back parallel asynchronous requests.

fusectl is seldom mounted; it is then mounted in a private directory for a moment.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fs import mounts

FUSECTL = Path("/sys/fs/fuse/connections")
THREADS_MAX = Path("/proc/sys/kernel/threads-max")
PAGES_LIMIT = Path("/proc/sys/fs/fuse/max_pages_limit")
PAGES_LIMIT_FIXED = 256  # of kernels that have no such setting
POSSIBLE = Path("/sys/devices/system/cpu/possible")
ENABLE_URING = Path("/sys/module/fuse/parameters/enable_uring")
IO_URING_SETUP = 425  # the same number on every architecture
URING_PARAMS_BYTES = 120
LANES_AUTO = 4
# What a mount uses that does not say lanes= and transport=.
LANES_VARIABLE, TRANSPORT_VARIABLE = "NOFAILFS_LANES", "NOFAILFS_TRANSPORT"
LOCKDEP_VARIABLE = "NOFAILFS_LOCKDEP"  # 1: every mount has the lock-order validator
TASKS_LEAST = 4096
TASK_RESERVE = 1024  # asynchronous requests that belong to no waiting thread
PR_SET_IO_FLUSHER = 57
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # mallopt(3)


def lanes() -> int:
    """How many lanes a mount gets that does not say: one a core, at most four."""
    text = os.environ.get(LANES_VARIABLE, "")
    if text.isascii() and text.isdigit():
        return int(text)
    return min(len(os.sched_getaffinity(0)), LANES_AUTO)


def transport() -> str:
    """How requests come to the lanes of a mount that does not say."""
    return "uring" if os.environ.get(TRANSPORT_VARIABLE) == "uring" else "device"


def lockdep() -> bool:
    """Whether a mount that does not say has the lock-order validator."""
    return os.environ.get(LOCKDEP_VARIABLE) == "1"


def allow_pages(pages: int, log: logging.Logger) -> None:
    """Let a request have so many pages, if the machine's limit is lower and may be raised.

    The limit is the whole machine's and read when a file system is mounted.
    """
    try:
        if int(PAGES_LIMIT.read_text(encoding="ascii")) < pages:
            PAGES_LIMIT.write_text(f"{pages}\n", encoding="ascii")
    except (OSError, ValueError) as error:
        log.info("%s not raised to %d: %s", PAGES_LIMIT, pages, error)


def pages_limit() -> int:
    """The most pages that the kernel lets a request have."""
    try:
        return int(PAGES_LIMIT.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return PAGES_LIMIT_FIXED


def possible_processors() -> int:
    """How many processors the machine may ever have: FUSE over io_uring has a queue for each."""
    return int(POSSIBLE.read_text(encoding="ascii").strip().rpartition(",")[2].split("-")[-1]) + 1


def io_uring_setup(entries: int, params: ctypes.Array[ctypes.c_char]) -> int:
    """io_uring_setup(2); the descriptor. Raises OSError."""
    fd: int = ctypes.CDLL(None, use_errno=True).syscall(IO_URING_SETUP, entries, params)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "io_uring_setup")
    os.set_inheritable(fd, False)
    return fd


def uring_hindrance() -> str:
    """Why this machine cannot serve FUSE over io_uring; empty if it can.

    Enables it in the FUSE module, for the whole machine, if that is all that is missing and we may.
    """
    try:
        if ENABLE_URING.read_text(encoding="ascii").strip() != "Y":
            ENABLE_URING.write_text("Y\n", encoding="ascii")
    except FileNotFoundError:
        return "the kernel has no FUSE over io_uring (Linux 6.14 with CONFIG_FUSE_IO_URING)"
    except OSError:
        return f"FUSE over io_uring is off; as root: echo Y > {ENABLE_URING}"
    try:
        os.close(io_uring_setup(1, ctypes.create_string_buffer(URING_PARAMS_BYTES)))
    except OSError as error:
        return f"io_uring does not work here: {error.strerror}"
    return ""


def max_tasks() -> int:
    """More request tasks than the kernel can have requests outstanding.

    A thread waits for one request at a time, so the machine's thread limit bounds them. With this
    many a waiting writer never keeps out the request that would let it go on.
    """
    try:
        threads = int(THREADS_MAX.read_text(encoding="ascii"))
    except (OSError, ValueError):
        threads = TASKS_LEAST
    return max(TASKS_LEAST, threads) + TASK_RESERVE


def declare_io_flusher(log: logging.Logger) -> None:
    """Tell the kernel that it must not make this process clean for others (prctl(2)).

    Needs CAP_SYS_RESOURCE; without it the mount works, with a word in the log.
    """
    if ctypes.CDLL(None).prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        log.debug("PR_SET_IO_FLUSHER not permitted")


def bound_heap() -> None:
    """Keep the C heap near what is in use: large buffers go back to the system when freed."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_ARENA_MAX, 2)
    libc.mallopt(M_MMAP_THRESHOLD, 256 << 10)


@contextmanager
def _fusectl() -> Iterator[Path]:
    if FUSECTL.is_dir() and any(FUSECTL.iterdir()):
        yield FUSECTL
        return
    place = tempfile.mkdtemp(prefix="nofailfs-fusectl-")
    libc = ctypes.CDLL(None, use_errno=True)
    target = os.fsencode(place)
    try:
        if libc.mount(b"none", target, b"fusectl", ctypes.c_ulong(0), None) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), "fusectl")
        try:
            yield Path(place)
        finally:
            libc.umount2(target, mounts.MNT_DETACH)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def apply(mountpoint: str, log: logging.Logger, *, max_background: int, read_ahead_kb: int) -> None:
    """Raise the limits of the mount on `mountpoint`."""
    if os.geteuid() != 0:
        return
    mounted = mounts.find(mountpoint)
    if mounted is None:
        return
    minor = mounted.device.partition(":")[2]
    try:
        bdi = Path(f"/sys/class/bdi/{mounted.device}/read_ahead_kb")
        bdi.write_text(f"{read_ahead_kb}\n", encoding="ascii")
        with _fusectl() as connections:
            here = connections / minor
            (here / "max_background").write_text(f"{max_background}\n", encoding="ascii")
            threshold = max_background * 3 // 4
            (here / "congestion_threshold").write_text(f"{threshold}\n", encoding="ascii")
    except OSError as error:
        log.info("kernel limits of the mount not raised: %s", error)
        return
    log.info("max_background=%d read_ahead_kb=%d", max_background, read_ahead_kb)
