"""Images whose power fails: what was not flushed is on the device in part, sector by sector."""

from __future__ import annotations

import errno
import os
import random

from fs.device.base import Views
from fs.device.image import ImageFile

SECTOR = 512


class Volatile(ImageFile):
    """Takes so many writes, once told to, and then none; `lose` is what a power failure does."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.left = -1  # writes; -1 is no limit
        self._before: list[tuple[int, bytes]] = []  # what unflushed writes have replaced

    async def write(self, offset: int, views: Views) -> None:
        if self.left == 0:
            raise OSError(errno.EIO, "the power is off")
        self.left -= self.left > 0
        self._before.append((offset, os.pread(self.fileno(), sum(map(len, views)), offset)))
        await super().write(offset, views)

    async def flush(self) -> None:
        if self.left == 0:
            raise OSError(errno.EIO, "the power is off")
        await super().flush()
        self._before.clear()

    def lose(self, rng: random.Random) -> None:
        """Some sectors of some unflushed writes were never written; the power is back."""
        for offset, old in reversed(self._before):
            share = rng.choice((0.0, 0.0, 0.01, 0.5, 1.0))
            for at in range(0, len(old), SECTOR):
                if rng.random() < share:
                    os.pwrite(self.fileno(), old[at : at + SECTOR], offset + at)
        self._before.clear()
        self.left = -1
