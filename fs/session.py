"""One mounted volume while it is served: readiness, signals, dumps, the orderly end.

Runs on trio, in the daemon. The tasks of a session outlive the FUSE loop, because a signal must
also be heard while the volume writes back. The order of the end is always the same: the kernel's
side first, so that no request comes any more; then the lookup counts that the kernel never gave
back; then the volume.

A wait at the end is never silent: every half minute the log says what is still to be written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import traceback
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

import pyfuse3
import trio

from alloc import lockdep, policy
from alloc.pressure import serves_requests
from fs import daemon, fsfreeze, mounts, runfile, stacks, stat, tuning, warmup
from fs.device.base import Device
from fs.errors import UserError
from fs.front import options as grammar
from fs.front import statistics
from fs.front.interpose import fuse_descriptors
from fs.front.lanes import Lanes
from fs.front.negotiate import Outcome
from fs.front.operations import Operations
from fs.front.options import MountOptions
from fs.notify import notify, watchdog_seconds
from fs.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_SYSTEM = 2
ANSWER_SECONDS = 60.0  # a statfs that takes longer means that the mount does not work
UNMOUNT_SECONDS = 30.0  # for the kernel to write what it caches before it is cut off
DRAIN_SECONDS = 60.0  # for requests that run when the mount ends; then they are cancelled
REPORT_SECONDS = 30.0
PAGE_SIZE = 4096
IDLE_TASKS = 16  # request tasks kept, so that a burst starts none


class _Utf8(str):
    """A mount option for pyfuse3, which encodes options as ASCII; paths are any bytes."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))


