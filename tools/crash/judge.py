"""Recovery by both: what is in an image after ours, and after the kernel's, and is it sound.

Each works on a copy. What they left is read through a kernel mount (read-only, without recovery,
for ours), so that nobody is judged by himself; xfs_repair -n and `xfs_db check` must find nothing.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio
import trio.testing

from fs.device.image import ImageFile
from fs.volume import Volume
from tools import targets
from tools.crash.disk import data_ranges
from tools.crash.model import DIRECTORY, FILE, SYMLINK, Entry, Found, Tree

LET_GO_S = 30.0
KINDS = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: SYMLINK}
# What xfs_repair says of any image.
USUAL = (
    *("Phase", "        -", "No modify", "Cannot get host", "Repair may fail", "the image and"),
)
# What else it says of an attribute that is INCOMPLETE.
TOLERATED = (
    "is INCOMPLETE|problem with attribute contents|clear attr fork|bad nblocks|bad anextents"
)
# With these mkfs.xfs makes images, and logs, that are smaller than it thinks good for people.
SMALL = {"TEST_DIR": "/", "TEST_DEV": "/", "QA_CHECK_FS": "1"}


def format_small(path: Path, size: int, words: Sequence[str]) -> None:
    """An image of `size` bytes with the smallest log that mkfs.xfs makes."""
    with open(path, "wb") as image:
        image.truncate(size)
    command = [targets.find_tool("mkfs.xfs"), "-q", "-f", *words, str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **SMALL}, timeout=60
    )
    if done.returncode:
        raise targets.TargetError(f"mkfs.xfs {' '.join(words)}: {done.stderr.strip()}")


def copy_image(source: Path, target: Path) -> None:
    """A sparse copy."""
    with open(source, "rb") as old, open(target, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        for start, end in data_ranges(old.fileno(), size):
            os.pwrite(new.fileno(), os.pread(old.fileno(), end - start, start), start)


def survey(root: Path) -> Tree:
    """Everything below a mount point, and the mount point as b""."""
    tree: Tree = {}
    first: dict[int, bytes] = {}
    pending, top = [b""], os.fsencode(root)
    paths = []
    while pending:
        path = pending.pop()
        paths.append(path)
        where = top + b"/" + path
        if stat.S_ISDIR(os.lstat(where).st_mode):
            pending += [path + b"/" + name if path else name for name in os.listdir(where)]
    for path in sorted(paths):
        tree[path] = _look(top + b"/" + path, path, first)
    return tree


def _look(where: bytes, path: bytes, first: dict[int, bytes]) -> Found:
    status = os.lstat(where)
    kind = KINDS.get(stat.S_IFMT(status.st_mode), "special")
    target = os.readlink(where) if kind == SYMLINK else b""
    data = Path(os.fsdecode(where)).read_bytes() if kind == FILE else b""
    names = [] if kind == SYMLINK else os.listxattr(where, follow_symlinks=False)
    xattrs = frozenset(
        (os.fsencode(name), os.getxattr(where, name, follow_symlinks=False)) for name in names
    )
    mate = first.setdefault(status.st_ino, path)
    entry = Entry(kind, status.st_mode, status.st_nlink, xattrs, target, mate)
    times = status.st_mtime_ns, status.st_ctime_ns
    return Found(entry, status.st_ino, status.st_size, times, data)


@contextmanager
def mounted(image: Path, where: Path, options: str) -> Iterator[Path]:
    """The kernel's XFS on an image, which nobody touches any more when this is left.

    A mount that was busy is taken away lazily, and might still write into the next image.
    """
    with targets.kernel_xfs(image, where, f"loop,nouuid,{options}") as target:
        yield target.path
    deadline = time.monotonic() + LET_GO_S
    while any(_backing(loop) == str(image) for loop in Path("/sys/block").glob("loop*")):
        if time.monotonic() > deadline:
            raise targets.TargetError(f"{image} is still in use by a loop device")
        time.sleep(0.01)


def _backing(loop: Path) -> str:
    """The file behind a loop device, nothing if it is not in use."""
    try:
        return (loop / "loop/backing_file").read_text().strip()
    except OSError:
        return ""


def by_kernel(image: Path, where: Path) -> Tree:
    """The kernel recovers an image; what is there then. Raises TargetError."""
    with mounted(image, where, "noatime") as root:
        return survey(root)


def by_us(image: Path, where: Path, log: logging.Logger) -> Tree:
    """We do. Raises whatever a mount would refuse with."""

    async def recover() -> None:
        device = ImageFile(str(image))
        try:
            async with Volume.open(device, 32 << 20, log=log, paranoid=True) as vol:
                assert not vol.shut_down, vol.shutdown_reason
            assert not vol.shut_down, vol.shutdown_reason
        finally:
            device.close()

    trio.run(recover)
    with mounted(image, where, "ro,norecovery") as root:
        return survey(root)


def faults(image: Path, *, thorough: bool) -> list[str]:
    """What xfs_repair -n, and `xfs_db check` if it is to be thorough, have to say."""
    clean, text = targets.repair(image)
    wrong = [] if clean else complaints(text)
    found = [f"xfs_repair -n: {' | '.join(wrong[:8])}"] if wrong else []
    if thorough:
        command = [targets.find_tool("xfs_db"), "-r", "-c", "check", str(image)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        text = (done.stdout + done.stderr).strip()
        if done.returncode or text:
            found.append(f"xfs_db check: {' | '.join(text.splitlines()[:8])}")
    return found


def complaints(text: str) -> list[str]:
    """What of xfs_repair's output matters, when it does not find an image clean.

    An attribute whose value was on its way when the power failed is INCOMPLETE: nobody sees it, and
    the next one who sets it takes it away. That is how XFS does it, and how the kernel's recovery
    leaves it; xfs_repair would drop such a fork.
    """
    lines = [line for line in text.splitlines() if not line.startswith(USUAL)]
    ours = set(re.findall(r"inode (\d+) is INCOMPLETE", text))
    left, last = [], ""
    for line in lines:
        number = re.search(r"inode (\d+)", line)
        last = number.group(1) if number else last
        if not (last in ours and re.search(TOLERATED, line)):
            left.append(line)
    return left if ours else left or ["it is not clean, and says nothing"]


def differences(ours: Tree, kernels: Tree) -> list[str]:
    """Where the two recoveries do not agree."""
    found = []
    for path in sorted(ours.keys() | kernels.keys()):
        one, two = ours.get(path), kernels.get(path)
        if one is None or two is None:
            found.append(f"{path!r} is there only after {'ours' if one else 'the kernel'}")
        elif one != two:
            fields = [f for f in vars(one) if getattr(one, f) != getattr(two, f)]
            text = [f"{f} {getattr(one, f)!r:.80} {getattr(two, f)!r:.80}" for f in fields]
            found.append(f"{path!r} differs, ours and the kernel's: {'; '.join(text)}")
    return found


def keep(image: Path, directory: Path, name: str) -> Path:
    """A copy that stays."""
    directory.mkdir(parents=True, exist_ok=True)
    copy_image(image, directory / name)
    return directory / name


def remove(path: Path) -> None:
    """A scratch file or directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
