"""The four loads on a mount with a small arena, in a control group, under one policy.

First the storm's files are made, then all loads run side by side, each a process, for the time
of the plan; then the image is unmounted and `xfs_repair -n` judges it. While it runs the reports of
the mount are read once a second, because a mount that shuts down takes them with it.

A run that is cut off ends its loads, which say what they did so far, and then the mount; both have
some seconds for it. Only what the end of a run shows is missing in its outcome.

Under irix `problems` must find nothing. Under the other policies the failures and the shutdown
are the result, and only bytes that nobody wrote are a problem.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fs import warmup
from fs.enomem import ENDS
from fs.front.options import escape
from tools.lab.cgroup import Cgroup, limited
from tools.lab.cut import ENDED, Cut
from tools.lab.files import Tally
from tools.lab.loads import CELL, Sizes, crew
from tools.progress import Progress
from tools.targets import (
    MIN_IMAGE,
    OurMount,
    TargetError,
    child_environment,
    make_image,
    ours,
    repair,
    scratch_dir,
    size_of,
)

TIMES_MEMORY = 64  # what the writers write
RSS_CONSTANT = 250 << 20  # interpreter, numpy, compiler and compiled kernels
STARVED_S = 30.0  # a wait for memory that is as long is no wait any more
HANG_S = 900.0  # beyond the plan's time: the daemon is stuck, and is killed
SAMPLE_S = 1.0
SAY_S = 30.0
CUT_S = 10.0  # in which loads that are cut off have to end
COMPLAINTS_KEPT = 8
STALL = "possible memory allocation deadlock"  # somebody waits, as irix promises, and says so


@dataclass(frozen=True)
class Plan:
    """One run; `mkfs` are words for mkfs.xfs, `dirty_ratio` is percent of memory.

    Blocks of 64 KiB make every folio a request above order 3, which Linux may refuse. And by the
    usual dirty_ratio writers wait for the flusher before memory is ever short of clean pages.
    """

    policy: str = "irix"
    seconds: float = 600.0
    memory: str = "16M"
    files: int = 200_000
    mkfs: tuple[str, ...] = ("-b", "size=64k")
    dirty_ratio: int = 95
    times_memory: float = TIMES_MEMORY
    writers: int = Sizes.writers
    flood_files: int = Sizes.flood_files

    @property
    def sizes(self) -> Sizes:
        """What the loads want of it."""
        one = int(size_of(self.memory) * self.times_memory) // self.writers
        each = max(one // CELL * CELL, CELL)
        return Sizes(self.writers, each, self.files, flood_files=self.flood_files)

    @property
    def image_size(self) -> int:
        """Bytes; room for everything twice."""
        sizes = self.sizes
        return MIN_IMAGE + 2 * sizes.writers * sizes.writer_bytes + 2048 * self.files

    @property
    def tunables(self) -> dict[str, int]:
        """What is set before the run, by the path below sys/."""
        ratio = self.dirty_ratio
        return {"vm/dirty_ratio": ratio, "vm/dirty_background_ratio": ratio // 2}

    @property
    def limit(self) -> int:
        """Bytes that the daemon may have, of all kinds."""
        return size_of(self.memory) + RSS_CONSTANT


@dataclass
class Outcome:
    """What a run showed; sizes in bytes, times in seconds."""

    plan: Plan
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase
    tallies: dict[str, Tally] = field(default_factory=dict)
    vmstat: dict[str, int] = field(default_factory=dict)
    failures: dict[str, dict[str, int]] = field(default_factory=dict)  # allocations: end, site
    peak_rss: int = 0
    cgroup_peak: int | None = None
    oom_kills: int | None = None
    exit_status: int | None = None
    end: str = ""  # what the mount said at its end, when that was no success
    shutdown: str = ""
    complaints: list[str] = field(default_factory=list)
    clean: bool = False
    repair: str = ""
    cut: str = ""  # by which signal

    @property
    def requests_failed(self) -> dict[str, int]:
        """Of all loads, by operation and errno."""
        whole = Tally("all")
        for tally in self.tallies.values():
            whole.add(tally)
        return whole.failures

    @property
    def longest_wait(self) -> float:
        """The longest that anybody waited for memory."""
        return self.vmstat.get("alloc_wait_longest_ms", 0) / 1000

    def problems(self) -> list[str]:
        """What should not have been; see the module."""
        found = [wrong for tally in self.tallies.values() for wrong in tally.wrong]
        if self.oom_kills:
            found.append(f"{self.oom_kills} OOM kills in the control group")
        if self.peak_rss > self.plan.limit:
            found.append(f"resident size {self.peak_rss} above {self.plan.limit}")
        if self.plan.policy != "irix":
            return found
        found += [f"{count} requests failed: {name}" for name, count in
                  self.requests_failed.items()]  # fmt: skip
        found += [f"{tally.load} ended: {tally.ended}" for tally in self.tallies.values()
                  if tally.ended not in ("", ENDED)]  # fmt: skip
        found += [line for line in self.complaints if STALL not in line]
        if self.longest_wait >= STARVED_S:
            found.append(f"somebody waited {self.longest_wait:.1f} s for memory")
        if self.exit_status or self.end:
            found.append(f"the daemon ended with {self.exit_status}: {self.end}")
        if not self.clean and not self.cut:
            found.append(f"xfs_repair -n: {self.repair[-300:]}")
        return found


def waits(vmstat: Mapping[str, int]) -> str:
    """How many requests had to wait for memory, and how long the longest did so far."""
    longest = vmstat.get("alloc_wait_longest_ms", 0) / 1000
    return f"{vmstat.get('alloc_waits', 0):,} waits for memory, the longest {longest:.2f} s"


class Crew:
    """Loads as processes. Context manager: those that are left at its end are killed."""

    def __init__(self, root: Path, loads: list[tuple[str, int]], plan: Plan, log: Path) -> None:
        words = json.dumps(asdict(plan.sizes))
        self._log = log
        self._children: list[subprocess.Popen[bytes]] = []
        with open(log, "ab") as sink:
            for load, number in loads:
                self._children.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tools.lab.loads", load, str(root), str(number),
                         str(plan.seconds), words],
                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=sink, cwd="/",
                        env=child_environment(), start_new_session=True,
                    )
                )  # fmt: skip

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        for child in self._children:
            child.kill()  # nothing, if it has ended; one that waits for the mount ends with that

    def cut_off(self) -> list[Tally]:
        """Have all end what they are at; the tallies of those that do so in time."""
        for child in self._children:
            child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + CUT_S
        while self.running and time.monotonic() < deadline:
            time.sleep(0.05)
        return [
            Tally(**json.loads(child.communicate()[0]))
            for child in self._children
            if child.poll() == 0
        ]

    @property
    def running(self) -> int:
        """How many are at work."""
        return sum(child.poll() is None for child in self._children)

    def tallies(self) -> list[Tally]:
        """What they did, once all have ended. Raises TargetError with what a failed one said."""
        found = []
        for child in self._children:
            out = child.communicate()[0].decode()
            if child.returncode:
                said = self._log.read_text(errors="replace").splitlines()
                raise TargetError(f"a load gave {child.returncode}: {said[-1] if said else ''}")
            found.append(Tally(**json.loads(out)))
        return found


def sample(mount: OurMount, outcome: Outcome) -> None:
    """The mount's counters as they are now; those of before when it gives none any more."""
    outcome.peak_rss = max(outcome.peak_rss, mount.peak_rss_kib() << 10)
    try:
        text = (mount.path / ".nofail/vmstat").read_text()
    except OSError:
        return
    outcome.vmstat = {name: int(count) for name, count in
                      (line.split() for line in text.splitlines())}  # fmt: skip


