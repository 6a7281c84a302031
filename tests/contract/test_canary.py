"""What hopkit uses of torch without a promise is still there; what is not is told with the feature that needs it."""

from __future__ import annotations

import ast
import importlib
import warnings

import pytest
import torch

from hopkit import HopkitWarning
from hopkit._torch.versions import TESTED, check
from tests.contract.seam import ROOT, parse, private
from tests.fresh import python


def _uses() -> dict[str, str]:
    """Every private name in the seam, and where it is needed: file, line, and the feature (the file's first line)."""
    uses: dict[str, str] = {}
    for path in sorted((ROOT / "hopkit" / "_torch").glob("*.py")):
        tree = parse(path)
        feature = (ast.get_docstring(tree) or "").splitlines()[0]
        for name, line in private(tree).items():
            uses.setdefault(name, f"{path.relative_to(ROOT)}:{line}: {feature}")
    return uses


USES = _uses()


def _exists(name: str) -> bool:
    root, *parts = name.split(".")
    value: object = importlib.import_module(root)
    for i, part in enumerate(parts):
        if not hasattr(value, part):
            try:  # a submodule that nobody has imported yet
                importlib.import_module(".".join([root, *parts[: i + 1]]))
            except ImportError:
                return False
        value = getattr(value, part)
    return True


def test_the_seam_is_read() -> None:
    assert {"torch._ops.HigherOrderOperator", "torch._C._dispatch_key_for_device"} <= set(USES)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's, of Inductor's imports
@pytest.mark.parametrize("name", USES)
def test_torch_still_has(name: str) -> None:
    assert _exists(name), f"torch {torch.__version__} has no {name}. Needed by {USES[name]}"


def test_a_name_that_is_gone_is_noticed() -> None:
    assert not _exists("torch._ops.NoSuchOperator")
    assert not _exists("torch._no_such_module.name")


@pytest.mark.parametrize("version", [f"{release}.0" for release in TESTED] + [f"{TESTED[0]}.1+cu130"])
def test_a_tested_torch_is_taken_without_a_word(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(version)


@pytest.mark.parametrize("version", ["2.99.0", "3.0.0a0+git1234"])
def test_a_newer_torch_warns(version: str) -> None:
    with pytest.warns(HopkitWarning, match="2.13, 2.14"):
        check(version)


def test_an_older_torch_is_refused() -> None:
    with pytest.raises(ImportError, match=r"needs torch 2.13 or newer, and this is torch 2.12.1"):
        check("2.12.1")


def test_a_newer_torch_warns_once_a_process_and_goes_on() -> None:
    program = """
import warnings, torch
torch.__version__ = "2.99.0"
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import hopkit, hopkit.extend
    @hopkit.define("t_newer")
    def op(body: hopkit.Subgraph, x: torch.Tensor) -> torch.Tensor:
        return body(x)
    op(torch.sin, torch.ones(1))
assert [w.category.__name__ for w in told if "2.99.0" in str(w.message)] == ["HopkitWarning"]
"""
    done = python("-c", program, check=False)
    assert done.returncode == 0, done.stderr
