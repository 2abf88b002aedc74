"""`python -m sandbox doctor` and `python -m sandbox run [options] -- command ...`."""

from __future__ import annotations

import argparse
import codecs
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from . import plan as plans
from .box import BlockingSandbox
from .doctor import describe
from .errors import SandboxError, SpecError
from .layers import OUTER, PROBE, checks
from .layers.environ import allowed
from .probe import probe
from .report import ChildReport, Ending
from .spec import CGROUPS, TIERS, Limits, SandboxSpec
from .wire import clean, write_all

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
TIMED_OUT_CODE, NOT_RUN_CODE, NOT_READ_CODE = 124, 125, 128 + signal.SIGPIPE
_MIN_MEMORY_BYTES = 32 * 2**20
"""What starts the command is a Python of its own."""
_OPTIONS = {
    "limits.wall_s": "--time",
    "limits.processes": "--procs",
    "limits.terminals": "--terminals",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: the command's own, 128 + a signal's number, 124 where its time was up,
    125 where it was not run or a limit ended it, 141 where nobody read its output any more."""
    args = _parser().parse_args(arguments)
    if args.action == "doctor":
        print(describe(probe({**PROBE, **OUTER}), shutil.get_terminal_size((100, 24)).columns))
        return 0
    shown = _Shown()
    try:
        spec = _spec(args)
        if args.plan:
            print(plans.plan(spec, probe(checks(spec.tier))))
            return 0
        if not args.command:
            raise SandboxError("no command: write it after --")
        if bool(args.output) != (args.collect_to is not None):
            raise SandboxError("--output and --collect-to go together")
        if args.collect_to is not None and args.collect_to.exists():
            raise SandboxError(f"--collect-to {args.collect_to}: it exists; name a new folder")
        with BlockingSandbox(spec) as box:
            report = box.execute(
                args.command,
                env=_variables(args.env),
                workspace=args.workspace,
                outputs=args.output,
                on_output=shown.write,
            )
        if args.output:
            _leave(report, args.collect_to)
    except SandboxError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return NOT_RUN_CODE
    except _NotShown as failure:
        if isinstance(failure.error, BrokenPipeError):
            return NOT_READ_CODE
        print(f"sandbox: what the command says cannot be written: {failure}", file=sys.stderr)
        return NOT_RUN_CODE
    for refused, count in report.egress_refused.items():
        print(f"sandbox: refused {refused} ({count}x): see --net", file=sys.stderr)
    return _exit_code(report)


def _spec(args: argparse.Namespace) -> SandboxSpec:
    """Raises `SpecError` that names the option."""
    try:
        limits = Limits(
            wall_s=args.time,
            memory_bytes=args.mem,
            total_memory_bytes=args.mem,
            scratch_bytes=args.disk,
            processes=args.procs,
            terminals=args.terminals,
            output_bytes=2**40,  # it goes straight through
        )
    except SpecError as error:
        name, _, why = str(error).partition(" ")
        raise SpecError(f"{_OPTIONS.get(name, name)} {why}") from None
    if args.mem < _MIN_MEMORY_BYTES:
        raise SpecError(f"--mem must be at least {_MIN_MEMORY_BYTES // 2**20}M: no less starts it")
    for path in args.ro:
        if not os.path.lexists(path):
            raise SpecError(f"--ro {path!r}: there is no such file or folder")
    return SandboxSpec(
        tier=args.tier,
        cgroups=args.cgroups,
        env=allowed(os.environ),
        limits=limits,
        readable=tuple(os.path.abspath(path) for path in args.ro),
        allow=args.net,
        mounts=_mounts(args.mount),
    )


class _NotShown(Exception):
    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class _Shown:
    """What the command writes, as it is; on a terminal, which obeys escapes, those are text."""

    def __init__(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {fd: decoder("backslashreplace") for fd in (1, 2) if os.isatty(fd)}

    def write(self, fd: int, content: bytes) -> None:
        if fd in self._decoders:
            content = clean(self._decoders[fd].decode(content)).encode()
        try:
            write_all(fd, content)
        except OSError as error:
            raise _NotShown(error) from None


def _exit_code(report: ChildReport) -> int:
    if report.ending is Ending.EXITED and report.exit_code is not None:
        return report.exit_code
    print(f"sandbox: {report.error}", file=sys.stderr)
    if report.signal is not None and report.ending is Ending.SIGNALED:
        return 128 + report.signal
    return TIMED_OUT_CODE if report.ending is Ending.TIMEOUT else NOT_RUN_CODE


def _leave(report: ChildReport, folder: Path) -> None:
    """Write the outputs into `folder`, which is made here; say what is not among them."""
    try:
        folder.mkdir(parents=True)
        for name, content in report.outputs.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        raise SandboxError(f"--collect-to {folder}: {error}") from None
    for name in report.outputs_missing:
        print(f"sandbox: output {name}: not there", file=sys.stderr)
    for name, why in report.outputs_refused:
        print(f"sandbox: output {name}: refused: {why}", file=sys.stderr)


def _mounts(words: Sequence[str]) -> Mapping[str, str]:
    mounts = {}
    for word in words:
        inside, _, outside = word.partition("=")
        if not outside:
            raise SandboxError(f"--mount {word}: write INSIDE=OUTSIDE")
        if inside in mounts:
            raise SandboxError(f"--mount {word}: {inside} is given twice")
        if not os.path.exists(outside):
            raise SandboxError(f"--mount {word}: there is no {outside}")
        mounts[inside] = os.path.abspath(outside)
    return mounts


def _variables(words: Sequence[str]) -> dict[str, str]:
    variables = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise SandboxError(f"--env {word}: write NAME=VALUE")
        variables[name] = value
    return variables


def _network(text: str) -> tuple[str, ...]:
    if text == "none":
        return ()
    kind, colon, entries = text.partition(":")
    if kind != "allow" or not colon:
        raise argparse.ArgumentTypeError(f"{text!r}: write none, or allow:HOST:PORT,HOST:PORT")
    return tuple(entries.split(","))


def _size(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if unit not in _UNITS or not number.isdecimal() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write whole ones, 512M or 2G")
    return int(number) * _UNITS[unit]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(NOT_RUN_CODE, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m sandbox", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("doctor", help="show which layers this machine gives, and what to do")
    run = actions.add_parser("run", help="run a command in a fresh child")
    run.add_argument("--tier", choices=TIERS, default="auto")
    run.add_argument("--cgroups", choices=CGROUPS, default="auto", help="have the kernel bound it")
    run.add_argument(
        "--net",
        type=_network,
        default="none",
        metavar="none|allow:HOST:PORT[,HOST:PORT]",
        help="what it can reach, through a proxy that HTTP_PROXY and its like name",
    )
    run.add_argument("--mem", type=_size, default="2G", help="of all its processes together")
    run.add_argument("--disk", type=_size, default="512M", help="of all its files together")
    run.add_argument("--procs", type=int, default=256, help="processes and threads")
    run.add_argument("--terminals", type=int, default=0, help="pseudo-terminals that it can make")
    run.add_argument("--time", type=float, default=300.0, help="seconds")
    run.add_argument("--ro", action="append", default=[], metavar="PATH", help="can be read, too")
    run.add_argument("--mount", action="append", default=[], metavar="INSIDE=OUTSIDE")
    run.add_argument("--workspace", metavar="DIR", help="its content is where the command starts")
    run.add_argument(
        "--output", action="append", default=[], metavar="PATH", help="taken out of it"
    )
    run.add_argument("--collect-to", type=Path, metavar="DIR", help="a new folder, for outputs")
    run.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    run.add_argument("--plan", action="store_true", help="print what would be applied, and end")
    run.add_argument("command", nargs="*")
    return parser


_ended_by: list[int] = []


def _end(number: int, _: object) -> None:
    """Of a signal by which nothing of the child's would be removed: as Ctrl-C, also where that is
    ignored, as behind a shell's `&`."""
    _ended_by.append(number)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    for ends in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ends) is signal.SIG_DFL:
            signal.signal(ends, _end)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + (_ended_by or [signal.SIGINT])[0])
