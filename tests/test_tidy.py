"""Habits that a program can check: sizes, headers, annotations, and what may stand nowhere.

Each check counts what it looked at, and prints the count: a check that looks at nothing passes
for the wrong reason.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.source import (
    ROOMS,
    ROOT,
    Source,
    decorators,
    dotted,
    is_jitted,
    modules,
    parse,
    tree_files,
)

FUNCTION_LINES, KERNEL_LINES, LINE_COLUMNS = 60, 70, 100
HEADER_LINES = range(5, 21)
JIT_WORDS = frozenset(
    {"njit", "jit", "jitclass", "vectorize", "guvectorize", "cfunc", "generated_jit"}
)
JIT_NAMES = frozenset(f"{module}.{word}" for module in ("numba", "nb") for word in JIT_WORDS)
# Where numba's edges are known: flags, atomics, libc, and the one instruction of the CPU we name.
NUMBA_EDGES = ("alloc/jit.py", "alloc/atomic.py", "alloc/libc.py", "fs/xfs/crc.py")
# Bodies of jitted functions and their pure-Python twins; numba infers the types of both.
TWINS = ("alloc/atomic.py", "alloc/libc.py")
SILENT_ROOMS = ("alloc", "writeback", "fs")
# spelled in pieces, so that this file does not find itself
UNFINISHED = re.compile(
    "|".join(("TO" + "DO", "FIX" + "ME", r"\bXX" + r"X\b", "NotImplemented" + "Error"))
)
MACHINE_PATHS = re.compile("|".join(("/wo" + "rk/", "/ro" + "ot/", "/ho" + r"me/\w")))
REGISTRY_HOSTS = re.compile("py" + r"pi\.org|python" + r"hosted\.org|^--\S*(index-url|find-links)")


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]):
    """Print a line past pytest's capture."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n  tidy: {text}", end="")

    return say


def long_functions(source: Source) -> list[str]:
    found = []
    for function in source.functions():
        limit = KERNEL_LINES if is_jitted(function) else FUNCTION_LINES
        lines = (function.end_lineno or 0) - function.lineno + 1
        if lines > limit:
            found.append(f"{source.name}:{function.lineno} {function.name}: {lines} lines")
    return found


def bare_jit(source: Source) -> list[str]:
    """Jit decorators by their own names, and numba's extension tools outside their modules."""
    if source.name in NUMBA_EDGES:
        return []
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numba"):
            words = {alias.name for alias in node.names} & JIT_WORDS
            found += [f"{source.name}:{node.lineno} imports {word}" for word in words]
        elif isinstance(node, ast.Attribute) and dotted(node) in JIT_NAMES:
            found.append(f"{source.name}:{node.lineno} {dotted(node)}")
    for function in source.functions():
        words = decorators(function) & (JIT_WORDS | {"intrinsic", "overload"})
        found += [f"{source.name}:{function.lineno} @{word}" for word in words]
    return found


def prints(source: Source) -> list[str]:
    calls = (node for node in ast.walk(source.tree) if isinstance(node, ast.Call))
    return [f"{source.name}:{call.lineno}" for call in calls if dotted(call.func) == "print"]


def bad_header(source: Source) -> list[str]:
    first = source.tree.body[0] if source.tree.body else None
    if first is None or not ast.get_docstring(source.tree):
        return [f"{source.name}: no header"]
    lines = (first.end_lineno or 0) - first.lineno + 1
    if source.name.endswith("__init__.py") or lines in HEADER_LINES:
        return []
    return [f"{source.name}: a header of {lines} lines"]


def unannotated(source: Source) -> list[str]:
    """Functions that no jit decorator marks and whose types are not all written."""
    if source.name in TWINS:
        return []
    jitted = {
        id(inner)
        for function in source.functions()
        if is_jitted(function)
        for inner in ast.walk(function)
    }
    methods = {
        id(inner)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
        for inner in node.body
    }
    found = []
    for function in source.functions():
        if id(function) in jitted:
            continue
        static = "staticmethod" in decorators(function)
        spec = function.args
        plain = [*spec.posonlyargs, *spec.args]
        named = plain[1:] if id(function) in methods and not static else plain
        stars = [star for star in (spec.vararg, spec.kwarg) if star]
        bare = [a.arg for a in (*named, *spec.kwonlyargs, *stars) if a.annotation is None]
        if bare or (function.returns is None and function.name != "__init__"):
            where = f"{source.name}:{function.lineno} {function.name}"
            found.append(f"{where}({', '.join(bare)})")
    return found


