"""Activation checkpointing around an op: values, gradients, and what is computed again, in eager and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import hopkit
from hopkit.extend.body import computed_again
from tests.modes import Looking, Names, Passing
from tests.recording import define_once, define_twice, record, same

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning a function"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),  # torch's own decompositions
]

X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
W = torch.linspace(0.5, 1.5, 9).reshape(3, 3)
MM = torch.ops.aten.mm.default

Policy = Callable[..., CheckpointPolicy | bool]
Function = Callable[..., Any]


def plain(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What `define_twice` defines, as a function."""
    result: Tensor = 1.0 * body(body(x))
    return result


def region(call: Function, policy: Policy | Sequence[object] | None) -> Function:
    """``call`` in a checkpoint, as a function of an operand and a capture."""
    given: dict[str, Any] = {}
    if policy is not None:
        given["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    return lambda x, w: checkpoint(lambda x: call(lambda y: (y @ w).sin(), x).cos(), x, use_reentrant=False, **given)


def trained(run: Function) -> tuple[tuple[Tensor, ...], list[str]]:
    """Value and gradients, and what ran in backward."""
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    result = run(x, w)
    with Names() as ran:
        gradients = torch.autograd.grad(result.sum(), [x, w])
    return (result, *gradients), ran.names


def about(name: str, word: CheckpointPolicy | bool, seen: list[str] | None = None) -> Policy:
    """A policy that has something to say of the operators of this name."""

    def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy | bool:
        if seen is not None:
            seen.append(str(op))
        return word if name in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


SELECTIVE: dict[str, Policy | None] = {
    "non-selective": None,
    "nothing": about("nothing", True),
    "inside": about("aten.mm", CheckpointPolicy.MUST_SAVE),
    "sin": about("aten.sin", CheckpointPolicy.PREFER_SAVE),
}


@pytest.mark.parametrize("name", SELECTIVE)
def test_what_is_computed_again_is_what_the_body_computes_again(name: str) -> None:
    found, ran = trained(region(define_twice(), SELECTIVE[name]))
    wanted, expected = trained(region(plain, SELECTIVE[name]))
    same(found, wanted)
    assert ran == expected


@pytest.mark.parametrize("name", SELECTIVE)
def test_compiled_checkpoints(name: str) -> None:
    found, _ = trained(torch.compile(region(define_twice(), SELECTIVE[name]), backend="aot_eager", fullgraph=True))
    wanted, _ = trained(region(plain, SELECTIVE[name]))
    same(found, wanted)


def test_a_policy_is_asked_about_the_op_and_then_about_its_inside() -> None:
    seen: list[str] = []
    trained(region(define_twice(), about("nothing", True, seen)))
    inside = ["aten.mm.default", "aten.sin.default"] * 2
    assert seen == ["t_twice", *inside, "aten.mul.Tensor", "aten.cos.default"]


@pytest.mark.parametrize("word", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE, True])
def test_nothing_of_an_op_that_is_saved_is_computed_again(word: CheckpointPolicy | bool) -> None:
    seen: list[str] = []
    found, ran = trained(region(define_twice(), about("t_twice", word, seen)))
    wanted, expected = trained(region(plain, None))
    same(found, wanted)
    assert seen == ["t_twice", "aten.cos.default"]
    assert expected.count(str(MM)) - ran.count(str(MM)) == 2
    assert ran.count("aten.sin.default") == 1  # the derivative of the cosine outside


def test_an_op_that_must_be_computed_again_is_so_whatever_is_said_of_its_inside() -> None:
    def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_RECOMPUTE if "t_twice" in str(op) else CheckpointPolicy.MUST_SAVE

    found, ran = trained(region(define_twice(), policy))
    wanted, expected = trained(region(plain, None))
    same(found, wanted)
    assert ran.count(str(MM)) == expected.count(str(MM))


def test_an_op_is_in_the_list_of_operators_that_are_saved() -> None:
    twice = define_twice()
    found, ran = trained(region(twice, [twice.operator]))
    wanted, expected = trained(region(plain, None))
    same(found, wanted)
    assert expected.count(str(MM)) - ran.count(str(MM)) == 2


def test_a_policy_is_not_asked_about_an_op_that_vanishes() -> None:
    seen: list[str] = []
    twice = define_twice()

    def vanishing(*args: Any) -> object:
        with hopkit.decompose(twice):
            return twice(*args)

    trained(region(vanishing, about("t_twice", True, seen)))
    assert "t_twice" not in seen


def test_a_policy_that_saves_the_op_in_compiled_code() -> None:
    kept: dict[str, list[str]] = {}

    def backward_of(call: Function, policy: Policy) -> tuple[Tensor, ...]:
        found, kept[call.__name__] = trained(torch.compile(region(call, policy), backend="aot_eager_decomp_partition"))
        return found

    twice = define_twice()
    same(backward_of(twice, about("t_twice", CheckpointPolicy.MUST_SAVE)), trained(region(plain, None))[0])
    same(backward_of(plain, about("t_twice", CheckpointPolicy.MUST_SAVE)), trained(region(plain, None))[0])
    assert kept["plain"].count(str(MM)) - kept["twice"].count(str(MM)) == 2


