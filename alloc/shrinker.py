"""Shrinkers: how a cache gives memory back, and how much of it is asked for.

A cache registers one. Counting and scanning are synchronous, never wait and never allocate; they
take locks only by trying. A shrinker that would enter the filesystem returns 0 or SHRINK_STOP under
NOFS.

A cache that keeps its objects by node registers one shrinker for each node, a `Share`; a pass over
a node asks those of that node and those that know no nodes. What is deferred is deferred by node.

The share is the kernel's formula. At priority p a cache of `freeable` objects is asked for
delta = (freeable >> p) * 4 / seeks (half of it when seeks is 0), in batches; what is too little
for a batch is deferred to the next pass. Priority starts at 12 and 0 scans everything twice,
which gives objects with a second chance their second look.
"""

from __future__ import annotations

from typing import Protocol

DEFAULT_SEEKS = 2
SHRINK_BATCH = 128
SHRINK_STOP = -1
PRIORITY_FIRST = 12
NO_TARGET = 1 << 62
NO_NODE = -1  # the node of a cache that knows none


class Shrinker(Protocol):
    """What a cache offers to reclaim."""

    name: str

    def count_objects(self) -> int:
        """Objects that a scan might free now; 0 for none."""

    def scan_objects(self, nr: int, gfp: int) -> int:
        """Look at up to `nr` objects, free what can be freed at once; objects freed.

        SHRINK_STOP ends this pass; what it left is deferred (the usual answer under NOFS).
        """


class NodeCache(Protocol):
    """A cache whose objects are kept by node."""

    name: str

    def count_objects(self, nid: int) -> int:
        """See `Shrinker`; of one node."""

    def scan_objects(self, nr: int, gfp: int, nid: int) -> int:
        """See `Shrinker`; on one node."""


class Share:
    """The objects of a cache that lie on one node, as a shrinker."""

    def __init__(self, cache: NodeCache, nid: int) -> None:
        self.name = cache.name
        self._cache = cache
        self._nid = nid

    def count_objects(self) -> int:
        return self._cache.count_objects(self._nid)

    def scan_objects(self, nr: int, gfp: int) -> int:
        return self._cache.scan_objects(nr, gfp, self._nid)


class ShrinkerState:
    """A registered shrinker and what earlier passes still owe it."""

    __slots__ = ("batch", "deferred", "nid", "seeks", "shrinker")

    def __init__(
        self,
        shrinker: Shrinker,
        seeks: int = DEFAULT_SEEKS,
        batch: int = SHRINK_BATCH,
        nid: int = NO_NODE,
    ) -> None:
        assert seeks >= 0
        assert batch > 0
        self.shrinker = shrinker
        self.seeks = seeks
        self.batch = batch
        self.nid = nid
        self.deferred = 0

    def shrink(self, priority: int, gfp: int, target: int = NO_TARGET) -> tuple[int, int]:
        """One pass; (objects scanned, objects freed). scanned <= 2 * freeable.

        Ends early when `target` objects have been freed; the rest is deferred.
        """
        assert 0 <= priority <= PRIORITY_FIRST
        freeable = self.shrinker.count_objects()
        assert freeable >= 0, f"{self.shrinker.name} counts {freeable} objects"
        if freeable == 0:
            return 0, 0
        owed = self.deferred
        delta = (freeable >> priority) * 4 // self.seeks if self.seeks else freeable // 2
        total = min((owed >> priority) + delta, 2 * freeable)
        scanned = freed = 0
        while total > 0 and (total >= self.batch or total >= freeable):
            nr = min(self.batch, total)
            got = self.shrinker.scan_objects(nr, gfp)
            if got == SHRINK_STOP:
                break
            assert got >= 0
            freed += got
            total -= nr
            scanned += nr
            if freed >= target:
                break
        self.deferred = min(max(owed + delta - scanned, 0), 2 * freeable)
        assert scanned <= 2 * freeable
        return scanned, freed
