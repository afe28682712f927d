"""The life of a mount: lock, open, mount, serve, unmount, write back, end.

`mount` is what the command line calls; it checks what can be checked without the compiler, forks
(fs.daemon) and returns when the mount answers. `serve` is what the daemon does.

Ends: an unmount by anybody ends the session and with it the daemon; SIGINT, SIGTERM and SIGHUP
unmount first, so that the kernel writes what it caches; a second signal gives up at once and
leaves the image marked for repair. In every case the kernel's side goes first, then the volume
writes everything, and the image's lock falls with the process.

The run file says what happened. Compiled code is imported inside `serve` only.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

from alloc.page import PAGE_SIZE
from alloc.topology import span_pages
from fs import daemon, imagelock, mounts, runfile, screen, tuning
from fs.errors import UserError
from fs.front import options as grammar
from fs.front.options import MountOptions

if TYPE_CHECKING:
    from fs.device.base import Device
    from fs.device.image import ImageFile

EXIT_SYSTEM = 2
MKFS_SECONDS = 300
SCRATCH_LEAST = 300 << 20  # mkfs.xfs 6.1 makes nothing smaller


def mount(options: MountOptions) -> int:
    """Mount as asked; returns when the mount answers (background) or ends (foreground).

    Raises UserError with the exit code of mount(8).
    """
    if options.remount:
        return remount(options)
    options = check(options)
    view = screen.open_screen()
    if options.foreground:
        return serve(options, daemon.ForegroundReporter(view))
    return daemon.start(lambda reporter: serve(options, reporter), view)


def check(options: MountOptions) -> MountOptions:
    """Everything that can be refused before the compiler is loaded; paths become absolute."""
    options = replace(options, mountpoint=mounts.check_mountpoint(options.mountpoint))
    if options.log not in ("", "none", "stderr", "syslog"):
        options = replace(options, log=os.path.abspath(options.log))
    if options.lanes < 0:
        options = replace(options, lanes=tuning.lanes())
    _check_max_write(options)
    _check_nodes(options)
    options = _with_transport(options)
    _check_fuse(options)
    if options.is_scratch:
        if options.scratch_bytes < SCRATCH_LEAST:
            raise UserError("a scratch image needs at least 300M: scratch=1G", grammar.EXIT_USAGE)
        if shutil.which("mkfs.xfs", path=_program_path()) is None:
            raise UserError(
                "mkfs.xfs not found; install it with: apt-get install xfsprogs",
                mounts.MOUNT_FAILED,
            )
        return options
    image = os.path.abspath(options.image)
    imagelock.check_readable(image, writable=not options.read_only)
    source = options.source
    if not options.fsname and source == options.image:
        source = image
    return replace(options, image=image, source=source)


def _check_nodes(options: MountOptions) -> None:
    """The nodes, what they have of memory, and the policy that names them."""
    try:
        span_pages(options.memory_bytes // PAGE_SIZE, options.topology.nr_nodes)
        _ = options.mempolicy
    except ValueError as error:
        raise UserError(str(error), grammar.EXIT_USAGE) from error


def _check_max_write(options: MountOptions) -> None:
    """Each lane keeps room for a write, and one more is needed to let a request wait."""
    if options.max_write * (options.lanes + 1) > options.memory_bytes // grammar.MAX_WRITE_SHARE:
        raise UserError(
            f"max_write={options.max_write >> 10}K with lanes={options.lanes} needs more memory "
            f"than memory={options.memory_bytes >> 20}M can spare; make one of them smaller",
            grammar.EXIT_USAGE,
        )


def _with_transport(options: MountOptions) -> MountOptions:
    """FUSE over io_uring needs lanes and a kernel that has it."""
    if not options.lanes:
        if options.transport == "uring":
            raise UserError("transport=uring needs lanes; leave lanes=0 out", grammar.EXIT_USAGE)
        return replace(options, transport="device")
    options = replace(options, transport=options.transport or tuning.transport())
    if options.transport == "uring":
        if hindrance := tuning.uring_hindrance():
            raise UserError(f"transport=uring: {hindrance}", mounts.MOUNT_FAILED)
        _check_queues(options)
    return options


def _check_queues(options: MountOptions) -> None:
    """Each place of a queue keeps room for a write; there is a queue for each processor."""
    queues = tuning.possible_processors()
    places = (options.max_write or grammar.MAX_WRITE_LEAST) * queues * grammar.PLACES_LEAST
    if places > options.memory_bytes // grammar.MAX_WRITE_SHARE:
        needed = places * grammar.MAX_WRITE_SHARE
        raise UserError(
            f"transport=uring with {queues} processors needs at least memory={needed >> 20}M",
            grammar.EXIT_USAGE,
        )


def _check_fuse(options: MountOptions) -> None:
    if not os.path.exists("/dev/fuse"):
        raise UserError(
            "/dev/fuse is missing; load the module with: modprobe fuse", mounts.MOUNT_FAILED
        )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise UserError(
            "no permission to use /dev/fuse; become root, or as root: chmod 666 /dev/fuse",
            mounts.MOUNT_FAILED,
        )
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise UserError(
            "fusermount3 not found; install it with: apt-get install fuse3", mounts.MOUNT_FAILED
        )
    if options.allow_other or options.allow_root:
        from fs import doctor

        finding = doctor.check_allow_other()
        if not finding.good:
            raise UserError(
                f"allow_other needs root, or user_allow_other in {doctor.FUSE_CONF}",
                mounts.MOUNT_FAILED,
            )


def _program_path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin"


def remount(options: MountOptions) -> int:
    """`mount -o remount`: the kernel's flags change, the daemon goes on.

    Raises UserError if nothing of ours is mounted, or if a read-only daemon shall write.
    """
    mounted = mounts.find(options.mountpoint)
    if mounted is None or not mounted.is_fuse:
        raise UserError(f"{options.mountpoint} is not mounted", mounts.MOUNT_FAILED)
    record = runfile.of_mountpoint(mounted.mountpoint)
    if record and record.is_read_only and not options.read_only:
        raise UserError(
            f"{mounted.mountpoint} was mounted with ro, so its image is open for reading only; "
            f"unmount it and mount it again without ro",
            mounts.MOUNT_FAILED,
        )
    add = remove = 0
    choices = (
        (mounts.MS_RDONLY, options.read_only),
        (mounts.MS_NOSUID, None if options.suid is None else not options.suid),
        (mounts.MS_NODEV, None if options.dev is None else not options.dev),
        (mounts.MS_NOEXEC, None if options.executable is None else not options.executable),
    )
    for flag, wanted in choices:
        if wanted is not None:
            add, remove = (add | flag, remove) if wanted else (add, remove | flag)
    try:
        mounts.remount(mounted, add, remove)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise UserError(f"cannot remount {mounted.mountpoint}: {reason}", 32) from error
    return 0


# -- the daemon ----------------------------------------------------------------------------------


def serve(options: MountOptions, reporter: daemon.Starting) -> int:
    """Everything the daemon does, from taking the lock to the last write; returns its status."""
    from fs import logs

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    log, where = logs.open_log(
        options.log, options.mountpoint, foreground=options.foreground, debug=options.debug
    )
    lock = None if options.is_scratch else _take_lock(options, reporter)
    key = lock.key if lock else f"scratch-{os.getpid()}"
    record = runfile.Record(
        pid=os.getpid(),
        start_ticks=runfile.start_ticks(os.getpid()),
        image=options.image,
        image_key=key,
        mountpoint=options.mountpoint,
        state=runfile.STARTING,
        is_read_only=options.read_only,
        options=grammar.describe(options),
        policy=options.policy,
        log=where,
    )
    keeper = runfile.Keeper(record, log)
    try:
        status = _run(options, reporter, keeper, log)
    except UserError as error:
        log.error("%s", error)
        keeper.drop()
        raise
    except BaseException as error:
        log.critical("the daemon ends: %r", error, exc_info=True)
        keeper.end(daemon.EXIT_BUG, repr(error))
        raise
    finally:
        if lock:
            lock.release()
    return status


def _take_lock(options: MountOptions, reporter: screen.Reporter) -> imagelock.ImageLock:
    imagelock.refuse_kernel_mount(options.image)
    lock = imagelock.ImageLock(options.image, shared=options.read_only)
    lock.acquire(options.lock_timeout, reporter.note)
    return lock


def _run(
    options: MountOptions,
    reporter: daemon.Starting,
    keeper: runfile.Keeper,
    log: logging.Logger,
) -> int:
    """Load the kernels, then serve until unmounted. Returns the daemon's exit status."""
    from alloc import lockdep
    from fs import warmup

    if options.lockdep or tuning.lockdep():
        lockdep.start()
    tuning.bound_heap()
    tuning.declare_io_flusher(log)
    warmup.warm(reporter)
    device = open_device(options)
    keeper.set(image_fd=device.fileno())
    import trio

    from fs.session import Session

    served: Device = device
    try:
        served = experiments(device, options)
        session = Session(options, served, reporter, keeper, log)
        trio.run(session.run, strict_exception_groups=True)
    except BaseExceptionGroup as group:
        user_error = _user_error(group)
        if user_error is None:
            raise
        raise user_error from group
    finally:
        served.close()
    keeper.end(session.status, session.message)
    log.info("ended with status %d %s", session.status, session.message)
    return session.status


