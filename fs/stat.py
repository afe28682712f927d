"""`nofailfs stat`: what a mount's front has done so far, from a virtual attribute of its root.

The daemon answers the attribute with JSON (fs/front/statistics.py); this side shows it. The
percentiles come from histograms by powers of two, so each is the upper end of its bucket: p50 of
8.2 us says that half of the requests took less than 8.2 us.

Must stay importable without numba.
"""

from __future__ import annotations

import json
import os
from typing import Any

from fs import mounts
from fs.errors import UserError

ATTRIBUTE = "user.nofailfs.stat"
EXIT_FAILED = 1
SITES_SHOWN = 20
COLUMNS = "{:<16}{:>12}{:>12}{:>12}{:>10}{:>10}{:>10}{:>10}\n"


def read(mountpoint: str) -> dict[str, Any]:
    """The figures of the mount on `mountpoint`. Raises UserError if it is none of ours."""
    mounted = mounts.find(mountpoint)
    if mounted is None or not mounted.is_fuse:
        raise UserError(f"{mountpoint} is not mounted; name a mount point of nofailfs", EXIT_FAILED)
    try:
        value = os.getxattr(mounted.mountpoint, ATTRIBUTE)
    except OSError as error:
        raise UserError(
            f"{mounted.mountpoint} gives no statistics: {error.strerror}", EXIT_FAILED
        ) from error
    figures: dict[str, Any] = json.loads(value)
    return figures


def percentile(histogram: dict[str, int], share: float) -> int:
    """Nanoseconds that `share` of the requests stayed below; 0 if there were none."""
    total = sum(histogram.values())
    seen = 0
    for bucket in sorted(int(name) for name in histogram):
        seen += histogram[str(bucket)]
        if seen >= share * total:
            return int(2 << bucket)
    return 0


def _time(ns: int) -> str:
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if ns >= size:
            return f"{ns / size:.1f}{unit}"
    return f"{ns}ns" if ns else "-"


def failures_text(policy: str, failures: dict[str, dict[str, int]]) -> str:
    """Failed allocations by end and site; nothing under the policy that has none."""
    if policy == "irix":
        return ""
    out = f"policy {policy}, allocations failed: "
    out += ", ".join(f"{end} {sum(sites.values())}" for end, sites in failures.items()) or "none"
    for end, sites in failures.items():
        for site, n in sorted(sites.items(), key=lambda item: -item[1])[:SITES_SHOWN]:
            out += f"\n    {end}: {n} {site}"
    return out + "\n"


def text(figures: dict[str, Any]) -> str:
    """The figures as a table, one opcode a line."""
    out = f"lanes {figures['lanes']}, handled by trio {figures['handled']}"
    out += f", running {figures['running']}, failed {figures['failed']}\n"
    if "slots" in figures:
        free, slots = figures["slots"]
        free_payloads, payloads = figures["payloads"]
        out += f"slots {free} free of {slots}, payloads {free_payloads} free of {payloads}"
        out += f", replies unwanted {figures['unwanted_replies']}"
        out += f", refused {figures['refused_replies']}\n"
    if latency := figures.get("latency"):
        out += f"latency {latency['state']}, held {latency['times']} times"
        out += f", {latency['seconds']:.1f} s in all\n"
    out += failures_text(figures["policy"], figures["allocation_failures"])
    if not figures["opcodes"]:
        return out
    out += COLUMNS.format("", "answered", "parked", "forwarded", *("p50", "p99") * 2)
    for name, row in sorted(figures["opcodes"].items()):
        numbers = [row.get(kind, 0) for kind in ("answered", "parked", "forwarded")]
        times = [
            _time(percentile(row.get(place, {}), share))
            for place in ("lane_ns", "trio_ns")
            for share in (0.5, 0.99)
        ]
        out += COLUMNS.format(name, *numbers, *times)
        if why := row.get("reasons"):
            reasons = ", ".join(f"{reason} {n}" for reason, n in why.items())
            out += f"    parked because of: {reasons}\n"
        if bad := row.get("malformed"):
            out += f"    malformed: {bad}\n"
    return out
