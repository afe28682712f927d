"""A line a second about a mount: what `.nofail/` says, as vmstat(8) shows a machine.

Columns stand in sections, of which some may be chosen. Each is a figure of one of the files, or
the sum of several: as it is, or what it grew by since the line before, a second. The first line's
growth is unknown and shown as `-`. Values in KiB are shown in MiB.

Files have lines `name value` or `name: value unit`; or they are tables whose first line, behind a
`#`, names the columns: then a column's figures are `name.row`, `name` is their sum, and a row is
named by its first column.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fs.errors import UserError

HEADER_EVERY = 20  # lines
KIB = 1024
LARGE = (1024, 2048, 4096, 8192)  # KiB: writes that a device takes at its full speed
GAUGE, RATE = "gauge", "rate"

Figures = dict[tuple[str, str], float]


@dataclass(frozen=True)
class Column:
    """A figure, or a sum: a file below `.nofail/`, names there, and how it is shown."""

    title: str
    file: str
    name: str  # or several: a+b
    kind: str = GAUGE
    divisor: int = 1

    @property
    def width(self) -> int:
        return max(len(self.title), 6)

    def value(self, figures: Figures) -> float:
        return sum(figures[self.file, name] for name in self.name.split("+")) / self.divisor


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
    "folios": (
        Column("4k", "folios", "cached.0", divisor=KIB),
        Column("8-32k", "folios", "cached.1+cached.2+cached.3", divisor=KIB),
        Column("64-256k", "folios", "cached.4+cached.5+cached.6", divisor=KIB),
        Column("512k-2m", "folios", "cached.7+cached.8+cached.9", divisor=KIB),
        Column("split/s", "folios", "split", RATE),
        Column("failed/s", "folios", "split_failed", RATE),
        Column("merged/s", "folios", "merged", RATE),
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
    "io": (
        Column("reads/s", "io", "reads", RATE),
        Column("read/s", "io", "read_kB", RATE, KIB),
        Column("writes/s", "io", "writes", RATE),
        Column("written/s", "io", "written_kB", RATE, KIB),
        Column(">=1m/s", "io", "+".join(f"written_kB.{kib}" for kib in LARGE), RATE, KIB),
    ),
}


def chosen(names: Sequence[str]) -> dict[str, tuple[Column, ...]]:
    """The sections of these names; none: all. Raises UserError for one that nobody knows."""
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise UserError(f"no section {unknown[0]}; there are {' '.join(SECTIONS)}", 1)
    return {name: SECTIONS[name] for name in names or SECTIONS}


def figures_of(text: str) -> dict[str, float]:
    """What a report says, by name; of a table, each title's rows and their sum."""
    rows = [line.replace(":", " ").split() for line in text.splitlines()]
    if not text.startswith("#"):
        return {name: float(value) for name, value, *_ in rows}
    found: dict[str, float] = {}
    (_, _, *titles), *table = rows
    for row, *values in table:
        numbers = [float(value) for value in values if value != "kB"]
        for title, number in zip(titles, numbers, strict=True):
            found[f"{title}.{row}"] = number
            found[title] = found.get(title, 0) + number
    return found


def read(root: Path, columns: Sequence[Column]) -> Figures:
    """The figures of these columns. Raises UserError where there are no reports."""
    found: Figures = {}
    for file in {column.file for column in columns}:
        try:
            lines = figures_of((root / ".nofail" / file).read_text())
        except OSError as error:
            reason = f"{root}/.nofail/{file}: {error.strerror}; is it mounted?"
            raise UserError(reason, 1) from error
        found |= {(file, name): value for name, value in lines.items()}
    return found


def row(columns: Sequence[Column], now: Figures, before: Figures, seconds: float) -> str:
    """One line; `before` is empty for the first."""
    words = []
    for column in columns:
        value = column.value(now)
        if column.kind == RATE and not before:
            words.append(f"{'-':>{column.width}}")
            continue
        if column.kind == RATE:
            value = (value - column.value(before)) / seconds
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
