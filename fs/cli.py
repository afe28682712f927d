"""The command line: mount, umount, info, stat, freeze, thaw, doctor, install-helper.

Thin: each command turns its words into a call and its result into output. Results go to standard
output, everything else to standard error. Exit codes of `mount` are mount(8)'s (1 usage, 2
system, 4 bug, 8 interrupted, 32 failed); the others give 0, 1 for failure and 2 for usage.

Commands import what they need when they run, because `info`, `doctor` and `umount` must not load
the compiler. The tools' commands join `app` from above (imports go downwards only).
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

from fs import helper
from fs.errors import UserError

EXIT_USAGE = 1
EXIT_INTERRUPTED = 8

app = typer.Typer(
    name="nofailfs",
    help="XFS in user space, on a memory manager whose allocations never fail.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Options = Annotated[
    list[str] | None,
    typer.Option("-o", "--options", metavar="OPTS", help="Mount options, by commas; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON object.")]


def _print_versions(wanted: bool) -> None:
    if wanted:
        from fs import doctor

        typer.echo("\n".join(doctor.versions()))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("-V", "--version", is_eager=True, callback=_print_versions, help="Versions."),
    ] = False,
) -> None:
    """XFS in user space, on a memory manager whose allocations never fail."""


@app.command(epilog="Example: nofailfs mount disk.img /mnt -o ro,cache=writethrough --memory 64M")
def mount(
    source: Annotated[str, typer.Argument(metavar="IMAGE", help="Image, device or label.")] = "",
    mountpoint: Annotated[str, typer.Argument(metavar="DIR", help="Where to mount.")] = "",
    options: Options = None,
    memory: Annotated[str, typer.Option(help="Size of the arena: all caches. [256M]")] = "",
    policy: Annotated[str, typer.Option(help="irix, linux, mayfail or inject:... [irix]")] = "",
    scratch: Annotated[str, typer.Option(help="Make an image of this size in memory.")] = "",
    mkfs: Annotated[str, typer.Option(help="Words for mkfs.xfs of a scratch image.")] = "",
    cache: Annotated[str, typer.Option(help="none, writethrough or writeback. [none]")] = "",
    log: Annotated[str, typer.Option(help="FILE, stderr, syslog or none.")] = "",
    foreground: Annotated[bool, typer.Option("-f", "--foreground", help="Do not fork.")] = False,
    debug: Annotated[bool, typer.Option("-d", "--debug", help="Talk; implies -f.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say what is mounted.")] = False,
    fake: Annotated[bool, typer.Option(helper.FAKE_FLAG, hidden=True)] = False,
) -> None:
    """Mount an image. Returns when the mount answers.

    Options of -o: ro rw noatime nodiratime relatime strictatime lazytime sync dirsync suid dev
    exec allow_other allow_root acl noacl auto_unmount remount paranoid lockdep debug foreground
    image=PATH direct=auto|on|off scratch=SIZE mkfs=WORDS device=bw=,iops=,lat=,jitter=,seed=
    faults=write=,torn=,read=,flush=,seed=,first=,last= record=PATH memory=SIZE
    cache=none|writethrough|writeback fsname= subtype= log=
    policy=irix|linux|mayfail|inject:p=,nth=,seed=,order=,site= numa=N
    distance=10:20:... mpol=local|prefer:|prefer-many:|bind:|interleave:|weighted:NODES lanes=N
    transport=device|uring max_write=SIZE latency=auto|on|off stall=SECONDS
    lock_timeout=SECONDS logbsize=SIZE max_background=N read_ahead_kb=N procdir=NAME|off.
    """
    from fs import mount as life
    from fs.front import options as grammar

    words = list(options or [])
    named = {"memory": memory, "scratch": scratch, "mkfs": mkfs, "cache": cache, "log": log}
    named["policy"] = policy
    words += [f"{name}={grammar.escape(value)}" for name, value in named.items() if value]
    words += ["foreground"] * foreground + ["debug"] * debug
    parsed = grammar.parse(words)
    if (parsed.is_scratch or parsed.remount or parsed.image) and not mountpoint:
        source, mountpoint = "", source
    parsed = grammar.resolve(parsed, source, mountpoint)
    if fake:
        return
    status = life.mount(parsed)
    if verbose and not status:
        typer.echo(f"{parsed.mount_source} on {mountpoint} ({grammar.describe(parsed)})", err=True)
    raise typer.Exit(status)


@app.command()
def umount(
    mountpoint: Annotated[str, typer.Argument(metavar="DIR", help="Where it is mounted.")],
    lazy: Annotated[bool, typer.Option("-l", "--lazy", help="Detach now, do not wait.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the daemon.")] = 600.0,
) -> None:
    """Unmount; returns when everything is written, with the daemon's status."""
    from fs import unmount

    raise typer.Exit(unmount.unmount(mountpoint, lazy=lazy, timeout=timeout))


