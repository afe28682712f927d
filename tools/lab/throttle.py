"""The throttle's experiment: writers on a mount whose device is a model, which then slows down.

Each writer is a process that appends to a file of its own, so much at a time; it notes when each
write began and how long it took. Meanwhile the mount's `.nofail/writeback` is read again and again.
The judgement is that of the rule: together they get what the device has, dirty memory keeps below
the limit, no pause is long and almost no write, and the shares are equal. After the device slows
down the same holds again when SETTLE_S have passed. The kernel's XFS then does the same with as
much dirty memory, for comparison. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from tools.lab.slowed import Slowed, kernel_slowed, ours_slowed, why_not
from tools.stats import figures_of
from tools.targets import make_image, scratch_dir

SETTLE_S = 20.0
SAMPLE_S = 0.05
IMAGE_BYTES = 6 << 30
FILE_BYTES = 256 << 20  # then a writer begins again from the start
OURS = "nofailfs"
RATE_OFF, SHARES_OFF, PAUSE_MS, WRITE_S = 0.05, 0.15, 200, 0.25


@dataclass(frozen=True)
class Plan:
    """What is to be tried; `slow` is the device's rate in the second half, 0: there is none."""

    seconds: float = 30.0
    writers: int = 8
    size: int = 4096
    bw: int = 50_000_000
    slow: int = 10_000_000
    memory: str = "64M"


