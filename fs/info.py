"""The layout of an image, printed as `xfs_info` prints it, or as a record for JSON.

Reads one superblock and nothing else: no mount, no lock, no arena. Works on every image that has
an XFS superblock, also on those that a mount would refuse (version 4, an external log, a
realtime device), because the layout is how one finds out why.

The text is compared with xfsprogs' byte for byte in the tests. Field meanings: XFS format,
superblock. Must stay importable without numba.
"""

from __future__ import annotations

import errno
import os
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

import crc32c
import numpy as np

from fs.errors import UserError
from fs.xfs import layout as L

EXIT_FAILED = 1
SECTOR_MAX = 32768
ATTR2_ALWAYS = 5  # version 5 always has these features, whatever its bits say


@dataclass(frozen=True)
class Layout:
    """What `xfs_info` shows; sizes in bytes where named *size, otherwise in blocks."""

    isize: int
    agcount: int
    agsize: int
    sectsz: int
    attr: int
    projid32bit: int
    crc: int
    finobt: int
    sparse: int
    rmapbt: int
    reflink: int
    bigtime: int
    inobtcount: int
    nrext64: int
    bsize: int
    blocks: int
    imaxpct: int
    sunit: int
    swidth: int
    naming_version: int
    naming_bsize: int
    ascii_ci: int
    ftype: int
    log_internal: bool
    log_blocks: int
    log_version: int
    log_sectsz: int
    log_sunit: int
    lazy_count: int
    rt_present: bool
    rt_extsz: int
    rt_blocks: int
    rt_extents: int
    label: str
    uuid: str
    clean: bool  # by the marks of the superblock; the log is not looked at


def read_superblock(path: str) -> Any:
    """The superblock record of an image.

    Raises UserError if the file cannot be read or holds no XFS superblock.
    """
    try:
        with open(path, "rb", buffering=0) as image:
            data = image.read(SECTOR_MAX)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise UserError(f"cannot read {path}: {reason}", EXIT_FAILED) from error
    if len(data) < L.SB.itemsize:
        raise UserError(f"{path} is too small to hold a filesystem", EXIT_FAILED)
    sb = np.frombuffer(data[: L.SB.itemsize], L.SB)[0]
    if sb["magic"] != L.MAGIC_SB:
        found = int(sb["magic"])
        raise UserError(
            f"{path} holds no XFS filesystem (magic number 0x{found:08x}); "
            "name an image that mkfs.xfs made",
            EXIT_FAILED,
        )
    if not _checksum_good(sb, data):
        raise UserError(
            f"the superblock of {path} has a wrong checksum; try `xfs_repair -n {path}`",
            EXIT_FAILED,
        )
    return sb


def _checksum_good(sb: Any, data: bytes) -> bool:
    """XFS format: CRC-32C of the sector with its own field taken as zero. Version 5 only."""
    if int(sb["versionnum"]) & 0xF != 5:
        return True
    size = int(sb["sectsize"])
    if not L.SB.itemsize <= size <= len(data):
        return False
    at = L.off(L.SB, "crc")
    return bool(crc32c.crc32c(data[:at] + bytes(4) + data[at + 4 : size]) == int(sb["crc"]))


def layout(sb: Any) -> Layout:
    """The layout that a superblock describes."""
    version, features2 = int(sb["versionnum"]), int(sb["features2"])
    five = version & 0xF == 5
    ro_compat = int(sb["features_ro_compat"]) if five else 0
    incompat = int(sb["features_incompat"]) if five else 0
    more = features2 if version & L.VERSION_MOREBITS else 0
    block = int(sb["blocksize"])
    has_attr = bool(version & L.VERSION_ATTR)
    log_two = five or bool(version & L.VERSION_LOGV2)
    log_sector = int(sb["logsectsize"]) if version & L.VERSION_SECTOR else L.BB_SIZE
    return Layout(
        isize=int(sb["inodesize"]),
        agcount=int(sb["agcount"]),
        agsize=int(sb["agblocks"]),
        sectsz=int(sb["sectsize"]),
        attr=2 if five or more & L.VERSION2_ATTR2 else int(has_attr),
        projid32bit=int(five or bool(more & L.VERSION2_PROJID32)),
        crc=int(five),
        finobt=int(bool(ro_compat & L.RO_COMPAT_FINOBT)),
        sparse=int(bool(incompat & L.INCOMPAT_SPINODES)),
        rmapbt=int(bool(ro_compat & L.RO_COMPAT_RMAPBT)),
        reflink=int(bool(ro_compat & L.RO_COMPAT_REFLINK)),
        bigtime=int(bool(incompat & L.INCOMPAT_BIGTIME)),
        inobtcount=int(bool(ro_compat & L.RO_COMPAT_INOBTCNT)),
        nrext64=int(bool(incompat & L.INCOMPAT_NREXT64)),
        bsize=block,
        blocks=int(sb["dblocks"]),
        imaxpct=int(sb["imax_pct"]),
        sunit=int(sb["unit"]),
        swidth=int(sb["width"]),
        naming_version=2 if five or version & L.VERSION_DIRV2 else 1,
        naming_bsize=block << int(sb["dirblklog"]),
        ascii_ci=int(bool(version & L.VERSION_BORG)),
        ftype=int(bool(incompat & L.INCOMPAT_FTYPE) or bool(more & L.VERSION2_FTYPE)),
        log_internal=bool(sb["logstart"]),
        log_blocks=int(sb["logblocks"]),
        log_version=2 if log_two else 1,
        log_sectsz=log_sector,
        log_sunit=int(sb["logsunit"]) // block if log_two else 0,
        lazy_count=int(five or bool(more & L.VERSION2_LAZYSB)),
        rt_present=bool(sb["rblocks"]),
        rt_extsz=int(sb["rextsize"]) * block,
        rt_blocks=int(sb["rblocks"]),
        rt_extents=int(sb["rextents"]),
        label=bytes(sb["fname"]).rstrip(b"\0").decode("utf-8", "backslashreplace"),
        uuid=_uuid_text(sb["uuid"].tobytes()),
        clean=not (incompat & L.INCOMPAT_NEEDSREPAIR or sb["inprogress"]),
    )


