"""The machine's own nodes: where its memory has some, the arena's lie on them.

Arena node n goes to the n-th of the machine's nodes that are online, if there are that many; on
others the arena's nodes are an order of things and no more. Pages are asked for there by
mbind(2), before they are touched, as preferred and not bound: what keeps the promise of this
allocator must not be killed for want of memory on one node while another has some.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger("nofailfs.alloc")

ONLINE = Path("/sys/devices/system/node/online")
MBIND = {"x86_64": 237, "aarch64": 235}
MPOL_PREFERRED = 1
MASK_BITS = 1024


def parse(text: str) -> list[int]:
    """The numbers of a list as the kernel writes it: `0-1,4`."""
    found: list[int] = []
    for part in text.strip().split(",") if text.strip() else ():
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def online() -> list[int]:
    """The machine's nodes; one, 0, where the kernel knows of none."""
    try:
        return parse(ONLINE.read_text()) or [0]
    except OSError:
        return [0]


def prefer(address: int, nbytes: int, node: int) -> None:
    """Have pages that are yet to be touched come from a node of the machine. OSError."""
    mask = (ctypes.c_ulong * (MASK_BITS // 64))()
    mask[node // 64] = 1 << node % 64
    number = MBIND.get(platform.machine())
    if number is None:
        raise OSError(f"mbind(2) of {platform.machine()} is not known")
    libc = ctypes.CDLL(None, use_errno=True)
    length = ctypes.c_ulong(nbytes)
    place = ctypes.c_void_p(address)
    if libc.syscall(number, place, length, MPOL_PREFERRED, mask, ctypes.c_ulong(MASK_BITS + 1), 0):
        code = ctypes.get_errno()
        raise OSError(code, f"mbind(2) to node {node}: {os.strerror(code)}")


def place(address: int, spans: Sequence[tuple[int, int]]) -> int:
    """Put spans of memory, (offset, bytes) of each node, where they belong; how many were put."""
    nodes = online()
    if not 1 < len(spans) <= len(nodes):
        return 0
    try:
        for node, (offset, nbytes) in zip(nodes, spans, strict=False):
            prefer(address + offset, nbytes, node)
    except OSError as error:
        log.warning("memory is not bound to the machine's nodes: %s", error)
        return 0
    return len(spans)
