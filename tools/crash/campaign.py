"""Crash points: a load is run once for each seed and geometry, and examined at many moments.

Point k of a seed is a moment of the record and a fate for each write that is not stable then, drawn
from (seed, k) alone: so one point can be run again by itself. The image it leaves is recovered by
us and by the kernel, each on a copy, and both are compared with the model and with each other.
"""

from __future__ import annotations

import logging
import os
import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fs.xfs import superblock
from tools import targets
from tools.crash import judge, load
from tools.crash.disk import ABSENT, WHOLE, Disk, Fate, Record, Tearing, Write
from tools.crash.model import Model, Tree

# name: words for mkfs.xfs, and the size of the image in MiB. The logs are the smallest there are.
GEOMETRIES: dict[str, tuple[tuple[str, ...], int]] = {
    "default": ((), 64),
    "1k blocks": (("-b", "size=1k"), 64),
    "64k blocks": (("-b", "size=64k"), 192),
    "1k inodes": (("-i", "size=1024"), 72),
    "rmapbt": (("-m", "rmapbt=1"), 96),
    "8k directories": (("-n", "size=8k"), 80),
    "log stripe": (("-l", "su=32k"), 64),
    "4k sectors": (("-s", "size=4096"), 64),
    "no reflink": (("-m", "reflink=0"), 48),
}
READ = 32768  # bytes, with the superblock
RECORD = b"\xfe\xed\xba\xbe"  # how a record of the log begins; then its cycle
LOG = logging.getLogger("nofailfs.crash")


@dataclass(frozen=True)
class Plan:
    """What is examined."""

    seeds: range
    points: int = 10
    geometries: tuple[str, ...] = tuple(GEOMETRIES)
    ops: int = 120
    only: int | None = None  # the one point that is run
    keep: Path | None = None  # where images of failures go
    thorough: bool = True
    size: int = 0  # of the image, in bytes; 0: the geometry's
    first: bool = False  # end with the first failure


@dataclass
class Failure:
    """A point where something is wrong, and how to see it again."""

    geometry: str
    seed: int
    point: int
    moment: int
    problems: list[str]
    fates: list[str]

    def lines(self) -> list[str]:
        again = f"nofailfs crash --geometry '{self.geometry}' --seeds {self.seed}"
        at = f" --only {self.point}" if self.point >= 0 else ""
        return [
            f"FAILED {self.geometry}, seed {self.seed}, point {self.point}, moment {self.moment}",
            *(f"  {problem}" for problem in self.problems[:20]),
            *(f"  unstable: {fate}" for fate in self.fates[:30]),
            f"  again: {again}{at} --keep DIR",
        ]


@dataclass
class Outcome:
    """What came of a campaign."""

    points: int = 0
    runs: int = 0
    writes: int = 0
    acks: int = 0
    torn: int = 0
    failures: list[Failure] = field(default_factory=list)

    def line(self) -> str:
        """For a reader."""
        return (
            f"{self.points} crashes of {self.runs} loads, which did {self.writes} writes and had "
            f"{self.acks} syncs acknowledged; {self.torn} writes were torn; "
            f"{len(self.failures)} failures"
        )


@dataclass
class Recorded:
    """One load that was run, and its image from before it."""

    geometry: str
    seed: int
    base: Path
    model: Model
    record: Record
    tearing: Tearing
    cycle: int  # of the log, at the end: how often it began at its start again


def record(geometry: str, seed: int, plan: Plan, scratch: Path) -> Recorded:
    """Run the load of a seed. Raises whatever went wrong in it."""
    words, mib = GEOMETRIES[geometry]
    base = scratch / "base"
    judge.format_small(base, plan.size or mib << 20, words)
    raw = base.read_bytes()[:READ]
    geo = superblock.geometry(superblock.read(raw, base.stat().st_size))
    disk = Disk(base, seed)
    model, rec = load.run(load.Plan(seed, plan.ops), disk, LOG)
    tearing = Tearing(geo)
    return Recorded(geometry, seed, base, model, rec, tearing, _cycle(rec, tearing.log))


def _cycle(rec: Record, log: range) -> int:
    """The cycle that the last record of the log names."""
    heads = (w.data[4:8] for w in rec.writes if w.offset in log and w.data[:4] == RECORD)
    return max((int.from_bytes(head, "big") for head in heads), default=0)


@dataclass
class Point:
    """A moment, and what became of the writes that were not stable."""

    number: int
    moment: int
    stable: list[Write]
    unstable: list[tuple[Write, Fate]]

    @property
    def torn(self) -> int:
        return sum(bool(fate.sectors) for _, fate in self.unstable)

    def fates(self, log: range) -> list[str]:
        """For a reader."""
        return [
            f"{'log' if w.offset in log else 'home'} {w.offset} {len(w.data)} {w.data[:4]!r}: "
            f"{fate.kind} {''.join('.x'[s] for s in fate.sectors[:64])}"
            for w, fate in self.unstable
        ]


