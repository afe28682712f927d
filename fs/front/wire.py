"""The FUSE messages as bytes: opcodes, offsets and flags (linux/fuse.h, protocol 7.x).

A request is a 40-byte header and the opcode's arguments; a reply is a 16-byte header and a body.
Offsets below are bytes from the start of the message, header included, in host byte order; the
lane reads them from memory and the slow side with struct. Data only.
"""

from __future__ import annotations

IN_HEADER = 40
OUT_HEADER = 16
# request header
H_LEN, H_OPCODE, H_UNIQUE, H_NODEID, H_UID = 0, 4, 8, 16, 24
BODY = IN_HEADER
# READ and WRITE arguments (40 bytes each); a WRITE's payload follows
RW_FH, RW_OFFSET, RW_SIZE, RW_FLAGS = BODY, BODY + 8, BODY + 16, BODY + 20
RW_ARGS_END = BODY + 40
WRITE_KILL_SUIDGID = 1 << 2  # FUSE_WRITE_KILL_SUIDGID

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK = 1, 2, 3, 4, 5, 6
MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE = 8, 9, 10, 11, 12, 13, 14, 15, 16
STATFS, RELEASE, FSYNC, SETXATTR, GETXATTR, LISTXATTR = 17, 18, 20, 21, 22, 23
REMOVEXATTR, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR = 24, 25, 26, 27, 28, 29, 30
GETLK, SETLK, SETLKW, ACCESS, CREATE, INTERRUPT, BMAP, DESTROY = 31, 32, 33, 34, 35, 36, 37, 38
IOCTL, POLL, NOTIFY_REPLY, BATCH_FORGET, FALLOCATE, READDIRPLUS = 39, 40, 41, 42, 43, 44
RENAME2, LSEEK, COPY_FILE_RANGE = 45, 46, 47
SYNCFS, TMPFILE, STATX, COPY_FILE_RANGE_64 = 50, 51, 52, 53
OPCODES = 64  # room in tables by opcode

NAMES = {
    LOOKUP: "lookup",
    FORGET: "forget",
    GETATTR: "getattr",
    SETATTR: "setattr",
    READLINK: "readlink",
    SYMLINK: "symlink",
    MKNOD: "mknod",
    MKDIR: "mkdir",
    UNLINK: "unlink",
    RMDIR: "rmdir",
    RENAME: "rename",
    LINK: "link",
    OPEN: "open",
    READ: "read",
    WRITE: "write",
    STATFS: "statfs",
    RELEASE: "release",
    FSYNC: "fsync",
    SETXATTR: "setxattr",
    GETXATTR: "getxattr",
    LISTXATTR: "listxattr",
    REMOVEXATTR: "removexattr",
    FLUSH: "flush",
    INIT: "init",
    OPENDIR: "opendir",
    READDIR: "readdir",
    RELEASEDIR: "releasedir",
    FSYNCDIR: "fsyncdir",
    GETLK: "getlk",
    SETLK: "setlk",
    SETLKW: "setlkw",
    ACCESS: "access",
    CREATE: "create",
    INTERRUPT: "interrupt",
    BMAP: "bmap",
    DESTROY: "destroy",
    IOCTL: "ioctl",
    POLL: "poll",
    NOTIFY_REPLY: "notify_reply",
    BATCH_FORGET: "batch_forget",
    FALLOCATE: "fallocate",
    READDIRPLUS: "readdirplus",
    RENAME2: "rename2",
    LSEEK: "lseek",
    COPY_FILE_RANGE: "copy_file_range",
    SYNCFS: "syncfs",
    TMPFILE: "tmpfile",
    STATX: "statx",
    COPY_FILE_RANGE_64: "copy_file_range",
}