@contextmanager
def sampled(mount: OurMount, outcome: Outcome) -> Iterator[None]:
    """`sample` once a second and at the end.

    By a thread: who waits for a mount that does not answer hears no signal.
    """
    over = threading.Event()

    def look() -> None:
        while not over.wait(SAMPLE_S):
            sample(mount, outcome)
        sample(mount, outcome)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
        over.set()
        thread.join(CUT_S)
    finally:
        over.set()


def work(mount: OurMount, outcome: Outcome, bar: Progress) -> None:
    """Set up, then all loads side by side."""
    plan = outcome.plan
    for path, value in plan.tunables.items():
        (mount.path / ".nofail/sys" / path).write_text(str(value))
    log = mount.log.with_suffix(".loads")
    for phase, loads in (("setup", [("plant", 0), ("plant", 1)]), ("loads", crew(plan.sizes))):
        bar.say(f"{plan.policy}: {phase}")
        with sampled(mount, outcome), Crew(mount.path, loads, plan, log) as at_work:
            try:
                _watch(at_work, outcome, phase, bar)
                _add(outcome, at_work.tallies())
            except KeyboardInterrupt:
                _add(outcome, at_work.cut_off())
                raise
        if any(tally.ended for tally in outcome.tallies.values()):
            return


def _add(outcome: Outcome, tallies: list[Tally]) -> None:
    for tally in tallies:
        outcome.tallies.setdefault(tally.load, Tally(tally.load)).add(tally)