def check(complaints: list[str], rule: str) -> None:
    assert not complaints, f"{rule}:\n  " + "\n  ".join(complaints)


def test_functions_are_short(tell) -> None:
    sources = modules(*ROOMS, "tests")
    count = sum(1 for source in sources for _ in source.functions())
    kernels = sum(is_jitted(function) for source in sources for function in source.functions())
    tell(f"{count} functions in {len(sources)} modules, {kernels} of them jitted")
    found = [line for source in sources for line in long_functions(source)]
    check(found, f"functions have at most {FUNCTION_LINES} lines, kernels {KERNEL_LINES}")


def test_lines_are_short(tell) -> None:
    files = [path for path in tree_files() if path.suffix in (".py", ".toml", ".md", ".fio", ".sh")]
    found, count = [], 0
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            count += 1
            if len(line) > LINE_COLUMNS and path.suffix != ".md":
                found.append(f"{path.relative_to(ROOT)}:{number} {len(line)} columns")
    tell(f"{count} lines in {len(files)} files")
    check(found, f"lines have at most {LINE_COLUMNS} columns")


def test_modules_have_headers(tell) -> None:
    sources = modules(*ROOMS)
    tell(f"{len(sources)} headers")
    found = [line for source in sources for line in bad_header(source)]
    found += [
        f"{s.name}: no docstring"
        for s in modules("tests")
        if s.text and not ast.get_docstring(s.tree)
    ]
    check(found, "every module begins with a header of 5 to 20 lines")


def test_jit_flags_live_in_one_place(tell) -> None:
    sources = modules(*ROOMS, "tests")
    tell(f"{len(sources)} modules looked at for jit decorators")
    found = [line for source in sources for line in bare_jit(source)]
    check(found, "@kernel and @helper of alloc/jit.py are the only jit decorators")


def test_packages_do_not_print(tell) -> None:
    sources = modules(*SILENT_ROOMS)
    tell(f"{len(sources)} modules looked at for print")
    check([line for source in sources for line in prints(source)], "packages do not print")


def test_everything_not_jitted_is_annotated(tell) -> None:
    """The half of mypy's strictness that pyproject.toml leaves to this test."""
    sources = modules(*ROOMS)
    plain = sum(not is_jitted(function) for source in sources for function in source.functions())
    tell(f"{plain} functions looked at for annotations")
    found = [line for source in sources for line in unannotated(source)]
    check(found, "every function that is not jitted has all its annotations")


def _matches(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number} {line.strip()[:80]}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]


def test_nothing_is_left_open(tell) -> None:
    paths = [path for path in tree_files() if path.suffix in (".py", ".toml", ".sh", ".fio")]
    tell(f"{len(paths)} files looked at for what is left open")
    check(_matches(UNFINISHED, paths), "nothing is left open")


def test_no_machine_paths_and_no_registry_hosts(tell) -> None:
    paths = list(tree_files())
    tell(f"{len(paths)} files looked at for paths of a machine and hosts of a registry")
    check(_matches(MACHINE_PATHS, paths), "no paths of somebody's machine")
    check(_matches(REGISTRY_HOSTS, paths), "no hosts of a registry")


PLANTED = {
    "long function": (long_functions, "def f():\n" + "    x = 1\n" * FUNCTION_LINES),
    "njit imported": (bare_jit, "from numba import njit\n"),
    "numba.njit": (bare_jit, "import numba\ng = numba.njit(f)\n"),
    "decorated": (bare_jit, "@jit(nogil=True)\ndef f(x):\n    return x\n"),
    "print": (prints, "print(1)\n"),
    "no header": (bad_header, "x = 1\n"),
    "short header": (bad_header, '"""Two words."""\n'),
    "no annotation": (unannotated, "def f(x):\n    return x\n"),
    "no return type": (unannotated, "class A:\n    def f(self, x: int):\n        return x\n"),
}


@pytest.mark.parametrize(("look", "text"), PLANTED.values(), ids=PLANTED.keys())
def test_planted_untidiness_is_found(look, text: str) -> None:
    assert len(look(parse(text))) == 1


def test_tidy_samples_are_not() -> None:
    header = '"""One.\n\nTwo\nthree\nfour.\n"""\n'
    source = parse(header + "@kernel('i8(i8)')\ndef f(x):\n    return x\n")
    assert [line for look, _ in PLANTED.values() for line in look(source)] == []
