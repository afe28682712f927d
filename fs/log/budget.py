"""What each of our transactions may put into the log: its name's need, in bytes of log vectors.

XFS's formulas (fs/log/reservation.py) do not fit us as they are: they count two blocks a level of
a tree where we log whole ones (a split or a join also logs the sibling behind, for its link), and
they count frees that roll into other transactions, where ours free at once. So we count our own
edits, at their very worst, and take that as far as an eighth of the log goes, so that several such
transactions find room in any log; and XFS's formula where that is more.

Many steps in one transaction (extents that are unmapped, shifted or converted) are bounded by a
`step`: after each, the loop goes on in this transaction only if the ticket still has a step.

One edit is a record that comes or goes. Every change of free space refills the AG's free list,
by one extent: it is short by what the change before it took. Inode clusters are logged whole at
most; new ones are ordered, and cost an ICREATE. A freed block costs a CANCEL, never more than the
block that it is counted as.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fs.log.reservation import DA_DEPTH, Costs, table, unit_bytes
from fs.xfs.geometry import Geometry
from fs.xfs.inode import ATTR, DATA

LOG_SHARE = 8  # no transaction takes more than this part of the log, unless XFS's does
VALUE_MAX = 1 << 16  # bytes of the largest attribute
SYMLINK_EXTENTS = 3
CANCELS = 1024  # freed blocks of one directory extent
ATTRIBUTE_BLOCKS = 14  # new tree blocks of one attribute (fs/xfs/attr.py: TREE_BLOCKS)
SPARSE_PIECES = 8  # runs of blocks of one sparse chunk
STEPS = 4  # worst ones that a loop's ticket has room for: hundreds of those that happen


class Need(NamedTuple):
    """`payload` bytes in all; `step` of them for each turn of the transaction's loop, 0: no loop.

    A loop goes on while the ticket has `step` bytes left; the first turn needs no look.
    """

    payload: int
    step: int = 0


class Worst(Costs):
    """Bytes that our code logs when everything splits or joins that can."""

    # -- trees ----------------------------------------------------------------------------------

    @staticmethod
    def edit(levels: int) -> int:
        """Blocks: on each level below the root a block, its new or lost sibling, and the next."""
        return 3 * levels - 2

    def change(self) -> int:
        """Blocks of one AG are allocated or freed.

        Merging with both neighbours is two edits by place and three by length; the refill of the
        free list one and two. The reverse map forgets or learns an owner, and the free list's.
        """
        n = 8 * self.edit(self.alloc_levels)
        if self.geo.has_rmap:
            n += 3 * self.edit(self.rmap_levels)
        return self.sectors(2) + self.blocks(n)

    def tall(self, fork: int) -> int:
        """Every level of a fork's tree splits or joins, once in a transaction; the inode."""
        below = self.fork_levels[fork] - 1
        return self.inodes(1) + self.blocks(3 * below) + below * self.change()

    def record(self, fork: int) -> int:
        """An edit of a fork's tree beside that: a leaf, and keys above it."""
        return self.blocks(3 + self.fork_levels[fork] - 1) + self.change()

    def shared(self) -> int:
        """Blocks of equal count get one owner more or less: a record, its ends, its neighbours."""
        if not self.geo.has_reflink:
            return 0
        tree = self.blocks(3 * self.edit(self.refcount_levels))
        return tree + (self.refcount_levels + 1) * self.change()

    def owned(self) -> int:
        """The reverse map alone changes, after a refill."""
        return self.change() if self.geo.has_rmap else 0

    # -- steps ----------------------------------------------------------------------------------

    def unmap(self) -> int:
        """One extent of data, or the part that has one count, is unmapped and freed."""
        return 2 * self.record(DATA) + self.owned() + self.shared() + self.change()

    def unmap_attr(self) -> int:
        """One extent of an attribute fork, with a CANCEL for each block of a value."""
        cancels = self.buffers(VALUE_MAX // self.block + 1, 0)
        return 2 * self.record(ATTR) + self.change() + cancels

    def shift(self) -> int:
        """One extent moves, merges, and is known as another part of the file."""
        return 2 * self.record(DATA) + 2 * self.owned()

    def convert(self) -> int:
        """One extent becomes written, or a copy takes its place."""
        copied = self.unmap() + self.leftover() + self.owned()
        return self.record(DATA) + self.owned() + max(copied, 2 * self.record(DATA))

    # -- inodes ---------------------------------------------------------------------------------

    def chunk(self) -> int:
        """Inodes come or go: blocks, records in both trees, whose blocks are allocated."""
        records = max(1, self.geo.chunk_inodes // 64)
        trees = 1 + self.geo.has_finobt
        grown = trees * (self.inode_levels + records)
        edits = self.blocks(trees * (self.edit(self.inode_levels) + 3 * records))
        headers = self.sectors(1) + self.buffers(self.geo.chunk_blocks, 0)
        return headers + edits + (grown + 1) * self.change()

    def new_inode(self) -> int:
        return self.inodes(1) + self.chunk()

    def inactive(self) -> int:
        """The inode, its neighbours on the unlinked list, its record, its chunk if it was last."""
        pieces = SPARSE_PIECES if self.geo.has_sparse else 1
        return self.inodes(1) + self.unlink_remove + self.chunk() + (pieces - 1) * self.change()

    # -- directories ----------------------------------------------------------------------------

    def entry(self) -> int:
        """A name comes or goes: a data and a free block, each perhaps new or gone; the hashes.

        Of these a new root and three a level. A block that is new or lost may be in pieces.
        """
        each = self.geo.dir_block_blocks
        touched = self.blocks((4 + 3 * DA_DEPTH + 1) * each)
        extents = (DA_DEPTH + 3) * each
        return touched + self.tall(DATA) + extents * (self.record(DATA) + self.change())

    def pushed_out(self) -> int:
        """A shortform moves into a block, because of an inode number or an attribute fork."""
        extents = self.geo.dir_block_blocks
        block = self.blocks(extents)
        return block + self.tall(DATA) + extents * (self.record(DATA) + self.change())

    def target(self) -> int:
        """A symbolic link's target in blocks."""
        extents = self.buffers(SYMLINK_EXTENTS, self.block)
        return extents + SYMLINK_EXTENTS * (self.record(DATA) + self.change())

    def make(self) -> int:
        return self.inodes(1) + self.new_inode() + self.entry() + self.target()

    def make_link(self) -> int:
        return self.inodes(2) + self.entry() + self.unlink_remove

    def take_away(self) -> int:
        return self.inodes(2) + self.entry() + self.unlink_add

    def move(self) -> int:
        """A name comes and one goes; both ".." may grow; what is replaced is unlinked."""
        names = 2 * self.entry() + 3 * self.pushed_out()
        return self.inodes(5) + names + self.unlink_add + self.new_inode()

    # -- names that are resident: no block comes or goes ------------------------------------------

    def records(self) -> int:
        """An inode's records change where they are, and the keys above them."""
        return self.sectors(1) + self.blocks((1 + self.geo.has_finobt) * self.inode_levels)

    def resident_entry(self) -> int:
        return self.inodes(2) + self.blocks((DA_DEPTH + 2) * self.geo.dir_block_blocks)

    def make_now(self) -> int:
        return self.resident_entry() + self.records()

    def take_away_now(self) -> int:
        return self.resident_entry() + self.unlink_add

    def free_now(self) -> int:
        return self.inodes(1) + self.records() + self.unlink_remove

    # -- data and attributes ----------------------------------------------------------------------

    def allocate(self) -> int:
        """One extent, which may join both neighbours."""
        return self.tall(DATA) + 2 * self.record(DATA) + self.change() + self.owned()

    def reflink(self) -> int:
        """Beside unmapping: one extent is shared."""
        mapped = self.tall(DATA) + 2 * self.record(DATA)
        return self.inodes(1) + mapped + self.shared() + self.owned()

    def set_attribute(self) -> int:
        """A leaf or node splits on each level, the value has extents, the data fork gives way."""
        extents = ATTRIBUTE_BLOCKS + VALUE_MAX // self.block + 1
        tree = self.tall(ATTR) + extents * (self.record(ATTR) + self.change())
        return tree + self.blocks(3 * DA_DEPTH + 1) + self.pushed_out() + self.target()

    def flip(self) -> int:
        return self.inodes(1) + self.blocks(2)

    def remove_attribute(self) -> int:
        """Leaves and nodes join on each level."""
        extents = DA_DEPTH + 1
        tree = self.tall(ATTR) + extents * (self.record(ATTR) + self.change())
        return tree + self.blocks(3 * DA_DEPTH + 1)

    def forget_directory(self) -> int:
        return self.tall(DATA) + self.unmap() + self.buffers(CANCELS, 0)

    def intent(self) -> int:
        """One intent of recovery."""
        return self.tall(DATA) + 2 * self.record(DATA) + self.shared() + self.change()

    def leftover(self) -> int:
        return self.shared() + self.change()

    def superblocks(self) -> int:
        """The label stands in all of them."""
        return self.sectors(self.geo.agcount)

    def core(self) -> int:
        return self.inodes(1)

    def nothing(self) -> int:
        return 0

    def tall_data(self) -> int:
        return self.tall(DATA)

    def tall_attr(self) -> int:
        return self.tall(ATTR)

    def forget_target(self) -> int:
        return self.tall(DATA) + SYMLINK_EXTENTS * self.unmap()


class Plan(NamedTuple):
    """What bounds a transaction: XFS's kind, our worst case, and what a step of its loop adds."""

    kind: str
    base: Callable[[Worst], int]
    step: Callable[[Worst], int] = Worst.nothing


# Each name that is given to `Volume.transaction`, and those of changes that wait for nothing.
PLANS: dict[str, Plan] = {
    "acl_chmod": Plan("ichange", Worst.core),
    "allocate": Plan("write", Worst.allocate),
    "attr_flip": Plan("attrsetm", Worst.flip),
    "attr_inactive": Plan("attrinval", Worst.tall_attr, Worst.unmap_attr),
    "attr_rm": Plan("attrrm", Worst.remove_attribute, Worst.unmap_attr),
    "attr_set": Plan("attrsetm", Worst.set_attribute),
    "collapse": Plan("itruncate", Worst.tall_data, Worst.shift),
    "copy on write": Plan("write", Worst.leftover),
    "copy on write, cancelled": Plan("itruncate", Worst.nothing, Worst.leftover),
    "cow leftovers": Plan("write", Worst.leftover),
    "create": Plan("symlink", Worst.make),
    "create now": Plan("ichange", Worst.make_now),
    "dir_inactive": Plan("itruncate", Worst.forget_directory),
    "free eofblocks": Plan("itruncate", Worst.tall_data, Worst.unmap),
    "inactive": Plan("ifree", Worst.inactive),
    "inactive now": Plan("ichange", Worst.free_now),
    "insert": Plan("itruncate", Worst.tall_data, Worst.shift),
    "intent": Plan("itruncate", Worst.intent),
    "ioctl_setattr": Plan("ichange", Worst.core),
    "ioend": Plan("write", Worst.tall_data, Worst.convert),
    "link": Plan("link", Worst.make_link),
    "punch": Plan("itruncate", Worst.tall_data, Worst.unmap),
    "reflink": Plan("itruncate", Worst.reflink, Worst.unmap),
    "remove": Plan("remove", Worst.take_away),
    "remove now": Plan("ichange", Worst.take_away_now),
    "remove privileges": Plan("ichange", Worst.core),
    "rename": Plan("rename", Worst.move),
    "rmdir": Plan("remove", Worst.take_away),
    "sb": Plan("sb", Worst.superblocks),
    "setattr": Plan("ichange", Worst.core),
    "symlink_inactive": Plan("itruncate", Worst.forget_target),
    "time stamps": Plan("ichange", Worst.core),
    "tmpfile": Plan("tmpfile", lambda costs: costs.new_inode() + costs.unlink_add),
    "truncate": Plan("itruncate", Worst.tall_data, Worst.unmap),
    "truncate up": Plan("ichange", Worst.core),
    "update_time": Plan("ichange", Worst.core),
    "writeback allocation": Plan("write", Worst.allocate),
}


class Budget:
    """The needs of all transactions on one image. Immutable."""

    def __init__(self, geo: Geometry) -> None:
        share = (geo.log_blocks << geo.block_log) // LOG_SHARE
        share -= unit_bytes(geo, share) - share
        costs, known = Worst(geo), table(geo)
        self._needs = {
            name: _need(plan, costs, known[plan.kind].logres, share) for name, plan in PLANS.items()
        }

    def need(self, name: str) -> Need:
        """What a transaction of this name may log. A name that is not in the table is a bug."""
        return self._needs[name]


def _need(plan: Plan, costs: Worst, least: int, share: int) -> Need:
    """The worst case, as far as the log's share goes; never less than XFS's own."""
    base, step = plan.base(costs), plan.step(costs)
    most = max(least, share)
    return Need(max(least, min(base + STEPS * step, most)), min(step, most))
