"""Every snippet of the documentation runs, and every link in it leads somewhere."""

from __future__ import annotations

import multiprocessing
import re
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.docs.snippets import PageError, blocks, commands, named, run_page

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# Seconds for one page. The slowest have `hopkit check` in them.
TIME_LIMIT = 300
# A skip is a claim that nobody checks. Raise this knowingly.
MOST_SKIPS = 12

# Ops are global to a process, so each page gets its own. They are forks of one server that has imported torch, once and
# before it had threads: a page costs a fork, not the seconds of an import.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "hopkit"])


def _answer(sender: Connection, page: Path, cwd: Path) -> None:
    sender.send(run_page(page, cwd))


def _run(page: Path, cwd: Path) -> str | None:
    """``run_page`` in a process of its own."""
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_answer, args=(sender, page, cwd))
    process.start()
    sender.close()  # this end's copy: a child that dies unheard is then an EOFError here, not a wait
    try:
        if not receiver.poll(TIME_LIMIT):
            return f"{page}: not done after {TIME_LIMIT} s"
        problem: str | None = receiver.recv()
        return problem
    except EOFError:
        process.join()
        return f"{page}: the process ended with exit code {process.exitcode} and no answer"
    finally:
        process.kill()
        process.join()
        receiver.close()


def _page(directory: Path, text: str) -> Path:
    page = directory / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


# The documentation itself


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_snippet_runs(page: Path, tmp_path: Path) -> None:
    if not any(block.runs for block in blocks(page.read_text(encoding="utf-8"))):
        return  # nothing to run is a pass: a glossary owes nobody a snippet
    problem = _run(page, tmp_path)
    assert problem is None, problem


def test_few_snippets_are_skipped() -> None:
    skips = [
        f"{name}:{block.line}: {block.skip}"
        for page, name in zip(PAGES, NAMES, strict=True)
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.skip is not None
    ]
    print("\n".join(skips))  # noqa: T201 - shown by `pytest -rP`
    assert len(skips) <= MOST_SKIPS, "\n".join(skips)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", _prose(page)):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        if not linked.exists() or (anchor and anchor not in _anchors(linked)):
            broken.append(target)
    assert not broken


def _prose(page: Path) -> str:
    """The page without fenced blocks, and without the marks of code spans; a link quoted in a span is none."""
    text = re.sub(r"(?ms)^( *)(`{3,}|~{3,}).*?^\1\2 *$", "", page.read_text(encoding="utf-8"))
    return re.sub(r"(`+).+?\1", lambda span: span[0].strip("`") if "](" not in span[0] else "", text)


def _anchors(page: Path) -> set[str]:
    """The anchors GitHub gives the headings of ``page``, and those that it sets itself."""
    text = _prose(page)
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    given = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return given | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\">", text))


# Reading a page


def test_blocks_are_found_with_language_line_and_code() -> None:
    found = blocks("# Page\n\n```python\nx = 1\n\ny = 2\n```\n\nprose\n\n~~~toml\n[a]\n~~~\n")
    assert [(block.language, block.line, block.code) for block in found] == [
        ("python", 4, "x = 1\n\ny = 2\n"),
        ("toml", 12, "[a]\n"),
    ]


def test_a_block_in_a_list_loses_its_indentation() -> None:
    (block,) = blocks("1. Write:\n\n   ```python\n   if x:\n\n       y()\n   ```\n")
    assert block.code == "if x:\n\n    y()\n"


def test_a_longer_fence_may_hold_a_shorter_one() -> None:
    (block,) = blocks("````markdown\n```python\n1 / 0\n```\n````\n")
    assert (block.language, block.runs) == ("markdown", False)
    assert block.code == "```python\n1 / 0\n```\n"


def test_output_belongs_to_the_block_right_above_it() -> None:
    expected, shown = blocks("```python\nprint(1)\n```\n\n```text\n1\n```\n\nA tree:\n\n```text\na/b\n```\n")
    assert (expected.language, expected.prints) == ("python", "1\n")
    assert (shown.language, shown.code, shown.prints) == ("text", "a/b\n", None)


