"""Reading our own source: files of the rooms, their syntax trees, decorators of functions.

Shared by the tests that check the source itself. Each check is a function from a parsed module
to a list of complaints, so that it can be calibrated with planted samples.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("alloc", "writeback", "fs", "tools")
JIT_DECORATORS = frozenset({"kernel", "helper", "inlined", "probe", "intrinsic", "overload"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One parsed module; `name` is its path from the top of the tree."""

    name: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.split("/")[0]

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def functions(self) -> Iterator[Function]:
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                yield node


def parse(text: str, name: str = "fs/sample.py") -> Source:
    """A module from its text, as the checks want it."""
    return Source(name, text, ast.parse(text))


@cache
def modules(*rooms: str) -> tuple[Source, ...]:
    """Every module of these rooms (top-level folders)."""
    paths = (path for room in rooms for path in sorted((ROOT / room).rglob("*.py")))
    return tuple(parse(path.read_text(), str(path.relative_to(ROOT))) for path in paths)


@cache
def tree_files() -> tuple[Path, ...]:
    """Every text file that is, or would be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    paths = (ROOT / name for name in listed.split("\0") if name)
    return tuple(path for path in paths if path.is_file() and b"\0" not in path.read_bytes())


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or an attribute, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else f".{node.attr}"
    return ""


def decorators(function: Function) -> set[str]:
    """Last words of the decorators' names: {"kernel"} for @kernel("...")."""
    found = set()
    for node in function.decorator_list:
        target = node.func if isinstance(node, ast.Call) else node
        found.add(dotted(target).split(".")[-1])
    return found


def is_jitted(function: Function) -> bool:
    return bool(decorators(function) & JIT_DECORATORS)
