"""The latency request: held after a burst of requests, given up in calm, never without the option.

The device is a file of the test; whether it is held is what /proc says of our own descriptors. The
lanes' counts are words that the test moves; the clock jumps.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fs.front import lanestate as S
from fs.front import latency
from fs.front.latency import KEEP, LOOK_S, Latency

LOG = logging.getLogger("nofailfs")
BUSY, CALM = int(KEEP * LOOK_S), int(KEEP * LOOK_S) - 1  # requests between two looks


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cpu_dma_latency"
    path.touch()
    monkeypatch.setattr(latency, "DEVICE", path)
    return path


def front(lanes: int = 2) -> Any:
    """What the request needs of a mount's front: its control words and the lanes' counts."""
    made = [SimpleNamespace(me=np.zeros(S.M_WORDS, np.int64)) for _ in range(lanes + 1)]
    return SimpleNamespace(control=np.zeros(S.C_WORDS, np.int64), nr_lanes=lanes, lanes=made)


def held(path: Path) -> int:
    """How many descriptors of this process hold `path`."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}") == str(path)
        except FileNotFoundError:
            pass  # the one that listed
    return found


@asynccontextmanager
async def running(made: Latency) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


async def test_held_while_requests_come_quickly(device: Path, autojump_clock: MockClock) -> None:
    place = front()
    made = Latency(place, "on", LOG)
    assert held(device) == 0
    async with running(made):
        await trio.sleep(10)
        assert (held(device), made.times) == (0, 0)
        assert place.control[S.C_BUSY_NS] > 0, "lanes do not ring"
        for turn in (1, 2):
            os.truncate(device, 0)
            made.hasten()
            await trio.sleep(LOOK_S / 2)
            assert device.read_bytes() == bytes(4), "what was asked for is not 0 as 32 bits"
            for number in range(10):
                assert held(device) == 1
                assert place.control[S.C_BUSY_NS] == 0, "lanes ring although it is held"
                place.lanes[number % 2].me[S.M_TURNS] += BUSY
                await trio.sleep(LOOK_S)
            place.lanes[0].me[S.M_TURNS] += CALM
            await trio.sleep(LOOK_S)
            assert (held(device), made.times) == (0, turn)
            assert place.control[S.C_BUSY_NS] > 0
            await trio.sleep(10)
            assert held(device) == 0
    assert made.seconds == pytest.approx(2 * 11 * LOOK_S)
    assert made.figures() == {"state": "on", "times": 2, "seconds": round(22 * LOOK_S, 3)}


async def test_the_end_of_the_mount_gives_it_up(device: Path, autojump_clock: MockClock) -> None:
    place = front()
    made = Latency(place, "on", LOG)
    async with running(made):
        made.hasten()
        await trio.sleep(LOOK_S / 2)
        assert held(device) == 1
        assert made.seconds == pytest.approx(LOOK_S / 2)
    assert held(device) == 0
    assert place.control[S.C_BUSY_NS] == 0


@pytest.mark.parametrize("mode", ["off", "auto"])
async def test_off_opens_nothing(
    device: Path, mode: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """Also `auto` where halting is the processor's own affair."""
    monkeypatch.setattr(latency, "is_virtual", lambda: False)
    place = front()
    made = Latency(place, mode, LOG)
    async with running(made):
        made.hasten()
        await trio.sleep(LOOK_S / 2)
        assert (held(device), device.stat().st_size) == (0, 0)
        assert place.control[S.C_BUSY_NS] == 0, "a lane would ring for nothing"
    assert made.figures() == {"state": "off", "times": 0, "seconds": 0}


async def test_no_device_is_no_error(
    tmp_path: Path,
    device: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,
) -> None:
    """Neither at the start nor later; it is said once."""
    gone = Latency(front(), "on", LOG)
    assert gone.state == "on"
    monkeypatch.setattr(latency, "DEVICE", tmp_path / "none")
    with caplog.at_level(logging.INFO, "nofailfs"):
        async with running(gone):
            gone.hasten()
            await trio.sleep(1)
            gone.hasten()
            await trio.sleep(1)
        place = front()
        never = Latency(place, "on", LOG)
        async with running(never):
            never.hasten()
            await trio.sleep(1)
            assert place.control[S.C_BUSY_NS] == 0
    assert (gone.state, gone.times) == ("unavailable", 0)
    assert (never.state, never.times) == ("unavailable", 0)
    said = [r for r in caplog.records if "idle processors" in r.getMessage()]
    assert [r.levelno for r in said] == [logging.INFO, logging.INFO]


def test_what_a_virtual_processor_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "current_driver"
    monkeypatch.setattr(latency, "IDLE_DRIVER", driver)
    assert not latency.is_virtual()
    for name, virtual in (("haltpoll", True), ("intel_idle", False), ("none", False)):
        driver.write_text(f"{name}\n")
        assert latency.is_virtual() == virtual
