"""`mount -t fuse.nofailfs` and fstab: the forms in which mount(8) calls a helper.

mount(8) runs `/sbin/mount.fuse.nofailfs SPEC DIR [-sfnv] [-N ns] [-o opts] [-t type]`; without
that file it runs mount.fuse3, which runs `nofailfs SPEC DIR -o opts`. Both become the command
`mount`. As mount.* `-f` means "fake", everywhere else it means foreground, as in libfuse.

The helper is a two-line script that names this Python, so that it works from an environment that
no PATH leads to. Must stay importable without numba.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path

from fs.errors import UserError

PATH = Path("/sbin/mount.fuse.nofailfs")
EXIT_USAGE, EXIT_SYSTEM = 1, 2
FAKE_FLAG = "--fake"
SKIPPED = frozenset(["-s", "-n"])  # sloppy or single-threaded; no mtab


def is_helper_name(program: str) -> bool:
    """Whether the program was called as a mount helper."""
    return os.path.basename(program).startswith("mount.")


def _as_helper(words: list[str]) -> list[str]:
    """mount(8)'s words as words of the command `mount`. Raises UserError for a namespace.

    mount(8) does not pass on options that are its own defaults, but FUSE's differ: root's mounts
    have devices and set-user-id programs unless an option says otherwise (as mount.fuse3 does).
    """
    out: list[str] = ["mount"]
    if os.geteuid() == 0:
        out += ["-o", "dev,suid"]
    rest = iter(words)
    for word in rest:
        if word == "-N":
            raise UserError("mounting in another namespace (-N) is not supported", EXIT_USAGE)
        if word == "-t":
            kind, _, subtype = next(rest, "").partition(".")
            if kind == "fuse":
                out[1:1] = ["-o", f"subtype={subtype}"]  # in front: -o subtype= wins
        elif word in ("-o", "--options"):
            out += ["-o", next(rest, "")]
        elif len(word) > 1 and word[0] == "-" and set(word[1:]) <= set("sfnv"):
            out += [FAKE_FLAG] * ("f" in word) + ["-v"] * ("v" in word)
        else:
            out.append(word)
    return out


def arguments(program: str, words: list[str], commands: Collection[str]) -> list[str]:
    """The arguments for the command line, from however the program was called."""
    if is_helper_name(program):
        return _as_helper(words)
    if not words or words[0] in commands or words[0].startswith("-"):
        return words
    plain = [word for word in words[1:] if word not in SKIPPED]
    if not plain:
        return words  # one word that is no command: let the parser say so
    return ["mount", words[0], *plain]


def script() -> str:
    """The text of the helper."""
    root = Path(__file__).resolve().parent.parent
    return (
        "#!/bin/sh\n"
        "# Written by `nofailfs install-helper`; called by mount(8) for type fuse.nofailfs.\n"
        f'PYTHONPATH="{root}${{PYTHONPATH:+:$PYTHONPATH}}" NOFAILFS_CALLED_AS="$0" '
        f'exec "{sys.executable}" -m fs.cli "$@"\n'
    )


def install(path: Path = PATH) -> None:
    """Write the helper. Raises UserError if that is not permitted."""
    try:
        path.write_text(script(), encoding="utf-8")
        path.chmod(0o755)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"cannot write {path}: {reason}; run it as root", EXIT_SYSTEM) from error
