"""Big-endian access to byte buffers, for kernels.

Every on-disk integer of XFS is big-endian (CRC fields excepted). A buffer is `(mem, addr)`: an
array of bytes, usually the whole arena, and an offset in it. 16- and 32-bit values come back as
int64, so that arithmetic never mixes signs; 64-bit ones as uint64, which callers convert on
purpose (numba would turn uint64 + int64 into a float).
"""

import numpy as np

from alloc.jit import helper


@helper
def get16(mem, addr):
    return (np.int64(mem[addr]) << 8) | np.int64(mem[addr + 1])


@helper
def get32(mem, addr):
    return (
        (np.int64(mem[addr]) << 24)
        | (np.int64(mem[addr + 1]) << 16)
        | (np.int64(mem[addr + 2]) << 8)
        | np.int64(mem[addr + 3])
    )


@helper
def get64(mem, addr):
    return (np.uint64(get32(mem, addr)) << np.uint64(32)) | np.uint64(get32(mem, addr + 4))


@helper
def put16(mem, addr, value):
    v = np.int64(value)
    mem[addr] = np.uint8((v >> 8) & 0xFF)
    mem[addr + 1] = np.uint8(v & 0xFF)


@helper
def put32(mem, addr, value):
    v = np.int64(value)
    mem[addr] = np.uint8((v >> 24) & 0xFF)
    mem[addr + 1] = np.uint8((v >> 16) & 0xFF)
    mem[addr + 2] = np.uint8((v >> 8) & 0xFF)
    mem[addr + 3] = np.uint8(v & 0xFF)


@helper
def put64(mem, addr, value):
    v = np.uint64(value)
    put32(mem, addr, np.int64(v >> np.uint64(32)))
    put32(mem, addr + 4, np.int64(v & np.uint64(0xFFFFFFFF)))
