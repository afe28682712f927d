"""Places where a workload can run: our mount, a tmpfs, the kernel's XFS on a loop device.

Each is a context manager that yields a `Target` and undoes everything it did when it is left,
whatever happened inside: unmounted, loop device gone, daemon ended, scratch files removed. Images
are sparse files in memory (/dev/shm) where that has room, so that a comparison measures software
and not the disk under it. Our mount runs in the foreground as a child, because its exit status
and its peak resident size are part of the result.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fs import mounts
from fs.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
READY_S = 300.0  # the first mount compiles every kernel; later ones take a second or two
EXIT_S = 180.0
MIN_IMAGE = 300 << 20  # mkfs.xfs 6.1 refuses anything smaller
TMPFS_MAGIC = "tmpfs"


class TargetError(UserError):
    """A target could not be set up or did not end well; the text says which and why."""


@dataclass
class Target:
    """A directory to work in, and what the report calls it."""

    name: str
    path: Path
    note: str = ""
    direct: bool = False  # fio must ask for O_DIRECT, or the kernel's cache answers


@dataclass(kw_only=True)
class OurMount(Target):
    """Our file system on `path`; `process` is the daemon, `log` what it wrote to stderr."""

    image: Path
    memory: str
    process: subprocess.Popen[bytes]
    log: Path

    def peak_rss_kib(self) -> int:
        """Largest resident size of the daemon so far, in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return int(found.group(1)) if found else 0

    def complaints(self) -> list[str]:
        """Lines of the daemon's log that speak of trouble."""
        text = self.log.read_text(errors="replace")
        return [line for line in text.splitlines() if re.search(r"WARN|ERROR|Traceback", line)]


def find_tool(name: str) -> str:
    """Path of a system tool, also from where Debian keeps those of the administrator."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise TargetError(f"{name} is missing here: `nofailfs doctor` says what to install")
    return found


def run(tool: str, *words: str | Path, timeout: float = 600.0) -> str:
    """Run a tool to its end and return its output; TargetError with the output if it fails."""
    done = subprocess.run(
        [find_tool(tool), *(str(word) for word in words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )
    text = done.stdout.decode(errors="replace")
    if done.returncode:
        raise TargetError(f"{tool} gave {done.returncode}: {text.strip()}")
    return text


def is_root() -> bool:
    return os.geteuid() == 0


def fs_type(path: Path) -> str:
    """Type of the file system that holds `path`, as /proc/self/mountinfo names it."""
    best, kind = "", ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        where = left.split()[4]
        if (str(path) + "/").startswith(where.rstrip("/") + "/") and len(where) >= len(best):
            best, kind = where, right.split()[0]
    return kind


def scratch_base(need: int) -> Path:
    """A directory with `need` bytes of room: memory if possible, else the temporary directory."""
    chosen = os.environ.get("NOFAILFS_SCRATCH")
    if chosen:
        return Path(chosen)
    shm = Path("/dev/shm")
    if shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free >= need:
        return shm
    return Path(tempfile.gettempdir())


@contextmanager
def scratch_dir(need: int = 1 << 30) -> Iterator[Path]:
    """A private directory that is removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="nofailfs-", dir=scratch_base(need)))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def make_image(path: Path, size: int = MIN_IMAGE, mkfs: Sequence[str] = ()) -> Path:
    """A sparse image of `size` bytes, formatted by mkfs.xfs with the extra arguments `mkfs`."""
    with open(path, "wb") as image:
        image.truncate(size)
    run("mkfs.xfs", "-q", "-f", *mkfs, path)
    return path


