"""Every form of the format through the mount: ours reads the kernel's tree, the kernel reads ours.

The tree is tests/kernel_tree.py's: all directory, fork, attribute and link forms, odd names, owners
and stamps. What FUSE cannot carry (clone, punch) leaves its files out of the tree made by us.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernel_tree import Hints, diff, make_tree, snapshot
from tests.support import GEOMETRIES, assert_clean, kernel_mount, mkfs, needs_root, our_mount

HINTS = {
    "1k blocks": Hints(1024, 4096, extents=300),
    "64k blocks": Hints(65536, 65536, node=False, extents=100),
    "8k directories": Hints(4096, 8192, extents=300),
}


@needs_root
@pytest.mark.parametrize("name", GEOMETRIES)
def test_both_ways(scratch: Path, name: str) -> None:
    image = mkfs(scratch, *GEOMETRIES[name])
    ours, kernel = scratch / "ours", scratch / "kernel"
    hints = HINTS.get(name, Hints(extents=300))
    with kernel_mount(image, kernel):
        (kernel / "theirs").mkdir()
        make_tree(kernel / "theirs", 5, hints)
        theirs = snapshot(kernel / "theirs")
    with our_mount(image, ours) as mount:
        assert diff(theirs, snapshot(mount.path / "theirs")) == []
        (mount.path / "ours").mkdir()
        make_tree(mount.path / "ours", 6, hints)
        made = snapshot(mount.path / "ours")
    assert_clean(image)
    with kernel_mount(image, kernel, "loop,ro"):
        assert diff(made, snapshot(kernel / "ours")) == []
        assert diff(theirs, snapshot(kernel / "theirs")) == []
