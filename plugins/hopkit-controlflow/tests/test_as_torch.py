"""What PyTorch's own tests of control flow are about (test/functorch/test_control_flow.py), held against plain Python.

Every case names the tests of torch's whose behaviour it has. The code is our own.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import hopkit_controlflow
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from hopkit.extend.body import flatten, leaves, map_leaves, unflatten

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own use
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),
]

Function = Callable[..., Any]


def _cond(pred: Any, yes: Function, no: Function, operands: Sequence[Any] = ()) -> Any:
    return (yes if pred else no)(*operands)


def _while_loop(going: Function, body: Function, state: Sequence[Any]) -> Any:
    state = tuple(torch.tensor(leaf) if isinstance(leaf, (int, float)) else leaf for leaf in state)
    while going(*state):
        state = tuple(body(*state))
    return state


def _slices(xs: Any, dim: int, reverse: bool) -> list[Any]:
    tensors, tree = flatten(xs)
    parts = zip(*(cast("Tensor", t).unbind(dim) for t in tensors), strict=True)
    found = [unflatten(list(part), tree) for part in parts]
    return found[::-1] if reverse else found


def _stacked(ys: list[Any], dim: int, reverse: bool) -> Any:
    ys = ys[::-1] if reverse else ys
    _, tree = flatten(ys[0])
    return unflatten(
        [torch.stack(t, dim if dim <= t[0].dim() else 0) for t in zip(*map(leaves, ys), strict=True)], tree
    )


def _scan(step: Function, carry: Any, xs: Any, *, dim: int = 0, reverse: bool = False) -> Any:
    ys = []
    for x in _slices(xs, dim, reverse):
        carry, y = step(carry, x)
        ys.append(y)
    return carry, _stacked(ys, dim, reverse)


def _associative_scan(combine: Function, xs: Any, dim: int, reverse: bool = False, combine_mode: str = "") -> Any:
    found = list[Any]()
    for x in _slices(xs, dim, reverse):
        found.append(combine(found[-1], x) if found else x)
    return _stacked(found, dim, reverse)


def _map(f: Function, xs: Any, *args: Any) -> Any:
    return _stacked([f(x, *args) for x in _slices(xs, 0, False)], 0, False)


PLAIN = SimpleNamespace(cond=_cond, while_loop=_while_loop, scan=_scan, associative_scan=_associative_scan, map=_map)


@dataclasses.dataclass(frozen=True)
class Case:
    """``run(ops, *inputs)`` on two sets of inputs; ``rows``: which of them have a first size that may change."""

    torch: str
    run: Function
    inputs: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    rows: tuple[int, ...] = ()


CASES: dict[str, Case] = {}

X = torch.linspace(-1, 1, 6).reshape(2, 3)
W = torch.linspace(0.5, 1.5, 3)
LONG = torch.linspace(-1, 1, 21).reshape(7, 3)
MATRIX = torch.linspace(-0.5, 0.5, 9).reshape(3, 3)


def case(
    torch: str, inputs: tuple[Tensor, ...], others: tuple[Tensor, ...], rows: tuple[int, ...] = ()
) -> Callable[[Function], Function]:
    def add(run: Function) -> Function:
        CASES[run.__name__] = Case(torch, run, inputs, others, rows)
        return run

    return add


YES, NO = torch.tensor(True), torch.tensor(False)


@case("test_cond_traced_not_nested, test_cond_functionalized_data_dependent_pred", (X,), (X + 1,), (0,))
def cond_of_values(ops: Any, x: Tensor) -> Any:
    return ops.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), [x])


@case("test_cond_autograd_pytree_input, test_cond_autograd_same_pytree_output", (YES, X, W), (NO, X, W))
def cond_of_pytrees(ops: Any, pred: Tensor, x: Tensor, w: Tensor) -> Any:
    return ops.cond(
        pred,
        lambda t, u: {"res": [t["a"][0] * u, (t["b"],)], "n": t["b"].sum()},
        lambda t, u: {"res": [t["b"] - u, (t["a"][0],)], "n": t["a"][0].mean()},
        ({"a": [x], "b": x * 2}, w),
    )


@case("test_cond_with_tensor_closure, test_cond_autograd_inner_tensor", (YES, X, W), (NO, X, W), (1,))
def cond_that_closes_over(ops: Any, pred: Tensor, x: Tensor, w: Tensor) -> Any:
    v = w * 2
    return ops.cond(pred, lambda x: x * w + torch.ones(3) * 42, lambda x: (x + v).sin(), (x,))


@case("test_cond_autograd_nested, test_cond_nested_traced_multi", (YES, NO, X, W), (NO, YES, X, W))
def cond_in_cond(ops: Any, p: Tensor, q: Tensor, x: Tensor, w: Tensor) -> Any:
    def inner(x: Tensor, y: Tensor) -> Any:
        return ops.cond(
            q, lambda x, y: x * y * 2.71, lambda x, y: ops.cond(p, torch.sub, torch.add, (x, y * w)), (x, y)
        )

    return ops.cond(p, inner, lambda x, y: ops.cond(q, torch.mul, inner, (x, y)) + y, (x, x.cos()))


@case("test_cond_autograd_mixed_require_grad, test_cond_autograd_grad_through_cond", (YES, X), (NO, X), (1,))
def cond_of_one_operand_twice(ops: Any, pred: Tensor, x: Tensor) -> Any:
    y = ops.cond(pred, lambda x, y, z: x * y * z, lambda x, y, z: x + y + z, (x, x.detach(), x))
    return (y * x).sum()


@case(
    "test_cond_autograd_torch_nn_module, test_cond_with_module_param_closure", (YES, X, MATRIX, W), (NO, X, MATRIX, W)
)
def cond_of_modules(ops: Any, pred: Tensor, x: Tensor, matrix: Tensor, bias: Tensor) -> Any:
    linear = torch.nn.functional.linear
    return ops.cond(pred, lambda x: linear(x, matrix, bias).relu(), lambda x: linear(x.cos(), matrix), (x,))


@case("test_cond_autograd_no_grad_output (a branch without a derivative)", (YES, X), (NO, X))
def cond_without_gradients(ops: Any, pred: Tensor, x: Tensor) -> Any:
    def quietly(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = x.sin()
        return y, x * y

    return ops.cond(pred, quietly, lambda x: (x.cos(), torch.zeros_like(x)), (x,))


@case("test_cond_autograd_different_requires_grad", (YES, X, W), (NO, X, W))
def cond_whose_branches_need_other_gradients(ops: Any, pred: Tensor, x: Tensor, w: Tensor) -> Any:
    return ops.cond(pred, lambda x, w: (x * 2, w * 1), lambda x, w: (x * w, torch.ones(3)), (x, w))


@case("test_cond_symint_input, test_cond_symint_closure, test_cond_functionalized_nested", (X,), (X + 1,), (0,))
def cond_of_sizes(ops: Any, x: Tensor) -> Any:
    n = x.shape[0]
    return ops.cond(n > 4, lambda x: x * n, lambda x: ops.cond(x.sum() > 0, torch.sin, lambda x: x + n, (x,)), (x,))


@case("test_cond_in_forloop", (X,), (X + 1,))
def cond_in_a_python_loop(ops: Any, x: Tensor) -> Any:
    for i in range(3):
        x = ops.cond((x * i).sum() > 0.5, lambda x: x * 0.5, lambda x: x + i, (x,))  # noqa: B023
    return x


@case("test_cond_functionalized (writes to what is made inside)", (YES, X), (NO, X), (1,))
def cond_that_writes_to_its_own(ops: Any, pred: Tensor, x: Tensor) -> Any:
    def yes(x: Tensor) -> Tensor:
        y = x.sin()
        y.add_(4)
        return y.mul(2)

    return ops.cond(pred, yes, lambda x: x.cos().view(-1).view(x.shape).clone(), (x,))


@case("test_cond_autograd_complex, test_cond_input_aliasing (gives back what it got)", (YES, X, W), (NO, X, W))
def cond_that_gives_back(ops: Any, pred: Tensor, x: Tensor, w: Tensor) -> Any:
    return ops.cond(pred, lambda x, w: (x, x.t(), w[None]), lambda x, w: (x + 1, x.t() * w.sum(), w[None]), (x, w))


@case("test_cond_vmap_simple, test_cond_vmap_multiple_outputs, test_cond_vmap_*_with_closure", (X, W), (X + 1, W))
def cond_of_batches(ops: Any, x: Tensor, w: Tensor) -> Any:
    def each(x: Tensor) -> Any:
        return ops.cond(w.sum() > 0, lambda x: (x + w, x.sum()), lambda x: (x - w, x.prod()), (x,))

    return torch.vmap(each)(x)


@case("_while_loop_tests: simple, simple_with_mutation", (torch.zeros(1),), (torch.ones(1) * 20,))
def while_that_writes_to_its_own(ops: Any, x: Tensor) -> Any:
    def body(x: Tensor) -> tuple[Tensor]:
        y = x.clone().add_(1).add_(-1)
        return (y * 1.5 + 1,)

    return ops.while_loop(lambda x: x.clone().add_(1).sum() < 10, body, (x,))


@case(
    "_while_loop_tests: nested, nested2",
    (torch.tensor(2), torch.tensor(2), X, W),
    (torch.tensor(0), torch.tensor(3), X, W),
)
def while_in_while(ops: Any, i: Tensor, j: Tensor, x: Tensor, w: Tensor) -> Any:
    def body(i: Tensor, j: Tensor, x: Tensor, w: Tensor) -> Any:
        inner = ops.while_loop(
            lambda i, j, x, w: j > 0, lambda i, j, x, w: (i.clone(), j - 1, x + 3.14, w - 2.71), (i, j, x, w)
        )
        i, j, x, w = inner
        return i - 1, j + 1, x * 2 * w, w / 2

    return ops.while_loop(lambda i, j, x, w: i > 0, body, (i, j, x, w))


@case(
    "_while_loop_tests: simple_with_linear, nested_with_linear",
    (torch.tensor(3), X, MATRIX),
    (torch.tensor(1), X, MATRIX),
)
def while_of_a_module(ops: Any, n: Tensor, x: Tensor, matrix: Tensor) -> Any:
    least = torch.tensor(1)
    linear = torch.nn.functional.linear
    return ops.while_loop(lambda n, x: n - least > 0, lambda n, x: (n - 1, linear(x, matrix, x[0])), (n, x))


@case("_while_loop_tests: int_carry, pytree_int_carry, const_and_symint_output", (X,), (X * 3,), (0,))
def while_with_numbers(ops: Any, x: Tensor) -> Any:
    n = x.shape[0]
    return ops.while_loop(lambda i, x: i < 4, lambda i, x: (i + 1, x * 0.5 + i + n), (0, x))


@case("_while_loop_tests: pytree_input, test_while_loop_autograd_simple", (X, W), (X * 9, W))
def while_of_values(ops: Any, x: Tensor, w: Tensor) -> Any:
    def body(t: Any, count: Any) -> Any:
        return {"x": t["x"] * w * 2, "pair": (t["pair"][1], t["pair"][0] + t["x"].sum())}, [count[0] + 1]

    start = ({"x": x, "pair": (w, w * 2)}, [torch.tensor(0)])
    return ops.while_loop(lambda t, count: t["x"].abs().sum() < 30, body, start)


@case("test_while_loop_cond_in_body (cond inside while_loop)", (torch.tensor(4), X), (torch.tensor(1), X))
def cond_in_while(ops: Any, n: Tensor, x: Tensor) -> Any:
    def body(n: Tensor, x: Tensor) -> Any:
        return n - 1, ops.cond(n % 2 == 0, lambda x: x.sin() * n, lambda x: x.cos() - n, (x,))

    return ops.while_loop(lambda n, x: n > 0, body, (n, x))


def step(c: Tensor, x: Tensor) -> Any:
    return c * 0.5 + x.sin(), (c * x, c.sum() + 1)


for dim in (0, 1):
    for reverse in (False, True):

        def along(ops: Any, init: Tensor, xs: Tensor, dim: int = dim, reverse: bool = reverse) -> Any:
            return ops.scan(step, init, xs, dim=dim, reverse=reverse)

        along.__name__ = f"scan_along_{dim}{'_reversed' * reverse}"
        init = torch.ones(3 if dim == 0 else 2)
        case("test_scan_dim, test_scan_y_less_ndim_then_dim, test_scan_tuple", (init, X), (init, X.cos()))(along)

        def combined(ops: Any, xs: Tensor, dim: int = dim, reverse: bool = reverse) -> Any:
            return ops.associative_scan(lambda a, b: a * b, xs, dim, reverse=reverse)

        combined.__name__ = f"associative_scan_along_{dim}{'_reversed' * reverse}"
        case("test_associative_scan_dim, test_pointwise_associative_scan_reverse_dim", (X + 2,), (X,))(combined)


@case("test_scan_complex_pytree, test_scan_init", (X[0], LONG, W), (X[1], LONG.cos(), W), (1,))
def scan_of_pytrees(ops: Any, h: Tensor, xs: Tensor, w: Tensor) -> Any:
    def step(carry: Any, x: Any) -> Any:
        i, j = carry["i"], carry["j"][0]
        return {"i": i * x["x"] + w, "j": ([x["y"][0] + j[0] * 0.5],)}, {"k": (i.sum(), [j[0] - x["x"]])}

    return ops.scan(step, {"i": h, "j": ([h + 1],)}, {"x": xs, "y": (xs * 2,)})


@case(
    "test_scan_dtype, test_scan_float_output", (torch.tensor(3), LONG.long()), (torch.tensor(1), LONG.long() + 2), (1,)
)
def scan_of_integers(ops: Any, n: Tensor, xs: Tensor) -> Any:
    return ops.scan(lambda c, x: (c + x.sum(), (x / 2, c.double(), x > c)), n, xs)


@case(
    "test_scan_RNN, test_scan_closure_RNN, test_scan_RNN_partial_autograd",
    (W, LONG, MATRIX),
    (W, LONG.cos(), MATRIX),
    (1,),
)
def scan_of_a_recurrent_net(ops: Any, h: Tensor, xs: Tensor, matrix: Tensor) -> Any:
    def step(h: Tensor, x: Tensor) -> Any:
        h = torch.tanh(x @ matrix.t() + h @ matrix + W)
        return h, h * 1

    return ops.scan(step, h, xs)


@case("test_scan_partial_gradients, test_scan_closure_*_partial_grad", (X[0], LONG), (X[1], LONG.cos()), (1,))
def scan_without_some_gradients(ops: Any, h: Tensor, xs: Tensor) -> Any:
    def step(carry: Any, x: Tensor) -> Any:
        a, b = carry
        return (a * x, b.detach() + x.detach().sum()), (b, a.detach() * x)

    return ops.scan(step, (h, torch.zeros(3)), xs)


@case(
    "test_scan_downstream_scan_matmul, test_scan_downstream_scan_scan",
    (X[0], LONG, MATRIX),
    (X[1], LONG.cos(), MATRIX),
    (1,),
)
def scan_after_scan(ops: Any, h: Tensor, xs: Tensor, matrix: Tensor) -> Any:
    _, ys = ops.scan(lambda c, x: (c + x, c * x), h, xs)
    return ops.scan(lambda c, y: (c * 0.5 + y.sin(), c), h, ys, reverse=True)[1] @ matrix


@case("test_scan_compile_cnt, test_scan_multiple_layers_gradient", (X[0], LONG, W), (X[1], LONG.cos(), W), (1,))
def scan_in_scan(ops: Any, h: Tensor, xs: Tensor, w: Tensor) -> Any:
    def step(c: Tensor, x: Tensor) -> Any:
        inner, ys = ops.scan(lambda d, e: (d * 0.9 + e * w, d), c, torch.stack([x, x + 1]))
        return inner.tanh(), ys.sum(0)

    return ops.scan(step, h, xs)


@case("test_scan_associative_scan", (X[0], LONG), (X[1], LONG.cos()), (1,))
def associative_scan_in_scan(ops: Any, h: Tensor, xs: Tensor) -> Any:
    return ops.scan(lambda c, x: (c + x, ops.associative_scan(torch.add, c * x, 0)), h, xs)


@case("test_scan_closure_with_cond (cond inside scan)", (X[0], LONG), (X[1], LONG.cos()), (1,))
def cond_in_scan(ops: Any, h: Tensor, xs: Tensor) -> Any:
    def step(c: Tensor, x: Tensor) -> Any:
        c = ops.cond(c.sum() > 0, lambda c: c - x, lambda c: c * x + 1, (c,))
        return c, c.sum()

    return ops.scan(step, h, xs)


@case("test_associative_scan_binary_operator", (LONG, LONG.cos()), (LONG * 0.5 + 1, LONG), (0, 1))
def associative_scan_of_a_recurrence(ops: Any, a: Tensor, b: Tensor) -> Any:
    return ops.associative_scan(lambda s, t: (t[0] * s[0], t[0] * s[1] + t[1]), (a, b), 0)


@case("test_associative_scan_tuple, test_associative_scan_complex_pytree", (X, LONG[:2]), (X.cos(), LONG[2:4]))
def associative_scan_of_pytrees(ops: Any, x: Tensor, y: Tensor) -> Any:
    def combine(s: Any, t: Any) -> Any:
        return {"i": s["i"] * t["i"], "j": ([s["j"][0][0] + t["j"][0][0]], {"o": s["j"][1]["o"] * t["j"][1]["o"]})}

    return ops.associative_scan(combine, {"i": x, "j": ([y.cumsum(0)], {"o": y + 1})}, 1, reverse=True)


@case(
    "test_associative_scan_non_pointwise_generic",
    (torch.stack([MATRIX, MATRIX + 1, MATRIX.t()]),),
    (MATRIX.expand(3, 3, 3) * 1,),
)
def associative_scan_of_products(ops: Any, xs: Tensor) -> Any:
    return ops.associative_scan(lambda a, b: a @ b, xs, 0, combine_mode="generic")


@case("test_associative_scan_non_contiguous_tensor, test_associative_scan_expand_in_combine_fn", (LONG,), (LONG.cos(),))
def associative_scan_of_a_view(ops: Any, x: Tensor) -> Any:
    return ops.associative_scan(lambda a, b: (a[:1] + b[:1]).expand(a.shape), x.t(), 1)[0]


@case("test_associative_scan_cond_in_combine_fn", (LONG,), (LONG.cos(),), (0,))
def cond_in_associative_scan(ops: Any, x: Tensor) -> Any:
    return ops.associative_scan(lambda a, b: ops.cond(W.sum() > 0, torch.mul, torch.add, (a, b)), x, 0)


@case("test_associative_scan_map_in_combine_fn", (LONG,), (LONG.cos(),))
def map_in_associative_scan(ops: Any, x: Tensor) -> Any:
    return ops.associative_scan(lambda a, b: ops.map(lambda a, b: a * 2.0, torch.stack([a, b]), b)[0] * 0.5 + b, x, 0)


@case(
    "test_associative_scan_vmap_in_combine_fn, test_associative_scan_freevars_simple", (LONG, W), (LONG.cos(), W), (0,)
)
def vmap_in_associative_scan(ops: Any, x: Tensor, w: Tensor) -> Any:
    return ops.associative_scan(lambda a, b: torch.vmap(torch.mul)(a, b) * w.mean(), x, 0)


@case("complex numbers in an associative_scan", (torch.complex(X, X.cos()),), (torch.complex(X, X * 2),))
def associative_scan_of_complex_numbers(ops: Any, x: Tensor) -> Any:
    return torch.view_as_real(ops.associative_scan(torch.mul, x, 1))


@case("test_map_autograd_simple, test_map_autograd_simple_partial_grad", (LONG, W), (LONG.cos(), W), (0,))
def map_of_an_argument(ops: Any, xs: Tensor, y: Tensor) -> Any:
    return ops.map(lambda x, y: x.sin().cos() * y.cos().sin(), xs, y)


@case("test_map_list_in_out, test_map_dict_in_out, test_map_autograd_nested_list", (LONG, W), (LONG.cos(), W), (0,))
def map_of_pytrees(ops: Any, xs: Tensor, y: Tensor) -> Any:
    def f(x: Any, y: Tensor) -> Any:
        return [[x["a"][0].sin() * x["b"].cos()], {"d": x["b"].sum() * y.cos()}]

    return ops.map(f, {"a": [xs], "b": xs * 2}, y)


@case("test_map_autograd_no_grad_output", (LONG, W), (LONG.cos(), W), (0,))
def map_without_some_gradients(ops: Any, xs: Tensor, y: Tensor) -> Any:
    return ops.map(lambda x, y: (x.sin() + y, y.detach().cos(), x.argmax()), xs, y)


@case("test_nested_map_cond_real, test_nested_map_cond_symbolic", (LONG, W), (LONG.cos(), W), (0,))
def cond_in_map(ops: Any, xs: Tensor, y: Tensor) -> Any:
    return ops.map(lambda x, y: ops.cond(x.sum() > 0, torch.mul, lambda x, y: x + y.sum(), (x, y)), xs, y)


@case("test_tracing_map_autograd_symbolic_*, test_map_functionalized_aot_func", (LONG, W), (LONG.cos(), W), (0,))
def map_in_map(ops: Any, xs: Tensor, w: Tensor) -> Any:
    def f(x: Tensor, y: Tensor) -> Any:
        z = ops.map(lambda a, b: a * b + w.sum(), x, y.sum())
        z.add_(5)
        return z * x

    return ops.map(f, xs, w)


def slopes(run: Function, inputs: Sequence[Tensor]) -> Any:
    given = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    found = run(*given)
    tensors = cast("list[Tensor]", leaves(found))
    parts = [t.cos().sum() for t in tensors if t.requires_grad]
    by = [t for t in given if t.requires_grad]
    gradients = (
        torch.autograd.grad(sum(parts, torch.zeros(())), by, allow_unused=True, materialize_grads=True) if parts else ()
    )
    return map_leaves(lambda t: cast("Tensor", t).detach(), found), gradients


def stepped(run: Function) -> Function:
    """The function and its gradient, to be recorded together."""
    return lambda *inputs: slopes(run, inputs)


def exported(run: Function, inputs: tuple[Tensor, ...], rows: tuple[int, ...]) -> Function:
    class Model(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return run(*inputs)

    sizes = tuple({0: torch.export.Dim.DYNAMIC} if i in rows else None for i in range(len(inputs)))
    program, file = torch.export.export(Model(), inputs, strict=False, dynamic_shapes=(sizes,)), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded: Function = torch.export.load(file).module()
    return loaded


HOWS: dict[str, Callable[[Function, Case], Function]] = {
    "eager": lambda run, case: run,
    "symbolic": lambda run, case: make_fx(lambda *t: run(*t), tracing_mode="symbolic")(*case.inputs),
    "functionalize": lambda run, case: make_fx(torch.func.functionalize(lambda *t: run(*t)))(*case.inputs),
    "export": lambda run, case: exported(run, case.inputs, case.rows),
}
TRAINED: dict[str, Callable[[Function], Function]] = {
    "eager": lambda run: run,
    "aot_eager": lambda run: torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True),
    "inductor": lambda run: torch.compile(run, fullgraph=True),
}

ours: Any = hopkit_controlflow
cases = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch.compiler.reset()


def inputs_of(case: Case) -> Iterator[tuple[Tensor, ...]]:
    yield case.inputs
    yield case.others


def longer(case: Case) -> tuple[Tensor, ...]:
    return tuple(torch.cat([t, t[-1:]]) if i in case.rows else t for i, t in enumerate(case.inputs))


@cases
@pytest.mark.parametrize("how", HOWS)
def test_values(name: str, how: str) -> None:
    case = CASES[name]
    function = HOWS[how](lambda *t: case.run(ours, *t), case)
    varied = [longer(case)] if how in ("export", "symbolic", "eager") else []
    for inputs in (*inputs_of(case), *varied):
        assert_close(function(*inputs), case.run(PLAIN, *inputs))


COMPILED = ("cond_of_values", "cond_in_scan", "while_in_while", "scan_of_a_recurrent_net")
"""What is worth the time that Inductor takes: test_inductor.py has others."""


@pytest.mark.parametrize(
    ("name", "how"), [(name, how) for name in CASES for how in TRAINED if how != "inductor" or name in COMPILED]
)
def test_gradients(name: str, how: str) -> None:
    case = CASES[name]
    function = TRAINED[how](lambda *t: case.run(ours, *t))
    for inputs in (*inputs_of(case), longer(case)):
        assert_close(slopes(function, inputs), slopes(lambda *t: case.run(PLAIN, *t), inputs))


@cases
def test_gradients_that_are_recorded(name: str) -> None:
    case = CASES[name]
    graph = make_fx(stepped(lambda *t: case.run(ours, *t)))(*case.inputs)
    for inputs in inputs_of(case):
        assert_close(graph(*inputs), slopes(lambda *t: case.run(PLAIN, *t), inputs))
