"""A device that takes its time: another one, and a model of how fast it is.

For experiments: what the device beneath does in microseconds is done when the model says. Requests
count from the moment of the call, by trio's clock; discards cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from fs.device.base import Device, Views
from fs.device.model import Model


class Modeled:
    """A device as fast as its model."""

    def __init__(self, inner: Device, model: Model) -> None:
        self.inner = inner
        self.model = model
        self.name = inner.name
        self.size = inner.size
        self.read_only = inner.read_only

    def _finish(self, views: Views) -> float:
        return self.model.finish(trio.current_time(), sum(view.nbytes for view in views))

    async def read(self, offset: int, views: Views) -> None:
        done = self._finish(views)
        await self.inner.read(offset, views)
        await trio.sleep_until(done)

    async def read_all(self, requests: Sequence[tuple[int, Views]]) -> None:
        done = [self._finish(views) for _, views in requests]
        await self.inner.read_all(requests)
        await trio.sleep_until(max(done, default=0.0))

    async def write(self, offset: int, views: Views) -> None:
        done = self._finish(views)
        await self.inner.write(offset, views)
        await trio.sleep_until(done)

    async def discard(self, offset: int, length: int) -> None:
        await self.inner.discard(offset, length)

    async def flush(self) -> None:
        done = self._finish(())
        await self.inner.flush()
        await trio.sleep_until(done)

    def close(self) -> None:
        self.inner.close()
