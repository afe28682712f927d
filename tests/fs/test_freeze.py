"""Freezing: what a copy of the image has then, and who waits meanwhile."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import trio
import trio.testing

from fs import file, namespace
from fs.freeze import FROZEN, THAWED
from fs.log import items
from fs.volume import Volume
from tests import support
from tests.conftest import AllowLogs
from tests.fs.imagefiles import a_file, opened
from tests.fs.test_log_reader import read_log

DATA = b"frozen" * 2000


async def write(vol: Volume, name: bytes, data: bytes = DATA) -> None:
    """As a request does it."""
    async with vol.freezer.writer(), a_file(vol, name) as ip:
        await file.write(vol, ip, 0, data)


async def covered(image: Path) -> bool:
    """Whether the log has nothing but the superblock, in one checkpoint."""
    _, ends, found = await read_log(image)
    assert not ends.clean
    (checkpoint,) = found
    (item,) = checkpoint.items()
    return items.kind_of(item) == items.BUF and items.buffer(item).daddr == 0


@pytest.mark.parametrize("args", [(), ("-b", "size=1k", "-m", "rmapbt=1")], ids=["4k", "1k"])
@support.needs_root
async def test_a_copy_is_whole(args: tuple[str, ...], scratch: Path) -> None:
    """With all that was written, also of a file that has no name any more, which is freed."""
    image, copy = support.mkfs(scratch, *args), scratch / "copy"
    async with opened(image) as vol:
        for number in range(50):
            await write(vol, b"%d" % number)
        async with a_file(vol, b"open") as ip:
            await file.write(vol, ip, 0, DATA)
            root = await vol.inodes.get(vol.geo.root_ino)
            await namespace.unlink(vol, root, b"open")
            vol.inodes.put(root)
            await vol.freezer.freeze()
            shutil.copyfile(image, copy)
            vol.freezer.thaw()
        await write(vol, b"later")
    assert await covered(copy)
    support.assert_clean(image)
    ours = scratch / "ours"
    shutil.copyfile(copy, ours)
    async with opened(ours) as vol:
        pass
    support.assert_clean(ours)
    for one in (copy, ours):
        with support.kernel_mount(one, scratch / "mnt") as there:
            found = {path.name: path.read_bytes() for path in there.iterdir()}
        assert found == {str(number): DATA for number in range(50)}
        support.assert_clean(one)


async def test_writers_wait_and_readers_do_not(scratch: Path) -> None:
    image = support.mkfs(scratch)
    done: list[str] = []
    async with opened(image) as vol:
        await write(vol, b"file")
        await vol.freezer.freeze()
        assert vol.freezer.level == FROZEN
        counts = dict(vol.xlog.counts)

        async def change() -> None:
            await write(vol, b"more")
            done.append("changed")

        async def transact() -> None:
            async with vol.transaction("sb"):
                done.append("transacted")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            nursery.start_soon(transact)
            with trio.move_on_after(0.2):
                await trio.sleep_forever()
            assert not done
            async with a_file(vol, b"file") as ip:
                assert bytes(await file.read(vol, ip, 0, len(DATA))) == DATA
                await file.fsync(vol, ip, False, 0)
            assert vol.admits("create") is None
            assert vol.xlog.counts["checkpoints"] == counts["checkpoints"]
            with pytest.raises(OSError) as busy:
                await vol.freezer.freeze()
            assert busy.value.errno == errno.EBUSY
            vol.freezer.thaw()
        assert sorted(done) == ["changed", "transacted"]
        assert vol.freezer.level == THAWED
    support.assert_clean(image)


async def test_whoever_is_under_way_ends_first(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol:
        go_on, order = trio.Event(), []

        async def change() -> None:
            async with vol.freezer.writer():
                await go_on.wait()
                async with a_file(vol, b"file") as ip:
                    await file.write(vol, ip, 0, DATA)
                order.append("written")

        async def freeze() -> None:
            await vol.freezer.freeze()
            order.append("frozen")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.start_soon(freeze)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not order
            go_on.set()
        assert order == ["written", "frozen"]
        assert not vol.pages.dirty.nr_dirty


async def test_the_end_and_a_shutdown_thaw(scratch: Path, allow_logs: AllowLogs) -> None:
    allow_logs("Shutting down|unmounted after a shutdown")
    image = support.mkfs(scratch)
    async with opened(image) as vol:
        await write(vol, b"file")
        await vol.freezer.freeze()
    support.assert_clean(image)
    with pytest.raises(AssertionError):
        async with opened(image) as vol:
            await vol.freezer.freeze()
            async with trio.open_nursery() as nursery:

                async def change() -> None:
                    with pytest.raises(OSError, match="shut down"):
                        await write(vol, b"more")

                nursery.start_soon(change)
                await trio.testing.wait_all_tasks_blocked(0.05)
                vol.shutdown("the test told to")
