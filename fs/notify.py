"""systemd's readiness protocol: datagrams to the socket that $NOTIFY_SOCKET names.

Best effort: without the variable nothing happens, and a socket that does not answer is no error,
because a mount must not depend on who started it. (Format: sd_notify(3).)
"""

from __future__ import annotations

import contextlib
import os
import socket


def watchdog_seconds() -> float:
    """How often systemd wants a sign of life, halved to be safe; 0 if it wants none."""
    wanted = os.environ.get("WATCHDOG_USEC", "")
    return int(wanted) / 2e6 if wanted.isdigit() else 0.0


def notify(*lines: str) -> bool:
    """Send state lines such as READY=1; True if somebody took them."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address[0] == "@":  # an abstract socket
        address = "\0" + address[1:]
    with contextlib.suppress(OSError):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)
            channel.sendto("\n".join(lines).encode(), address)
            return True
    return False
