"""The four loads of the endurance run, each for one task or process.

`writer` fills a file of its own, in long runs and in scattered pieces by turns, and after each
round reads back and compares every byte from a cold cache. `storm` looks at files in all
directories, in order and at random. `large` writes and reads 1 MiB at a time while it makes and
removes small files around it, so that large folios are wanted when memory is in pieces. `flood`
makes many files and unlinks them at once, some while they are open.

A load ends its round when time is over, so that what it wrote is compared. The first round is
always a whole one. SIGTERM has it leave what it is at, and say what it did until then.

    python -m tools.lab.loads LOAD ROOT NUMBER SECONDS JSON
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tools.lab import pattern
from tools.lab.cut import Cut
from tools.lab.files import Counted, Ended, Files, Mounted, Tally

CELL = 64 << 10  # what a writer keeps book of
RUN_CELLS = 16
PIECE = 4096
MIB = 1 << 20
DIRECTORY_FILES = 2000
UNKNOWN = -1


@dataclass(frozen=True)
class Sizes:
    """How much the loads want."""

    writers: int = 8
    writer_bytes: int = 128 << 20  # of each writer's file
    files: int = 200_000  # that the storm looks at
    large_bytes: int = 8 << 20
    flood_files: int = 2000


def storm_name(number: int) -> str:
    """Where the storm's file stands."""
    return f"storm{number // DIRECTORY_FILES}/{number}"


async def directory(work: Counted, name: str) -> None:
    """A directory, tried until it is there: a load has nothing to do without."""
    while await work.do("mkdir", work.files.mkdir(name)) is None and not work.over():
        pass


async def plant(work: Counted, number: int, sizes: Sizes) -> None:
    """The storm's files: every other one, by number."""
    files = work.files
    for each in range(number, sizes.files, 2):
        if each % DIRECTORY_FILES < 2:
            await directory(work, f"storm{each // DIRECTORY_FILES}")
        file = await work.do("create", files.create(storm_name(each)))
        if file is not None:
            await files.close(file)


