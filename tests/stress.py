"""One worker of the stress test: a program that uses a mount hard and knows what it must read.

`owner` has files of its own and a model of each: it writes, reads, truncates, unlinks (going on
with files that are only open), creates and renames, and compares every byte it reads. `writer`,
`reader` and `cutter` share a file: the writer stamps whole records, so that a reader who finds two
stamps in one record has seen half of a write, which XFS never shows; the cutter truncates another
file, whose words are zero or what belongs at their place. Reports go to standard output; the exit
status is 1 when something was read that was never there.

    python -m tests.stress owner|writer|reader|cutter DIRECTORY SEED SECONDS
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FILE_MAX = 3 << 20
IO_MAX = 300 << 10
OWN_FILES = 12
RECORD = 64 << 10
RECORDS = 24
SHARED, CUT = "shared", "cut"


class Wrong(Exception):
    """Something was read that cannot have been written."""


@dataclass
class Own:
    """A file and what it must hold; `path` is None once it has no name."""

    path: Path | None
    fd: int
    data: bytearray = field(default_factory=bytearray)


class Owner:
    """Random operations on files that nobody else touches."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.directory = directory / f"own-{seed}"
        self.directory.mkdir()
        self.files: list[Own] = []
        self.serial = 0
        self.operations = 0

    def run(self, seconds: float) -> None:
        actions = (
            [self.write] * 8 + [self.read] * 8 + [self.truncate] * 3
            + [self.unlink, self.rename, self.look, self.reopen]
        )  # fmt: skip
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while len(self.files) < OWN_FILES:
                self.create()
            self.rng.choice(actions)(self.rng.choice(self.files))
            self.operations += 1
        for file in self.files:
            self.compare(file, 0, len(file.data) + 1)

    def create(self) -> None:
        self.serial += 1
        path = self.directory / f"file-{self.serial}"
        self.files.append(Own(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)))

    def _range(self, most: int) -> tuple[int, int]:
        offset = self.rng.randrange(most)
        length = min(int(2 ** self.rng.uniform(0, 18.2)), IO_MAX, FILE_MAX - offset)
        if self.rng.random() < 0.3:
            offset &= ~4095
            length = max(length & ~4095, 4096)
        return offset, length

    def write(self, file: Own) -> None:
        near = min(len(file.data) + IO_MAX, FILE_MAX - 4096)
        offset, length = self._range(near)
        data = self.rng.randbytes(min(length, 64)) * (length // 64 + 1)
        done = os.pwrite(file.fd, memoryview(data)[:length], offset)
        if done != length:
            raise Wrong(f"{file.path}: wrote {done} of {length} bytes")
        if offset > len(file.data):
            file.data.extend(bytes(offset - len(file.data)))
        file.data[offset : offset + length] = data[:length]

    def read(self, file: Own) -> None:
        self.compare(file, *self._range(max(len(file.data), 1)))

    def compare(self, file: Own, offset: int, length: int) -> None:
        want = memoryview(file.data)[offset : offset + length]
        got = b""
        while len(got) < len(want):
            part = os.pread(file.fd, len(want) - len(got), offset + len(got))
            if not part:
                break
            got += part
        if got != want:
            same = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), 0)
            raise Wrong(
                f"{file.path}: at {offset}, {len(want)} bytes: got {len(got)}, differ at {same}"
            )

    def truncate(self, file: Own) -> None:
        size = self.rng.randrange(max(min(2 * len(file.data), FILE_MAX), 1))
        os.ftruncate(file.fd, size)
        file.data = file.data[:size] + bytes(size - min(len(file.data), size))

    def unlink(self, file: Own) -> None:
        """Without a name it goes on, until its turn comes again."""
        if file.path is not None:
            os.unlink(file.path)
            file.path = None
            return
        self.compare(file, 0, len(file.data) + 1)
        os.close(file.fd)
        self.files.remove(file)

    def rename(self, file: Own) -> None:
        if file.path is not None:
            self.serial += 1
            to = self.directory / f"file-{self.serial}"
            os.rename(file.path, to)
            file.path = to

    def look(self, file: Own) -> None:
        size = os.fstat(file.fd).st_size
        if size != len(file.data):
            raise Wrong(f"{file.path}: size {size}, must be {len(file.data)}")

    def reopen(self, file: Own) -> None:
        if file.path is not None:
            os.close(file.fd)
            file.fd = os.open(file.path, os.O_RDWR)

    def manifest(self) -> list[str]:
        """A line for each file that has a name: digest and path."""
        named = [file for file in self.files if file.path is not None]
        return [f"{hashlib.sha256(file.data).hexdigest()} {file.path}" for file in named]


def owner(directory: Path, seed: int, seconds: float) -> list[str]:
    work = Owner(directory, seed)
    work.run(seconds)
    return [f"{work.operations} operations", *work.manifest()]


def writer(directory: Path, seed: int, seconds: float) -> list[str]:
    """Stamp whole records; every write is one request."""
    rng = random.Random(seed)
    fd = os.open(directory / SHARED, os.O_RDWR)
    stamp, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        stamp += 1
        record = (stamp << 8 | seed & 0xFF).to_bytes(8, "little") * (RECORD // 8)
        os.pwrite(fd, record, rng.randrange(RECORDS) * RECORD)
    return [f"{stamp} records"]


def reader(directory: Path, seed: int, seconds: float) -> list[str]:
    """No record has two stamps, and no word of the cut file is another's."""
    rng = random.Random(seed)
    fd, cut = (os.open(directory / name, os.O_RDONLY) for name in (SHARED, CUT))
    looked, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        number = rng.randrange(RECORDS)
        words = np.frombuffer(os.pread(fd, RECORD, number * RECORD), np.uint64)
        if words.size and (words != words[0]).any():
            raise Wrong(f"record {number} shows two writes: {words[0]:#x} and others")
        at = rng.randrange(FILE_MAX // 8) * 8
        words = np.frombuffer(_whole(os.pread(cut, RECORD, at)), np.uint64)
        want = np.arange(at // 8 + 1, at // 8 + 1 + words.size, dtype=np.uint64)
        if ((words != want) & (words != 0)).any():
            raise Wrong(f"at {at} of the file that is cut: words that belong elsewhere")
        looked += 1
    return [f"{looked} looks"]


def _whole(data: bytes) -> bytes:
    return data[: len(data) & ~7]


def cutter(directory: Path, seed: int, seconds: float) -> list[str]:
    """Truncate, extend and fill a file in which each word tells its place."""
    rng = random.Random(seed)
    fd = os.open(directory / CUT, os.O_RDWR)
    cuts, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        os.ftruncate(fd, rng.randrange(FILE_MAX // 8) * 8)
        for _ in range(rng.randrange(8)):
            at, count = rng.randrange(FILE_MAX // 8), rng.randrange(1, IO_MAX // 8)
            words = np.arange(at + 1, at + 1 + count, dtype=np.uint64)
            os.pwrite(fd, words.tobytes(), at * 8)
        cuts += 1
    return [f"{cuts} cuts"]


ROLES: dict[str, Callable[[Path, int, float], list[str]]] = {
    "owner": owner,
    "writer": writer,
    "reader": reader,
    "cutter": cutter,
}


def main(role: str, directory: str, seed: str, seconds: str) -> int:
    try:
        lines = ROLES[role](Path(directory), int(seed), float(seconds))
    except Wrong as wrong:
        print(f"{role} {seed}: {wrong}")
        return 1
    print(f"{role} {seed}: " + "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
