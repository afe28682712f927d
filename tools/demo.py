"""The demonstration that `make demo` runs: the whole path from fio to the image and back.

A scratch XFS image in memory is formatted by mkfs.xfs and mounted; fio writes and verifies on it
and on a tmpfs beside it; the other jobs follow for a comparison; then the image is unmounted and
`xfs_repair -n` judges it. Says what it does as it goes, and what was found at the end.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from tools import compare
from tools.progress import Progress
from tools.targets import (
    OurMount,
    find_tool,
    make_image,
    ours,
    repair,
    run,
    scratch_dir,
    size_of,
    tmpfs,
)

JOBS = ("randread-4k", "randwrite-4k", "seqread-1m", "seqwrite-1m")


def _plan(size: str, memory: str, cache: str, runtime_s: int) -> compare.Plan:
    image = size_of(size)
    # four verifying jobs must fit, and should be more than the memory so that reclaim works
    each = min(size_of(memory), image // 8)
    return compare.Plan(["verify", *JOBS], runtime_s, each, memory, cache, image)


def _work(plan: compare.Plan, scratch: Path, console: Console) -> tuple[list[compare.Row], int]:
    """Mount, run everything, unmount; returns the table and the daemon's peak RSS in KiB."""
    with ExitStack() as stack:
        mount: OurMount = stack.enter_context(
            ours(scratch / "demo.img", scratch / "mnt", plan.memory, plan.cache)
        )
        console.print(f"mounted at {mount.path} ({mount.note})", highlight=False)
        console.print(run("df", "-h", mount.path).rstrip(), highlight=False)
        beside = stack.enter_context(tmpfs(scratch / "tmpfs"))
        with Progress("demo", 2 * len(plan.jobs)) as bar:
            rows = compare.run_jobs(plan, [mount, beside], bar)
        return rows, mount.peak_rss_kib()


def demo(size: str, memory: str, cache: str, runtime_s: int) -> bool:
    """Run the demonstration; True when nothing was wrong."""
    console = Console(width=None if Console().is_terminal else 120)
    plan = _plan(size, memory, cache, runtime_s)
    for tool in ("mkfs.xfs", "fio", "xfs_repair"):
        find_tool(tool)
    with scratch_dir(2 * plan.image_size) as scratch:
        image = make_image(scratch / "demo.img", plan.image_size)
        console.print(f"made {image} with mkfs.xfs, {size}", highlight=False)
        rows, rss_kib = _work(plan, scratch, console)
        console.print("unmounted; the daemon exited with 0", highlight=False)
        clean, text = repair(image)
    compare.show(rows)
    console.print(f"daemon: peak resident size {rss_kib / 1024:.0f} MiB, --memory {memory}")
    verified = rows[0].results["nofailfs"].errors == 0
    console.print("fio verify=crc32c: " + ("no error" if verified else "ERRORS"))
    if not clean:
        console.print(text, markup=False, highlight=False)
    console.print("xfs_repair -n: " + ("clean" if clean else "found errors, see above"))
    return clean and not any(row.errors for row in rows)
