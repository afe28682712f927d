"""How large requests are: the histogram against a count by hand, and what the devices report."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fs.device import stack
from fs.device.image import Memory
from fs.device.sizes import READ, WRITE, Sizes, io_text
from tools import stats

MIB = 1 << 20


@pytest.mark.parametrize("seed", range(3))
def test_every_request_is_in_its_row(seed: int) -> None:
    rng, sizes = random.Random(seed), Sizes()
    counts: Counter[str] = Counter()
    mem = memoryview(bytes(20 * MIB))
    for _ in range(300):
        kind, title = rng.choice([(READ, "read"), (WRITE, "written")])
        pieces = [mem[: 512 * rng.randrange(1, 1 << rng.randrange(1, 14))] for _ in range(2)]
        kib = sum(map(len, pieces)) / 1024
        row = 8192
        while row and row > kib:
            row //= 2
        sizes.note(kind, pieces)
        if rng.random() < 0.3:
            sizes.note_direct(kind, pieces)
            counts[f"direct_{'reads' if kind == READ else 'writes'}.{row}"] += 1
        counts[f"{'reads' if kind == READ else 'writes'}.{row}"] += 1
        counts[f"{title}_kB.{row}"] += kib
    found = stats.figures_of(io_text(sizes))
    rows = {name: value for name, value in found.items() if "." in name and value}
    assert rows.keys() == counts.keys()
    assert all(rows[name] == int(counts[name]) for name in counts)


async def test_a_device_counts_what_reaches_it() -> None:
    inner = Memory(4 * MIB)
    device = stack.build(inner, "bw=1000M", "read=1.0,seed=1", "")
    block = memoryview(bytearray(MIB))
    await device.write(0, [block, block[:4096]])
    with pytest.raises(OSError, match="injected"):
        await device.read(0, [block])  # it never came to the device
    await inner.read_all([(0, [block[:512]]), (4096, [block[:4096]]), (8192, [block[:4096]])])
    await inner.read_all([(0, [block[:4096]])])
    found = stats.figures_of(io_text(stack.sizes(device)))
    assert {name: value for name, value in found.items() if "." in name and value} == {
        "reads.0": 1, "reads.4": 3, "read_kB.4": 12, "writes.1024": 1, "written_kB.1024": 1028,
    }  # fmt: skip
    device.close()
