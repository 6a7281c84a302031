"""``checkpoint``: nothing inside is kept, eager and compiled, and backward draws the same numbers again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hopkit_controlflow
import pytest
import torch
from functorch.compile import (  # type: ignore[import-untyped] # torch's own
    aot_module_simplified,
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint as torchs

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's, of its own code

checkpoint: Any = hopkit_controlflow.checkpoint
grad: Any = torch.func.grad

X = torch.linspace(-1, 1, 16).reshape(4, 4)
W = torch.linspace(-0.5, 0.5, 16).reshape(4, 4).requires_grad_()

Function = Callable[..., Any]


def layer(x: Tensor, *, random: bool = False) -> Tensor:
    for _ in range(3):
        x = torch.tanh(x @ W)
    return torch.nn.functional.dropout(x) if random else x


def noisy(x: Tensor) -> Tensor:
    return layer(x, random=True)


def ours(x: Tensor, function: Function = layer) -> Any:
    return checkpoint(function, x)


def theirs(x: Tensor, function: Function = layer) -> Any:
    return torchs(function, x, use_reentrant=False)


def twice(function: Function) -> Function:
    return lambda x: function(function(x))


def seeded(function: Function, x: Tensor = X) -> tuple[Tensor, ...]:
    """The result and its derivatives."""
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    result = function(x)
    torch.rand(3)  # whatever is drawn in between
    return result.detach(), *torch.autograd.grad(result.square().sum(), (x, W))


def kept(function: Function) -> int:
    """How many tensors autograd keeps."""
    found = set[int]()

    def pack(tensor: Tensor) -> Tensor:
        found.add(tensor.untyped_storage().data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function(X.clone().requires_grad_())
    return len(found)


def test_in_eager_nothing_inside_is_kept() -> None:
    assert kept(ours) == kept(theirs) < kept(layer)


def graphs(function: Function) -> list[tuple[int, int]]:
    """Per graph, forward and backward: how many products it has, and how much it gives."""
    found = []

    def keep(graph: GraphModule, _: object) -> object:
        code = "".join(m.code for m in graph.modules() if isinstance(m, GraphModule))
        (output,) = graph.graph.find_nodes(op="output")
        found.append((code.count("mm.default"), len(output.args[0])))
        return make_boxed_func(graph.forward)

    def backend(graph: GraphModule, examples: object) -> object:
        return aot_module_simplified(
            graph, examples, fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
        )

    compiled: Any = torch.compile(function, backend=backend, fullgraph=True)
    seeded(compiled)
    return found


def test_in_a_graph_it_is_computed_again() -> None:
    (_, plain), (products, _) = graphs(layer)
    (_, few), (more, _) = graphs(ours)
    assert few < plain
    assert more == products + 3


def test_two_in_a_row_keep_what_is_between_them() -> None:
    (_, one), _ = graphs(ours)
    (_, two), _ = graphs(twice(ours))
    assert two == one + 1


@pytest.mark.parametrize("function", [noisy, twice(noisy)])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_the_same_is_drawn_again(function: Function, backend: str) -> None:
    def run(x: Tensor) -> Any:
        return checkpoint(function, x)

    options: Any = {"fallback_random": True} if backend == "inductor" else None
    compiled: Any = torch.compile(run, backend=backend, fullgraph=True, options=options)
    want = seeded(function)
    for found in (seeded(run), seeded(compiled)):
        torch.testing.assert_close(found, want)


def test_a_recorded_derivative_is_that_of_what_was_drawn() -> None:
    def step(x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        result = checkpoint(torch.nn.functional.dropout, x)
        return result.detach(), *torch.autograd.grad(result.sum(), x)

    result, gradient = make_fx(step)(X)(X + 3)
    assert torch.equal(result, (X + 3) * gradient)


def test_inside_transforms() -> None:
    want = torch.func.jacrev(layer)(X)
    torch.testing.assert_close(torch.func.jacrev(ours)(X), want)
    torch.testing.assert_close(torch.func.jacfwd(ours)(X), want)
    torch.testing.assert_close(
        torch.func.hessian(lambda x: ours(x).sum())(X), torch.func.hessian(lambda x: layer(x).sum())(X)
    )


def test_inside_functionalize_it_is_an_ordinary_call() -> None:
    x = X.clone().requires_grad_()
    result = torch.func.functionalize(lambda x: checkpoint(layer, x), remove="mutations_and_views")(x)
    torch.testing.assert_close(torch.autograd.grad(result.sum(), x), torch.autograd.grad(layer(x).sum(), x))


def test_in_an_op_that_is_recorded_inside_a_transform() -> None:
    region: Any = hopkit_controlflow.region

    def again(x: Tensor) -> Any:
        return region(lambda y: checkpoint(layer, y), (x,))

    def slope(function: Function) -> Any:
        return grad(lambda x: function(x).sum())

    recorded = make_fx(slope(again))(X)
    torch.testing.assert_close(recorded(X + 1), slope(layer)(X + 1))


@pytest.mark.parametrize("option", [{"use_reentrant": True}, {"preserve_rng_state": False}])
def test_what_torch_has_besides_is_refused(option: dict[str, bool]) -> None:
    with pytest.raises(TypeError, match=next(iter(option))):
        checkpoint(layer, X, **option)
