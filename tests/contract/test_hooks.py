"""Every hook is documented, tested, and on the pages that are generated from the code."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from docs.generate import PAGES
from hopkit import errors
from hopkit.errors import HopkitError
from hopkit.hookspecs import Hooks
from hopkit.kit import fresh
from tests.contract.seam import ROOT, parse

HOOKS = {name: function for name, function in vars(Hooks).items() if name.startswith("hopkit_")}
ERRORS = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, HopkitError)]
THIS = Path(__file__)


@functools.cache
def _implemented() -> set[str]:
    """The names of functions that tests define, or pass by keyword, as hooks."""
    names = set()
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "plugins").glob("*/tests/*.py")]:
        if path != THIS:
            for node in ast.walk(parse(path)):
                if isinstance(node, ast.FunctionDef):
                    names.add(node.name)
                elif isinstance(node, ast.keyword) and node.arg:
                    names.add(node.arg)
    return names


def test_every_open_mode_has_its_hook() -> None:
    with fresh() as host:
        assert sorted(HOOKS) == host.plugins.menu


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_says_what_it_takes_and_gives(name: str) -> None:
    text = inspect.getdoc(HOOKS[name]) or ""
    takes = list(inspect.signature(HOOKS[name]).parameters)[1:]
    assert all(f"``{argument}``" in text for argument in takes)
    assert "Returns:" in text or inspect.signature(HOOKS[name]).return_annotation == "None"


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_tested(name: str) -> None:
    assert name in _implemented()


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_on_its_page(name: str) -> None:
    assert f"### {name}\n" in (ROOT / "docs" / "reference" / "hooks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_is_under_the_heading_that_it_names(kind: type[HopkitError]) -> None:
    lines = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8").splitlines()
    anchors = [line.removeprefix("## ").lower().replace(" ", "-") for line in lines if line.startswith("## ")]
    assert kind.anchor() in anchors


@pytest.mark.parametrize(("path", "page"), PAGES.items(), ids=lambda value: getattr(value, "name", ""))
def test_a_generated_page_is_what_the_code_says(path: Path, page: Callable[[], str]) -> None:
    assert path.read_text(encoding="utf-8") == page(), "run `python docs/generate.py`"
