"""Every on-disk structure of XFS v5, once.

Each structure is a packed big-endian NumPy dtype, one line a field. CRC fields are the exception:
they are little-endian. Sizes are asserted at import. `off(DTYPE, field)` gives a field's byte
offset, which is how kernels get their constants: a number is never written twice.

Words: BB is a 512-byte basic block; daddr counts BBs from the start of the device; agbno is a
block inside an allocation group; fsbno is agno and agbno packed; agino likewise. NULL is all
ones in the field's width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Dtype = np.dtype[Any]

NULL32 = 0xFFFFFFFF
NULL64 = 0xFFFFFFFFFFFFFFFF
BB_SIZE = 512
BB_LOG = 9

MAGIC_SB = 0x58465342  # XFSB
MAGIC_AGF = 0x58414746  # XAGF
MAGIC_AGI = 0x58414749  # XAGI
MAGIC_AGFL = 0x5841464C  # XAFL
MAGIC_BNOBT = 0x41423342  # AB3B
MAGIC_CNTBT = 0x41423343  # AB3C
MAGIC_INOBT = 0x49414233  # IAB3
MAGIC_FINOBT = 0x46494233  # FIB3
MAGIC_RMAPBT = 0x524D4233  # RMB3
MAGIC_REFCOUNTBT = 0x52334643  # R3FC
MAGIC_BMBT = 0x424D4133  # BMA3
MAGIC_DINODE = 0x494E  # IN
MAGIC_DIR_BLOCK = 0x58444233  # XDB3: one data block with its leaf inside
MAGIC_DIR_DATA = 0x58444433  # XDD3
MAGIC_DIR_FREE = 0x58444633  # XDF3
MAGIC_DIR_LEAF1 = 0x3DF1
MAGIC_DIR_LEAFN = 0x3DFF
MAGIC_DA_NODE = 0x3EBE
MAGIC_ATTR_LEAF = 0x3BEE
MAGIC_ATTR_REMOTE = 0x5841524D  # XARM
MAGIC_SYMLINK = 0x58534C4D  # XSLM

# Superblock version and feature bits.
VERSION_ATTR = 0x0010
VERSION_NLINK = 0x0020
VERSION_ALIGN = 0x0080
VERSION_DALIGN = 0x0100
VERSION_LOGV2 = 0x0400
VERSION_SECTOR = 0x0800
VERSION_EXTFLG = 0x1000
VERSION_DIRV2 = 0x2000
VERSION_BORG = 0x4000  # ASCII case-insensitive directories
VERSION_MOREBITS = 0x8000
VERSION2_LAZYSB = 0x2
VERSION2_ATTR2 = 0x8
VERSION2_PROJID32 = 0x80
VERSION2_CRC = 0x100
VERSION2_FTYPE = 0x200
RO_COMPAT_FINOBT = 0x1
RO_COMPAT_RMAPBT = 0x2
RO_COMPAT_REFLINK = 0x4
RO_COMPAT_INOBTCNT = 0x8
INCOMPAT_FTYPE = 0x1
INCOMPAT_SPINODES = 0x2
INCOMPAT_META_UUID = 0x4
INCOMPAT_BIGTIME = 0x8
INCOMPAT_NEEDSREPAIR = 0x10
INCOMPAT_NREXT64 = 0x20
INCOMPAT_EXCHRANGE = 0x40
INCOMPAT_PARENT = 0x80

# Inode formats and flags.
FMT_DEV, FMT_LOCAL, FMT_EXTENTS, FMT_BTREE = 0, 1, 2, 3
DIFLAG_REALTIME = 0x0001
DIFLAG_PREALLOC = 0x0002
DIFLAG_NEWRTBM = 0x0004
DIFLAG_IMMUTABLE = 0x0008
DIFLAG_APPEND = 0x0010
DIFLAG_SYNC = 0x0020
DIFLAG_NOATIME = 0x0040
DIFLAG_NODUMP = 0x0080
DIFLAG_RTINHERIT = 0x0100
DIFLAG_PROJINHERIT = 0x0200
DIFLAG_NOSYMLINKS = 0x0400
DIFLAG_EXTSIZE = 0x0800
DIFLAG_EXTSZINHERIT = 0x1000
DIFLAG_NODEFRAG = 0x2000
DIFLAG_FILESTREAM = 0x4000
DIFLAG2_DAX = 0x1
DIFLAG2_REFLINK = 0x2
DIFLAG2_COWEXTSIZE = 0x4
DIFLAG2_BIGTIME = 0x8
DIFLAG2_NREXT64 = 0x10

# File types stored behind directory names.
FT_UNKNOWN, FT_REG, FT_DIR, FT_CHR, FT_BLK, FT_FIFO, FT_SOCK, FT_SYMLINK, FT_WHT = range(9)

BMBT_LEN_MAX = (1 << 21) - 1  # blocks in one extent record
FILE_OFFSET_MAX = 1 << 54  # file blocks
BIGTIME_EPOCH_SECONDS = 1 << 31  # bigtime counts nanoseconds from 2^31 seconds before 1970


def record(*fields: tuple[Any, ...]) -> Dtype:
    """A packed structure."""
    return np.dtype(list(fields))


def off(dtype: Dtype, field: str) -> int:
    """Byte offset of a field."""
    assert dtype.fields is not None
    return int(dtype.fields[field][1])


SB = record(
    ("magic", ">u4"),  # MAGIC_SB
    ("blocksize", ">u4"),  # bytes, a power of two from 1 KiB to 64 KiB
    ("dblocks", ">u8"),  # data device size in blocks
    ("rblocks", ">u8"),  # realtime device: refused unless 0
    ("rextents", ">u8"),
    ("uuid", "V16"),  # of the filesystem; log records carry it
    ("logstart", ">u8"),  # fsbno of the internal log; 0 means external: refused
    ("rootino", ">u8"),
    ("rbmino", ">u8"),
    ("rsumino", ">u8"),
    ("rextsize", ">u4"),
    ("agblocks", ">u4"),  # blocks of every AG but the last
    ("agcount", ">u4"),
    ("rbmblocks", ">u4"),
    ("logblocks", ">u4"),
    ("versionnum", ">u2"),  # low nibble 5, VERSION_ bits above
    ("sectsize", ">u2"),  # bytes; each AG header fills one sector
    ("inodesize", ">u2"),
    ("inopblock", ">u2"),  # inodes a block
    ("fname", "S12"),  # label
    ("blocklog", "u1"),
    ("sectlog", "u1"),
    ("inodelog", "u1"),
    ("inopblog", "u1"),
    ("agblklog", "u1"),  # ceil(log2(agblocks)): fsbno = agno << agblklog | agbno
    ("rextslog", "u1"),
    ("inprogress", "u1"),  # mkfs not finished: refused unless 0
    ("imax_pct", "u1"),  # most of the space that inodes may take, percent
    ("icount", ">u8"),  # allocated inodes; exact only after a clean unmount
    ("ifree", ">u8"),  # free ones among them; likewise
    ("fdblocks", ">u8"),  # free blocks with AGFL and free-space tree blocks; likewise
    ("frextents", ">u8"),
    ("uquotino", ">u8"),
    ("gquotino", ">u8"),
    ("qflags", ">u2"),  # quota: a writable mount is refused unless 0
    ("flags", "u1"),
    ("shared_vn", "u1"),
    ("inoalignmt", ">u4"),  # inode chunk alignment in blocks
    ("unit", ">u4"),  # stripe unit, blocks
    ("width", ">u4"),  # stripe width, blocks
    ("dirblklog", "u1"),  # directory block = block << dirblklog
    ("logsectlog", "u1"),
    ("logsectsize", ">u2"),
    ("logsunit", ">u4"),  # log stripe unit in bytes; 1 means none
    ("features2", ">u4"),  # VERSION2_ bits
    ("bad_features2", ">u4"),  # equals features2
    ("features_compat", ">u4"),
    ("features_ro_compat", ">u4"),
    ("features_incompat", ">u4"),
    ("features_log_incompat", ">u4"),
    ("crc", "<u4"),
    ("spino_align", ">u4"),  # sparse inode chunk alignment in blocks
    ("pquotino", ">u8"),
    ("lsn", ">u8"),
    ("meta_uuid", "V16"),  # what metadata carries when INCOMPAT_META_UUID is set
)
assert SB.itemsize == 264

AGF = record(
    ("magic", ">u4"),
    ("version", ">u4"),  # 1
    ("seqno", ">u4"),  # agno
    ("length", ">u4"),  # blocks of this AG
    ("bno_root", ">u4"),
    ("cnt_root", ">u4"),
    ("rmap_root", ">u4"),
    ("bno_level", ">u4"),  # counts of levels: a root leaf is 1
    ("cnt_level", ">u4"),
    ("rmap_level", ">u4"),
    ("flfirst", ">u4"),  # AGFL ring: first active slot
    ("fllast", ">u4"),
    ("flcount", ">u4"),
    ("freeblks", ">u4"),  # free blocks in the free-space trees' records
    ("longest", ">u4"),  # longest free extent
    ("btreeblks", ">u4"),  # blocks of bno, cnt and rmap trees beyond their roots
    ("uuid", "V16"),
    ("rmap_blocks", ">u4"),  # blocks of the rmap tree, root included
    ("refcount_blocks", ">u4"),
    ("refcount_root", ">u4"),
    ("refcount_level", ">u4"),
    ("spare", "V112"),
    ("lsn", ">u8"),
    ("crc", "<u4"),
    ("pad", ">u4"),
)
assert AGF.itemsize == 224

AGI = record(
    ("magic", ">u4"),
    ("version", ">u4"),  # 1
    ("seqno", ">u4"),
    ("length", ">u4"),
    ("count", ">u4"),  # inodes physically present
    ("root", ">u4"),  # inobt
    ("level", ">u4"),
    ("freecount", ">u4"),
    ("newino", ">u4"),  # agino of the newest chunk, or NULL
    ("dirino", ">u4"),  # always NULL
    ("unlinked", ">u4", (64,)),  # heads of the unlinked lists: agino % 64, or NULL
    ("uuid", "V16"),
    ("crc", "<u4"),
    ("pad", ">u4"),
    ("lsn", ">u8"),
    ("free_root", ">u4"),  # finobt
    ("free_level", ">u4"),
    ("iblocks", ">u4"),  # blocks of the inobt, root included (INOBTCNT)
    ("fblocks", ">u4"),
)
assert AGI.itemsize == 344

AGFL = record(  # followed by big-endian u32 slots to the end of the sector
    ("magic", ">u4"),
    ("seqno", ">u4"),
    ("uuid", "V16"),
    ("lsn", ">u8"),
    ("crc", "<u4"),
)
assert AGFL.itemsize == 36

SHORT_BLOCK = record(  # B+tree block of a tree inside an AG
    ("magic", ">u4"),
    ("level", ">u2"),  # 0 in leaves
    ("numrecs", ">u2"),
    ("leftsib", ">u4"),  # agbno or NULL
    ("rightsib", ">u4"),
    ("blkno", ">u8"),  # daddr of this block
    ("lsn", ">u8"),
    ("uuid", "V16"),
    ("owner", ">u4"),  # agno
    ("crc", "<u4"),
)
assert SHORT_BLOCK.itemsize == 56

LONG_BLOCK = record(  # B+tree block of an inode's fork
    ("magic", ">u4"),
    ("level", ">u2"),
    ("numrecs", ">u2"),
    ("leftsib", ">u8"),  # fsbno or NULL
    ("rightsib", ">u8"),
    ("blkno", ">u8"),
    ("lsn", ">u8"),
    ("uuid", "V16"),
    ("owner", ">u8"),  # ino
    ("crc", "<u4"),
    ("pad", ">u4"),
)
assert LONG_BLOCK.itemsize == 72

BMBT_ROOT = record(("level", ">u2"), ("numrecs", ">u2"))  # in the fork; keys, then pointers
assert BMBT_ROOT.itemsize == 4

ALLOC_REC = record(("start", ">u4"), ("len", ">u4"))  # free extent: record and key of bno, cnt
INOBT_REC = record(
    ("startino", ">u4"),  # agino, a multiple of 64
    ("holemask", ">u2"),  # sparse: bit b means inodes 4b..4b+3 do not exist
    ("count", "u1"),  # inodes that exist
    ("freecount", "u1"),
    ("free", ">u8"),  # bit i: inode i is free (holes count as free here only)
)
INOBT_REC_FULL = record(  # the same bytes when the filesystem has no sparse inodes
    ("startino", ">u4"), ("freecount", ">u4"), ("free", ">u8")
)
REFCOUNT_REC = record(("start", ">u4"), ("len", ">u4"), ("refcount", ">u4"))
RMAP_REC = record(("start", ">u4"), ("len", ">u4"), ("owner", ">u8"), ("offset", ">u8"))
RMAP_KEY = record(("start", ">u4"), ("owner", ">u8"), ("offset", ">u8"))
BMBT_REC = record(("l0", ">u8"), ("l1", ">u8"))  # flag:1 offset:54 fsbno:52 len:21, from the top
assert INOBT_REC.itemsize == INOBT_REC_FULL.itemsize == 16
assert RMAP_REC.itemsize == 24
assert RMAP_KEY.itemsize == 20
assert BMBT_REC.itemsize == 16

DINODE = record(  # the inode core; the literal area with both forks follows
    ("magic", ">u2"),
    ("mode", ">u2"),
    ("version", "u1"),  # 3
    ("format", "u1"),  # FMT_ of the data fork
    ("onlink", ">u2"),  # 0
    ("uid", ">u4"),
    ("gid", ">u4"),
    ("nlink", ">u4"),
    ("projid_lo", ">u2"),
    ("projid_hi", ">u2"),
    ("big_nextents", ">u8"),  # data extents with NREXT64, else 0
    ("atime", ">u8"),  # bigtime, or s32 seconds and s32 nanoseconds
    ("mtime", ">u8"),
    ("ctime", ">u8"),
    ("size", ">u8"),  # bytes
    ("nblocks", ">u8"),  # blocks of both forks with their bmbt blocks
    ("extsize", ">u4"),
    ("nextents", ">u4"),  # data extents, or with NREXT64 attr extents
    ("anextents", ">u2"),  # attr extents, or with NREXT64 0
    ("forkoff", "u1"),  # attr fork at 176 + 8 * forkoff; 0 means none
    ("aformat", "i1"),
    ("dmevmask", ">u4"),
    ("dmstate", ">u2"),
    ("flags", ">u2"),  # DIFLAG_
    ("gen", ">u4"),
    ("next_unlinked", ">u4"),  # agino or NULL; NULL in every inode that is not on a list
    ("crc", "<u4"),
    ("changecount", ">u8"),
    ("lsn", ">u8"),
    ("flags2", ">u8"),  # DIFLAG2_
    ("cowextsize", ">u4"),
    ("pad2", "V12"),
    ("crtime", ">u8"),
    ("ino", ">u8"),
    ("uuid", "V16"),
)
assert DINODE.itemsize == 176
LITERAL = DINODE.itemsize  # where the data fork begins

DA_HEADER = record(  # common header of directory leaves, da nodes and attribute leaves
    ("forw", ">u4"),  # file block of the next sibling, 0 means none
    ("back", ">u4"),
    ("magic", ">u2"),
    ("pad", ">u2"),
    ("crc", "<u4"),
    ("blkno", ">u8"),
    ("lsn", ">u8"),
    ("uuid", "V16"),
    ("owner", ">u8"),
)
assert DA_HEADER.itemsize == 56
_DA = [(n, DA_HEADER.fields[n][0]) for n in DA_HEADER.names or ()] if DA_HEADER.fields else []
DIR_LEAF_HEADER = record(*_DA, ("count", ">u2"), ("stale", ">u2"), ("pad2", ">u4"))
DA_NODE_HEADER = record(*_DA, ("count", ">u2"), ("level", ">u2"), ("pad2", ">u4"))
ATTR_LEAF_HEADER = record(
    *_DA,
    ("count", ">u2"),
    ("usedbytes", ">u2"),  # sum of the rounded name/value sizes
    ("firstused", ">u2"),  # lowest nameidx; 0 stands for 65536
    ("holes", "u1"),
    ("pad1", "u1"),
    ("freemap", [("base", ">u2"), ("size", ">u2")], (3,)),
    ("pad2", ">u4"),
)
assert DIR_LEAF_HEADER.itemsize == DA_NODE_HEADER.itemsize == 64
assert ATTR_LEAF_HEADER.itemsize == 80
DIR_LEAF_ENTRY = record(("hash", ">u4"), ("addr", ">u4"))  # addr in 8 bytes; 0 means stale
DIR_LEAF_TAIL = record(("bestcount", ">u4"))
DIR_BLOCK_TAIL = record(("count", ">u4"), ("stale", ">u4"))
DA_NODE_ENTRY = record(("hash", ">u4"), ("before", ">u4"))  # child's largest hash, file block
ATTR_LEAF_ENTRY = record(("hash", ">u4"), ("nameidx", ">u2"), ("flags", "u1"), ("pad", "u1"))

DIR_DATA_HEADER = record(
    ("magic", ">u4"),
    ("crc", "<u4"),
    ("blkno", ">u8"),
    ("lsn", ">u8"),
    ("uuid", "V16"),
    ("owner", ">u8"),
    ("bestfree", [("offset", ">u2"), ("length", ">u2")], (3,)),  # the largest unused regions
    ("pad", ">u4"),
)
assert DIR_DATA_HEADER.itemsize == 64
DIR_FREE_HEADER = record(  # followed by big-endian u16 bests
    ("magic", ">u4"),
    ("crc", "<u4"),
    ("blkno", ">u8"),
    ("lsn", ">u8"),
    ("uuid", "V16"),
    ("owner", ">u8"),
    ("firstdb", ">u4"),  # first directory data block that this block describes
    ("nvalid", ">u4"),
    ("nused", ">u4"),
    ("pad", ">u4"),
)
assert DIR_FREE_HEADER.itemsize == 64

_REMOTE = (
    ("magic", ">u4"),
    ("offset", ">u4"),  # of this piece in the value
    ("bytes", ">u4"),  # of the value in this piece
    ("crc", "<u4"),
    ("uuid", "V16"),
    ("owner", ">u8"),
    ("blkno", ">u8"),
    ("lsn", ">u8"),  # all ones in attribute values, which are not logged
)
REMOTE_ATTR_HEADER = record(*_REMOTE)  # one a block
SYMLINK_HEADER = record(*_REMOTE)  # one an extent
assert REMOTE_ATTR_HEADER.itemsize == 56

LOG_RECORD_HEADER = record(
    ("magic", ">u4"),  # 0xFEEDBABE
    ("cycle", ">u4"),
    ("version", ">u4"),
    ("len", ">u4"),  # data bytes behind the header
    ("lsn", ">u8"),
    ("tail_lsn", ">u8"),
    ("crc", "<u4"),
    ("prev_block", ">u4"),
    ("num_logops", ">u4"),
    ("cycle_data", ">u4", (64,)),
    ("fmt", ">u4"),
    ("uuid", "V16"),
    ("size", ">u4"),  # iclog size
    ("pad", ">u4"),
)
assert LOG_RECORD_HEADER.itemsize == 328
MAGIC_LOG_RECORD = 0xFEEDBABE
LOG_OP_UNMOUNT = 0x20
