"""Names: defining, replacing and undefining, in torch's registry, its attributes and Dynamo's table."""

from __future__ import annotations

import pickle
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hopkit
from hopkit import CallError, DuplicateOpError, SpecError
from hopkit.kit import fresh
from tests.fresh import python


@pytest.fixture(autouse=True)
def host() -> Iterator[None]:
    with fresh():
        yield


Apply = hopkit.Op[[hopkit.Subgraph, Tensor], Tensor]


def define(name: str, *, replace: bool = False, plus: float = 0) -> Apply:
    @hopkit.define(name, replace=replace)
    def apply(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        return body(x) + plus

    return apply


def registered() -> list[str]:
    return dir(torch.ops.higher_order)


def test_an_op_is_an_operator_of_torch_under_its_name() -> None:
    op = define("t_name")
    assert torch.ops.higher_order.t_name is op.operator
    assert hopkit.ops()["t_name"] is op


def test_an_undefined_op_is_gone_everywhere() -> None:
    op = define("t_name")
    assert torch.ops.higher_order.t_name is op.operator
    hopkit.undefine(op)
    assert not hasattr(torch.ops.higher_order, "t_name")
    assert "t_name" not in list(torch.ops.higher_order)
    assert not hopkit.ops()


@pytest.mark.parametrize("name", ["", "my-op", "a.b", "a::b", "2nd", "lambda", "größe", "with space"])
def test_a_name_that_is_no_identifier_is_refused(name: str) -> None:
    before = registered()
    with pytest.raises(SpecError, match="has a name that is no identifier"):
        define(name)
    assert registered() == before


def test_a_name_that_is_taken_is_refused_with_the_way_out() -> None:
    op = define("t_name")
    with pytest.raises(
        DuplicateOpError, match=r"'t_name' cannot be defined: an op of hopkit has this name.*`replace=True`"
    ):
        define("t_name")
    assert torch.ops.higher_order.t_name is op.operator


@pytest.mark.parametrize("name", ["cond", "run_const_graph"])
def test_the_name_of_an_op_of_torch_is_refused_with_the_way_out(name: str) -> None:
    before = getattr(torch.ops.higher_order, name)
    with pytest.raises(DuplicateOpError, match=r"an op of torch has this name.*`replace=True`"):
        define(name)
    assert getattr(torch.ops.higher_order, name) is before


def test_a_cell_of_a_notebook_runs_twice() -> None:
    for plus in (1, 2, 3):
        op = define("t_cell", replace=True, plus=plus)
        assert op(torch.sin, torch.zeros(1)).item() == plus
        assert torch.ops.higher_order.t_cell is op.operator


def test_undefining_gives_the_name_back_step_by_step() -> None:
    first = define("t_name", plus=1)
    second = define("t_name", replace=True, plus=2)
    third = define("t_name", replace=True, plus=3)
    for op, before in ((third, second), (second, first)):
        hopkit.undefine(op)
        assert torch.ops.higher_order.t_name is before.operator
        assert hopkit.ops()["t_name"] is before
        assert before(torch.sin, torch.zeros(1)).item() == (2 if before is second else 1)


def test_an_op_that_was_replaced_cannot_be_undefined_first() -> None:
    first = define("t_name")
    second = define("t_name", replace=True)
    with pytest.raises(SpecError, match=r"another op took its name since.*Undefine the newer op first"):
        hopkit.undefine(first)
    assert torch.ops.higher_order.t_name is second.operator


def test_undefining_twice_is_an_error() -> None:
    op = define("t_name")
    hopkit.undefine(op)
    with pytest.raises(SpecError, match="is not defined"):
        hopkit.undefine(op)


def test_a_body_that_cannot_be_an_op_leaves_no_trace() -> None:
    before = registered()
    with pytest.raises(SpecError):

        @hopkit.define("t_name")
        def apply(x: Tensor) -> Tensor:
            return x

    assert registered() == before
    assert not hopkit.ops()


def test_the_attribute_of_torch_s_own_op_follows_although_torch_keeps_it() -> None:
    theirs = torch.ops.higher_order.cond
    op = define("cond", replace=True)
    assert torch.ops.higher_order.cond is op.operator
    hopkit.undefine(op)
    assert torch.ops.higher_order.cond is theirs


# Dynamo's table goes by name. A process each: what was imported when is the point.

COND = """
import sys, torch, hopkit

def cond():
    torch._dynamo.reset()
    x = torch.zeros(2)
    return torch.cond(x.sum() == 0, lambda x: x + 1, lambda x: x - 1, (x,)).tolist()

def define():
    @hopkit.define("cond", replace=True)
    def mine(body: hopkit.Subgraph, x: torch.Tensor) -> torch.Tensor:
        return body(x)
    return mine

def table():
    return sys.modules["torch._dynamo.variables.higher_order_ops"]._hop_name_to_variable_class

def reads_it_as_torch_s():
    entry = table().get("cond")
    return entry is not None and entry.__module__ == "torch._dynamo.variables.higher_order_ops"
"""


def _run(program: str) -> None:
    text = COND + textwrap.dedent(program)
    done = python("-c", text, check=False)
    assert done.returncode == 0, done.stderr


def test_dynamo_imported_before() -> None:
    _run(
        """
        assert cond() == [1, 1]
        theirs = table()["cond"]
        op = define()
        assert not reads_it_as_torch_s()
        hopkit.undefine(op)
        assert table()["cond"] is theirs
        assert cond() == [1, 1]
        """
    )


def test_dynamo_imported_while_the_name_is_taken() -> None:
    _run(
        """
        op = define()
        import torch._dynamo
        import torch._dynamo.variables
        assert not reads_it_as_torch_s()
        assert "while_loop" in table()
        hopkit.undefine(op)
        assert reads_it_as_torch_s()
        assert cond() == [1, 1]
        """
    )


def test_dynamo_imported_after_the_name_was_given_back() -> None:
    _run(
        """
        hopkit.undefine(define())
        assert cond() == [1, 1]
        """
    )


def test_a_name_taken_twice_comes_back_whole() -> None:
    _run(
        """
        first, second = define(), define()
        import torch._dynamo.variables
        hopkit.undefine(second)
        assert not reads_it_as_torch_s()
        hopkit.undefine(first)
        assert cond() == [1, 1]
        """
    )


# What is declared of an op


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"mutates": ("y",)}, r"`mutates=\('y',\)`: 'y' is no operand"),
        ({"aliases": "body"}, r"`aliases=\('body',\)`: 'body' is no operand"),
        ({"autograd": "maybe"}, "there is no such policy"),
        ({"outputs": lambda x: x}, "`outputs=`: it does not take the body's arguments"),
        ({"outputs": lambda x, body: x}, r"it calls its parameters \['x', 'body'\]"),
        ({"inputs": lambda: ()}, "`inputs=`: it does not take the body's arguments"),
    ],
)
def test_a_declaration_that_fits_nothing_is_refused(declared: dict[str, object], says: str) -> None:
    before = registered()
    with pytest.raises(SpecError, match=says):

        @hopkit.define("t_declared", **declared)  # type: ignore[call-overload, untyped-decorator] # the mistake
        def declared_wrongly(body: hopkit.Subgraph, x: Tensor) -> Tensor:
            return body(x)

    assert registered() == before


