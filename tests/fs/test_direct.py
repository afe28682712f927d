"""Direct I/O below the image: who takes it, which transfers, and that both ways see one image."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from fs.device import direct
from fs.device.base import Views
from fs.device.image import ImageFile, Memory
from fs.device.sizes import READ, WRITE
from tests import support

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
SECTOR = 512
KINDS = ("file", "loop", "loop of 4096", "memory")
kinds = pytest.mark.parametrize(
    "kind", [k if "loop" not in k else pytest.param(k, marks=support.needs_root) for k in KINDS]
)


@contextmanager
def made(kind: str, disk: Path) -> Iterator[str]:
    """The path of an image of random bytes, in a file, on a block device or in memory."""
    image = disk / "image"
    image.write_bytes(random.Random(7).randbytes(SIZE))
    if kind == "memory":
        fd = os.memfd_create("image")
        os.write(fd, image.read_bytes())
        try:
            yield f"/proc/{os.getpid()}/fd/{fd}"
        finally:
            os.close(fd)
    elif kind == "file":
        support.need_direct(disk)
        yield str(image)
    else:
        words = ("--sector-size", "4096") if "4096" in kind else ()
        with support.loop_device(image, *words) as loop:
            yield str(loop)


def direct_descriptors(path: str) -> int:
    """How many descriptors this process has on a file with O_DIRECT."""
    return support.direct_descriptors(os.getpid(), os.stat(path))


def block(nbytes: int) -> memoryview:
    """Memory that begins with a page."""
    return memoryview(mmap.mmap(-1, nbytes))


def whole(device: ImageFile) -> bytes:
    """The image, by a descriptor of another way."""
    return os.pread(device.fileno(), device.size, 0)


def counts(device: ImageFile) -> dict[str, int]:
    """Requests of all sizes, and those that were direct."""
    return {
        "reads": int(device.sizes.requests[READ].sum()),
        "writes": int(device.sizes.requests[WRITE].sum()),
        "direct reads": int(device.sizes.direct[READ].sum()),
        "direct writes": int(device.sizes.direct[WRITE].sum()),
    }


# -- who takes it --------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("read_only", [False, True])
def test_a_descriptor_more_where_it_is_taken(kind: str, read_only: bool, tmp_path: Path) -> None:
    with made(kind, tmp_path) as path:
        for mode in direct.MODES:
            device = ImageFile(path, read_only=read_only, direct=mode)
            expected = mode != "off" and kind != "memory"
            assert device.is_direct == expected
            assert direct_descriptors(path) == expected
            device.close()
            assert direct_descriptors(path) == 0


def test_an_image_of_ours_in_memory_has_none() -> None:
    device = Memory(SIZE)
    assert not device.is_direct
    device.close()


@pytest.mark.parametrize("refuses", ["open", "preadv"])
def test_who_refuses_only_when_it_is_tried(
    refuses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """statx may not know, and then be wrong."""
    with made("file", tmp_path) as path:
        real = getattr(os, refuses)

        def call(*words: object) -> object:
            if refuses == "preadv" or words[1] & os.O_DIRECT:  # type: ignore[operator]
                raise OSError(errno.EINVAL, "not here")
            return real(*words)

        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(os, refuses, call)
            device = ImageFile(path)
        assert not device.is_direct
        assert len(os.listdir("/proc/self/fd")) == before + 1
        device.close()


# -- which transfers -----------------------------------------------------------------------------


@kinds
async def test_large_and_whole_pages_only(kind: str, tmp_path: Path) -> None:
    """auto: from 64 KiB on; on: from a page on. What is not aligned is done all the same."""
    cases = [
        (0, 64 * KIB, "auto on"),
        (8 * KIB, MIB, "auto on"),
        (0, 60 * KIB, "on"),
        (4 * KIB, 4 * KIB, "on"),
        (SECTOR, 64 * KIB, ""),
        (0, 64 * KIB + SECTOR, ""),
        (0, SECTOR, ""),
    ]
    with made(kind, tmp_path) as path:
        for mode in direct.MODES:
            device = ImageFile(path, direct=mode)
            for offset, nbytes, expected in cases:
                before = counts(device)
                view = block(nbytes)
                view[:] = os.urandom(nbytes)
                await device.write(offset, [view])
                back = block(nbytes)
                await device.read(offset, [back])
                assert back == view
                await device.read_all([(offset, [back]), (offset, [back])])
                after = counts(device)
                went = mode in expected.split() and kind != "memory"
                assert after["direct writes"] - before["direct writes"] == went
                assert after["direct reads"] - before["direct reads"] == 3 * went
            device.close()


@pytest.mark.parametrize("mode", direct.MODES)
@kinds
async def test_any_transfer_against_a_model(kind: str, mode: str, tmp_path: Path) -> None:
    """Places, sizes, pieces and alignment of memory at random: each is what the last write was."""
    rng = random.Random(f"{kind} {mode}")
    memory = block(2 * MIB)
    with made(kind, tmp_path) as path:
        device = ImageFile(path, direct=mode)
        model = bytearray(whole(device))

        def request() -> tuple[int, list[memoryview]]:
            unit = rng.choice([SECTOR, KIB, 4 * KIB, 64 * KIB])
            nbytes = unit * rng.randrange(1, max(2, min(64, MIB // unit)))
            offset = unit * rng.randrange((SIZE - nbytes) // unit + 1)
            shift = rng.choice([0, 0, 0, SECTOR, 8, 1])
            piece = rng.choice([nbytes, unit, 4 * KIB])
            cuts = [*range(0, nbytes, piece), nbytes]
            return offset, [
                memory[shift + a : shift + b] for a, b in zip(cuts, cuts[1:], strict=False)
            ]

        def check(offset: int, views: Views) -> None:
            got = b"".join(views)
            assert got == model[offset : offset + len(got)], (offset, len(got))

        for turn in range(300):
            offset, views = request()
            if rng.random() < 0.5:
                data = rng.randbytes(sum(map(len, views)))
                at = 0
                for view in views:
                    view[:] = data[at : at + len(view)]
                    at += len(view)
                await device.write(offset, views)
                model[offset : offset + len(data)] = data
            else:
                await device.read(offset, views)
                check(offset, views)
            if turn % 50 == 0:
                await device.flush()
                assert whole(device) == model
        assert whole(device) == model
        found = counts(device)
        some = mode != "off" and kind != "memory"
        assert (0 < found["direct reads"] < found["reads"]) == some
        assert (0 < found["direct writes"] < found["writes"]) == some
        await device.flush()
        device.close()
        with open(path, "rb") as image:
            assert image.read() == model


@kinds
async def test_neighbours_at_the_same_time(kind: str, tmp_path: Path) -> None:
    """Each task has places of its own, large ones and single sectors beside them."""
    room, tasks = 256 * KIB, 8
    large, small = 64 * KIB, SECTOR

    with made(kind, tmp_path) as path:
        device = ImageFile(path)

        async def work(task: int, nbytes: int, offset: int) -> None:
            rng = random.Random(f"{task} {nbytes}")
            view, back = block(max(nbytes, 4 * KIB))[:nbytes], block(large)[:nbytes]
            for _ in range(40):
                view[:] = rng.randbytes(nbytes)
                await device.write(offset, [view])
                await device.read(offset, [back])
                assert back == view, (task, nbytes)

        async with trio.open_nursery() as nursery:
            for task in range(tasks):
                at = task * room
                nursery.start_soon(work, task, large, at + 20 * KIB)
                for n in range(3):  # of one page, and of the pages at both ends of the large one
                    nursery.start_soon(work, task + 100 * n, small, at + 16 * KIB + n * SECTOR)
                    nursery.start_soon(work, task + 100 * n, small, at + 84 * KIB + n * SECTOR)
        await device.flush()
        assert (counts(device)["direct writes"] == tasks * 40) == (kind != "memory")
        device.close()


# -- at run time ---------------------------------------------------------------------------------


def failing(device: ImageFile, code: int, monkeypatch: pytest.MonkeyPatch, call: str) -> list[bool]:
    """Direct transfers do a part and then fail with `code`; the list says which were direct."""
    real = getattr(os, call)
    seen: list[bool] = []

    def transfer(fd: int, views: list[memoryview], offset: int) -> int:
        seen.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        if not seen[-1]:
            return real(fd, views, offset)  # type: ignore[no-any-return]
        if len(seen) == 1:
            return real(fd, [views[0][: 4 * KIB]], offset)  # type: ignore[no-any-return]
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, transfer)
    return seen


@pytest.mark.parametrize("code", direct.REFUSED)
async def test_what_is_refused_is_not_lost(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made("file", tmp_path) as path:
        device = ImageFile(path)
        view, back = block(128 * KIB), block(128 * KIB)
        view[:] = os.urandom(len(view))
        with monkeypatch.context() as patch:
            seen = failing(device, code, patch, "pwritev")
            await device.write(64 * KIB, [view[: 64 * KIB], view[64 * KIB :]])
            assert seen == [True, True, False]
        assert os.pread(device.fileno(), len(view), 64 * KIB) == view
        with monkeypatch.context() as patch:
            seen = failing(device, code, patch, "preadv")
            await device.read(64 * KIB, [back])
            assert seen == [True, True, False]
        assert back == view
        assert counts(device) == {"reads": 1, "writes": 1, "direct reads": 0, "direct writes": 0}
        device.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_what_fails_is_not_tried_again(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made("file", tmp_path) as path:
        device = ImageFile(path)
        for call, begin in (("pwritev", device.write), ("preadv", device.read)):
            with monkeypatch.context() as patch:
                seen = failing(device, code, patch, call)
                with pytest.raises(OSError, match=os.strerror(code)) as told:
                    await begin(0, [block(128 * KIB)])
                assert told.value.errno == code
                assert seen == [True, True]
        device.close()


@kinds
async def test_beyond_the_end_is_an_error_as_ever(kind: str, tmp_path: Path) -> None:
    with made(kind, tmp_path) as path:
        device = ImageFile(path)
        with pytest.raises(OSError, match="short read") as told:
            await device.read(SIZE - 64 * KIB, [block(128 * KIB)])
        assert told.value.errno == errno.EIO
        device.close()
