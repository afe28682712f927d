"""The one place where numba is configured: flags, cache directory, registry and warm-up.

`kernel(signature)` marks an entry point that Python calls; the signature is compulsory because
warm-up compiles from it, so that no request ever waits for a compiler. `helper` marks a function
that only kernels call. Both are plain nopython functions that release the GIL; no jitclass.

Signatures are numba's short strings ("i8(u1[::1], i8)") or, where an argument is a NamedTuple of
arrays that no string can name, a callable that returns the tuple of argument types or sample
values. It is evaluated at warm-up.

numba does not notice that a function in *another* module changed, so the cache directory is
keyed by a hash of every source that holds kernels, together with the versions and the CPU.
`NOFAILFS_CACHE_DIR` overrides it. One process warms at a time (a file lock): concurrent writers
of one cache have crashed in numba.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba import typeof
from numba.core import config, sigutils, types
from numpy.typing import NDArray

ROOMS = ("alloc", "writeback", "fs")
# Kernels make no arrays and return none, so numba need not count references to them (_nrt): the
# counts are atomic, and those of the arena's arrays would travel between all lanes' processors.
# What an inlined function calls would be inlined, too, all the way down, if it did not say no:
# numba lets a function inherit that from whoever happens to be compiled first among its callers.
FLAGS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "_nrt": False,
    "forceinline": False,
}
DISABLED = bool(config.DISABLE_JIT)

Signature = str | Callable[[], tuple[Any, ...]]


@cache
def _hash_sources() -> str:
    """Hash of all kernel sources, numba's and llvmlite's versions and the CPU."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            text = path.read_bytes()
            if b"alloc.jit" in text or b"alloc.atomic" in text or room == "alloc":
                digest.update(path.name.encode())
                digest.update(text)
    for word in (numba.__version__, llvmlite.__version__, platform.python_version(), _cpu_name()):
        digest.update(word.encode())
    return digest.hexdigest()[:16]


def _cpu_name() -> str:
    import llvmlite.binding as llvm

    return str(llvm.get_host_cpu_name())


def cache_dir() -> Path:
    """Directory of the compiled kernels that belong to exactly these sources."""
    override = os.environ.get("NOFAILFS_CACHE_DIR")
    if override:
        return Path(override)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "nofailfs" / _hash_sources()


config.CACHE_DIR = str(cache_dir())
registry: list[tuple[Any, Signature]] = []


def kernel(signature: Signature) -> Callable[[Callable[..., Any]], Any]:
    """Decorate an entry point called from Python."""

    def wrap(function: Callable[..., Any]) -> Any:
        if DISABLED:
            return _as_compiled(function)
        dispatcher = numba.njit(**FLAGS)(function)
        registry.append((dispatcher, signature))
        return dispatcher

    return wrap


def _as_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """An interpreted kernel that returns Python's numbers, as a compiled one does."""

    def plain(result: Any) -> Any:
        if isinstance(result, tuple):
            return tuple(map(plain, result))
        return result.item() if isinstance(result, np.number | np.bool_) else result

    @wraps(function)
    def kernel(*args: Any) -> Any:
        return plain(function(*args))

    return kernel


class _Record(np.void):  # type: ignore[misc]  # mypy takes it for final
    """A record as kernels see it: its fields are attributes, whatever numpy has by that name."""

    def __getattribute__(self, name: str) -> Any:
        fields = np.void.__getattribute__(self, "dtype").names
        return self[name] if name in fields else np.void.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def _record_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.fields is None or dtype.names is None:
        return dtype
    fields = [dtype.fields[name] for name in dtype.names]
    layout: Any = {
        "names": dtype.names,
        "formats": [_record_type(field[0]) for field in fields],
        "offsets": [field[1] for field in fields],
        "itemsize": dtype.itemsize,
    }
    return np.dtype((_Record, np.dtype(layout)))


def record_table(table: NDArray[Any]) -> NDArray[Any]:
    """A table of records for kernels that take one of its records, compiled or interpreted."""
    return table.view(_record_type(table.dtype)) if DISABLED else table


def probe(function: Callable[..., Any]) -> Any:
    """Decorate a test's own entry point: compiled when it is first called, may make arrays."""
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)


def inlined(function: Callable[..., Any]) -> Any:
    """Decorate a helper whose callers shall contain it: a fast path, where a call with a tuple of
    arrays would cost more than the work. What it does rarely belongs into another helper.
    """
    return helper(function, forceinline=True)


def helper(function: Callable[..., Any], **flags: Any) -> Any:
    """Decorate a function that only kernels call.

    It gets no entry points for Python and C, and one specialization for all constant arguments:
    that halves the time it takes to compile the kernels.
    """
    dispatcher: Any = numba.njit(
        **(FLAGS | flags), no_cpython_wrapper=True, no_cfunc_wrapper=True
    )(function)
    if DISABLED:
        return dispatcher
    typed = dispatcher.get_call_template
    unliteral: Any = vars(types)["unliteral"]

    def without_literals(args: Any, kws: Any) -> Any:
        plain = {name: unliteral(kind) for name, kind in kws.items()}
        return typed(tuple(unliteral(kind) for kind in args), plain)

    def refuse(*args: Any, **kws: Any) -> Any:
        raise TypeError(f"{function.__qualname__} is a helper: only kernels call it")

    dispatcher.get_call_template = without_literals
    dispatcher._insert = lambda *args, **kws: None  # there is nothing that Python could call
    dispatcher._compile_for_args = refuse
    return dispatcher


def _argument_types(signature: Signature) -> tuple[Any, ...]:
    if callable(signature):
        return tuple(a if isinstance(a, types.Type) else typeof(a) for a in signature())
    args, _ = sigutils.normalize_signature(signature)
    return tuple(args)


@contextmanager
def _one_warmer() -> Iterator[None]:
    directory = cache_dir()
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "warm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(without: str = "") -> int:
    """Load every registered kernel, and keep its machine code only; returns how many there are.

    For a process that compiles nothing, because `warm` has filled the cache; what it compiles
    nevertheless calls loaded kernels where it could contain them. `without`: as for `warm`.
    """
    count = warm(without=without, keep_ir=False)
    ctypes.CDLL(None).malloc_trim(0)
    return count


def warm(
    progress: Callable[[int, int], None] | None = None, without: str = "", keep_ir: bool = True
) -> int:
    """Compile or load every registered kernel; returns how many there are.

    Those in modules whose names begin with `without` are left out, if it is given.

    `progress(done, total)` is called before each one. Raises RuntimeError naming the kernel that
    does not compile: a bug, never a condition of the machine.
    """
    if DISABLED:
        return 0
    wanted = [one for one in registry if not without or not one[0].__module__.startswith(without)]
    with _one_warmer():
        for done, (dispatcher, signature) in enumerate(wanted):
            if progress is not None:
                progress(done, len(wanted))
            try:
                dispatcher.compile(_argument_types(signature))
            except Exception as error:
                name = f"{dispatcher.__module__}.{dispatcher.__name__}"
                raise RuntimeError(f"kernel {name} {signature} does not compile") from error
            if not keep_ir:
                _forget_ir(dispatcher)
    return len(wanted)


def _forget_ir(dispatcher: Any) -> None:
    """Free the intermediate code of a kernel that was loaded, 170 KiB on the average.

    numba keeps it to inline the kernel where others that are compiled later call it. Given the
    empty module that stands for loaded machine code they call that.
    """
    for compiled in dispatcher.overloads.values():
        if compiled.library._shared_module is not None:
            compiled.library._shared_module = compiled.library._final_module
