"""Dispatch modes and function modes of a user: an op gives what its body gives, and the mode sees what it would see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import hopkit
from hopkit import Subgraph
from hopkit._torch.fakes import FakeMode
from tests.modes import Names
from tests.recording import define_twice, nodes, record, same, trained

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),  # torch's own decompositions
]

X = torch.linspace(-1.0, 1.0, 9).reshape(3, 3)
W = torch.linspace(0.5, 1.5, 9).reshape(3, 3)
Function = Callable[..., Any]


def plain(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What `define_twice` defines, as a function."""
    result: Tensor = 1.0 * body(body(x))
    return result


class Doubles(Names):
    """Changes what it sees: a sine is twice a sine."""

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        return result * 2 if func is torch.ops.aten.sin.default else result


class Half(TorchFunctionMode):
    """Changes what it sees, function by function."""

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result / 2 if getattr(func, "__name__", "") == "matmul" else result


def step(call: Function) -> Function:
    return trained(lambda x, w: call(lambda y: (y @ w).sin(), x))


def leaves() -> tuple[Tensor, Tensor]:
    return X.clone().requires_grad_(), W.clone().requires_grad_()


@pytest.mark.parametrize("kind", [Names, Doubles])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_mode_that_sees_the_inside(kind: type[Names], recorded: bool) -> None:
    def of(call: Function) -> tuple[object, list[str]]:
        x, w = leaves()
        run = record(lambda x, w: call(lambda y: (y @ w).sin(), x), X, W) if recorded else None
        with kind() as mode:
            result = (step(call) if run is None else trained(run))(x, w)
        return result, mode.names

    found, seen = of(define_twice())
    wanted, expected = of(plain)
    same(found, wanted)
    assert seen == expected


@pytest.mark.parametrize("recorded", [False, True])
def test_a_mode_that_takes_operators_whole(recorded: bool) -> None:
    twice = define_twice()
    run: Function = lambda x, w: twice(lambda y: (y @ w).sin(), x)  # noqa: E731 - it is recorded, or not
    run = record(run, X, W) if recorded else run
    with Names(whole=True) as mode, torch.no_grad():
        run(X, W)
    assert mode.names == ["t_twice"]
    with Names(whole=True) as mode:
        found = trained(run)(*leaves())
    same(found, step(plain)(*leaves()))
    assert mode.names.count("t_twice") == 2


def test_a_mode_that_takes_operators_whole_may_run_them_in_itself() -> None:
    class Inside(Names):
        def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            if str(func) == "t_twice":
                with hopkit.decompose(*hopkit.ops().values()), self:
                    return func(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    twice = define_twice()
    with Inside(whole=True) as mode, torch.no_grad():
        found = twice(lambda y: (y @ W).sin(), X)
    same(found, plain(lambda y: (y @ W).sin(), X))
    assert mode.names[0] == "t_twice"
    assert mode.names.count("aten.sin.default") == 2


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_modes_in_modes(outer: bool, inner: bool) -> None:
    twice = define_twice()
    with Names(whole=outer) as first, Names(whole=inner) as second:
        found = step(twice)(*leaves())
    same(found, step(plain)(*leaves()))
    assert second.names
    assert ("t_twice" in second.names) == inner
    assert ("t_twice" in first.names) == (outer and inner)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_function_mode_sees_functions_of_the_body(recorded: bool) -> None:
    twice = define_twice()

    def run(call: Function) -> Any:
        with Half():
            return step(call)(*leaves())

    if recorded:
        with Half():
            graph = record(lambda x: twice(lambda y: (y @ W).sin(), x), X)
            wanted = plain(lambda y: (y @ W).sin(), X)
        same(graph(X), wanted)
    else:
        same(run(twice), run(plain))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning a function")
def test_a_mode_around_compiled_code(backend: str, whole: bool) -> None:
    twice = define_twice()
    compiled = torch.compile(lambda x, w: twice(lambda y: (y @ w).sin(), x), backend=backend)
    with Names(whole=whole):
        found = trained(compiled)(*leaves())
    same(found, step(plain)(*leaves()))


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_mode_around_a_transform(transform: str, whole: bool) -> None:
    def run(call: Function) -> Any:
        function: Function = lambda x: call(lambda y: (y @ W).sin(), x)  # noqa: E731
        if transform == "vmap":
            return torch.vmap(function)(torch.stack([X, X + 1]))
        if transform == "jvp":
            return torch.func.jvp(function, (X,), (X.cos(),))
        return torch.func.grad(lambda x: function(x).sum())(X)

    with Names(whole=whole):
        found = run(define_twice())
    same(found, run(plain))


@pytest.mark.parametrize("whole", [False, True])
def test_a_mode_around_a_recorder_and_inside(whole: bool) -> None:
    twice = define_twice()

    def function(x: Tensor) -> Tensor:
        return twice(lambda y: (y @ W).sin(), x)

    def within(x: Tensor) -> Tensor:
        with Names(whole=whole):
            return function(x)

    with Names(whole=whole):
        graph = record(function, X)
    assert nodes(graph, twice) == whole  # torch asks the modes of a user before the tracer, wherever they were entered
    for recorded in (graph, record(within, X)):
        same(recorded(W), plain(lambda y: (y @ W).sin(), W))


@pytest.mark.parametrize("whole", [False, True])
def test_a_mode_and_stand_ins(whole: bool) -> None:
    twice = define_twice()
    with FakeMode() as fake, Names(whole=whole):
        x = fake.from_tensor(torch.empty_strided((3, 4), (1, 3)))
        result = twice(torch.sin, x)
    assert (result.shape, result.stride()) == ((3, 4), (1, 3))


def test_a_mode_that_raises_leaves_nothing_behind() -> None:
    class Raises(Names):
        def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
            raise ArithmeticError("mine")

    twice = define_twice()
    for whole in (False, True):
        with Raises(whole=whole), pytest.raises(ArithmeticError, match="mine"):
            twice(torch.sin, X)
    same(twice(torch.sin, X), plain(torch.sin, X))


def test_a_mode_sees_an_op_that_is_data_dependent() -> None:
    @hopkit.define("t_branch", inputs=lambda use, yes, x: ((x,),), outputs=lambda use, yes, x: torch.empty_like(x))
    def branch(use: Tensor, yes: Subgraph, x: Tensor) -> Tensor:
        return yes(x) if bool(use > 0) else x.clone()

    for value in (1.0, -1.0):
        with Names() as mode:
            same(branch(torch.tensor(value), torch.sin, X), X.sin() if value > 0 else X)
        assert ("aten.sin.default" in mode.names) == (value > 0)
        with Names(whole=True):
            same(branch(torch.tensor(value), torch.sin, X), X.sin() if value > 0 else X)


@pytest.mark.parametrize("given", [NotImplemented, 5])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_mode_that_gives_no_outputs_is_told_of(given: object, recorded: bool) -> None:
    class Odd(Names):
        def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
            return given if func is twice.operator else super().__torch_dispatch__(func, types, args, kwargs)

    twice = define_twice()
    run = record(lambda x: twice(torch.sin, x), X) if recorded else lambda x: twice(torch.sin, x)
    with (
        pytest.raises(hopkit.HopkitError, match=f"Odd, which takes .* whole, gave {given} for op 't_twice'"),
        Odd(True),
    ):
        run(X)
    same(run(X), plain(torch.sin, X))
