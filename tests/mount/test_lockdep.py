"""The lock-order validator in a daemon: the option turns it on, a dump shows what tasks hold."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests import support
from tools.targets import OurMount

ON = "lock-order validator: on"


def use(mounted: OurMount) -> None:
    """A little of everything that takes locks."""
    one, other = mounted.path / "one", mounted.path / "other"
    one.mkdir()
    other.mkdir()
    (one / "file").write_bytes(os.urandom(300_000))
    (one / "file").rename(other / "moved")
    with open(other / "moved", "r+b") as stream:
        stream.truncate(5000)
        os.fsync(stream.fileno())
        os.setxattr(stream.fileno(), "user.a", b"value" * 50)
    shutil.copy(other / "moved", one / "copy")
    os.sync()
    shutil.rmtree(other)


@pytest.mark.parametrize("lanes", ["lanes=0", "lanes=2"])
@pytest.mark.parametrize("wanted", [True, False], ids=["on", "off"])
def test_the_option(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, lanes: str, wanted: bool
) -> None:
    monkeypatch.delenv("NOFAILFS_LOCKDEP")
    image = support.mkfs(scratch)
    options = f"{lanes},lockdep" if wanted else lanes
    with support.our_mount(image, scratch / "mnt", options=options) as mounted:
        use(mounted)
    text = mounted.log.read_text()
    assert (ON in text) == wanted
    support.assert_clean(image)


def test_daemons_of_tests_have_it(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with support.our_mount(image, scratch / "mnt") as mounted:
        use(mounted)
    assert ON in mounted.log.read_text()
