"""Policies: under which rule a request that did not say it can do with less may fail.

`irix`, the default: never; it waits until it is served, at every order up to the largest. The
others are the control group, the same allocator with the promise taken back. Unless it is NOFAIL,
`linux` gives up on a costly order (above 3) after one round of reclaim, and on MEMALLOC, which
does not reclaim, when all is used up. `mayfail` gives up on everything after one round, `inject:..`
at once on what it picks by chance or as the N-th call; NOFAIL or not.

They raise AllocationFailed. Nobody handles it outside `alloc/` but the boundaries of the program
(a reply of ENOMEM, a forced shutdown), so it is no OSError, which callers may handle for reasons
of their own. `try_*` requests answer None as under any policy and are never picked by inject.

A Policy is a value and decides without state: by chance means by its seed and the number of the
call, so the same schedule of requests meets the same failures. The number is kept by an Injector,
one to an arena. Everything here belongs to the trio thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from alloc.gfp import COSTLY_ORDER, MEMALLOC, NOFAIL, describe
from alloc.page import ORDER_MAX

KINDS = ("irix", "linux", "mayfail", "inject")
INJECT_HELP = "inject:p=CHANCE or nth=CALL, and seed=, order=, site="


class AllocationFailed(Exception):
    """A request was given up, which no policy but irix forbids.

    `what` was asked for ("order:4", "slab:inode"), under which `gfp`, and by which `site`
    ("fs.cache.buf:BufCache.read").
    """

    def __init__(self, what: str, gfp: int, site: str) -> None:
        super().__init__(f"page allocation failure: {what}, mode:{describe(gfp)}, site:{site}")
        self.what = what
        self.gfp = gfp
        self.site = site


@dataclass(frozen=True)
class Policy:
    """One rule. `order` (None: all), `site` (part of it or of `what`) choose what inject counts."""

    kind: str
    p: float = 0.0
    nth: int = 0
    seed: int = 0
    order: int | None = None
    site: str = ""

    def gives_up(self, order: int, gfp: int) -> bool:
        """Whether such a request fails when one round of reclaim was not enough."""
        if self.kind == "linux":
            return (order > COSTLY_ORDER or gfp & MEMALLOC != 0) and not gfp & NOFAIL
        return self.kind == "mayfail"

    def counts(self, what: str, order: int, site: str) -> bool:
        """Whether inject counts such a request; objects of a slab have order 0."""
        return self.order in (None, order) and (self.site in site or self.site in what)

    def picks(self, call: int) -> bool:
        """Whether the `call`-th counted request fails; calls are counted from 1."""
        return call == self.nth or (self.p > 0 and Random(f"{self.seed}:{call}").random() < self.p)

    def __str__(self) -> str:
        """As `parse` reads it."""
        if self.kind != "inject":
            return self.kind
        words = [f"p={self.p:g}" if self.p else f"nth={self.nth}"]
        words += [f"seed={self.seed}"] if self.seed else []
        words += [f"order={self.order}"] if self.order is not None else []
        words += [f"site={self.site}"] if self.site else []
        return f"inject:{','.join(words)}"


IRIX = Policy("irix")


class Injector:
    """What of `inject` has a state: how many requests it has counted. One to an arena.

    `failed` is called before each failure.
    """

    def __init__(self, policy: Policy, failed: Callable[[], None]) -> None:
        assert policy.kind == "inject"
        self.policy = policy
        self.calls = 0
        self._failed = failed

    def look(self, what: str, order: int, gfp: int) -> None:
        """Count an unconditional request; AllocationFailed when it is one of the chosen."""
        site = caller()
        if self.policy.counts(what, order, site):
            self.calls += 1
            if self.policy.picks(self.calls):
                self._failed()
                raise AllocationFailed(what, gfp, site)


def caller() -> str:
    """Who asks for memory: the innermost function outside of alloc/, as module:function."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").startswith("alloc.") and frame.f_back is not None:
        frame = frame.f_back
    name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # from Python 3.11 on
    return f"{frame.f_globals.get('__name__', '?')}:{name}"


def parse(text: str) -> Policy:
    """The policy that an option names; ValueError says what is wrong with it."""
    kind, colon, rest = text.partition(":")
    if kind not in KINDS:
        raise ValueError(f"policy {text!r}: not one of irix, linux, mayfail, {INJECT_HELP}")
    if kind != "inject":
        if colon:
            raise ValueError(f"policy {text!r}: {kind} takes no settings")
        return Policy(kind)
    settings: dict[str, str] = {}
    for word in filter(None, rest.split(",")):
        name, equals, value = word.partition("=")
        if name not in ("p", "nth", "seed", "order", "site") or not equals or not value:
            raise ValueError(f"policy {text!r}: {word!r} is no setting of {INJECT_HELP}")
        if name in settings:
            raise ValueError(f"policy {text!r}: {name} is set twice")
        settings[name] = value
    if ("p" in settings) == ("nth" in settings):
        raise ValueError(f"policy {text!r}: one of p= and nth= is needed: {INJECT_HELP}")
    order = _number(text, settings, "order", 0, ORDER_MAX) if "order" in settings else None
    return Policy(
        kind,
        _chance(text, settings["p"]) if "p" in settings else 0.0,
        _number(text, settings, "nth", 1, sys.maxsize) if "nth" in settings else 0,
        _number(text, settings, "seed", 0, sys.maxsize) if "seed" in settings else 0,
        order,
        settings.get("site", ""),
    )


def _number(text: str, settings: dict[str, str], name: str, least: int, most: int) -> int:
    value = settings[name]
    if not value.isascii() or not value.isdigit() or not least <= int(value) <= most:
        raise ValueError(f"policy {text!r}: {name}={value} is no number from {least} to {most}")
    return int(value)


def _chance(text: str, value: str) -> float:
    try:
        chance = float(value)
    except ValueError:
        chance = -1.0
    if not 0 < chance <= 1:
        raise ValueError(f"policy {text!r}: p={value} is no chance above 0 and up to 1")
    return chance
