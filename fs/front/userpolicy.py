"""Memory policies of users: where what a user's requests bring into memory shall lie.

The task of a request is a thread that FUSE names by number only and that may be gone when the
number comes again; the user is what stays. So a task's policy is its user's, few of them, in a
table that lanes look through (`policy_of`) when there are any. An inode's policy wins over it.

The trio thread changes the table. A lane that looks meanwhile may place a page by the policy of
another user, which is no harm.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import errno
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from alloc.jit import helper
from alloc.mempolicy import NONE, applied
from fs.front.lanestate import C_NR_USERS, C_USERS, USERS_MOST


@helper
def policy_of(control, uid):
    """A user's policy, or NONE."""
    for at in range(C_USERS, C_USERS + 2 * control[C_NR_USERS], 2):
        if control[at] == uid:
            return control[at + 1]
    return np.int64(NONE)


class UserPolicies:
    """The table in a mount's control words, as trio sees it."""

    def __init__(self, control: Any) -> None:
        self._control = control

    def _entries(self) -> dict[int, int]:
        table = self._control[C_USERS : C_USERS + 2 * int(self._control[C_NR_USERS])]
        return {int(uid): int(number) for uid, number in table.reshape(-1, 2).tolist()}

    def get(self, uid: int) -> int:
        """A user's policy, or NONE."""
        return self._entries().get(uid, NONE)

    def set(self, uid: int, number: int) -> None:
        """Give a user a policy, or NONE. Raises OSError(ENOSPC) when too many have one."""
        entries = self._entries() | {uid: number}
        if number == NONE:
            del entries[uid]
        if len(entries) > USERS_MOST:
            raise OSError(errno.ENOSPC, f"{USERS_MOST} users have a memory policy already")
        for place, entry in enumerate(entries.items()):
            self._control[C_USERS + 2 * place : C_USERS + 2 * place + 2] = entry
        self._control[C_NR_USERS] = len(entries)

    def applied(self, uid: int) -> AbstractContextManager[None]:
        """This task works for a user as long as the block lasts."""
        number = self.get(uid) if self._control[C_NR_USERS] else NONE
        return nullcontext() if number == NONE else applied(number)
