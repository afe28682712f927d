"""Helpers that make images, mount them with the kernel or with us, and ask the judges.

Whatever a helper sets up is undone when its context is left, even by a failing test. Images are
sparse files; directories come from the `scratch` fixture. Skips print their reason.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tools.targets import (
    MIN_IMAGE,
    OurMount,
    child_environment,
    find_tool,
    is_root,
    kernel_xfs,
    make_image,
    ours,
    program,
    run,
    size_of,
    unmount,
)
from tools.targets import repair as _repair

# The geometries that every form of the format must survive, as mkfs.xfs arguments.
GEOMETRIES: dict[str, tuple[str, ...]] = {
    "default": (),
    "1k blocks": ("-b", "size=1k"),
    "64k blocks": ("-b", "size=64k"),
    "1k inodes": ("-i", "size=1024"),
    "rmapbt": ("-m", "rmapbt=1"),
    "8k directories": ("-n", "size=8k"),
}

HANG_S = 500.0  # less than the timeout in pyproject.toml
RSS_CONSTANT_KIB = 250 << 10  # interpreter, numpy, compiler and compiled kernels

needs_root = pytest.mark.skipif(not is_root(), reason="needs root, for loop mounts")
needs_fuse = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs /dev/fuse, readable and writable"
)
needs_fio = pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")

geometries = pytest.mark.parametrize("mkfs_args", GEOMETRIES.values(), ids=GEOMETRIES.keys())


def mkfs(directory: Path, *arguments: str, size: int = MIN_IMAGE, name: str = "image") -> Path:
    """A new XFS image in `directory`, sparse, made by mkfs.xfs with these arguments."""
    return make_image(directory / name, size, arguments)


@contextmanager
def kernel_mount(image: Path, where: Path, options: str = "loop") -> Iterator[Path]:
    """The kernel's XFS on `image`; yields the mount point."""
    with kernel_xfs(image, where, options) as target:
        yield target.path


def need_direct(directory: Path) -> None:
    """Skip where files have no direct I/O: where the flag is refused, or means nothing."""
    probe = directory / "probe"
    probe.write_bytes(bytes(4096))
    why = f"files in {directory} have no direct I/O"
    try:
        fd = os.open(probe, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip(why)
    try:
        os.pread(fd, 1, 1)
    except OSError:
        return
    finally:
        os.close(fd)
    pytest.skip(why)


def direct_descriptors(pid: int, file: os.stat_result) -> int:
    """How many descriptors of a process are on this file and have O_DIRECT."""
    found = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            opened = os.stat(f"/proc/{pid}/fd/{fd}")
            info = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
        except OSError:  # it is closed by now
            continue
        if (opened.st_dev, opened.st_ino) == (file.st_dev, file.st_ino):
            found += bool(int(info.split("flags:")[1].split()[0], 8) & os.O_DIRECT)
    return found


@contextmanager
def loop_device(image: Path, *words: str) -> Iterator[Path]:
    """A loop device on `image`, made with these words of losetup(8)."""
    path = Path(run("losetup", "--find", "--show", *words, image).strip())
    try:
        yield path
    finally:
        run("losetup", "--detach", path)


@contextmanager
def our_mount(
    image: Path,
    where: Path,
    memory: str = "64M",
    cache: str = "none",
    options: str = "",
    complaints: Sequence[str] = (),
) -> Iterator[OurMount]:
    """Our mount on `image`; the daemon must exit with 0 and its log must hold no complaint.

    `complaints` are substrings of log lines that the test means to provoke. A mount that hangs
    is killed before pytest's own limit: a process that waits for FUSE hears no other signal.
    """
    with ours(image, where, memory, cache, options) as mount:
        watchdog = threading.Timer(HANG_S, mount.process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield mount
        finally:
            watchdog.cancel()
    bad = [line for line in mount.complaints() if not any(word in line for word in complaints)]
    assert not bad, "the daemon complained:\n" + "\n".join(bad)


def assert_clean(image: Path) -> None:
    """`xfs_repair -n` and `xfs_db -c check` find nothing wrong with an unmounted image."""
    clean, text = _repair(image)
    assert clean, f"xfs_repair -n {image}:\n{text}"
    done = subprocess.run(
        [find_tool("xfs_db"), "-r", "-c", "check", str(image)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"xfs_db check {image}:\n{output}"
    assert not output.strip(), f"xfs_db check {image}:\n{output}"


def assert_small(mount: OurMount, waiting: int = 0) -> None:
    """The daemon's peak resident size is the memory option and a constant, no more.

    Each of `waiting` large requests that wait at the same time holds the buffer it was received
    in and pyfuse3's copy of it, 1 MiB each, outside the arena.
    """
    limit = (size_of(mount.memory) >> 10) + RSS_CONSTANT_KIB + (waiting << 11)
    peak = mount.peak_rss_kib()
    assert peak <= limit, f"peak resident size {peak >> 10} MiB, must be under {limit >> 10} MiB"


def wait_for_end(pidfd: int, seconds: float = 120.0) -> None:
    """Wait for the end of a process that is not our child; closes the pidfd."""
    try:
        ended, _, _ = select.select([pidfd], [], [], seconds)
    finally:
        os.close(pidfd)
    assert ended, f"the process did not end within {seconds} s"


def wait_until(holds: Callable[[], bool], otherwise: str, seconds: float = 60.0) -> None:
    """Look until it holds; fail, saying what is `otherwise`, when it does not come to that."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def unmount_below(path: Path) -> None:
    """Unmount everything that a failed test left mounted under `path`, deepest first."""
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    mounted = [line.split()[4] for line in table]
    for where in sorted((name for name in mounted if name.startswith(f"{path}/")), reverse=True):
        unmount(Path(where))


def nofailfs(*words: str | Path, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run the program to its end and return its status and output."""
    return subprocess.run(
        program(*words),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=child_environment(),
        timeout=timeout,
    )
