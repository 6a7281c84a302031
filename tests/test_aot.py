"""AOTAutograd: an op that trains is a forward and a backward node, and backward does not compute the forward again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from functorch.compile import (  # type: ignore[import-untyped] # torch's own
    aot_function,
    aot_module_simplified,
    config,
    default_partition,
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import dropout, layer_norm
from torch.utils.checkpoint import checkpoint

import hopkit
from hopkit import Subgraph
from hopkit.errors import AutogradError
from tests.recording import Function, define_once, define_twice, nodes, plainly, record, same, trained

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 16).reshape(4, 4)
W = torch.linspace(0.5, 1.5, 16).reshape(4, 4)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors or (X, W)]


def ahead(
    function: Function, *, partition: Function = min_cut_rematerialization_partition, dynamic: bool = False
) -> tuple[Function, list[GraphModule]]:
    """A compiled function, and the graphs that it gets when it has run: forward and backward."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = aot_function(function, keep, partition_fn=partition, dynamic=dynamic)
    return cast("Function", compiled), graphs


def check(function: Function, *inputs: Tensor, **how: Any) -> list[GraphModule]:
    """The graphs of a function whose values and gradients are those of the plain bodies, random numbers included."""
    compiled, graphs = ahead(function, **how)
    torch.manual_seed(0)
    want = plainly(trained(function), *leaves(*inputs))
    torch.manual_seed(0)
    same(trained(compiled)(*leaves(*inputs)), want)
    return graphs


def operators(graph: torch.nn.Module) -> list[str]:
    """The names of all operators in a graph and its subgraphs."""
    modules = [module for module in graph.modules() if isinstance(module, GraphModule)]
    return [str(n.target).split(".")[1] for m in modules for n in m.graph.nodes if "aten." in str(n.target)]


# -- two nodes -------------------------------------------------------------------------------------------------------


def test_a_forward_and_a_backward_node() -> None:
    twice = define_twice()
    forward, backward = check(lambda x, w: twice(lambda y: (y @ w).sin(), x))
    assert [nodes(forward, twice), nodes(backward, twice)] == [1, 1]
    assert operators(forward) == ["mm", "sin", "mm", "sin", "mul"]
    assert operators(backward).count("mm") == 4  # two for each of the forward's, and none of its own
    assert "sin" not in operators(backward)


def test_an_input_or_an_output_that_backward_needs_is_no_further_output() -> None:
    once = define_once()
    forward, _ = check(lambda x, w: once(lambda y: (y @ w).exp(), x))
    (graph,) = (module for name, module in forward.named_children() if name == "t_once_forward")
    (output,) = cast("GraphModule", graph).graph.find_nodes(op="output")
    assert len(output.args[0]) == 1


def test_no_node_where_a_gradient_only_passes_through() -> None:
    once = define_once()
    forward, backward = check(lambda x, w: once(lambda y: y + w, x))
    assert [nodes(forward, once), nodes(backward, once)] == [1, 0]


def test_a_subgraph_of_several_calls_is_one_graph() -> None:
    once = define_once()

    def body(y: Tensor) -> Tensor:
        return (y @ y).sin()

    forward, backward = check(lambda x: once(body, once(body, once(body, x))), X)
    assert [nodes(forward, once), nodes(backward, once)] == [3, 3]
    assert [name for name, _ in forward.named_children()] == ["t_once_forward"]
    assert [name for name, _ in backward.named_children()] == ["t_once_backward"]


def test_a_nested_op_has_nodes_of_its_own() -> None:
    once, twice = define_once(), define_twice()
    forward, backward = check(lambda x, w: once(lambda y: twice(lambda z: (z @ w).sin(), y) + w, x))
    assert [nodes(forward, once), nodes(backward, once)] == [1, 1]
    assert [nodes(forward, twice), nodes(backward, twice)] == [1, 1]
    assert operators(backward).count("mm") == 4


def test_nothing_is_saved_where_no_gradient_is_asked_for() -> None:
    once = define_once()
    compiled, graphs = ahead(lambda x: once(lambda y: (y @ y).sin(), x))
    same(compiled(X), (X @ X).sin())
    (output,) = graphs[0].graph.find_nodes(op="output")
    assert len(output.args[0]) == 1


@pytest.mark.parametrize("partition", [default_partition, min_cut_rematerialization_partition])
def test_whichever_partitioner_cuts_the_graph_around_it(partition: Function) -> None:
    once = define_once()
    forward, backward = check(lambda x, w: (once(lambda y: (y @ w).sin(), x) @ w).cos(), partition=partition)
    assert [nodes(forward, once), nodes(backward, once)] == [1, 1]


