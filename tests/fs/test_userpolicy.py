"""The table of users' memory policies: against a dictionary, and as lanes see it."""

from __future__ import annotations

import errno
import random
from typing import Any

import numpy as np
import pytest

from alloc import mempolicy
from alloc.jit import probe
from alloc.mempolicy import NONE, parse
from fs.front.lanestate import C_WORDS, USERS_MOST
from fs.front.userpolicy import UserPolicies, policy_of


@probe
def seen_by_a_lane(control: Any, uid: int) -> Any:
    return policy_of(control, uid)


def test_against_a_dictionary() -> None:
    control, rng = np.zeros(C_WORDS, np.int64), random.Random(5)
    users, model = UserPolicies(control), dict[int, int]()
    uids = [0, 1000, 65534, (1 << 32) - 1, *range(2000, 2020)]
    for _ in range(400):
        uid = rng.choice(uids)
        number = rng.choice([NONE, parse("bind:1", 4), parse("interleave", 4)])
        full = uid not in model and len(model) == USERS_MOST and number != NONE
        if full:
            with pytest.raises(OSError, match="already") as error:
                users.set(uid, number)
            assert error.value.errno == errno.ENOSPC
            continue
        users.set(uid, number)
        model[uid] = number
        if number == NONE:
            del model[uid]
        for each in uids:
            assert users.get(each) == seen_by_a_lane(control, each) == model.get(each, NONE)


def test_a_task_works_for_its_user() -> None:
    users = UserPolicies(np.zeros(C_WORDS, np.int64))
    number = parse("prefer:1", 2)
    users.set(1000, number)
    with users.applied(1000):
        task = mempolicy.current_task()
        assert task is not None
        assert task.number == number
        with users.applied(1001):
            assert mempolicy.current_task() is task
    assert mempolicy.current_task() is None
