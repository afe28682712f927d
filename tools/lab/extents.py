"""How many extents files get: one alone, several at once, and blocks in random order.

Each pattern is written to an empty image under our mount and under the kernel's XFS, with the same
limit of dirty memory where the machine allows that: what is merged is merged by write-back, and
that sees no more than is dirty at once. The counts are xfs_db's, of the inodes on the image.
"""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tools.lab.slowed import Slowed, kernel_slowed, ours_slowed, why_not
from tools.stats import figures_of
from tools.targets import make_image, run, scratch_dir

STEP = 1 << 20
PIECE = 4096
KERNELS_BW = 1 << 40  # no limit that anybody reaches


@dataclass(frozen=True)
class Plan:
    """`large` is one file's size, `shared` that of each of `writers`; `scattered` of one more."""

    large: int = 1 << 30
    shared: int = 256 << 20
    writers: int = 8
    scattered: int = 256 << 20
    memory: str = "64M"


def _append(path: Path, size: int) -> None:
    with open(path, "wb", buffering=0) as file:
        for _ in range(0, size, STEP):
            file.write(bytes(STEP))
        os.fsync(file.fileno())


def _together(root: Path, names: Sequence[str], size: int) -> None:
    tasks = [threading.Thread(target=_append, args=(root / name, size)) for name in names]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()


def _scatter(path: Path, size: int) -> None:
    """Every block once, in an order that is the same each time."""
    places = list(range(0, size, PIECE))
    random.Random(0).shuffle(places)
    with open(path, "wb", buffering=0) as file:
        for at in places:
            os.pwrite(file.fileno(), bytes(PIECE), at)
        os.fsync(file.fileno())


def _patterns(plan: Plan) -> dict[str, tuple[list[str], Callable[[Path], None]]]:
    """Name: the files that it makes, and what makes them in a directory."""
    names = [f"file{n}" for n in range(plan.writers)]
    return {
        f"one file of {plan.large >> 20} MiB": (
            ["file"],
            lambda root: _append(root / "file", plan.large),
        ),
        f"{plan.writers} of {plan.shared >> 20} MiB at once": (
            names,
            lambda root: _together(root, names, plan.shared),
        ),
        f"{plan.scattered >> 20} MiB in random blocks": (
            ["file"],
            lambda root: _scatter(root / "file", plan.scattered),
        ),
    }


def count(image: Path, name: str) -> int:
    """Extents of a file in the root directory of an image that nobody has mounted."""
    said = run("xfs_db", "-r", "-c", f"path /{name}", "-c", "print", image)
    found = re.search(r"^core\.nextents = (\d+)|^v3\.nextents = (\d+)", said, re.MULTILINE)
    if found is None:
        raise ValueError(f"xfs_db tells no extents of {name}")
    return int(found[1] or found[2])


def _written(
    mounted: AbstractContextManager[Slowed], make: Callable[[Path], None]
) -> dict[str, float]:
    """Have a pattern written to a mount; what it said of write-back then."""
    with mounted as mount:
        make(mount.path)
        return figures_of(mount.report.read_text())


def measure(plan: Plan) -> dict[str, dict[str, list[int]]]:
    """Counts of each file, by pattern and by file system."""
    found: dict[str, dict[str, list[int]]] = {}
    size = 2 * max(plan.large, plan.shared * plan.writers, plan.scattered, 1 << 29)
    with scratch_dir(size) as scratch:
        image, where = scratch / "image", scratch / "mnt"
        for pattern, (names, make) in _patterns(plan).items():
            make_image(image, size)
            figures = _written(ours_slowed(image, where, plan.memory, 0), make)
            counts = found[pattern] = {"nofailfs": [count(image, name) for name in names]}
            if not why_not():
                make_image(image, size)
                _written(kernel_slowed(image, where, int(figures["DirtyLimit"]), KERNELS_BW), make)
                counts["kernel XFS"] = [count(image, name) for name in names]
    return found


def show(plan: Plan, found: dict[str, dict[str, list[int]]]) -> None:
    """Print a line for each pattern: the least and the most that a file has."""
    print(f"extents of a file, memory {plan.memory}")
    for pattern, counts in found.items():
        words = [
            f"{name} {min(each)}" + (f" to {max(each)}" if len(each) > 1 else "")
            for name, each in counts.items()
        ]
        print(f"{pattern:28} {', '.join(words)}")
    if why_not():
        print(f"the kernel's XFS is not beside it: {why_not()}")
