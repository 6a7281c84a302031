"""torch's own control flow and hopkit-controlflow's, by the same samples in every mode.

Run it with ``python -m tests.matrix.controlflow``.

It writes what docs/generate.py makes pages of. Every cell is a column of `hopkit.testing`, which compares with plain
Python in eager PyTorch; strides are not compared, for torch does not say what those of its ops are.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import hopkit_controlflow
import torch

from hopkit import Sample
from hopkit._torch.namespace import in_tree
from hopkit.op import AnyOp
from hopkit.testing import Case, NotApplicable
from hopkit.testing.columns import COLUMNS
from hopkit.testing.compare import difference

PATH = Path(__file__).parents[2] / "docs" / "reference" / "controlflow" / "measured.json"

Callee = Callable[..., object]
Measured = dict[str, dict[str, dict[str, str]]]

OPS: dict[str, tuple[AnyOp, Callee]] = {
    "cond": (hopkit_controlflow.cond, torch.cond),
    "while_loop": (hopkit_controlflow.while_loop, torch.while_loop),
    "scan": (hopkit_controlflow.scan, in_tree("scan")),
    "map": (hopkit_controlflow.map, in_tree("map")),
    "associative_scan": (hopkit_controlflow.associative_scan, in_tree("associative_scan")),
}
"""hopkit's op, and torch's."""

X = torch.linspace(-1, 1, 12).reshape(4, 3)
H = torch.linspace(0.1, 0.5, 3)


def _weight() -> torch.Tensor:
    return torch.linspace(0.5, 1.5, 3).requires_grad_()


def _cond() -> list[Sample]:
    w, yes = _weight(), torch.tensor(True)
    tree = (lambda t: {"a": t["x"].sin(), "b": (t["y"].sum(),)}, lambda t: {"a": t["y"] * 2, "b": (t["x"].mean(),)})
    return [
        Sample((yes, torch.sin, torch.cos, (X,))),
        Sample((~yes, lambda x: x * w, lambda x: x.sin() + w, (X,))),
        Sample((yes, *tree, ({"x": X, "y": X + 1},))),
    ]


def _while_loop() -> list[Sample]:
    w, n = _weight(), torch.tensor(0)

    def body(n: torch.Tensor, t: dict[str, torch.Tensor]) -> object:
        return n + 1, {"a": t["b"] * w, "b": t["a"].sin()}

    return [
        Sample((lambda n, x: n < 3, lambda n, x: (n + 1, x.sin() + n), (n, X))),
        Sample((lambda x: x.abs().sum() < 50, lambda x: (x * 2 + w,), (X,))),
        Sample((lambda n, t: n < 2, body, (n, {"a": X, "b": X + 1}))),
    ]


def _scan() -> list[Sample]:
    w = _weight()

    def step(s: tuple[torch.Tensor, torch.Tensor], x: dict[str, torch.Tensor]) -> object:
        h, c = (s[0] * w).tanh() + x["x"], s[1] * 0.5 + s[0]
        return (h, c), {"y": h.sin(), "n": (c.square() * 1,)}

    return [
        Sample((lambda c, x: (c + x, c * x), H, X)),
        Sample((lambda c, x: (c * w.sum() + x, c.sin()), torch.ones(4), X), {"dim": 1, "reverse": True}),
        Sample((step, (H, H + 1), {"x": X})),
    ]


def _map() -> list[Sample]:
    w = _weight()
    return [
        Sample((torch.sin, X)),
        Sample((lambda x, y: x * w + y.sum(), X, X + 1)),
        Sample((lambda t, y: {"a": t["x"] * y, "b": (t["y"].sum(),)}, {"x": X, "y": X + 1}, H)),
    ]


def _associative_scan() -> list[Sample]:
    w = _weight()

    def linear(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> object:
        return {"by": a["by"] * b["by"], "plus": a["plus"] * b["by"] + b["plus"]}

    return [
        Sample((torch.add, X, 0)),
        Sample((lambda a, b: a * b * w, X, 0), {"reverse": True}),
        Sample((linear, {"by": X, "plus": X + 1}, 1)),
    ]


SAMPLES: dict[str, Callable[[], list[Sample]]] = {
    "cond": _cond,
    "while_loop": _while_loop,
    "scan": _scan,
    "map": _map,
    "associative_scan": _associative_scan,
}
"""Plain, with a capture that has a gradient, and with a pytree. In eager torch's ops take all of them."""


def generic(*args: object, **kwargs: object) -> object:
    """torch's associative_scan, as it runs on a CPU."""
    return in_tree("associative_scan")(*args, **{"combine_mode": "generic", **kwargs})


def measure(op: str, column: str) -> dict[str, str]:
    """For both, how many of the op's samples are right in this mode, and whether any is wrong."""
    ours, theirs = OPS[op]
    cases = [Case(ours, sample) for sample in SAMPLES[op]()]
    found = {"hopkit": [_verdict(case, ours, column) for case in cases]}
    found["torch"] = [_verdict(case, generic if op == "associative_scan" else theirs, column) for case in cases]
    # Where hopkit has no answer since the body has none, there is nothing to ask of torch either.
    asked = [i for i, verdict in enumerate(found["hopkit"]) if verdict != "n/a"]
    return {who: _told([verdicts[i] for i in asked]) for who, verdicts in found.items()}


def _told(verdicts: list[str]) -> str:
    if not verdicts:
        return "-"
    right, wrong = verdicts.count("right"), verdicts.count("wrong")
    told = "all" if right == len(verdicts) else f"{right} of {len(verdicts)}" if right else "no"
    return f"{told}, {wrong} wrong" if wrong else told


def _verdict(case: Case, callee: Callee, column: str) -> str:
    torch.compiler.reset()
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        try:
            pairs = COLUMNS[column].run(case, callee).pairs
        except NotApplicable:
            return "n/a"
        except Exception as error:  # whatever is raised, there is no value
            return _without(case, column) if callee is case.op else f"{type(error).__name__}"
        return "wrong" if any(difference(dataclasses.replace(p, strides=False))[1] for p in pairs) else "right"


def _without(case: Case, column: str) -> str:
    try:
        COLUMNS[column].run(case, case.declared)
    except Exception:  # plain code cannot be run in this mode
        return "n/a"
    return "error"


def main() -> None:
    """Measure all cells."""
    found: Measured = {}
    for op in OPS:
        found[op] = {column: measure(op, column) for column in COLUMNS}
    PATH.write_text(json.dumps({"torch": torch.__version__, "cells": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
