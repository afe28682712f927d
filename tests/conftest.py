"""What every test gets: a kernel cache of this session, scratch directories, the log police.

The compiled kernels live in a directory of this session (or NOFAILFS_CACHE_DIR, for a developer
who runs one test many times): a cache shared with older sources could hide a stale kernel. It
must be set before anything imports `alloc.jit`. Daemons and the worker processes of `-n` inherit
it. Before workers start, one process compiles every kernel: numba cannot have several processes
write one cache.

The log police: a WARNING or worse from one of our loggers fails the test that caused it, unless
the test asks for `allow_logs` and names the message it expects.

The lock-order validator (alloc/lockdep.py) watches all tests, and all daemons that they start. It
remembers the orders of earlier tests, so paths that no single test takes together are compared,
too; its reports are ERRORs, for the police.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

if "NOFAILFS_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="nofailfs-kernels-")
    os.environ["NOFAILFS_CACHE_DIR"] = _cache
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

if "NOFAILFS_TEST_LANES" in os.environ:  # of every mount that does not say lanes=
    os.environ["NOFAILFS_LANES"] = os.environ["NOFAILFS_TEST_LANES"]
if "NOFAILFS_TEST_TRANSPORT" in os.environ:  # of every mount that does not say transport=
    os.environ["NOFAILFS_TRANSPORT"] = os.environ["NOFAILFS_TEST_TRANSPORT"]

os.environ["NOFAILFS_LOCKDEP"] = "1"

from alloc import lockdep
from tests import support
from tools.targets import scratch_dir

ROOT = Path(__file__).resolve().parent.parent

OUR_LOGGERS = ("alloc", "writeback", "fs", "tools", "nofailfs")


class Police(logging.Handler):
    """Collects what our loggers say at WARNING and above while a test runs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[str] = []
        self.allowed: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.split(".")[0] in OUR_LOGGERS:
            self.records.append(f"{record.levelname} {record.name}: {record.getMessage()}")

    def unexpected(self) -> list[str]:
        """Records that no allowed pattern matches."""
        return [
            text
            for text in self.records
            if not any(re.search(pattern, text) for pattern in self.allowed)
        ]


POLICE = Police()


class AllowLogs:
    """What the fixture gives: `allow_logs(regex)` lets matching records of this test through."""

    def __call__(self, pattern: str) -> None:
        POLICE.allowed.append(pattern)

    @property
    def seen(self) -> list[str]:
        """All records of this test so far, allowed or not."""
        return list(POLICE.records)


@pytest.fixture
def allow_logs() -> AllowLogs:
    """Name the warnings that a test means to provoke."""
    return AllowLogs()


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A private directory, in memory where that has room; for images and mount points."""
    with scratch_dir() as path:
        try:
            yield path
        finally:
            support.unmount_below(path)


def warm_for_workers(config: pytest.Config) -> None:
    """Compile all kernels before worker processes start."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        command = [sys.executable, "-m", "fs.warmup"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def pytest_configure(config: pytest.Config) -> None:
    warm_for_workers(config)
    logging.getLogger().addHandler(POLICE)
    lockdep.start()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if (here / "mount") in item.path.parents:
            item.add_marker(pytest.mark.mount)
            item.add_marker(support.needs_fuse)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    POLICE.records.clear()
    POLICE.allowed.clear()
    validator = lockdep.start()
    validator.context = item.nodeid
    validator.forget_tasks()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    unexpected = POLICE.unexpected()
    if unexpected:
        pytest.fail("unexpected log records:\n  " + "\n  ".join(unexpected), pytrace=False)
    return result
