"""Calls that cannot be right: the same error in every mode, which says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hopkit_controlflow
import pytest
import torch
from hopkit_controlflow import agreement, associative_scan, cond, fori_loop, scan, switch, while_loop
from torch import Tensor, vmap
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit import CallError, DataDependentError, HopkitError, SubgraphError
from hopkit.extend.mode import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings("ignore:.*is not kept in the graph:hopkit.HopkitWarning")

each = hopkit_controlflow.map

X = torch.linspace(-1, 1, 6).reshape(2, 3)

Function = Callable[[Tensor], object]


def either(yes: Callable[..., object], no: Callable[..., object]) -> Function:
    return lambda x: cond(x.sum() > -1, yes, no, (x,))


def grow(body: Callable[..., Any]) -> Function:
    return lambda x: while_loop(lambda x: x.sum() < 10, body, (x,))


def along(step: Callable[..., Any]) -> Function:
    return lambda x: scan(step, x[0] * 1, x)


EITHER = (SubgraphError, RuntimeError)  # torch itself forbids to write to a slice while gradients are on

ANYTHING: Any = lambda x: x  # noqa: E731

CASES: dict[str, tuple[Function, type[Exception] | tuple[type[Exception], ...], str]] = {
    "structure": (
        either(lambda x: (x,), lambda x: x),
        SubgraphError,
        r"'false_fn'.*structure \*, and 'true_fn'.*\(\*,\)",
    ),
    "shape": (
        either(lambda x: x, lambda x: x[0]),
        SubgraphError,
        r"gives float32\[.*\] on cpu, and 'true_fn' float32\[.*\]",
    ),
    "dtype": (either(lambda x: x, lambda x: x.double()), SubgraphError, r"gives float64\[.*\] on cpu"),
    "device": (
        either(lambda x: x, lambda x: x.new_empty(2, 3, device="meta")),
        SubgraphError,
        r"float32\[.*\] on meta",
    ),
    "number": (either(lambda x: (x, 1), lambda x: (x, 2)), SubgraphError, "gives the int 2, and 'true_fn' the int 1"),
    "a branch writes": (
        either(lambda x: x.add_(1), lambda x: x),
        SubgraphError,
        "'true_fn'.*writes to what it is given",
    ),
    "predicate": (lambda x: cond(x > 0, torch.sin, torch.cos, (x,)), CallError, r"'pred'.*shape \(.*\).*one element"),
    "operands": (
        lambda x: cond(x.sum() > 0, torch.sin, torch.cos, ANYTHING(x)),
        CallError,
        "'operands' expected a tuple",
    ),
    "branches": (
        lambda x: switch(x.sum() > 0, (torch.sin, torch.sum), x),
        SubgraphError,
        r"'branches\[1\]'.*'branches\[0\]'",
    ),
    "no branches": (lambda x: switch(1, (), x), CallError, "'branches' is empty"),
    "index": (lambda x: switch(x, (torch.sin,), x), CallError, r"'index'.*shape \(.*\)"),
    "state's shape": (
        grow(lambda x: (torch.cat([x, x]),)),
        SubgraphError,
        r"'body_fn'.*gives float32\[.*\].*'carried_inputs' are",
    ),
    "state's dtype": (grow(lambda x: (x.double() + 1,)), SubgraphError, r"gives float64\[.*\]"),
    "state's structure": (
        grow(lambda x: x + 1),
        SubgraphError,
        r"structure \*, and 'carried_inputs' are the structure \(\*,\)",
    ),
    "a body writes": (grow(lambda x: (x.add_(1),)), SubgraphError, "'body_fn'.*writes to what it is given"),
    "a test writes": (
        lambda x: while_loop(lambda x: x.add_(1).sum() < 10, lambda x: (x + 1,), (x,)),
        SubgraphError,
        "'cond_fn'.*writes to what it is given",
    ),
    "a test of several": (
        lambda x: while_loop(lambda x: x < 9, lambda x: (x + 1,), (x,)),
        CallError,
        "'cond_fn'.*one element",
    ),
    "no tuple": (
        lambda x: while_loop(lambda x: x.sum() < 9, lambda x: x, ANYTHING(x)),
        CallError,
        "'carried_inputs' expected a tuple",
    ),
    "counted state": (lambda x: fori_loop(0, 3, lambda i, x: x[0], x), SubgraphError, "'body_fun'.*'init_val' is"),
    "a counted body writes": (
        lambda x: fori_loop(0, 3, lambda i, x: x.mul_(2), x),
        SubgraphError,
        "'body_fun'.*writes",
    ),
    "a counter is written to": (
        lambda x: fori_loop(0, 3, lambda i, x: x + i.add_(1), x),
        SubgraphError,
        "'body_fun'.*writes",
    ),
    "bounds": (lambda x: fori_loop(x.long(), 3, lambda i, x: x, x), CallError, r"'lower'.*shape \(.*\)"),
    "bounds that count nothing": (
        lambda x: fori_loop(0, x.sum(), lambda i, x: x, x),
        CallError,
        "'upper' is of torch.float32",
    ),
    "carry": (along(lambda c, x: (c[None], x)), SubgraphError, r"'combine_fn'.*float32\[1, .*\].*'init' is"),
    "carry's dtype": (
        lambda x: scan(lambda c, x: (c + x, x), torch.zeros(3, dtype=torch.int64), x),
        SubgraphError,
        "int64",
    ),
    "no pair": (along(lambda c, x: c + x), SubgraphError, "return carry, y"),
    "a step writes": (along(lambda c, x: (c.add_(x), x)), SubgraphError, "'combine_fn'.*writes"),
    "a step writes to its slice": (
        along(lambda c, x: (c + x.mul_(2), x)),
        EITHER,
        "'combine_fn'.*writes|multiple views",
    ),
    "lengths": (
        lambda x: scan(lambda c, x: (c, c), x, (x, x[:1])),
        CallError,
        r"'xs' has leaves of the sizes \[.*, 1\]",
    ),
    "dimension": (lambda x: scan(lambda c, x: (c, c), x, x, dim=2), CallError, r"leaf of shape \(.*\).*dimension 2"),
    "scalar": (lambda x: each(torch.sin, x.sum()), CallError, r"'xs' has the leaf of shape \(\)"),
    "nothing": (lambda x: each(torch.sin, ()), CallError, "'xs' has no leaves"),
    "a number": (lambda x: each(lambda t: t[0], (x, 3)), CallError, "'xs' has the leaf 3"),
    "a map writes": (lambda x: each(lambda x: x.add_(1), x), EITHER, "'f'.*writes|multiple views"),
    "combined": (lambda x: associative_scan(lambda a, b: (a + b).sum(), x, 0), SubgraphError, "a slice of 'xs' is"),
    "combining writes": (
        lambda x: associative_scan(lambda a, b: a.add_(b), x, 0),
        SubgraphError,
        "'combine_fn'.*writes",
    ),
}


def exported(function: Function, x: Tensor) -> object:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> object:
            return function(x)

    return torch.export.export(Model(), (x,), strict=False)


def attempt(how: Callable[[Function, Tensor], object], function: Function) -> None:
    """Raises hopkit's own error, also where torch wrapped it."""
    try:
        how(function, X.clone())
    except Exception as caught:
        error: BaseException | None = caught
        while error is not None and not isinstance(error, HopkitError):
            error = error.__cause__ or error.__context__
        raise error or caught from None


