"""Benchmarks: warm mount time, fio rates, create/stat/unlink rates, beside tmpfs and kernel XFS.

Not tests: nothing here fails because it is slow. Each round mounts afresh and visits the targets
one after the other; the report shows the median of the rounds and our ratio to the others. The
mount time is that of a warm start: the kernels are compiled by a mount that is not counted.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools import fiorun
from tools.compare import ratio
from tools.progress import Progress
from tools.targets import Target, is_root, kernel_xfs, make_image, ours, scratch_dir, tmpfs

FIO_JOBS = ("randread-4k", "randwrite-4k", "seqread-1m", "seqwrite-1m")
IMAGE_SIZE = 2 << 30
FIO_SIZE = 128 << 20


@dataclass
class Plan:
    """Rounds, files of the metadata run, seconds for each fio job, our mount's options."""

    rounds: int
    files: int
    runtime_s: int
    memory: str
    cache: str


@dataclass
class Bench:
    """Samples by (measure, target); `units` by measure; `notes` by target."""

    plan: Plan
    samples: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, measure: str, unit: str, target: Target, value: float) -> None:
        self.samples.setdefault((measure, target.name), []).append(value)
        self.units[measure] = unit
        self.notes[target.name] = target.note

    def median(self, measure: str, target: str) -> float | None:
        values = self.samples.get((measure, target))
        return statistics.median(values) if values else None


def _rate(count: int, work: Callable[[int], object]) -> float:
    start = time.perf_counter()
    for number in range(count):
        work(number)
    return count / (time.perf_counter() - start)


def metadata(bench: Bench, target: Target) -> None:
    """Create, stat and unlink `plan.files` empty files in one directory, from one thread."""
    directory = target.path / "bench-metadata"
    directory.mkdir()
    paths = [str(directory / f"file-{number:06d}") for number in range(bench.plan.files)]

    def create(number: int) -> None:
        os.close(os.open(paths[number], os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))

    count = bench.plan.files
    bench.add("create", "files/s", target, _rate(count, create))
    bench.add("stat", "files/s", target, _rate(count, lambda number: os.stat(paths[number])))
    bench.add("unlink", "files/s", target, _rate(count, lambda number: os.unlink(paths[number])))
    directory.rmdir()


def data(bench: Bench, target: Target) -> None:
    """The 4 KiB and 1 MiB fio jobs."""
    for job in FIO_JOBS:
        result = fiorun.run(job, target.path, FIO_SIZE, bench.plan.runtime_s)
        if job.endswith("4k"):
            bench.add(job, "ops/s", target, result.iops)
        else:
            bench.add(job, "MiB/s", target, result.bytes_s / 2**20)


def one_round(bench: Bench, scratch: Path, bar: Progress) -> None:
    """Mount everything, timed, measure it, unmount it."""
    plan = bench.plan
    mounts: list[AbstractContextManager[Target]] = [
        ours(scratch / "ours.img", scratch / "ours", plan.memory, plan.cache),
        tmpfs(scratch / "tmpfs"),
    ]
    if is_root():
        mounts.append(kernel_xfs(scratch / "kernel.img", scratch / "kernel"))
    with ExitStack() as stack:
        targets = []
        for mount in mounts:
            start = time.perf_counter()
            target = stack.enter_context(mount)
            bench.add("mount, warm start", "s", target, time.perf_counter() - start)
            targets.append(target)
        for target in targets:
            bar.say(f"metadata on {target.name}")
            metadata(bench, target)
            bar.say(f"fio on {target.name}")
            data(bench, target)
            bar.advance()


def bench(plan: Plan) -> Bench:
    """All rounds; the first mount only compiles."""
    result = Bench(plan)
    with scratch_dir(3 * IMAGE_SIZE) as scratch:
        make_image(scratch / "ours.img", IMAGE_SIZE)
        make_image(scratch / "kernel.img", IMAGE_SIZE)
        with Progress("bench", plan.rounds * (3 if is_root() else 2)) as bar:
            bar.say("compiling kernels")
            with ours(scratch / "ours.img", scratch / "ours", plan.memory, plan.cache):
                pass
            for _ in range(plan.rounds):
                one_round(result, scratch, bar)
    return result


def show(bench: Bench) -> None:
    """Print medians and ratios."""
    console = Console(width=None if Console().is_terminal else 120)
    names = list(bench.notes)
    table = Table(title=f"medians of {bench.plan.rounds} rounds")
    table.add_column("measure", no_wrap=True)
    table.add_column("unit")
    for name in names:
        table.add_column(name, justify="right")
    for name in names[1:]:
        table.add_column(f"ours / {name}", justify="right")
    for measure, unit in bench.units.items():
        values = [bench.median(measure, name) for name in names]
        cells = ["-" if value is None else f"{value:,.2f}" for value in values]
        first = values[0] or 0.0
        table.add_row(measure, unit, *cells, *(ratio(first, value or 0.0) for value in values[1:]))
    console.print(table)
    for name, note in bench.notes.items():
        console.print(f"  {name}: {note}", highlight=False)


def as_json(bench: Bench) -> dict[str, object]:
    """Every sample, for programs."""
    return {
        "plan": asdict(bench.plan),
        "notes": bench.notes,
        "measures": [
            {"measure": measure, "unit": bench.units[measure], "target": target, "samples": values}
            for (measure, target), values in bench.samples.items()
        ],
    }
