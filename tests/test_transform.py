"""The node's meaning: the body with its graphs, and what vjp makes of it."""

from __future__ import annotations

import pickle
from typing import cast

import pytest
import torch
from torch import Tensor

import hopkit
from hopkit import HopkitWarning, Subgraph, layout, transform
from hopkit.errors import LayoutError, SignatureError
from tests.recording import define_twice, record, same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 9).reshape(3, 3)
W = torch.linspace(0.5, 1.5, 9).reshape(3, 3)


def flat_twice() -> transform.Flat:
    """``twice(y * w, x)`` as a function of the node's inputs, ``(x, w)``."""
    twice = define_twice()
    graph = record(lambda x, w: twice(lambda y: y * w, x), X, W)
    (node,) = (node for node in graph.graph.nodes if node.target is twice.operator)
    known = layout.loads(node.kwargs[layout.KEYWORD])
    return transform.flat(twice.spec, known, [graph.get_submodule("t_twice_body")], {"scale": 1.0})


def test_the_flat_form_is_the_body() -> None:
    same(flat_twice()((W, X)), (W * X * X,))


def test_a_vjp_gives_the_gradients_that_it_is_asked_for() -> None:
    run = flat_twice()
    same(transform.vjp(run, (0,), (0,))((X, W, torch.ones(3, 3))), (W * W,))
    same(transform.vjp(run, (1, 0), (0,))((X, W, X)), (2 * W * X * X, W * W * X))


def test_a_vjp_of_what_nothing_depends_on_is_zero() -> None:
    pull = transform.vjp(lambda inputs: (torch.zeros(2),), (0,), (0,))
    same(pull((X, torch.ones(2))), (torch.zeros(3, 3),))


def test_a_vjp_is_differentiated_again() -> None:
    x = X.clone().requires_grad_()
    (slope,) = transform.vjp(lambda inputs: (inputs[0].sin(),), (0,), (0,))((x, torch.ones(3, 3)))  # type: ignore[attr-defined] # a tensor
    assert isinstance(slope, Tensor)
    same(torch.autograd.grad(slope.sum(), x), (-X.sin(),))


def test_a_vjp_has_no_history_where_none_is_asked_for() -> None:
    x = X.clone().requires_grad_()
    with torch.no_grad():
        (slope,) = transform.vjp(lambda inputs: (inputs[0].sin(),), (0,), (0,))((x, torch.ones(3, 3)))  # type: ignore[attr-defined] # a tensor
    assert isinstance(slope, Tensor)
    assert not slope.requires_grad


def test_a_vjp_of_inference_tensors() -> None:
    with torch.inference_mode():
        x = X.clone()
        (slope,) = transform.vjp(flat_twice(), (0,), (0,))((x, W, torch.ones(3, 3)))
    same(slope, W * W)


def test_a_vjp_of_a_vjp_in_inference_mode() -> None:
    pull = transform.vjp(lambda inputs: (cast("Tensor", inputs[0]).sin(),), (0,), (0,))
    with torch.inference_mode():
        (slope,) = transform.vjp(pull, (0,), (0,))((X, X + 1, torch.ones(3, 3)))
    same(slope, -X.sin() * (X + 1))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own decompositions
def test_a_vjp_under_transforms() -> None:
    pull = transform.vjp(flat_twice(), (0,), (0,))

    def slope(w: Tensor) -> object:
        return pull((X, w, torch.ones(3, 3)))[0]

    same(torch.vmap(slope)(torch.stack([W, X])), torch.stack([W * W, X * X]))
    same(torch.func.jvp(slope, (W,), (X,)), (W * W, 2 * W * X))


def test_a_subgraph_is_chosen_by_what_it_is_called_with() -> None:
    @hopkit.define("t_shapes")
    def shapes(body: Subgraph, x: Tensor, *, rows: int) -> Tensor:
        return body(x).sum() + body(x[:rows]).sum()

    graph = record(lambda x: shapes(torch.sin, x, rows=2), X)
    (node,) = (node for node in graph.graph.nodes if node.target is shapes.operator)
    same(graph(W), W.sin().sum() + W[:2].sin().sum())
    node.kwargs = {**node.kwargs, "rows": 1}
    graph.recompile()
    with pytest.raises(SignatureError, match=r"float32\[3, 3\]@cpu\); \(float32\[2, 3\].*with \(float32\[1, 3\]"):
        graph(W)


def test_a_node_of_an_op_that_has_changed_is_refused() -> None:
    @hopkit.define("t_changes")
    def before(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    graph = record(lambda x: before(torch.sin, x), X)

    @hopkit.define("t_changes", replace=True)
    def after(body: Subgraph, value: Tensor) -> Tensor:
        return body(value)

    changed = pickle.loads(pickle.dumps(graph))  # a graph holds the operator; the text of its code names it
    with (
        pytest.warns(HopkitWarning, match="was recorded with another body"),
        pytest.raises(LayoutError, match=r"recorded with the parameters body, x, and the op now takes \(body: Subgr"),
    ):
        changed(X)


def test_a_graph_with_a_node_under_torch_compile() -> None:
    @hopkit.define("t_compiled")
    def twice(body: Subgraph, x: Tensor) -> Tensor:
        return body(body(x))

    graph = record(lambda x: twice(lambda y: y.sin() * 2, x), X)
    same(torch.compile(graph, backend="eager")(W), twice.spec.body(lambda y: y.sin() * 2, W))
