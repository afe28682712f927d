"""Errors of write-back: who is told of which, how often. Linux's rules, one by one."""

from __future__ import annotations

import errno

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from writeback.errseq import COUNT, SEEN, Told, errno_since, failed, sample

EIO, ENOSPC = errno.EIO, errno.ENOSPC


def test_everybody_who_has_it_open_is_told_once() -> None:
    told = Told()
    for fh in 1, 2:
        told.opened(fh, 0)
    word = failed(0, EIO)
    for fh in 1, 2:
        got, word = told.tell(fh, word)
        assert got == EIO
    for fh in 1, 2:
        assert told.tell(fh, word) == (0, word)


def test_who_opens_later_is_told_only_what_nobody_was() -> None:
    told = Told()
    word = failed(0, EIO)
    told.opened(1, word)
    got, word = told.tell(1, word)
    assert got == EIO
    told.opened(2, word)
    assert told.tell(2, word) == (0, word)
    told.closed(1)
    told.closed(2)
    assert not told._since


def test_the_last_of_several_errors() -> None:
    told = Told()
    told.opened(1, 0)
    word = failed(failed(0, EIO), ENOSPC)
    got, word = told.tell(1, word)
    assert got == ENOSPC
    again = failed(word, ENOSPC)
    assert told.tell(1, again)[0] == ENOSPC, "the same again is another one"


def test_without_an_open_file() -> None:
    """What nobody was told, once; an open file hears of it all the same."""
    told = Told()
    told.opened(1, 0)
    word = failed(0, EIO)
    got, word = told.tell(0, word)
    assert got == EIO
    assert told.tell(0, word) == (0, word)
    assert told.tell(1, word)[0] == EIO


def test_words() -> None:
    word = failed(0, EIO)
    assert (word & SEEN, sample(word), sample(word | SEEN)) == (0, 0, word | SEEN)
    assert failed(word, EIO) == word + COUNT
    assert errno_since(word, word) == 0
    last = (1 << 32) - COUNT
    assert failed(last, EIO) == EIO, "the count wraps, and the word is never 0 again"


class Files(RuleBasedStateMachine):
    """Open files that come and go, against a list of all errors that each was to be told."""

    @initialize()
    def begin(self) -> None:
        self.told = Told()
        self.word = 0
        self.errors: list[int] = []
        self.anybody = 0  # how many of the errors somebody was told of
        self.knows: dict[int, int] = {}  # by open file: how many errors it has nothing to do with
        self.opens = 0

    @rule()
    def open(self) -> None:
        self.opens += 1
        self.told.opened(self.opens, self.word)
        nobody = len(self.errors) > self.anybody
        self.knows[self.opens] = len(self.errors) - 1 if nobody else len(self.errors)

    @rule(code=st.sampled_from([EIO, ENOSPC]))
    def fail(self, code: int) -> None:
        self.word = failed(self.word, code)
        self.errors.append(code)

    @rule(data=st.data())
    def fsync(self, data: st.DataObject) -> None:
        if not self.knows:
            return
        fh = data.draw(st.sampled_from(sorted(self.knows)))
        got, self.word = self.told.tell(fh, self.word)
        news = len(self.errors) > self.knows[fh]
        assert got == (self.errors[-1] if news else 0)
        self.knows[fh] = len(self.errors)
        if news:
            self.anybody = len(self.errors)

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        if self.knows:
            fh = data.draw(st.sampled_from(sorted(self.knows)))
            self.told.closed(fh)
            del self.knows[fh]

    @invariant()
    def only_open_files_are_kept(self) -> None:
        assert self.told._since.keys() <= self.knows.keys()


TestFiles = Files.TestCase
TestFiles.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