def _uuid_text(raw: bytes) -> str:
    word = raw.hex()
    return "-".join((word[:8], word[8:12], word[12:16], word[16:20], word[20:]))


def _row(label: str, first: str, name: str, value: int, rest: str) -> str:
    """Labels are 9 wide, the first column 22, the first pair 12 (`isize=512   `)."""
    pair = f"{name}={value}"
    return f"{label:<9}={first:<22} {pair:<12} {rest}\n"


def text(shown: Layout, image: str) -> str:
    """The ten lines of `xfs_info` for an image called `image`."""
    s = shown
    log = "internal log" if s.log_internal else "external"
    realtime = "external" if s.rt_present else "none"
    trees = f"finobt={s.finobt}, sparse={s.sparse}, rmapbt={s.rmapbt}"
    newer = f"bigtime={s.bigtime} inobtcount={s.inobtcount} nrext64={s.nrext64}"
    rows: tuple[tuple[str, str, str, int, str], ...] = (
        ("meta-data", image, "isize", s.isize, f"agcount={s.agcount}, agsize={s.agsize} blks"),
        ("", "", "sectsz", s.sectsz, f"attr={s.attr}, projid32bit={s.projid32bit}"),
        ("", "", "crc", s.crc, trees),
        ("", "", "reflink", s.reflink, newer),
        ("data", "", "bsize", s.bsize, f"blocks={s.blocks}, imaxpct={s.imaxpct}"),
        ("", "", "sunit", s.sunit, f"swidth={s.swidth} blks"),
        (
            "naming",
            f"version {s.naming_version}",
            "bsize",
            s.naming_bsize,
            f"ascii-ci={s.ascii_ci}, ftype={s.ftype}",
        ),
        ("log", log, "bsize", s.bsize, f"blocks={s.log_blocks}, version={s.log_version}"),
        ("", "", "sectsz", s.log_sectsz, f"sunit={s.log_sunit} blks, lazy-count={s.lazy_count}"),
        (
            "realtime",
            realtime,
            "extsz",
            s.rt_extsz,
            f"blocks={s.rt_blocks}, rtextents={s.rt_extents}",
        ),
    )
    return "".join(_row(*row) for row in rows)


def record(
    shown: Layout, image: str, policy: str = "", negotiated: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The layout for JSON, with the image's path in front, and what is the mount's behind."""
    more = {"policy": policy, "negotiated": negotiated}
    return {"image": image, **asdict(shown), **{name: v for name, v in more.items() if v}}


def mount_text(policy: str, negotiated: dict[str, Any]) -> str:
    """What is a mount's own; nothing for an image."""
    memory = f"memory   =policy={policy}\n" if policy else ""
    return memory + _negotiated_text(negotiated)


def _negotiated_text(negotiated: dict[str, Any]) -> str:
    """What a mount agreed upon with the kernel; nothing for an image or a mount without lanes."""
    if not negotiated:
        return ""
    numbers = {name: value for name, value in negotiated.items() if name not in ("flags",)}
    words = textwrap.wrap(" ".join(str(flag).lower() for flag in negotiated["flags"]), 60)
    rows = [", ".join(f"{name}={value}" for name, value in part) for part in _threes(numbers)]
    label = ["fuse     =", *["         ="] * (len(rows) + len(words) - 1)]
    return "".join(f"{a}{b}\n" for a, b in zip(label, rows + words, strict=True))


def _threes(numbers: dict[str, Any]) -> list[list[tuple[str, Any]]]:
    pairs = list(numbers.items())
    return [pairs[i : i + 3] for i in range(0, len(pairs), 3)]