@dataclass
class Phase:
    """What was measured between two moments; `writes` has (bytes, times) of each writer."""

    bw: int
    seconds: float
    written: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    over_kib: int = 0  # dirty and written above the limit, at most
    dirty_kib: int = 0
    limit_kib: int = 0
    longest_ms: int = 0  # -1: that is not known

    @property
    def rate(self) -> float:
        """Bytes a second of all writers."""
        return sum(self.written) / self.seconds

    @property
    def p999(self) -> float:
        """Of a write's seconds."""
        times = sorted(self.times)
        return times[len(times) * 999 // 1000] if times else 0.0

    @property
    def shares_off(self) -> float:
        """By how much the largest share is above the smallest."""
        return max(self.written) / max(min(self.written), 1) - 1

    def problems(self, slack_kib: int) -> list[str]:
        """What does not hold."""
        found = {
            "the rate is off": abs(self.rate / self.bw - 1) > RATE_OFF,
            "dirty memory was above the limit": self.over_kib > slack_kib,
            "a pause was too long": self.longest_ms > PAUSE_MS,
            "writes took too long": self.p999 >= WRITE_S,
            "shares differ": self.shares_off >= SHARES_OFF,
        }
        return [name for name, holds in found.items() if holds]


def _write(path: Path, size: int, pipe: Connection) -> None:
    """One writer: until it is told to stop; sends when its writes began, and what they took."""
    data, began, took = bytes(size), array("d"), array("d")
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    at = 0
    while not pipe.poll():
        before = time.monotonic()
        os.pwrite(file, data, at)
        began.append(before)
        took.append(time.monotonic() - before)
        at = (at + size) % FILE_BYTES
    os.close(file)
    pipe.send_bytes(began.tobytes())
    pipe.send_bytes(took.tobytes())


@contextmanager
def _writing(root: Path, plan: Plan) -> Iterator[list[Connection]]:
    """The writers at work; whoever is left at the end is ended."""
    pairs = [multiprocessing.Pipe() for _ in range(plan.writers)]
    fork = multiprocessing.get_context("fork")
    tasks = [
        fork.Process(target=_write, args=(root / f"writer{n}", plan.size, theirs), daemon=True)
        for n, (_, theirs) in enumerate(pairs)
    ]
    for task in tasks:
        task.start()
    try:
        yield [ours_ for ours_, _ in pairs]
    finally:
        for task in tasks:
            task.join(5)
            if task.is_alive():
                task.kill()


def _watch(report: Path, phase: Phase, until: float) -> None:
    """Look at dirty memory until a moment comes."""
    while time.monotonic() < until:
        now = {name: int(value) for name, value in figures_of(report.read_text()).items()}
        busy = now["BdiWriteback"] + now["BdiReclaimable"]
        phase.dirty_kib = max(phase.dirty_kib, busy)
        phase.limit_kib = now.get("DirtyLimit", now["BdiDirtyThresh"])
        phase.over_kib = max(phase.over_kib, busy - phase.limit_kib)
        phase.longest_ms = now.get("LongestPause", -1)
        time.sleep(SAMPLE_S)


def _collect(pipes: list[Connection], phases: list[tuple[Phase, float]], size: int) -> None:
    """Have the writers stop, and sort their writes into the phases by when they began."""
    for pipe in pipes:
        pipe.send(None)
    for pipe in pipes:
        began, took = array("d"), array("d")
        began.frombytes(pipe.recv_bytes())
        took.frombytes(pipe.recv_bytes())
        for phase, start in phases:
            inside = [t for b, t in zip(began, took, strict=True) if 0 <= b - start < phase.seconds]
            phase.written.append(size * len(inside))
            phase.times += inside


def _phases(plan: Plan, mount: Slowed) -> list[Phase]:
    """Both halves on one mount."""
    with _writing(mount.path, plan) as pipes:
        phases = [(Phase(plan.bw, plan.seconds), time.monotonic())]
        _watch(mount.report, phases[0][0], phases[0][1] + plan.seconds)
        if plan.slow:
            mount.set_rate(plan.slow)
            settled = time.monotonic() + SETTLE_S
            time.sleep(SETTLE_S)
            phases.append((Phase(plan.slow, plan.seconds), settled))
            _watch(mount.report, phases[1][0], settled + plan.seconds)
        _collect(pipes, phases, plan.size)
    return [phase for phase, _ in phases]


def run(plan: Plan) -> dict[str, list[Phase]]:
    """Both halves on scratch images: ours, and the kernel's XFS where the machine allows that."""
    found: dict[str, list[Phase]] = {}
    with scratch_dir(IMAGE_BYTES) as scratch:
        image, where = scratch / "image", scratch / "mnt"
        make_image(image, IMAGE_BYTES)
        with ours_slowed(image, where, plan.memory, plan.bw) as mount:
            found[OURS] = _phases(plan, mount)
        if not why_not():
            make_image(image, IMAGE_BYTES)
            with kernel_slowed(image, where, found[OURS][0].limit_kib, plan.bw) as mount:
                found["kernel XFS"] = _phases(plan, mount)
    return found


def _line(name: str, phase: Phase) -> str:
    pause = "-" if phase.longest_ms < 0 else str(phase.longest_ms)
    return (
        f"{name:10} {phase.bw / 1e6:11.1f}"
        f" {phase.rate / 1e6:6.1f} {phase.rate / phase.bw - 1:+6.1%}"
        f" {phase.dirty_kib / 1024:10.1f} {phase.limit_kib / 1024:8.1f} {pause:>9}"
        f" {phase.p999 * 1e3:9.1f} {max(phase.times, default=0) * 1e3:8.1f}"
        f" {phase.shares_off:11.1%}"
    )


def show(plan: Plan, found: dict[str, list[Phase]]) -> bool:
    """Print what was found; whether everything holds of ours."""
    print(f"{plan.writers} writers of {plan.size} bytes, memory {plan.memory}")
    print(
        f"{'':10} device MB/s   MB/s   off  dirty MiB of limit  pause ms  p99.9 ms  longest"
        "  shares off"
    )
    slack_kib = plan.writers * max(plan.size >> 10, 4) * 32
    for name, phases in found.items():
        for phase in phases:
            print(_line(name, phase))
            for problem in phase.problems(slack_kib):
                print(f"  {problem}")
    if len(found) == 1:
        print(f"the kernel's XFS is not beside it: {why_not()}")
    return not any(phase.problems(slack_kib) for phase in found[OURS])
