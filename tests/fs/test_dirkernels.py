"""The directory kernels against naive twins, and verifiers against damaged blocks."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fs.xfs import danode
from fs.xfs import dirblock as B
from fs.xfs import dirdata as D
from fs.xfs import dirleaf as F
from fs.xfs import dirsf as S
from fs.xfs import layout as L
from tests.fs import dirmodel as M

GUARD = 64  # bytes before and behind the structure that no kernel may touch
LIMITS = M.easy_limits()
quick = settings(max_examples=60, deadline=None)
file_names = st.binary(min_size=1, max_size=255).filter(
    lambda n: n not in (b".", b"..") and b"/" not in n and b"\0" not in n
)


class Guarded:
    """Bytes for a kernel between two guards."""

    def __init__(self, size: int) -> None:
        self.mem = np.full(size + 2 * GUARD, 0xA5, np.uint8)
        self.addr, self.size = GUARD, size
        self.mem[GUARD : GUARD + size] = 0

    @property
    def bytes(self) -> bytes:
        return self.mem[GUARD : GUARD + self.size].tobytes()

    @property
    def args(self) -> tuple[np.ndarray, int, int]:
        return self.mem, self.addr, self.size

    def put(self, contents: bytes) -> None:
        self.mem[GUARD : GUARD + len(contents)] = np.frombuffer(contents, np.uint8)

    def check(self) -> None:
        assert (self.mem[:GUARD] == 0xA5).all()
        assert (self.mem[-GUARD:] == 0xA5).all()


# -- hash ---------------------------------------------------------------------------------------


@given(st.binary(max_size=260))
@quick
def test_hash_agrees_with_its_twin(name: bytes) -> None:
    assert D.name_hash(name) == M.naive_hash(name)
    mem = np.frombuffer(b"xx" + name, np.uint8).copy()
    assert danode.da_hash(mem, 2, len(name)) == M.naive_hash(name)


def test_hash_of_known_names() -> None:
    assert D.name_hash(b".") == 0x2E
    assert D.name_hash(b"..") == 0x172E
    assert D.name_hash(b"file1") == 0x6D3B32B7  # as xfs_db's `hash` prints it
    assert len({M.naive_hash(n) for n in M.colliding(64)}) == 1


# -- data blocks --------------------------------------------------------------------------------


def check_data(block: Guarded) -> dict[bytes, tuple[int, int]]:
    assert D.REASONS[D.verify_data(*block.args, LIMITS)] == ""
    found = M.regions(block.bytes, block.size)
    assert M.bestfree(block.bytes) == M.three_largest(found)
    block.check()
    return M.names(found)


@given(st.lists(st.tuples(st.booleans(), file_names), max_size=80), st.sampled_from([512, 4096]))
@quick
def test_data_block_follows_its_model(steps: list[tuple[bool, bytes]], size: int) -> None:
    block = Guarded(size)
    D.init(*block.args, L.MAGIC_DIR_DATA)
    model: dict[bytes, tuple[int, int]] = {}
    places: dict[bytes, int] = {}
    for i, (removing, name) in enumerate(steps):
        if removing and places:
            gone = sorted(places)[i % len(places)]
            assert bool(D.is_alone(*block.args, places[gone])) == (len(places) == 1)
            D.remove(*block.args, places.pop(gone))
            del model[gone]
        elif name not in model:
            at = D.add(*block.args, name, 1000 + i, i % 8)
            fits = M.three_largest(M.regions(block.bytes, size))[0] >= M.entry_size(len(name))
            if at >= 0:
                assert D.entry_at(*block.args, at)
                assert D.matches(block.mem, block.addr, at, name)
                assert D.entry_ino(block.mem, block.addr, at) == (1000 + i, i % 8)
                places[name], model[name] = at, (1000 + i, i % 8)
            else:
                assert not fits
        assert check_data(block) == model
    out = np.zeros((256, 4), np.int64)
    n = D.list_entries(*block.args, 0, out)
    assert sorted(out[:n, 0].tolist()) == sorted(places.values())


@pytest.mark.compiled
def test_data_block_of_64k_can_be_filled() -> None:
    block = Guarded(65536)
    D.init(*block.args, L.MAGIC_DIR_DATA)
    n = 0
    while D.add(*block.args, b"%d" % n, 1000, 1) >= 0:
        n += 1
    assert n == (65536 - 64) // 16 or M.three_largest(M.regions(block.bytes, 65536))[0] < 24
    assert len(check_data(block)) == n


# -- block form ---------------------------------------------------------------------------------


def empty_block(size: int) -> Guarded:
    block = Guarded(size)
    block.mem[block.addr : block.addr + 4] = np.frombuffer(b"XDB3", np.uint8)
    S.to_block(struct.pack(">BBI", 0, 0, M.ROOT_INO), *block.args, M.ROOT_INO)
    return block


def check_block(block: Guarded) -> dict[bytes, tuple[int, int]]:
    assert D.REASONS[B.verify(*block.args, LIMITS)] == ""
    leaf = M.block_leaf(block.bytes)
    found = M.regions(block.bytes, block.size - 8 - 8 * len(leaf))
    assert M.bestfree(block.bytes) == M.three_largest(found)
    live = sorted((h, place) for h, place in leaf if place)
    assert live == sorted(
        (M.naive_hash(r.name), r.offset >> 3) for r in found if r.name is not None
    )
    block.check()
    return M.names(found)


OWN = {b".": (M.ROOT_INO, 2), b"..": (M.ROOT_INO, 2)}


@given(
    st.lists(st.tuples(st.integers(0, 2), file_names), max_size=120),
    st.sampled_from([512, 1024, 4096]),
)
@quick
def test_block_form_follows_its_model(steps: list[tuple[int, bytes]], size: int) -> None:
    block = empty_block(size)
    model = dict(OWN)
    for i, (removing, name) in enumerate(steps):
        own = sorted(set(model) - set(OWN))
        if not removing and own:
            gone = own[i % len(own)]
            index, at = B.find(*block.args, gone)
            assert index >= 0
            B.remove(*block.args, index, at)
            del model[gone]
        elif name not in model:
            assert B.find(*block.args, name)[0] < 0
            fits = B.fits(*block.args, name)
            at = B.add(*block.args, name, 1000 + i, i % 8)
            assert (at >= 0) == fits
            if fits:
                model[name] = (1000 + i, i % 8)
        assert check_block(block) == model
    for name in model:
        assert B.find(*block.args, name)[0] >= 0


def test_block_form_with_one_hash_for_all() -> None:
    block = empty_block(4096)
    several = M.colliding(60)
    for i, name in enumerate(several):
        assert B.add(*block.args, name, 1000 + i, 1) >= 0
    for i in range(0, 60, 2):
        B.remove(*block.args, *B.find(*block.args, several[i]))
    assert set(check_block(block)) == set(OWN) | set(several[1::2])
    assert B.find(*block.args, several[0])[0] < 0


def test_block_form_to_leaf_and_back() -> None:
    block, leaf = empty_block(1024), Guarded(1024)
    kept = [b"some-%d" % i for i in range(12)]
    for i, name in enumerate(kept):
        assert B.add(*block.args, name, 1000 + i, 1) >= 0
    B.remove(*block.args, *B.find(*block.args, kept.pop(3)))
    before = check_block(block)
    F.init_leaf(leaf.mem, leaf.addr, L.MAGIC_DIR_LEAF1)
    mem = np.concatenate([block.mem, leaf.mem])
    other = block.mem.size + leaf.addr
    B.to_leaf(mem, block.addr, other, 1024)
    assert F.LEAF_REASONS[F.verify_leaf(mem, other, 1024)] == ""
    assert D.REASONS[D.verify_data(mem, block.addr, 1024, LIMITS)] == ""
    assert F.best(mem, other, 1024, 0) == D.longest(mem, block.addr)
    assert B.from_leaf(mem, block.addr, other, 1024) == 0
    block.mem[:] = mem[: block.mem.size]
    assert check_block(block) == before


# -- leaves -------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=150),
    st.sampled_from([L.MAGIC_DIR_LEAF1, L.MAGIC_DIR_LEAFN]),
)
@quick
def test_leaf_follows_its_model(steps: list[tuple[bool, int]], magic: int) -> None:
    size = 512
    leaf = Guarded(size)
    F.init_leaf(leaf.mem, leaf.addr, magic)
    if magic == L.MAGIC_DIR_LEAF1:
        leaf.put(leaf.bytes[:-6] + struct.pack(">HI", 100, 1))
    model: list[tuple[int, int]] = []
    for place, (removing, hash_value) in enumerate(steps, 1):
        if removing:
            index, where = F.find(leaf.mem, leaf.addr, hash_value)
            assert (index >= 0) == any(h == hash_value for h, _ in model)
            if index >= 0:
                F.make_stale(leaf.mem, leaf.addr, index)
                model.remove((hash_value, int(where)))
        else:
            room = (size - 64 - (6 if magic == L.MAGIC_DIR_LEAF1 else 0)) // 8
            done = F.insert(*leaf.args, hash_value, place) == 0
            assert done == (len(model) < room)
            if done:
                model.append((hash_value, place))
        assert F.LEAF_REASONS[F.verify_leaf(*leaf.args)] == ""
        found = M.slots(leaf.bytes, 64, struct.unpack_from(">H", leaf.bytes, 56)[0])
        assert sorted(slot for slot in found if slot[1]) == sorted(model)
        assert F.live(leaf.mem, leaf.addr) == len(model)
    leaf.check()


def all_of(leaf: Guarded, hash_value: int) -> list[int]:
    """Places of one hash, walked as a lookup walks them."""
    found = []
    index, place = F.find(leaf.mem, leaf.addr, hash_value)
    while index >= 0:
        found.append(int(place))
        index, place = F.find_next(leaf.mem, leaf.addr, index)
    return found


@given(st.lists(st.integers(0, 9), min_size=4, max_size=50), st.sets(st.integers(0, 49)))
@quick
def test_leaf_splits_and_joins(hashes: list[int], stale: set[int]) -> None:
    pair = np.zeros(1024, np.uint8)
    for at in (0, 512):
        F.init_leaf(pair, at, L.MAGIC_DIR_LEAFN)
    for place, h in enumerate(hashes, 1):
        assert F.insert(pair, 0, 512, h, place) == 0
    for i in stale:
        if i < len(hashes) and F.live(pair, 0) > 2:
            index = next(
                j for j, (_, p) in enumerate(M.slots(pair.tobytes(), 64, len(hashes))) if p
            )
            F.make_stale(pair, 0, index)
    live = sorted(s for s in M.slots(pair.tobytes(), 64, len(hashes)) if s[1])
    F.split(pair, 0, 512)
    assert abs(F.live(pair, 0) - F.live(pair, 512)) <= 1
    left = M.slots(pair.tobytes(), 64, int(F.live(pair, 0)))
    right = M.slots(pair.tobytes(), 576, int(F.live(pair, 512)))
    assert sorted(left + right) == live
    assert F.last_hash(pair, 0) <= right[0][0]
    F.join(pair, 0, 512)
    assert sorted(M.slots(pair.tobytes(), 64, len(live))) == live
    assert F.LEAF_REASONS[F.verify_leaf(pair, 0, 512)] == ""


def test_bests_grow_and_are_cut() -> None:
    leaf = Guarded(512)
    F.init_leaf(leaf.mem, leaf.addr, L.MAGIC_DIR_LEAF1)
    leaf.put(leaf.bytes[:-6] + struct.pack(">HI", 100, 1))
    for db in range(1, 30):
        assert F.fits(*leaf.args, True)
        assert F.add_best(*leaf.args) == 0
        assert F.best(*leaf.args, db) == F.NULL_BEST
        F.set_best(*leaf.args, db, 8 * db)
    assert F.best_fit(*leaf.args, 80) == 0
    F.set_best(*leaf.args, 0, 0)
    assert F.best_fit(*leaf.args, 80) == 10
    F.set_best(*leaf.args, 5, F.NULL_BEST)
    assert F.best_hole(*leaf.args) == 5
    for db in range(20, 30):
        F.set_best(*leaf.args, db, F.NULL_BEST)
    assert F.trim_bests(*leaf.args) == 20
    assert [F.best(*leaf.args, db) for db in (0, 1, 19)] == [0, 8, 152]
    for i in range(200):
        if F.insert(*leaf.args, i, i + 1) < 0:
            break
    assert not F.fits(*leaf.args, False)
    assert F.add_best(*leaf.args) == 0 or F.LEAF_REASONS[F.verify_leaf(*leaf.args)] == ""
    leaf.check()


@given(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 100)), max_size=80))
@quick
def test_free_index_follows_its_model(steps: list[tuple[int, int]]) -> None:
    size = 512
    free = Guarded(size)
    free.put(b"XDF3")
    F.init_free(free.mem, free.addr, 448)
    model: dict[int, int] = {}
    for i, length in steps:
        i %= (size - 64) // 2
        if length % 3:
            model[i] = length
        else:
            model.pop(i, None)
        F.set_free(free.mem, free.addr, i, model.get(i, F.NULL_BEST))
        assert F.FREE_REASONS[F.verify_free(*free.args)] == ""
        assert F.free_used(free.mem, free.addr) == len(model)
        (valid,) = struct.unpack_from(">I", free.mem, free.addr + F.NVALID)
        assert valid == max(model, default=-1) + 1
        fitting = [j for j, best in sorted(model.items()) if best >= 50]
        assert F.free_fit(free.mem, free.addr, 50) == (fitting[0] if fitting else -1)
        hole = min(set(range(size)) - set(model))
        assert F.free_hole(*free.args) == (hole if hole < (size - 64) // 2 else -1)
    free.check()


def test_leaf_form_to_node_form_and_back() -> None:
    both = np.zeros(1024, np.uint8)
    F.init_leaf(both, 0, L.MAGIC_DIR_LEAF1)
    both[506:512] = np.frombuffer(struct.pack(">HI", 40, 1), np.uint8)
    for db, length in enumerate((16, F.NULL_BEST, 24), 1):
        assert F.add_best(both, 0, 512) == 0
        F.set_best(both, 0, 512, db, length)
    for i in range(20):
        assert F.insert(both, 0, 512, i, i + 1) == 0
    F.make_stale(both, 0, 4)
    both[512:516] = np.frombuffer(b"XDF3", np.uint8)
    F.init_free(both, 512, 0)
    F.leaf_to_node(both, 0, 512, 512)
    assert F.LEAF_REASONS[F.verify_leaf(both, 0, 512)] == ""
    assert F.FREE_REASONS[F.verify_free(both, 512, 512)] == ""
    assert [F.free_best(both, 512, i) for i in range(4)] == [40, 16, F.NULL_BEST, 24]
    assert F.free_used(both, 512) == 3
    assert F.node_to_leaf(both, 0, 512, 512) == 0
    assert F.LEAF_REASONS[F.verify_leaf(both, 0, 512)] == ""
    assert [F.best(both, 0, 512, i) for i in range(4)] == [40, 16, F.NULL_BEST, 24]
    assert F.live(both, 0) == 19


# -- shortform ----------------------------------------------------------------------------------


def parse_short(fork: bytes) -> tuple[int, dict[bytes, tuple[int, int]], list[int]]:
    """(parent, names, offsets); asserts i8count and that the size is exact."""
    count, big = fork[0], fork[1]
    width = 8 if big else 4
    numbers = [int.from_bytes(fork[2 : 2 + width], "big")]
    found: dict[bytes, tuple[int, int]] = {}
    offsets = []
    at = 2 + width
    for _ in range(count):
        n = fork[at]
        offsets.append(int.from_bytes(fork[at + 1 : at + 3], "big"))
        name, ftype = fork[at + 3 : at + 3 + n], fork[at + 3 + n]
        ino = int.from_bytes(fork[at + 4 + n : at + 4 + n + width], "big")
        numbers.append(ino)
        found[name] = ino, ftype
        at += 4 + n + width
    assert at == len(fork)
    assert sum(1 for ino in numbers if ino > 0xFFFFFFFF) == big
    return numbers[0], found, offsets


short_names = file_names.filter(lambda n: len(n) < 40)
inos = st.one_of(st.integers(8, 1000), st.integers(1 << 32, (1 << 32) + 1000)).map(
    lambda i: i | 1 << 10
)
short_steps = st.lists(st.tuples(st.integers(0, 3), short_names, inos), max_size=50)


@given(short_steps, st.integers(100, 400), st.sampled_from([512, 4096]))
@quick
def test_shortform_follows_its_model(
    steps: list[tuple[int, bytes, int]], room: int, block_size: int
) -> None:
    fork = Guarded(room)
    mem, addr = fork.mem, fork.addr
    size = int(S.init(mem, addr, 2048))
    parent, model = 2048, dict[bytes, tuple[int, int]]()
    for i, (what, name, ino) in enumerate(steps):
        old = sorted(model)[i % len(model)] if model else b""
        if what == 0 and old:
            size = int(S.remove(mem, addr, size, S.find(mem, addr, old)))
            del model[old]
        elif what == 1 and old and S.replace_fits(mem, addr, size, ino, room):
            size = int(S.replace(mem, addr, size, old, ino, 1))
            model[old] = ino, 1
        elif what == 2 and S.replace_fits(mem, addr, size, ino, room):
            size = int(S.replace(mem, addr, size, b"..", ino, 2))
            parent = ino
        elif name not in model and S.fits(mem, addr, size, name, ino, room, block_size):
            size = int(S.add(mem, addr, size, name, ino, i % 8, block_size))
            model[name] = ino, i % 8
        got_parent, found, offsets = parse_short(fork.bytes[:size])
        assert (got_parent, found) == (parent, model)
        assert offsets == sorted(offsets)
        assert S.REASONS[S.verify(mem, addr, size, block_size, LIMITS)] == ""
        assert all(S.find(mem, addr, name) for name in model)
    fork.check()


@given(short_steps)
@quick
def test_shortform_to_block_and_back(steps: list[tuple[int, bytes, int]]) -> None:
    fork = Guarded(4000)
    mem, addr = fork.mem, fork.addr
    size = int(S.init(mem, addr, 2048))
    for what, name, ino in steps:
        at = S.find(mem, addr, name)
        if at and not what:
            size = int(S.remove(mem, addr, size, at))
        elif not at and S.fits(mem, addr, size, name, ino, 4000, 4096):
            size = int(S.add(mem, addr, size, name, ino, 1, 4096))
    short = fork.bytes[:size]
    block = Guarded(4096)
    S.to_block(short, *block.args, M.ROOT_INO)
    _, names, offsets = parse_short(short)
    assert check_block(block) == {b".": (M.ROOT_INO, 2), b"..": (2048, 2), **names}
    in_block = [r.offset for r in M.regions(block.bytes, 4096 - 8 - 8 * (len(names) + 2)) if r.name]
    assert in_block[2:] == offsets
    assert S.size_of_block(*block.args) == size
    out = np.zeros(size, np.uint8)
    S.from_block(*block.args, out)
    assert out.tobytes() == short


# -- damage -------------------------------------------------------------------------------------


def damaged(contents: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, to values that hurt."""
    changed = bytearray(contents)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(changed))
        changed[at] = rng.choice((0, 1, 7, 8, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
def test_verifiers_survive_damaged_blocks(seed: int) -> None:
    rng = random.Random(seed)
    block = empty_block(1024)
    for i in range(12):
        B.add(*block.args, b"n%d" % i, 1000 + i, 1)
    B.remove(*block.args, *B.find(*block.args, b"n5"))
    good = block.bytes
    refused = 0
    for _ in range(400):
        block.put(damaged(good, rng))
        code = B.verify(*block.args, LIMITS)
        assert 0 <= code < len(D.REASONS)
        refused += code != 0
        if code == 0 and block.bytes[:4] == b"XDB3":
            assert B.find(*block.args, b"n3")[0] >= -1
            S.size_of_block(*block.args)
    assert refused > 100
    block.check()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((48, b"\x00\x40"), "bestfree does not match the unused regions"),
        ((50, b"\x00\x08"), "bestfree order"),
        ((52, b"\x00\x48"), "bestfree does not match the unused regions"),
        ((64, b"\xff\xff\x00\x09"), "unused region"),
        ((64, b"\xff\x00"), "inode number of an entry"),
        ((72, b"\x00"), "entry"),
        ((74, b"\x09"), "file type of an entry"),
        ((78, b"\x00\x48"), "entry tag"),
    ],
)
def test_each_damage_has_its_reason(change: tuple[int, bytes], reason: str) -> None:
    block = empty_block(512)
    for i in range(3):
        B.add(*block.args, b"n%d" % i, 1000 + i, 1)
    B.remove(*block.args, *B.find(*block.args, b"n1"))
    at, new = change
    block.put(block.bytes[:at] + new + block.bytes[at + len(new) :])
    assert D.REASONS[B.verify(*block.args, LIMITS)] == reason


