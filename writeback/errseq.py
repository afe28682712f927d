"""Errors of write-back, each told once to whoever has the file open.

A mapping keeps its last error as a word (the kernel's errseq_t): the errno, whether anybody was
told (SEEN), and a count that makes two errors two words. An open file remembers the word that it
knows. fsync compares: another word is an error that this open file was not told yet. So each of
several open files hears of an error once; one opened afterwards hears of it only if nobody has.

Words are the mapping's, in its record (`writeback.mapping.STATE`); what open files know is kept
here for those only that were told something, or were opened after somebody was. Trio thread only.
"""

from __future__ import annotations

MAX_ERRNO = 4095
SEEN = 1 << 12
COUNT = 1 << 13
WORD_MASK = (1 << 32) - 1


def failed(word: int, errno: int) -> int:
    """The word after another error.

    Unlike the kernel's, the count goes up with each, whether or not anybody was told of the last.
    """
    assert 0 < errno <= MAX_ERRNO
    return (word & ~(MAX_ERRNO | SEEN)) + COUNT & WORD_MASK | errno


def sample(word: int) -> int:
    """What an open file that begins now knows: the word, unless nobody was told of it."""
    return word if word & SEEN else 0


def errno_since(word: int, since: int) -> int:
    """The error that came after `since`, or 0."""
    return word & MAX_ERRNO if word != since else 0


class Told:
    """Which error each open file knows of, by file handle."""

    def __init__(self) -> None:
        self._since: dict[int, int] = {}

    def opened(self, fh: int, word: int) -> None:
        """A file was opened whose mapping has this word."""
        since = sample(word)
        if since:
            self._since[fh] = since

    def closed(self, fh: int) -> None:
        """An open file is no more."""
        self._since.pop(fh, None)

    def tell(self, fh: int, word: int) -> tuple[int, int]:
        """For an fsync: the error that this open file was not told yet, or 0; and the new word.

        fh: 0 for who has no file open: told what nobody was told.
        """
        since = self._since.get(fh, 0) if fh else sample(word)
        errno = errno_since(word, since)
        if errno:
            word |= SEEN
            if fh:
                self._since[fh] = word
        return errno, word
