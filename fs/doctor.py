"""What this machine lacks for a mount, and the apt line that brings it.

Each check looks at one thing and says what is missing, why it matters and how to get it. A
failed check of kind `needed` means that no mount works; `useful` ones concern tools and tests.
Nothing is changed. Must stay importable without numba.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NEEDED, USEFUL = "needed", "useful"
PYTHON_LEAST = (3, 11)
VERSION_SECONDS = 10
FUSE_CONF = Path("/etc/fuse.conf")
HELPER = Path("/sbin/mount.fuse.nofailfs")


@dataclass(frozen=True)
class Finding:
    """The result of one check. `package` is Debian's, empty if no package mends it."""

    name: str
    good: bool
    kind: str
    detail: str
    package: str = ""
    advice: str = ""


def _program(name: str, package: str, kind: str, why: str) -> Finding:
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    detail = path or f"not found: {why}"
    return Finding(name, path is not None, kind, detail, package)


def _device() -> Finding:
    path = "/dev/fuse"
    if not os.path.exists(path):
        return Finding(
            path, False, NEEDED, "missing", advice="load the kernel module: modprobe fuse"
        )
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding(
            path, False, NEEDED, "no permission", advice="chmod 666 /dev/fuse, or become root"
        )
    return Finding(path, True, NEEDED, "readable and writable")


def _python() -> Finding:
    good = sys.version_info[:2] >= PYTHON_LEAST
    wanted = ".".join(map(str, PYTHON_LEAST))
    return Finding("python", good, NEEDED, platform.python_version(), "python3", f"need {wanted}")


def _module(name: str, kind: str = NEEDED, package: str = "") -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, kind, "not installed", package, f"pip install {name}")
    return Finding(name, True, kind, version)


def _header(package: str) -> Finding:
    found = list(Path("/usr/include").glob("fuse3/fuse_lowlevel.h"))
    detail = str(found[0]) if found else "not found: pyfuse3 has no wheel and is built here"
    return Finding("libfuse headers", bool(found), USEFUL, detail, package)


def check_allow_other() -> Finding:
    """Whether ordinary users may pass allow_other."""
    name = "user_allow_other"
    if os.geteuid() == 0:
        return Finding(name, True, USEFUL, "not needed for root")
    try:
        lines = FUSE_CONF.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    good = any(line.strip() == name for line in lines)
    detail = "set" if good else f"not in {FUSE_CONF}: -o allow_other is for root only"
    return Finding(name, good, USEFUL, detail, advice=f"echo {name} >> {FUSE_CONF}")


def _helper() -> Finding:
    good = HELPER.exists()
    missing = "not installed: mount -t fuse.nofailfs goes through mount.fuse3"
    detail = "installed" if good else missing
    return Finding(str(HELPER), good, USEFUL, detail, advice="nofailfs install-helper")


def _kernel_xfs() -> Finding:
    text = Path("/proc/filesystems").read_text(encoding="ascii", errors="replace")
    good = any(line.split()[-1:] == ["xfs"] for line in text.split("\n"))
    detail = "known" if good else "unknown: no comparison with the kernel's XFS"
    return Finding("kernel's XFS", good, USEFUL, detail, advice="modprobe xfs")


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    lambda: _module("pyfuse3"),
    lambda: _module("trio"),
    lambda: _module("numba"),
    lambda: _module("numpy"),
    lambda: _module("crc32c"),
    _device,
    lambda: _program("fusermount3", "fuse3", NEEDED, "mounts for ordinary users"),
    lambda: _program("mkfs.xfs", "xfsprogs", NEEDED, "makes images"),
    lambda: _program("xfs_repair", "xfsprogs", USEFUL, "checks images"),
    lambda: _program("fio", "fio", USEFUL, "drives the comparisons"),
    lambda: _program("gcc", "gcc", USEFUL, "builds pyfuse3"),
    lambda: _program("pkg-config", "pkg-config", USEFUL, "builds pyfuse3"),
    lambda: _header("libfuse3-dev"),
    check_allow_other,
    _helper,
    _kernel_xfs,
)


def examine() -> list[Finding]:
    """All findings, in order of importance."""
    return [check() for check in CHECKS]


def apt_line(findings: list[Finding]) -> str:
    """The command that installs what is missing; empty if no package is."""
    packages = dict.fromkeys(f.package for f in findings if not f.good and f.package)
    return f"apt-get install -y {' '.join(packages)}" if packages else ""


def is_fit(findings: list[Finding]) -> bool:
    """Whether a mount can work."""
    return all(f.good for f in findings if f.kind == NEEDED)


def versions() -> list[str]:
    """Versions for --version and bug reports, one a line."""
    lines = [f"nofailfs {_own_version()}", f"python {platform.python_version()}"]
    for name in ("pyfuse3", "trio", "numba", "numpy"):
        finding = _module(name)
        lines.append(f"{name} {finding.detail}")
    tool = shutil.which("fusermount3")
    if tool:
        done = subprocess.run(
            [tool, "-V"], capture_output=True, text=True, timeout=VERSION_SECONDS, check=False
        )
        lines.append("libfuse " + done.stdout.strip().rpartition(" ")[2])
    lines.append(f"kernel {platform.release()}")
    return lines


def _own_version() -> str:
    try:
        return importlib.metadata.version("nofailfs")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
