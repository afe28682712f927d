"""Other FUSE file systems to stand beside ours in a benchmark, each mounted for a `with` block.

`passthrough_ll` is libfuse's example in C, whose source Debian ships in libfuse3-dev; it is
compiled in the scratch directory. `passthroughfs` is pyfuse3's own example, taken from its source
distribution. Both pass requests on to a directory on a tmpfs. `fuse2fs` is Debian's ext4 in user
space. Any other program can be named by its command line.

What cannot be had on this machine raises TargetError with the reason; the caller goes on without.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from tools.targets import Target, TargetError, find_tool, run, tmpfs, unmount

LIBFUSE_EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")
READY_S = 30.0
EXIT_S = 20.0


def _finish(process: subprocess.Popen[bytes], where: Path) -> None:
    unmount(where)
    try:
        process.wait(EXIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def served(command: Sequence[str | Path], where: Path) -> Iterator[None]:
    """Run a file system's daemon in the foreground while `where` is in use."""
    where.mkdir(parents=True, exist_ok=True)
    log = where.with_name(where.name + ".log")
    with open(log, "wb") as sink:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    try:
        deadline = time.monotonic() + READY_S
        while not os.path.ismount(where):
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-2000:].strip()
                raise TargetError(f"{command[0]} did not mount: {said or 'it said nothing'}")
            time.sleep(0.01)
        yield
    finally:
        _finish(process, where)


@contextmanager
def passthrough_ll(scratch: Path) -> Iterator[Target]:
    """libfuse's low-level example over a tmpfs, without the kernel's cache."""
    source = LIBFUSE_EXAMPLES / "passthrough_ll.c"
    if not source.is_file():
        raise TargetError(f"{source} is missing: apt-get install libfuse3-dev")
    program = scratch / "passthrough_ll"
    if not program.exists():
        flags = run("pkg-config", "fuse3", "--cflags", "--libs").split()
        run("gcc", "-O2", "-I", LIBFUSE_EXAMPLES, source, "-o", program, *flags)
    where = scratch / "passthrough_ll.mnt"
    with (
        tmpfs(scratch / "passthrough_ll.src") as below,
        served([program, "-f", "-o", f"source={below.path},cache=never", where], where),
    ):
        yield Target("passthrough_ll", where, "libfuse's example in C, over tmpfs, cache=never")


def _passthroughfs_source(scratch: Path) -> Path:
    """The example of pyfuse3's source distribution, of the version that is installed.

    pip unpacks a source distribution before it asks its build system what it is. That system need
    not be here, and its answer does not matter: what was unpacked stays.
    """
    place = scratch / "pip"
    place.mkdir(exist_ok=True)
    found = next(place.glob("**/examples/passthroughfs.py"), None)
    if found is not None:
        return found
    words = ["--quiet", "--no-deps", "--no-build-isolation", "--no-clean", "--no-binary", ":all:"]
    wanted = f"pyfuse3=={metadata.version('pyfuse3')}"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *words, "--dest", str(place), wanted],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(place)},
    )
    found = next(place.glob("**/examples/passthroughfs.py"), None)
    if found is None:
        said = done.stderr.strip().splitlines()
        raise TargetError(f"pyfuse3's source distribution: {said[-1] if said else 'none came'}")
    return found


@contextmanager
def passthroughfs(scratch: Path) -> Iterator[Target]:
    """pyfuse3's own example over a tmpfs."""
    script = _passthroughfs_source(scratch)
    where = scratch / "passthroughfs.mnt"
    with (
        tmpfs(scratch / "passthroughfs.src") as below,
        served([sys.executable, script, below.path, where], where),
    ):
        yield Target("passthroughfs", where, "pyfuse3's example, over tmpfs, O_DIRECT", True)


@contextmanager
def fuse2fs(scratch: Path, size: int) -> Iterator[Target]:
    """Debian's ext4 in user space on an image in memory."""
    if shutil.which("fuse2fs") is None:
        raise TargetError("not installed: apt-get install fuse2fs")
    image, where = scratch / "ext4.img", scratch / "fuse2fs.mnt"
    with open(image, "wb") as file:
        file.truncate(size)
    run("mkfs.ext4", "-q", "-F", image)
    with served([find_tool("fuse2fs"), "-f", image, where], where):
        yield Target("fuse2fs", where, "ext4 in user space, image in memory, O_DIRECT", True)
    image.unlink()


@contextmanager
def other(command: str, scratch: Path) -> Iterator[Target]:
    """Any file system: a command line with {source}, a directory on a tmpfs, and {mnt}.

    It has to stay in the foreground. Raises TargetError if it does not mount.
    """
    name = Path(shlex.split(command)[0]).name
    where = scratch / f"{name}.peer"
    with tmpfs(scratch / f"{name}.source") as below:
        words = [
            word.format(source=below.path, mnt=where) for word in shlex.split(command)
        ]
        with served(words, where):
            yield Target(name, where, command, True)
