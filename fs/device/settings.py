"""Options that hold settings of their own: `name=value` words with commas between.

Who has such an option gives a reader for each name. A reader raises ValueError with the word that
it cannot read; the message is completed here, so that all options complain alike: which option,
which word, what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def settings(
    text: str, readers: Mapping[str, Callable[[str], Any]], option: str, form: str
) -> dict[str, Any]:
    """What the words of a text say, each read by its reader, which raises ValueError.

    option: whose text it is; form: what it should look like. Raises ValueError with both.
    """
    found: dict[str, Any] = {}
    for word in text.split(","):
        name, _, value = word.partition("=")
        if name in found or name not in readers:
            raise ValueError(f"{option}={text}: '{word}' is none of {form}, each once")
        try:
            found[name] = readers[name](value)
        except ValueError as error:
            raise ValueError(f"{option}={text}: '{word}' is none of {form}: {error}") from error
    return found


def number(text: str) -> int:
    """A reader of whole numbers."""
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"'{text}' is not a number")
    return int(text)
