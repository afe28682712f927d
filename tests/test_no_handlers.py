"""Rule 1, read from the source: nobody outside alloc/ handles a failed allocation.

Three things are looked for in writeback/, fs/ and tools/: a handler of an allocation error, a
test of the result of an unconditional allocation, and a `try_alloc_*` (the spelling whose result
may be None) without a comment that says why this caller can do with less. Planted samples show
that each is found. The counts are printed: no finding among no allocations would mean nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.source import Function, Source, dotted, modules, parse

ROOMS = ("writeback", "fs", "tools")
ERRORS = frozenset({"MemoryError", "AllocationError", "NoMemory", "OutOfMemory"})
# Block allocators share the verb; they may well say ENOSPC.
BLOCK_ALLOCATORS = frozenset({"freespace", "bmap", "inobt"})
# The front turns the control group's exception (--policy mayfail) into a reply.
ENOMEM_ALLOWED = ("fs/front/",)


def unconditional(node: ast.AST) -> bool:
    """Is this `await x.alloc(...)` or `await x.alloc_folio(...)`?"""
    if not isinstance(node, ast.Await) or not isinstance(node.value, ast.Call):
        return False
    words = dotted(node.value.func).split(".")
    if words[-1] == "alloc_folio":
        return True
    return words[-1] == "alloc" and len(words) > 1 and words[-2] not in BLOCK_ALLOCATORS


def conditional(node: ast.AST) -> bool:
    """Is this a `try_alloc` or `try_alloc_folio` call?"""
    return isinstance(node, ast.Call) and dotted(node.func).split(".")[-1].startswith("try_alloc")


def assignments(function: Function) -> list[tuple[int, str, ast.AST]]:
    """(line, name, value) of every assignment to a plain name, in the order of the lines."""
    found: list[tuple[int, str, ast.AST]] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        if node.value is not None:
            found += [(node.value.lineno, name, node.value) for name in names]
    return sorted(found, key=lambda item: item[0])


def decisions(function: Function) -> Iterator[ast.expr]:
    """Expressions whose truth, or whose being nothing, decides something."""
    for node in ast.walk(function):
        if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
            yield node.test
        elif isinstance(node, ast.BoolOp):
            yield from node.values
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node.operand
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(_is_nothing(side) for side in sides):
                yield from sides


def _is_nothing(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return isinstance(node.operand, ast.Constant)
    return isinstance(node, ast.Constant) and (node.value is None or node.value in (0, False))


def result_tests(source: Source) -> list[str]:
    """Tests of the result of an unconditional allocation."""
    found = []
    for function in source.functions():
        history = assignments(function)
        for test in decisions(function):
            inner = test.value if isinstance(test, ast.NamedExpr) else test
            if isinstance(inner, ast.Name):
                before = [v for line, name, v in history if name == inner.id and line < test.lineno]
                inner = before[-1] if before else inner
            if unconditional(inner):
                found.append(f"{source.name}:{test.lineno} tests an allocation that cannot fail")
    return sorted(set(found))


def handlers(source: Source) -> list[str]:
    """Handlers of allocation errors, and ENOMEM anywhere but at the FUSE boundary."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            names = {dotted(inner).split(".")[-1] for inner in ast.walk(node.type)}
            if names & ERRORS:
                found.append(f"{source.name}:{node.lineno} handles {' '.join(names & ERRORS)}")
        elif isinstance(node, ast.Name | ast.Attribute):
            known = dotted(node).split(".")[-1] == "ENOMEM"
            if known and not source.name.startswith(ENOMEM_ALLOWED):
                found.append(f"{source.name}:{node.lineno} knows ENOMEM")
    return sorted(set(found))


def unexplained(source: Source) -> list[str]:
    """`try_alloc_*` calls with no comment on their line or on the three before."""
    found = []
    for node in ast.walk(source.tree):
        if conditional(node):
            near = source.lines[max(0, node.lineno - 4) : node.lineno]
            if not any("#" in line for line in near):
                found.append(f"{source.name}:{node.lineno} try_alloc without a reason")
    return found


def test_nobody_handles_a_failed_allocation(capsys: pytest.CaptureFixture[str]) -> None:
    sources = modules(*ROOMS)
    nodes = [node for source in sources for node in ast.walk(source.tree)]
    counts = (
        f"{sum(map(unconditional, nodes))} unconditional allocations, "
        f"{sum(map(conditional, nodes))} try_alloc, "
        f"{sum(isinstance(node, ast.ExceptHandler) for node in nodes)} handlers "
        f"in {len(sources)} modules"
    )
    found = [
        line
        for source in sources
        for look in (handlers, result_tests, unexplained)
        for line in look(source)
    ]
    with capsys.disabled():
        print(f"\n  no handlers: {counts}: {len(found)} findings", end="")
    assert not found, "\n".join(found)


def test_allocation_types_have_no_failure() -> None:
    """In alloc/ itself the unconditional spellings promise an int and nothing else."""
    kinds = {
        f"{source.name}:{function.name}": ast.unparse(function.returns or ast.Constant("nothing"))
        for source in modules("alloc")
        for function in source.functions()
        if isinstance(function, ast.AsyncFunctionDef) and function.name in ("alloc", "alloc_folio")
    }
    assert kinds, "alloc/ has no unconditional allocation"
    assert set(kinds.values()) == {"int"}, kinds


PLANTED = {
    "except": "try:\n    f()\nexcept MemoryError:\n    pass\n",
    "except tuple": "try:\n    f()\nexcept (OSError, pool.AllocationError):\n    pass\n",
    "errno": "def f(e):\n    return e.errno == errno.ENOMEM\n",
    "is None": "async def f(a):\n    p = await a.alloc_folio(0)\n    return p is None\n",
    "not": "async def f(slab):\n    i = await slab.alloc()\n    return 1 if not i else 2\n",
    "zero": "async def f(s):\n    i = await s.slab.alloc()\n    while i == 0:\n        pass\n",
    "minus one": "async def f(s):\n    i = await s.alloc()\n    assert i != -1\n",
    "or": "async def f(a):\n    return (await a.alloc_folio(3)) or give_up()\n",
    "walrus": "async def f(a):\n    if (p := await a.alloc_folio(3)):\n        return p\n",
    "no reason": "def f(a):\n    return a.try_alloc_folio(0, NOWAIT)\n",
}
INNOCENT = {
    "used": "async def f(a):\n    p = await a.alloc_folio(0)\n    if p == other:\n        g(p)\n",
    "blocks": "async def f(tp):\n    m = await bmap.alloc(tp, 1)\n    if m is None:\n        g()\n",
    "try": "def f(a):\n    # a guess\n    p = a.try_alloc_folio(0, N)\n    return p is None\n",
    "then": (
        "async def f(a):\n    # first without waiting\n    p = a.try_alloc(N)\n"
        "    if p is None:\n        p = await a.alloc()\n    return p\n"
    ),
}


def _all(source: Source) -> list[str]:
    return handlers(source) + result_tests(source) + unexplained(source)


@pytest.mark.parametrize("text", PLANTED.values(), ids=PLANTED.keys())
def test_planted_handler_is_found(text: str) -> None:
    assert len(_all(parse(text))) == 1


@pytest.mark.parametrize("text", INNOCENT.values(), ids=INNOCENT.keys())
def test_innocent_sample_is_not(text: str) -> None:
    assert _all(parse(text)) == []
