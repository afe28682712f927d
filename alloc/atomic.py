"""Atomics and spin locks for kernels: the one place where several threads meet.

Each function works on one element of an integer array (u1, i4, u4, i8, u8) and carries its memory
order in its name. Inside kernels they are numba intrinsics that emit the machine's own
instructions; they cache. With NUMBA_DISABLE_JIT=1 plain Python twins stand in, which are right
for one thread only.

Rules: a word that two threads may change is only touched through this module or under a spin
lock from it; a spin lock is held for a bounded number of instructions, never across a call that
can sleep, and locks nest in this order only: row -> slab -> lru -> buddy. A holder may be
preempted, so whoever spins gives up its time slice after a while.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from alloc.jit import DISABLED, helper
from alloc.libc import sched_yield

SPINS_BEFORE_YIELD = 64

if DISABLED:

    def load_acquire(array, i):
        return array[i]

    def store_release(array, i, value):
        array[i] = value

    def fetch_add_acq_rel(array, i, value):
        old = array[i]
        array[i] = array.dtype.type(int(old) + int(value))
        return old

    def fetch_or_acq_rel(array, i, value):
        old = array[i]
        array[i] = int(old) | int(value)
        return old

    def fetch_and_acq_rel(array, i, value):
        old = array[i]
        array[i] = int(old) & int(value)
        return old

    def exchange_acq_rel(array, i, value):
        old = array[i]
        array[i] = value
        return old

    def compare_exchange_acq_rel(array, i, expected, desired):
        if array[i] != expected:
            return False
        array[i] = desired
        return True

    def full_barrier():
        return None

    def count_trailing_zeros(value):
        bits = int(value)
        return (bits & -bits).bit_length() - 1 if bits else 64

else:

    def _element(context, builder, signature, args):
        """Pointer to array[i], and the values cast to the array's type."""
        array_type, index_type = signature.args[:2]
        array = context.make_array(array_type)(context, builder, args[0])
        index = context.cast(builder, args[1], index_type, types.intp)
        pointer = cgutils.get_item_pointer(
            context, builder, array_type, array, [index], wraparound=False
        )
        values = [
            context.cast(builder, value, kind, array_type.dtype)
            for value, kind in zip(args[2:], signature.args[2:], strict=True)
        ]
        return pointer, values, array_type.dtype.bitwidth // 8

    @intrinsic
    def load_acquire(typingctx, array, i):
        def codegen(context, builder, signature, args):
            pointer, _, align = _element(context, builder, signature, args)
            return builder.load_atomic(pointer, "acquire", align)

        return array.dtype(array, i), codegen

    @intrinsic
    def store_release(typingctx, array, i, value):
        def codegen(context, builder, signature, args):
            pointer, values, align = _element(context, builder, signature, args)
            builder.store_atomic(values[0], pointer, "release", align)
            return context.get_dummy_value()

        return types.void(array, i, value), codegen

    def _read_modify_write(operation, array, i, value):
        def codegen(context, builder, signature, args):
            pointer, values, _ = _element(context, builder, signature, args)
            return builder.atomic_rmw(operation, pointer, values[0], "acq_rel")

        return array.dtype(array, i, value), codegen

    @intrinsic
    def fetch_add_acq_rel(typingctx, array, i, value):
        return _read_modify_write("add", array, i, value)

    @intrinsic
    def fetch_or_acq_rel(typingctx, array, i, value):
        return _read_modify_write("or", array, i, value)

    @intrinsic
    def fetch_and_acq_rel(typingctx, array, i, value):
        return _read_modify_write("and", array, i, value)

    @intrinsic
    def exchange_acq_rel(typingctx, array, i, value):
        return _read_modify_write("xchg", array, i, value)

    @intrinsic
    def compare_exchange_acq_rel(typingctx, array, i, expected, desired):
        def codegen(context, builder, signature, args):
            pointer, values, _ = _element(context, builder, signature, args)
            pair = builder.cmpxchg(pointer, values[0], values[1], "acq_rel", "monotonic")
            return builder.extract_value(pair, 1)

        return types.boolean(array, i, expected, desired), codegen

    @intrinsic
    def full_barrier(typingctx):
        """No load or store moves over it, in either direction: stores before loads, too."""

        def codegen(context, builder, signature, args):
            builder.fence("seq_cst")
            return context.get_dummy_value()

        return types.void(), codegen

    @intrinsic
    def count_trailing_zeros(typingctx, value):
        def codegen(context, builder, signature, args):
            word = context.cast(builder, args[0], signature.args[0], types.uint64)
            return builder.cttz(word, ir.Constant(ir.IntType(1), 0))

        return types.int64(value), codegen


# Short spellings of the same functions; all read-modify-write is acquire and release.
fetch_add = fetch_add_acq_rel
fetch_or = fetch_or_acq_rel
fetch_and = fetch_and_acq_rel
exchange = exchange_acq_rel
compare_exchange = compare_exchange_acq_rel


@helper
def spin_lock(words, i):
    """Take the lock in words[i] (0 free, 1 held); spins, and yields the processor now and then."""
    spins = 0
    while not compare_exchange_acq_rel(words, i, 0, 1):
        while load_acquire(words, i) != 0:
            spins += 1
            if spins % SPINS_BEFORE_YIELD == 0:
                sched_yield()


@helper
def spin_trylock(words, i):
    """Take the lock if it is free; True when it is now held by the caller."""
    return compare_exchange_acq_rel(words, i, 0, 1)


@helper
def spin_unlock(words, i):
    store_release(words, i, 0)


@helper
def mask64(bits):
    """The lowest `bits` bits set, as uint64; bits 0..64."""
    if bits >= 64:
        return np.uint64(0xFFFFFFFFFFFFFFFF)
    return (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