def test_markers_are_read_and_keep_a_block_from_running() -> None:
    found = blocks(
        "<!-- skip: needs a GPU -->\n```python\nx\n```\n"
        "<!-- command: main -->\n\n```bash\ntrue\n```\n"
        "<!-- an ordinary comment -->\n```python\ny\n```\n"
    )
    assert [(block.skip, block.command, block.runs) for block in found] == [
        ("needs a GPU", None, False),
        (None, "main", False),
        (None, None, True),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nx = 1\n", "line 1: the block is never closed"),
        ("```py\nx = 1\n```\n", "unknown language 'py'"),
        ("<!-- skip: why -->\n\nprose\n", "stands above no block"),
        ("```python\n```\n<!-- skip: why -->\n", "stands above no block"),
    ],
)
def test_a_page_that_would_not_be_checked_is_refused(text: str, message: str) -> None:
    with pytest.raises(PageError, match=re.escape(message)):
        blocks(text)


def test_commands_of_a_console_block_are_the_lines_with_a_prompt() -> None:
    (block,) = blocks("```console\n$ hopkit ops\nname  shape\n$ HOPKIT_PLUGINS= python -m hopkit plugins\n```\n")
    assert commands(block) == ["hopkit ops", "HOPKIT_PLUGINS= python -m hopkit plugins"]


def test_commands_of_a_bash_block_are_all_lines_but_comments() -> None:
    (block,) = blocks("```bash\n# what there is\nhopkit ops\n\n$ hopkit plugins\n```\n")
    assert commands(block) == ["hopkit ops", "hopkit plugins"]


@pytest.mark.parametrize("code", ["$ pip install hopkit", "$ hopkitten", "output only"])
def test_a_command_that_nothing_runs_needs_a_skip(code: str) -> None:
    (block,) = blocks(f"```console\n{code}\n```\n")
    with pytest.raises(PageError, match=r"skip|no command"):
        commands(block)


def test_a_named_command_is_one_line_and_there_once() -> None:
    block = "<!-- command: main -->\n```bash\nmake it\n```\n"
    assert named(block, "main") == "make it"
    for text in ("", block + block, block.replace("make", "make\n")):
        with pytest.raises(PageError, match="command: main"):
            named(text, "main")


# Running a page


def test_blocks_share_a_namespace_a_directory_and_a_process_of_their_own(tmp_path: Path) -> None:
    page = _page(
        tmp_path,
        "```python\nimport os\nfrom pathlib import Path\nPath('left').write_text(str(os.getpid()))\nx = 2\n```\n"
        "```python\nassert int(Path('left').read_text()) == os.getpid()\nprint(x)\n```\n\n```text\n2\n```\n",
    )
    assert _run(page, tmp_path) is None
    assert (tmp_path / "left").exists()


def test_what_a_page_defines_has_source_and_a_module(tmp_path: Path) -> None:
    page = _page(
        tmp_path,
        "Prose.\n\n```python\ndef f():\n    return 1\n```\n\n```python\nimport inspect, pickle\n"
        "print(inspect.getsource(f), pickle.loads(pickle.dumps(f)) is f)\n```\n```text\ndef f(): return 1 True\n```\n"
        "```python\ndef g(x: int): ...\nassert g.__annotations__ == {'x': int}\n```\n",
    )
    assert _run(page, tmp_path) is None


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("\n```python\nx = 1\nx / 0\n```\n", ["page.md:3", "line 4", "ZeroDivisionError"]),
        ("```python\nx =\n```\n", ["page.md:2", "SyntaxError"]),
        ("```python\nraise SystemExit(0)\n```\n", ["page.md:2", "SystemExit"]),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", ["page.md:2", "Expected", "Got"]),
        ("```python\nimport os\nos._exit(3)\n```\n", ["exit code 3"]),
        ("```console\n$ hopkit no-such-command\n```\n", ["page.md:2", "exit status"]),
    ],
    ids=["exception", "syntax", "exit", "output", "death", "console"],
)
def test_a_snippet_that_fails_is_told_with_its_line(text: str, messages: list[str], tmp_path: Path) -> None:
    problem = _run(_page(tmp_path, text), tmp_path)
    assert problem is not None
    for message in messages:
        assert message in problem


def test_expected_output_may_leave_things_out(tmp_path: Path) -> None:
    page = _page(tmp_path, "```python\nprint('a   7\\nb')\n```\n```text\na ...\nb\n```\n")
    assert _run(page, tmp_path) is None
