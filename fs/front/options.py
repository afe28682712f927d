"""The grammar of `-o`: which options a mount takes, and what each one means.

One table per kind: flags, options with a value, options that other programs act upon and that we
therefore ignore. Whatever is in no table is refused by name, as XFS refuses it; an option that
was silently dropped is a setting that somebody believes in.

The same words serve `nofailfs mount -o`, the long options of the command line, fstab, and the
call of mount(8) and mount.fuse3. Later words win over earlier ones, as in mount(8). A comma
inside a value is written `\\,`, as libfuse reads it.

Pure functions over strings; nothing here touches the system. This module and everything it
imports stay free of numba: the parent of the daemon, `umount`, `info` and `doctor` use it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from alloc import mempolicy, policy, topology
from alloc.topology import Topology
from fs.device import direct, faulty, model
from fs.errors import UserError

EXIT_USAGE = 1
MEMORY_DEFAULT = 256 << 20
MEMORY_MIN = 8 << 20
CACHE_MODES = ("none", "writethrough", "writeback")
TRANSPORTS = ("device", "uring")
LATENCY_MODES = ("auto", "on", "off")
ATIME_POLICIES = ("relatime", "strictatime", "noatime")
LANES_MOST = 16
LOGBSIZES = tuple(1 << order for order in range(15, 19))  # XFS's for logs of version 2, from 32k
NAME_MAX = 255
STALL_LEAST_S = 0.1
MAX_WRITE_SHARE = 4  # of memory, at most, is lanes' room for writes
PLACES_LEAST = 2  # requests of each queue, with transport=uring
MAX_WRITE_LEAST, MAX_WRITE_MOST = 128 << 10, 4 << 20
SUFFIXES = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}


@dataclass(frozen=True)
class MountOptions:
    """Everything a mount was asked for; sizes in bytes, times in seconds.

    `source` is what the caller named first, `image` the file or device that holds the
    filesystem. They differ when the source is only a label.
    """

    source: str = ""
    mountpoint: str = ""
    image: str = ""
    scratch_bytes: int = 0
    mkfs: str = ""
    direct: str = "auto"  # which transfers pass the page cache below by, of fs.device.direct.MODES
    device: str = ""  # a model of a slower device, as fs.device.model.parse reads it; empty: none
    faults: str = ""  # which requests to it fail, as fs.device.faulty.parse reads it
    record: str = ""  # a file for a log of writes
    memory_bytes: int = MEMORY_DEFAULT
    policy: str = "irix"  # the allocator's rule, as alloc.policy.parse reads it
    numa: str = "1"  # nodes that memory is divided into
    distance: str = ""  # of each from each, as alloc.topology.parse reads it; empty: 10 and 20
    mpol: str = ""  # the memory policy, as alloc.mempolicy.parse reads it; empty: none
    stall: float = 2.0  # seconds that a wait for memory lasts when it is reported
    read_only: bool = False
    norecovery: bool = False  # of a dirty log; only with read_only
    remount: bool = False
    atime: str = "relatime"
    diratime: bool = True
    lazytime: bool = False  # stamps that changed alone are not written for long
    cache: str = "none"
    fsname: str = ""
    subtype: str = "nofailfs"
    suid: bool | None = None
    dev: bool | None = None
    executable: bool | None = None
    symfollow: bool | None = None
    sync: bool = False
    dirsync: bool = False
    allow_other: bool = False
    allow_root: bool = False
    auto_unmount: bool = False
    acl: bool = True
    foreground: bool = False
    debug: bool = False
    log: str = ""
    lock_timeout: float = 60.0
    paranoid: bool = False
    logbsize: int = 0  # bytes of the log's buffers; 0: not said
    lockdep: bool = False  # False: not said
    lanes: int = -1  # -1: by the number of cores; 0: pyfuse3 alone
    transport: str = ""  # how requests come to lanes; empty: not said
    max_write: int = 0  # 0: as much as memory allows
    latency: str = "auto"
    max_background: int = 64
    read_ahead_kb: int = 1024
    procdir: str = ".nofail"  # name of the directory of reports at the root; empty: none

    @property
    def topology(self) -> Topology:
        """The nodes. Raises ValueError for words that make none."""
        return topology.parse(self.numa, self.distance)

    @property
    def mempolicy(self) -> int:
        """The memory policy's number. Raises ValueError for words that make none."""
        return mempolicy.parse(self.mpol, self.topology.nr_nodes) if self.mpol else mempolicy.NONE

    @property
    def is_scratch(self) -> bool:
        """Whether the image lives in memory and is formatted at mount."""
        return self.scratch_bytes > 0

    @property
    def mount_source(self) -> str:
        """What /proc/mounts shows as the source: exactly the label, else the image."""
        return self.fsname or self.source or self.image

    @property
    def fuse_type(self) -> str:
        """The type in /proc/mounts; an empty subtype makes it plain `fuse`."""
        return f"fuse.{self.subtype}" if self.subtype else "fuse"


