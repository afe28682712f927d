"""The fio job files on our mount, on a tmpfs and on the kernel's XFS, in turn; one table.

All targets are mounted for the whole run and each job visits them one after the other, so that a
machine that slows down slows all of them down. The kernel's XFS needs root (a loop device); where
that is missing the column is left out and the report says so. Ratios are ours divided by theirs.
The report names the cache mode of our mount, because with kernel caching most requests never
reach us.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fs import runfile
from fs.errors import UserError
from tools import fiorun
from tools.fiorun import Fio, names
from tools.progress import Progress
from tools.targets import Target, is_root, kernel_xfs, make_image, ours, scratch_dir, tmpfs

__all__ = ["Plan", "Row", "all_targets", "as_json", "compare", "names", "show"]


@dataclass
class Plan:
    """What to run: job names, seconds for each, bytes of each job's file, our mount's options."""

    jobs: list[str]
    runtime_s: int
    size: int
    memory: str
    cache: str
    image_size: int = 4 << 30


@dataclass
class Row:
    """One job on every target, in the order of the columns."""

    job: str
    results: dict[str, Fio] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        return sum(result.errors for result in self.results.values())


def cache_of(directory: Path) -> str:
    """The options of the mount that holds `directory`, from the record its daemon left."""
    where = directory.resolve()
    for candidate in (where, *where.parents):
        record = runfile.of_mountpoint(str(candidate))
        if record is not None and record.is_alive():
            return f"mounted with {record.options or 'default options'}"
    raise UserError(f"{directory} is on no nofailfs mount; leave it out for a scratch mount")


@contextmanager
def all_targets(plan: Plan, directory: Path | None = None) -> Iterator[list[Target]]:
    """Our mount (or `directory` on one), a tmpfs, and the kernel's XFS where root allows."""
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_dir(3 * plan.image_size))
        targets: list[Target] = []
        if directory is None:
            image = make_image(scratch / "ours.img", plan.image_size)
            mount = ours(image, scratch / "ours", plan.memory, plan.cache)
            targets.append(stack.enter_context(mount))
        else:
            targets.append(Target("nofailfs", directory.resolve(), cache_of(directory)))
        targets.append(stack.enter_context(tmpfs(scratch / "tmpfs")))
        if is_root():
            image = make_image(scratch / "kernel.img", plan.image_size)
            targets.append(stack.enter_context(kernel_xfs(image, scratch / "kernel")))
        yield targets


def run_jobs(plan: Plan, targets: list[Target], bar: Progress) -> list[Row]:
    """Every job on every target."""
    rows = []
    for job in plan.jobs:
        row = Row(job)
        for target in targets:
            bar.say(f"{job} on {target.name}")
            row.results[target.name] = fiorun.run(job, target.path, plan.size, plan.runtime_s)
            row.notes[target.name] = target.note
            os.sync()
            bar.advance()
        rows.append(row)
    return rows


def compare(plan: Plan, directory: Path | None = None) -> list[Row]:
    """Set the targets up, run the jobs, take the targets down."""
    for job in plan.jobs:
        fiorun.job_file(job)
    with all_targets(plan, directory) as targets:
        with Progress("compare", len(plan.jobs) * len(targets)) as bar:
            return run_jobs(plan, targets, bar)


def _cell(result: Fio) -> str:
    if result.errors:
        return "ERROR"
    p99 = f"p99 {result.p99_ns / 1000:,.0f} us"
    rate = f"{result.bytes_s / 2**20:,.0f} MiB/s"
    return f"{result.iops:,.0f} /s  {rate}  {p99}"


def ratio(ours_rate: float, theirs: float) -> str:
    return f"{ours_rate / theirs:.2f}" if theirs > 0 else "-"


def show(rows: list[Row]) -> None:
    """Print the table; errors in full below it."""
    console = Console(width=None if Console().is_terminal else 150)
    if not rows:
        return
    columns = list(rows[0].results)
    table = Table(title="fio: operations, bandwidth, 99th percentile of latency")
    table.add_column("job", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for name in columns[1:]:
        table.add_column(f"ours / {name}", justify="right")
    for row in rows:
        first, *others = (row.results[name] for name in columns)
        cells = [_cell(row.results[name]) for name in columns]
        table.add_row(row.job, *cells, *(ratio(first.iops, other.iops) for other in others))
    console.print(table)
    for name, note in rows[0].notes.items():
        console.print(f"  {name}: {note}", highlight=False)
    if "kernel XFS" not in columns:
        why = "not part of this run" if is_root() else "a loop mount needs root"
        console.print(f"  kernel XFS: left out, {why}", highlight=False)
    for row in rows:
        for name, result in row.results.items():
            if result.errors:
                console.print(f"  {row.job} on {name}: {result.text}", markup=False)


def as_json(plan: Plan, rows: list[Row]) -> dict[str, object]:
    """The same, for programs."""
    return {
        "plan": asdict(plan),
        "jobs": [
            {
                "job": row.job,
                "targets": {
                    name: {**asdict(result), "iops": result.iops, "note": row.notes[name]}
                    for name, result in row.results.items()
                },
            }
            for row in rows
        ],
    }
