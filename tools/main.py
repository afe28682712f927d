"""The program `nofailfs`: the mount's commands and those of the tools, in one.

`fs.cli` owns the commands of the mount; the rooms may not look upwards, so the tools' commands
join here. Every command imports what it needs when it runs: `nofailfs info` must answer at once
and needs no compiler. `fs.cli.main` runs whatever has joined, and turns a UserError into its
message and its exit code.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fs.cli import app, main
from fs.errors import UserError

__all__ = ["app", "main"]

EXIT_SIGNAL = 128  # cut off by a signal, its number added, as shells have it
EXIT_DIFFERENCE = 10  # a comparison with a model or a mirror was not equal

Memory = Annotated[str, typer.Option(help="Size of the arena.")]
Cache = Annotated[str, typer.Option(help="Kernel caching: none, writethrough or writeback.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Directory = Annotated[
    Path | None, typer.Argument(help="A directory on a mounted nofailfs; default: a scratch mount.")
]


@app.command()
def fsx(
    path: Annotated[Path, typer.Argument(help="The file to make, or a directory to make it in.")],
    seed: Annotated[int, typer.Option(help="Same seed, same operations.")] = 1,
    ops: Annotated[int, typer.Option(help="How many operations.")] = 10_000,
    length: Annotated[str, typer.Option(help="Largest size of the file.")] = "4M",
    io_max: Annotated[str, typer.Option(help="Largest size of one operation.")] = "64k",
    whole_every: Annotated[int, typer.Option(help="Steps between whole comparisons.")] = 1000,
    off: Annotated[list[str] | None, typer.Option(help="Operation not to use; repeat.")] = None,
    drop_caches: Annotated[bool, typer.Option(help="Also drop the kernel's caches.")] = False,
    replay_to: Annotated[int | None, typer.Option(help="Stop after this step; keep file.")] = None,
    replay: Annotated[Path | None, typer.Option(help="Carry out a saved operation log.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the result.")] = False,
) -> None:
    """Exercise one file with random operations and compare it with a model after each."""
    from tools import fsx as exerciser
    from tools.targets import size_of

    unknown = set(off or ()) - set(exerciser.WEIGHTS)
    if unknown:
        known = " ".join(exerciser.WEIGHTS)
        raise UserError(f"fsx knows no operation {' '.join(unknown)}; it knows {known}", 2)
    options = exerciser.Options(
        seed,
        ops,
        size_of(length),
        size_of(io_max),
        whole_every,
        replay_to,
        frozenset(off or ()),
        drop_caches,
        quiet,
    )
    file = path / f"fsx-{seed}" if path.is_dir() else path
    result = (
        exerciser.replay(file, replay, options) if replay else exerciser.exercise(file, options)
    )
    for line in exerciser.report(file, options, result):
        typer.echo(line)
    if result.problem:
        raise typer.Exit(EXIT_DIFFERENCE)


@app.command()
def compare(
    directory: Directory = None,
    job: Annotated[list[str] | None, typer.Option(help="A job of tools/fio; repeat.")] = None,
    runtime: Annotated[int, typer.Option(help="Seconds for each job.")] = 5,
    size: Annotated[str, typer.Option(help="Size of each job's file.")] = "256M",
    memory: Memory = "256M",
    cache: Cache = "none",
    as_json: Json = False,
) -> None:
    """Run the fio job files on our mount, on tmpfs and on the kernel's XFS; print one table."""
    from tools import compare as comparison
    from tools.targets import size_of

    plan = comparison.Plan(job or comparison.names(), runtime, size_of(size), memory, cache)
    rows = comparison.compare(plan, directory)
    if as_json:
        typer.echo(json.dumps(comparison.as_json(plan, rows), indent=2))
    else:
        comparison.show(rows)
    if any(row.errors for row in rows):
        raise typer.Exit(EXIT_DIFFERENCE)