# -- what is saved ---------------------------------------------------------------------------------------------------


class Convolutions(torch.nn.Module):
    """The basic block of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(4, track_running_stats=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.first(x)).relu()
        return cast("Tensor", (self.norms[1](self.second(y)) + x).relu())


def transformer(p: float) -> torch.nn.Module:
    return torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=p, activation="gelu", batch_first=True)


BLOCKS: dict[str, tuple[Callable[[], torch.nn.Module], Sequence[int]]] = {
    "transformer": (lambda: transformer(0.0), (2, 8, 16)),
    "transformer with dropout": (lambda: transformer(0.1), (2, 8, 16)),
    "convolutions": (Convolutions, (2, 4, 8, 8)),
}


def saved(function: Function, module: torch.nn.Module, x: Tensor) -> tuple[int, object]:
    """How many bytes a function of ``x`` keeps for backward besides its inputs; its value and its gradients."""
    parameters = dict(module.named_parameters())
    kept: list[Tensor] = []

    def forward(graph: GraphModule, _: object) -> object:
        def run(inputs: list[Tensor]) -> object:
            outputs = graph(*inputs)
            kept.extend(v for v in outputs[1:] if isinstance(v, Tensor))
            return outputs

        return make_boxed_func(lambda *inputs: run(list(inputs)))

    def model(x: Tensor, *values: Tensor) -> object:
        def body(y: Tensor) -> object:
            return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (y,))

        return function(body, x)

    compiled = aot_function(
        model, forward, lambda graph, _: make_boxed_func(graph), partition_fn=min_cut_rematerialization_partition
    )
    inputs = leaves(x, *parameters.values())
    torch.manual_seed(0)
    step = trained(compiled)(*inputs)
    own = {t.untyped_storage().data_ptr() for t in inputs}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for where, size in sizes.items() if where not in own), step


@pytest.mark.parametrize("name", BLOCKS)
def test_as_much_is_saved_as_without_the_op(name: str) -> None:
    once = define_once()
    make, shape = BLOCKS[name]
    torch.manual_seed(0)
    module, x = make(), torch.randn(*shape)
    wanted, want = saved(lambda body, x: body(x), module, x)
    got, step = saved(lambda body, x: once(body, x), module, x)
    torch.testing.assert_close(step, want)
    assert got <= wanted * 1.05


# -- gradients that are not there, or not as expected ----------------------------------------------------------------


def define_pair() -> Any:
    @hopkit.define("t_pair")
    def pair(body: Subgraph[tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
        return body(x)

    return pair


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_nobody_uses(used: int) -> None:
    pair = define_pair()
    forward, backward = check(lambda x, w: pair(lambda y: (y.sin() @ w, (w.cos() @ y).exp()), x)[used])
    assert [nodes(forward, pair), nodes(backward, pair)] == [1, 1]
    assert operators(backward).count("mm") == 2


def test_an_infinite_derivative_by_an_output_that_nobody_uses() -> None:
    pair = define_pair()
    check(lambda x: pair(lambda y: (y @ y, (y * 0).sqrt()), x)[0], X)


@pytest.mark.parametrize(
    "after",
    [lambda y: y.t().exp(), lambda y: y.sum(), lambda y: y[::2], lambda y: y.expand(3, 2, 8)],
    ids=["transposed", "expanded", "a part", "summed"],
)
def test_a_gradient_of_another_memory_layout(after: Function) -> None:
    once = define_once()
    _, backward = check(lambda x, w: after(once(lambda y: (y @ w).view(2, 8).sin(), x)))
    assert nodes(backward, once) == 1
    assert operators(backward).count("mm") == 2


@pytest.mark.parametrize(
    "body",
    [
        lambda y, w: (y.argmax(0), y @ w),
        lambda y, w: ((y @ w).detach(), y @ w),
        lambda y, w: (y, y @ w),
        lambda y, w: (w, y @ w),
        lambda y, w: (torch.ones(3), y @ w),
        lambda y, w: ((y @ w).argmax(0), (y @ w).detach()),
    ],
    ids=["integers", "detached", "an operand", "a capture", "a constant", "nothing"],
)
def test_an_output_without_a_gradient(body: Function) -> None:
    pair = define_pair()

    def model(x: Tensor, w: Tensor) -> object:
        first, second = pair(lambda y: body(y, w), x)
        return first, second, x * w

    compiled, _ = ahead(model)
    got, want = compiled(*leaves()), cast("Sequence[Tensor]", plainly(model, *leaves()))
    assert [t.requires_grad for t in cast("Sequence[Tensor]", got)] == [t.requires_grad for t in want]
    check(model)


def test_second_derivatives() -> None:
    once = define_once()

    def slope(x: Tensor, w: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(once(lambda y: (y @ w).sin() * y, x).sum(), x, create_graph=True)
        return first.cos()

    forward, _ = check(slope)
    assert nodes(forward, once)


def test_a_second_derivative_of_random_numbers_is_refused() -> None:
    once = define_once()

    def slope(x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(once(lambda y: dropout(y.sin()), x).sum(), x, create_graph=True)
        return first

    compiled, _ = ahead(slope)
    with pytest.raises(
        AutogradError, match=r"op 't_once' cannot be recorded with a second derivative: it draws random"
    ):
        compiled(*leaves(X))


# -- what backward must not do again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [lambda y: y, lambda y: y.sum()], ids=["kept", "summed"])
def test_backward_has_the_random_numbers_of_forward(after: Function) -> None:
    once = define_once()
    forward, backward = check(lambda x, w: after(once(lambda y: dropout(y @ w) * torch.rand_like(y), x)))
    assert [nodes(forward, once), nodes(backward, once)] == [1, 1]
    assert not [name for name in operators(backward) if name in ("native_dropout", "rand_like")]


def test_random_numbers_are_drawn_once_even_where_everything_is_computed_again() -> None:
    once = define_once()
    with config.patch(aggressive_recomputation=True):
        forward, backward = check(lambda x, w: (once(lambda y: dropout(y @ w).cos(), x) @ w).sin() @ w)
    assert [nodes(forward, once), nodes(backward, once)] == [1, 1]


def test_random_numbers_of_an_output_that_nobody_uses() -> None:
    pair = define_pair()
    check(lambda x, w: pair(lambda y: (dropout(y @ w), dropout(w @ y)), x)[1])


class Tenfold(torch.autograd.Function):
    """A backward that is not the derivative, so that losing it shows."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a @ a

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return cast("Tensor", gradient @ ctx.saved_tensors[0] * 10)