def repair(image: Path) -> tuple[bool, str]:
    """What `xfs_repair -n` says about an unmounted image: (clean, output)."""
    done = subprocess.run(
        [find_tool("xfs_repair"), "-n", str(image)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode == 0, done.stdout.decode(errors="replace")


def unmount(path: Path) -> None:
    """Unmount `path`; lazily if it is busy, so that nothing stays behind.

    umount(8) looks at the place first, and would wait for a daemon that does not answer.
    """
    try:
        mounts.unmount(str(path))
    except OSError:
        if mounts.find(str(path)):
            mounts.unmount(str(path), lazy=True)


def child_environment() -> dict[str, str]:
    """The environment of a child that runs `python -m tools.main` from any directory."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{path}" if path else str(ROOT)}


def program(*words: str | Path) -> list[str]:
    """Command line of our own program, run by the interpreter that runs this."""
    return [sys.executable, "-m", "tools.main", *(str(word) for word in words)]


def _wait_ready(mount: OurMount) -> None:
    deadline = time.monotonic() + READY_S
    while not os.path.ismount(mount.path):
        if mount.process.poll() is not None:
            text = mount.log.read_text(errors="replace")[-4000:]
            raise TargetError(f"the mount ended with {mount.process.returncode}: {text}")
        if time.monotonic() > deadline:
            raise TargetError(f"{mount.path} did not mount in {READY_S:.0f} s")
        time.sleep(0.01)
    os.statvfs(mount.path)  # answered by the daemon: from here on it serves


def _end(mount: OurMount) -> int:
    unmount(mount.path)
    try:
        return mount.process.wait(EXIT_S)
    except subprocess.TimeoutExpired:
        mount.process.kill()
        mount.process.wait()
        raise TargetError(f"the daemon of {mount.path} did not end in {EXIT_S:.0f} s") from None


def start(
    image: Path, where: Path, memory: str, cache: str, options: str, launcher: Sequence[str] = ()
) -> OurMount:
    """Start a daemon for `image` at `where`; it does not answer yet. Whoever starts it ends it."""
    where.mkdir(parents=True, exist_ok=True)
    log = image.with_name(image.name + ".log")
    words = ["mount", "-f", "--memory", memory, "-o", f"cache={cache}"]
    if options:
        words += ["-o", options]
    with open(log, "ab") as sink:
        process = subprocess.Popen(
            [*launcher, *program(*words, image, where)],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env=child_environment(),
            cwd="/",
            start_new_session=True,  # the terminal's Ctrl-C is for us, who end it
        )
    note = f"cache={cache} memory={memory}"
    return OurMount("nofailfs", where, note, image=image, memory=memory, process=process, log=log)


@contextmanager
def killed(image: Path, where: Path, memory: str) -> Iterator[OurMount]:
    """Mount `image` at `where`; leaving kills the daemon, and takes the dead mount away."""
    mount = start(image, where, memory, "none", "")
    try:
        _wait_ready(mount)
        yield mount
    finally:
        mount.process.kill()
        mount.process.wait()
        unmount(where)


@contextmanager
def ours(
    image: Path,
    where: Path,
    memory: str = "256M",
    cache: str = "none",
    options: str = "",
    launcher: Sequence[str] = (),
) -> Iterator[OurMount]:
    """Mount `image` at `where`; leaving unmounts and demands that the daemon exits with 0.

    `launcher`: words before the daemon's command line.
    """
    mount = start(image, where, memory, cache, options, launcher)
    try:
        _wait_ready(mount)
        yield mount
    except BaseException:
        unmount(where)
        _stop(mount.process)
        raise
    status = _end(mount)
    if status:
        tail = mount.log.read_text(errors="replace")[-4000:]
        raise TargetError(f"the daemon ended with {status}: {tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a daemon whose work is void anyway, without hiding the error that made it so."""
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def kernel_xfs(image: Path, where: Path, options: str = "loop") -> Iterator[Target]:
    """The kernel's XFS on `image`, through a loop device that goes away with the mount."""
    where.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "xfs", "-o", options, image, where)
    try:
        yield Target("kernel XFS", where, "loop device, kernel page cache")
    finally:
        unmount(where)


@contextmanager
def kernel_xfs_direct(image: Path, where: Path) -> Iterator[Target]:
    """The same without the page cache of the file system that the image lies on."""
    device = run("losetup", "--find", "--show", "--direct-io=on", image).strip()
    try:
        with kernel_xfs(Path(device), where, "defaults"):
            yield Target("kernel XFS, direct I/O", where, "loop device with direct I/O")
    finally:
        run("losetup", "--detach", device)


@contextmanager
def tmpfs(where: Path) -> Iterator[Target]:
    """A tmpfs at `where`; without root, a directory of the one that is mounted already."""
    if is_root():
        where.mkdir(parents=True, exist_ok=True)
        run("mount", "-t", "tmpfs", "-o", "size=50%", "nofailfs-tmpfs", where)
        try:
            yield Target("tmpfs", where, "kernel page cache")
        finally:
            unmount(where)
        return
    if fs_type(Path("/dev/shm")) != TMPFS_MAGIC:
        raise TargetError("no tmpfs here: mounting one needs root, and /dev/shm is not one")
    path = Path(tempfile.mkdtemp(prefix="nofailfs-", dir="/dev/shm"))
    try:
        yield Target("tmpfs", path, "kernel page cache")
    finally:
        shutil.rmtree(path, ignore_errors=True)


def size_of(text: str) -> int:
    """Bytes of a size such as 4096, 64k, 16M or 4G."""
    found = re.fullmatch(r"(\d+)([kKmMgGtT]?)(?:i?[bB])?", text.strip())
    if not found:
        raise TargetError(f"{text!r} is not a size: write 4096, 64k, 16M or 4G")
    return (
        int(found.group(1)) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[found.group(2).lower()]
    )
