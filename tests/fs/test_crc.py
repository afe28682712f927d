"""CRC-32C and big-endian access agree with independent implementations."""

from __future__ import annotations

import crc32c as peer
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc.jit import kernel
from fs.xfs import be, crc


@given(st.binary(min_size=16, max_size=700), st.data())
@settings(max_examples=200, deadline=None)
def test_crc_is_castagnoli_with_its_own_field_as_zero(payload: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(payload) - 4))
    pad = data.draw(st.integers(0, 9))
    mem = np.frombuffer(b"x" * pad + payload + b"tail", np.uint8).copy()
    zeroed = payload[:at] + bytes(4) + payload[at + 4 :]
    assert crc.crc32c(mem, pad, len(payload), at) == peer.crc32c(zeroed)
    crc.crc_stamp(mem, pad, len(payload), at)
    assert crc.crc_ok(mem, pad, len(payload), at)
    flip = data.draw(st.integers(0, len(payload) - 1))
    mem[pad + flip] ^= 1
    assert not crc.crc_ok(mem, pad, len(payload), at)


@kernel("u8(u1[::1], i8, u8)")
def _round_trip(mem, addr, value):
    be.put64(mem, addr, value)
    be.put32(mem, addr + 8, np.int64(value & np.uint64(0xFFFFFFFF)))
    be.put16(mem, addr + 12, np.int64(value & np.uint64(0xFFFF)))
    same = be.get32(mem, addr + 8) == np.int64(value & np.uint64(0xFFFFFFFF))
    same = same and be.get16(mem, addr + 12) == np.int64(value & np.uint64(0xFFFF))
    return be.get64(mem, addr) if same else np.uint64(0)


@given(st.integers(1, 2**64 - 1), st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_big_endian_access(value: int, addr: int) -> None:
    mem = np.zeros(24, np.uint8)
    assert int(_round_trip(mem, addr, np.uint64(value))) == value
    assert mem[addr : addr + 8].tobytes() == value.to_bytes(8, "big")
