"""The arena on the machine's nodes: mbind(2), as far as this machine has any."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from alloc import hostnodes
from alloc.arena import Arena
from alloc.topology import topology

MIB = 1 << 20


def test_lists_of_nodes() -> None:
    assert hostnodes.parse("0\n") == [0]
    assert hostnodes.parse("0-2,5,7-8") == [0, 1, 2, 5, 7, 8]
    assert hostnodes.parse("\n") == []


def test_memory_is_asked_for_on_a_node() -> None:
    """The kernel writes policy and place of each mapping into numa_maps."""
    memory = mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.uint8)
    node = hostnodes.online()[0]
    try:
        hostnodes.prefer(array.ctypes.data, 2 * MIB, node)
    except OSError as error:
        pytest.skip(f"no mbind(2) here: {error}")
    maps = Path("/proc/self/numa_maps")
    if not maps.exists():
        pytest.skip("the kernel has no numa_maps")
    assert f"{array.ctypes.data:x} prefer:{node}" in maps.read_text()
    with pytest.raises(OSError, match="node 999"):
        hostnodes.prefer(array.ctypes.data, 2 * MIB, 999)


def test_each_span_goes_to_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(hostnodes, "prefer", lambda *call: calls.append(call))
    monkeypatch.setattr(hostnodes, "online", lambda: [0, 2, 3])
    arena = Arena(20 * MIB, nodes=topology(2))
    start = arena.mem.ctypes.data
    assert calls == [(start, 12 * MIB, 0), (start + 12 * MIB, 8 * MIB, 2)]
    arena.close()
    calls.clear()
    Arena(8 * MIB).close()
    Arena(32 * MIB, nodes=topology(4)).close()
    assert not calls, "one node, or more than the machine has"


def test_a_machine_with_nodes_has_them_used() -> None:
    nodes = hostnodes.online()
    if len(nodes) < 2:
        pytest.skip("this machine has one node")
    arena = Arena(16 * MIB, nodes=topology(2))
    assert f"prefer:{nodes[1]}" in Path("/proc/self/numa_maps").read_text()
    arena.close()