def _watch(at_work: Crew, outcome: Outcome, phase: str, bar: Progress) -> None:
    """Until the loads have ended; says now and then how it goes."""
    began = said = time.monotonic()
    while at_work.running:
        time.sleep(SAMPLE_S)
        now = time.monotonic()
        outcome.seconds[phase] = now - began
        if phase == "loads":
            bar.advance(min(int(now - began), bar.total) - bar.done)
        if now - said >= SAY_S:
            said = now
            policy = outcome.plan.policy
            bar.say(f"{policy}: {phase}, {now - began:.0f} s, {waits(outcome.vmstat)}")


def _read_log(log: Path, outcome: Outcome) -> None:
    """What the daemon said: its complaints, why it shut down, and which allocations failed."""
    text = log.read_text(errors="replace")
    bad = re.compile(r"WARN|ERROR|CRITICAL|Traceback")
    outcome.complaints = list(filter(bad.search, text.splitlines()))[:COMPLAINTS_KEPT]
    for end, count, site in re.findall(rf" INFO ({'|'.join(ENDS)}): (\d+) (.*)", text):
        outcome.failures.setdefault(end, {})[site] = int(count)
    found = re.search(r"Corruption of in-memory data \(0x8\) detected: (.*?)\.  Shutting", text)
    outcome.shutdown = found.group(1) if found else ""


def _mounted(image: Path, group: Cgroup | None, outcome: Outcome, bar: Progress) -> None:
    plan = outcome.plan
    options = f"policy={escape(plan.policy)}"
    launcher = group.launcher() if group else ()
    where = image.with_name("mnt")
    mounted = []
    try:
        with ours(image, where, plan.memory, options=options, launcher=launcher) as mount:
            mounted.append(mount)
            hang = threading.Timer(plan.seconds + HANG_S, mount.process.kill)
            hang.daemon = True
            hang.start()
            try:
                work(mount, outcome, bar)
            finally:
                hang.cancel()
    except TargetError as error:
        outcome.end = str(error).split("\n")[0]
    finally:
        for mount in mounted:
            outcome.exit_status = mount.process.returncode
            _read_log(mount.log, outcome)


def run(plan: Plan, quiet: bool = False, cut: Cut | None = None) -> Outcome:
    """The whole of it, or as far as it came. Raises TargetError when it could not even begin."""
    outcome = Outcome(plan)
    try:
        with Progress("lab", int(plan.seconds / SAMPLE_S), quiet) as bar:
            _run(plan, outcome, bar)
    except KeyboardInterrupt:
        if not cut:
            raise
        outcome.cut = cut.name
    return outcome


def _run(plan: Plan, outcome: Outcome, bar: Progress) -> None:
    warmup.warm()  # compiling takes more memory than the control group allows
    with scratch_dir(plan.image_size) as scratch, limited(plan.limit) as group:
        if group is None:
            bar.say("no control group can be made here: the resident size is watched instead")
        image = make_image(scratch / "image", plan.image_size, plan.mkfs)
        with open(image, "r+b") as file:  # its pages are our charge, not the daemon's
            subprocess.run(["fallocate", "-l", str(plan.image_size), file.name], check=True)
        try:
            _mounted(image, group, outcome, bar)
        finally:
            if group is not None:
                outcome.cgroup_peak, outcome.oom_kills = group.peak, group.oom_kills
        outcome.clean, outcome.repair = repair(image)
