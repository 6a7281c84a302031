"""device: every kind of tensor that torch has on this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hopkit
from hopkit import Subgraph
from tests.recording import define_once, nodes, record, same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

COMPLEX = torch.complex(torch.linspace(-1.0, 1.0, 3), torch.linspace(0.5, 1.5, 3))
TENSORS = {
    "0-d": torch.tensor(2.0),
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "expanded": torch.arange(3.0).expand(4, 3),
    "integers": torch.arange(6),
    "booleans": torch.tensor([True, False]),
    "half": torch.ones(3, dtype=torch.float16),
    "complex": COMPLEX,
    "conjugated": COMPLEX.conj(),
    "negated": COMPLEX.conj().imag,
    "sparse": torch.eye(3).to_sparse(),
    "channels last": torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", TENSORS)
def test_eager_and_recorded(name: str) -> None:
    once, x = define_once(), TENSORS[name]
    graph = record(lambda x: once(lambda y: y * 2, x), x)
    assert nodes(graph, once) == 1
    for got in (once(lambda y: y * 2, x), graph(x)):
        same(got, x * 2)
        assert got.layout == x.layout
        if x.layout is torch.strided:
            assert got.stride() == (x * 2).stride()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout: torch.layout) -> None:
    once = define_once()
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    for got in once(lambda y: y * 2, nested).unbind():
        same(got, torch.full_like(got, 2.0))


def test_a_call_without_tensors() -> None:
    once = define_once()
    graph = record(lambda x: x + once(lambda: torch.ones(3) * 2), torch.zeros(3))
    assert nodes(graph, once) == 1
    same(graph(torch.ones(3)), torch.full((3,), 3.0))


def test_numbers_and_nothing_among_operands() -> None:
    @hopkit.define("t_mixed")
    def mixed(body: Subgraph, values: dict[str, Tensor | float | None]) -> Tensor:
        first, second = values["a"], values["b"]
        assert isinstance(first, Tensor)
        return body(first) * (2 if second is None else second)

    for second in (None, 3.0, 4):
        graph = record(lambda x, second=second: mixed(torch.sin, {"a": x, "b": second}), torch.ones(3))
        assert nodes(graph, mixed) == 1
        same(graph(torch.zeros(3) + 0.5), mixed.spec.body(torch.sin, {"a": torch.zeros(3) + 0.5, "b": second}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda() -> None:
    once = define_once()
    x, w = torch.ones(3, 3, device="cuda"), torch.ones(3, 3, device="cuda", requires_grad=True)
    graph = record(lambda x, w: torch.autograd.grad(once(lambda y: y @ w, x).sum(), w), x, w)
    assert nodes(graph, once) == 2
    same(graph(x, w), (torch.full((3, 3), 3.0, device="cuda"),))
