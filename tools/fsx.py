"""File system exerciser: random operations on one file, compared with a model after each.

In the tradition of fsx. The model is a byte array; the file must always read as the model does.
Every written word carries the number of the operation that wrote it and its own offset, so a
mismatch can say whose data is where it should not be. The sequence of operations depends on the
seed and on the set of operations that the mount supports (probed first, and printed), on nothing
else: the same seed runs the same sequence. A run that fails leaves the file as it is, saves its
operation log, prints the log's tail and the command that replays it.

After each step the range it touched is read back and compared, with a margin on both sides;
every `whole_every` steps, and at the end, the whole file is, after closing and opening it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from tools.progress import Progress

PAGE = mmap.PAGESIZE
MARGIN = 512  # bytes compared beyond each end of what a step touched
TAIL = 30  # operations printed on a mismatch
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16
FALLOC_COLLAPSE_RANGE, FALLOC_INSERT_RANGE = 8, 32
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)

# How often each operation is chosen, relative to the others.
WEIGHTS = {
    "write": 24,
    "read": 16,
    "truncate": 6,
    "append": 3,
    "mapread": 8,
    "mapwrite": 8,
    "fallocate": 4,
    "punch": 6,
    "zero": 4,
    "collapse": 2,
    "insert": 2,
    "copy": 3,
    "seek": 2,
    "fsync": 1,
    "reopen": 1,
    "drop": 1,
}


class Mismatch(Exception):
    """The file differs from the model, or a call failed that must not; the text says where."""


@dataclass(frozen=True)
class Step:
    """One operation: what, where, how much; `extra` is a source offset or a flag."""

    name: str
    offset: int = 0
    length: int = 0
    extra: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.offset:#x} {self.length:#x} {self.extra:#x}"

    @staticmethod
    def parse(line: str) -> Step:
        """The inverse of str(), for logs."""
        name, *numbers = line.split()
        return Step(name, *(int(number, 16) for number in numbers))


@dataclass
class Options:
    """What a run does; sizes in bytes."""

    seed: int = 1
    ops: int = 10_000
    file_max: int = 4 << 20
    io_max: int = 64 << 10
    whole_every: int = 1000
    stop_at: int | None = None
    disabled: frozenset[str] = frozenset()
    drop_caches: bool = False
    quiet: bool = False


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """The system call itself: C libraries' posix_fallocate imitates it where it is missing."""
    if _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def pattern(number: int, offset: int, length: int) -> bytes:
    """The bytes that operation `number` writes at `offset`: its number and the word's index."""
    first, last = offset // 8, (offset + length + 7) // 8
    words = np.arange(first, last, dtype=np.uint64) & np.uint64(0xFFFFFFFF)
    words |= np.uint64(number) << np.uint64(32)
    start = offset - first * 8
    return words.astype("<u8").tobytes()[start : start + length]


def writer_of(data: bytes | memoryview, offset: int) -> str:
    """Name the operation that wrote the word at `offset`, from the word itself."""
    start = -(offset % 8) % 8
    word = bytes(data[start : start + 8])
    if len(word) < 8:
        return "too short to tell"
    if not any(word):
        return "zeros"
    return f"operation {int.from_bytes(word[4:], 'little')} for word {word[:4][::-1].hex()}"