def test_a_backward_of_its_own() -> None:
    twice = define_twice()
    forward, backward = check(lambda x, w: twice(lambda y: Tenfold.apply(y * w), x))  # type: ignore[no-untyped-call] # torch's own
    assert [nodes(forward, twice), nodes(backward, twice)] == [1, 1]


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "unseen"])
def test_a_hook_that_closes_over_a_tensor(captured: bool) -> None:
    once = define_once()

    def hooked(y: Tensor, w: Tensor) -> Tensor:
        result = (y * w if captured else y).sin()
        if result.requires_grad:
            result.register_hook(lambda gradient: gradient * w)
        return result

    check(lambda x, w: once(lambda y: hooked(y, w), x) + w)


def test_an_input_and_an_output_that_are_written_to_later() -> None:
    once = define_once()

    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 1
        y = once(lambda a: a * 2 + w @ w, x)
        x.mul_(3)
        y.add_(1)
        return x, y

    forward, backward = check(model)
    assert [nodes(forward, once), nodes(backward, once)] == [1, 1]


def test_a_copy_into_a_tensor() -> None:
    once = define_once()

    def first_from_second(a: Tensor) -> Tensor:
        b = a.clone()
        b[0] = a[1]
        return b * 2

    check(lambda x: once(first_from_second, x), X)


