"""The flusher's lists against lists of Python's: order, places, and that stamps ascend."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import trio
from hypothesis import given
from hypothesis import strategies as st

from writeback.lists import DIRTY, IO, MORE_IO, NOWHERE, Lists
from writeback.mapping import STATE, Mappings


class Records:
    """State records and nothing else."""

    def __init__(self) -> None:
        self.states = np.zeros(9, STATE)

    def state(self, handle: int) -> Any:
        return self.states[handle]


class Twin:
    """The same with lists of handles and a dict of stamps."""

    def __init__(self) -> None:
        self.lists: dict[int, list[int]] = {DIRTY: [], IO: [], MORE_IO: []}
        self.when: dict[int, int] = {}

    def move(self, handle: int, queue: int) -> None:
        for some in self.lists.values():
            if handle in some:
                some.remove(handle)
        if queue:
            self.lists[queue].append(handle)

    def redirtied(self, handle: int, now: int) -> None:
        if any(self.when[other] > self.when[handle] for other in self.lists[DIRTY]):
            self.when[handle] = now
        self.move(handle, DIRTY)

    def expire(self, before: int, most: int) -> None:
        old = [h for h in self.lists[DIRTY] if self.when[h] <= before]
        for handle in old[:most]:
            self.move(handle, IO)

    def splice(self) -> None:
        self.lists[IO] += self.lists[MORE_IO]
        self.lists[MORE_IO] = []


def walk(lists: Lists, queue: int) -> list[int]:
    found = []
    handle = lists.first(queue)
    while handle:
        found.append(handle)
        handle = lists.following(handle)
    return found


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["dirtied", "redirtied", "io", "more", "off", "expire", "splice"]),
            st.integers(1, 8),
        ),
        max_size=60,
    )
)
def test_like_the_twin(steps: list[tuple[str, int]]) -> None:
    async def run() -> None:
        records, twin = Records(), Twin()
        lists = Lists(cast(Mappings, records))
        for what, handle in steps:
            listed = records.states["queue"][handle] != NOWHERE
            if what == "dirtied":
                lists.dirtied(handle)
                twin.when[handle] = int(records.states["dirtied_when"][handle])
                twin.move(handle, DIRTY)
            elif what == "redirtied" and listed:
                lists.redirtied(handle)
                twin.redirtied(handle, int(records.states["dirtied_when"][handle]))
            elif what in ("io", "more", "off") and listed:
                queue = {"io": IO, "more": MORE_IO, "off": NOWHERE}[what]
                lists.move(handle, queue)
                twin.move(handle, queue)
            elif what == "expire" and handle in twin.when:
                lists.expire(DIRTY, twin.when[handle], 3)
                twin.expire(twin.when[handle], 3)
            elif what == "splice":
                lists.splice()
                twin.splice()
            for queue, handles in twin.lists.items():
                assert walk(lists, queue) == handles
                assert lists.length[queue] == len(handles)
            assert len(lists) == sum(map(len, twin.lists.values()))
            when = [int(records.states["dirtied_when"][h]) for h in twin.lists[DIRTY]]
            assert when == sorted(set(when))
            assert when == [twin.when[h] for h in twin.lists[DIRTY]]

    trio.run(run)
