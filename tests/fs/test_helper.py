"""How mount(8) and mount.fuse3 call the program, and what doctor says."""

from __future__ import annotations

from pathlib import Path

import pytest

from fs import cli, doctor, helper
from fs.errors import UserError
from fs.front import options as grammar

COMMANDS = {"mount", "umount", "info"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a /mnt -o rw,dev,suid", "mount a /mnt -o rw,dev,suid"),
        ("a /mnt -s -o rw -n", "mount a /mnt -o rw"),
        ("mount a /mnt", "mount a /mnt"),
        ("info a", "info a"),
        ("--help", "--help"),
        ("nonsense", "nonsense"),
        ("", ""),
    ],
)
def test_an_image_in_front_means_mount(words: str, expected: str) -> None:
    assert helper.arguments("nofailfs", words.split(), COMMANDS) == expected.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a /mnt -o rw,ro", "mount a /mnt -o rw,ro"),
        ("a /mnt -sn -o rw -t fuse.nofailfs", "mount -o subtype=nofailfs a /mnt -o rw"),
        ("a /mnt -t fuse", "mount -o subtype= a /mnt"),
        ("a /mnt -f -v", "mount a /mnt --fake -v"),
        ("info /mnt -o x", "mount info /mnt -o x"),
    ],
)
def test_the_mount_helper_speaks_mount_8(
    words: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper.os, "geteuid", lambda: 1000)
    called = helper.arguments("/sbin/mount.fuse.nofailfs", words.split(), COMMANDS)
    assert " ".join(called) == expected


def test_root_mounts_have_devices_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper.os, "geteuid", lambda: 0)
    called = helper.arguments("mount.fuse.nofailfs", ["a", "/mnt", "-o", "rw,nodev"], COMMANDS)
    options = grammar.parse(called[i + 1] for i, word in enumerate(called) if word == "-o")
    assert (options.suid, options.dev) == (True, False)


def test_a_namespace_is_refused() -> None:
    with pytest.raises(UserError, match="-N"):
        helper.arguments("/sbin/mount.fuse.nofailfs", ["a", "/mnt", "-N", "3"], COMMANDS)


def test_fake_mounts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["/no/such/image", "/no/such/dir", "-f", "-o", "ro"]
    assert cli.run(words, "/sbin/mount.fuse.nofailfs") == 0


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("mount", 1, "no mount point"),
        ("mount a /mnt -o zork", 1, "unknown option 'zork'"),
        ("mount a b c", 1, "unexpected extra argument"),
        ("zork", 2, "No such command"),
        ("umount", 2, "Missing argument"),
        ("umount /no/such/dir", 32, "is not mounted"),
        ("mount a /no/such/dir", 32, "mkdir -p /no/such/dir"),
    ],
)
def test_exit_codes_and_messages(
    words: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(words.split()) == status
    assert message in capsys.readouterr().err


def test_the_helper_is_written_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "mount.fuse.nofailfs"
    helper.install(path)
    assert path.stat().st_mode & 0o777 == 0o755
    assert path.read_text().startswith("#!/bin/sh\n")
    with pytest.raises(UserError, match="run it as root"):
        helper.install(tmp_path / "none" / "x")


def test_doctor_gives_one_apt_line() -> None:
    findings = [
        doctor.Finding("a", False, doctor.NEEDED, "", "fuse3"),
        doctor.Finding("b", False, doctor.USEFUL, "", "fio"),
        doctor.Finding("c", False, doctor.USEFUL, "", "fuse3"),
        doctor.Finding("d", True, doctor.NEEDED, "", "gcc"),
    ]
    assert doctor.apt_line(findings) == "apt-get install -y fuse3 fio"
    assert not doctor.is_fit(findings)
    assert doctor.is_fit(findings[1:])
    assert doctor.apt_line(findings[3:]) == ""


def test_doctor_notices_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda *words, **named: None)
    assert cli.run(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "MISSING" in said
    assert "fusermount3" in said
    assert "apt-get install -y fuse3 xfsprogs fio" in said
