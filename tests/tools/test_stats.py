"""Lines about a mount: columns, rates between two readings, sections; files are a directory's."""

from __future__ import annotations

from pathlib import Path

import pytest

from fs.errors import UserError
from tools import stats


def reports(root: Path, dirtied: int) -> None:
    """Files as `.nofail/` has them, with everything that any column names."""
    (root / ".nofail").mkdir(exist_ok=True)
    for file in ("meminfo", "vmstat", "writeback"):
        names = {c.name for s in stats.SECTIONS.values() for c in s if c.file == file}
        text = "".join(f"{name}:   {dirtied} kB\n" for name in sorted(names))
        text = text.replace(":", "") if file == "vmstat" else text
        (root / ".nofail" / file).write_text(text)
    table = "# order size cached split split_failed merged\n"
    table += "".join(f"{row} {4 << row} kB {dirtied} kB {row} 0 {dirtied}\n" for row in range(10))
    (root / ".nofail" / "folios").write_text(table)
    table = "# size_kB reads read_kB writes written_kB\n"
    table += "".join(f"{1 << row >> 1} {row} 0 2 {dirtied}\n" for row in range(15))
    (root / ".nofail" / "io").write_text(table)


def test_rates_are_growth_a_second(tmp_path: Path) -> None:
    columns = [stats.Column("a", "writeback", "BdiDirtied", stats.RATE, 1024)]
    columns.append(stats.Column("b", "writeback", "BdiDirtied", divisor=1024))
    reports(tmp_path, 1024)
    first = stats.read(tmp_path, columns)
    assert stats.row(columns, first, {}, 1.0).split() == ["-", "1.0"]
    reports(tmp_path, 5120)
    assert stats.row(columns, stats.read(tmp_path, columns), first, 2.0).split() == ["2.0", "5.0"]


def test_a_table_has_figures_by_row_and_sums(tmp_path: Path) -> None:
    columns = [stats.Column("a", "folios", name) for name in ("size.2+size.3", "cached.1", "split")]
    columns.append(stats.Column("b", "folios", "merged", stats.RATE))
    reports(tmp_path, 100)
    first = stats.read(tmp_path, columns)
    reports(tmp_path, 130)
    now = stats.read(tmp_path, columns)
    assert stats.row(columns, now, first, 2.0).split() == ["48", "130", "45", "150"]


def test_lines_and_header_have_the_same_columns(tmp_path: Path) -> None:
    reports(tmp_path, 2048)
    for names in ((), ("writeback",), ("reclaim", "memory")):
        found = list(stats.lines(tmp_path, names, 0.0, stats.HEADER_EVERY + 1))
        assert len(found) == stats.HEADER_EVERY + 1 + 4
        assert len({len(line) for line in found}) == 1
        assert all(name in found[0] for name in names)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is it mounted"):
        next(iter(stats.lines(tmp_path, ["memory"], 0.0, 1)))
    with pytest.raises(UserError, match="no section swap"):
        stats.chosen(["swap"])