def test_what_one_region_saves_is_none_of_the_next() -> None:
    twice, seen = define_twice(), list[str]()
    policy = about("t_twice", True, seen)
    step = region(twice, policy)
    trained(lambda x, w: step(step(x, w), w))
    assert seen == ["t_twice", "aten.cos.default"] * 2


def test_a_policy_that_raises_leaves_nothing_behind() -> None:
    def policy(context: object, op: object, *args: object, **kwargs: object) -> bool:
        if "sin" in str(op):
            raise ArithmeticError("mine")
        return "t_twice" in str(op) and False

    twice = define_twice()
    with pytest.raises(ArithmeticError, match="mine"):
        trained(region(twice, policy))
    same(trained(region(twice, None))[0], trained(region(plain, None))[0])


def test_a_mode_around_a_checkpoint_may_be_over_in_backward() -> None:
    run = region(define_twice(), None)

    def seen(x: Tensor, w: Tensor) -> object:
        with Passing(whole=True):
            return run(x, w)

    same(trained(seen)[0], trained(region(plain, None))[0])


def test_a_policy_sees_the_inside_alone_of_an_op_that_decomposes() -> None:
    seen: list[str] = []
    op = define_twice()

    def call(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with hopkit.decompose(op):
            return op(body, x)

    found, ran = trained(region(call, about("aten.mm", CheckpointPolicy.MUST_SAVE, seen)))
    wanted, expected = trained(region(plain, about("aten.mm", CheckpointPolicy.MUST_SAVE)))
    same(found, wanted)
    assert ran == expected
    assert seen == ["aten.mm.default", "aten.sin.default"] * 2 + ["aten.mul.Tensor", "aten.cos.default"]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own
def test_a_derivative_inside_a_checkpoint_is_recorded() -> None:
    op = define_twice()

    def slope(call: Function) -> Function:
        def run(x: Tensor) -> Tensor:
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(call(torch.sin, leaf).sum(), leaf)[0]

        return lambda x: checkpoint(run, x, use_reentrant=False)

    graph = record(slope(op), X)
    same(graph(X * 2), slope(plain)(X * 2))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_checkpoint_around_compiled_code(backend: str) -> None:
    # torch computes it again without Dynamo, and what is saved meanwhile must be as much as before.
    op = define_twice()
    compiled = torch.compile(lambda x: op(torch.relu, x), backend=backend, fullgraph=True)
    x = X.clone().requires_grad_()
    checkpoint(compiled, x, use_reentrant=False).sum().backward()
    same(x.grad, (X > 0).float())


def test_a_node_in_a_checkpoint_saves_nothing_that_its_body_does_not() -> None:
    # Out of torch.vmap nothing can be computed again, nor has it to be: a sum saves nothing.
    once = define_once()

    def summed(call: Function) -> Function:
        return lambda x: checkpoint(lambda y: record(lambda y: call(torch.sum, y), y)(y), x, use_reentrant=False)

    x = X.clone().requires_grad_()
    torch.vmap(summed(once))(x).sum().backward()
    same(x.grad, torch.ones_like(X))


def test_a_function_mode_around_a_checkpoint_may_be_over_in_backward() -> None:
    once, x = define_once(), X.clone().requires_grad_()

    def recorded(x: Tensor) -> Tensor:
        result: Tensor = record(lambda y: once(torch.sin, y).cos(), x)(x)
        return result

    with Looking():
        result = checkpoint(recorded, x, use_reentrant=False)
    result.sum().backward()
    same(x.grad, -X.sin().sin() * X.cos())


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_body_may_compute_a_part_again(backend: str | None) -> None:
    def define(name: str, run: Function) -> hopkit.Op[..., Tensor]:
        @hopkit.define(name)
        def part(body: hopkit.Subgraph, x: Tensor) -> Tensor:
            result: Tensor = run(body, x)
            return result * 2

        return part

    found = []
    for op in (define("t_all", lambda body, x: body(x)), define("t_part", computed_again)):

        def function(x: Tensor, w: Tensor, op: Any = op) -> Any:
            return op(lambda y: torch.tanh(torch.tanh(y @ w) @ w), x)

        found.append(trained(torch.compile(function, backend=backend) if backend else function))
    (want, ran), (got, again) = found
    same(got, want)
    assert again.count("aten.mm.default") == ran.count("aten.mm.default") + 2
    graph = record(lambda x, w: torch.autograd.grad(function(x, w).sum(), [x, w]), *leaves())
    same(graph(X, W), want[1:])


def leaves() -> list[Tensor]:
    return [X.clone().requires_grad_(), W.clone().requires_grad_()]
