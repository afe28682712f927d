"""Two lanes in threads of their own against each other and against everything the trio thread does.

The file is made of units; each holds one number again and again: which unit it is, and who wrote it
when. Lanes write and read whole units; tasks do the same, sync, truncate, and take memory away. A
unit with two numbers was torn, one with another unit's number was mixed up.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import trio

from alloc import gfp
from alloc.jit import kernel
from alloc.libc import address, readv, usleep
from fs import file
from fs.cache.inode import Inode
from fs.front import lanestate as S
from fs.front import wire
from fs.front.laneread import serve_read
from fs.front.lanereply import message
from fs.front.lanewrite import serve_write
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import a_file, opened
from tests.fs.lanes import Desk, a_desk

READ, WRITTEN, PARKED, HALF, TORN, FOREIGN = range(6)
ENOUGH = 100  # units read, and written, by each lane


@kernel(lambda: (S.sample(), 1, 1, 1, 1, 1, np.zeros(6, np.int64)))
def hammer(lane, pipe, unit, units, n, seed, out):
    """Random whole units, two reads to a write; `out` counts what came of them.

    Ends early with a write that a task has to finish; returns the turns taken.
    """
    words = unit >> 3
    lane.me[S.M_LOCKED] = 0
    at = message(lane)
    for i in range(n):
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        which = (seed >> 8) % units
        lane.s8[(at + wire.RW_OFFSET) >> 3] = which * unit
        payload = lane.me[S.M_PAYLOAD] << 9
        if (seed >> 4) % 3 == 0:
            lane.me[S.M_LEN] = wire.RW_ARGS_END + unit
            for word in range(words):
                lane.s8[payload + word] = (which << 32) | i
            code = serve_write(lane)
            out[WRITTEN] += code == S.ANSWERED
            if lane.me[S.M_LOCKED] != 0:
                out[HALF] += 1
                return i + 1
        else:
            lane.me[S.M_LEN] = wire.RW_ARGS_END
            code = serve_read(lane)
        if code != S.ANSWERED:
            out[PARKED] += 1
            usleep(50)  # a task would have to finish it first
            continue
        lane.iov[0] = address(lane.mem, payload << 3)
        lane.iov[1] = unit + 4096
        got = (readv(pipe, lane.iov, 1) - 16) >> 3
        first = lane.s8[payload + 2]
        out[READ] += got == words
        if got == words and first != 0:
            out[FOREIGN] += first >> 32 != which
        for word in range(2, 2 + got):
            out[TORN] += got == words and lane.s8[payload + word] != first
    return n


async def interfere(
    vol: Volume, ip: Inode, unit: int, units: int, dice: random.Random
) -> None:
    """One thing that tasks do beside the lanes."""
    which = dice.randrange(units)
    what = dice.randrange(20)
    if what < 8:
        number = (which << 32) | (1 << 31)
        await file.write(vol, ip, which * unit, number.to_bytes(8, "little") * (unit >> 3))
    elif what < 14:
        check(bytes(await file.read(vol, ip, which * unit, unit)), unit, which)
    elif what < 16:
        await file.fsync(vol, ip)
    elif what < 18:
        vol.arena.reclaim.shrink_all(0, gfp.KERNEL, "direct", 1 << 20)
    elif what < 19:
        await vol.flusher.sync()
    else:
        await file.truncate(vol, ip, which * unit)
        await file.truncate(vol, ip, units * unit)


async def answer(desk: Desk) -> None:
    while True:
        desk.answer_bells()
        await trio.sleep(0.0005)


def check(content: bytes, unit: int, first: int) -> None:
    """Units from the `first` on: whole, and each in its place."""
    for which, words in enumerate(np.frombuffer(content, np.int64).reshape(-1, unit >> 3), first):
        assert np.flatnonzero(words != words[0]).size == 0
        assert words[0] == 0 or words[0] >> 32 == which


async def run(
    desk: Desk, ip: Inode, unit: int, units: int, turns: int, seed: int
) -> Sequence[int]:
    """Hammer with both lanes while tasks interfere; the sum of both counts.

    It takes `turns` of each lane and more if the tasks have not let it read and write ENOUGH.
    """
    vol, ends = desk.vol, 0
    outs = [np.zeros(6, np.int64) for _ in range(2)]

    async def one(number: int) -> None:
        nonlocal ends
        lane, (reader, writer) = desk.lanes[number], os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 2 * unit)
        at = int(lane.slots[lane.me[S.M_SLOT], S.S_ADDR])
        desk.store(at, desk.message(wire.READ, ip.handle, 0, unit, 0, 0))
        lane.me[S.M_FD] = writer
        done = 0
        while done < turns or min(outs[number][[READ, WRITTEN]]) < ENOUGH:
            args = (lane, reader, unit, units, turns, seed + number + done, outs[number])
            done += await trio.to_thread.run_sync(hammer, *args)
            if lane.me[S.M_LOCKED]:
                await desk.finish(wire.WRITE, lane)
        os.close(reader)
        os.close(writer)
        ends += 1

    dice = random.Random(seed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer, desk)
        for number in range(2):
            nursery.start_soon(one, number)
        while ends < 2:
            await interfere(vol, ip, unit, units, dice)
            await trio.sleep(0)
        nursery.cancel_scope.cancel()
    return [int(x) for x in sum(outs)]  # type: ignore[call-overload]


RUNS = [(8, 4096, 600, "4k"), (32, 4096, 3000, "1k"), (16, 65536, 4, "4k")]


@pytest.mark.parametrize(("memory", "unit", "units", "block"), RUNS)
async def test_lanes_and_tasks(
    scratch: Path, memory: int, unit: int, units: int, block: str
) -> None:
    image = support.mkfs(scratch, "-b", f"size={block}")
    async with (
        opened(image, memory << 20) as vol,
        a_file(vol) as ip,
        a_desk(vol, atime="noatime") as desk,
    ):
        await file.truncate(vol, ip, unit * units)
        counts = await run(desk, ip, unit, units, (120 << 20) // unit, memory)
        print(counts, desk.bells)
        assert counts[TORN] == counts[FOREIGN] == 0
        whole = bytes(await file.read(vol, ip, 0, ip.size))
        check(whole, unit, 0)
        await file.fsync(vol, ip)
        state = vol.pages.state(ip.handle)
        assert state["delalloc"] == state["pending"] == state["ndirty"] == 0
        vol.arena.check()
    async with opened(image) as vol, a_file(vol) as ip:
        assert bytes(await file.read(vol, ip, 0, ip.size)) == whole
    support.assert_clean(image)