class Session:
    """Serves one volume. `status` and `message` tell afterwards how it went."""

    def __init__(
        self,
        options: MountOptions,
        device: Device,
        reporter: daemon.Starting,
        keeper: runfile.Keeper,
        log: logging.Logger,
    ) -> None:
        self.options = options
        self.status = 0
        self.message = ""
        self._device = device
        self._reporter = reporter
        self._keeper = keeper
        self._log = log
        self._vol: Volume | None = None
        self._ops: Operations | None = None
        self._lanes: Lanes | None = None
        self._mounted = ""  # device number of our mount, once it answers
        self._stopping = trio.Event()
        self._served = trio.Event()
        self._serving = trio.CancelScope()
        self._nursery: trio.Nursery

    async def run(self) -> None:
        """Open, mount, serve, unmount, close. Raises UserError if the mount does not come up."""
        token = trio.lowlevel.current_trio_token()

        def tell(threads: list[str]) -> None:
            for line in threads:
                self._log.warning("%s", line)
            token.run_sync_soon(self._dump)

        with stacks.heard(tell):
            await self._run()

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._hear_signals)
            nursery.start_soon(self._report_end)
            nursery.start_soon(self._show_life)
            await trio.lowlevel.checkpoint()
            options = self.options
            async with Volume.open(
                self._device,
                options.memory_bytes,
                options.topology,
                read_only=options.read_only,
                norecovery=options.norecovery,
                log=self._log,
                paranoid=options.paranoid,
                logbsize=options.logbsize,
            ) as self._vol:
                self._vol.flusher.lazytime = options.lazytime
                await self._serve(self._vol)
            self._tell_failures(self._vol)
            if self._vol.shut_down:
                self.status = EXIT_SYSTEM
                self.message = f"shut down: {self._vol.shutdown_reason}"
                if not self._vol.read_only:
                    self.message += "; the next mount recovers the log"
            elif self._lanes is not None and self._lanes.failure:
                self.status, self.message = EXIT_SYSTEM, self._lanes.failure
            nursery.cancel_scope.cancel()

    # -- serving --------------------------------------------------------------------------------

    async def _serve(self, vol: Volume) -> None:
        ops = self._ops = Operations(vol, self.options)
        await ops.start()
        ops.statistics = self._statistics
        if self.options.lanes:
            self._lanes = Lanes(vol, ops, self.options, self._log)
            if self.options.max_write:
                tuning.allow_pages(self.options.max_write // PAGE_SIZE + 1, self._log)
            await self._lanes.start()
        # From the first request on: a mount that comes up by chance would be no use.
        vol.arena.set_policy(policy.parse(self.options.policy))
        vol.arena.set_mempolicy(self.options.mempolicy)
        vol.arena.stall_seconds = vol.arena.rcu.stall_seconds = self.options.stall
        try:
            with self._fuse(ops) as session_fd:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ops.gate.watch)
                    nursery.start_soon(self._announce)
                    with self._serving:
                        await self._loop(session_fd)
                    nursery.cancel_scope.cancel()
        finally:
            self._served.set()
            ops.stop()
            if self._lanes is not None:
                self._lanes.stop()

    async def _loop(self, session_fd: int) -> None:
        """Handle requests until the mount ends or somebody drains it."""
        token = serves_requests.set(True)  # in every task that is started from here
        async with trio.open_nursery() as nursery:
            if self._lanes is not None:
                nursery.start_soon(self._lanes.serve, session_fd, self._agreed)
            await pyfuse3.main(min_tasks=IDLE_TASKS, max_tasks=tuning.max_tasks())
            nursery.cancel_scope.cancel()
        serves_requests.reset(token)

    def _statistics(self) -> bytes:
        """What `nofailfs stat` shows."""
        assert self._ops is not None
        return statistics.encode(statistics.gather(self._ops.gate, self._lanes))

    def _tell_failures(self, vol: Volume) -> None:
        """At the end: after a shutdown nobody can ask for statistics any more."""
        told = stat.failures_text(self.options.policy, vol.failures.figures())
        for line in told.splitlines():
            self._log.info("%s", line.strip())

    def _agreed(self, outcome: Outcome) -> None:
        """What the kernel and we agreed upon, for `nofailfs info`."""
        outcome = replace(outcome, max_pages=min(outcome.max_pages, tuning.pages_limit()))
        assert self._lanes is not None
        self._keeper.set(negotiated=asdict(outcome) | {"latency": self._lanes.latency.state})
        self._log.debug("negotiated: %s", outcome)

    @contextlib.contextmanager
    def _fuse(self, ops: Operations) -> Iterator[int]:
        """The kernel's side of the mount; yields the descriptor of /dev/fuse."""
        words = [_Utf8(word) for word in grammar.fuse_words(self.options)]
        before = fuse_descriptors()
        try:
            pyfuse3.init(ops, self.options.mountpoint, set(words))
        except RuntimeError as error:
            raise UserError(
                f"the kernel refused the mount on {self.options.mountpoint} ({error}); "
                "what libfuse said is above, and `nofailfs doctor` looks for what is missing",
                mounts.MOUNT_FAILED,
            ) from error
        (session_fd,) = fuse_descriptors() - before
        try:
            yield session_fd
        finally:
            self._stopping.set()
            self._keeper.set(state=runfile.STOPPING)
            notify("STOPPING=1")
            pyfuse3.close(unmount=True)

    async def _announce(self) -> None:
        """Find out that the mount answers, and tell whoever waits for it."""
        mountpoint = self.options.mountpoint
        with trio.move_on_after(ANSWER_SECONDS) as waiting:
            await trio.to_thread.run_sync(os.statvfs, mountpoint, abandon_on_cancel=True)
        if waiting.cancelled_caught:
            raise UserError(
                f"the mount does not answer within {ANSWER_SECONDS:g} s", mounts.MOUNT_FAILED
            )
        mounted = mounts.find(mountpoint)
        self._mounted = mounted.device if mounted else ""
        tuning.apply(
            mountpoint,
            self._log,
            max_background=self.options.max_background,
            read_ahead_kb=self.options.read_ahead_kb,
        )
        self._keeper.set(state=runfile.MOUNTED)
        self._log.info(
            "%s mounted on %s (%s)",
            self.options.mount_source,
            mountpoint,
            grammar.describe(self.options),
        )
        notify("READY=1", f"STATUS=mounted on {mountpoint}", f"MAINPID={os.getpid()}")
        self._reporter.ready()
        load = partial(warmup.load, lanes=self._lanes is not None)
        await trio.to_thread.run_sync(load, abandon_on_cancel=True)

    async def _show_life(self) -> None:
        """systemd's watchdog, if it watches: the loop turns."""
        seconds = watchdog_seconds()
        while seconds:
            notify("WATCHDOG=1")
            await trio.sleep(seconds)

    # -- the end --------------------------------------------------------------------------------

    async def _hear_signals(self) -> None:
        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, fsfreeze.THAW)
        heard = 0
        with trio.open_signal_receiver(*wanted) as signals:
            async for number in signals:
                if number == fsfreeze.THAW:
                    self._thaw()
                    continue
                heard += 1
                name = signal.Signals(number).name
                if heard > 1:
                    self._abort(name)
                self._log.info("%s: unmounting; a second signal gives up at once", name)
                self._nursery.start_soon(self._unmount)

    def _thaw(self) -> None:
        if self._vol is not None:
            self._vol.freezer.thaw()

    def _abort(self, name: str) -> None:
        """Give up: the image stays as a crash would leave it."""
        text = f"second signal ({name}): given up; the next mount recovers the log"
        self._log.critical("%s", text)
        self._keeper.end(daemon.EXIT_INTERRUPTED, text)
        with contextlib.suppress(OSError):
            if self._is_ours():
                mounts.unmount(self.options.mountpoint, cut_off=True)
        logging.shutdown()
        os._exit(daemon.EXIT_INTERRUPTED)

    def _is_ours(self) -> bool:
        mounted = mounts.find(self.options.mountpoint)
        return mounted is not None and bool(self._mounted) and mounted.device == self._mounted

    async def _unmount(self) -> None:
        """Unmount, in order if nobody uses the mount; otherwise its users are cut off."""
        self._stopping.set()
        self._thaw()
        mountpoint = self.options.mountpoint
        if self._is_ours():
            with trio.move_on_after(UNMOUNT_SECONDS) as waiting:
                try:
                    await trio.to_thread.run_sync(
                        mounts.unmount, mountpoint, abandon_on_cancel=True
                    )
                except OSError as error:
                    self._log.warning(
                        "%s cannot be unmounted in order (%s): files open there are cut off",
                        mountpoint,
                        error.strerror,
                    )
                    await self._sync_kernel()
            if waiting.cancelled_caught:
                self._log.warning("the kernel did not finish in %g s", UNMOUNT_SECONDS)
        if self._ops is None:
            self._nursery.cancel_scope.cancel()
        else:
            await self._drain(self._ops)

    async def _sync_kernel(self) -> None:
        """Have the kernel send what it has cached, by a process of its own.

        A thread of ours that waits for ourselves could not be killed, and neither could we.
        """
        command = ["sync", "-f", self.options.mountpoint]
        process = await trio.lowlevel.open_process(command, stderr=subprocess.DEVNULL)
        try:
            await process.wait()
        finally:
            process.kill()

    async def _drain(self, ops: Operations) -> None:
        """End the FUSE loop; cancel requests that do not come to an end."""
        if self._lanes is not None:
            self._lanes.leave()
        elif not self._served.is_set():
            pyfuse3.terminate()
        with trio.move_on_after(DRAIN_SECONDS):
            await self._served.wait()
        if not self._served.is_set():
            for line in ops.gate.waiters():
                self._log.warning("given up: %s", line)
            self._serving.cancel()

    async def _report_end(self) -> None:
        """While the end takes long, say what it waits for."""
        await self._stopping.wait()
        while True:
            await trio.sleep(REPORT_SECONDS)
            figures = self._vol.info() if self._vol else {}
            shown = ", ".join(f"{name}={value}" for name, value in figures.items())
            self._log.warning("still writing back: %s", shown)
            self._dump()

    # -- looking inside -------------------------------------------------------------------------

    def _dump(self) -> None:
        """Write requests, who waits for memory, tasks and figures to the log."""
        lines = self._ops.gate.waiters() if self._ops else []
        self._log.warning("%d requests run", len(lines))
        for line in lines:
            self._log.warning("%s", line)
        lines = self._vol.arena.waiters() if self._vol else []
        self._log.warning("%d tasks wait for memory", len(lines))
        for line in lines:
            self._log.warning("%s", line)
        root = trio.lowlevel.current_root_task()
        if root is not None:
            for line in task_tree(root):
                self._log.warning("%s", line)
        if self._vol is not None:
            self._log.warning("%s", self._vol.info())


def task_tree(task: trio.lowlevel.Task, depth: int = 0) -> list[str]:
    """The tasks below one, each with the innermost frames it waits in."""
    frames = traceback.StackSummary.extract(task.iter_await_frames(), lookup_lines=False)
    where = " <- ".join(
        f"{frame.name} ({os.path.basename(frame.filename)}:{frame.lineno})"
        for frame in list(frames)[::-1][:5]
    )
    held = ", ".join(lockdep.held_by(task))
    lines = [f"{'  ' * depth}task {task.name}{held and f' (holds {held})'}: {where}"]
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            lines += task_tree(child, depth + 1)
    return lines
