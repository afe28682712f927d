"""Tunables of a mount, under the names and with the meaning that they have below /proc/sys.

Those of `rcutree` are the parameters of that module in the kernel, those of `bdi` are below
/sys/class/bdi there, for each device; numa_migr_* are named after IRIX's.

Each is one number. Writing it takes effect at once; what is out of range, or would leave the memory
manager without memory, is EINVAL and changes nothing. Of a ratio and its bytes the one that was
written last holds, and the other reads 0, as in Linux.

What has no effect here has no name here. Trio thread only.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from alloc.balance import REST_MS_MOST, THRESHOLD_MOST
from alloc.gfp import KERNEL
from alloc.mempolicy import WEIGHT_MOST
from alloc.shrinker import ShrinkerState
from alloc.watermarks import SCALE_FACTOR_MOST
from fs.cache.window import WINDOW_SHARE
from fs.device.faulty import OFFSET_MOST, SHARES, Faulty
from fs.device.modeled import Modeled
from fs.device.stack import layers

if TYPE_CHECKING:
    from fs.volume import Volume

TEXT_MOST = 64  # bytes of a number with blanks around it
PAGE_SIZE = 4096
INT_MOST = (1 << 31) - 1
BYTES_MOST = (1 << 63) - 1
PPM = 1_000_000
READ_AHEAD_MOST = 4096  # pages
SYNCD_LEAST, SYNCD_MOST = 100, 720000  # xfssyncd_centisecs
PAGE_CACHE, NAMES = "page_cache", ("dentry", "xfs_inode")
DROP_PAGES, DROP_SLAB, DROP_QUIETLY = 1, 2, 4
DROP_PASSES = 16


class Tunable(NamedTuple):
    """One number: how to read and to set it, and between what it must be."""

    read: Callable[[], int]
    write: Callable[[int], Awaitable[None] | None]
    least: int
    most: int


def parse(data: bytes, tunable: Tunable) -> int:
    """The number in what was written. Raises OSError(EINVAL) if it is none, or out of range."""
    word = data.strip(b" \t\n\0")
    if len(data) > TEXT_MOST or not word.isdigit():
        raise OSError(errno.EINVAL, "not a number")
    value = int(word)
    if not tunable.least <= value <= tunable.most:
        raise OSError(errno.EINVAL, f"{value} is not from {tunable.least} to {tunable.most}")
    return value


async def write(tunable: Tunable, data: bytes) -> None:
    """Set a tunable to the number in `data`. Raises OSError(EINVAL)."""
    value = parse(data, tunable)
    try:
        work = tunable.write(value)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from error
    if work is not None:
        await work


def tunables(vol: Volume) -> dict[str, Tunable]:
    """All of a volume's, by their paths below /proc/sys."""
    parts = (
        *(_marks, _dirty, _readahead, _periods, _caches, _compaction, _rcu, _weights, _balance),
        *(_device, _freeze),
    )
    return {path: tunable for part in parts for path, tunable in part(vol).items()}


def _marks(vol: Volume) -> dict[str, Tunable]:
    arena, dirty = vol.arena, vol.pages.dirty

    def set_min(kbytes: int) -> None:
        arena.set_watermarks(kbytes, arena.watermark_scale_factor)
        dirty.retune()

    def set_scale(factor: int) -> None:
        arena.set_watermarks(arena.min_free_kbytes, factor)
        dirty.retune()

    return {
        "vm/min_free_kbytes": Tunable(lambda: arena.min_free_kbytes, set_min, 0, INT_MOST),
        "vm/watermark_scale_factor": Tunable(
            lambda: arena.watermark_scale_factor, set_scale, 1, SCALE_FACTOR_MOST
        ),
    }


def _weights(vol: Volume) -> dict[str, Tunable]:
    """Where there are several nodes: how many pages in a row each gets by the policy `weighted`."""
    arena = vol.arena

    def tunable(node: int) -> Tunable:
        def change(weight: int) -> None:
            arena.set_weights([*arena.weights[:node], weight, *arena.weights[node + 1 :]])

        return Tunable(lambda: arena.weights[node], change, 1, WEIGHT_MOST)

    nodes = range(len(arena.nodes)) if len(arena.nodes) > 1 else ()
    return {f"vm/weighted_interleave/node{node}": tunable(node) for node in nodes}