def parse_size(text: str) -> int:
    """Bytes of a size as xfsprogs writes it: a number and one of k m g t (binary), `iB` allowed."""
    word = text.strip().lower()
    number = word.rstrip("abcdefghijklmnopqrstuvwxyz")
    suffix = word[len(number) :]
    if len(suffix) > 1 and suffix[0] in "kmgt":
        suffix = suffix[0] + suffix[1:].removesuffix("ib" if len(suffix) == 3 else "b")
    if not number.isascii() or not number.isdigit() or suffix not in SUFFIXES:
        raise UserError(f"'{text}' is not a size; write it as 64M, 4G or 1048576", EXIT_USAGE)
    return int(number) << SUFFIXES[suffix]


def _memory(text: str) -> int:
    size = parse_size(text)
    if size < MEMORY_MIN:
        raise UserError(f"memory={text} is too small; the least is 8M", EXIT_USAGE)
    return size


def _policy(text: str) -> str:
    try:
        return str(policy.parse(text))
    except ValueError as error:
        raise UserError(str(error), EXIT_USAGE) from error


def _parsed_by(parse: Callable[[str], object]) -> Callable[[str], str]:
    """Values that somebody else will parse, looked at now."""

    def look(text: str) -> str:
        try:
            parse(text)
        except ValueError as error:
            raise UserError(str(error), EXIT_USAGE) from error
        return text

    return look


def _cache(text: str) -> str:
    if text not in CACHE_MODES:
        raise UserError(
            f"cache={text} is unknown; choose one of {', '.join(CACHE_MODES)}", EXIT_USAGE
        )
    return text


def _direct(text: str) -> str:
    if text not in direct.MODES:
        raise UserError(
            f"direct={text} is unknown; choose one of {', '.join(direct.MODES)}", EXIT_USAGE
        )
    return text


def _transport(text: str) -> str:
    if text not in TRANSPORTS:
        raise UserError(
            f"transport={text} is unknown; choose one of {', '.join(TRANSPORTS)}", EXIT_USAGE
        )
    return text


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise UserError(f"'{text}' is not a positive number", EXIT_USAGE)
    return int(text)


