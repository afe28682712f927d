"""Directories that we change: random runs against a dict, the judges, and the kernel's listing."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from pathlib import Path

import pytest
import trio

from fs import namespace
from fs.cache.inode import Inode
from fs.volume import Volume
from fs.xfs import dir as directory
from tests import support
from tests.fs import dirmodel
from tests.fs.dirimages import IMAGES, form, listed, names_of, opened, using

images = pytest.mark.parametrize("args", IMAGES.values(), ids=IMAGES.keys())
COLLIDING = dirmodel.colliding(400)


class Mirror:
    """A directory of hard links to one file, and the dict that it must equal."""

    def __init__(self, vol: Volume, dp: Inode, target: Inode, seed: int) -> None:
        self.vol, self.dp, self.target = vol, dp, target
        self.rng = random.Random(seed)
        self.names: set[bytes] = set()
        self.forms: set[str] = set()

    def fresh(self) -> bytes:
        kind = self.rng.randrange(5)
        if kind == 0:
            return self.rng.choice(COLLIDING)
        if kind == 1:
            return b"%d-" % self.rng.randrange(1 << 20) + b"L" * self.rng.randrange(200, 248)
        return b"n%d" % self.rng.randrange(1 << 30)

    async def step(self, growth: float) -> None:
        """Add or remove one name; errors must be those of the dict."""
        if self.rng.random() < growth or not self.names:
            name = self.fresh()
            try:
                await namespace.link(self.vol, self.dp, name, self.target)
            except FileExistsError:
                assert name in self.names
            self.names.add(name)
        else:
            name = self.rng.choice(sorted(self.names))
            await namespace.unlink(self.vol, self.dp, name)
            self.names.remove(name)

    async def check(self) -> None:
        assert set(await names_of(self.vol, self.dp)) == self.names
        assert self.target.nlink == 1 + len(self.names)
        self.forms.add(await form(self.vol, self.dp))

    async def run(self, steps: int, growth: float) -> None:
        for i in range(steps):
            await self.step(growth)
            if i % 150 == 0:
                await self.check()
        await self.check()

    async def empty(self) -> None:
        for name in self.rng.sample(sorted(self.names), len(self.names)):
            await namespace.unlink(self.vol, self.dp, name)
        self.names.clear()
        await self.check()


def check_with_kernel(image: Path, where: Path, name: str, names: set[bytes]) -> None:
    """The judges are silent, and the kernel lists the same names."""
    support.assert_clean(image)
    if not support.is_root():
        return
    with support.kernel_mount(image, where) as mount:
        assert {os.fsencode(n) for n in os.listdir(mount / name)} == names


@images
@pytest.mark.parametrize("seed", [1, 2])
async def test_random_changes(scratch: Path, args: tuple[str, ...], seed: int) -> None:
    image = support.mkfs(scratch, *args)
    async with opened(image) as vol, using(vol) as root:
        dp = await namespace.mkdir(vol, root, b"d", 0o755, 0, 0)
        target = await namespace.create(vol, root, b"t", 0o644, 0, 0)
        mirror = Mirror(vol, dp, target, seed)
        for steps, growth in ((700, 0.9), (500, 0.1), (300, 0.95), (150, 0.5)):
            await mirror.run(steps, growth)
        for ip in (dp, target):
            vol.inodes.put(ip)
    check_with_kernel(image, scratch / "mnt", "d", mirror.names)


async def test_all_forms_up_and_down(scratch: Path) -> None:
    """Names that go in the opposite order take the directory back through every form."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, using(vol) as root:
        dp = await namespace.mkdir(vol, root, b"d", 0o755, 0, 0)
        target = await namespace.create(vol, root, b"t", 0o644, 0, 0)
        names = [b"name-%d" % i + b"x" * (i % 90) for i in range(900)]
        up, down = [], []
        for i, name in enumerate(names):
            await namespace.link(vol, dp, name, target)
            if i % 10 == 0:
                up.append(await form(vol, dp))
        for i in range(len(names) - 1, -1, -1):
            await namespace.unlink(vol, dp, names[i])
            if i % 10 == 0:
                down.append(await form(vol, dp))
                assert set(await names_of(vol, dp)) == set(names[:i])
        order = ["short", "block", "leaf", "node"]
        assert list(dict.fromkeys(up)) == order
        assert list(dict.fromkeys(down)) == order[::-1]
        assert (dp.size, dp.nblocks, dp.nextents) == (6, 0, 0)
        for ip in (dp, target):
            vol.inodes.put(ip)
    check_with_kernel(image, scratch / "mnt", "d", set())


