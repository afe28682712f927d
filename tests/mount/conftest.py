"""Fixtures of the tests that mount."""

from __future__ import annotations

import pytest

from fs import tuning


@pytest.fixture
def uring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounts that do not say otherwise use FUSE over io_uring; skipped where there is none."""
    if why := tuning.uring_hindrance():
        pytest.skip(why)
    monkeypatch.setenv(tuning.TRANSPORT_VARIABLE, "uring")
    monkeypatch.setenv(tuning.LANES_VARIABLE, "2")  # it needs them, whatever the others use


@pytest.fixture(params=["device", "uring"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once with each way in which requests come."""
    chosen: str = request.param
    if chosen == "uring":
        request.getfixturevalue("uring")
    monkeypatch.setenv(tuning.TRANSPORT_VARIABLE, chosen)
    return chosen
