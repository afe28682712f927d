"""Windows: which pages of a file are read beside those that somebody asked for. Linux's rules.

A window has a marker, a page with the READAHEAD flag on its folio. Whoever reads that has the next
window read while he goes on (`hit`): the size grows, and folio orders by two. A page that is not
cached (`miss`) begins a first window at the start of the file or behind the last miss; behind
cached pages, more of them than are asked for, it goes on as far as those reach back: that is how
streams are told apart which share a file, for there is one window in a mapping. What follows
nothing is read as it was asked for and leaves the window alone.

Four rules are ours. The kernel in front of us has several requests under way, which overtake each
other: a miss a little behind the last window continues it, one inside it reads its rest. Misses at
one distance (backwards, or every n-th record) have the next places read ahead, two at first, then
twice as many each time. "The last miss" is where Linux has the last read, which a lane answers
without telling anybody; of its page only 32 bits are kept. A window that was evicted before anybody
read it (its pages left shadows) is read again at half its size (`shrink`).

Numbers are pages. Trio thread only; decisions await nothing, and are right for one moment: what
comes of them looks at everything again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

WINDOW_PAGES = 1024  # 4 MiB: a few FUSE requests of the largest size
WINDOW_SHARE = 32  # and at most 1/32 of memory
WINDOW_LEAST = 4
PAGE_HALF, PAGE_MASK = 1 << 31, (1 << 32) - 1
TAKEN = 1 << 7  # in ra_order: folios for the window, from its start on, have been in the cache
STEP_MOST = (1 << 15) - 1  # ra_step has no more bits: 128 MiB; Linux finds no strides at all
RUN_MOST = 8


class Window(NamedTuple):
    """Pages [start, start + pages) in folios of `order` at most, that over page `mark` marked."""

    start: int
    pages: int
    order: int
    mark: int = -1  # none


def most_pages(memory: int) -> int:
    """The largest window, where there are so many pages of memory."""
    return max(min(WINDOW_PAGES, memory // WINDOW_SHARE), 1)


def first_window(pages: int, most: int) -> int:
    """Pages of the first window of a sequential reader who asked for `pages`."""
    size = 1 << (pages - 1).bit_length()
    if size <= most // 32:
        return size * 4
    return size * 2 if size <= most // 4 else most


def next_window(pages: int, most: int) -> int:
    """Pages of the window after one of `pages`."""
    if pages < most // 16:
        return pages * 4
    return pages * 2 if pages <= most // 2 else most


class Stream:
    """Who reads one file, as its mapping's record `state` knows him. Nobody wants more than `most`.

    `cached(index, step)` says how many pages from `index` on, up (1) or down (-1), are cached, at
    most as many as the largest window has.
    """

    def __init__(
        self, state: Any, most: int, order_max: int, cached: Callable[[int, int], int]
    ) -> None:
        self._state = state
        self._most = most
        self._order_max = order_max
        self._cached = cached
        self._start, self._pages = int(state["ra_start"]), int(state["ra_pages"])
        self._order, self._async = int(state["ra_order"]) & ~TAKEN, int(state["ra_async"])

    @property
    def _end(self) -> int:
        return self._start + self._pages

    def _set(self, start: int, pages: int, order: int, behind: int) -> Window:
        """The window from now on; `behind` of its pages lie behind the marker."""
        state = self._state
        order = min(order, self._order_max, pages.bit_length() - 1)
        state["ra_start"], state["ra_pages"] = start, pages
        state["ra_order"], state["ra_async"] = order, behind
        return Window(start, pages, order, start + pages - behind)

    def taken(self, index: int, window: Window) -> None:
        """There are folios for a window now, from page `index` on."""
        if (index, window.pages) == (self._start, self._pages):
            self._state["ra_order"] |= TAKEN

    def had(self, index: int) -> bool:
        """Whether a page was read in the window that there is."""
        return self._start <= index < self._end and bool(self._state["ra_order"] & TAKEN)

    def shrink(self, index: int, wanted: int) -> Window:
        """The window was evicted before it was used, from page `index` on: half of it at once."""
        pages = max(min(self._pages // 2, self._most), wanted)
        self._state["ra_behind"] = index + wanted & PAGE_MASK
        return self._set(index, pages, 0, pages - wanted or pages)

    def miss(self, index: int, wanted: int) -> tuple[Window, list[Window]]:
        """Page `index` is not cached and a reader wants `wanted`: what he waits for, what not."""
        end, before = index + wanted, int(self._state["ra_behind"])
        self._state["ra_behind"] = end & PAGE_MASK
        if index and self._start <= index < self._end + self._pages:
            return self._near(index, wanted), []
        if index == 0 or before - index & PAGE_MASK <= 1:
            pages = first_window(wanted, self._most)
            return self._set(index, pages, 0, pages - wanted or pages), []
        history = self._cached(index - 1, -1)
        if history > wanted:
            history *= 1 + (history == index)  # all of the file so far: a long stream
            return self._set(index, min(history + wanted, self._most), 0, 1), []
        step = (end - before + PAGE_HALF & PAGE_MASK) - PAGE_HALF
        return Window(index, wanted, 0), self._strided(index, wanted, step)

    def _near(self, index: int, wanted: int) -> Window:
        """A miss inside the window, or no further behind it than it is long."""
        if index >= self._end:
            pages = next_window(self._pages, self._most)
            pages = max(pages, index - self._end + wanted)
            return self._set(self._end, pages, self._order + 2, pages)
        if self._cached(index - 1, -1):
            return Window(index, self._end - index, self._order, self._end - self._async)
        return Window(index, wanted, self._order)

    def _strided(self, index: int, wanted: int, step: int) -> list[Window]:
        """The next places of a reader who misses at one distance."""
        state = self._state
        steady = step == int(state["ra_step"]) and abs(step) >= wanted
        run = min(int(state["ra_run"]) + 1, RUN_MOST) if steady else 0
        state["ra_step"] = step if abs(step) <= STEP_MOST else 0
        state["ra_run"] = run
        places = min(1 << run, self._most // wanted) if run else 0
        if step < 0:
            places = min(places, index // -step)
        if not places:
            return []
        state["ra_behind"] = index + wanted + places * step & PAGE_MASK
        if step == -wanted:
            return [Window(index - places * wanted, places * wanted, 0)]
        return [Window(index + n * step, wanted, 0) for n in range(1, places + 1)]

    def hit(self, index: int, pages: int, wanted: int) -> Window | None:
        """A reader who wants `wanted` pages met the marker on the folio of [index, +pages)."""
        if index <= self._end - self._async < index + pages:
            start, size = self._end, next_window(self._pages, self._most)
        else:  # somebody else's window: as much as is there, and more
            start = index + 1 + self._cached(index + 1, 1)
            if start - index > self._most:
                return None
            size = next_window(start - index + wanted, self._most)
        return self._set(start, size, self._order + 2, size)