def test_autocast_ends_with_the_forward() -> None:
    once = define_once()

    def model(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return once(lambda y: (y @ w).sin() + torch.linalg.vector_norm(y), x)

    forward, backward = check(model)
    assert [nodes(forward, once), nodes(backward, once)] == [1, 1]


# -- rules written by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_a_kernel_written_by_hand_computes_the_forward(nested: bool) -> None:
    once, twice = define_once(), define_twice()
    calls: list[Tensor] = []

    @once.rule("device")
    def kernel(body: Subgraph, *xs: Tensor) -> Tensor:
        calls.extend(xs)
        return body(*xs)

    def inner(x: Tensor, w: Tensor) -> Tensor:
        return once(lambda y: (y @ w).sin(), x)

    compiled, graphs = ahead(lambda x, w: twice(lambda y: inner(y, w), x) if nested else inner(x, w))
    step = trained(compiled)(*leaves())
    assert [nodes(graph, once) for graph in graphs] == ([2, 2] if nested else [1, 1])
    calls.clear()
    graphs[0](X, W)
    assert len(calls) == (2 if nested else 1)
    same(step, plainly(trained(lambda x, w: inner(inner(x, w), w) if nested else inner(x, w)), *leaves()))


def test_a_derivative_written_by_hand_in_a_nested_op() -> None:
    once = define_once()

    @hopkit.define("t_step")
    def step(body: Subgraph, x: Tensor) -> Tensor:
        return (body(x) > 0).to(x.dtype)

    @step.rule("autograd")
    class Straight:
        @staticmethod
        def forward(body: Subgraph, x: Tensor) -> tuple[Tensor, Tensor]:
            return (body(x) > 0).to(x.dtype), x

        @staticmethod
        def backward(x: Tensor, gradient: Tensor) -> tuple[Tensor]:
            return (gradient * x * 7,)

    compiled, _ = ahead(lambda x: once(lambda y: step(torch.sin, y * 2), x))
    (x,) = leaves(X)
    cast("Tensor", compiled(x)).sum().backward()
    same(x.grad, X * 2 * 7 * 2)


def test_an_output_given_twice_that_is_a_view_inside() -> None:
    @hopkit.define("t_both")
    def both(body: Subgraph, x: Tensor) -> tuple[Tensor, Tensor]:
        return (y := body(x)), y

    check(lambda x: both(lambda y: y.sin().t(), x), X)
    check(lambda x: torch.vmap(lambda row: both(torch.sin, row), in_dims=1)(x), X)


def test_what_a_derivative_gives_besides_has_a_gradient() -> None:
    once = define_once()

    def value_and_slope(x: Tensor) -> object:
        value, pull, *_ = torch.func.vjp(lambda y: once(torch.sin, y), x)
        return value, cast("Function", pull)(x)

    check(value_and_slope, X)


# -- sizes -----------------------------------------------------------------------------------------------------------

SIZES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "a size in the value": lambda once, x, w: once(lambda y: (y @ w) * y.shape[0], x),
    "a size in a shape": lambda once, x, w: once(lambda y: (y @ w).reshape(-1).sin().view(y.shape[0] * 2, 2), x),
    "a part": lambda once, x, w: once(lambda y: torch.cat([y @ w, y[1:]]).sin(), x),
    "normalised": lambda once, x, w: once(lambda y: layer_norm(torch.softmax(y @ w, -1), (4,)), x),
    "known to the values alone": lambda once, x, w: once(lambda y: (y @ w)[y.sum(1) > 0].sum(), x),
}


@pytest.mark.parametrize("name", SIZES)
def test_dynamic_sizes(name: str) -> None:
    once = define_once()
    compiled, graphs = ahead(lambda x, w: SIZES[name](once, x, w), dynamic=True)
    for size in (3, 4, 5):
        inputs = leaves(torch.linspace(-1.0, 1.0, size * 4).reshape(size, 4), W)
        same(trained(compiled)(*inputs), plainly(trained(lambda x, w: SIZES[name](once, x, w)), *inputs))
    assert [nodes(graph, once) for graph in graphs] == [1, 1]


def test_a_symbolic_number_for_an_operand() -> None:
    @hopkit.define("t_times")
    def times(body: Subgraph, x: Tensor, n: int | torch.SymInt) -> Tensor:
        return cast("Tensor", body(x) * n)

    compiled, _ = ahead(lambda x, w: times(lambda y: (y @ w).sin(), x, x.shape[0] * 2), dynamic=True)
    for size in (3, 4, 5):
        inputs = leaves(torch.linspace(-1.0, 1.0, size * 4).reshape(size, 4), W)
        want = trained(lambda x, w, size=size: (x @ w).sin() * size * 2)(*inputs)
        same(trained(compiled)(*inputs), want)


# -- torch.compile, and checkpointing --------------------------------------------------------------------------------