@app.command()
def bench(
    rounds: Annotated[int, typer.Option(help="Rounds; the report shows medians.")] = 3,
    files: Annotated[int, typer.Option(help="Files made, looked at and removed.")] = 5000,
    runtime: Annotated[int, typer.Option(help="Seconds for each fio job.")] = 3,
    memory: Memory = "1G",
    cache: Cache = "none",
    lanes: Annotated[int | None, typer.Option(help="Lanes of our mount; 0: none.")] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="Command of another file system, with {source} and {mnt}; repeat."),
    ] = None,
    allocator: Annotated[
        bool, typer.Option("--allocator", help="Only the allocator beside malloc; no mount.")
    ] = False,
    names: Annotated[
        bool, typer.Option("--names", help="Only names and fsync, beside XFS and passthroughfs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure mount time, fio and metadata rates beside tmpfs, the kernel's XFS and FUSE peers.

    And the allocator by itself, beside malloc.
    """
    from tools import bench as benchmark
    from tools import benchalloc

    plan = benchmark.Plan(rounds, files, runtime, memory, cache, lanes, tuple(peer or ()), names)
    table = None if allocator else benchmark.bench(plan)
    if names and table and not as_json:
        benchmark.show(table)
        return
    figures = benchalloc.bench(rounds)
    if as_json:
        mounts = benchmark.as_json(table) if table else {}
        typer.echo(json.dumps(mounts | {"allocator": benchalloc.as_json(figures)}, indent=2))
        return
    if table:
        benchmark.show(table)
    benchalloc.show(figures)


@app.command()
def demo(
    size: Annotated[str, typer.Option(help="Size of the scratch image.")] = "1G",
    memory: Memory = "64M",
    cache: Cache = "none",
    runtime: Annotated[int, typer.Option(help="Seconds for each timed fio job.")] = 5,
) -> None:
    """Make a scratch image, mount it, verify and compare with fio, unmount, repair."""
    from tools import demo as show

    if not show.demo(size, memory, cache, runtime):
        raise typer.Exit(1)


@app.command()
def lab(
    minutes: Annotated[float, typer.Option(help="Of the first policy's run.")] = 10.0,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Under which the same loads run; repeat. The first has the most time."),
    ] = None,
    control_minutes: Annotated[float, typer.Option(help="Of each other policy's run.")] = 2.0,
    memory: Memory = "16M",
    files: Annotated[int, typer.Option(help="Files that the storm looks at.")] = 200_000,
    times_memory: Annotated[float, typer.Option(help="What the writers write, in memories.")] = 64,
    mkfs: Annotated[str, typer.Option(help="Words for mkfs.xfs.")] = "-b size=64k",
    dirty_ratio: Annotated[int, typer.Option(help="Percent that may be dirty.")] = 95,
    virtual: Annotated[float, typer.Option(help="Seconds on the virtual clock; 0: none.")] = 3600.0,
    virtual_minutes: Annotated[float, typer.Option(help="Real minutes for them at most.")] = 40.0,
    as_json: Json = False,
) -> None:
    """Endurance: eight writers, a stat storm, large folios and unlink floods in a small arena.

    On a mount in a control group under each policy, then on a volume on a virtual clock.
    Cut off by SIGINT or SIGTERM it reports how far it came, and leaves nothing behind.
    """
    from tools.lab import endurance, report
    from tools.lab.cut import Cut
    from tools.lab.virtual import hour

    words = tuple(mkfs.split())
    rules = policy or ["irix", "linux", "mayfail"]
    times = [minutes, *[control_minutes] * (len(rules) - 1)]
    plans = [
        endurance.Plan(rule, 60 * time, memory, files, words, dirty_ratio, times_memory)
        for rule, time in zip(rules, times, strict=True)
    ]
    outcomes, hours, cut = [], None, Cut()
    with cut.listening(), suppress(KeyboardInterrupt):
        for plan in plans:
            if plan.seconds and not cut:
                outcomes.append(endurance.run(plan, cut=cut))
        if virtual and not cut:
            plan = replace(plans[0], policy="irix", seconds=virtual)
            hours = hour(plan, 60 * virtual_minutes, cut=cut)
    if as_json:
        typer.echo(json.dumps(report.as_json(outcomes, hours), indent=2))
    else:
        report.show(outcomes, hours)
    if any(outcome.problems() for outcome in outcomes) or (hours and hours.problems()):
        raise typer.Exit(EXIT_DIFFERENCE)
    if cut:
        raise typer.Exit(EXIT_SIGNAL + cut.signal)


@app.command()
def crash(
    seeds: Annotated[str, typer.Option(help="A..B, or one number.")] = "1..20",
    points: Annotated[int, typer.Option(help="Crashes of each load.")] = 6,
    geometry: Annotated[
        list[str] | None, typer.Option(help="Of tools/crash/campaign.py; repeat. [all]")
    ] = None,
    ops: Annotated[int, typer.Option(help="Operations of each of three workers.")] = 120,
    size: Annotated[str, typer.Option(help="Of the images; 0: as small as can be.")] = "0",
    only: Annotated[int | None, typer.Option(help="Run this one point of each seed.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Where images of failures stay.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Without xfs_db's check.")] = False,
    kill: Annotated[int, typer.Option(help="Instead: rounds of kill -9 of a mount.")] = 0,
) -> None:
    """Cut off seeded loads, recover with our log code and the kernel's, and look what is there.

    What an fsync promised must be there, each file be at a state that it had, both recoveries be
    equal, and xfs_repair find nothing.
    """
    from tools.crash import campaign
    from tools.crash import kill as killing
    from tools.targets import size_of

    first, _, last = seeds.partition("..")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise UserError(f"{seeds!r} is no range of seeds: write 1..20", 2)
    chosen = range(int(first), int(last or first) + 1)
    unknown = set(geometry or ()) - set(campaign.GEOMETRIES)
    if unknown:
        known = ", ".join(campaign.GEOMETRIES)
        raise UserError(f"no geometry {', '.join(unknown)}; there are: {known}", 2)
    geometries = tuple(geometry or campaign.GEOMETRIES)
    if kill:
        failed = killing.run(killing.Plan(kill, chosen.start, keep=keep), typer.echo)
    else:
        plan = campaign.Plan(
            *(chosen, points, geometries, ops, only, keep, not quick, size_of(size))
        )
        outcome = campaign.run(plan, typer.echo)
        typer.echo(outcome.line())
        failed = len(outcome.failures)
    if failed:
        raise typer.Exit(EXIT_DIFFERENCE)


@app.command()
def throttle(
    seconds: Annotated[float, typer.Option(help="Of each half.")] = 30.0,
    writers: Annotated[int, typer.Option(help="Processes, each with a file.")] = 8,
    size: Annotated[str, typer.Option(help="Of one write.")] = "4k",
    bw: Annotated[int, typer.Option(help="The device's bytes a second.")] = 50_000_000,
    slow: Annotated[int, typer.Option(help="In the second half; 0: there is none.")] = 10_000_000,
    memory: Memory = "64M",
) -> None:
    """Have writers fill a device that slows down: rates, shares, pauses, dirty memory."""
    from tools.lab import throttle as experiment
    from tools.targets import size_of

    plan = experiment.Plan(seconds, writers, size_of(size), bw, slow, memory)
    if not experiment.show(plan, experiment.run(plan)):
        raise typer.Exit(EXIT_DIFFERENCE)


@app.command()
def fsync(
    dirty: Annotated[str, typer.Option(help="Of the large file beside them.")] = "2G",
    files: Annotated[int, typer.Option(help="Small files, one after the other.")] = 20,
    bw: Annotated[int, typer.Option(help="The device's bytes a second.")] = 200_000_000,
) -> None:
    """Time fsync of small files beside a large dirty one, here and on the kernel's XFS."""
    from tools.lab import fsync as experiment
    from tools.targets import size_of

    plan = experiment.Plan(size_of(dirty), files, bw)
    experiment.show(plan, experiment.run(plan))


@app.command()
def extents(memory: Memory = "64M") -> None:
    """Count the extents of files written in several ways, here and on the kernel's XFS."""
    from tools.lab import extents as experiment

    plan = experiment.Plan(memory=memory)
    experiment.show(plan, experiment.measure(plan))


@app.command()
def sequential(
    size: Annotated[str, typer.Option(help="Of the file.")] = "1G",
    bw: Annotated[int, typer.Option(help="The device's bytes a second.")] = 200_000_000,
    memory: Memory = "256M",
) -> None:
    """Write a file and read it cold, beside what fio gets from the image without a file system."""
    from tools.lab import sequential as experiment
    from tools.targets import size_of

    plan = experiment.Plan(size_of(size), bw, memory)
    if not experiment.show(plan, experiment.run(plan)):
        raise typer.Exit(EXIT_DIFFERENCE)


@app.command()
def stats(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A mounted nofailfs.")],
    section: Annotated[
        list[str] | None, typer.Option(help="memory, reclaim or writeback; repeat. [all]")
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between lines.")] = 1.0,
    count: Annotated[int, typer.Option(help="Lines; 0: until interrupted.")] = 0,
) -> None:
    """Print a line a second about a mount: memory, reclaim, write-back."""
    from tools import stats as statistics

    for line in statistics.lines(directory, section or (), interval, count):
        typer.echo(line)


if __name__ == "__main__":
    sys.exit(main())
