"""What goes home is what was logged, whenever the metadata writer comes; a check that says so.

Beside these, `python -m pytest -p tests.fs.covered tests/fs` looks at all other tests in this way.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fs import namespace
from fs.cache.inode import Inode
from fs.log.transaction import Transaction
from fs.volume import Volume
from fs.xfs import dir as directory
from tests import support
from tests.fs.covered import Coverage, coverage
from tests.fs.imagefiles import a_file, opened
from tests.fs.worlds import Ours

__all__ = ["coverage"]

NAMES = 40


async def operate(world: Ours, rng: random.Random, rounds: int) -> None:
    """Names, sizes, attributes and extents that come and go, and a sync now and then."""
    here: set[str] = set()
    await world.mkdir("d")
    for _ in range(rounds):
        path = f"d/{rng.randrange(NAMES)}"
        if path not in here:
            await world.create(path)
            here.add(path)
        elif rng.random() < 0.3:
            await world.unlink(path)
            here.remove(path)
        else:
            at = rng.randrange(50) << 12
            await rng.choice(
                (
                    lambda p=path, at=at: world.write(p, at, rng.randbytes(rng.randrange(1, 9000))),
                    lambda p=path, at=at: world.truncate(p, at),
                    lambda p=path, at=at: world.fallocate(p, rng.choice((0, 1, 3)), at, 20000),
                    lambda p=path: world.set_attr(p, f"user.{rng.randrange(9)}", b"v" * 300),
                    lambda p=path: world.chmod(p, rng.randrange(0o1000)),
                )
            )()
        if rng.random() < 0.05:
            await world.sync()


@pytest.mark.parametrize("args", [(), ("-m", "rmapbt=1", "-b", "size=1k")], ids=["4k", "rmapbt"])
async def test_under_load(args: tuple[str, ...], scratch: Path, coverage: Coverage) -> None:
    """The writer comes in the midst, too, between any two steps of a transaction."""
    image = support.mkfs(scratch, *args)
    async with opened(image) as vol:
        vol.metadata_period_s = 0.01
        await operate(Ours(vol), random.Random(1), 400)
    assert coverage.compared > 300
    support.assert_clean(image)


async def make(vol: Volume, root: Inode, what: str) -> Inode:
    if what == "directory":
        return await namespace.mkdir(vol, root, b"new", 0o755, 0, 0)
    if what == "link":
        return await namespace.symlink(vol, root, b"new", b"t" * 900, 0, 0)
    return await namespace.create(vol, root, b"new", 0o644, 0, 0)


@pytest.mark.parametrize("what", ["file", "directory", "link"])
async def test_a_new_inode_stays_until_it_is_committed(
    what: str, scratch: Path, coverage: Coverage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken home by a writer who comes while its name is entered."""
    image, add, came = support.mkfs(scratch), directory.add, 0

    async def slowly(tp: Transaction, *rest: Any) -> None:
        nonlocal came
        came += 1
        done = tp.vol._metadata_done
        tp.vol.wake_metadata()
        await done.wait()
        await add(tp, *rest)

    async with opened(image) as vol:
        monkeypatch.setattr(vol, "admits", lambda *_: None)  # nothing is one kernel's
        root = await vol.inodes.get(vol.geo.root_ino)
        vol.inodes.put(await namespace.create(vol, root, b"first", 0o644, 0, 0))
        await vol.flush_metadata()
        monkeypatch.setattr(directory, "add", slowly)
        ip = await make(vol, root, what)
        assert ip.dirty, "what the transaction changed was taken home before its end"
        vol.inodes.put(ip)
        vol.inodes.put(root)
    assert came == 1
    support.assert_clean(image)


# -- the check itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["AGI", "inode"])
async def test_it_sees_what_is_not_logged(
    lost: str, scratch: Path, coverage: Coverage, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = support.mkfs(scratch)
    log = Transaction.log

    def forgetful(tp: Transaction, buf: Any) -> None:
        if buf.data[:4].tobytes() != b"XAGI":
            log(tp, buf)

    async with opened(image) as vol, a_file(vol) as ip:
        monkeypatch.setattr(vol, "admits", lambda *_: None)
        if lost == "AGI":
            await vol.flush_metadata()
            monkeypatch.setattr(Transaction, "log", forgetful)
            root = await vol.inodes.get(vol.geo.root_ino)
            vol.inodes.put(await namespace.create(vol, root, b"more", 0o644, 0, 0))
            vol.inodes.put(root)
            monkeypatch.setattr(Transaction, "log", log)
        else:
            ip.mode ^= 0o111
    assert coverage.found
    coverage.found.clear()
