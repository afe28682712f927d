"""The exerciser itself: it must find planted faults, say where, and find them again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import support
from tools import fsx

SMALL = {"ops": 300, "file_max": 1 << 18, "io_max": 1 << 14, "whole_every": 100, "quiet": True}


def options(**changes: object) -> fsx.Options:
    return fsx.Options(**{**SMALL, **changes})  # type: ignore[arg-type]


def test_a_good_file_system_has_no_difference(scratch: Path) -> None:
    result = fsx.exercise(scratch / "file", options(seed=3))
    assert result.problem == ""
    assert result.done == 300
    assert not (scratch / "file").exists()


def test_the_seed_alone_decides_the_operations(scratch: Path) -> None:
    logs = []
    refused = fsx.probe(scratch / "file") | {"zero"}
    for name in ("one", "two"):
        run = fsx.Run(scratch / name, options(seed=9), refused)
        assert run.execute(run.planned()).problem == ""
        logs.append(run.log)
    assert logs[0] == logs[1]
    other = fsx.Run(scratch / "three", options(seed=10), refused)
    other.execute(other.planned())
    assert other.log != logs[0]


def break_write(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Plant a fault in the 40th write."""
    real, count = os.pwrite, [0]

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        count[0] += 1
        if count[0] != 40:
            return real(fd, data, offset)
        if fault == "lost":
            return len(data)
        if fault == "bit":
            return real(fd, bytes([data[0] ^ 1]) + data[1:], offset)
        if fault == "shifted":
            return real(fd, data, offset + 1)
        return real(fd, data[:-1], offset)

    monkeypatch.setattr(fsx.os, "pwrite", pwrite)


@pytest.mark.parametrize("fault", ["lost", "bit", "shifted", "short"])
def test_a_planted_fault_is_found(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.chdir(scratch)
    break_write(monkeypatch, fault)
    settings = options(seed=5, disabled=frozenset({"drop", "mapwrite"}))
    refused = fsx.probe(scratch / "file")
    run = fsx.Run(scratch / "file", settings, refused)
    result = run.execute(run.planned())
    assert result.problem
    assert result.done < 300
    assert str(run.log[-1]) in result.tail[-1]
    text = "\n".join(fsx.report(scratch / "file", settings, result))
    assert "DIFFERENCE" in text
    assert "--seed 5" in text
    assert "--off mapwrite" in text
    monkeypatch.undo()
    monkeypatch.chdir(scratch)
    assert result.log is not None
    again = fsx.replay(scratch / "again", result.log, options())
    assert again.problem == ""  # the fault was in the writer, which is whole again
    assert again.done == result.done


@support.needs_root
def test_the_kernels_xfs_knows_every_operation(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with support.kernel_mount(image, scratch / "mnt") as where:
        result = fsx.exercise(where / "file", options(seed=6, ops=1500))
    assert result.problem == ""
    assert not result.refused


@support.needs_root
@pytest.mark.parametrize("name", ["collapse", "insert", "copy", "zero", "punch"])
def test_a_lost_shift_or_copy_is_found(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(scratch)
    image = support.mkfs(scratch)
    with support.kernel_mount(image, scratch / "mnt") as where:
        settings = options(seed=6, ops=1500)
        run = fsx.Run(where / "file", settings, fsx.probe(where / "file"))
        monkeypatch.setattr(fsx, "fallocate", lambda fd, mode, offset, length: None)
        monkeypatch.setattr(fsx.os, "copy_file_range", lambda a, b, length, at, to: length)
        result = run.execute(step for step in run.planned() if step.name in ("write", name))
    assert result.problem


def test_a_stop_keeps_the_file(scratch: Path) -> None:
    result = fsx.exercise(scratch / "file", options(seed=3, stop_at=50))
    assert result.done == 50
    assert (scratch / "file").exists()


def test_a_wrong_size_is_found(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scratch)
    monkeypatch.setattr(fsx.os, "ftruncate", lambda fd, size: None)
    result = fsx.exercise(scratch / "file", options(seed=4))
    assert result.problem


@given(
    st.builds(
        fsx.Step,
        st.sampled_from(sorted(fsx.ACTIONS)),
        st.integers(0, 2**40),
        st.integers(0, 2**30),
        st.integers(0, 2**40),
    )
)
def test_steps_survive_their_log(step: fsx.Step) -> None:
    assert fsx.Step.parse(str(step)) == step


@given(st.integers(0, 2**31), st.integers(0, 2**20), st.integers(1, 100))
def test_a_pattern_is_a_window_of_the_file_wide_one(number: int, offset: int, length: int) -> None:
    whole = fsx.pattern(number, offset & ~7, length + 16)
    assert fsx.pattern(number, offset, length) == whole[offset & 7 :][:length]


def test_a_word_names_its_writer() -> None:
    assert "operation 77" in fsx.writer_of(fsx.pattern(77, 801, 40), 801)
    assert fsx.writer_of(bytes(16), 0) == "zeros"
