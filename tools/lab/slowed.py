"""Devices held to a rate: under our mount, under the kernel's XFS, and with no file system at all.

Ours has a device model. The others have a loop device that the block layer throttles for all (the
root of the blkio hierarchy of cgroups, version 1, has that; version 2 has no such place), reads and
writes each. The kernel's XFS gets a strict limit of dirty memory of its own, as much as ours has.
Where the machine has no such things `why_not` says which is missing. What is set goes with the
device, and the rates are taken back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fs.front.options import escape
from tools.targets import is_root, kernel_xfs, ours, run

BLKIO = tuple(
    Path(f"/sys/fs/cgroup/blkio/blkio.throttle.{way}_bps_device") for way in ("read", "write")
)
BDI_REPORTS = Path("/sys/kernel/debug/bdi")


@dataclass(frozen=True)
class Slowed:
    """A mount, the report on its write-back, and the files that set its device's rate."""

    path: Path
    report: Path
    knobs: tuple[Path, ...]
    device: str = ""  # words before the rate

    def set_rate(self, bw: int) -> None:
        """Bytes a second from now on; 0: as many as it can."""
        for knob in self.knobs:
            knob.write_text(f"{self.device}{bw}")


@contextmanager
def ours_slowed(
    image: Path, where: Path, memory: str, bw: int, cache: str = "none"
) -> Iterator[Slowed]:
    """Our mount of an image, on a modelled device."""
    with ours(image, where, memory, cache, f"device={escape(f'bw={bw}')}") as mount:
        files = mount.path / ".nofail"
        yield Slowed(mount.path, files / "writeback", (files / "sys/device/bw",))


def why_not() -> str:
    """Why the kernel's devices cannot be held to a rate here; empty if they can."""
    if not is_root():
        return "that needs root"
    missing = [str(path) for path in (*BLKIO, BDI_REPORTS) if not path.exists()]
    return f"this machine has no {' and no '.join(missing)}" if missing else ""


@contextmanager
def kernel_slowed(image: Path, where: Path, limit_kib: int, bw: int) -> Iterator[Slowed]:
    """The kernel's XFS on an image, with so much dirty memory and no more."""
    with kernel_xfs(image, where) as mount:
        device = _numbers(os.stat(mount.path).st_dev)
        bdi = Path(f"/sys/dev/block/{device}/bdi")
        (bdi / "max_bytes").write_text(str(limit_kib << 10))
        (bdi / "strict_limit").write_text("1")
        with _held(mount.path, device, bw) as held:
            yield held


@contextmanager
def image_slowed(image: Path, bw: int) -> Iterator[Slowed]:
    """An image as a block device, without a file system."""
    path = Path(run("losetup", "--find", "--show", image).strip())
    try:
        with _held(path, _numbers(os.stat(path).st_rdev), bw) as held:
            yield held
    finally:
        run("losetup", "--detach", path)


def _numbers(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


@contextmanager
def _held(path: Path, device: str, bw: int) -> Iterator[Slowed]:
    """A loop device at a rate, until the end."""
    held = Slowed(path, BDI_REPORTS / device / "stats", BLKIO, f"{device} ")
    held.set_rate(bw)
    try:
        yield held
    finally:
        held.set_rate(0)
