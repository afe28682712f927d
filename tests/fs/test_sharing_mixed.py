"""Files that share blocks, under everything that changes an extent map, with and without space."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio.testing

from fs import copyrange, file, trim
from fs.fallocate import COLLAPSE_RANGE, INSERT_RANGE, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import opened
from tests.fs.test_copyrange import FORMS, MOST, Model, files, judge
from tests.fs.test_file import contents

LONGEST = 100_000


class Mixed(Model):
    """Some files, copied and cut up at random, and the bytes that they should have."""

    choices = (
        *("write",) * 5, *("copy",) * 8, *("read",) * 4, "truncate", "reclaim",
        "allocate", "punch", "zero", "collapse", "insert", "trim",
    )  # fmt: skip

    async def step(self) -> None:
        await getattr(self, self.random.choice(self.choices))(
            self.random.randrange(len(self.inodes))
        )

    async def change(self, i: int, at: int, n: int, mode: int) -> None:
        await fallocate(self.vol, self.inodes[i], at, n, mode)

    def span(self, i: int) -> tuple[int, int]:
        at = self.place(len(self.bytes[i]))
        return at, min(self.random.randint(1, LONGEST), MOST - at)

    def grow(self, i: int, size: int) -> None:
        self.bytes[i].extend(bytes(max(size - len(self.bytes[i]), 0)))

    async def allocate(self, i: int) -> None:
        at, n = self.span(i)
        keep = self.random.choice((0, KEEP_SIZE))
        await self.change(i, at, n, keep)
        if not keep:
            self.grow(i, at + n)

    async def punch(self, i: int) -> None:
        at, n = self.span(i)
        await self.change(i, at, n, PUNCH_HOLE | KEEP_SIZE)
        end = min(at + n, len(self.bytes[i]))
        if end > at:
            self.bytes[i][at:end] = bytes(end - at)

    async def zero(self, i: int) -> None:
        at, n = self.span(i)
        await self.change(i, at, n, ZERO_RANGE)
        self.grow(i, at + n)
        self.bytes[i][at : at + n] = bytes(n)

    def blocks(self, i: int) -> tuple[int, int]:
        """A range of whole blocks that begins inside the file."""
        size = self.vol.geo.block_size
        at = self.random.randrange(len(self.bytes[i]) + 1) // size * size
        return at, self.random.randint(1, 20) * size

    async def collapse(self, i: int) -> None:
        at, n = self.blocks(i)
        if at + n < len(self.bytes[i]):
            await self.change(i, at, n, COLLAPSE_RANGE)
            del self.bytes[i][at : at + n]

    async def insert(self, i: int) -> None:
        at, n = self.blocks(i)
        if at < len(self.bytes[i]) <= MOST - n:
            await self.change(i, at, n, INSERT_RANGE)
            self.bytes[i][at:at] = bytes(n)

    async def trim(self, i: int) -> None:
        await trim.trim(self.vol, 0, 1 << 62, 0)


class Crowded(Mixed):
    """The same where space runs out: what an operation did before that is taken as it is."""

    refused = 0

    async def step(self) -> None:
        try:
            await super().step()
        except OSError as error:
            assert error.errno == errno.ENOSPC
            self.refused += 1
            for i, ip in enumerate(self.inodes):
                self.bytes[i][:] = await contents(self.vol, ip)
                assert ip.size == len(self.bytes[i])

    async def write(self, i: int) -> None:
        at, n = self.span(i)
        data = self.random.randbytes(n)
        done = await file.write(self.vol, self.inodes[i], at, data)
        self.grow(i, at + done)
        self.bytes[i][at : at + done] = data[:done]

    async def copy(self, i: int) -> None:
        j = self.random.randrange(len(self.inodes))
        (at, n), to = self.span(i), self.place(len(self.bytes[j]))
        if i == j and at < to + n and to < at + n:
            return
        data = self.bytes[i][at : at + n]
        done = await copyrange.copy(self.vol, self.inodes[i], at, self.inodes[j], to, n)
        now = await contents(self.vol, self.inodes[j])
        assert now[to : to + done] == data[:done]
        if done == len(data):
            self.grow(j, to + done if done else 0)
            self.bytes[j][to : to + done] = data
            assert now == self.bytes[j]
        self.bytes[j][:] = now


async def fill(vol: Volume, leave: int) -> None:
    """Allocate all but `leave` blocks to a file of its own."""
    async with files(vol, "z") as (ip,):
        while (most := vol.space.available - leave) > 10:
            at, n = ip.size, (most - 5) * vol.geo.block_size
            await fallocate(vol, ip, at, n, 0)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["4k", "1k rmapbt", "64k"])
async def test_everything_that_changes_maps(
    scratch: Path, name: str, seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    image = support.mkfs(scratch, *FORMS[name])
    async with opened(image, 16 << 20, seed, 0.02) as vol, files(vol, "abc") as inodes:
        model = Mixed(vol, inodes, 8 + seed)
        for i in range(300):
            await model.step()
            if i % 100 == 99:
                await model.check()
        assert model.shared
    judge(image)
    async with opened(image) as vol, files(vol, "abc") as inodes:
        model.vol, model.inodes = vol, inodes
        await model.check()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["4k", "1k rmapbt"])
async def test_where_space_runs_out(
    scratch: Path, name: str, seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    """No shutdown, no lost write-back, and nothing changes but what an operation was about."""
    image = support.mkfs(scratch, *FORMS[name])
    async with opened(image, 16 << 20, seed, 0.02) as vol, files(vol, "abc") as inodes:
        await fill(vol, 150)
        model = Crowded(vol, inodes, seed)
        for i in range(300):
            await model.step()
            if i % 50 == 49:
                await model.check()
        assert model.refused
        assert model.shared
        assert not vol.pages.lost_pages
    judge(image)
