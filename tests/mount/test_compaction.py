"""Compaction under a mount: lanes read and write while every folio that can move does.

fio verifies each block that it wrote, four jobs over twice the memory.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests import support
from tools import fiorun

pytestmark = [pytest.mark.slow]


class Compactor(threading.Thread):
    """Writes compact_memory until it is told to stop."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._path = root / ".nofail/sys/vm/compact_memory"
        self._stop_it = threading.Event()
        self.runs = 0

    def run(self) -> None:
        while not self._stop_it.wait(0.005):
            self._path.write_text("1\n")
            self.runs += 1

    def stop(self) -> None:
        self._stop_it.set()
        self.join()


def numbers(path: Path) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows}


@support.needs_fio
@pytest.mark.parametrize("options", ["", "numa=2,mpol=interleave"])
def test_fio_verifies_while_folios_move(scratch: Path, options: str) -> None:
    image = support.mkfs(scratch, size=512 << 20)
    with support.our_mount(image, scratch / "mnt", memory="16M", options=options) as mount:
        compactor = Compactor(mount.path)
        compactor.start()
        try:
            result = fiorun.run("verify", mount.path, 8 << 20)  # each of four jobs
        finally:
            compactor.stop()
        counts = numbers(mount.path / ".nofail/vmstat")
        print(compactor.runs, {k: v for k, v in counts.items() if "compact" in k or "migr" in k})
        assert result.errors == 0, result.text
        assert compactor.runs > 20
        assert counts["pgmigrate_success"] > 300
    support.assert_clean(image)