def _balance(vol: Volume) -> dict[str, Tunable]:
    """Where there are several nodes: the migration of folios between them."""
    balancer = vol.arena.balancer

    def setter(field: str) -> Callable[[int], None]:
        return lambda value: setattr(balancer, field, value)

    if len(vol.arena.nodes) == 1:
        return {}
    return {
        "kernel/numa_balancing": Tunable(
            lambda: int(balancer.enabled), lambda on: balancer.enable(on != 0), 0, 1
        ),
        # touches by which another node leads; milliseconds; MiB a second
        "vm/numa_migr_threshold": Tunable(
            lambda: balancer.threshold, setter("threshold"), 1, THRESHOLD_MOST
        ),
        "vm/numa_migr_bounce_control_interval": Tunable(
            lambda: balancer.rest_ms, setter("rest_ms"), 0, REST_MS_MOST
        ),
        "vm/numa_migr_rate_limit_MBps": Tunable(
            lambda: balancer.rate_mbps, setter("rate_mbps"), 0, INT_MOST
        ),
    }


def _dirty(vol: Volume) -> dict[str, Tunable]:
    dirty = vol.pages.dirty

    def setter(field: str, other: str) -> Callable[[int], None]:
        def change(value: int) -> None:
            setattr(dirty, field, value)
            setattr(dirty, other, 0)
            dirty.retune()

        return change

    def share(field: str) -> Callable[[int], None]:
        def change(value: int) -> None:
            setattr(dirty, field, value)
            dirty.retune()

        return change

    return {
        "vm/dirty_background_bytes": Tunable(
            lambda: dirty.background_bytes,
            setter("background_bytes", "background_ratio"),
            *(1, BYTES_MOST),
        ),
        "vm/dirty_background_ratio": Tunable(
            lambda: dirty.background_ratio,
            setter("background_ratio", "background_bytes"),
            *(0, 100),
        ),
        "vm/dirty_bytes": Tunable(
            lambda: dirty.limit_bytes, setter("limit_bytes", "ratio"), 2 * PAGE_SIZE, BYTES_MOST
        ),
        "bdi/max_ratio": Tunable(lambda: dirty.max_ratio, share("max_ratio"), 1, 100),
        "bdi/strict_limit": Tunable(lambda: dirty.strict_limit, share("strict_limit"), 0, 1),
        "vm/dirty_ratio": Tunable(lambda: dirty.ratio, setter("ratio", "limit_bytes"), 0, 100),
    }


