"""The superblock: from bytes to a Geometry, refusing by name what is not supported.

The rules are the kernel's (XFS format, superblock checks): an unknown incompatible feature means
no mount at all, an unknown read-only-compatible one means read-only. The CRC covers the sector.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fs.errors import UserError
from fs.xfs import layout as L
from fs.xfs.crc import crc_ok
from fs.xfs.geometry import Geometry

CRC_OFFSET = L.off(L.SB, "crc")
MOUNT_FAILED = 32

INCOMPAT_NAMES = {
    L.INCOMPAT_FTYPE: "ftype",
    L.INCOMPAT_SPINODES: "sparse",
    L.INCOMPAT_META_UUID: "meta_uuid",
    L.INCOMPAT_BIGTIME: "bigtime",
    L.INCOMPAT_NEEDSREPAIR: "needsrepair",
    L.INCOMPAT_NREXT64: "nrext64",
    L.INCOMPAT_EXCHRANGE: "exchange",
    L.INCOMPAT_PARENT: "parent",
    0x100: "metadir",
    0x200: "zoned",
    0x400: "zone_gaps",
}
RO_COMPAT_NAMES = {
    L.RO_COMPAT_FINOBT: "finobt",
    L.RO_COMPAT_RMAPBT: "rmapbt",
    L.RO_COMPAT_REFLINK: "reflink",
    L.RO_COMPAT_INOBTCNT: "inobtcount",
}
INCOMPAT_SUPPORTED = (
    L.INCOMPAT_FTYPE
    | L.INCOMPAT_SPINODES
    | L.INCOMPAT_META_UUID
    | L.INCOMPAT_BIGTIME
    | L.INCOMPAT_NREXT64
)
RO_COMPAT_SUPPORTED = (
    L.RO_COMPAT_FINOBT | L.RO_COMPAT_RMAPBT | L.RO_COMPAT_REFLINK | L.RO_COMPAT_INOBTCNT
)


def _names(bits: int, names: dict[int, str]) -> str:
    found = [names.get(1 << i, f"bit {i}") for i in range(32) if bits >> i & 1]
    return ", ".join(found)


def _refuse(text: str) -> UserError:
    return UserError(f"not mounted: {text}", MOUNT_FAILED)


def read(sector: bytes | bytearray, device_bytes: int) -> Any:
    """The superblock record in a device's first sectors (at least 32 KiB or the whole device).

    Raises UserError if these bytes are no XFS v5 superblock.
    """
    data = np.frombuffer(bytes(sector), np.uint8)
    if data.size < L.SB.itemsize:
        raise _refuse("the image is smaller than a superblock")
    sb = data[: L.SB.itemsize].view(L.SB)[0]
    if sb["magic"] != L.MAGIC_SB:
        raise _refuse("no XFS superblock found; is this an image made by mkfs.xfs?")
    if int(sb["versionnum"]) & 0xF != 5:
        version = int(sb["versionnum"]) & 0xF
        raise _refuse(f"XFS version {version}; only version 5 (mkfs.xfs -m crc=1) is supported")
    size = int(sb["sectsize"])
    if size not in (512, 1024, 2048, 4096, 8192, 16384, 32768) or size > data.size:
        raise _refuse(f"impossible sector size {size}; run xfs_repair")
    if not crc_ok(np.ascontiguousarray(data[:size]), 0, size, CRC_OFFSET):
        raise _refuse("the superblock's checksum is wrong; run xfs_repair")
    _check_shape(sb, device_bytes)
    return sb


def _check_shape(sb: Any, device_bytes: int) -> None:
    """Fields that everything else is computed from."""
    block_log, sect_log, inode_log = int(sb["blocklog"]), int(sb["sectlog"]), int(sb["inodelog"])
    agblocks, agcount = int(sb["agblocks"]), int(sb["agcount"])
    dblocks = int(sb["dblocks"])
    checks = (
        ("block size", 10 <= block_log <= 16 and sb["blocksize"] == 1 << block_log),
        ("sector size", 9 <= sect_log <= 15 and sb["sectsize"] == 1 << sect_log),
        ("sector and block size", sect_log <= block_log),
        ("inode size", 9 <= inode_log <= 11 and sb["inodesize"] == 1 << inode_log),
        ("inodes per block", sb["inopblock"] == 1 << (block_log - inode_log)),
        ("inodes per block log", sb["inopblog"] == block_log - inode_log),
        ("directory block size", block_log + sb["dirblklog"] <= 16),
        ("AG size", agblocks << block_log >= 16 << 20 and agblocks << block_log <= 1 << 40),
        ("AG block log", sb["agblklog"] == (agblocks - 1).bit_length()),
        ("AG count", agcount > 0 and agcount == -(-dblocks // agblocks)),
        ("inode percentage", sb["imax_pct"] <= 100),
        ("root inode", sb["rootino"] != 0),
        ("free blocks", sb["fdblocks"] <= dblocks),
        ("log size", 0 < sb["logblocks"] <= agblocks),
    )
    for what, good in checks:
        if not good:
            raise _refuse(f"the superblock's {what} is impossible; run xfs_repair")
    if dblocks << block_log > device_bytes:
        raise _refuse(
            f"the image is cut short: the superblock says {dblocks << block_log} bytes, "
            f"there are {device_bytes}"
        )


def check_features(sb: Any, *, writable: bool) -> None:
    """Refuse, by name, features that this program does not have. Raises UserError."""
    incompat = int(sb["features_incompat"])
    if incompat & L.INCOMPAT_NEEDSREPAIR:
        raise _refuse(
            "the image was not unmounted cleanly (needsrepair is set); run xfs_repair on it, "
            "then mount again"
        )
    if unknown := incompat & ~INCOMPAT_SUPPORTED:
        raise _refuse(f"unsupported incompatible feature: {_names(unknown, INCOMPAT_NAMES)}")
    unknown = int(sb["features_ro_compat"]) & ~RO_COMPAT_SUPPORTED
    if unknown and writable:
        names = _names(unknown, RO_COMPAT_NAMES)
        raise _refuse(f"unsupported feature {names}: the image can only be mounted with -o ro")
    for what, bad in (
        ("an unfinished mkfs", sb["inprogress"] != 0),
        ("an external log", sb["logstart"] == 0),
        ("a realtime device", sb["rblocks"] != 0 or sb["rextents"] != 0),
        ("directories without file types", not incompat & L.INCOMPAT_FTYPE),
        ("case-insensitive names", int(sb["versionnum"]) & L.VERSION_BORG != 0),
        ("quota (mount it with -o ro)", writable and sb["qflags"] != 0),
    ):
        if bad:
            raise _refuse(f"the image has {what}, which is not supported")


def geometry(sb: Any) -> Geometry:
    """What the superblock says, as a Geometry."""
    incompat, ro_compat = int(sb["features_incompat"]), int(sb["features_ro_compat"])
    uuid = bytes(sb["uuid"].tobytes())
    sector_log = int(sb["logsectlog"]) or int(sb["sectlog"])
    return Geometry(
        block_size=int(sb["blocksize"]),
        block_log=int(sb["blocklog"]),
        sector_size=int(sb["sectsize"]),
        dblocks=int(sb["dblocks"]),
        agcount=int(sb["agcount"]),
        ag_blocks=int(sb["agblocks"]),
        ag_block_log=int(sb["agblklog"]),
        inode_size=int(sb["inodesize"]),
        inode_log=int(sb["inodelog"]),
        inopblock=int(sb["inopblock"]),
        inopblog=int(sb["inopblog"]),
        inode_align=max(1, int(sb["inoalignmt"])),
        sparse_align=int(sb["spino_align"]),
        imax_pct=int(sb["imax_pct"]),
        dir_block_log=int(sb["blocklog"]) + int(sb["dirblklog"]),
        root_ino=int(sb["rootino"]),
        log_start=int(sb["logstart"]),
        log_blocks=int(sb["logblocks"]),
        log_sector_size=1 << sector_log,
        log_sunit=int(sb["logsunit"]) if int(sb["logsunit"]) > 1 else 0,
        stripe_unit=int(sb["unit"]),
        stripe_width=int(sb["width"]),
        uuid=bytes(sb["meta_uuid"].tobytes()) if incompat & L.INCOMPAT_META_UUID else uuid,
        log_uuid=uuid,
        label=bytes(sb["fname"]),
        has_finobt=bool(ro_compat & L.RO_COMPAT_FINOBT),
        has_sparse=bool(incompat & L.INCOMPAT_SPINODES),
        has_reflink=bool(ro_compat & L.RO_COMPAT_REFLINK),
        has_rmap=bool(ro_compat & L.RO_COMPAT_RMAPBT),
        has_bigtime=bool(incompat & L.INCOMPAT_BIGTIME),
        has_inobtcount=bool(ro_compat & L.RO_COMPAT_INOBTCNT),
        has_nrext64=bool(incompat & L.INCOMPAT_NREXT64),
        has_ftype=bool(incompat & L.INCOMPAT_FTYPE),
    )
