"""The C library for kernels: positioned I/O and block memory operations on the arena.

`mem` is a uint8 array (usually the whole arena) and `addr` a byte offset in it, as everywhere.
The functions are bound through numba's ExternalFunction, which is cached like any kernel but is
not a documented interface: nothing outside this module may use it. With NUMBA_DISABLE_JIT=1 the
same names are plain Python.

I/O returns a byte count or the negated errno and does not loop: callers handle short transfers.
Nothing here checks bounds against `mem`: callers assert them at their boundary.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, call-overload, attr-defined"
# mypy: no-warn-unreachable

from __future__ import annotations

import os

from numba import carray
from numba.core import cgutils, types
from numba.extending import intrinsic

from alloc.jit import DISABLED, helper, kernel

if DISABLED:

    def sched_yield():
        return 0

    def pread(fd, mem, addr, nbytes, offset):
        try:
            return os.preadv(fd, [memoryview(mem[addr : addr + nbytes])], offset)
        except OSError as error:
            return -(error.errno or 0)

    def pwrite(fd, mem, addr, nbytes, offset):
        try:
            return os.pwrite(fd, memoryview(mem[addr : addr + nbytes]), offset)
        except OSError as error:
            return -(error.errno or 0)

    def memcpy(mem_to, to, mem_from, start, nbytes):
        mem_to[to : to + nbytes] = mem_from[start : start + nbytes]

    def memmove(mem, to, start, nbytes):
        mem[to : to + nbytes] = mem[start : start + nbytes].copy()

    def memset(mem, addr, byte, nbytes):
        mem[addr : addr + nbytes] = byte

    def memcmp(mem_a, a, mem_b, b, nbytes):
        left, right = bytes(mem_a[a : a + nbytes]), bytes(mem_b[b : b + nbytes])
        return (left > right) - (left < right)

else:
    sched_yield = types.ExternalFunction("sched_yield", types.intc())
    _errno_location = types.ExternalFunction("__errno_location", types.CPointer(types.intc)())
    _pread = types.ExternalFunction(
        "pread", types.intp(types.intc, types.voidptr, types.uintp, types.int64)
    )
    _pwrite = types.ExternalFunction(
        "pwrite", types.intp(types.intc, types.voidptr, types.uintp, types.int64)
    )
    _block = types.voidptr(types.voidptr, types.voidptr, types.uintp)
    _memcpy = types.ExternalFunction("memcpy", _block)
    _memmove = types.ExternalFunction("memmove", _block)
    _memcmp = types.ExternalFunction(
        "memcmp", types.intc(types.voidptr, types.voidptr, types.uintp)
    )
    _memset = types.ExternalFunction(
        "memset", types.voidptr(types.voidptr, types.intc, types.uintp)
    )

    @intrinsic
    def _address(typingctx, array, i):
        """The machine address of array[i]."""

        def codegen(context, builder, signature, args):
            array_type, index_type = signature.args
            value = context.make_array(array_type)(context, builder, args[0])
            index = context.cast(builder, args[1], index_type, types.intp)
            pointer = cgutils.get_item_pointer(
                context, builder, array_type, value, [index], wraparound=False
            )
            return builder.bitcast(pointer, cgutils.voidptr_t)

        return types.voidptr(array, i), codegen

    @helper
    def _errno():
        return carray(_errno_location(), 1)[0]

    @helper
    def pread(fd, mem, addr, nbytes, offset):
        n = _pread(fd, _address(mem, addr), nbytes, offset)
        return n if n >= 0 else -_errno()

    @helper
    def pwrite(fd, mem, addr, nbytes, offset):
        n = _pwrite(fd, _address(mem, addr), nbytes, offset)
        return n if n >= 0 else -_errno()

    @helper
    def memcpy(mem_to, to, mem_from, start, nbytes):
        _memcpy(_address(mem_to, to), _address(mem_from, start), nbytes)

    @helper
    def memmove(mem, to, start, nbytes):
        _memmove(_address(mem, to), _address(mem, start), nbytes)

    @helper
    def memset(mem, addr, byte, nbytes):
        _memset(_address(mem, addr), byte, nbytes)

    @helper
    def memcmp(mem_a, a, mem_b, b, nbytes):
        return _memcmp(_address(mem_a, a), _address(mem_b, b), nbytes)


@kernel("i8(i8, u1[::1], i8, i8, i8)")
def read_at(fd, mem, addr, nbytes, offset):
    """pread(2) into mem[addr:addr+nbytes]; bytes read (0 at the end of the file) or -errno."""
    return pread(fd, mem, addr, nbytes, offset)


@kernel("i8(i8, u1[::1], i8, i8, i8)")
def write_at(fd, mem, addr, nbytes, offset):
    """pwrite(2) from mem[addr:addr+nbytes]; bytes written or -errno."""
    return pwrite(fd, mem, addr, nbytes, offset)


@kernel("void(u1[::1], i8, i8)")
def zero(mem, addr, nbytes):
    """Clear mem[addr:addr+nbytes] without the GIL."""
    memset(mem, addr, 0, nbytes)


@kernel("void(u1[::1], i8, i8, i8)")
def move(mem, to, start, nbytes):
    """Move nbytes inside `mem`; the ranges may overlap."""
    memmove(mem, to, start, nbytes)
