"""Errors of the device through a mount: who is told, and what becomes of everything else."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from fs import mapread, namespace
from fs.volume import Volume
from tests import support
from tests.mount.test_handlers import away, served
from tests.mount.test_policy import volume

BYTES = 100_000
FRONTS = ("lanes=0", "lanes=2", "cache=writeback")


async def place_of(vol: Volume, name: str) -> tuple[int, int]:
    """First and last byte on the device of a file in the root that is in one piece."""
    root = await vol.inodes.get(vol.geo.root_ino)
    ip = await namespace.lookup(vol, root, name.encode())
    (piece,) = await mapread.read(vol, ip, 0, ip.size + 4095 >> 12)
    for inode in (ip, root):
        vol.inodes.put(inode)
    at = vol.geo.fsb_to_bytes(piece.fsbno)
    return at, at + (piece.count << 12) - 1


def tune(where: Path, **values: int) -> None:
    """Write tunables of the device."""
    for name, value in values.items():
        (where / ".nofail/sys/device" / f"fail_{name}").write_text(str(value))


def written(where: Path) -> bool:
    """Whether nothing is dirty or on its way."""
    counts = dict(line.split() for line in (where / ".nofail/vmstat").read_text().splitlines())
    return counts["nr_dirty"] == counts["nr_writeback"] == "0"


def fsync(fd: int) -> int:
    """errno of an fsync; 0 if it worked."""
    try:
        os.fsync(fd)
    except OSError as error:
        return error.errno or 0
    return 0


@support.needs_root
@pytest.mark.parametrize("kind", ["write", "torn"])
@pytest.mark.parametrize("front", FRONTS)
async def test_exactly_the_fsyncs_that_linux_fails(
    scratch: Path, front: str, kind: str, allow_logs: Callable[[str], None]
) -> None:
    """Each that had the file open, once; one that opened it after only if nobody was told."""
    allow_logs("write-back failed, data is lost")
    image, where = support.mkfs(scratch), scratch / "mnt"

    def setup() -> None:
        for name in "ab":
            with (where / name).open("wb") as file:
                file.write(name.encode() * BYTES)
                file.flush()
                os.fsync(file.fileno())

    def fail(first: int, last: int) -> None:
        tune(where, first=first, last=last, **{f"{kind}_ppm": 1_000_000})
        one, two = (os.open(where / "a", os.O_RDWR) for _ in range(2))
        other = os.open(where / "b", os.O_RDWR)
        os.pwrite(one, b"A" * BYTES, 0)
        os.pwrite(other, b"B" * BYTES, 0)
        assert [fsync(fd) for fd in (other, one, one, two, two)] == [0, errno.EIO, 0, errno.EIO, 0]
        three = os.open(where / "a", os.O_RDWR)
        assert fsync(three) == 0, "everybody knows"
        os.pwrite(three, b"C" * BYTES, 0)
        for fd in (one, two, three):
            os.close(fd)
        for period in ("expire", "writeback"):
            (where / f".nofail/sys/vm/dirty_{period}_centisecs").write_text("1")
        support.wait_until(lambda: written(where), "nothing was written in the background")
        again, more = (os.open(where / "a", os.O_RDONLY) for _ in range(2))
        assert (fsync(again), fsync(more), fsync(more)) == (errno.EIO, errno.EIO, 0), "nobody knew"
        tune(where, **{f"{kind}_ppm": 0})
        late = os.open(where / "a", os.O_RDWR)
        os.pwrite(late, b"D" * BYTES, 0)
        assert [fsync(fd) for fd in (late, again)] == [0, 0]
        for fd in (again, more, late, other):
            os.close(fd)

    async with served(image, where, f"{front},faults=seed=1") as session:
        await away(setup)
        first, last = await place_of(volume(session), "a")
        await away(lambda: fail(first, last))
    support.assert_clean(image)
    with support.kernel_mount(image, scratch / "kernel") as there:
        assert (there / "a").read_bytes() == b"D" * BYTES
        assert (there / "b").read_bytes() == b"B" * BYTES


@support.needs_root
async def test_a_record_of_a_mount(scratch: Path) -> None:
    """It is played back by tests/fs/test_devices.py; here it is made, and refused."""
    image, where = support.mkfs(scratch), scratch / "mnt"
    async with served(image, where, f"record={scratch}/log"):
        await away(lambda: (where / "a").write_bytes(b"a" * BYTES))
        await trio.sleep(0)
    log = (scratch / "log").read_bytes()
    assert log.startswith((0x6A736677736872).to_bytes(8, "little"))
    assert b"a" * 4096 in log
    refused = support.nofailfs("mount", image, where, "-o", f"record={scratch}/no/log")
    assert refused.returncode == 2
    assert "record=" in refused.stderr
    assert "No such file" in refused.stderr