def test_one_name_may_be_declared_without_a_tuple() -> None:
    @hopkit.define("t_writes", mutates="x")
    def writes(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        return body(x.add_(1))

    assert writes.spec.mutates == ("x",)


def test_a_decorator_without_a_name_is_refused() -> None:
    with pytest.raises(SpecError, match=r"without a name.*@hopkit.define\(\"mypackage_myop\"\)"):

        @hopkit.define  # type: ignore[call-overload] # the mistake
        def nameless(body: hopkit.Subgraph, x: Tensor) -> Tensor:
            return body(x)


@pytest.mark.parametrize("given", [3, None, ["t_name"]])
def test_a_name_is_text(given: object) -> None:
    with pytest.raises(
        CallError, match=r"hopkit.define\(\) expected a name or an OpSpec, got .*\(\"mypackage_myop\"\)"
    ):
        hopkit.define(given)  # type: ignore[call-overload] # the mistake


@pytest.mark.parametrize("given", ["t_name", 3, torch.sin])
def test_only_an_op_can_be_undefined(given: Any) -> None:
    op = define("t_name")
    with pytest.raises(CallError, match=r"hopkit.undefine\(\) expected an op, got .*`hopkit.ops\(\)\["):
        hopkit.undefine(given)
    assert hopkit.ops()["t_name"] is op


@pytest.mark.parametrize("given", ["t_name", 3, torch.sin])
def test_only_ops_can_vanish(given: Any) -> None:
    op = define("t_name")
    with (
        pytest.raises(CallError, match=r"hopkit.decompose\(\) expected an op, got .*`hopkit.ops\(\)\["),
        hopkit.decompose(op, given),
    ):
        pass


def test_an_error_can_be_sent_to_another_process() -> None:
    with pytest.raises(SpecError) as raised:
        define("no name")
    again = pickle.loads(pickle.dumps(raised.value))
    assert type(again) is SpecError
    assert str(again) == str(raised.value)