def _lanes(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > LANES_MOST:
        raise UserError(f"lanes={text} is not a number from 0 to {LANES_MOST}", EXIT_USAGE)
    return int(text)


def _latency(text: str) -> str:
    if text not in LATENCY_MODES:
        raise UserError(
            f"latency={text} is unknown; choose one of {', '.join(LATENCY_MODES)}", EXIT_USAGE
        )
    return text


def _max_write(text: str) -> int:
    size = parse_size(text)
    if not MAX_WRITE_LEAST <= size <= MAX_WRITE_MOST or size & (size - 1):
        raise UserError(
            f"max_write={text} is not a power of two from 128K to {MAX_WRITE_MOST >> 20}M",
            EXIT_USAGE,
        )
    return size


def _logbsize(text: str) -> int:
    size = parse_size(text)
    if size not in LOGBSIZES:
        known = ", ".join(f"{size >> 10}k" for size in LOGBSIZES)
        raise UserError(f"logbsize={text} is none of {known}", EXIT_USAGE)
    return size


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise UserError(f"'{text}' is not a number of seconds", EXIT_USAGE)
    return seconds


def _stall(text: str) -> float:
    seconds = _seconds(text)
    if seconds < STALL_LEAST_S:
        raise UserError(f"stall={text}: at least {STALL_LEAST_S:g} seconds", EXIT_USAGE)
    return seconds


def _procdir(text: str) -> str:
    if text == "off":
        return ""
    if not 0 < len(os.fsencode(text)) <= NAME_MAX or "/" in text or text in (".", ".."):
        raise UserError(f"procdir={text} is not a name for a directory, or off", EXIT_USAGE)
    return text


def _flag(text: str) -> bool:
    if text not in ("0", "1", "no", "yes"):
        raise UserError(f"'{text}' is not yes or no", EXIT_USAGE)
    return text in ("1", "yes")


# Flags: the word, and the fields it sets.
FLAGS: dict[str, dict[str, Any]] = {
    "ro": {"read_only": True},
    "rw": {"read_only": False},
    "norecovery": {"norecovery": True},
    "remount": {"remount": True},
    "relatime": {"atime": "relatime"},
    "norelatime": {"atime": "strictatime"},
    "strictatime": {"atime": "strictatime"},
    "atime": {"atime": "relatime"},
    "nostrictatime": {"atime": "relatime"},
    "noatime": {"atime": "noatime"},
    "diratime": {"diratime": True},
    "nodiratime": {"diratime": False},
    "lazytime": {"lazytime": True},
    "nolazytime": {"lazytime": False},
    "suid": {"suid": True},
    "nosuid": {"suid": False},
    "dev": {"dev": True},
    "nodev": {"dev": False},
    "exec": {"executable": True},
    "noexec": {"executable": False},
    "symfollow": {"symfollow": True},
    "nosymfollow": {"symfollow": False},
    "sync": {"sync": True},
    "async": {"sync": False},
    "dirsync": {"dirsync": True},
    "allow_other": {"allow_other": True},
    "allow_root": {"allow_root": True},
    "auto_unmount": {"auto_unmount": True},
    "acl": {"acl": True},
    "noacl": {"acl": False},
    "direct_io": {"cache": "none"},
    "foreground": {"foreground": True},
    "debug": {"debug": True, "foreground": True},
    "paranoid": {"paranoid": True},
    "lockdep": {"lockdep": True},
}

# Options with a value: the word, the field, and how the value is read.
VALUES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "image": ("image", str),
    "scratch": ("scratch_bytes", parse_size),
    "mkfs": ("mkfs", str),
    "direct": ("direct", _direct),
    "device": ("device", _parsed_by(model.parse)),
    "faults": ("faults", _parsed_by(faulty.parse)),
    "record": ("record", os.path.abspath),
    "memory": ("memory_bytes", _memory),
    "policy": ("policy", _policy),
    "numa": ("numa", str),
    "distance": ("distance", str),
    "mpol": ("mpol", str),
    "stall": ("stall", _stall),
    "cache": ("cache", _cache),
    "fsname": ("fsname", str),
    "subtype": ("subtype", str),
    "log": ("log", str),
    "logbsize": ("logbsize", _logbsize),
    "lanes": ("lanes", _lanes),
    "transport": ("transport", _transport),
    "max_write": ("max_write", _max_write),
    "latency": ("latency", _latency),
    "lock_timeout": ("lock_timeout", _seconds),
    "max_background": ("max_background", _count),
    "read_ahead_kb": ("read_ahead_kb", _count),
    "procdir": ("procdir", _procdir),
    "foreground": ("foreground", _flag),
    "debug": ("debug", _flag),
}

# Meant for mount(8), fstab, systemd or the kernel's XFS, or what we do anyway.
IGNORED = frozenset(
    (
        *("defaults", "_netdev", "nofail", "auto", "noauto", "user", "nouser", "users"),
        *("owner", "group", "silent", "loud", "nonempty", "default_permissions"),
        *("iversion", "noiversion", "nomand"),
        *("inode64", "attr2", "noquota", "largeio", "nolargeio"),
    )
)
IGNORED_VALUES = frozenset(("user", "uhelper", "helper", "comment", "logbufs"))
IGNORED_PREFIXES = ("x-", "X-")
# What the mount table shows of a FUSE mount; mount(8) hands all of it back at a remount.
SHOWN_VALUES = frozenset(("user_id", "group_id", "rootmode", "fd", "max_read", "blksize"))

# Known to libfuse or XFS users, impossible here: the reason is a better answer than "unknown".
REFUSED = {
    "max_read": "pyfuse3 cannot negotiate it",
    "kernel_cache": "say cache=writethrough or cache=writeback",
    "auto_cache": "say cache=writethrough or cache=writeback",
    "setuid": "start the mount as that user",
    "drop_privileges": "start the mount as an ordinary user",
    "logdev": "an external log is not supported",
    "rtdev": "a realtime device is not supported",
}


def split_words(text: str) -> list[str]:
    """The words of one `-o` argument; a backslash keeps the next character as it is."""
    words, word, escaped = [], "", False
    for char in text:
        if escaped:
            word, escaped = word + char, False
        elif char == "\\":
            escaped = True
        elif char == ",":
            words.append(word)
            word = ""
        else:
            word += char
    words.append(word + ("\\" if escaped else ""))
    return [w for w in words if w]


