"""Saved programs that do not fit: what is missing, stale or damaged is named, and a good program loads after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit import HopkitWarning, LayoutError, Op, Subgraph, UnknownOpError
from tests.recording import define_once, define_twice, nodes, same
from tests.saving import Package, edited, loaded, saved

pytestmark = pytest.mark.usefixtures("hopkit_fresh", "_a_good_program_loads_afterwards")

X = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)


class Apply(torch.nn.Module):
    """One call of an op, with a parameter captured."""

    def __init__(self, op: Op[..., Tensor], **options: object) -> None:
        super().__init__()
        self.op, self.options = op, options
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(lambda y: y * self.weight, x, **self.options)


def program(op: Op[..., Tensor], **options: object) -> bytes:
    return saved(torch.export.export(Apply(op, **options), (X,)))


@pytest.fixture
def _a_good_program_loads_afterwards() -> Iterator[None]:
    yield
    once = define_once() if "t_once" not in hopkit.ops() else hopkit.ops()["t_once"]
    again = loaded(program(once))  # type: ignore[arg-type] # an op of one subgraph and one operand
    assert nodes(again.graph_module, once) == 1
    same(again.module()(X), X * torch.linspace(0.5, 1.5, 3))


def test_an_op_that_is_missing_is_named_with_its_package(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        module = Package(tmp_path, patch).imported()
        text = program(module.apply, order=module.Order.DOWN)
    hopkit.undefine(module.apply)
    wanted = r"op 't_pkg_apply' of the saved program is not defined here\..*Install t-pkg==1.2, which defined the op"
    with pytest.raises(UnknownOpError, match=wanted):
        loaded(text)


def test_an_op_whose_package_is_there_is_named_with_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Package(tmp_path, monkeypatch).imported()
    text = program(module.apply)
    hopkit.undefine(module.apply)
    with pytest.raises(UnknownOpError, match=r"op 't_pkg_apply' .* Import t_pkg, which defined the op"):
        loaded(text)


def test_an_op_of_no_package_is_named_with_its_module() -> None:
    twice = define_twice()
    text = program(twice)
    hopkit.undefine(twice)
    with pytest.raises(UnknownOpError, match=r"op 't_twice' .* Import tests\.recording, which defined the op"):
        loaded(text)


def test_an_op_that_is_missing_in_a_graph_of_another_node_is_named() -> None:
    twice, once = define_twice(), define_once()

    class Nested(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = torch.cond(x.sum() > 0, lambda x: once(lambda y: twice(torch.sin, y), x), torch.cos, (x,))
            return result

    text = saved(torch.export.export(Nested(), (X,)))
    hopkit.undefine(twice)
    with pytest.raises(UnknownOpError, match="op 't_twice'"):
        loaded(text)


def test_an_op_without_a_layout_is_named() -> None:
    @hopkit.define("t_plain", autograd="deferred_error")
    def plain(graph: torch.fx.GraphModule, args: tuple[object, ...]) -> Tensor:
        result: Tensor = graph(*args)
        return result

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_fx(torch.tanh, tracing_mode="fake")(X)

        def forward(self, x: Tensor) -> Tensor:
            return plain(self.inner, (x,))

    exported = torch.export.export(Plain(), (X,), strict=False)
    (node,) = exported.graph.find_nodes(op="call_function", target=plain.operator)
    assert not node.kwargs
    text = saved(exported)
    same(loaded(text).module()(X), X.tanh())
    hopkit.undefine(plain)
    with pytest.raises(UnknownOpError, match=r"op 't_plain' .* Install the package that defines the op"):
        loaded(text)


def _define_other_parameters() -> object:
    @hopkit.define("t_twice", replace=True)
    def twice(body: Subgraph, x: Tensor, *, factor: float = 1.0) -> Tensor:
        return factor * body(body(x))

    return twice


def _define_other_kinds() -> object:
    @hopkit.define("t_twice", replace=True)
    def twice(x: Subgraph, body: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * x(x(body))

    return twice


@pytest.mark.parametrize("change", [_define_other_parameters, _define_other_kinds])
def test_an_op_whose_parameters_have_changed_is_an_error(change: Callable[[], object]) -> None:
    text = program(define_twice(), scale=2.0)
    change()
    with pytest.raises(LayoutError, match=r"op 't_twice' was recorded with the parameters body, scale, x, and the op"):
        loaded(text)


def test_an_op_whose_body_has_changed_warns_once_and_runs_as_it_is_now() -> None:
    text = program(define_twice())

    @hopkit.define("t_twice", replace=True)
    def thrice(body: Subgraph, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * body(body(body(x)))

    again = loaded(text)
    with pytest.warns(HopkitWarning, match="'t_twice' was recorded with another body") as told:
        found = [again.module()(X) for _ in range(2)]
    assert len(told) == 1
    same(found, [X * torch.linspace(0.5, 1.5, 3) ** 3] * 2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda text: text.replace('["tuple",3,', '["tuple",99,', 1), "is of layout version 99, and this hopkit reads"),
        (lambda text: "", "cannot be read"),
        (lambda text: "3", "cannot be read"),
        (lambda text: text[:-7], "cannot be read"),
        (lambda text: text[:-2] + "]", "is damaged"),
        (lambda text: text.replace('["$",0]', '["$",1]', 1), "is damaged"),
        (lambda text: text.replace('"tuple",0,1', '"tuple",1,0', 1), "is damaged"),
        (lambda text: text.replace('"float32"', '"float64"', 1), "is damaged"),
        (lambda text: text.replace('"float32"', '"nothing"', 1), "cannot be read"),
    ],
    ids=["version", "empty", "number", "cut off", "checksum", "slot", "option", "dtype", "unknown dtype"],
)
def test_a_foreign_or_damaged_layout_is_an_error(change: Callable[[str], str], match: str) -> None:
    @hopkit.define("t_summed")
    def summed(body: Subgraph, x: Tensor, *, axes: tuple[int, ...] = (0, 1)) -> Tensor:
        return body(x).permute(axes) + 1

    text = program(summed, axes=(0, 1))
    same(loaded(edited(text, lambda same: same)).module()(X), Apply(summed)(X))
    texts: list[str] = []

    def changed(old: str) -> str:
        texts.extend([old, change(old)])
        return texts[-1]

    with pytest.raises(LayoutError, match=f"op 't_summed' .*{match}"):
        loaded(edited(text, changed))
    assert texts[0] != texts[1]
