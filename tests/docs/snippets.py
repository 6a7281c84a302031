"""Read the fenced blocks of a Markdown page, and run them as a reader would: top to bottom, in one directory.

The rules, which tests/docs/test_docs.py holds every page to:

- ```` ```python ```` blocks of a page run in order, in one namespace.
- ```` ```console ```` and ```` ```bash ```` blocks run in the same order, each as one shell script; in a console block
  the commands are the lines after ``$``. Only hopkit's command line is run: any other command needs a skip.
- A ```` ```text ```` block with nothing but blank lines between it and a block that runs is what that block prints;
  ``...`` stands for anything, and white space is not compared.
- ``<!-- skip: reason -->`` above a block: not run. ``<!-- command: NAME -->``: run by .ci/run, which finds it by name.

Only the standard library is imported here, since .ci/run asks this module for the README's commands before it has made
an environment: ``python3 tests/docs/snippets.py README.md NAME`` prints the block of that name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import io
import os
import re
import subprocess
import sys
import textwrap
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

SHELLS = frozenset({"console", "bash"})
RUNNABLE = SHELLS | {"python"}
# Everything else that a page may fence. A language that is in neither set is refused, so that no "py" or "sh" block
# goes unexecuted for its spelling.
PLAIN = frozenset({"", "text", "toml", "json", "ini", "yaml", "diff", "markdown"})

_FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>.*)")
_MARKER = re.compile(r"\s*<!-- (?P<kind>skip|command): (?P<value>.*\S) -->\s*")
_HOPKIT = re.compile(r"(?:[A-Z_]+=\S* )*(?:hopkit|python -m hopkit)(?: |$)")
_COMPARE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class PageError(Exception):
    """A page breaks one of the rules above, or one of its blocks does not do what the page says."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block, without its fences and its indentation."""

    language: str
    code: str
    line: int  # of the first line of code, counted from 1
    skip: str | None = None
    command: str | None = None
    prints: str | None = None

    @property
    def runs(self) -> bool:
        """Whether a test executes the block."""
        return self.language in RUNNABLE and self.skip is None and self.command is None


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page in order; an expected output is part of the block that it belongs to."""
    found: list[Block] = []
    marker: tuple[str, str] | None = None
    adjacent = False  # only blank lines since the last block
    lines = iter(enumerate(text.splitlines(), start=1))
    for number, line in lines:
        if fence := _FENCE.fullmatch(line):
            block = _read(lines, fence, number, marker)
            if block.language == "text" and adjacent and found[-1].runs and found[-1].prints is None:
                found[-1] = dataclasses.replace(found[-1], prints=block.code)
            else:
                found.append(block)
            marker, adjacent = None, True
        elif match := _MARKER.fullmatch(line):
            marker, adjacent = (match["kind"], match["value"]), False
        elif line.strip():
            if marker is not None:
                raise PageError(f"line {number}: <!-- {marker[0]}: {marker[1]} --> stands above no block")
            adjacent = False
    if marker is not None:
        raise PageError(f"last line: <!-- {marker[0]}: {marker[1]} --> stands above no block")
    return found


def _read(lines: Iterator[tuple[int, str]], fence: re.Match[str], opened: int, marker: tuple[str, str] | None) -> Block:
    """Consume ``lines`` up to the fence that closes ``fence``."""
    language, _, _ = fence["info"].strip().partition(" ")
    if language not in RUNNABLE | PLAIN:
        known = ", ".join(sorted(RUNNABLE | PLAIN - {""}))
        raise PageError(f"line {opened}: unknown language {language!r}; write one of {known}")
    body: list[str] = []
    for _, line in lines:
        closing = line.strip()
        if set(closing) == {fence["fence"][0]} and len(closing) >= len(fence["fence"]):
            break
        body.append(line[len(fence["indent"]) :] if line.startswith(fence["indent"]) else line)
    else:
        raise PageError(f"line {opened}: the block is never closed")
    kind, value = marker or ("", "")
    return Block(
        language,
        "".join(f"{line}\n" for line in body),
        opened + 1,
        skip=value if kind == "skip" else None,
        command=value if kind == "command" else None,
    )


def commands(block: Block) -> list[str]:
    """Return the command lines of a shell block, each of them hopkit's own."""
    lines = block.code.splitlines()
    if block.language == "console":
        found = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    else:
        found = [line.removeprefix("$ ") for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise PageError(f"line {block.line}: no command in this {block.language} block; start its lines with '$ '")
    for command in found:
        if not _HOPKIT.match(command):
            raise PageError(
                f"line {block.line}: {command!r} is not hopkit's command line, so that no test runs it; "
                "write <!-- skip: why --> above the block"
            )
    return found


def named(text: str, name: str) -> str:
    """Return the one-line command that a page marks with ``<!-- command: NAME -->``."""
    found = [block.code.removesuffix("\n") for block in blocks(text) if block.command == name]
    if len(found) != 1 or "\n" in found[0] or not found[0]:
        raise PageError(f"expected one block of one line marked <!-- command: {name} -->, found {found}")
    return found[0]


def run_page(page: Path, cwd: Path) -> str | None:
    """Run every block of ``page`` in this process, from ``cwd``; return what went wrong, ready to be shown, or None.

    Takes over the process: working directory, ``__main__`` and standard output are the page's from here on.
    """
    found = [block for block in blocks(page.read_text(encoding="utf-8")) if block.runs]
    source = cwd / f"{page.stem}.py"
    source.write_text(_as_module(found), encoding="utf-8")
    os.chdir(cwd)
    # What a page defines must have a module to live in: pickle, dataclasses and annotations look there.
    module = types.ModuleType("__main__")
    module.__file__ = str(source)
    sys.modules["__main__"] = module
    for block in found:
        if problem := _problem(block, source, module):
            return f"{page}:{block.line}\n{textwrap.indent(problem, '  ')}"
    return None


def _problem(block: Block, source: Path, module: types.ModuleType) -> str | None:
    """Run ``block`` and compare what it prints; the traceback of what went wrong, or None."""
    try:
        printed = _run_python(block, source, module) if block.language == "python" else _run_shell(block)
        if block.prints is not None:
            _compare(block.prints, printed)
    except (Exception, SystemExit):  # whatever a snippet raises is the answer, not an accident
        return traceback.format_exc()
    return None


def _as_module(found: list[Block]) -> str:
    """The Python of a page as one file, every line where the page has it.

    ``inspect`` finds the source of what a page defines there, and the lines of a traceback are the page's.
    """
    lines: list[str] = []
    for block in found:
        if block.language == "python":
            lines += [""] * (block.line - 1 - len(lines))
            lines += block.code.splitlines()
    return "\n".join(lines) + "\n"


def _run_python(block: Block, source: Path, module: types.ModuleType) -> str:
    # Not inherited: this file's `from __future__ import annotations` is not the page's.
    code = compile("\n" * (block.line - 1) + block.code, str(source), "exec", dont_inherit=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, module.__dict__)
    return printed.getvalue()


def _run_shell(block: Block) -> str:
    # The reader's shell has the environment's bin directory first, whether or not it was activated for pytest.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands(block))],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PageError(f"exit status {done.returncode} from\n{block.code}{done.stdout}{done.stderr}")
    return done.stdout


def _compare(expected: str, printed: str) -> None:
    checker = doctest.OutputChecker()
    if not checker.check_output(expected, printed, _COMPARE):
        raise PageError(checker.output_difference(doctest.Example("", expected), printed, _COMPARE))


if __name__ == "__main__":
    print(named(Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2]))  # noqa: T201 - .ci/run reads it