def test_leaf_damage_has_its_reason() -> None:
    block = empty_block(512)
    B.add(*block.args, b"name", 1000, 1)
    good = block.bytes
    for at, new, reason in (
        (504, b"\x00\x00\x00\x40", "leaf entry count"),
        (508, b"\x00\x00\x00\x01", "leaf stale count"),
        (480, b"\xff", "leaf hash order"),
        (503, b"\x03", "leaf entry of a name"),
    ):
        block.put(good[:at] + new + good[at + len(new) :])
        assert D.REASONS[B.verify(*block.args, LIMITS)] == reason


@pytest.mark.parametrize("seed", range(2))
def test_shortform_verifier_survives_damage(seed: int) -> None:
    rng = random.Random(seed)
    fork = Guarded(336)
    mem, addr = fork.mem, fork.addr
    size = int(S.init(mem, addr, 2048))
    for i in range(8):
        size = int(S.add(mem, addr, size, b"name%d" % i, 1024 + i, 1, 4096))
    good = fork.bytes
    refused = 0
    for _ in range(400):
        fork.put(damaged(good[:size], rng) + good[size:])
        refused += S.verify(mem, addr, size, 4096, LIMITS) != 0
    assert refused > 100
    fork.put(good)
    assert S.REASONS[S.verify(mem, addr, size - 1, 4096, LIMITS)] != ""
    assert S.REASONS[S.verify(mem, addr, size, 256, LIMITS)] == "larger than a directory block"