def escape(value: str) -> str:
    """`value` as it must stand in a list that libfuse splits at commas."""
    return value.replace("\\", "\\\\").replace(",", "\\,")


def _ignored(name: str, has_value: bool) -> bool:
    if name.startswith(IGNORED_PREFIXES):
        return True
    return name in (IGNORED_VALUES if has_value else IGNORED)


def _apply(options: MountOptions, word: str) -> MountOptions:
    name, equals, value = word.partition("=")
    if name in REFUSED:
        raise UserError(f"option '{name}' is not supported: {REFUSED[name]}", EXIT_USAGE)
    if equals and name in VALUES:
        field, read = VALUES[name]
        changes = {field: read(value)}
        if name == "debug" and changes[field]:
            changes["foreground"] = True
        return replace(options, **changes)
    if not equals and name in FLAGS:
        return replace(options, **FLAGS[name])
    if _ignored(name, bool(equals)):
        return options
    if name in VALUES:
        raise UserError(f"option '{name}' needs a value: {name}=...", EXIT_USAGE)
    if name in FLAGS:
        raise UserError(f"option '{name}' takes no value", EXIT_USAGE)
    raise UserError(
        f"unknown option '{name}'; `nofailfs mount --help` lists the known ones", EXIT_USAGE
    )


def parse(arguments: Iterable[str], base: MountOptions | None = None) -> MountOptions:
    """The mount that a list of `-o` arguments describes.

    Raises UserError naming the option that is unknown, malformed or contradictory.
    """
    options = base or MountOptions()
    words = [word for argument in arguments for word in split_words(argument)]
    if "remount" in words:
        words = [word for word in words if word.partition("=")[0] not in SHOWN_VALUES]
    for word in words:
        options = _apply(options, word)
    if options.allow_other and options.allow_root:
        raise UserError("allow_other and allow_root exclude each other; keep one", EXIT_USAGE)
    return options


def resolve(options: MountOptions, source: str, mountpoint: str) -> MountOptions:
    """Fill in source, image and mount point, once both are known.

    Raises UserError when there is nothing to mount, or two things.
    """
    if not mountpoint:
        raise UserError("no mount point given; say `nofailfs mount IMAGE DIR`", EXIT_USAGE)
    options = replace(options, source=source, mountpoint=mountpoint)
    if options.remount:
        return options
    if options.norecovery and not options.read_only:
        raise UserError("norecovery needs ro: who writes must recover the log first", EXIT_USAGE)
    if options.is_scratch:
        if options.image:
            raise UserError("scratch= and image= exclude each other; keep one", EXIT_USAGE)
        if options.read_only:
            raise UserError("a scratch image that nobody can write is useless: drop ro", EXIT_USAGE)
        if options.direct == "on":
            raise UserError("direct=on: a scratch image has no device below", EXIT_USAGE)
        return replace(options, source=source or "scratch")
    image = options.image or source
    if not image:
        raise UserError("no image given; say `nofailfs mount IMAGE DIR`", EXIT_USAGE)
    return replace(options, image=image)


def fuse_words(options: MountOptions) -> list[str]:
    """The options that libfuse and the kernel get. Values are escaped for libfuse's splitter."""
    words = ["default_permissions", f"fsname={escape(options.mount_source)}"]
    if options.subtype:
        words.append(f"subtype={escape(options.subtype)}")
    chosen: Mapping[str, bool | None] = {
        "suid": options.suid,
        "dev": options.dev,
        "exec": options.executable,
    }
    words += [word if on else f"no{word}" for word, on in chosen.items() if on is not None]
    words.append("ro" if options.read_only else "rw")
    for word in ("sync", "dirsync", "allow_other", "allow_root", "auto_unmount"):
        if getattr(options, word):
            words.append(word)
    if options.atime == "noatime":
        words.append("noatime")
    return words


def describe(options: MountOptions) -> str:
    """One line for logs and reports; always names the cache mode."""
    default = MountOptions()
    words = [f"memory={options.memory_bytes >> 20}M", f"cache={options.cache}", options.atime]
    words.insert(0, "ro" if options.read_only else "rw")
    shown = {"read_only", "memory_bytes", "cache", "atime", "source", "mountpoint", "image"}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in shown and value != getattr(default, field.name):
            words.append(f"{field.name}={value}")
    return ",".join(words)
