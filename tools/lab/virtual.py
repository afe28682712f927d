"""The four loads on a volume itself, on a clock that only moves when everybody waits.

Without FUSE and threads, on trio's mock clock: a disk that takes its time, and the pauses between
operations, are all that time passes by, so an hour of it is as much work as a slow machine does
in an hour, in a few minutes of ours. The run is one thread and its loads are seeded. The arena's
validator, which wants nobody at work elsewhere, looks at every structure twice a minute.

The disk serves one request at a time: LATENCY_S for each, and BYTES_S. Under irix nothing may fail;
an exception of any kind ends the run.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio
import trio.testing

from fs import file, namespace, warmup
from fs.cache.inode import Inode
from fs.device.base import Views
from fs.device.image import Memory
from fs.front import sysctl
from fs.mount import format_image
from fs.volume import Volume
from tools.lab.cut import ENDED, Cut
from tools.lab.endurance import SAY_S, STARVED_S, Plan, waits
from tools.lab.files import Tally
from tools.lab.loads import crew, run
from tools.progress import Progress
from tools.targets import repair, size_of

LATENCY_S = 0.004
BYTES_S = 4 << 20
PAUSE_S = 0.02  # on the average
CHECK_S = 30.0
SECONDS = 3600.0


class Disk(Memory):
    """An image in memory that takes virtual time; one request at a time."""

    def __init__(self, size: int) -> None:
        super().__init__(size, "lab")
        self._busy = trio.Lock()

    async def _takes(self, requests: int, length: int) -> None:
        async with self._busy:
            await trio.sleep(requests * LATENCY_S + length / BYTES_S)

    async def read(self, offset: int, views: Views) -> None:
        await self._takes(1, sum(map(len, views)))
        await super().read(offset, views)

    async def read_all(self, requests: Sequence[tuple[int, Views]]) -> None:
        for offset, views in requests:
            await self.read(offset, views)

    async def write(self, offset: int, views: Views) -> None:
        await self._takes(1, sum(map(len, views)))
        await super().write(offset, views)

    async def flush(self) -> None:
        await self._takes(1, 0)
        await super().flush()


class InVolume:
    """Files of a volume in this process. Handles are inodes with a reference."""

    def __init__(self, vol: Volume) -> None:
        self._vol = vol
        self._random = random.Random(0)
        self._directories: dict[str, Inode] = {}
        self._making = trio.Lock()
        self.tunables = sysctl.tunables(vol)

    async def close_all(self) -> None:
        """Directories are held until the end."""
        for dp in self._directories.values():
            self._vol.inodes.put(dp)

    def _split(self, name: str) -> tuple[Inode, bytes]:
        directory, _, last = name.partition("/")
        return self._directories[directory], last.encode()

    async def mkdir(self, name: str) -> bool:
        vol = self._vol
        async with self._making:
            if name in self._directories:
                return True
            root = await vol.inodes.get(vol.geo.root_ino)
            try:
                made = await namespace.mkdir(vol, root, name.encode(), 0o755, 0, 0)
            finally:
                vol.inodes.put(root)
            self._directories[name] = made
        return True

    async def create(self, name: str) -> Inode:
        return await namespace.create(self._vol, *self._split(name), 0o644, 0, 0)

    async def open(self, name: str) -> Inode:
        return await namespace.lookup(self._vol, *self._split(name))

    async def close(self, ip: Inode) -> None:
        self._vol.inodes.put(ip)

    async def write(self, ip: Inode, offset: int, data: bytes) -> int:
        return await file.write(self._vol, ip, offset, data)

    async def read(self, ip: Inode, offset: int, length: int) -> bytes | bytearray:
        return await file.read(self._vol, ip, offset, length)

    async def sync(self, ip: Inode) -> None:
        await file.fsync(self._vol, ip)

    async def unlink(self, name: str) -> None:
        await namespace.unlink(self._vol, *self._split(name))
        await self._vol.inodegc.throttle()

    async def stat(self, name: str) -> int:
        ip = await self.open(name)
        try:
            return ip.size
        finally:
            self._vol.inodes.put(ip)

    async def missing(self, name: str) -> bool:
        try:
            await self.close(await self.open(name))
        except FileNotFoundError:
            return True
        return False

    async def drop_caches(self) -> None:
        await sysctl.write(self.tunables["vm/drop_caches"], b"5")

    async def pause(self) -> None:
        await trio.sleep(self._random.expovariate(1 / PAUSE_S))


@dataclass
class Hour:
    """What came of it; times in seconds of the virtual clock but for `real`."""

    seconds: float = 0.0
    real: float = 0.0
    tallies: dict[str, Tally] = field(default_factory=dict)
    vmstat: dict[str, int] = field(default_factory=dict)
    checks: int = 0
    clean: bool = False
    cut: str = ""  # by which signal

    @property
    def steps(self) -> int:
        """Operations of all loads."""
        return sum(tally.operations for tally in self.tallies.values())

    @property
    def longest_wait(self) -> float:
        """The longest that anybody waited for memory."""
        return self.vmstat.get("alloc_wait_longest_ms", 0) / 1000

    def problems(self) -> list[str]:
        """What should not have been."""
        found = [wrong for tally in self.tallies.values() for wrong in tally.wrong]
        for tally in self.tallies.values():
            found += [f"{count} times {name}" for name, count in tally.failures.items()]
            found += [tally.ended] if tally.ended not in ("", ENDED) else []
        if self.longest_wait >= STARVED_S:
            found.append(f"somebody waited {self.longest_wait:.1f} s for memory")
        if not self.clean:
            found.append("xfs_repair -n finds errors")
        return found

    def lines(self) -> list[str]:
        """For a reader."""
        verified = sum(tally.verified for tally in self.tallies.values()) >> 20
        written = sum(tally.written for tally in self.tallies.values()) >> 20
        longest = max(self.tallies.values(), key=lambda tally: tally.longest)
        return [
            f"virtual clock: {self.seconds:,.0f} s in {self.real:.0f} s, "
            f"{self.steps:,} operations, {written:,} MiB written, {verified:,} MiB verified",
            f"virtual clock: {self.vmstat.get('alloc_waits', 0):,} waits for memory, the longest "
            f"{self.longest_wait:.2f} s; the longest operation {longest.longest:.1f} s "
            f"({longest.load} {longest.longest_name}); the validator looked {self.checks} times",
            *([f"virtual clock: {ENDED} by {self.cut}"] if self.cut else []),
            *(f"virtual clock: PROBLEM {problem}" for problem in self.problems()),
        ]


class _Run:
    """A run that is under way; `plan.seconds` are virtual."""

    def __init__(self, plan: Plan, real_seconds: float, bar: Progress, cut: Cut) -> None:
        self.plan = plan
        self.bar = bar
        self.cut = cut
        self.hour = Hour()
        self._real_end = time.monotonic() + real_seconds
        self._say_at = time.monotonic() + SAY_S
        self._began = 0.0

    async def volume(self, disk: Disk) -> None:
        """The whole life of the volume."""
        memory = size_of(self.plan.memory)
        log = logging.getLogger("nofailfs.lab")
        async with Volume.open(disk, memory, log=log) as vol:
            files = InVolume(vol)
            for path, value in self.plan.tunables.items():
                await sysctl.write(files.tunables[path], b"%d" % value)
            try:
                await self._loads(files, [("plant", 0), ("plant", 1)], vol)
                self._began = trio.current_time()
                await self._loads(files, crew(self.plan.sizes), vol)
                self._look(vol)
            finally:
                await files.close_all()
            vol.arena.check()

    def _look(self, vol: Volume) -> None:
        """Note how far it has come."""
        self.hour.vmstat = dict(vol.arena.vmstat)
        if self._began:
            self.hour.seconds = trio.current_time() - self._began

    async def _loads(self, files: InVolume, loads: list[tuple[str, int]], vol: Volume) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._validate, vol)
            async with trio.open_nursery() as inner:
                for load, number in loads:
                    inner.start_soon(self._load, load, files, number)
            nursery.cancel_scope.cancel()

    async def _load(self, load: str, files: InVolume, number: int) -> None:
        plan = self.plan
        tally = await run(
            load, files, number, plan.seconds, plan.sizes, self._out_of_time, self.cut
        )
        self.hour.tallies.setdefault(load, Tally(load)).add(tally)

    def _out_of_time(self) -> bool:
        return time.monotonic() >= self._real_end

    async def _validate(self, vol: Volume) -> None:
        """The validator, now and then."""
        while True:
            await trio.sleep(CHECK_S)
            vol.arena.check()
            self.hour.checks += 1
            self._look(vol)
            if time.monotonic() >= self._say_at:
                self._say_at = time.monotonic() + SAY_S
                so_far = f"{self.hour.seconds:,.0f} s, {waits(self.hour.vmstat)}"
                self.bar.say(f"virtual clock: {so_far}")
            if self._began:
                self.bar.advance(min(int(CHECK_S), self.bar.total - self.bar.done))


def _run(work: _Run, disk: Disk, cut: Cut) -> None:
    """On the virtual clock; what is stuck when it is cut off stays as it is."""
    try:
        trio.run(work.volume, disk, clock=trio.testing.MockClock(autojump_threshold=0))
    except BaseException:
        if cut.stuck:
            return
        raise


def hour(plan: Plan, real_seconds: float, quiet: bool = False, cut: Cut | None = None) -> Hour:
    """The loads for `plan.seconds` of the virtual clock, or as long as `real_seconds` last.

    What a load has begun it finishes, unless the run is cut off. Raises whatever the validator, or
    anything else, found wrong.
    """
    cut = Cut() if cut is None else cut
    warmup.warm()
    disk = Disk(plan.image_size)
    try:
        with Progress("virtual clock", int(plan.seconds), quiet) as bar:
            format_image(disk.path, " ".join(plan.mkfs))
            began = time.monotonic()
            work = _Run(plan, real_seconds, bar, cut)
            with cut.polling():
                _run(work, disk, cut)
            work.hour.cut = cut.name
            work.hour.real = time.monotonic() - began
        work.hour.clean, _ = repair(Path(disk.path))
    finally:
        disk.close()
    return work.hour
