"""The model of a slower device: when requests are done, by a mock clock, and what changes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from fs import file
from fs.device.image import Memory
from fs.device.model import BURST_S, Model, parse
from fs.device.modeled import Modeled
from fs.front import sysctl
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import SlowImage, a_file

MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[Memory]:
    device = Memory(64 * MIB)
    yield device
    device.close()


def test_words() -> None:
    assert parse("bw=50M,iops=100,lat=2ms,jitter=500us,seed=7") == Model(
        50 * MIB, 100, 2000, 500, 7
    )
    assert parse("lat=1s").lat_us == 1_000_000
    for wrong in ("", "bw", "bw=", "bw=1x", "lat=1", "speed=1", "seed=-1", "bw=1,bw=1"):
        with pytest.raises(ValueError, match="device"):
            parse(wrong)


def test_requests_stand_in_line_and_latencies_do_not() -> None:
    model = Model(bw=MIB, lat_us=1000)
    assert [model.finish(10.0, MIB) for _ in range(3)] == pytest.approx(
        [11.001 - BURST_S, 12.001 - BURST_S, 13.001 - BURST_S]
    )
    model.bw = 10 * MIB
    assert model.finish(12.0, MIB) == pytest.approx(13.101 - BURST_S)
    assert model.finish(100.0, MIB) == pytest.approx(100.101 - BURST_S)
    assert Model(iops=10).finish(1.0, 4096) == pytest.approx(1.1 - BURST_S)
    assert Model().finish(5.0, MIB) == 5.0


def test_jitter_comes_from_the_seed() -> None:
    def times(seed: int) -> list[float]:
        model = Model(lat_us=1000, jitter_us=500, seed=seed)
        return [model.finish(0.0, 4096) for _ in range(100)]

    assert times(1) == times(1) != times(2)
    assert 0.0005 <= min(times(1)) < 0.0007
    assert 0.0013 < max(times(1)) <= 0.0015


async def test_transfers_take_their_time(
    memory: Memory, autojump_clock: trio.testing.MockClock
) -> None:
    device = Modeled(memory, Model(bw=MIB, lat_us=2000))
    await trio.sleep(1)
    began = trio.current_time()
    await device.write(0, [memoryview(bytes(MIB))] * 2)
    assert trio.current_time() - began == pytest.approx(2.002 - BURST_S)
    target = bytearray(MIB)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(device.read_all, [(0, [memoryview(target)])])
    assert trio.current_time() - began == pytest.approx(6.002 - BURST_S)
    before = trio.current_time()
    await device.flush()
    assert trio.current_time() - before == pytest.approx(0.002)


async def test_a_volume_on_it_can_be_made_faster(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    image = SlowImage(support.mkfs(scratch))
    async with Volume.open(Modeled(image, Model(bw=MIB)), 16 << 20) as vol, a_file(vol) as ip:
        tunables = sysctl.tunables(vol)
        times = []
        for bw in (MIB, 8 * MIB):
            await sysctl.write(tunables["device/bw"], str(bw).encode())
            assert tunables["device/bw"].read() == bw
            await file.write(vol, ip, 0, bytes(MIB))
            began = trio.current_time()
            await file.fsync(vol, ip)
            times.append(trio.current_time() - began)
        assert times[0] == pytest.approx(1, abs=0.2)
        assert times[1] == pytest.approx(0.125, abs=0.1)
    image.close()


def test_other_devices_have_no_such_tunables(scratch: Path) -> None:
    async def names() -> list[str]:
        image = SlowImage(support.mkfs(scratch))
        async with Volume.open(image, 16 << 20) as vol:
            found = [name for name in sysctl.tunables(vol) if name.startswith("device")]
        image.close()
        return found

    assert trio.run(names) == []
