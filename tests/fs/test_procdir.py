"""The directory of reports without a mount: nodes, handles, who waits, what lanes leave alone."""

from __future__ import annotations

import errno
from pathlib import Path

import pyfuse3
import pytest
import trio

from alloc.gfp import NOWAIT
from fs import namespace
from fs.front import handles, sysctl, wire
from fs.front import lanestate as S
from fs.front.operations import Operations
from fs.front.options import MountOptions
from fs.front.procdir import NODES, OPEN_MOST, ProcDir
from tests import support
from tests.fs.dirimages import opened
from tests.fs.lanes import a_desk

ROOT = pyfuse3.ROOT_INODE


def find(proc: ProcDir, path: str) -> int:
    """The node at a path below the directory."""
    node: int = proc.lookup(ROOT, proc.name).st_ino
    for name in path.split("/"):
        node = proc.lookup(node, name.encode()).st_ino
    return node


def text(proc: ProcDir, path: str) -> str:
    fh = proc.open(find(proc, path)).fh
    try:
        return proc.read(fh, 0, 1 << 20).decode()
    finally:
        proc.close(fh)


async def test_nodes_are_no_inodes(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol:
        proc = ProcDir(vol, ".nofail")
        assert proc.lookup(ROOT, b".nofail").st_ino == NODES
        assert not vol.geo.valid_ino(NODES)
        assert proc.claims(ROOT, b".nofail")
        assert proc.claims(NODES, b"anything")
        assert not proc.claims(ROOT, b".nofai")
        assert not proc.claims(vol.geo.root_ino + 1, b".nofail")
        assert not ProcDir(vol, "").claims(ROOT, b"")
        for call in (proc.attributes, proc.open):
            with pytest.raises(OSError, match="no node") as caught:
                call(NODES + 10_000)
            assert caught.value.errno == errno.ESTALE


async def test_forgetting_a_report_changes_nothing(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol:
        ops = Operations(vol, MountOptions())
        await ops.start()
        for node in (NODES, NODES + 3, NODES + 10_000):
            ops.forgotten(node, 5)
            with pytest.raises(OSError, match="not in the directory"):
                async with ops.using(node):
                    pass
        ops.stop()


async def test_open_reports_are_bounded_and_given_back(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol:
        proc = ProcDir(vol, ".nofail")
        node = find(proc, "vmstat")
        handed = [proc.open(node).fh for _ in range(OPEN_MOST)]
        assert len(set(handed)) == OPEN_MOST
        with pytest.raises(OSError, match="reports are open") as caught:
            proc.open(node)
        assert caught.value.errno == errno.ENFILE
        for fh in handed:
            proc.close(fh)
        with pytest.raises(OSError, match="not open"):
            proc.read(handed[0], 0, 1)
        assert text(proc, "vmstat").startswith("nr_free_pages ")


async def test_who_waits_is_listed(scratch: Path) -> None:
    async with opened(support.mkfs(scratch), 8 << 20) as vol:
        proc, arena = ProcDir(vol, ".nofail"), vol.arena
        assert text(proc, "waiters") == ""
        held = []
        while pfn := arena.try_alloc_folio(0, NOWAIT):
            held.append(pfn)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(arena.alloc_folio, 10)
            await trio.sleep(0.2)
            (line,) = text(proc, "waiters").splitlines()
            assert "alloc_folio" in line
            assert "order:10 mode:KERNEL waits 0." in line
            assert line.endswith("; holds nothing")
            assert text(proc, "pressure/memory").startswith("some avg10=0.00 ")
            assert not text(proc, "pressure/memory").endswith("total=0\n")
            nursery.cancel_scope.cancel()
        for pfn in held:
            arena.put_folio(pfn)
        assert text(proc, "waiters") == ""


async def test_what_is_no_number_in_range_is_refused(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol:
        for tunable in sysctl.tunables(vol).values():
            bad = (tunable.least - 1, tunable.most + 1)
            for word in (b"", b"a", b"1.0", b"1\n2", *(b"%d" % n for n in bad)):
                with pytest.raises(OSError, match="number|is not from") as caught:
                    sysctl.parse(word, tunable)
                assert caught.value.errno == errno.EINVAL
            for n in (tunable.least, tunable.most):
                assert sysctl.parse(b" %d\n" % n, tunable) == n


async def test_the_marks_of_rcu_keep_their_order(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol:
        tunables, rcu = sysctl.tunables(vol), vol.arena.rcu
        assert (rcu.qlowmark, rcu.qhimark, rcu.qovld) == (5242, 512 << 10, 1 << 20)
        await sysctl.write(tunables["rcutree/qhimark"], b"6000")
        assert tunables["rcutree/qhimark"].read() == rcu.qhimark == 6000
        for name, value in (("qhimark", b"5241"), ("qovld", b"5999"), ("qlowmark", b"6001")):
            with pytest.raises(OSError, match="in this order"):
                await sysctl.write(tunables[f"rcutree/{name}"], value)


async def test_lanes_park_what_is_no_inodes(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_desk(vol) as desk:
        desk.put(wire.READ, handles.APART | handles.FULL_SYNC | 1, 0, 100, 0, b"")
        assert (desk.attempt(wire.READ), desk.reason) == (S.PARK, "opcode")
        desk.put(wire.WRITE, handles.APART | handles.FULL_SYNC | 1, 0, 2, 0, b"1\n")
        assert (desk.attempt(wire.WRITE), desk.reason) == (S.PARK, "sync")


async def test_the_name_never_comes_to_the_dentry_cache(scratch: Path) -> None:
    """A lane that found it there would say that there is no such name."""
    async with opened(support.mkfs(scratch)) as vol:
        root = await vol.inodes.get(vol.geo.root_ino)
        proc = ProcDir(vol, ".nofail")
        await proc.start(root)
        assert proc.name == b".nofail"
        assert vol.dentries.lookup(root, b".nofail") is None
        with pytest.raises(FileNotFoundError):
            await namespace.lookup(vol, root, b".nofail")
        assert vol.dentries.lookup(root, b".nofail") is not None  # what a lookup would do
        vol.inodes.put(root)