@app.command()
def info(
    image: Annotated[str, typer.Argument(metavar="IMAGE|DIR", help="Image or mount point.")],
    as_json: Json = False,
) -> None:
    """Print the layout of an image, as xfs_info does; of a mount also what FUSE agreed upon."""
    from fs import info as layouts

    path, policy, negotiated = _image_behind(image)
    shown = layouts.layout(layouts.read_superblock(path))
    if as_json:
        typer.echo(json.dumps(layouts.record(shown, path, policy, negotiated), indent=2))
    else:
        typer.echo(layouts.text(shown, path) + layouts.mount_text(policy, negotiated), nl=False)


def _image_behind(path: str) -> tuple[str, str, dict[str, Any]]:
    """The image of a mount point, its allocator's policy, what was negotiated; or the path."""
    from fs import mounts, runfile

    mounted = mounts.find(path)
    if mounted is None:
        return path, "", {}
    record = runfile.of_mountpoint(mounted.mountpoint)
    if record is None or not record.is_alive():
        return mounted.source, "", {}
    image = record.image or f"/proc/{record.pid}/fd/{record.image_fd}"
    return image, record.policy, record.negotiated


@app.command()
def stat(
    mountpoint: Annotated[str, typer.Argument(metavar="DIR", help="Where it is mounted.")],
    as_json: Json = False,
) -> None:
    """Print what a mount has done: requests by opcode, who answered them, how long it took."""
    from fs import stat as figures

    found = figures.read(mountpoint)
    typer.echo(json.dumps(found, indent=2) if as_json else figures.text(found), nl=as_json)


ReportsName = Annotated[str, typer.Option(help="Name of the mount's directory of reports.")]


@app.command()
def freeze(
    mountpoint: Annotated[str, typer.Argument(metavar="DIR", help="Where it is mounted.")],
    procdir: ReportsName = ".nofail",
) -> None:
    """Have writers wait, and write everything: a copy of the image is whole until `thaw`."""
    from fs import fsfreeze

    fsfreeze.freeze(mountpoint, procdir)


@app.command()
def thaw(
    mountpoint: Annotated[str, typer.Argument(metavar="DIR", help="Where it is mounted.")],
) -> None:
    """Let writers go on after `freeze`."""
    from fs import fsfreeze

    fsfreeze.thaw(mountpoint)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look for what this machine lacks, and say how to get it."""
    from fs import doctor as checks

    findings = checks.examine()
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            mark = "ok" if finding.good else ("MISSING" if finding.kind == "needed" else "absent")
            advice = "" if finding.good or not finding.advice else f" ({finding.advice})"
            typer.echo(f"{mark:<8}{finding.name:<28}{finding.detail}{advice}")
        if line := checks.apt_line(findings):
            typer.echo(f"install with: {line}")
    raise typer.Exit(0 if checks.is_fit(findings) else 1)


@app.command("install-helper")
def install_helper() -> None:
    """Make `mount -t fuse.nofailfs` and fstab work: write the helper of mount(8)."""
    helper.install()
    typer.echo(f"{helper.PATH} written")


def command_names() -> set[str]:
    """The names of all commands that `app` has."""
    return set(typer.main.get_group(app).commands)


def run(words: list[str], program: str = "nofailfs") -> int:
    """Run the command line; returns the exit status. Used by every entry point."""
    try:
        arguments = helper.arguments(program, words, command_names())
        status: Any = app(args=arguments, prog_name="nofailfs", standalone_mode=False)
    except UserError as error:
        typer.echo(f"nofailfs: {error}", err=True)
        return error.exit_code
    except typer.Exit as leave:
        return int(leave.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except Exception as error:
        if not hasattr(error, "show"):
            raise
        error.show()  # the parser's own: wrong usage
        return EXIT_USAGE if words[:1] == ["mount"] else int(getattr(error, "exit_code", 2))
    return status if isinstance(status, int) else 0


def main() -> int:
    """Entry point: `python -m fs.cli`, and the mount helper."""
    return run(sys.argv[1:], os.environ.pop("NOFAILFS_CALLED_AS", sys.argv[0]))


if __name__ == "__main__":
    sys.exit(main())
