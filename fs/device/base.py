"""What the filesystem asks of a device.

Offsets and lengths are bytes and multiples of the sector size. `write` returns when the device
has the bytes; they are stable only after `flush`. Reads and writes go straight between the
device and the views given, which are arena memory, so no call here allocates for its payload.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Views = Sequence[memoryview]


class Device(Protocol):
    """A device of `size` bytes."""

    name: str
    size: int
    read_only: bool

    async def read(self, offset: int, views: Views) -> None:
        """Fill the views in order. Raises OSError(EIO) on a short read or a device error."""

    async def read_all(self, requests: Sequence[tuple[int, Views]]) -> None:
        """Several reads in one go: (offset, views) of each. Raises as `read` does."""

    async def write(self, offset: int, views: Views) -> None:
        """Write the views in order. Raises OSError on a device error."""

    async def discard(self, offset: int, length: int) -> None:
        """What is there is no longer needed; it reads as anything until it is written.

        Raises OSError(EOPNOTSUPP) if the device cannot give the place back.
        """

    async def flush(self) -> None:
        """Make everything written before stable."""

    def close(self) -> None:
        """Release the device. Idempotent."""
