"""Our place between the kernel and pyfuse3.

After pyfuse3 has mounted, its session descriptor is /dev/fuse. We keep a duplicate and put one end
of a SOCK_SEQPACKET pair in its place: from then on pyfuse3 talks to us. The first message is INIT;
it is passed on and its reply is changed (fs/front/negotiate.py) before any lane reads. At the end
the descriptor is put back, so that pyfuse3 sees the real one when it unmounts, and nothing of ours
keeps the connection open: an unmount that has to ask us something then fails instead of waiting.

The duplicate is the only descriptor that requests are read from and replies are written to.
"""

from __future__ import annotations

import os
import select
import socket
import stat

import trio

from fs.front import negotiate
from fs.front.negotiate import Outcome, Wish

FUSE_DEVICE = os.makedev(10, 229)
MESSAGE_MOST = 1 << 17
SOCKET_BYTES = 4 << 20
SO_SNDBUFFORCE = 32


def fuse_descriptors() -> set[int]:
    """The descriptors of this process that are /dev/fuse."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:
            continue  # the listing's own descriptor
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == FUSE_DEVICE:
            found.add(int(name))
    return found


def message_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends for whole messages, with room for every reply that can wait between them."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        try:
            end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SOCKET_BYTES)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    return ends


class Interposer:
    """The descriptors of one mount, from pyfuse3.init to pyfuse3.close."""

    def __init__(self, session_fd: int) -> None:
        self._session_fd = session_fd
        self.fuse = os.dup(session_fd)
        os.set_blocking(self.fuse, True)
        self.ours, theirs = message_pair()
        os.dup2(theirs.fileno(), session_fd, inheritable=False)
        theirs.close()

    async def negotiate(self, wish: Wish) -> Outcome | None:
        """Pass INIT on and answer it; None if the mount was gone before.

        pyfuse3's loop must run. A reply that we do not understand goes to the kernel as it is.
        """
        await trio.lowlevel.wait_readable(self.fuse)
        try:
            request = os.read(self.fuse, MESSAGE_MOST)
        except OSError:
            return None
        self.ours.send(negotiate.for_pyfuse3(request))
        await trio.lowlevel.wait_readable(self.ours)
        reply, outcome = self.ours.recv(MESSAGE_MOST), None
        if negotiate.is_good(reply):
            reply, outcome = negotiate.for_kernel(request, reply, wish)
        try:
            os.write(self.fuse, reply)
        except OSError:
            return None
        return outcome

    async def wait_forwarded(self) -> None:
        """Wait until pyfuse3 has taken everything that was sent to it."""
        while _readable(self._session_fd):
            await trio.sleep(0.001)

    def hang_up(self) -> None:
        """No more is sent to pyfuse3 or comes from it: whoever waits for that goes on."""
        try:
            self.ours.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed already

    def close(self) -> None:
        """Give pyfuse3 its descriptor back; the threads have ended."""
        os.dup2(self.fuse, self._session_fd, inheritable=False)
        os.close(self.fuse)
        self.ours.close()


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(event & select.POLLIN for _, event in poll.poll(0))
