"""What the front counted, as one JSON object: the value of a virtual attribute of the root.

Lanes count for themselves, without atomics, so figures are summed when somebody asks, and those of
a request that is being served may be missing. Per opcode: answered by a lane, parked for trio and
why, forwarded to pyfuse3, malformed; and two histograms of latencies by powers of two, answered in
the lane and finished by trio, both from the moment the request was read. Bucket b holds what took
from 2^b up to 2^(b+1) nanoseconds. Empty parts are left out; the value must fit into 64 KiB.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from fs.front import lanestate as S
from fs.front import wire

if TYPE_CHECKING:
    from fs.front.guard import Gate
    from fs.front.lanes import Lanes

KINDS = ("answered", "parked", "forwarded", "malformed")
PLACES = ("lane", "trio")


def gather(gate: Gate, lanes: Lanes | None) -> dict[str, Any]:
    """All figures of a mount; without lanes there are only those of the gate."""
    front = lanes.front if lanes else None
    figures: dict[str, Any] = {
        "lanes": front.nr_lanes if front else 0,
        "handled": gate.handled,
        "failed": gate.failed,
        "running": len(gate.running),
        "policy": str(gate.vol.arena.policy),
        "allocation_failures": gate.vol.failures.figures(),
        "opcodes": {},
    }
    if lanes is None or front is None or not front.lanes:
        return figures
    figures["latency"] = lanes.latency.figures()
    figures["slots"] = [front.free_slot_count, front.nr_slots]
    figures["payloads"] = [front.free_payload_count, front.nr_payloads]
    figures["unwanted_replies"] = sum(int(lane.me[S.M_UNWANTED]) for lane in front.lanes)
    figures["refused_replies"] = sum(int(lane.me[S.M_REFUSED]) for lane in front.lanes)
    counts, reasons, hist = (
        np.sum([getattr(lane, name) for lane in front.lanes], axis=0)
        for name in ("counts", "reasons", "hist")
    )
    for opcode in np.flatnonzero(counts.any(axis=1)).tolist():
        name = wire.NAMES.get(opcode, f"opcode {opcode}")
        found = _opcode(counts[opcode], reasons[opcode], hist[opcode])
        known = figures["opcodes"].get(name)
        figures["opcodes"][name] = _sum(known, found) if known else found
    return figures


def _opcode(counts: Any, reasons: Any, hist: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        kind: int(n) for kind, n in zip(KINDS, counts.tolist(), strict=True) if n
    }
    why = {name: n for name, n in zip(S.REASONS, reasons.tolist(), strict=False) if n}
    if why:
        found["reasons"] = why
    for place, row in zip(PLACES, hist.tolist(), strict=True):
        buckets = {str(bucket): n for bucket, n in enumerate(row) if n}
        if buckets:
            found[f"{place}_ns"] = buckets
    return found


def _sum(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Two opcodes of one name."""
    out = dict(left)
    for key, value in right.items():
        if isinstance(value, dict):
            out[key] = _sum(out.get(key, {}), value)
        else:
            out[key] = out.get(key, 0) + value
    return out


def encode(figures: dict[str, Any]) -> bytes:
    """The attribute's value."""
    return json.dumps(figures, separators=(",", ":")).encode()
