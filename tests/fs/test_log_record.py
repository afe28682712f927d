"""Log records: the kernels beside naive twins and a CRC that somebody else computes."""

from __future__ import annotations

import random

import crc32c
import numpy as np
import pytest

from fs.log import record
from fs.xfs import layout as L

BB = L.BB_SIZE


def naive_stamp(rec: bytes, headers: int, bbs: int, cycle: int, wrap: int) -> bytes:
    """Words of data BBs moved into the header's BBs, stamps in their places."""
    blocks = [bytearray(rec[i : i + BB]) for i in range(0, len(rec), BB)]
    for i in range(bbs):
        kept, at = divmod(i, 64)
        place = 4 * at + (44 if kept == 0 else 4)
        blocks[kept][place : place + 4] = blocks[headers + i][:4]
        blocks[headers + i][:4] = (cycle + (headers + i >= wrap)).to_bytes(4, "big")
    for i in range(1, headers):
        blocks[i][:4] = (cycle + (i >= wrap)).to_bytes(4, "big")
    return b"".join(blocks)


@pytest.mark.parametrize(("size", "bbs"), [(32768, 1), (32768, 63), (65536, 100), (262144, 511)])
def test_stamps_and_crc_are_the_naive_ones(size: int, bbs: int) -> None:
    rng = random.Random(bbs)
    headers = record.header_bbs(size)
    for wrap in (headers + bbs, 1, headers + bbs // 2):
        raw = bytearray(rng.randbytes((headers + bbs) * BB))
        raw[BB : headers * BB] = bytes((headers - 1) * BB)
        rec = np.frombuffer(bytes(raw), np.uint8).copy()
        record.stamp(rec, headers, bbs, 77, wrap)
        stamped = naive_stamp(bytes(raw), headers, bbs, 77, wrap)
        assert rec.tobytes() == stamped
        covered = stamped[:32] + bytes(4) + stamped[36:328]
        for i in range(1, -(-bbs * BB // 32768)):
            covered += stamped[i * BB : i * BB + 260]
        covered += stamped[headers * BB :]
        assert record.crc(rec, headers, bbs * BB) == crc32c.crc32c(covered)
        record.unstamp(rec, headers, bbs)
        assert rec[headers * BB :].tobytes() == bytes(raw[headers * BB :])
