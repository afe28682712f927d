"""The mixed run must find planted differences; two equal file systems must have none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import mixed


@pytest.fixture
def pair(scratch: Path) -> tuple[bytes, bytes]:
    probe = scratch / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.probe", b"1")
    except OSError:
        pytest.skip("this file system has no user attributes")
    for name in ("ours", "mirror"):
        (scratch / name).mkdir()
    return os.fsencode(scratch / "ours"), os.fsencode(scratch / "mirror")


def test_equal_file_systems_have_no_difference(pair: tuple[bytes, bytes]) -> None:
    run = mixed.Mixed(*pair, seed=5)
    run.run(1500)
    run.finish()
    assert set(run.counts) == set(mixed.WEIGHTS)
    assert run.failures > 100


@pytest.mark.parametrize("call", ["mkdir", "unlink", "rename", "truncate", "symlink", "chmod"])
def test_a_lost_change_is_found(
    pair: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real, count = getattr(os, call), [0]

    def lossy(path: bytes, *rest: object, **more: object) -> object:
        where = rest[0] if call == "symlink" else path
        if isinstance(where, bytes) and where.startswith(pair[0]):
            count[0] += 1
            if count[0] == 8:
                return None
        return real(path, *rest, **more)

    monkeypatch.setattr(mixed.os, call, lossy)
    run = mixed.Mixed(*pair, seed=6)
    with pytest.raises(mixed.Difference, match="seed 6, operation"):
        run.run(1500)
        run.finish()


def test_a_lost_attribute_is_found(
    pair: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed.os, "setxattr", lambda *words, **more: None)
    with pytest.raises(mixed.Difference, match="xattr"):
        mixed.Mixed(*pair, seed=7).run(1500)
