"""Benchmarks: mount time, fio rates and metadata rates, beside the kernel's own and FUSE's others.

Not tests: nothing here fails because it is slow. Each round mounts everything afresh and visits
the targets one after the other; the report shows the median of the rounds, our ratio to each, and
what became of the project's goals. The mount time is that of a warm start: a mount that is not
counted has compiled the kernels. Files fit below the background threshold of `memory`, so that
what is compared is cached data, as on tmpfs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fs import tuning
from tools import fiorun, peers
from tools.compare import ratio
from tools.progress import Progress
from tools.targets import (
    Target,
    TargetError,
    is_root,
    kernel_xfs,
    kernel_xfs_direct,
    make_image,
    ours,
    scratch_dir,
    tmpfs,
)

# measure: (fio job, clients)
FIO_JOBS = {
    "randread-4k": ("randread-4k", 1),
    "randread-4k, two clients": ("randread-4k", 2),
    "randwrite-4k": ("randwrite-4k", 1),
    "randwrite-4k, two clients": ("randwrite-4k", 2),
    "seqread-1m": ("seqread-1m", 1),
    "seqwrite-1m": ("seqwrite-1m", 1),
}
IMAGE_SIZE = 2 << 30
FIO_SIZE = 32 << 20
DROP_CACHES = Path("/proc/sys/vm/drop_caches")

OURS, QUEUED = "nofailfs", "nofailfs, io_uring"

APPEND = "append 4 KiB, fsync"
FSYNC_SHARE = 10  # a tenth of the files is made and made stable one by one

# (measure, against: a target or one of our own measures, at least this ratio)
GOALS = (
    ("randread-4k", "passthrough_ll", 2.5),
    ("randread-4k", "passthroughfs", 5.0),
    ("randwrite-4k", "passthrough_ll", 2.0),
    ("randwrite-4k", "passthroughfs", 5.0),
    ("randread-4k, two clients", "randread-4k", 1.5),
    ("randwrite-4k, two clients", "randwrite-4k", 1.5),
    ("seqread-1m", "tmpfs", 0.55),
    ("seqwrite-1m", "tmpfs", 0.45),
    ("stat, cold", "passthroughfs", 3.0),
    ("create and close", "passthroughfs", 1.5),
    ("unlink", "passthroughfs", 1.5),
    (APPEND, "kernel XFS", 0.3),
)


@dataclass
class Plan:
    """Rounds, files of the metadata run, seconds for each fio job, our mount's options."""

    rounds: int
    files: int
    runtime_s: int
    memory: str
    cache: str
    lanes: int | None = None
    peer: tuple[str, ...] = ()
    only_names: bool = False  # no fio, and beside those only whose names and fsyncs compare


@dataclass
class Bench:
    """Samples by (measure, target); `units` by measure; `notes` by target."""

    plan: Plan
    samples: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

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
    """Create, look at and unlink `plan.files` empty files in one directory, from one thread."""
    directory = target.path / "bench-metadata"
    directory.mkdir()
    count = bench.plan.files
    paths = [str(directory / f"file-{number:06d}") for number in range(count)]

    def create(number: int) -> None:
        os.close(os.open(paths[number], os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))

    bench.add("create and close", "files/s", target, _rate(count, create))
    bench.add("stat, warm", "files/s", target, _rate(count, lambda n: os.stat(paths[n])))
    if is_root():
        DROP_CACHES.write_text("2\n")  # the kernel's names and attributes, not its pages
        bench.add("stat, cold", "files/s", target, _rate(count, lambda n: os.stat(paths[n])))
    bench.add("unlink", "files/s", target, _rate(count, lambda n: os.unlink(paths[n])))
    directory.rmdir()


