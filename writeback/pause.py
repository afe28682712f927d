"""How long a writer pauses, and after how many pages it is asked again.

A pause pays for the pages dirtied since the last one at the writer's rate. It is at most 200 ms,
and at most about an eighth of the time that the device needs for all that is dirty, so that a
small pool does not run dry while its writers sleep; and it aims at 10 ms or, with many writers, at
more, so that they do not wake for a page each.

Times are milliseconds, rates pages a second; formulas and rounding are the kernel's
(mm/page-writeback.c), at 1000 ticks a second. Pure functions.
"""

from __future__ import annotations

HZ = 1000
PAUSE_MOST_MS = 200
PAUSE_TARGET_MS = 10
POLL_PAGES = 32  # fewer pages than these are not worth a pause of their own
SECOND_POW2 = 1 << (HZ - 1).bit_length()
EIGHTH_POW2 = 1 << (HZ // 8).bit_length()


def max_pause(dirty: int, avg_bw: int) -> int:
    """The longest pause while so many pages wait for a device of that bandwidth."""
    return min(dirty // (1 + avg_bw // EIGHTH_POW2) + 1, PAUSE_MOST_MS)


def target(longest: int, avg_bw: int, ratelimit: int, task_rate: int) -> tuple[int, int]:
    """(shortest pause, pages until the next one); `task_rate` is the rate limit by position.

    A pause that would be shorter is left out, and its time owed.
    """
    doublings = avg_bw.bit_length() - ratelimit.bit_length()
    ms = PAUSE_TARGET_MS + max(doublings, 0) * (10 * HZ) // 1024
    ms = min(ms, 1 + longest // 2)
    pages = ratelimit * ms // SECOND_POW2
    if pages < POLL_PAGES:
        ms = longest
        pages = ratelimit * ms // SECOND_POW2
        if pages > POLL_PAGES:
            pages, ms = POLL_PAGES, HZ * POLL_PAGES // ratelimit
    if HZ * pages // (task_rate + 1) > longest:
        ms = longest
        pages = task_rate * ms // SECOND_POW2
    return (1 + ms // 2 if pages >= POLL_PAGES else ms), pages


def poll_interval(dirty: int, thresh: int) -> int:
    """Pages that a writer may dirty in free run before it looks again."""
    return 1 << ((thresh - dirty).bit_length() - 1 >> 1) if thresh > dirty else 1