def experiments(device: ImageFile, options: MountOptions) -> Device:
    """The device in what options put around it. Raises UserError if the record cannot be made."""
    from fs.device import stack

    try:
        return stack.build(device, options.device, options.faults, options.record)
    except OSError as error:
        raise UserError(f"record={options.record}: {error.strerror}", EXIT_SYSTEM) from error


def _user_error(group: BaseExceptionGroup[BaseException]) -> UserError | None:
    """The UserError that nurseries wrapped, if that is all there is."""
    leaves: list[BaseException] = [group]
    while any(isinstance(leaf, BaseExceptionGroup) for leaf in leaves):
        leaves = [
            inner
            for leaf in leaves
            for inner in (leaf.exceptions if isinstance(leaf, BaseExceptionGroup) else (leaf,))
        ]
    found = [leaf for leaf in leaves if isinstance(leaf, UserError)]
    return found[0] if len(found) == len(leaves) else None


def open_device(options: MountOptions) -> ImageFile:
    """The device that holds the image; a scratch image is made and formatted here.

    Raises UserError if transfers were to be direct and cannot.
    """
    from fs.device.image import ImageFile, Memory

    if not options.is_scratch:
        image = ImageFile(options.image, read_only=options.read_only, direct=options.direct)
        if options.direct == "on" and not image.is_direct:
            image.close()
            raise UserError(
                f"direct=on: what holds {options.image} has no direct I/O", mounts.MOUNT_FAILED
            )
        return image
    device = Memory(options.scratch_bytes, options.mount_source)
    try:
        format_image(device.path, options.mkfs)
    except BaseException:
        device.close()
        raise
    return device


def format_image(path: str, words: str = "") -> None:
    """Run mkfs.xfs on an image. Raises UserError with what it said."""
    tool = shutil.which("mkfs.xfs", path=_program_path()) or "mkfs.xfs"
    done = subprocess.run(
        [tool, "-q", "-f", *words.split(), path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=MKFS_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        said = done.stdout.decode(errors="replace").strip().split("\n")
        raise UserError(f"mkfs.xfs {words} failed: {said[0]}", mounts.MOUNT_FAILED)