def stable(bench: Bench, target: Target) -> None:
    """One file that grows by 4 KiB and is made stable each time, and files of that size."""
    directory = target.path / "bench-stable"
    directory.mkdir()
    count, block = max(1, bench.plan.files // FSYNC_SHARE), bytes(4096)

    def make(number: int) -> None:
        fd = os.open(directory / f"{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(fd, block)
        os.fsync(fd)
        os.close(fd)

    def append(_: int) -> None:
        os.write(fd, block)
        os.fsync(fd)

    fd = os.open(directory / "grows", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    bench.add(APPEND, "fsyncs/s", target, _rate(count, append))
    os.close(fd)
    bench.add("create, 4 KiB, fsync", "files/s", target, _rate(count, make))
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def data(bench: Bench, target: Target) -> None:
    """The 4 KiB and 1 MiB fio jobs."""
    for measure, (job, clients) in FIO_JOBS.items():
        result = fiorun.run(
            job,
            target.path,
            FIO_SIZE,
            bench.plan.runtime_s,
            direct=target.direct,
            clients=clients,
        )
        if result.errors:
            raise TargetError(f"fio {job} on {target.name}: {result.text}")
        if job.endswith("4k"):
            bench.add(measure, "ops/s", target, result.iops)
            if clients == 1:
                bench.add(f"{measure}, p50", "us", target, result.p50_ns / 1000)
        else:
            bench.add(measure, "MiB/s", target, result.bytes_s / 2**20)


@contextmanager
def _queued(plan: Plan, scratch: Path) -> Iterator[Target]:
    """Our mount once more, with requests over io_uring."""
    if hindrance := tuning.uring_hindrance():
        raise TargetError(hindrance)
    image, where = scratch / "queued.img", scratch / "queued"
    with ours(image, where, plan.memory, plan.cache, "transport=uring") as target:
        yield replace(target, name=QUEUED)


def _comparable(scratch: Path) -> list[tuple[str, AbstractContextManager[Target]]]:
    """Whose names and fsyncs compare with ours: the same format, and the same way to it."""
    direct = kernel_xfs_direct(scratch / "direct.img", scratch / "direct")
    return [
        ("kernel XFS", kernel_xfs(scratch / "kernel.img", scratch / "kernel")),
        ("kernel XFS, direct I/O", direct),
        ("passthroughfs", peers.passthroughfs(scratch)),
    ]


def _mounts(plan: Plan, scratch: Path) -> list[tuple[str, AbstractContextManager[Target]]]:
    """What stands in a round, ours first."""
    options = "" if plan.lanes is None else f"lanes={plan.lanes}"
    mount = ours(scratch / "ours.img", scratch / "ours", plan.memory, plan.cache, options)
    places: list[tuple[str, AbstractContextManager[Target]]] = [(OURS, mount)]
    if plan.only_names:
        return places + (_comparable(scratch) if is_root() else [])
    if plan.lanes != 0:
        places.append((QUEUED, _queued(plan, scratch)))
    places.append(("tmpfs", tmpfs(scratch / "tmpfs")))
    if is_root():
        places += [
            ("kernel XFS", kernel_xfs(scratch / "kernel.img", scratch / "kernel")),
            ("passthrough_ll", peers.passthrough_ll(scratch)),
            ("passthroughfs", peers.passthroughfs(scratch)),
            ("fuse2fs", peers.fuse2fs(scratch, IMAGE_SIZE)),
        ]
    return places + [(command, peers.other(command, scratch)) for command in plan.peer]


def one_round(bench: Bench, scratch: Path, bar: Progress) -> None:
    """Mount everything, timed, measure it, unmount it. A peer that is not to be had is named."""
    with ExitStack() as stack:
        targets = []
        for name, mount in _mounts(bench.plan, scratch):
            bar.say(f"mounting {name}")
            start = time.perf_counter()
            try:
                target = stack.enter_context(mount)
            except TargetError as error:
                if name == OURS:
                    raise
                bench.missing[name] = str(error)
                continue
            if name in (OURS, QUEUED, "tmpfs", "kernel XFS"):
                bench.add("mount, warm start", "s", target, time.perf_counter() - start)
            targets.append(target)
        for target in targets:
            bar.say(f"metadata on {target.name}")
            metadata(bench, target)
            stable(bench, target)
            if not bench.plan.only_names:
                bar.say(f"fio on {target.name}")
                data(bench, target)
            bar.advance()


def bench(plan: Plan) -> Bench:
    """All rounds; the first mount only compiles."""
    result = Bench(plan)
    with scratch_dir(4 * IMAGE_SIZE) as scratch:
        for name in ("ours", "queued", "kernel", "direct"):
            make_image(scratch / f"{name}.img", IMAGE_SIZE)
        with Progress("bench", plan.rounds * len(_mounts(plan, scratch))) as bar:
            bar.say("compiling kernels")
            with ours(scratch / "ours.img", scratch / "ours", plan.memory, plan.cache):
                pass
            for _ in range(plan.rounds):
                one_round(result, scratch, bar)
    return result


def show(bench: Bench) -> None:
    """Print medians, ratios and goals."""
    console = Console(width=None if Console().is_terminal else 160)
    names = list(bench.notes)
    table = Table(title=f"medians of {bench.plan.rounds} rounds; in brackets: ours to theirs")
    table.add_column("measure", no_wrap=True)
    table.add_column("unit")
    for name in names:
        table.add_column(name, justify="right")
    for measure, unit in bench.units.items():
        values = [bench.median(measure, name) for name in names]
        first = values[0] or 0.0
        cells = ["-" if value is None else f"{value:,.2f}" for value in values]
        cells[1:] = [
            cell if value is None else f"{cell} ({ratio(first, value)})"
            for cell, value in zip(cells[1:], values[1:], strict=True)
        ]
        table.add_row(measure, unit, *cells)
    console.print(table)
    for name, note in bench.notes.items():
        console.print(f"  {name}: {note}", highlight=False)
    for name, reason in bench.missing.items():
        console.print(f"  {name}: left out: {reason}", highlight=False)
    for line in goals(bench):
        console.print(line, highlight=False)


def goals(bench: Bench) -> list[str]:
    """A line for each goal: the ratio that was wanted and the one that was measured."""
    lines = []
    for target in (OURS, QUEUED):
        for measure, against, wanted in GOALS if target in bench.notes else ():
            if bench.plan.only_names and measure not in bench.units:
                continue
            mine, other = bench.median(measure, target), bench.median(measure, against)
            if against in bench.units:
                other = bench.median(against, target)
            if mine is None or not other:
                lines.append(f"  goal: {measure} to {against}: not measured")
                continue
            got = mine / other
            verdict = "reached" if got >= wanted else "missed"
            what = f"{target}: {measure} to {against}"
            lines.append(f"  goal: {what}: {got:.2f}, wanted {wanted}: {verdict}")
    return lines


def as_json(bench: Bench) -> dict[str, object]:
    """Every sample, for programs."""
    return {
        "plan": asdict(bench.plan),
        "notes": bench.notes,
        "left out": bench.missing,
        "goals": goals(bench),
        "measures": [
            {"measure": measure, "unit": bench.units[measure], "target": target, "samples": values}
            for (measure, target), values in bench.samples.items()
        ],
    }