HOWS: dict[str, Callable[[Function, Tensor], object]] = {
    "eager": lambda f, x: f(x),
    "grad": lambda f, x: f(x.requires_grad_() * 1),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, x + 1])),
    "grad of vmap": lambda f, x: torch.func.vjp(lambda x: vmap(f)(x * 1), torch.stack([x, x + 1])),
    "make_fx": lambda f, x: make_fx(lambda x: f(x))(x),
    "symbolic": lambda f, x: make_fx(lambda x: f(x), tracing_mode="symbolic")(x),
    "compile": lambda f, x: torch.compile(f, backend="aot_eager", fullgraph=True)(x),
    "export": exported,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", HOWS)
def test_the_error_is_the_same_in_every_mode(case: str, how: str) -> None:
    torch.compiler.reset()
    function, kind, words = CASES[case]
    with pytest.raises(kind, match=words):
        attempt(HOWS[how], function)


def test_a_state_that_is_written_to_in_inference_mode_is_not_told() -> None:
    with torch.inference_mode():
        assert fori_loop(0, 2, lambda i, x: x * 2, X.clone()).sum() == 0


def test_branches_are_looked_at_once() -> None:
    runs = list[int]()

    def yes(x: Tensor) -> Tensor:
        runs.append(1)
        return x.sin()

    for _ in range(3):
        cond(torch.tensor(True), yes, lambda x: x.cos(), (X,))
    assert len(runs) == 4


def test_a_branch_that_needs_values_is_not_looked_at() -> None:
    x = X.clone()
    assert cond(torch.tensor(True), torch.sin, lambda x: x[: int(x.numpy().sum())], (x,)).shape == (2, 3)
    assert torch.equal(x, X)


def test_what_is_remembered_of_branches_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "MOST_AGREED", 3)
    monkeypatch.setattr(agreement, "_agreed", set())
    for size in range(1, 9):
        cond(torch.tensor(True), torch.sin, torch.cos, (torch.ones(size),))
        assert 0 < len(agreement._agreed) <= 3


def test_on_stand_ins_a_mode_that_sees_the_inside_of_an_op_sees_no_decision() -> None:
    class Passing(TorchDispatchMode):
        supports_higher_order_operators = False

        def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def run(x: Tensor) -> object:
        with Passing():  # type: ignore[no-untyped-call] # torch's own
            return cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    with pytest.raises(DataDependentError, match="'controlflow_cond' cannot run here"):
        make_fx(run, tracing_mode="fake")(X)


def test_dual_numbers_outside_of_a_recording_with_symbols_for_sizes() -> None:
    @hopkit.define("t_either")
    def either(f: hopkit.Subgraph, x: Tensor) -> Tensor:
        return switch(x.sum().long(), (torch.sin, f), x)

    try:
        with forward_ad.dual_level(), pytest.raises(DataDependentError, match="'controlflow_switch' cannot run here"):
            make_fx(lambda x: either(torch.cos, x), tracing_mode="symbolic")(X)(forward_ad.make_dual(X, X))
    finally:
        hopkit.undefine(either)
