"""A line a second about a mount: what `.nofail/` says, as vmstat(8) shows a machine.

Columns stand in sections, of which some may be chosen. Each is a figure of one of the files, which
have lines `name value` or `name: value unit`: as it is, or what it grew by since the line before,
a second. The first line's growth is unknown and shown as `-`. Values in KiB are shown in MiB.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fs.errors import UserError

HEADER_EVERY = 20  # lines
KIB = 1024
GAUGE, RATE = "gauge", "rate"


@dataclass(frozen=True)
class Column:
    """One figure: a file below `.nofail/`, its name there, and how it is shown."""

    title: str
    file: str
    name: str
    kind: str = GAUGE
    divisor: int = 1

    @property
    def width(self) -> int:
        return max(len(self.title), 6)


SECTIONS: dict[str, tuple[Column, ...]] = {
    "memory": (
        Column("free", "meminfo", "MemFree", divisor=KIB),
        Column("cached", "meminfo", "Cached", divisor=KIB),
        Column("dirty", "meminfo", "Dirty", divisor=KIB),
        Column("slab", "meminfo", "Slab", divisor=KIB),
    ),
    "reclaim": (
        Column("scan/s", "vmstat", "pgscan_kswapd", RATE),
        Column("direct/s", "vmstat", "pgscan_direct", RATE),
        Column("refault/s", "vmstat", "workingset_refault_file", RATE),
    ),
    "writeback": (
        Column("dirty", "writeback", "BdiReclaimable", divisor=KIB),
        Column("wback", "writeback", "BdiWriteback", divisor=KIB),
        Column("limit", "writeback", "DirtyLimit", divisor=KIB),
        Column("dirtied/s", "writeback", "BdiDirtied", RATE, KIB),
        Column("written/s", "writeback", "BdiWritten", RATE, KIB),
        Column("bw", "writeback", "BdiAvgBandwidth", divisor=KIB),
        Column("ratelim", "writeback", "DirtyRatelimit", divisor=KIB),
        Column("pauses/s", "writeback", "Pauses", RATE),
        Column("pausing", "writeback", "Pausing"),
    ),
}

Figures = dict[tuple[str, str], float]


def chosen(names: Sequence[str]) -> dict[str, tuple[Column, ...]]:
    """The sections of these names; none: all. Raises UserError for one that nobody knows."""
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise UserError(f"no section {unknown[0]}; there are {' '.join(SECTIONS)}", 1)
    return {name: SECTIONS[name] for name in names or SECTIONS}


def figures(report: Path) -> dict[str, float]:
    """The lines of a report by name. OSError."""
    words = (line.replace(":", " ").split() for line in report.read_text().splitlines())
    return {name: float(value) for name, value, *_ in words}


def read(root: Path, columns: Sequence[Column]) -> Figures:
    """The figures of these columns. Raises UserError where there are no reports."""
    found: Figures = {}
    for file in {column.file for column in columns}:
        try:
            lines = figures(root / ".nofail" / file)
        except OSError as error:
            reason = f"{root}/.nofail/{file}: {error.strerror}; is it mounted?"
            raise UserError(reason, 1) from error
        found |= {(file, name): value for name, value in lines.items()}
    return found


def row(columns: Sequence[Column], now: Figures, before: Figures, seconds: float) -> str:
    """One line; `before` is empty for the first."""
    words = []
    for column in columns:
        key = column.file, column.name
        value = now[key] / column.divisor
        if column.kind == RATE and not before:
            words.append(f"{'-':>{column.width}}")
            continue
        if column.kind == RATE:
            value = (value - before[key] / column.divisor) / seconds
        words.append(f"{value:>{column.width}.{1 if column.divisor == KIB else 0}f}")
    return " ".join(words)


def header(sections: dict[str, tuple[Column, ...]]) -> list[str]:
    """Two lines: names of sections over names of columns."""
    titles = [
        " ".join(f"{column.title:>{column.width}}" for column in columns)
        for columns in sections.values()
    ]
    names = [f"{name:-^{len(title)}}" for name, title in zip(sections, titles, strict=True)]
    return [" ".join(names), " ".join(titles)]


def lines(root: Path, names: Sequence[str], interval: float, count: int) -> Iterator[str]:
    """What is to be printed, as it comes; `count` rows, 0: for ever."""
    sections = chosen(names)
    columns = [column for section in sections.values() for column in section]
    before: Figures = {}
    then, number = time.monotonic(), 0
    while not count or number < count:
        if number:
            time.sleep(interval)
        now, at = read(root, columns), time.monotonic()
        if number % HEADER_EVERY == 0:
            yield from header(sections)
        yield row(columns, now, before, at - then)
        before, then, number = now, at, number + 1