class Plan:
    """The endless sequence of steps that a seed means, for the operations that are enabled.

    `block` is the file system's block size, to which shifts of data are aligned.
    """

    def __init__(self, options: Options, enabled: list[str], block: int) -> None:
        self.rng = random.Random(options.seed)
        self.options = options
        self.block = block
        self.names = enabled
        self.weights = [WEIGHTS[name] for name in enabled]

    def _range(self, limit: int) -> tuple[int, int]:
        """A range below `limit`; every fourth one aligned to pages, where special cases live."""
        rng = self.rng
        length = min(int(2 ** rng.uniform(0, self.options.io_max.bit_length() - 1)), limit)
        offset = rng.randrange(0, max(limit - length, 0) + 1)
        if rng.random() < 0.25:
            offset &= ~(PAGE - 1)
            length = max(PAGE, length & ~(PAGE - 1))
        return offset, max(1, min(length, limit - offset))

    def next(self, size: int) -> Step:
        """The next step for a file of `size` bytes."""
        rng, top = self.rng, self.options.file_max
        name = rng.choices(self.names, self.weights)[0]
        if name in ("read", "mapread"):
            return Step(name, *self._range(size)) if size else Step("reopen")
        if name == "append":
            length = min(self._range(top)[1], top - size)
            return Step("write", size, length) if length else Step("truncate", top // 2)
        if name == "truncate":
            # half of them near the end, as programs do; the others anywhere
            near = rng.randrange(-2 * PAGE, 2 * PAGE)
            to = size + near if rng.random() < 0.5 else rng.randrange(0, top + 1)
            return Step(name, min(max(to, 0), top))
        if name == "copy":
            offset, length = self._range(size) if size else (0, 0)
            to = rng.randrange(0, top - length + 1)
            apart = to + length <= offset or offset + length <= to
            return Step(name, to, length, offset) if length and apart else Step("fsync")
        if name in ("fsync", "reopen", "drop"):
            return Step(name, 0, 0, rng.randrange(2))
        if name in ("collapse", "insert"):
            return self._shift(name, size)
        if name == "seek":
            return Step(name, rng.randrange(size)) if size else Step("fsync")
        offset, length = self._range(top)
        return Step(name, offset, length, rng.randrange(2) if name == "fallocate" else 0)


    def _shift(self, name: str, size: int) -> Step:
        """Whole blocks inside the file that go, or that are put in between."""
        block = self.block
        room = size - 1 if name == "collapse" else self.options.file_max - size
        length = self._range(max(size, 1))[1] // block * block or block
        if size <= block or length > room:
            return Step("fsync")
        last = size - 1 - (length if name == "collapse" else 0)
        return Step(name, self.rng.randrange(last // block + 1) * block, length)


@dataclass
class File:
    """The file under test and its model; `data[:size]` is what the file must hold."""

    path: Path
    data: bytearray
    fd: int = -1
    size: int = 0
    number: int = 0  # of the operation that runs
    shared: bool = True  # the mount allows shared mappings

    def open(self, flags: int = 0) -> None:
        self.fd = os.open(self.path, os.O_RDWR | flags, 0o644)

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def grow(self, size: int) -> None:
        self.size = max(self.size, size)

    def clear(self, start: int, end: int) -> None:
        """Zero a range of the model."""
        if end > start:
            self.data[start:end] = bytes(end - start)

    def compare(self, offset: int, length: int, got: bytes | None = None) -> None:
        """Read a range and compare it with the model; Mismatch with the first difference."""
        start, end = max(0, offset), min(offset + length, self.size)
        if end <= start:
            return
        if got is None:
            got = pread_all(self.fd, end - start, start)
        want = memoryview(self.data)[start:end]
        if got == want:
            return
        if len(got) != len(want):
            raise Mismatch(f"read {len(got):#x} bytes at {start:#x} instead of {len(want):#x}")
        ours = np.frombuffer(got, np.uint8)
        wrong = np.flatnonzero(ours != np.frombuffer(want, np.uint8))
        at = int(wrong[0])
        raise Mismatch(
            f"{len(wrong)} of {len(want)} bytes differ between {start + at:#x} and "
            f"{start + int(wrong[-1]):#x}: byte {start + at:#x} is {got[at]:#04x}, must be "
            f"{want[at]:#04x}; there is data of {writer_of(got[at:], start + at)}, "
            f"must be of {writer_of(want[at:], start + at)}"
        )

    def check_size(self) -> None:
        size = os.fstat(self.fd).st_size
        if size != self.size:
            raise Mismatch(f"the file has {size:#x} bytes, must have {self.size:#x}")


def pread_all(fd: int, length: int, offset: int) -> bytes:
    """pread until `length` bytes or the end of the file."""
    parts = []
    while length > 0:
        part = os.pread(fd, length, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def do_write(file: File, step: Step) -> None:
    end = step.offset + step.length
    data = pattern(file.number, step.offset, step.length)
    done = os.pwrite(file.fd, data, step.offset)
    if done != step.length:
        raise Mismatch(f"wrote {done:#x} of {step.length:#x} bytes")
    file.data[step.offset : end] = data
    file.grow(end)


def do_read(file: File, step: Step) -> None:
    """Nothing but the comparison that follows every step."""


def do_truncate(file: File, step: Step) -> None:
    os.ftruncate(file.fd, step.offset)
    file.clear(step.offset, file.size)
    file.size = step.offset


def _mapped(file: File, step: Step, write: bool) -> tuple[mmap.mmap, int]:
    start = step.offset & ~(PAGE - 1)
    flags = mmap.MAP_SHARED if file.shared else mmap.MAP_PRIVATE
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
    span = step.offset + step.length - start
    return mmap.mmap(file.fd, span, flags, protection, offset=start), step.offset - start


def do_mapread(file: File, step: Step) -> None:
    area, skip = _mapped(file, step, write=False)
    with area:
        file.compare(step.offset, step.length, area[skip : skip + step.length])


def do_mapwrite(file: File, step: Step) -> None:
    end = step.offset + step.length
    if end > file.size:
        do_truncate(file, Step("truncate", end))
    data = pattern(file.number, step.offset, step.length)
    area, skip = _mapped(file, step, write=True)
    with area:
        area[skip : skip + step.length] = data
        area.flush()
    file.data[step.offset : end] = data


def do_fallocate(file: File, step: Step) -> None:
    fallocate(file.fd, FALLOC_KEEP_SIZE if step.extra else 0, step.offset, step.length)
    if not step.extra:
        file.grow(step.offset + step.length)


def do_punch(file: File, step: Step) -> None:
    fallocate(file.fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, step.offset, step.length)
    file.clear(step.offset, min(step.offset + step.length, file.size))


def do_zero(file: File, step: Step) -> None:
    fallocate(file.fd, FALLOC_ZERO_RANGE, step.offset, step.length)
    file.clear(step.offset, step.offset + step.length)
    file.grow(step.offset + step.length)


def do_collapse(file: File, step: Step) -> None:
    fallocate(file.fd, FALLOC_COLLAPSE_RANGE, step.offset, step.length)
    end, size = step.offset + step.length, file.size
    file.data[step.offset : size - step.length] = file.data[end:size]
    file.clear(size - step.length, size)
    file.size -= step.length


def do_insert(file: File, step: Step) -> None:
    fallocate(file.fd, FALLOC_INSERT_RANGE, step.offset, step.length)
    end, size = step.offset + step.length, file.size
    file.data[end : size + step.length] = file.data[step.offset : size]
    file.clear(step.offset, end)
    file.size += step.length


def do_seek(file: File, step: Step) -> None:
    """From `offset` on, what SEEK_HOLE and SEEK_DATA call a hole must be zeros."""
    at = step.offset
    while at < file.size:
        hole = os.lseek(file.fd, at, os.SEEK_HOLE)
        try:
            data = os.lseek(file.fd, hole, os.SEEK_DATA) if hole < file.size else file.size
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = file.size
        if not at <= hole <= data <= file.size:
            raise Mismatch(f"from {at:#x}: hole at {hole:#x}, data at {data:#x}")
        if file.data.count(0, hole, data) != data - hole:
            raise Mismatch(f"there is data in the hole {hole:#x} to {data:#x}")
        at = data if data > at else file.size


def do_copy(file: File, step: Step) -> None:
    source, to, left = step.extra, step.offset, step.length
    while left:
        done = os.copy_file_range(file.fd, file.fd, left, source, to)
        if not done:
            raise Mismatch(f"copy_file_range stopped {left:#x} bytes early")
        file.data[to : to + done] = file.data[source : source + done]
        source, to, left = source + done, to + done, left - done
    file.grow(to)


def do_fsync(file: File, step: Step) -> None:
    if step.extra:
        os.fdatasync(file.fd)
    else:
        os.fsync(file.fd)


def do_reopen(file: File, step: Step) -> None:
    file.close()
    file.open()


def do_drop(file: File, step: Step) -> None:
    os.fsync(file.fd)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if step.extra and DROP_CACHES.enabled:
        DROP_CACHES.path.write_text("1\n")


@dataclass
class _DropCaches:
    path: Path = Path("/proc/sys/vm/drop_caches")
    enabled: bool = False


DROP_CACHES = _DropCaches()
ACTIONS: dict[str, Callable[[File, Step], None]] = {
    "write": do_write,
    "read": do_read,
    "truncate": do_truncate,
    "mapread": do_mapread,
    "mapwrite": do_mapwrite,
    "fallocate": do_fallocate,
    "punch": do_punch,
    "zero": do_zero,
    "collapse": do_collapse,
    "insert": do_insert,
    "seek": do_seek,
    "copy": do_copy,
    "fsync": do_fsync,
    "reopen": do_reopen,
    "drop": do_drop,
}


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError as error:
        if error.errno in UNSUPPORTED or error.errno == errno.ENODEV:
            return False
        raise
    return True


def probe(path: Path) -> frozenset[str]:
    """Names of the operations that the file system of `path` does not support, by errno."""
    refused = set()
    file = File(path, bytearray(2 * PAGE))
    file.open(os.O_CREAT | os.O_TRUNC)
    try:
        do_write(file, Step("write", 0, 2 * PAGE))
        trials = {
            "mapwrite": Step("mapwrite", 0, 1),
            "fallocate": Step("fallocate", 0, PAGE, 1),
            "punch": Step("punch", 0, PAGE),
            "zero": Step("zero", 0, PAGE),
            "copy": Step("copy", PAGE, PAGE, 0),
            "seek": Step("seek", 0),
        }
        for name, step in trials.items():
            if not _works(partial(ACTIONS[name], file, step)):
                refused.add(name)
        block = os.statvfs(path).f_bsize
        os.ftruncate(file.fd, 3 * block)
        file.data, file.size = bytearray(4 * block), 3 * block
        for name in ("collapse", "insert"):
            if not _works(partial(ACTIONS[name], file, Step(name, block, block))):
                refused.add(name)
        file.shared = "mapwrite" not in refused
        if not _works(partial(do_mapread, file, Step("mapread", 0, 1))):
            refused.add("mapread")
    finally:
        file.close()
        os.unlink(path)
    return frozenset(refused)


@dataclass
class Result:
    """How a run ended; `problem` is empty when every comparison was equal."""

    done: int
    refused: frozenset[str]
    problem: str = ""
    tail: list[str] = field(default_factory=list)
    log: Path | None = None


class Run:
    """One exerciser run: carries out steps, compares, keeps the log."""

    def __init__(self, path: Path, options: Options, refused: frozenset[str]) -> None:
        self.options = options
        self.refused = refused | options.disabled
        self.file = File(path, bytearray(options.file_max), shared="mapwrite" not in refused)
        self.log: list[Step] = []
        DROP_CACHES.enabled = options.drop_caches

    def planned(self) -> Iterator[Step]:
        enabled = [name for name in WEIGHTS if name not in self.refused]
        plan = Plan(self.options, enabled, os.statvfs(self.file.path.parent).f_bsize)
        for _ in range(self.options.ops):
            yield plan.next(self.file.size)

    def one(self, step: Step) -> None:
        """Carry out one step and compare what it touched."""
        file = self.file
        file.number += 1
        self.log.append(step)
        try:
            ACTIONS[step.name](file, step)
            if step.name == "truncate":
                file.compare(step.offset - MARGIN, 2 * MARGIN)
            elif step.length and step.name != "mapread":
                file.compare(step.offset - MARGIN, step.length + 2 * MARGIN)
            file.check_size()
            if file.number % self.options.whole_every == 0:
                self.whole()
        except OSError as error:
            raise Mismatch(f"{step.name} failed: {error}") from error

    def whole(self) -> None:
        do_reopen(self.file, Step("reopen"))
        self.file.check_size()
        chunk = 1 << 20
        for offset in range(0, self.file.size, chunk):
            self.file.compare(offset, chunk)

    def execute(self, steps: Iterator[Step]) -> Result:
        """Run `steps` on a new file; the file stays when something differs or at `stop_at`."""
        file, options = self.file, self.options
        file.open(os.O_CREAT | os.O_TRUNC)
        stop = options.stop_at if options.stop_at is not None else options.ops
        try:
            with Progress(f"fsx seed {options.seed}", min(stop, options.ops), options.quiet) as bar:
                for step in steps:
                    if file.number >= stop:
                        break
                    self.one(step)
                    bar.advance()
            self.whole()
        except Mismatch as problem:
            return self.failed(str(problem))
        finally:
            file.close()
        if options.stop_at is None:
            os.unlink(file.path)
        return Result(file.number, self.refused)

    def failed(self, problem: str) -> Result:
        """Save the operation log where the file is not, and describe what happened."""
        log = Path.cwd() / f"fsx-{self.options.seed}.ops"
        log.write_text("".join(f"{step}\n" for step in self.log))
        numbered = enumerate(self.log, 1)
        tail = [f"{number:8d} {step}" for number, step in deque(numbered, TAIL)]
        return Result(self.file.number, self.refused, problem, tail, log)


def exercise(path: Path, options: Options) -> Result:
    """Run the exerciser on the new file `path`."""
    refused = probe(path)
    words = " ".join(sorted(refused | options.disabled)) or "nothing"
    with Progress("fsx", 0, options.quiet) as bar:
        bar.say(f"fsx: {path}, seed {options.seed}, {options.ops} operations; off: {words}")
    run = Run(path, options, refused)
    return run.execute(run.planned())


def replay(path: Path, log: Path, options: Options) -> Result:
    """Carry out a saved operation log on the new file `path`, comparing as it goes."""
    steps = [Step.parse(line) for line in log.read_text().splitlines() if line.strip()]
    options.ops = len(steps)
    top = max((step.offset + step.length for step in steps), default=0)
    options.file_max = max(options.file_max, top)
    return Run(path, options, probe(path)).execute(iter(steps))


def report(path: Path, options: Options, result: Result) -> list[str]:
    """Lines that tell how a run ended, and how to see a failure again."""
    if not result.problem:
        return [f"fsx: {result.done} operations, seed {options.seed}: no difference"]
    off = "".join(f" --off {name}" for name in sorted(options.disabled))
    again = (
        f"nofailfs fsx {path} --seed {options.seed} --ops {options.ops} "
        f"--length {options.file_max} --io-max {options.io_max} "
        f"--whole-every {options.whole_every}{off} --replay-to {result.done}"
    )
    return [
        f"fsx: DIFFERENCE at operation {result.done}, seed {options.seed}",
        f"fsx: {result.problem}",
        f"fsx: the last {len(result.tail)} operations (name offset length extra):",
        *result.tail,
        f"fsx: {path} is left as it is; all operations are in {result.log}",
        f"fsx: again:    {again}",
        f"fsx: from log: nofailfs fsx {path} --replay {result.log}",
    ]
