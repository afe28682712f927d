"""Rule 1, read from the source: nobody outside alloc/ handles a failed allocation.

These things are looked for in writeback/, fs/ and tools/: a handler of an allocation error, or one
of everything that does not raise it again, outside of the functions named here, which are where
the control group's exception ends; a test of the result of an unconditional allocation; and a
`try_alloc_*` (the spelling whose result may be None) without a comment that says why this caller
can do with less. Planted samples show that each is found. The counts are printed, allocation sites
by kind: no finding among no allocations would mean nothing.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.source import Function, Source, dotted, modules, parse

ROOMS = ("writeback", "fs", "tools")
ERRORS = frozenset({"MemoryError", "AllocationError", "NoMemory", "OutOfMemory"})
# Names of the control group's exception (--policy mayfail), and of what tells it from others.
FAILURES = frozenset({"AllocationFailed", "failed_allocation"})
EVERYTHING = frozenset({"Exception", "BaseException", "ExceptionGroup", "BaseExceptionGroup"})
# Where it ends. Everything between the allocator and these functions only tidies up.
ENDS = {
    "fs/enomem.py:Failures.note": "counts",
    "fs/enomem.py:failed_allocation": "finds it in a nursery's group",
    "fs/enomem.py:_first": "finds it in a nursery's group",
    "fs/enomem.py:force_shutdown": "a dirty transaction, a chain that is one change: shutdown",
    "fs/enomem.py:insist": "work in the background is tried again, then shuts down",
    "fs/enomem.py:told_less": "a request: what it did before is its answer",
    "fs/file.py:write_held": "a write: what was copied before is its answer",
    "fs/front/guard.py:error_of": "a request: ENOMEM",
    "fs/front/laneslow.py:_go_on": "a write that a lane began: likewise",
    "fs/front/operations.py:Operations.readdir": "a request: what was told before it is told",
    "fs/volume.py:Volume._background_failed": "a task in the background begins again",
    "fs/writepages.py:_fail": "write-back: the mapping keeps it, folios stay dirty",
    "fs/writepages.py:_map": "write-back: the mapping keeps it, folios stay dirty",
    "fs/writepages.py:_write_and_complete": "write-back: the mapping keeps it",
}
# Handlers of everything that end it, and what for: each asks `error_of`, or ends the program.
CATCH_ALLS = {
    "fs/cli.py:run": "the command line",
    "fs/daemon.py:_child": "the daemon's end",
    "fs/front/desk.py:Desk._drain": "the gate",
    "fs/front/desk.py:Desk._heed": "the gate",
    "fs/front/desk.py:Desk._release": "the gate",
    "fs/front/guard.py:_guard.guarded": "the gate",
    "fs/front/opcodes.py:answer": "the gate",
    "fs/front/opnames.py:serve_now": "the gate",
    "fs/volume.py:Volume._in_background": "a task in the background begins again",
    "tools/crash/campaign.py:_one_load": "what a load or a recovery died of is the finding",
    "tools/crash/campaign.py:examine": "what a load or a recovery died of is the finding",
}
# Block allocators share the verb; they may well say ENOSPC.
BLOCK_ALLOCATORS = frozenset({"freespace", "bmap", "inobt", "shape", "SHAPE"})
ENOMEM_ALLOWED = ("fs/front/", "fs/enomem.py")
FLAGS = ("NOFAIL", "RETRY_MAYFAIL", "NORETRY", "NOWAIT", "ATOMIC")


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


def located(tree: ast.AST, name: str) -> Iterator[tuple[ast.AST, str]]:
    """Every node, and the function or class that it stands in as `file:Class.function`."""
    stack: list[tuple[ast.AST, str]] = [(tree, f"{name}:")]
    while stack:
        node, where = stack.pop()
        yield node, where
        inside = where
        if isinstance(node, Function | ast.ClassDef):
            inside = f"{where}{'' if where.endswith(':') else '.'}{node.name}"
        stack += [(child, inside) for child in ast.iter_child_nodes(node)]


def last_words(node: ast.AST) -> set[str]:
    """The last words of all names in an expression."""
    return {dotted(inner).split(".")[-1] for inner in ast.walk(node)}


def handlers(source: Source) -> list[str]:
    """Handlers of allocation errors, and ENOMEM anywhere but at the FUSE boundary."""
    found = []
    for node, where in located(source.tree, source.name):
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            names = last_words(node.type) & (ERRORS | FAILURES)
            if names and where not in ENDS:
                found.append(f"{source.name}:{node.lineno} handles {' '.join(names)}")
        elif isinstance(node, ast.Name | ast.Attribute):
            known = dotted(node).split(".")[-1] == "ENOMEM"
            if known and not source.name.startswith(ENOMEM_ALLOWED):
                found.append(f"{source.name}:{node.lineno} knows ENOMEM")
    return sorted(set(found))


def askers(source: Source) -> list[str]:
    """Who looks whether something is a failed allocation, with `isinstance` or by a call."""
    return [
        f"{source.name}:{node.lineno} asks for a failed allocation"
        for node, where in located(source.tree, source.name)
        if isinstance(node, ast.Call)
        and where not in ENDS
        and FAILURES & set().union(*map(last_words, [node.func, *node.args]))
    ]


def catch_alls(source: Source) -> list[str]:
    """Handlers of everything that do not raise it again, and `suppress` of everything."""
    found = []
    for node, where in located(source.tree, source.name):
        if isinstance(node, ast.ExceptHandler):
            wide = node.type is None or last_words(node.type) & EVERYTHING
            wide = wide and not isinstance(node.body[-1], ast.Raise)
        else:
            wide = isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "suppress"
            wide = wide and any(last_words(inner) & EVERYTHING for inner in node.args)
        if wide and where not in CATCH_ALLS and where not in ENDS:
            found.append(f"{source.name}:{node.lineno} handles everything in {where}")
    return found


def kind(call: ast.Call) -> str:
    """What an allocation may do: the flags that say whether it may fail, KERNEL if none does."""
    words = set().union(*map(last_words, [*call.args, *(k.value for k in call.keywords)]), {""})
    return "|".join(flag for flag in FLAGS if flag in words) or "KERNEL"


def sites(sources: tuple[Source, ...]) -> Counter[str]:
    """Allocation sites by kind; those of lanes are jitted and take what is above `low`."""
    found: Counter[str] = Counter()
    for node in (node for source in sources for node in ast.walk(source.tree)):
        if unconditional(node):
            assert isinstance(node, ast.Await)
            assert isinstance(node.value, ast.Call)
            found[kind(node.value)] += 1
        elif conditional(node):
            assert isinstance(node, ast.Call)
            found[f"try {kind(node)}"] += 1
        elif isinstance(node, ast.Call) and "RIGHTS_LOW" in last_words(node):
            found["lanes' try"] += dotted(node.func) in ("take", "object_alloc")
    return found


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
    kinds = ", ".join(f"{n} {name}" for name, n in sorted(sites(sources).items()))
    counts = (
        f"{sum(map(unconditional, nodes))} unconditional allocations, "
        f"{sum(map(conditional, nodes))} try_alloc, "
        f"{sum(isinstance(node, ast.ExceptHandler) for node in nodes)} handlers "
        f"in {len(sources)} modules"
    )
    found = [line for source in sources for look in LOOKS for line in look(source)]
    with capsys.disabled():
        print(f"\n  no handlers: {counts}: {len(found)} findings", end="")
        print(f"\n  allocation sites: {kinds}; {len(ENDS)} ends", end="")
    assert not found, "\n".join(found)


def test_every_end_is_there() -> None:
    """A function that was renamed, or that handles nothing any longer, is no end."""
    found = set()
    for source in modules(*ROOMS):
        for node, where in located(source.tree, source.name):
            if isinstance(node, ast.Name | ast.Attribute | ast.ExceptHandler):
                found.add(where)
    assert set(ENDS) | set(CATCH_ALLS) <= found


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
    "ours": "try:\n    f()\nexcept AllocationFailed:\n    pass\n",
    "group": "try:\n    f()\nexcept* policy.AllocationFailed:\n    pass\n",
    "raised again": "try:\n    f()\nexcept AllocationFailed:\n    raise\n",
    "isinstance": "def f(e):\n    return isinstance(e, AllocationFailed)\n",
    "asked": "def f(e):\n    return enomem.failed_allocation(e)\n",
    "bare": "try:\n    f()\nexcept:\n    pass\n",
    "everything": "try:\n    f()\nexcept Exception:\n    log()\n",
    "suppress": "with contextlib.suppress(Exception):\n    f()\n",
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
    "tidied": "try:\n    f()\nexcept BaseException:\n    tidy()\n    raise\n",
    "other": "try:\n    f()\nexcept OSError:\n    pass\n",
    "then": (
        "async def f(a):\n    # first without waiting\n    p = a.try_alloc(N)\n"
        "    if p is None:\n        p = await a.alloc()\n    return p\n"
    ),
}


LOOKS = (handlers, askers, catch_alls, result_tests, unexplained)


def _all(source: Source) -> list[str]:
    return [line for look in LOOKS for line in look(source)]


@pytest.mark.parametrize("text", PLANTED.values(), ids=PLANTED.keys())
def test_planted_handler_is_found(text: str) -> None:
    assert len(_all(parse(text))) == 1


@pytest.mark.parametrize("text", INNOCENT.values(), ids=INNOCENT.keys())
def test_innocent_sample_is_not(text: str) -> None:
    assert _all(parse(text)) == []