def _readahead(vol: Volume) -> dict[str, Tunable]:
    ahead, kb_per_page = vol.ahead, PAGE_SIZE >> 10

    def set_most(kib: int) -> None:
        ahead.pages_most = kib // kb_per_page

    most = min(vol.arena.nr_pages // WINDOW_SHARE, READ_AHEAD_MOST) * kb_per_page
    now = Tunable(lambda: ahead.pages_most * kb_per_page, set_most, 0, most)
    return {"bdi/read_ahead_kb": now}


def _periods(vol: Volume) -> dict[str, Tunable]:
    flusher = vol.flusher

    def set_writeback(centisecs: int) -> None:
        flusher.period_s = centisecs / 100
        flusher.wake()

    def set_expire(centisecs: int) -> None:
        flusher.expire_s = centisecs / 100
        flusher.wake()

    def set_stamps(seconds: int) -> None:
        flusher.stamps_expire_s = seconds
        flusher.wake()

    def set_syncd(centisecs: int) -> None:
        vol.metadata_period_s = centisecs / 100
        vol.wake_metadata()

    return {
        "vm/dirty_writeback_centisecs": Tunable(
            lambda: round(flusher.period_s * 100), set_writeback, 0, INT_MOST
        ),
        "vm/dirty_expire_centisecs": Tunable(
            lambda: round(flusher.expire_s * 100), set_expire, 0, INT_MOST
        ),
        "vm/dirtytime_expire_seconds": Tunable(
            lambda: flusher.stamps_expire_s, set_stamps, 0, INT_MOST
        ),
        "fs/xfs/xfssyncd_centisecs": Tunable(
            lambda: round(vol.metadata_period_s * 100), set_syncd, SYNCD_LEAST, SYNCD_MOST
        ),
        "fs/xfs/speculative_prealloc_lifetime": Tunable(
            lambda: int(vol.eofblocks.lifetime_s), vol.eofblocks.set_lifetime, 1, 86400
        ),
    }


def _caches(vol: Volume) -> dict[str, Tunable]:
    arena, dropped = vol.arena, [0]

    def set_pressure(percent: int) -> None:
        arena.vfs_cache_pressure = percent

    async def drop(what: int) -> None:
        dropped[0] = what
        if what & DROP_PAGES:
            await _drop(vol, (PAGE_CACHE,))
            arena.vmstat.add("drop_pagecache")
        if what & DROP_SLAB:
            await _drop(vol, NAMES)
            arena.vmstat.add("drop_slab")
        arena.kick()
        if not what & DROP_QUIETLY:
            vol.log.info("drop_caches: %d", what)

    return {
        "vm/drop_caches": Tunable(lambda: dropped[0], drop, 1, 7),
        # 0 would keep names and inodes for ever, and somebody waiting for their memory as long
        "vm/vfs_cache_pressure": Tunable(
            lambda: arena.vfs_cache_pressure, set_pressure, 1, INT_MOST
        ),
    }


def _rcu(vol: Volume) -> dict[str, Tunable]:
    """The kernel's module parameters of RCU; marks are bytes here, blimit is objects."""
    rcu = vol.arena.rcu

    def mark(name: str) -> Tunable:
        def change(value: int) -> None:
            marks = {"qlowmark": rcu.qlowmark, "qhimark": rcu.qhimark, "qovld": rcu.qovld}
            marks[name] = value
            if not marks["qlowmark"] <= marks["qhimark"] <= marks["qovld"]:
                raise ValueError("qlowmark, qhimark and qovld are in this order")
            setattr(rcu, name, value)

        return Tunable(lambda: int(getattr(rcu, name)), change, 0, vol.arena.memory_bytes // 4)

    def set_blimit(value: int) -> None:
        rcu.blimit = value

    return {
        "rcutree/blimit": Tunable(lambda: rcu.blimit, set_blimit, 1, INT_MOST),
        "rcutree/qhimark": mark("qhimark"),
        "rcutree/qlowmark": mark("qlowmark"),
        "rcutree/qovld": mark("qovld"),
    }


def _compaction(vol: Volume) -> dict[str, Tunable]:
    compaction, written = vol.arena.compaction, [0]

    def set_threshold(thousandths: int) -> None:
        compaction.extfrag_threshold = thousandths

    def set_proactiveness(percent: int) -> None:
        compaction.proactiveness = percent

    async def compact(value: int) -> None:
        written[0] = value
        for _ in compaction.compact_memory():
            await trio.lowlevel.checkpoint()

    return {
        "vm/compact_memory": Tunable(lambda: written[0], compact, 1, 1),
        "vm/compaction_proactiveness": Tunable(
            lambda: compaction.proactiveness, set_proactiveness, 0, 100
        ),
        "vm/extfrag_threshold": Tunable(
            lambda: compaction.extfrag_threshold, set_threshold, 0, 1000
        ),
    }


def _freeze(vol: Volume) -> dict[str, Tunable]:
    """What FIFREEZE and FITHAW do, which Linux's FUSE does not pass on."""
    freezer = vol.freezer

    async def change(frozen: int) -> None:
        if frozen:
            await freezer.freeze()
        elif freezer.level:
            freezer.thaw()
        else:
            raise OSError(errno.EINVAL, "not frozen")

    return {"fs/xfs/freeze": Tunable(lambda: int(freezer.level > 0), change, 0, 1)}


def _device(vol: Volume) -> dict[str, Tunable]:
    """With `device=` or `faults=`: what the device can do, what it fails. No names of /proc."""
    found: dict[str, Tunable] = {}

    def tunable(of: Any, field: str, most: int, unit: float = 1) -> Tunable:
        def change(value: int) -> None:
            setattr(of, field, value / unit if unit > 1 else value)

        return Tunable(lambda: round(getattr(of, field) * unit), change, 0, most)

    for device in layers(vol.dev):
        if isinstance(device, Modeled):
            model = device.model
            found["device/bw"] = tunable(model, "bw", BYTES_MOST)
            for field in ("iops", "lat_us", "jitter_us"):
                found[f"device/{field}"] = tunable(model, field, INT_MOST)
        elif isinstance(device, Faulty):
            for field in SHARES:
                found[f"device/fail_{field}_ppm"] = tunable(device.faults, field, PPM, PPM)
            for field in ("first", "last"):
                found[f"device/fail_{field}"] = tunable(device.faults, field, OFFSET_MOST)
    return found


async def _drop(vol: Volume, names: tuple[str, ...]) -> None:
    """Free what of these caches is clean and unused; passes until one brings nearly nothing."""
    for known in vol.arena.reclaim.shrinkers:
        if known.shrinker.name not in names:
            continue
        for times in range(DROP_PASSES):
            _, freed = ShrinkerState(known.shrinker, known.seeks, known.batch).shrink(0, KERNEL)
            await trio.lowlevel.checkpoint()
            if freed >> times <= 1:
                break
