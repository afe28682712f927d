"""The C library for kernels: I/O, clocks and block memory operations on the arena.

`mem` is a uint8 array (usually the whole arena) and `addr` a byte offset in it, as everywhere.
A struct iovec is two words of a uint64 array, machine address (`address`) and length.
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
import socket
import time
from ctypes import CDLL, CFUNCTYPE, c_char, c_ssize_t, get_errno

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from alloc.jit import DISABLED, helper, kernel

IO_URING_ENTER = 426  # the same number on every architecture
MSG_PEEK_DONTWAIT = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)

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

    def address(array, i):
        return array.ctypes.data + int(i) * array.itemsize

    def _iovecs(iov, n):
        pairs = [(int(iov[2 * i]), int(iov[2 * i + 1])) for i in range(n)]
        return [(c_char * size).from_address(at) for at, size in pairs]

    def readv(fd, iov, n):
        try:
            return os.readv(fd, _iovecs(iov, n))
        except OSError as error:
            return -(error.errno or 0)

    def writev(fd, iov, n):
        try:
            return os.writev(fd, _iovecs(iov, n))
        except OSError as error:
            return -(error.errno or 0)

    def read_bytes(fd, array, i, n):
        return readv(fd, (address(array, i), n), 1)

    def write_bytes(fd, array, i, n):
        return writev(fd, (address(array, i), n), 1)

    def peek_bytes(fd, array, i, n):
        data = (c_char * n).from_address(address(array, i))
        with socket.socket(fileno=os.dup(fd)) as end:
            try:
                return end.recv_into(data, n, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except OSError as error:
                return -(error.errno or 0)

    def io_uring_enter(fd, to_submit, min_complete, flags):
        done = CDLL(None, use_errno=True).syscall(
            IO_URING_ENTER, fd, to_submit, min_complete, flags, None, 0
        )
        return done if done >= 0 else -get_errno()

    def call_address(function, word):
        return CFUNCTYPE(c_ssize_t, c_ssize_t)(int(function))(int(word))

    def usleep(us):
        time.sleep(us / 1e6)
        return 0

    def monotonic_ns():
        return time.clock_gettime_ns(time.CLOCK_MONOTONIC)

    def realtime_ns():
        return time.clock_gettime_ns(time.CLOCK_REALTIME)

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
    _pread = types.ExternalFunction(
        "pread", types.intp(types.intc, types.voidptr, types.uintp, types.int64)
    )
    _pwrite = types.ExternalFunction(
        "pwrite", types.intp(types.intc, types.voidptr, types.uintp, types.int64)
    )
    _vector = types.intp(types.intc, types.voidptr, types.intc)
    _readv = types.ExternalFunction("readv", _vector)
    _writev = types.ExternalFunction("writev", _vector)
    _plain = types.intp(types.intc, types.voidptr, types.uintp)
    _read = types.ExternalFunction("read", _plain)
    _write = types.ExternalFunction("write", _plain)
    _recv = types.ExternalFunction(
        "recv", types.intp(types.intc, types.voidptr, types.uintp, types.intc)
    )
    # Variadic in C; its arguments are words, which go the same way on every Linux.
    _syscall = types.ExternalFunction("syscall", types.intp(*(types.intp,) * 7))
    _usleep = types.ExternalFunction("usleep", types.intc(types.uint32))
    _block = types.voidptr(types.voidptr, types.voidptr, types.uintp)
    _memcpy = types.ExternalFunction("memcpy", _block)
    _memmove = types.ExternalFunction("memmove", _block)
    _memcmp = types.ExternalFunction(
        "memcmp", types.intc(types.voidptr, types.voidptr, types.uintp)
    )
    _memset = types.ExternalFunction(
        "memset", types.voidptr(types.voidptr, types.intc, types.uintp)
    )

    def _pointer(context, builder, signature, args):
        """Pointer to args[0][args[1]]."""
        array_type, index_type = signature.args
        value = context.make_array(array_type)(context, builder, args[0])
        index = context.cast(builder, args[1], index_type, types.intp)
        return cgutils.get_item_pointer(
            context, builder, array_type, value, [index], wraparound=False
        )

    @intrinsic
    def _address(typingctx, array, i):
        """The machine address of array[i]."""

        def codegen(context, builder, signature, args):
            pointer = _pointer(context, builder, signature, args)
            return builder.bitcast(pointer, cgutils.voidptr_t)

        return types.voidptr(array, i), codegen

    @intrinsic
    def address(typingctx, array, i):
        """The machine address of array[i], as a number."""

        def codegen(context, builder, signature, args):
            pointer = _pointer(context, builder, signature, args)
            return builder.ptrtoint(pointer, ir.IntType(64))

        return types.int64(array, i), codegen

    @intrinsic
    def call_address(typingctx, function, word):
        """Call a C function of one word by its machine address; what it returns.

        LLVM does not know what it calls. It knows malloc by name, and drops it when nobody looks.
        """

        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(ir.IntType(64), (ir.IntType(64),))
            pointer = builder.inttoptr(args[0], kind.as_pointer())
            return builder.call(pointer, (args[1],))

        return types.int64(types.int64, types.int64), codegen

    @intrinsic
    def _errno(typingctx):
        """The calling thread's errno."""

        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(ir.IntType(32).as_pointer(), ())
            place = cgutils.get_or_insert_function(builder.module, kind, "__errno_location")
            return builder.load(builder.call(place, ()))

        return types.int32(), codegen

    @intrinsic
    def _clock_ns(typingctx, clock):
        """clock_gettime(2) into a struct timespec on the stack."""

        def codegen(context, builder, signature, args):
            word, number = ir.IntType(64), ir.IntType(32)
            spec = cgutils.alloca_once(builder, ir.ArrayType(word, 2))
            kind = ir.FunctionType(number, (number, spec.type))
            function = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
            clock = context.cast(builder, args[0], signature.args[0], types.int32)
            builder.call(function, (clock, spec))
            seconds = builder.load(cgutils.gep_inbounds(builder, spec, 0, 0))
            rest = builder.load(cgutils.gep_inbounds(builder, spec, 0, 1))
            return builder.add(builder.mul(seconds, ir.Constant(word, 10**9)), rest)

        return types.int64(clock), codegen

    @helper
    def monotonic_ns():
        return _clock_ns(1)

    @helper
    def realtime_ns():
        return _clock_ns(0)

    @helper
    def usleep(us):
        return _usleep(us)

    @helper
    def readv(fd, iov, n):
        got = _readv(fd, _address(iov, 0), n)
        return got if got >= 0 else -_errno()

    @helper
    def writev(fd, iov, n):
        put = _writev(fd, _address(iov, 0), n)
        return put if put >= 0 else -_errno()

    @helper
    def read_bytes(fd, array, i, n):
        got = _read(fd, _address(array, i), n)
        return got if got >= 0 else -_errno()

    @helper
    def peek_bytes(fd, array, i, n):
        got = _recv(fd, _address(array, i), n, MSG_PEEK_DONTWAIT)
        return got if got >= 0 else -_errno()

    @helper
    def io_uring_enter(fd, to_submit, min_complete, flags):
        done = _syscall(IO_URING_ENTER, fd, to_submit, min_complete, flags, 0, 0)
        return done if done >= 0 else -_errno()

    @helper
    def write_bytes(fd, array, i, n):
        put = _write(fd, _address(array, i), n)
        return put if put >= 0 else -_errno()

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
