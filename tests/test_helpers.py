"""Functions marked `helper` are for kernels only: nobody calls one from Python.

They have no entry point for Python (alloc/jit.py), so such a call fails when it is made, maybe only
in a case that no other test reaches. This looks at every call in every function that is not jitted
and asks what its name stands for. Only names that a module knows are followed: `f(...)` and
`module.f(...)`, which is how functions are called here.
"""

from __future__ import annotations

import ast
import importlib
import types
from typing import Any

from alloc.atomic import mask64
from alloc.jit import DISABLED
from tests.source import ROOMS, Source, is_jitted, modules, parse

TWINS = ("alloc/atomic.py", "alloc/libc.py")  # their plain twins have the same names


def is_helper(thing: Any) -> bool:
    """Did `alloc.jit.helper` make it?"""
    return "_compile_for_args" in getattr(thing, "__dict__", {})


def meant(call: ast.Call, known: dict[str, Any]) -> Any:
    """What a call's name stands for in its module; None for what is not followed."""
    name = call.func
    if isinstance(name, ast.Name):
        return known.get(name.id)
    if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name):
        owner = known.get(name.value.id)
        if isinstance(owner, types.ModuleType):
            return getattr(owner, name.attr, None)
    return None


def calls(node: ast.AST) -> list[ast.Call]:
    """Calls below a node, outside of jitted functions."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and is_jitted(child):
            continue
        if isinstance(child, ast.Call):
            found.append(child)
        found += calls(child)
    return found


def wrong_calls(source: Source, known: dict[str, Any]) -> list[str]:
    return [
        f"{source.name}:{call.lineno} {ast.unparse(call.func)}"
        for call in calls(source.tree)
        if is_helper(meant(call, known))
    ]


def test_nobody_calls_a_helper_from_python() -> None:
    if DISABLED:
        return
    wrong, looked_at = [], 0
    for source in modules(*ROOMS):
        if source.name in TWINS or source.name.endswith("__main__.py"):
            continue
        name = source.name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        known = vars(importlib.import_module(name))
        looked_at += len(calls(source.tree))
        wrong += wrong_calls(source, known)
    assert looked_at > 1000
    assert not wrong, "helpers called from Python:\n  " + "\n  ".join(wrong)


def test_a_planted_call_is_found() -> None:
    source = parse("def f():\n    return mask64(3)\n\n@helper\ndef g():\n    return mask64(3)\n")
    found = wrong_calls(source, {"mask64": mask64})
    assert found == ([] if DISABLED else ["fs/sample.py:2 mask64"])
