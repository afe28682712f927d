"""What a modelled device can do: so many bytes and requests a second, after so long.

Requests are served in the order of their calls, by one head: each takes `bytes / bw`, and at least
`1 / iops`. Then it is done `lat` later, more or less by a random part of `jitter`. That time
overlaps with others, so a deep queue hides it. A moment that the head was idle is made up for,
as a device's own cache would: without that, whoever sleeps a little too long would measure the
machine's timers.

Bytes, microseconds; 0 is no limit. The same seed gives the same jitter. Arithmetic only: the
wrapper in `modeled.py` waits.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from fs.device.settings import number, settings

BURST_S = 0.005  # of idle time that is made up for
SIZE = re.compile(r"(\d+)([kmgt]?)(?:i?b)?", re.ASCII)
TIME = re.compile(r"(\d+)(us|ms|s)", re.ASCII)
SHIFTS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
MICROSECONDS = {"us": 1, "ms": 1000, "s": 1_000_000}
HELP = "bw=SIZE,iops=N,lat=TIME,jitter=TIME,seed=N (a time has one of us ms s)"


@dataclass
class Model:
    """A device's figures, and when its head is free; all but that may change at any time."""

    bw: int = 0
    iops: int = 0
    lat_us: int = 0
    jitter_us: int = 0
    seed: int = 0
    _free_at: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def finish(self, now: float, nbytes: int) -> float:
        """When a request that comes now is done, in the clock's seconds."""
        takes = max(nbytes / self.bw if self.bw else 0.0, 1 / self.iops if self.iops else 0.0)
        self._free_at = max(self._free_at, now - BURST_S) + takes
        wait = self.lat_us + self.jitter_us * (2 * self._random.random() - 1)
        return max(self._free_at, now) + max(wait, 0.0) / 1e6


def parse(text: str) -> Model:
    """The model that an option describes. Raises ValueError for what is none."""
    figures = settings(text, READERS, "device", HELP)
    names = {"lat": "lat_us", "jitter": "jitter_us"}
    return Model(**{names.get(name, name): value for name, value in figures.items()})


def _size(text: str) -> int:
    found = SIZE.fullmatch(text.lower())
    if found is None:
        raise ValueError(f"'{text}' is not a size")
    return int(found[1]) << SHIFTS[found[2]]


def _time(text: str) -> int:
    found = TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"'{text}' is not a time; write it as 500us, 2ms or 1s")
    return int(found[1]) * MICROSECONDS[found[2]]


READERS = {"bw": _size, "iops": number, "lat": _time, "jitter": _time, "seed": number}
