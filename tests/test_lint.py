"""The linters, as tests: a run of the suite says everything that must hold before a commit."""

from __future__ import annotations

import subprocess
import sys

from tests.source import ROOT


def run(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff() -> None:
    run("ruff", "check", ".")


def test_mypy() -> None:
    run("mypy")
