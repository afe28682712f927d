"""Who may import whom, and what may not be imported at all by a command that must be quick."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.source import ROOT

LINT = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]


def lint(where: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LINT, "--config", str(ROOT / "pyproject.toml")],
        cwd=where,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(where), "PATH": "/usr/bin:/bin"},
    )


def test_rooms_call_downwards() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    """Calibration: the same contracts over a tree that breaks one."""
    for room in (
        "alloc",
        "writeback",
        "fs",
        "fs/xfs",
        "fs/cache",
        "fs/log",
        "fs/device",
        "fs/front",
    ):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("")
    (tmp_path / "alloc" / "bad.py").write_text("import fs.xfs\n")
    done = lint(tmp_path)
    assert done.returncode != 0
    assert "alloc.bad -> fs.xfs" in done.stdout


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_program_starts_without_the_compiler() -> None:
    """`nofailfs info`, `umount` and the rest must not wait for numba's import."""
    loaded = imported_by("import tools.main")
    assert not loaded & {"numba", "llvmlite", "pyfuse3", "numpy", "trio"}
