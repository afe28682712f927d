"""Mixed operations on our mount, mirrored on a tmpfs; the kernel's XFS must find the same tree.

20,000 operations for each geometry; NOFAILFS_MIXED_OPS changes that for a quick look, and
NOFAILFS_MIXED_SEED the seed. A difference prints seed, number and text of the operation.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import kernel_tree, support
from tests.mixed import Mixed
from tools.targets import tmpfs

OPS = int(os.environ.get("NOFAILFS_MIXED_OPS", "20000"))
SEED = int(os.environ.get("NOFAILFS_MIXED_SEED", "1"))


@pytest.mark.slow
@support.needs_root
@support.geometries
def test_mixed_operations(scratch: Path, mkfs_args: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *mkfs_args, size=1 << 30)
    with tmpfs(scratch / "tmpfs") as beside:
        mirror = beside.path / "tree"
        mirror.mkdir()
        with support.our_mount(image, scratch / "ours") as mount:
            (mount.path / "tree").mkdir()
            run = Mixed(os.fsencode(mount.path / "tree"), os.fsencode(mirror), SEED)
            run.run(OPS)
            run.finish()
            ours = kernel_tree.snapshot(mount.path / "tree")
            support.assert_small(mount)
        support.assert_clean(image)
        with support.kernel_mount(image, scratch / "kernel", "loop,noatime") as kernel:
            run.ours = os.fsencode(kernel / "tree")
            run.finish()
            assert kernel_tree.diff(ours, kernel_tree.snapshot(kernel / "tree")) == []