def compiled_by(graphs: list[GraphModule]) -> Callable[..., object]:
    """A backend for torch.compile."""

    def keep(graph: GraphModule, _: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return lambda graph, inputs: aot_module_simplified(
        graph, inputs, fw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )


CHECKPOINTED: dict[str, Callable[[Any, Tensor, Tensor], object]] = {
    "around": lambda once, x, w: checkpoint(
        lambda a, b: once(lambda y: (y @ b).sin(), a) @ b, x, w, use_reentrant=False
    ),
    "around, random": lambda once, x, w: checkpoint(
        lambda a, b: once(lambda y: dropout(y @ b), a) @ b, x, w, use_reentrant=False
    ),
    "inside": lambda once, x, w: once(
        lambda y: checkpoint(lambda a, b: (a @ b).sin() @ b, y, w, use_reentrant=False), x
    ),
    "inside, random": lambda once, x, w: once(
        lambda y: checkpoint(lambda a, b: dropout(a @ b).sin() @ b, y, w, use_reentrant=False), x
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing(name: str) -> None:
    once = define_once()

    def model(x: Tensor, w: Tensor) -> object:
        return CHECKPOINTED[name](once, x, w)

    check(model)
    graphs: list[GraphModule] = []
    torch.compiler.reset()
    compiled = torch.compile(model, backend=compiled_by(graphs), fullgraph=True)
    torch.manual_seed(0)
    want = plainly(trained(model), *leaves())
    torch.manual_seed(0)
    same(trained(compiled)(*leaves()), want)
    assert nodes(graphs[1], once) == 1
    assert operators(graphs[1]).count("mm") >= 5  # four of backward's own, and the forward's again


def test_torch_compile() -> None:
    once = define_once()
    graphs: list[GraphModule] = []

    def model(x: Tensor, w: Tensor) -> Tensor:
        return once(lambda y: dropout(y @ w).sin(), x)

    torch.compiler.reset()
    compiled = torch.compile(model, backend=compiled_by(graphs), fullgraph=True)
    torch.manual_seed(0)
    want = plainly(trained(model), *leaves())
    torch.manual_seed(0)
    same(trained(compiled)(*leaves()), want)
    assert [nodes(graph, once) for graph in graphs] == [1, 1]
    assert operators(graphs[1]).count("mm") == 2


# -- the graphs afterwards -------------------------------------------------------------------------------------------

AGAIN: dict[str, Callable[[GraphModule, Sequence[Tensor]], Function]] = {
    "copied": lambda graph, _: copy.deepcopy(graph),
    "pickled": lambda graph, _: pickle.loads(pickle.dumps(graph)),
    "recorded": lambda graph, inputs: record(graph, *inputs),
    "recorded on stand-ins": lambda graph, inputs: record(graph, *inputs, mode="fake"),
    "recorded with symbols": lambda graph, inputs: record(graph, *inputs, mode="symbolic"),
    "functionalized": lambda graph, inputs: record(torch.func.functionalize(graph), *inputs),
    "compiled again": lambda graph, inputs: ahead(graph)[0],
    "under vmap": lambda graph, inputs: (
        lambda *args: [t[0] for t in torch.vmap(graph)(*(torch.stack([a, a]) for a in args))]
    ),
}


@pytest.mark.parametrize("name", AGAIN)
def test_the_nodes_are_recorded_again(name: str) -> None:
    twice = define_twice()
    forward, backward = check(lambda x, w: twice(lambda y: (y @ w).sin(), x))
    results = cast("Sequence[Tensor]", forward(X, W))
    for graph, inputs in ((forward, [X, W]), (backward, [*results[1:], W])):
        found = AGAIN[name](graph, inputs)
        same(list(cast("Sequence[Tensor]", found(*inputs))), list(graph(*inputs)))
        if isinstance(found, GraphModule):
            assert nodes(found, twice) == 1


def test_a_forward_node_is_differentiated_as_the_graph_that_it_holds() -> None:
    once = define_once()
    forward, _ = check(lambda x, w: once(lambda y: (y @ w).sin(), x))
    step = trained(lambda x, w: cast("Sequence[Tensor]", forward(x, w))[0])
    want = trained(lambda x, w: (x @ w).sin())(*leaves())
    same(step(*leaves()), want)
    same(record(step, *leaves())(*leaves()), want)


def test_a_node_vanishes_with_its_op() -> None:
    once = define_once()
    forward, backward = check(lambda x, w: once(lambda y: (y @ w).sin(), x))
    for graph, inputs in ((forward, [X, W]), (backward, [*cast("Sequence[Tensor]", forward(X, W))[1:], W])):
        with hopkit.decompose(once):
            assert not nodes(record(graph, *inputs), once)


def test_an_op_within_an_op_is_called_on_what_is_closed_over() -> None:
    once = define_once()

    def run(x: Tensor) -> Tensor:
        return once(lambda y: once(lambda z: z.sin() * y, x), x)

    x = torch.linspace(-1.0, 1.0, 6).requires_grad_()
    found = torch.autograd.grad(aot_function(run, lambda graph, _: make_boxed_func(graph.forward))(x).sum(), x)
    same(found, plainly(lambda: torch.autograd.grad(run(x).sum(), x)))
