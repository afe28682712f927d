"""What a filesystem's kernels do to the dirty counts, for tests without a filesystem.

Each function is one step of pages' way: dirty, on their way to the device, written; or thrown away.
"""

from __future__ import annotations

from writeback.dirty import NR_DIRTIED, NR_DIRTY, NR_WRITEBACK, NR_WRITTEN, Dirty


def dirtied(dirty: Dirty, pages: int) -> None:
    """Pages became dirty."""
    dirty.counts[NR_DIRTY] += pages
    dirty.counts[NR_DIRTIED] += pages
    dirty.dirtied()


def start_writeback(dirty: Dirty, pages: int) -> None:
    """Dirty pages are on their way to the device."""
    dirty.counts[NR_DIRTY] -= pages
    dirty.counts[NR_WRITEBACK] += pages


def end_writeback(dirty: Dirty, pages: int) -> None:
    """They are written, or have failed."""
    dirty.counts[NR_WRITEBACK] -= pages
    dirty.counts[NR_WRITTEN] += pages


def throw_away(dirty: Dirty, pages: int) -> None:
    """A truncation dropped dirty pages."""
    dirty.counts[NR_DIRTY] -= pages
