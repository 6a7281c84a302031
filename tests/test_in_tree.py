"""Control flow of the plugin's, against torch's own: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hopkit_controlflow
import pytest
import torch
from hopkit_controlflow import associative_scan, scan
from torch import Tensor
from torch.testing import assert_close

from hopkit._torch.namespace import in_tree

XS = torch.linspace(-1, 1, 12).reshape(4, 3)
H = torch.linspace(0.1, 0.5, 3)

Function = Callable[..., Any]


def slopes(run: Function, *args: Tensor) -> object:
    args = tuple(t.detach().clone().requires_grad_() for t in args)
    result = run(*args)
    return result, torch.autograd.grad(result[1].cos().sum() + result[0].sum(), args)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("reverse", [False, True])
def test_directions(dim: int, reverse: bool) -> None:
    xs = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    init = xs.select(dim, 0) * 0 + 0.5

    def step(c: Tensor, x: Tensor) -> Any:
        return c * 0.5 + x, (c * x, c.sum())

    want = in_tree("scan")(step, init, xs, dim=dim, reverse=reverse)
    assert_close(scan(step, init, xs, dim=dim, reverse=reverse), want)
    want = in_tree("associative_scan")(torch.add, xs, dim, reverse=reverse, combine_mode="generic")
    assert_close(associative_scan(torch.add, xs, dim, reverse=reverse), want)


def test_gradients_along_a_scan() -> None:
    torch.compiler.reset()

    def along(op: Function) -> Function:
        return lambda h, xs: op(lambda c, x: (c * x + h, (c + x).sin()), h, xs)

    assert_close(slopes(along(scan), H, XS), slopes(along(in_tree("scan")), H, XS))


def test_gradients_of_a_map() -> None:
    torch.compiler.reset()

    def over(op: Function) -> Function:
        return lambda h, xs: op(lambda x, h: ((x * h).sin(), x + h), xs, h)

    assert_close(slopes(over(hopkit_controlflow.map), H, XS), slopes(over(in_tree("map")), H, XS))