def draw(recorded: Recorded, number: int) -> Point:
    """Point `number` of a seed."""
    rng = random.Random(f"{recorded.seed} {number}")
    rec = recorded.record
    moment = rng.randint(recorded.model.start, rec.moment)
    if rng.random() < 0.5:  # in the middle of a checkpoint, or when it has just become stable
        begun, done = rng.choice([f for f in rec.flushes if f[0] > recorded.model.start])
        moment = rng.choice((begun, done - 1, done, max(begun - 1, recorded.model.start)))
    stable, unstable = rec.parted(moment)
    how = rng.random()
    fates = []
    for write in unstable:
        fate = recorded.tearing.draw(rng, write)
        in_log = write.offset in recorded.tearing.log
        if how < 0.1:  # everything that was done
            fate = Fate(WHOLE if write.done <= moment else ABSENT)
        elif how < 0.2:
            fate = Fate(ABSENT)
        elif how < 0.4:  # the log runs ahead, or behind
            fate = Fate(WHOLE) if in_log else fate
        elif how < 0.5:
            fate = fate if in_log else Fate(WHOLE)
        fates.append((write, fate))
    return Point(number, moment, stable, fates)


def build(recorded: Recorded, point: Point, image: Path) -> None:
    """The image that a crash leaves."""
    judge.copy_image(recorded.base, image)
    fd = os.open(image, os.O_RDWR)
    try:
        for write in point.stable:
            os.pwrite(fd, write.data, write.offset)
        for write, fate in point.unstable:
            recorded.tearing.apply(fd, write, fate)
    finally:
        os.close(fd)


def examine(recorded: Recorded, point: Point, plan: Plan, scratch: Path) -> list[str]:
    """Both recoveries of a point: everything that is wrong."""
    crashed, ours, kernels = (scratch / name for name in ("crashed", "ours", "kernels"))
    build(recorded, point, crashed)
    trees: list[Tree] = []
    found = []
    recoveries: list[tuple[str, Path, Callable[[], Tree]]] = [
        ("kernel", kernels, lambda: judge.by_kernel(kernels, scratch / "mnt")),
        ("ours", ours, lambda: judge.by_us(ours, scratch / "mnt", LOG)),
    ]
    for name, image, recover in recoveries:
        judge.copy_image(crashed, image)
        try:
            tree = recover()
        except Exception as error:
            trace = traceback.format_exc(limit=-3).replace("\n", " / ")
            found.append(f"{name}: recovery failed: {error} {'' if name == 'kernel' else trace}")
            continue
        trees.append(tree)
        found += [f"{name}: {why}" for why in recorded.model.problems(tree, point.moment)]
        found += [f"{name}: {why}" for why in judge.faults(image, thorough=plan.thorough)]
    if len(trees) == 2:
        found += judge.differences(trees[1], trees[0])
    if found and plan.keep:
        name = f"{recorded.geometry.replace(' ', '-')}-{recorded.seed}-{point.number}"
        for image in (crashed, ours, kernels):
            judge.keep(image, plan.keep, f"{name}.{image.name}")
    return found


def _loads(plan: Plan) -> Iterator[tuple[str, int]]:
    return ((geometry, seed) for seed in plan.seeds for geometry in plan.geometries)


def run(plan: Plan, say: Callable[[str], None]) -> Outcome:
    """All points of all seeds and geometries; `say` hears of each load and failure."""
    outcome = Outcome()
    with targets.scratch_dir() as scratch:
        for geometry, seed in _loads(plan):
            _one_load(geometry, seed, plan, scratch, outcome, say)
            if plan.first and any(failure.point >= 0 for failure in outcome.failures):
                break
    return outcome


def _one_load(
    geometry: str,
    seed: int,
    plan: Plan,
    scratch: Path,
    outcome: Outcome,
    say: Callable[[str], None],
) -> None:
    """All points of one load."""

    def fail(point: int, moment: int, problems: list[str], fates: list[str]) -> None:
        failure = Failure(geometry, seed, point, moment, problems, fates)
        outcome.failures.append(failure)
        for line in failure.lines():
            say(line)

    try:
        recorded = record(geometry, seed, plan, scratch)
    except Exception:
        fail(-1, 0, traceback.format_exc(limit=-12).splitlines()[-20:], [])
        return
    rec, syncs = recorded.record, len(recorded.model.acks)
    outcome.runs += 1
    outcome.writes += len(rec.writes)
    outcome.acks += syncs
    before = len(outcome.failures)
    numbers = range(plan.points) if plan.only is None else [plan.only]
    for number in numbers:
        point = draw(recorded, number)
        problems = examine(recorded, point, plan, scratch)
        outcome.points += 1
        outcome.torn += point.torn
        if problems:
            fail(number, point.moment, problems, point.fates(recorded.tearing.log))
            if plan.first:
                break
    failed = len(outcome.failures) - before
    say(
        f"{geometry}, seed {seed}: {len(rec.writes)} writes, {len(rec.flushes)} flushes, {syncs} "
        f"syncs acknowledged, log in cycle {recorded.cycle}, {failed} of {len(numbers)} points "
        "failed"
    )
