"""fsync of small files while a large file is dirty: how long somebody waits for what is not theirs.

On a device held to a rate, a large file is written into memory, below the background threshold, so
that nobody writes it out; then files of 4 KiB are written and synced one after the other. The
kernel's XFS does the same, where the machine allows it. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from tools.lab.slowed import Slowed, kernel_slowed, ours_slowed, why_not
from tools.stats import figures_of
from tools.targets import make_image, scratch_dir

STEP = 1 << 20
SMALL = 4096
ROOM = 2  # images have so many times the large file's size


@dataclass(frozen=True)
class Plan:
    """How much is dirty beside how many small files; `bw` is the device's, in bytes a second."""

    dirty: int = 2 << 30
    files: int = 20
    bw: int = 200_000_000


@dataclass
class Outcome:
    """What was dirty before and after the fsyncs, and what each took."""

    before_kib: int
    after_kib: int = 0
    times: list[float] = field(default_factory=list)


def _fill(path: Path, size: int) -> None:
    """Leave a file of so many bytes dirty."""
    with open(path, "wb", buffering=0) as file:
        for _ in range(0, size, STEP):
            file.write(bytes(STEP))


def _dirty_kib(mount: Slowed) -> int:
    return int(figures_of(mount.report.read_text())["BdiReclaimable"])


def _measure(mount: Slowed, plan: Plan) -> Outcome:
    _fill(mount.path / "large", plan.dirty)
    outcome = Outcome(_dirty_kib(mount))
    for n in range(plan.files):
        file = os.open(mount.path / f"small{n}", os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(file, bytes(SMALL))
        began = time.monotonic()
        os.fsync(file)
        outcome.times.append(time.monotonic() - began)
        os.close(file)
    outcome.after_kib = _dirty_kib(mount)
    mount.set_rate(0)  # what is dirty is written quickly
    return outcome


def run(plan: Plan) -> dict[str, Outcome]:
    """Ours, and the kernel's XFS where the machine allows that."""
    size = max(ROOM * plan.dirty, 1 << 30)
    memory = f"{2 * plan.dirty >> 20}M"
    with scratch_dir(size) as scratch:
        image, where = scratch / "image", scratch / "mnt"
        make_image(image, size)
        with ours_slowed(image, where, memory, plan.bw) as mount:
            tunables = mount.path / ".nofail/sys/vm"
            (tunables / "dirty_ratio").write_text("90")
            (tunables / "dirty_background_ratio").write_text("80")
            found = {"nofailfs": _measure(mount, plan)}
        if not why_not():
            make_image(image, size)
            with kernel_slowed(image, where, 2 * plan.dirty >> 10, plan.bw) as mount:
                found["kernel XFS"] = _measure(mount, plan)
    return found


def show(plan: Plan, found: dict[str, Outcome]) -> None:
    """Print a line for each."""
    print(f"fsync of {SMALL} bytes in a new file, {plan.files} times, at {plan.bw / 1e6:.0f} MB/s")
    print(f"{'':10} {'dirty MiB':>10} {'after':>8} {'median ms':>10} {'longest':>8}")
    for name, outcome in found.items():
        median, longest = statistics.median(outcome.times), max(outcome.times)
        print(
            f"{name:10} {outcome.before_kib >> 10:10d} {outcome.after_kib >> 10:8d}"
            f" {median * 1e3:10.1f} {longest * 1e3:8.1f}"
        )
    if len(found) == 1:
        print(f"the kernel's XFS is not beside it: {why_not()}")
