"""``hopkit constgraph fold MODEL.pt2 -o FOLDED.pt2`` and ``hopkit constgraph report MODEL.pt2``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

import torch

from hopkit.extend import hookimpl, load_program
from hopkit_constgraph.fold import fold, report_of
from hopkit_constgraph.policy import Policy

Program = torch.export.ExportedProgram


@hookimpl
def hopkit_add_commands() -> Mapping[str, Callable[[Sequence[str]], int]]:
    """``hopkit constgraph``."""
    return {"constgraph": main}


def main(argv: Sequence[str]) -> int:
    """Fold what an exported program computes from its weights alone, or tell what that is."""
    parser = argparse.ArgumentParser("hopkit constgraph", description=main.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    told = {"fold": "Write the folded program.", "report": "Tell what would be folded, and write nothing."}
    for name, text in told.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("program", metavar="MODEL.pt2", help="what torch.export.save wrote")
        command.add_argument(
            "--growth", type=float, default=Policy.growth, help="a constant takes this times its weights"
        )
        command.add_argument("--most", type=int, help="bytes that all constants together may take")
        command.add_argument("--no-norms", action="store_true", help="leave batch norms as they are")
        command.add_argument("--json", action="store_true", help="print JSON")
        if name == "fold":
            command.add_argument("--release", action="store_true", help="leave weights out that only constants use")
            command.add_argument("-o", "--output", required=True, metavar="FOLDED.pt2", help="where to write it")
    chosen = parser.parse_args(argv)
    _tell(f"reading {chosen.program}")
    program = load_program(chosen.program)
    _tell(f"folding {len(program.graph.nodes)} nodes")
    release = chosen.command == "fold" and chosen.release
    folded = fold(program, policy=Policy(chosen.growth, most=chosen.most, release=release, norms=not chosen.no_norms))
    if chosen.command == "fold":
        _tell(f"writing {chosen.output}")
        _save(folded, chosen.output)
    _tell("")
    report = report_of(folded)
    print(json.dumps(report.as_json(), indent=2) if chosen.json else report)
    return 0


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)


def _save(program: Program, path: str) -> None:
    """Write to another file first: what was at ``path`` is replaced when the new one is whole."""
    directory = os.path.dirname(os.path.abspath(path))
    handle, beside = tempfile.mkstemp(suffix=".pt2", dir=directory)
    os.close(handle)
    try:
        torch.export.save(program, beside)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
