"""INIT between the kernel and pyfuse3: what is offered, hidden, added, and what comes of it."""

from __future__ import annotations

import struct

import pytest

from fs.front import negotiate as N

MODERN = N.mask("INIT_EXT", "MAX_PAGES", "PARALLEL_DIROPS", "HANDLE_KILLPRIV_V2", "SPLICE_READ")
MODERN |= N.mask("DIRECT_IO_ALLOW_MMAP", "ASYNC_DIO", "POSIX_LOCKS", "FLOCK_LOCKS", "BIG_WRITES")
WISH = N.Wish(max_write=1 << 20, max_background=64, shared_mmap=True)


def request(flags: int, extended: bool = True) -> bytes:
    """An INIT request as the kernel sends it, with or without the second word of flags."""
    body = struct.pack("=IIII", 7, 45, 131072, flags & 0xFFFFFFFF)
    body += struct.pack("=I44x", flags >> 32) if extended else b""
    return struct.pack("=IIQQIIIHH", 40 + len(body), 26, 2, 0, 0, 0, 0, 0, 0) + body


def reply(flags: int) -> bytes:
    """What pyfuse3 answers."""
    body = struct.pack("=IIIIHHIIHHI28x", 7, 31, 131072, flags, 0, 0, 1 << 20, 1, 256, 0, 0)
    return struct.pack("=IiQ", 16 + len(body), 0, 2) + body


def agreed(offer: int, asked: int, wish: N.Wish = WISH) -> tuple[int, N.Outcome, bytes]:
    out, outcome = N.for_kernel(request(offer), reply(asked), wish)
    low, high = struct.unpack_from("=I", out, N.O_FLAGS)[0], struct.unpack_from("=I", out, 48)[0]
    return low | high << 32, outcome, out


def test_pyfuse3_is_not_offered_splice() -> None:
    seen = N.for_pyfuse3(request(MODERN))
    assert not N.offered(seen) & N.mask(*N.SPLICE)
    assert N.offered(seen) | N.mask("SPLICE_READ") == MODERN


def test_what_is_offered_is_added_and_locks_are_not() -> None:
    flags, outcome, out = agreed(MODERN, N.mask("POSIX_ACL"))
    wanted = ("PARALLEL_DIROPS", "MAX_PAGES", "HANDLE_KILLPRIV_V2", "DIRECT_IO_ALLOW_MMAP")
    assert flags & N.mask(*wanted, "INIT_EXT", "POSIX_ACL", "ASYNC_DIO")
    for name in (*wanted, "INIT_EXT", "POSIX_ACL"):
        assert flags & N.mask(name), name
    assert not flags & N.mask("POSIX_LOCKS", "FLOCK_LOCKS", *N.SPLICE)
    assert outcome.flags == N.flag_names(flags)
    assert outcome.max_pages == 257
    assert struct.unpack_from("=HHI", out, N.O_BACKGROUND) == (64, 48, 1 << 20)
    assert struct.unpack_from("=H", out, N.O_MAX_PAGES)[0] == 257
    assert len(out) == N.O_END


def test_nothing_is_added_that_is_not_offered() -> None:
    flags, outcome, _ = agreed(N.mask("BIG_WRITES"), N.mask("BIG_WRITES"))
    assert flags == N.mask("BIG_WRITES")
    assert (outcome.max_pages, outcome.max_write) == (32, 32 * 4096)


def test_shared_mmap_is_for_mounts_without_a_kernel_cache() -> None:
    flags, _, _ = agreed(MODERN, 0, N.Wish(1 << 20, 64, shared_mmap=False))
    assert not flags >> 32
    assert not flags & N.mask("INIT_EXT")


def test_io_uring_is_for_those_who_ask_and_its_pages_fit_into_a_place() -> None:
    offer = MODERN | N.mask("OVER_IO_URING")
    assert not agreed(offer, 0)[0] & N.mask("OVER_IO_URING")
    flags, outcome, _ = agreed(offer, 0, N.Wish(1 << 20, 64, shared_mmap=True, uring=True))
    assert flags & N.mask("OVER_IO_URING")
    assert outcome.max_pages == 256


def test_an_old_request_has_one_word_of_flags() -> None:
    assert N.offered(request(MODERN, extended=False)) == MODERN & 0xFFFFFFFF


@pytest.mark.parametrize("text", [b"", reply(0)[:40], struct.pack("=IiQ", 16, -71, 2)])
def test_an_answer_of_another_form_is_left_alone(text: bytes) -> None:
    assert not N.is_good(text.ljust(8, b"\0"))
    assert N.is_good(reply(0))


def test_bits_without_a_name_are_shown_by_number() -> None:
    assert N.flag_names(1 << 18 | 1 << 60) == ["PARALLEL_DIROPS", "bit 60"]
