"""kill -9 of a mount's daemon under writers: what was promised to them is there.

One round each: the kernel recovers the image, and our next mount does. The command `nofailfs crash
--kill N` runs many.
"""

from __future__ import annotations

import pytest

from tests import support
from tools.crash import kill

pytestmark = [support.needs_root, pytest.mark.slow]


def test_promised_records_survive() -> None:
    told: list[str] = []
    failed = kill.run(kill.Plan(2, seed=3), told.append)
    assert not failed, "\n".join(told)
    print(told[-1])