async def test_cookies_survive_every_conversion(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, using(vol) as root:
        dp = await namespace.mkdir(vol, root, b"d", 0o755, 0, 0)
        target = await namespace.create(vol, root, b"t", 0o644, 0, 0)
        for name in (b"first", b"second", b"third"):
            await namespace.link(vol, dp, name, target)
        before = {e.name: e.next_cookie for e in (await listed(vol, dp))[:4]}
        grown = [b"more%d" % i for i in range(700)]
        for name in grown:
            await namespace.link(vol, dp, name, target)
        assert {e.name: e.next_cookie for e in (await listed(vol, dp))[:4]} == before
        for name in grown:
            await namespace.unlink(vol, dp, name)
        assert await form(vol, dp) == "short"
        assert {e.name: e.next_cookie for e in (await listed(vol, dp))[:4]} == before
        for ip in (dp, target):
            vol.inodes.put(ip)


async def test_removal_without_any_reservation(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be undone without blocks stays, and stays right."""
    image = support.mkfs(scratch, "-b", "size=1k")
    async with opened(image) as vol, using(vol) as root:
        dp = await namespace.mkdir(vol, root, b"d", 0o755, 0, 0)
        target = await namespace.create(vol, root, b"t", 0o644, 0, 0)
        mirror = Mirror(vol, dp, target, 4)
        await mirror.run(1500, 1.0)
        assert await form(vol, dp) == "node"
        with monkeypatch.context() as patch:
            patch.setattr("fs.links.take_if_possible", lambda tp, blocks: None)
            await mirror.run(1000, 0.0)
            await mirror.run(300, 0.6)
            await mirror.empty()
            other = await namespace.mkdir(vol, root, b"e", 0o755, 0, 0)
            await namespace.link(vol, other, b"n", target)
            await namespace.rmdir(vol, root, b"d")
        assert dp.nlink == 0
        for ip in (dp, target, other):
            vol.inodes.put(ip)
    check_with_kernel(image, scratch / "mnt", "e", {b"n"})


async def test_directory_is_left_alone_without_space(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, using(vol) as root:
        dp = await namespace.mkdir(vol, root, b"d", 0o755, 0, 0)
        names = {b"f%d" % i: i for i in range(40)}
        for name in names:
            vol.inodes.put(await namespace.create(vol, dp, name, 0o644, 0, 0))
        hog = vol.space.available
        vol.space.reserve_delalloc(hog)
        with pytest.raises(OSError, match="space") as caught:
            await namespace.create(vol, dp, b"one more", 0o644, 0, 0)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(FileNotFoundError):
            await namespace.lookup(vol, dp, b"one more")
        for name in list(names)[::2]:
            await namespace.unlink(vol, dp, name)
        await vol.drain_inactive()
        vol.space.release_delalloc(hog)
        vol.inodes.put(await namespace.create(vol, dp, b"one more", 0o644, 0, 0))
        assert set(await names_of(vol, dp)) == set(list(names)[1::2]) | {b"one more"}
        vol.inodes.put(dp)
    support.assert_clean(image)


async def test_many_tasks_change_one_directory(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, using(vol) as root:
        dp = await namespace.mkdir(vol, root, b"d", 0o755, 0, 0)

        async def work(task: int) -> None:
            for i in range(40):
                name = b"%d-%d" % (task, i)
                vol.inodes.put(await namespace.create(vol, dp, name, 0o644, 0, 0))
                await trio.lowlevel.checkpoint()
                if i % 3 == 0:
                    await namespace.unlink(vol, dp, name)
                elif i % 3 == 1:
                    await namespace.rename(vol, dp, name, dp, name + b"!")

        async with trio.open_nursery() as nursery:
            for task in range(6):
                nursery.start_soon(work, task)
        wanted = {b"%d-%d!" % (t, i) for t in range(6) for i in range(1, 40, 3)}
        wanted |= {b"%d-%d" % (t, i) for t in range(6) for i in range(2, 40, 3)}
        assert set(await names_of(vol, dp)) == wanted
        vol.inodes.put(dp)
    check_with_kernel(image, scratch / "mnt", "d", wanted)


async def test_large_inode_numbers(scratch: Path) -> None:
    """Numbers beyond 32 bits widen a shortform directory, and narrow it again."""
    image = support.mkfs(scratch, size=4 << 40)
    async with opened(image, 64 << 20) as vol, using(vol) as root:
        for i in range(4):  # directories go to all AGs in turn
            wide = await namespace.mkdir(vol, root, b"wide%d" % i, 0o755, 0, 0)
            if wide.ino > 0xFFFFFFFF:
                break
            vol.inodes.put(wide)
        assert wide.ino > 0xFFFFFFFF
        dp = await namespace.mkdir(vol, wide, b"d", 0o755, 0, 0)
        target = await namespace.create(vol, root, b"t", 0o644, 0, 0)
        far = await namespace.create(vol, wide, b"t", 0o644, 0, 0)
        for i in range(6):
            await namespace.link(vol, root, b"near%d" % i, target)
            await namespace.link(vol, root, b"far%d" % i, far)
        for i in range(6):
            await namespace.unlink(vol, root, b"far%d" % i)
        async with vol.reader(root) as tp:
            assert (await directory.lookup(tp, root, b"near3") or (0, 0))[0] == target.ino
        await namespace.rename(vol, wide, b"d", root, b"moved")
        for ip in (wide, dp, target, far):
            vol.inodes.put(ip)
    done = subprocess.run(["xfs_repair", "-n", image], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
