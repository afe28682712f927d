"""Mounts whose device is held to a rate that can be changed: ours, and the kernel's XFS beside it.

Ours has a device model. The kernel's has a loop device that the block layer throttles for all (the
root of the blkio hierarchy of cgroups, version 1, has that; version 2 has no such place), with a
strict limit of dirty memory of its own, as much as ours has. Where the machine has no such things
`why_not` says which is missing. What is set goes with the device, and the rate is taken back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fs.front.options import escape
from tools.targets import is_root, kernel_xfs, ours

BLKIO = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")
BDI_REPORTS = Path("/sys/kernel/debug/bdi")


@dataclass(frozen=True)
class Slowed:
    """A mount, the report on its write-back, and the file that sets its device's rate."""

    path: Path
    report: Path
    knob: Path
    device: str = ""  # words before the rate

    def set_rate(self, bw: int) -> None:
        """Bytes a second from now on; 0: as many as it can."""
        self.knob.write_text(f"{self.device}{bw}")


@contextmanager
def ours_slowed(image: Path, where: Path, memory: str, bw: int) -> Iterator[Slowed]:
    """Our mount of an image, on a modelled device."""
    with ours(image, where, memory, options=f"device={escape(f'bw={bw}')}") as mount:
        files = mount.path / ".nofail"
        yield Slowed(mount.path, files / "writeback", files / "sys/device/bw")


def why_not() -> str:
    """Why the kernel's XFS cannot be held to a rate here; empty if it can."""
    if not is_root():
        return "that needs root"
    missing = [str(path) for path in (BLKIO, BDI_REPORTS) if not path.exists()]
    return f"this machine has no {' and no '.join(missing)}" if missing else ""


@contextmanager
def kernel_slowed(image: Path, where: Path, limit_kib: int, bw: int) -> Iterator[Slowed]:
    """The kernel's XFS on an image, with so much dirty memory and no more."""
    with kernel_xfs(image, where) as mount:
        number = os.stat(mount.path).st_dev
        device = f"{os.major(number)}:{os.minor(number)}"
        bdi = Path(f"/sys/dev/block/{device}/bdi")
        (bdi / "max_bytes").write_text(str(limit_kib << 10))
        (bdi / "strict_limit").write_text("1")
        held = Slowed(mount.path, BDI_REPORTS / device / "stats", BLKIO, f"{device} ")
        held.set_rate(bw)
        try:
            yield held
        finally:
            held.set_rate(0)
