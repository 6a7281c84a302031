"""The command line: ``hopkit plugins | ops | explain | check | new``.

Exit status: 0 where all is well, 1 where a cell is wrong, a plugin failed or is at fault, or plugins are in conflict, 2
where the command makes no sense.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, cast

from hopkit import kit
from hopkit.errors import HopkitError, HopkitWarning, PluginError
from hopkit.explain import HEADER, explain, find, function_name
from hopkit.new import new
from hopkit.op import AnyOp
from hopkit.program import load_program
from hopkit.spec import Sample
from hopkit.table import table

Command = Callable[[Sequence[str]], int]
"""Of a plugin: takes the arguments that come after its name, and gives the exit status."""

OK, WRONG, USAGE = 0, 1, 2

COLOURS = {
    "right": 32,
    "wrong": 31,
    "error": 31,
    "failed": 31,
    "faulty": 31,
    "conflict": 31,
    "missing": 31,
    "refused": 33,
    "refusing": 33,
    "hand-written": 36,
    "n/a": 2,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", HopkitWarning)
        try:
            status = _run(given)
        except (HopkitError, ValueError, OSError, argparse.ArgumentError) as error:
            if not isinstance(error, argparse.ArgumentError):  # argparse has told
                print(f"hopkit: {error}", file=sys.stderr)
            if "--json" in given:
                _print_json({"error": str(error)})
            status = USAGE
    for warning in caught:
        print(f"hopkit: warning: {warning.message}", file=sys.stderr)
    return status


def _run(argv: list[str]) -> int:
    brought = _brought()
    if argv and argv[0] in brought:
        return brought[argv[0]](argv[1:])
    chosen = _parser(brought).parse_args(argv)
    return cast("int", chosen.command(chosen))


def _brought() -> dict[str, Command]:
    """The commands that plugins bring, by name."""
    host, found = kit.current(), dict[str, "Command"]()
    host.load()
    for impl in host.plugins.impls("hopkit_add_commands"):
        given = impl.ask()
        if not isinstance(given, Mapping) or not all(isinstance(n, str) and callable(c) for n, c in given.items()):
            raise PluginError(
                impl.who(),
                f"gave {given!r}",
                why="they are no commands",
                todo="Give a mapping from names to functions that take the arguments and give the exit status",
            )
        found = {**given, **found}
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Told as argparse tells it, and the caller tells it again where JSON was asked for."""
        self.print_usage(sys.stderr)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise argparse.ArgumentError(None, message)


def _parser(brought: Mapping[str, Command]) -> argparse.ArgumentParser:
    parser = _Parser("hopkit", description="Higher-order operators for PyTorch, defined once.")
    output = _Parser(add_help=False)
    output.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: object, told: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[output], help=told, description=told)
        added.set_defaults(command=command)
        return added

    add("plugins", plugins, "List the plugins, and what is wrong with one.")
    add("ops", ops, "List the ops.")
    named = "torch's name of the op, or its Python name, with or without the package"
    add("explain", explained, "Show which rule answers in which mode, and whose it is.").add_argument("op", help=named)
    checking = add("check", check, "Run an op's samples in every mode, and compare with its body in plain PyTorch.")
    checking.add_argument("op", help=named)
    checking.add_argument("--program", metavar="FILE", help="make the samples from your own exported program (.pt2)")
    checking.add_argument("--mode", action="append", metavar="M", help="only this mode; may be given again")
    making = add("new", make, "Write a plugin package that installs and passes its own tests.")
    making.add_argument("name", metavar="NAME", help="the name of the distribution, such as hopkit-mine")
    for name, command in brought.items():
        commands.add_parser(name, help=(command.__doc__ or "").partition("\n")[0], add_help=False)
    making.add_argument("--directory", type=Path, default=Path(), metavar="D", help="where to put it (default: here)")
    return parser


def plugins(chosen: argparse.Namespace) -> int:
    """``hopkit plugins``."""
    infos = kit.current().infos()
    if chosen.json:
        _print_json([dataclasses.asdict(info) for info in infos])
    else:
        rows = [(i.name, i.distribution, i.version, i.state, i.error or ", ".join(i.hooks)) for i in infos]
        _print_table(("plugin", "distribution", "version", "state", "answers"), rows)
    return WRONG if any(info.error for info in infos) else OK


def ops(chosen: argparse.Namespace) -> int:
    """``hopkit ops``."""
    host = kit.current()
    host.load()
    supplied = host.supplied()
    found = [
        {
            "op": name,
            "function": function_name(op.spec),
            "plugin": supplied.get(name, ""),
            "signature": op.spec.shown(),
        }
        for name, op in host.ops.items()
    ]
    if chosen.json:
        _print_json(found)
    else:
        _print_table(("op", "function", "plugin", "signature"), [tuple(row.values()) for row in found])
    return OK


def explained(chosen: argparse.Namespace) -> int:
    """``hopkit explain OP``."""
    explanation = explain(chosen.op)
    if chosen.json:
        _print_json(explanation.as_json())
    else:
        print(explanation.title(), end="\n\n")
        _print_table(HEADER, explanation.cells())
    return WRONG if any(row.kind == "conflict" for row in explanation.rows) else OK


def check(chosen: argparse.Namespace) -> int:
    """``hopkit check OP``."""
    # Imported here: the columns load torch's compiler, and no other command needs it.
    from hopkit import testing

    op = find(chosen.op)
    samples = _samples(op, chosen.program) if chosen.program else None
    report = testing.check(op, samples, modes=chosen.mode, progress=_progress if sys.stderr.isatty() else None)
    if sys.stderr.isatty():
        print(f"\r{CLEAR}", end="", file=sys.stderr)
    if chosen.json:
        _print_json(report.as_json())
    else:
        _print_table(testing.HEADER, report.rows())
        print(f"\n{report.summary()}")
    return OK if report.ok else WRONG


def _samples(op: AnyOp, path: str) -> list[Sample]:
    """Samples from an exported program of the user's, made by a plugin that knows how."""
    program = load_program(path)
    for impl in kit.current().plugins.impls("hopkit_samples_from_program", op.spec.name):
        given = impl.ask(op.spec, program=program)
        if given is not None:
            samples = list(given) if isinstance(given, Iterable) else [given]
            if not all(isinstance(sample, Sample) for sample in samples):
                raise PluginError(
                    impl.who(op.spec),
                    f"gave {given!r}",
                    why="they are no calls of an op",
                    todo="Give a list of `hopkit.Sample`, or None",
                )
            return cast("list[Sample]", samples)
    raise ValueError(f"no plugin makes samples of op '{op.spec.name}' from a program")


def make(chosen: argparse.Namespace) -> int:
    """``hopkit new NAME``."""
    written = new(chosen.name, chosen.directory)
    if chosen.json:
        _print_json({"directory": str(written[0].parent), "files": [str(path) for path in written]})
    else:
        print("\n".join(map(str, written)))
        print(f'\nNext: pip install -e "{written[0].parent}[test]" && pytest {written[0].parent}')
    return OK


CLEAR = "\x1b[2K"


def _progress(done: int, total: int, what: str) -> None:
    print(f"\r{CLEAR}[{done}/{total}] {what}", end="", file=sys.stderr, flush=True)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(table(header, rows, _paint if coloured else str))


def _paint(cell: str) -> str:
    code = COLOURS.get(cell.strip())
    return cell if code is None else f"\x1b[{code}m{cell}\x1b[0m"