class Writer:
    """One file, and for each cell of it the round in which it was written last."""

    def __init__(self, work: Counted, number: int, sizes: Sizes) -> None:
        self.work = work
        self.number = number
        self.rng = random.Random(number)
        self.rounds = [0] * (sizes.writer_bytes // CELL)
        self.file: Any = None

    def seed(self, cell: int) -> int:
        return self.number << 32 | self.rounds[cell]

    async def run(self) -> None:
        work, files = self.work, self.work.files
        name = f"writers/{self.number}"
        await directory(work, "writers")
        while self.file is None and not work.over():
            self.file = await work.do("create", files.create(name))
        while self.file is not None and (not work.tally.rounds or not work.over()):
            work.tally.rounds += 1
            await (self.stream() if work.tally.rounds % 2 else self.scatter())
            await work.do("fsync", files.sync(self.file))
            await work.do("drop_caches", files.drop_caches())
            await self.compare()

    def _stop(self) -> bool:
        return self.work.over() and self.work.tally.rounds > 1

    async def stream(self) -> None:
        """All cells in order, up to 1 MiB at a time."""
        cell = 0
        while cell < len(self.rounds) and not self._stop():
            count = min(self.rng.randint(1, RUN_CELLS), len(self.rounds) - cell)
            self.rounds[cell : cell + count] = [self.work.tally.rounds] * count
            data = b"".join(
                pattern.words(self.seed(each), each * CELL, CELL).tobytes()
                for each in range(cell, cell + count)
            )
            if not await self.work.write(self.file, cell * CELL, data):
                self.rounds[cell : cell + count] = [UNKNOWN] * count
            cell += count

    async def scatter(self) -> None:
        """Some cells anywhere, each in pieces."""
        for cell in self.rng.sample(range(len(self.rounds)), len(self.rounds) // 4):
            if self._stop():
                return
            self.rounds[cell] = self.work.tally.rounds
            whole, start, at = True, cell * CELL, 0
            while at < CELL:
                length = min(PIECE * self.rng.randint(1, 8), CELL - at)
                data = pattern.words(self.seed(cell), start + at, length).tobytes()
                whole &= await self.work.write(self.file, start + at, data)
                at += length
            if not whole:
                self.rounds[cell] = UNKNOWN

    async def compare(self) -> None:
        """Every byte of the file, read 1 MiB at a time."""
        work = self.work
        for first in range(0, len(self.rounds), RUN_CELLS):
            cells = range(first, min(first + RUN_CELLS, len(self.rounds)))
            start, length = first * CELL, len(cells) * CELL
            data = await work.read(self.file, start, length)
            if data is None:
                continue
            for cell in cells:
                at = cell * CELL - start
                self._compare_cell(cell, memoryview(data)[at : at + CELL])

    def _compare_cell(self, cell: int, data: memoryview) -> None:
        if self.rounds[cell] == UNKNOWN:
            self.work.tally.unknown += CELL
            return
        wrong = pattern.difference(data, self.seed(cell), cell * CELL, CELL)
        if wrong:
            self.work.note_wrong(f"writer {self.number}, cell {cell}: {wrong}")
        else:
            self.work.tally.verified += CELL


async def writer(work: Counted, number: int, sizes: Sizes) -> None:
    await Writer(work, number, sizes).run()


async def storm(work: Counted, number: int, sizes: Sizes) -> None:
    """Look at a directory's files in order, then at as many anywhere; all must be there.

    And at names, always new ones, that are not.
    """
    rng = random.Random(number)
    first = 0
    while not work.over():
        each = list(range(first, min(first + DIRECTORY_FILES, sizes.files)))
        each += rng.choices(range(sizes.files), k=len(each))
        for turn, file in enumerate(each):
            name = storm_name(file)
            if turn % 16 == 15:
                name = f"{name}-{work.tally.operations}"
                if await work.do("lookup", work.files.missing(name)) is False:
                    work.note_wrong(f"{name} is there")
            elif size := await work.do("stat", work.files.stat(name)):
                work.note_wrong(f"{name} has {size} bytes")
            if work.over():
                return
        first += DIRECTORY_FILES
        if first >= sizes.files:
            first = 0
            work.tally.rounds += 1


async def make_file(work: Counted, name: str, seed: int, length: int) -> bool:
    """A file of `length` bytes of the pattern; whether all of it is there."""
    file = await work.do("create", work.files.create(name))
    if file is None:
        return False
    whole = await work.write(file, 0, pattern.words(seed, 0, length).tobytes())
    await work.files.close(file)
    return whole


async def large(work: Counted, number: int, sizes: Sizes) -> None:
    """A large file in requests of 1 MiB, small files coming and going around each of them."""
    rng, files = random.Random(number), work.files
    small: list[str] = []
    await directory(work, "large")
    while not work.over():
        work.tally.rounds += 1
        seed, name = number << 32 | work.tally.rounds, f"large/{work.tally.rounds}"
        file = await work.do("create", files.create(name))
        if file is None:
            continue
        good = []
        for at in range(0, sizes.large_bytes, MIB):
            await fragment(work, rng, small)
            data = pattern.words(seed, at, MIB).tobytes()
            good.append(await work.write(file, at, data))
        for at, known in zip(range(0, sizes.large_bytes, MIB), good, strict=True):
            await fragment(work, rng, small)
            found = await work.read(file, at, MIB)
            if found is None:
                continue
            if not known:
                work.tally.unknown += MIB
            elif wrong := pattern.difference(found, seed, at, MIB):
                work.note_wrong(f"{name}: {wrong}")
            else:
                work.tally.verified += MIB
        await files.close(file)
        await work.do("unlink", files.unlink(name))


async def fragment(work: Counted, rng: random.Random, small: list[str]) -> None:
    """Some small files more; of all that there are half go when they are many, none in order."""
    for _ in range(8):
        name = f"large/s{work.tally.operations}"
        if await make_file(work, name, 1, PIECE * rng.randint(1, 3)):
            small.append(name)
    if len(small) >= 256:
        rng.shuffle(small)
        for _ in range(128):
            await work.do("unlink", work.files.unlink(small.pop()))


async def flood(work: Counted, number: int, sizes: Sizes) -> None:
    """Make files, then unlink them all, every 16th while it is open and is read afterwards."""
    rng, files = random.Random(number), work.files
    await directory(work, "flood")
    while not work.over():
        work.tally.rounds += 1
        names = [f"flood/{work.tally.rounds}-{each}" for each in range(sizes.flood_files)]
        lengths = [PIECE * (64 if each % 50 == 0 else 1) for each in range(sizes.flood_files)]
        made = [
            (name, seed, length)
            for seed, (name, length) in enumerate(zip(names, lengths, strict=True))
            if not work.over() and await make_file(work, name, seed, length)
        ]
        rng.shuffle(made)
        for turn, (name, seed, length) in enumerate(made):
            if turn % 16:
                await work.do("unlink", files.unlink(name))
            else:
                await unlink_open(work, name, seed, length)


async def unlink_open(work: Counted, name: str, seed: int, length: int) -> None:
    """A file that lost its name keeps its content for who has it open."""
    file = await work.do("open", work.files.open(name))
    if file is None:
        await work.do("unlink", work.files.unlink(name))
        return
    try:
        await work.do("unlink", work.files.unlink(name))
        found = await work.read(file, 0, length)
        if found is None:
            return
        if wrong := pattern.difference(found, seed, 0, length):
            work.note_wrong(f"{name}, unlinked: {wrong}")
        else:
            work.tally.verified += length
    finally:
        await work.files.close(file)


Load = Callable[[Counted, int, Sizes], Awaitable[None]]
LOADS: dict[str, Load] = {"writer": writer, "storm": storm, "large": large, "flood": flood}
SETUP: dict[str, Load] = {"plant": plant}


def crew(sizes: Sizes) -> list[tuple[str, int]]:
    """Which loads run side by side, and their numbers."""
    return [
        *(("writer", number) for number in range(sizes.writers)),
        *((name, sizes.writers) for name in LOADS if name != "writer"),
    ]


async def run(
    load: str,
    files: Files,
    number: int,
    seconds: float,
    sizes: Sizes,
    gives_up: Callable[[], bool] = lambda: False,
    cut: Cut | None = None,
) -> Tally:
    """One load for `seconds` of trio's clock, or until it gives up, and what came of it."""
    tally = Tally(load)
    until = trio.current_time() + seconds
    work = Counted(files, tally, lambda: trio.current_time() >= until or gives_up(), cut)
    try:
        await (LOADS | SETUP)[load](work, number, sizes)
    except Ended as end:
        tally.ended = str(end)
    return tally


def main(load: str, root: str, number: str, seconds: str, sizes: str) -> None:
    """One load in this process; its tally goes to standard output as JSON."""
    chosen = Sizes(**json.loads(sizes))
    cut = Cut(polled=True)
    with cut.listening():
        files = Mounted(Path(root))
        work = partial(run, load, files, int(number), float(seconds), chosen, cut=cut)
        print(json.dumps(asdict(trio.run(work))))


if __name__ == "__main__":
    main(*sys.argv[1:])
