"""The radix tree against a dictionary: multi-index folios, tags, shadows, growth and shrinkage."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc.jit import probe
from fs.cache import radix, shadow
from fs.cache.radix import (
    COUNT,
    L_FIRST,
    L_NODES,
    LISTED,
    NEXT,
    NODE_BIT,
    SHADOW_BIT,
    SHADOWS,
    WORDS,
)

NODES = 512  # room for nodes in the test arena
ROOT_WORD = 16  # the root lives in "page 0" of the test arena
PAGES = 1 << 17


@probe
def insert(m4, m8, orders, root, index, order, pfn, spare, nspare):
    return radix.insert_entry(m4, m8, orders, root, index, order, pfn, spare, nspare)


@probe
def halve(m4, m8, orders, root, index, spare):
    radix.halve_entry(m4, m8, orders, root, index, spare)


class Tree:
    """A tree over a small array, its nodes and folios handed out by the test itself."""

    def __init__(self) -> None:
        memory = np.zeros(NODES * 128, np.uint32)
        self.m4 = memory
        self.m8 = memory.view(np.uint64)
        self.orders = np.zeros(PAGES, np.uint8)
        self.indices = np.zeros(PAGES, np.int64)
        self.nodes = list(range(1, NODES))
        self.pfn = 1  # the next one
        self.listed = np.zeros(3, np.int64)
        self.freed = np.zeros(600, np.uint32)

    def folio(self, index: int, order: int) -> int:
        """A new one, which has pages of its own: its upper half has a number, too."""
        pfn, self.pfn = self.pfn, self.pfn + (1 << order)
        self.orders[pfn] = order
        self.indices[pfn] = index
        return pfn

    def insert(self, index: int, order: int) -> int:
        pfn = self.folio(index, order)
        spare: list[int] = []
        while True:
            array = np.array([*spare, 0], np.uint32)
            code, self.shadow = insert(
                self.m4, self.m8, self.orders, ROOT_WORD, index, order, pfn, array, len(spare)
            )
            if code == radix.EXISTS:
                self.nodes += spare
                return 0
            if code >= 0:
                self.nodes += spare[: len(spare) - code]
                return pfn
            spare += [self.nodes.pop() for _ in range(-code - len(spare))]

    def erase(self, index: int, shadow: int = 0) -> None:
        entry = shadow | SHADOW_BIT if shadow else 0
        args = (self.m4, self.m8, self.orders, self.listed, ROOT_WORD, index, entry)
        self.give_back(radix.erase(*args, self.freed))

    def give_back(self, n: int) -> None:
        self.nodes += [int(x) for x in self.freed[:n]]
        assert len(self.nodes) == len(set(self.nodes)), "a node was freed twice"

    def forget(self, index: int, last: int, room: int = 600) -> None:
        """Shadows of pages [index, last], with place for so many freed nodes at a time."""
        out = np.zeros(1, np.int64)
        while index <= last:
            args = (self.m4, self.m8, self.listed, ROOT_WORD, index, last, self.freed[:room], out)
            self.give_back(shadow.forget(*args))
            index = int(out[0])

    def reclaim(self, nr: int) -> None:
        self.give_back(shadow.reclaim(self.m4, self.m8, self.listed, nr, self.freed))

    def on_list(self) -> list[int]:
        """Listed nodes, oldest first."""
        found, node = [], int(self.listed[L_FIRST])
        while node:
            found.append(node)
            node = int(self.m4[node * WORDS + NEXT])
        assert len(found) == self.listed[L_NODES]
        return found

    def shadows(self) -> dict[int, int]:
        """Every shadow by page, with a look at all counts and at where every node is."""
        pages: dict[int, int] = {}
        listed, reached = self.on_list(), set()
        height = int(self.m4[ROOT_WORD + radix.R_HEIGHT])
        todo = [(int(self.m4[ROOT_WORD]), (height - 1) * 6, 0)] if height else []
        for node, shift, base in todo:
            reached.add(node)
            slots = self.m4[node * WORDS : node * WORDS + 64].tolist()
            count = sum(1 for entry in slots if entry & NODE_BIT or entry and entry >> 30 == 0)
            old = [slot for slot in range(64) if slots[slot] >> 30 == 1]
            assert count == self.m4[node * WORDS + COUNT]
            assert len(old) == self.m4[node * WORDS + SHADOWS]
            assert count or old, "an empty node"
            assert (node in listed) == bool(self.m4[node * WORDS + LISTED])
            assert count or node in listed, "a node with nothing but shadows is not listed"
            for slot in old:
                page = base + (slot << shift)
                pages |= dict.fromkeys(range(page, page + (1 << shift)), slots[slot] ^ SHADOW_BIT)
            todo += [
                (entry ^ NODE_BIT, shift - 6, base + (slot << shift))
                for slot, entry in enumerate(slots)
                if entry & NODE_BIT
            ]
        adrift = {node for node in listed if self.m8[node * 64 + radix.ROOT_AT] == 0}
        assert not adrift & reached
        assert sorted([*self.nodes, *reached, *adrift]) == list(range(1, NODES))
        return pages

    def replace(self, index: int, order: int) -> int:
        pfn = self.folio(index >> order << order, order)
        radix.replace(self.m4, self.orders, ROOT_WORD, index, pfn)
        return pfn

    def halve(self, index: int, order: int) -> None:
        """Halve the folio over a page; a node is only taken where the halves need one."""
        pfn, spare = self.find(index), self.nodes.pop() if order == 6 else 0
        halve(self.m4, self.m8, self.orders, ROOT_WORD, index, spare)
        upper, first = pfn + (1 << order - 1), int(self.indices[pfn])
        self.orders[pfn] = self.orders[upper] = order - 1
        self.indices[upper] = first + (1 << order - 1)

    def gang(self, index: int, last: int, tag: int, limit: int = 4096) -> list[int]:
        out = np.zeros(limit, np.int64)
        args = (self.m4, self.m8, self.orders, self.indices, ROOT_WORD, index, last, tag, out)
        return [int(x) for x in out[: radix.gang(*args)]]

    def cached_run(self, index: int, step: int, most: int) -> int:
        args = (self.m4, self.orders, self.indices, ROOT_WORD, index, step, most)
        return int(radix.cached_run(*args))

    def mark(self, index: int, tag: int, value: int) -> None:
        radix.mark(self.m4, self.m8, self.orders, ROOT_WORD, index, tag, value)

    def find(self, index: int) -> int:
        return int(radix.find(self.m4, ROOT_WORD, index))

    @property
    def nrpages(self) -> int:
        return int(self.m4[ROOT_WORD + radix.R_NRPAGES])


class Model:
    """The naive twin: a dictionary of folios by first index."""

    def __init__(self) -> None:
        self.folios: dict[int, tuple[int, int, set[int]]] = {}  # start -> order, pfn, tags
        self.shadows: dict[int, int] = {}  # page -> shadow

    def take_shadows(self, index: int, order: int) -> int:
        """What a folio in this place displaces: the shadow of the last page that has one."""
        pages = [page for page in range(index, index + (1 << order)) if page in self.shadows]
        return [self.shadows.pop(page) for page in pages][-1] if pages else 0

    def over(self, index: int) -> int | None:
        for start, (order, _, _) in self.folios.items():
            if start <= index < start + (1 << order):
                return start
        return None

    def cached_run(self, index: int, step: int, most: int) -> int:
        n = 0
        while n < most and self.over(index + n * step) is not None:
            n += 1
        return n

    def touching(self, index: int, last: int, tag: int) -> list[int]:
        return [
            pfn
            for start, (order, pfn, tags) in sorted(self.folios.items())
            if start <= last and start + (1 << order) > index and (tag == radix.ANY or tag in tags)
        ]


def test_empty_tree_has_nothing() -> None:
    tree = Tree()
    assert tree.find(0) == 0
    assert tree.gang(0, 1 << 50, radix.ANY) == []


def test_single_folio_at_zero_and_far_away() -> None:
    tree = Tree()
    near = tree.insert(0, 0)
    far = tree.insert((1 << 50) + 3, 0)
    assert tree.find(0) == near
    assert tree.find((1 << 50) + 3) == far
    assert tree.find((1 << 50) + 2) == 0
    assert tree.gang(1, 1 << 51, radix.ANY) == [far]
    tree.erase((1 << 50) + 3)
    assert tree.m4[ROOT_WORD + radix.R_HEIGHT] == 1  # the tree shrank again
    tree.erase(0)
    assert tree.nrpages == 0
    assert sorted(tree.nodes) == list(range(1, NODES))


def test_huge_folio_sits_one_level_up() -> None:
    tree = Tree()
    pfn = tree.insert(512, 9)
    assert len(tree.nodes) == NODES - 2  # one node of eight slots, no leaves
    assert tree.find(512) == tree.find(1023) == pfn
    assert tree.find(511) == tree.find(1024) == 0
    assert tree.insert(1023, 0) == 0
    tree.mark(800, radix.DIRTY, 1)
    assert tree.gang(900, 5000, radix.DIRTY) == [pfn]
    assert tree.gang(0, 511, radix.DIRTY) == []
    assert tree.gang(0, 512, radix.DIRTY) == [pfn]


def test_large_folio_meets_small_ones() -> None:
    tree = Tree()
    tree.insert(70, 0)
    assert tree.insert(64, 6) == 0
    assert tree.insert(64, 2) != 0
    tree.erase(70)
    tree.erase(64)
    assert tree.insert(64, 6) != 0


def test_halves_have_the_tags_of_the_whole() -> None:
    tree = Tree()
    pfn = tree.insert(512, 9)
    tree.mark(512, radix.DIRTY, 1)
    tree.mark(512, radix.TOWRITE, 1)
    for order in range(9, 0, -1):
        tree.halve(512 + 5, order)  # page 5 of the folio: in the lower half but twice
    pieces = [pfn + first for first in (0, 4, 5, 6, 8, 16, 32, 64, 128, 256)]
    assert len(tree.nodes) == NODES - 3  # one more, for the pieces of the first 64 pages
    for tag in (radix.ANY, radix.DIRTY, radix.TOWRITE):
        assert tree.gang(0, 2000, tag) == pieces
    assert tree.gang(0, 2000, radix.WRITEBACK) == []
    tree.mark(512 + 5, radix.DIRTY, 0)
    assert tree.gang(0, 2000, radix.DIRTY) == pieces[:2] + pieces[3:]


def test_towrite_is_copied_in_batches() -> None:
    tree = Tree()
    for index in range(0, 40, 2):
        tree.insert(index, 0)
        tree.mark(index, radix.DIRTY, 1)
    args = (tree.m4, tree.m8, tree.orders, tree.indices, ROOT_WORD)
    following = radix.tag_towrite(*args, 0, 29, 10)
    assert following == 20
    assert len(tree.gang(0, 100, radix.TOWRITE)) == 10
    assert radix.tag_towrite(*args, following, 29, 10) == -1
    assert len(tree.gang(0, 100, radix.TOWRITE)) == 15
    tree.mark(0, radix.DIRTY, 0)
    assert len(tree.gang(0, 100, radix.TOWRITE)) == 15
    assert radix.marked(tree.m4, tree.m8, tree.orders, ROOT_WORD, 0, radix.DIRTY) == 0
    assert radix.marked(tree.m4, tree.m8, tree.orders, ROOT_WORD, -1, radix.DIRTY) == 1


index_at = st.one_of(
    st.integers(0, 300), st.integers(0, 9000), st.integers((1 << 30) - 99, (1 << 30) + 99)
)
steps = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("insert", "insert", "erase", "evict", "evict", "replace", "halve", "halve"),
                *("set", "set", "clear", "scan", "forget"),
            ]
        ),
        index_at,
        st.integers(0, 9),
        st.integers(0, 2),
    ),
    max_size=60,
)


def apply_step(tree: Tree, model: Model, step: tuple[str, int, int, int]) -> None:
    what, index, order, tag = step
    start = model.over(index)
    if what == "insert":
        index &= ~((1 << order) - 1)
        pfn = tree.insert(index, order)
        taken = bool(model.touching(index, index + (1 << order) - 1, radix.ANY))
        assert (pfn == 0) == taken
        if pfn:
            model.folios[index] = (order, pfn, set())
            found = model.take_shadows(index, order)
            assert tree.shadow == (found | SHADOW_BIT if found else 0)
    elif start is not None and what == "erase":
        tree.erase(index)
        del model.folios[start]
    elif start is not None and what == "evict":
        size = 1 << model.folios.pop(start)[0]
        tree.erase(index, index + 1)
        model.shadows |= dict.fromkeys(range(start, start + size), index + 1 & SHADOW_BIT - 1)
    elif what == "forget":
        index, last = index & ~63, (index & ~63) + 64 * order + 63
        tree.forget(index, last, room=12)
        model.shadows = {p: s for p, s in model.shadows.items() if not index <= p <= last}
    elif start is not None and what == "replace":
        order, _, tags = model.folios[start]
        model.folios[start] = (order, tree.replace(index, order), tags)
    elif start is not None and what == "halve" and model.folios[start][0]:
        order, pfn, tags = model.folios.pop(start)
        tree.halve(index, order)
        half = 1 << order - 1
        model.folios[start] = (order - 1, pfn, tags)
        model.folios[start + half] = (order - 1, pfn + half, set(tags))
    elif start is not None and what in ("set", "clear"):
        tree.mark(index, tag, int(what == "set"))
        tags = model.folios[start][2]
        tags.add(tag) if what == "set" else tags.discard(tag)
    elif what == "scan":
        last = index + order * 100
        for which in (radix.ANY, 0, 1, 2):
            assert tree.gang(index, last, which) == model.touching(index, last, which)
        for page in range(index, index + 99, 9):
            evicted = radix.was_evicted(tree.m4, ROOT_WORD, page)
            assert evicted == (page in model.shadows)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_tree_equals_dictionary(sequence: list[tuple[str, int, int, int]]) -> None:
    tree, model = Tree(), Model()
    for step in sequence:
        apply_step(tree, model, step)
        start = model.over(step[1])
        assert tree.find(step[1]) == (model.folios[start][1] if start is not None else 0)
        assert tree.shadows() == model.shadows
    for tag in (radix.ANY, 0, 1, 2):
        assert tree.gang(0, 1 << 40, tag) == model.touching(0, 1 << 40, tag)
    assert tree.nrpages == sum(1 << f[0] for f in model.folios.values())
    for start in list(model.folios):
        tree.erase(start)
    tree.reclaim(NODES)
    assert tree.on_list() == []
    assert tree.shadows() == {}
    assert sorted(tree.nodes) == list(range(1, NODES))


@pytest.mark.parametrize("seed", range(12))
def test_shadows_among_folios_of_all_sizes(seed: int) -> None:
    """A crowded tree: large folios meet shadows and nodes of them, small ones split shadows."""
    random, tree, model = Random(seed), Tree(), Model()
    for _ in range(150):
        what = random.choice(["insert", "insert", "evict", "evict", "erase", "set", "halve"])
        if what == "insert" or random.random() < 0.1:
            what = random.choice(["insert"] * 9 + ["forget"])
            index = random.randrange(4096) if random.random() < 0.9 else 1 << 18
        else:
            index = random.choice(list(model.folios) or [0])
        apply_step(tree, model, (what, index, random.choice([0, 0, 1, 3, 6, 7, 9]), 0))
        for run in ((index, 1, 99), (index, -1, 99), (index + 5, -1, 600)):
            assert tree.cached_run(*run) == model.cached_run(*run)
        assert tree.shadows() == model.shadows
        for tag in (radix.ANY, 0, 1, 2):
            assert tree.gang(0, 1 << 20, tag) == model.touching(0, 1 << 20, tag)
        if random.random() < 0.02:
            tree.reclaim(1)
            left = tree.shadows()
            model.shadows = {page: s for page, s in model.shadows.items() if page in left}
            assert left == model.shadows


def test_a_shadow_is_found_by_the_next_folio_and_by_nothing_else() -> None:
    tree = Tree()
    tree.insert(4, 2)
    tree.erase(5, 77)
    assert tree.nrpages == 0
    assert tree.find(5) == 0
    assert tree.gang(0, 1 << 40, radix.ANY) == []
    assert tree.shadows() == dict.fromkeys(range(4, 8), 77)
    assert len(tree.on_list()) == 1
    pfn = tree.insert(6, 0)
    assert tree.shadow == SHADOW_BIT | 77
    assert tree.gang(0, 1 << 40, radix.ANY) == [pfn]
    assert tree.shadows() == {4: 77, 5: 77, 7: 77}
    assert tree.insert(0, 1)
    assert tree.shadow == 0


def test_a_large_folio_takes_the_place_of_a_node_of_shadows() -> None:
    """Its node is nobody's then, until the shrinker frees it."""
    tree = Tree()
    tree.insert(1 << 20, 0)
    for index in (512, 513, 700):
        tree.insert(index, 0)
        tree.erase(index, index)
    before = len(tree.nodes)
    assert tree.insert(512, 9)
    assert tree.shadow == SHADOW_BIT | 700
    assert tree.shadows() == {}
    assert len(tree.on_list()) == 2
    tree.reclaim(1)
    assert len(tree.nodes) == before + 1
    tree.reclaim(1)
    assert len(tree.nodes) == before + 2


