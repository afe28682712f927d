"""Trees that the kernel made, deep and with shared extents: read, changed and put back by us."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from fs.xfs import ag, btkind
from fs.xfs.btkind import Kind
from fs.xfs.btree import Cursor
from fs.xfs.btroots import finobt_root, inobt_root, refcount_root
from tests.fs.test_freespace import Model, churn, opened
from tests.fs.treecheck import ImageChecker, Rec
from tests.support import assert_clean, kernel_mount, mkfs, needs_root

pytestmark = [pytest.mark.mount, needs_root]

BLOCK = 1024
FRAGMENTS = 3000


def kernel_work(mount: Path) -> None:
    """Files in many pieces, shared ranges, and inodes in many chunks."""
    big = mount / "big"
    with big.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, FRAGMENTS * 2 * BLOCK)
        file.write(os.urandom(200 * BLOCK))
    punches = [f"fpunch {i * 2 * BLOCK} {BLOCK}" for i in range(100, FRAGMENTS)]
    shares = [f"reflink {big} {i * 4 * BLOCK} {i * 4 * BLOCK} {BLOCK}" for i in range(1, 49)]
    for target, commands in ((big, punches), (mount / "clone", shares)):
        script = "".join(f"{command}\n" for command in commands).encode()
        subprocess.run(
            ["xfs_io", "-f", target], input=script, check=True, stdout=subprocess.DEVNULL
        )
    for i in range(3000):
        (mount / f"f{i}").touch()
    for i in range(0, 3000, 3):
        (mount / f"f{i}").unlink()


async def walk(cur: Cursor) -> list[Rec]:
    found = []
    more = await cur.first()
    while more:
        found.append(tuple(value % (1 << 64) for value in cur.record()))
        more = await cur.next()
    return found


@pytest.mark.parametrize("rmapbt", [0, 1])
async def test_kernel_made_trees(scratch: Path, rmapbt: int) -> None:
    path = mkfs(scratch, "-b", f"size={BLOCK}", "-m", f"rmapbt={rmapbt}", "-d", "agcount=2")
    with kernel_mount(path, scratch / "mnt") as mount:
        kernel_work(mount)
    before = ImageChecker(path)
    assert before.check() == []
    assert max(levels["bnobt"] for levels in before.heights) >= 2
    async with opened(path) as vol:
        shared = 0
        async with vol.reader() as tp:
            await tp.lock_space()
            for agno in range(vol.geo.agcount):
                agf, agi = await ag.read_agf(tp, agno), await ag.read_agi(tp, agno)
                roots = {
                    kind.name: ag.AgRoot(tp, kind, agno, agf) for kind in kinds_of(rmapbt)
                } | {
                    "inobt": inobt_root(tp, agno, agi),
                    "finobt": finobt_root(tp, agno, agi),
                    "refcountbt": refcount_root(tp, agno, agf),
                }  # fmt: skip
                for name, root in roots.items():
                    records = await walk(Cursor(root))
                    checker = ImageChecker(path)
                    assert records == checker.tree(name, agno, root.top, root.levels).records
                    assert checker.faults == []
                    shared += len(records) if name == "refcountbt" else 0
        assert shared == 48
        model, rng = Model(vol), random.Random(rmapbt)
        await churn(vol, model, rng, 300)
        while model.extents:
            async with vol.transaction("truncate") as tp:
                await model.free(tp, rng.randrange(len(model.extents)))
    assert ImageChecker(path).check() == []
    assert_clean(path)
    with kernel_mount(path, scratch / "mnt") as mount:
        assert (mount / "big").stat().st_size == FRAGMENTS * 2 * BLOCK


def kinds_of(rmapbt: int) -> list[Kind]:
    return [btkind.BNO, btkind.CNT, btkind.RMAP] if rmapbt else [btkind.BNO, btkind.CNT]
