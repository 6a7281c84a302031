"""``fixed_point``: a step repeated until nothing changes, differentiated by the equation it solves."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

import hopkit
from hopkit.extend.body import chosen, pull
from hopkit.extend.implicit import Values, derive
from hopkit_controlflow.linear_solve import linear_solve
from hopkit_controlflow.vectors import Status, checked, fitting, ravel, unknown, unravel

NAME = "controlflow_fixed_point"

T = TypeVar("T")


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check controlflow_fixed_point`` makes."""
    weight = torch.tensor([[0.2, 0.1], [-0.1, 0.3]], dtype=torch.float64).requires_grad_()
    x = torch.linspace(0.5, 1, 2, dtype=torch.float64)
    exact = {"tolerance": 1e-13, "iterations": 100}
    return [
        hopkit.Sample((lambda y: torch.tanh(weight @ y + x), 0 * x), exact, name="capture"),
        hopkit.Sample(
            (lambda t: {"a": t["b"][0].cos() / 2, "b": (t["a"] / 3 + weight.sum(),)}, {"a": x, "b": (x + 1,)}),
            exact,
            name="tree",
        ),
    ]


def _outputs(step: hopkit.Subgraph[T], init: T, **options: object) -> tuple[T, Status]:
    tensors, fill = unknown(f"op '{NAME}' argument 'init'", init)
    fitting(NAME, "step", step(init), init)
    one = tensors[0].new_empty(())
    return fill([t.new_empty(t.shape) for t in tensors]), Status(one.to(torch.bool), one.to(torch.int64))


@hopkit.define(NAME, inputs=lambda step, init, **options: ((init,),), outputs=_outputs, samples=samples)
def fixed_point(
    step: hopkit.Subgraph[T],
    init: T,
    *,
    tolerance: float = 1e-5,
    iterations: int = 100,
    must_converge: bool = False,
) -> tuple[T, Status]:
    """``x`` with ``step(x) == x``, by ``x = step(x)`` from ``init`` on; and how that ended.

    Derivatives, by what ``step`` closes over, are those of the solution, whatever way led there: they solve a linear
    system (`linear_solve`), and nothing of the iterations is kept. By ``init`` they are zero. As
    ``jax.lax.custom_root``, of ``step(x) - x``.

    Args:
        step: Gives a pytree as it takes.
        init: Where to begin: a pytree of floating-point tensors of one dtype.
        tolerance: How much the last step may change, relative to ``1 + |x|``.
        iterations: At most so many steps.
        must_converge: Raise where there is no solution. Derivatives do, if their own system has none.

    Returns:
        ``x``, and a `Status` of two tensors: whether the last step changed little enough, and how many steps there
        were. If it did not, ``x`` is the last that was finite.

    Raises:
        hopkit.CallError: ``init`` is no vector.
        hopkit.SubgraphError: ``step`` changes structure, shape or dtype.
    """
    unknown(f"op '{NAME}' argument 'init'", init)
    x = ravel(init)
    count, moved = x.new_zeros((), dtype=torch.int64), x.new_full((), torch.inf)
    going, small = moved > 0, moved < 0
    for _ in range(iterations):
        following = ravel(fitting(NAME, "step", step(unravel(x, init)), init))
        with torch.no_grad():
            change, length = (following - x).norm(), following.norm()
        going = going & change.isfinite()
        x, count = chosen(going, (following, count + 1), (x, count))
        small = small | (going & (change <= tolerance * (1 + length)))
        going = going & ~small
        if not hopkit.anywhere(going):
            break
    status = checked(f"op '{NAME}'", Status(small, count), must=must_converge)
    return unravel(x, init), status


class _Equation:
    """``step(x) - x = 0``."""

    like = "init"

    def residual(self, values: Values, x: Any) -> Any:
        return unravel(ravel(values["step"](x)) - ravel(x), x)

    def solve(self, values: Values, x: Any, right: Any, *, transposed: bool) -> Any:
        step = values["step"]

        def back(vector: Any) -> Any:
            return unravel(ravel(vector) - ravel(pull(step, x, vector)), x)

        matvec = back if transposed else lambda vector: pull(back, vector, vector)
        return linear_solve(matvec, right, tolerance=values["tolerance"], must_converge=True)[0]


derive(fixed_point, _Equation())