def test_the_oldest_nodes_of_shadows_go_first_and_those_in_use_stay() -> None:
    tree = Tree()
    for index in (0, 64, 128, 192):
        tree.insert(index, 0)
        tree.erase(index, 5)
    tree.insert(65, 0)
    tree.reclaim(2)
    assert sorted(tree.shadows()) == [64, 128, 192]
    assert len(tree.on_list()) == 2
    tree.erase(65)
    tree.reclaim(1)
    assert sorted(tree.shadows()) == [64, 192]


def test_the_shrinker_passes_over_a_locked_mapping() -> None:
    tree = Tree()
    tree.insert(3, 0)
    tree.erase(3, 9)
    tree.m4[ROOT_WORD + radix.R_LOCK] = 1
    tree.reclaim(4)
    assert tree.shadows() == {3: 9}
    tree.m4[ROOT_WORD + radix.R_LOCK] = 0
    tree.reclaim(1)
    assert tree.shadows() == {}


def test_a_listed_top_node_leaves_the_list_with_the_tree() -> None:
    tree = Tree()
    tree.insert(64, 6)
    tree.erase(64, 8)
    low = tree.insert(0, 0)
    tree.forget(64, 127)
    assert tree.m4[ROOT_WORD + radix.R_HEIGHT] == 1
    assert tree.on_list() == []
    assert tree.find(0) == low
    assert tree.shadows() == {}
