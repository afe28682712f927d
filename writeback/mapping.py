"""What writeback knows about the things it cleans: a handle, a state record, a few calls.

A mapping is the cached content of one object (of an inode, says the filesystem, but that is not
known here). Its dirty pages are counted and listed here and written by its owner, who implements
`Mappings`. The state (`STATE`) lies in the owner's record of the object, in the arena; a zeroed
state is that of a clean mapping. Counts and flags may be changed by the owner's writers in other
threads, under a lock of the owner's, so the flusher only reads them and asks the owner to change
them; all other fields are the flusher's and change between awaits, on the trio thread. `credit` is
the throttle's, and who writes to the object counts it down, one at a time.

A mapping that has dirty pages, pages under write-back or something else to write (`INODE_DIRTY`)
is on a list of the flusher's (`lists.py`), and LISTED. Writers in other threads dirty only what is
LISTED already, so nothing becomes dirty that the flusher does not know of. Lists hold no reference:
the owner keeps the record until the mapping is clean, or takes it off when its content is thrown
away.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

STATE = np.dtype(
    [
        ("next", "<u4"),  # in its list, handles; 0 = end
        ("prev", "<u4"),
        ("dirtied_when", "<u8"),  # ns of trio's clock, when it joined b_dirty
        ("writeback_index", "<u8"),  # the page where the last pass over it stopped
        ("ndirty", "<u4"),  # pages, whole folios counted
        ("nrwriteback", "<u4"),  # pages on their way to the device
        ("error", "<u4"),  # of failed writes: a word of writeback/errseq.py, or 0
        ("flags", "<u4"),  # LISTED, INODE_DIRTY
        ("synced", "<u4"),  # number of the last sync that has looked at it
        ("credit", "<i4"),  # pages until its writers are looked at (writeback/throttle.py)
        ("queue", "<u4"),  # which list it is on (writeback/lists.py)
        ("stamped_when", "<u4"),  # s of that clock, when stamps began to wait; 0: they do not
    ]
)
assert STATE.itemsize == 56

LISTED = 1  # on a list of the flusher's
INODE_DIRTY = 2  # the object itself (time stamps) has to be written too
LISTED_TIME = 4  # on a list, for nothing but stamps: whoever writes pages lists it first


class Mappings(Protocol):
    """The owner of all mappings, as the flusher sees it."""

    def state(self, handle: int) -> Any:
        """The STATE record of a mapping: a structured view, whose list fields may be written."""

    def enlist(self, handle: int) -> bool:
        """Set LISTED, clear LISTED_TIME; whether LISTED was not set before."""

    def unlist(self, handle: int) -> bool:
        """Clear both if nothing is dirty, in one step; whether one was cleared."""

    def defer(self, handle: int) -> bool:
        """Have LISTED_TIME instead of LISTED if no page is dirty, in one step; whether it has."""

    def hold(self, handle: int) -> None:
        """Keep the object while the flusher works on it."""

    def drop(self, handle: int) -> None:
        """The reverse of hold."""

    async def write_range(
        self, handle: int, start: int, end: int, *, integrity: bool, budget: int
    ) -> int:
        """Write dirty folios with pages in [start, end] (page indices); pages submitted.

        With `integrity` everything that was dirty at the call is on the device (or has failed and
        set the error) when it returns, including pages that were already under write-back.
        Without it folios under write-back are passed over, and it stops after about `budget`
        pages; it begins where the last such call stopped (`writeback_index`), and never goes
        back to the start in one call: it locks folios in ascending order.
        """

    async def write_object(self, handle: int) -> None:
        """Write what INODE_DIRTY stands for and clear the flag."""
