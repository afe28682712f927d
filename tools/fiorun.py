"""Run a fio job file in a directory and read what fio says.

The job files live in `tools/fio/` and take their directory, size and runtime from the environment
(fio expands ${FIO_DIR} and friends), so they can be run by hand as well. Results come from fio's
JSON; rates are per second, sizes in bytes, latencies in nanoseconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fs.errors import UserError
from tools.targets import find_tool

JOBS = Path(__file__).resolve().parent / "fio"


@dataclass(frozen=True)
class Fio:
    """What one run of a job file gave; `errors` counts jobs that ended with an error."""

    job: str
    read_iops: float
    write_iops: float
    read_bytes_s: float
    write_bytes_s: float
    read_p99_ns: float
    write_p99_ns: float
    p50_ns: float
    errors: int
    text: str = ""

    @property
    def iops(self) -> float:
        return self.read_iops + self.write_iops

    @property
    def bytes_s(self) -> float:
        return self.read_bytes_s + self.write_bytes_s

    @property
    def p99_ns(self) -> float:
        return max(self.read_p99_ns, self.write_p99_ns)


def names() -> list[str]:
    """Names of the job files."""
    return sorted(path.stem for path in JOBS.glob("*.fio"))


def job_file(name: str) -> Path:
    path = JOBS / f"{name}.fio"
    if not path.is_file():
        raise UserError(f"no fio job {name!r}; there are: {' '.join(names())}", 2)
    return path


def _percentile(side: dict[str, dict[str, dict[str, float]]], which: int) -> float:
    return float(side.get("clat_ns", {}).get("percentile", {}).get(f"{which}.000000", 0.0))


def _parse(name: str, status: int, output: str, complaints: str) -> Fio:
    start = output.find("{")
    if start < 0:
        return Fio(name, 0, 0, 0, 0, 0, 0, 0, 1, (output + complaints).strip())
    jobs = json.loads(output[start:])["jobs"]
    errors = sum(1 for job in jobs if job.get("error")) or (1 if status else 0)

    def total(side: str, key: str) -> float:
        return float(sum(job[side][key] for job in jobs))

    return Fio(
        name,
        total("read", "iops"),
        total("write", "iops"),
        total("read", "bw_bytes"),
        total("write", "bw_bytes"),
        max(_percentile(job["read"], 99) for job in jobs),
        max(_percentile(job["write"], 99) for job in jobs),
        max(_percentile(job[side], 50) for job in jobs for side in ("read", "write")),
        errors,
        (output[:start] + complaints).strip() if errors else "",
    )


def run(
    name: str,
    directory: Path,
    size: int,
    runtime_s: int = 5,
    timeout: float = 900.0,
    *,
    direct: bool = False,
    clients: int = 1,
) -> Fio:
    """Run the job file `name` in a directory of its own under `directory`, which is removed.

    `size` is the bytes of each client's file; `direct` asks for O_DIRECT. An error that fio meets
    is in the result, not raised.
    """
    where = directory / f"fio-{name}"
    where.mkdir()
    environment = {
        "FIO_DIR": str(where),
        "FIO_SIZE": str(size),
        "FIO_RUNTIME": str(runtime_s),
        "FIO_DIRECT": str(int(direct)),
        "FIO_CLIENTS": str(clients),
    }
    try:
        return _fio(name, [str(job_file(name))], timeout, environment)
    finally:
        shutil.rmtree(where, ignore_errors=True)


def once(way: str, path: Path, size: int, *, direct: bool = False, timeout: float = 900.0) -> Fio:
    """Go once through a file or device in requests of 1 MiB; `way` is `read` or `write`.

    A write ends with fsync, which is part of its time. `size` is bytes; the file stays.
    """
    words = [f"--name={way}", f"--rw={way}", f"--filename={path}", f"--size={size}", "--bs=1m"]
    words += ["--ioengine=psync", "--end_fsync=1", "--fallocate=none", f"--direct={int(direct)}"]
    return _fio(way, words, timeout, {})


def _fio(name: str, words: list[str], timeout: float, environment: dict[str, str]) -> Fio:
    done = subprocess.run(
        [find_tool("fio"), "--output-format=json", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd="/",
        timeout=timeout,
    )
    return _parse(name, done.returncode, done.stdout, done.stderr)
