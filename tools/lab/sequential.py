"""What a file system leaves of its device: one file written, and read cold, 1 MiB at a time.

The measure is fio with direct requests on the image itself, as a block device held to a rate. On
a device of the same rate fio then does the same through files: on our mount in each way of
caching, which must get ENOUGH of that, and on the kernel's XFS. Between write and read each is
unmounted, so that no cache has anything. A write's time has its fsync in it. Sizes are bytes,
rates bytes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools import fiorun
from tools.lab.slowed import Slowed, image_slowed, kernel_slowed, ours_slowed, why_not
from tools.stats import figures_of
from tools.targets import TargetError, make_image, scratch_dir

WAYS = ("write", "read")
CACHES = ("none", "writethrough")
OURS = "nofailfs"
KERNELS = "kernel XFS"
ENOUGH = 0.8


@dataclass(frozen=True)
class Plan:
    """How much is written and read, on a device of what rate; `memory` is our mount's."""

    size: int = 1 << 30
    bw: int = 200_000_000
    memory: str = "256M"


@dataclass
class Outcome:
    """The rates of each way without a file system (none: the machine cannot), and with each."""

    device: dict[str, float]
    files: dict[str, dict[str, float]]

    def share(self, name: str, way: str) -> float:
        """What a file system gets, of what there is without one."""
        return self.files[name][way] / self.device[way]

    def problems(self) -> list[str]:
        """What of ours is not enough."""
        return [
            f"{name}: {way} is below {ENOUGH:.0%}"
            for name in self.files
            for way in self.device
            if name.startswith(OURS) and self.share(name, way) < ENOUGH
        ]


def _rate(way: str, path: Path, size: int, *, direct: bool = False) -> float:
    """What fio gets. Raises TargetError with what it complains of."""
    found = fiorun.once(way, path, size, direct=direct)
    if found.errors:
        raise TargetError(f"fio could not {way} {path}: {found.text}")
    return found.bytes_s


def _through_files(
    mounted: Callable[[], AbstractContextManager[Slowed]], size: int
) -> tuple[dict[str, float], float]:
    """Rates on a mount that is made anew for each way; the limit of dirty memory there, in KiB."""
    rates = {}
    for way in WAYS:
        with mounted() as mount:
            rates[way] = _rate(way, mount.path / "file", size)
            limit_kib = figures_of(mount.report.read_text()).get("DirtyLimit", 0)
    return rates, limit_kib


def run(plan: Plan) -> Outcome:
    """Everything on scratch images, each made when its turn comes."""
    found = Outcome({}, {})
    with scratch_dir(2 * plan.size) as scratch:
        image, where = scratch / "image", scratch / "mnt"

        def fresh() -> None:
            make_image(image, max(2 * plan.size, 1 << 30))

        if not why_not():
            fresh()
            with image_slowed(image, plan.bw) as device:
                for way in WAYS:
                    found.device[way] = _rate(way, device.path, plan.size, direct=True)
        for cache in CACHES:
            fresh()
            mounted = partial(ours_slowed, image, where, plan.memory, plan.bw, cache)
            found.files[f"{OURS} cache={cache}"], limit_kib = _through_files(mounted, plan.size)
        if not why_not():
            fresh()
            mounted = partial(kernel_slowed, image, where, int(limit_kib), plan.bw)
            found.files[KERNELS], _ = _through_files(mounted, plan.size)
    return found


def show(plan: Plan, found: Outcome) -> bool:
    """Print a line for each; whether ours gets enough, as far as that is known."""
    print(f"{plan.size >> 20} MiB in requests of 1 MiB, at {plan.bw / 1e6:.0f} MB/s")
    print(f"{'':27}" + "".join(f" {way:>7} MB/s  of fio's" for way in WAYS))
    if found.device:
        rates = "".join(f" {found.device[way] / 1e6:12.1f}{'':10}" for way in WAYS)
        print(f"{'fio on the image itself':27}{rates}".rstrip())
    for name, each in found.files.items():
        shares = {way: f"{found.share(name, way):.1%}" for way in found.device}
        rates = "".join(f" {each[way] / 1e6:12.1f} {shares.get(way, '-'):>9}" for way in WAYS)
        print(f"{name:27}{rates}")
    if not found.device:
        print(f"fio on the image and the kernel's XFS are not beside it: {why_not()}")
    for problem in found.problems():
        print(f"  {problem}")
    return not found.problems()
