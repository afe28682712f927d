"""The radix tree against a dictionary: multi-index folios, tags, growth and shrinkage."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fs.cache import radix

NODES = 512  # room for nodes in the test arena
ROOT_WORD = 16  # the root lives in "page 0" of the test arena
PAGES = 4096


class Tree:
    """A tree over a small array, its nodes and folios handed out by the test itself."""

    def __init__(self) -> None:
        memory = np.zeros(NODES * 128, np.uint32)
        self.m4 = memory
        self.m8 = memory.view(np.uint64)
        self.orders = np.zeros(PAGES, np.uint8)
        self.indices = np.zeros(PAGES, np.int64)
        self.nodes = list(range(1, NODES))
        self.pfns = list(range(1, PAGES))
        self.freed = np.zeros(16, np.uint32)

    def insert(self, index: int, order: int) -> int:
        pfn = self.pfns.pop()
        self.orders[pfn] = order
        self.indices[pfn] = index
        spare: list[int] = []
        while True:
            array = np.array([*spare, 0], np.uint32)
            code = radix.insert(
                self.m4, self.m8, self.orders, ROOT_WORD, index, order, pfn, array, len(spare)
            )
            if code == radix.EXISTS:
                self.pfns.append(pfn)
                self.nodes += spare
                return 0
            if code >= 0:
                self.nodes += spare[: len(spare) - code]
                return pfn
            spare += [self.nodes.pop() for _ in range(-code - len(spare))]

    def erase(self, index: int) -> None:
        n = radix.erase(self.m4, self.m8, self.orders, ROOT_WORD, index, self.freed)
        self.nodes += [int(x) for x in self.freed[:n]]

    def gang(self, index: int, last: int, tag: int, limit: int = 4096) -> list[int]:
        out = np.zeros(limit, np.int64)
        args = (self.m4, self.m8, self.orders, self.indices, ROOT_WORD, index, last, tag, out)
        return [int(x) for x in out[: radix.gang(*args)]]

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

    def over(self, index: int) -> int | None:
        for start, (order, _, _) in self.folios.items():
            if start <= index < start + (1 << order):
                return start
        return None

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
        st.sampled_from(["insert", "insert", "erase", "set", "set", "clear", "scan"]),
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
    elif start is not None and what == "erase":
        tree.erase(index)
        del model.folios[start]
    elif start is not None and what in ("set", "clear"):
        tree.mark(index, tag, int(what == "set"))
        tags = model.folios[start][2]
        tags.add(tag) if what == "set" else tags.discard(tag)
    elif what == "scan":
        last = index + order * 100
        for which in (radix.ANY, 0, 1, 2):
            assert tree.gang(index, last, which) == model.touching(index, last, which)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_tree_equals_dictionary(sequence: list[tuple[str, int, int, int]]) -> None:
    tree, model = Tree(), Model()
    for step in sequence:
        apply_step(tree, model, step)
        start = model.over(step[1])
        assert tree.find(step[1]) == (model.folios[start][1] if start is not None else 0)
    for tag in (radix.ANY, 0, 1, 2):
        assert tree.gang(0, 1 << 40, tag) == model.touching(0, 1 << 40, tag)
    assert tree.nrpages == sum(1 << f[0] for f in model.folios.values())
    for start in list(model.folios):
        tree.erase(start)
    assert sorted(tree.nodes) == list(range(1, NODES))
