"""What the lab found, side by side: a column for each policy, and below it who failed where.

`requests failed` are what programs were told, by operation and errno. `allocations failed` are what
the allocator gave up, by where that ended (docs/mount.md) and, below the table, by who had asked. A
wait is that of a request for memory, as long as the longest of any was. Sizes are MiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.lab.cut import ENDED
from tools.lab.endurance import Outcome
from tools.lab.loads import LOADS
from tools.lab.virtual import Hour

SITES_SHOWN = 12


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _mib(size: int | None) -> str:
    return "not measured" if size is None else f"{size >> 20:,}"


def rows(outcome: Outcome) -> dict[str, str]:
    """One policy's column."""
    tallies = outcome.tallies
    column = {
        "seconds": ", ".join(f"{name} {took:.0f}" for name, took in outcome.seconds.items()),
        **{
            f"{load}: operations": f"{tallies[load].operations:,}" if load in tallies else "-"
            for load in LOADS
        },
        "written": _mib(sum(tally.written for tally in tallies.values())),
        "verified": _mib(sum(tally.verified for tally in tallies.values())),
        "not comparable": _mib(sum(tally.unknown for tally in tallies.values())),
        "wrong": str(sum(len(tally.wrong) for tally in tallies.values())),
        "requests failed": _counts(outcome.requests_failed),
        "allocations failed": _counts(
            {end: sum(sites.values()) for end, sites in outcome.failures.items()}
        ),
        "shutdown": outcome.shutdown or "no",
        "longest operation": max(
            (f"{tally.longest:6.1f} s {load} {tally.longest_name}".strip()
             for load, tally in tallies.items()),
            default="-",
            key=lambda text: float(text.split()[0]),
        ),
        "waits, longest": f"{outcome.vmstat.get('alloc_waits', 0):,}, {outcome.longest_wait:.2f} s",
        "stall reports": str(outcome.vmstat.get("alloc_stall_reports", 0)),
        "peak resident size": f"{_mib(outcome.peak_rss)} of {_mib(outcome.plan.limit)}",
        "cgroup's peak, OOM kills": f"{_mib(outcome.cgroup_peak)}, {outcome.oom_kills}",
        "daemon's exit status": str(outcome.exit_status),
        "xfs_repair -n": "clean" if outcome.clean else "not clean",
    }  # fmt: skip
    if outcome.cut:
        column |= {"shutdown": f"{ENDED} by {outcome.cut}", "xfs_repair -n": "not looked at"}
    return column


def show(outcomes: list[Outcome], hour: Hour | None, console: Console | None = None) -> None:
    """Print the tables, the sites, and what is a problem."""
    console = console or Console(width=None if Console().is_terminal else 150)
    if outcomes:
        table = Table(title="the lab: one set of loads under each policy")
        table.add_column("", no_wrap=True)
        columns = [rows(outcome) for outcome in outcomes]
        for outcome in outcomes:
            table.add_column(outcome.plan.policy, justify="right")
        for name in columns[0]:
            table.add_row(name, *(column[name] for column in columns))
        console.print(table)
    for outcome in outcomes:
        _sites(outcome, console)
    if hour is not None:
        for line in hour.lines():
            console.print(f"  {line}", highlight=False, markup=False)


def _sites(outcome: Outcome, console: Console) -> None:
    policy = outcome.plan.policy
    for end, sites in outcome.failures.items():
        for site, count in sorted(sites.items(), key=lambda item: -item[1])[:SITES_SHOWN]:
            console.print(f"  {policy}: {end} {count:,} {site}", highlight=False, markup=False)
    for problem in outcome.problems():
        console.print(f"  {policy}: PROBLEM {problem}", highlight=False, markup=False)


def as_json(outcomes: list[Outcome], hour: Hour | None) -> dict[str, Any]:
    """The same, for programs."""
    return {
        "runs": [
            asdict(outcome)
            | {"problems": outcome.problems(), "requests_failed": outcome.requests_failed}
            for outcome in outcomes
        ],
        "hour": asdict(hour) if hour else None,
    }
