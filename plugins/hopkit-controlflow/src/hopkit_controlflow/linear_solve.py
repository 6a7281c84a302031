"""``linear_solve``: the solution of a linear system whose matrix is a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

import hopkit
from hopkit.extend.body import chosen, pull
from hopkit.extend.implicit import Values, derive
from hopkit_controlflow.vectors import Status, checked, fitting, ravel, unknown, unravel

NAME = "controlflow_linear_solve"

T = TypeVar("T")
Map = Callable[[torch.Tensor], torch.Tensor]


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check controlflow_linear_solve`` makes."""
    matrix = torch.tensor([[2.0, 0.5, 0.0], [-0.3, 1.5, 0.2], [0.1, 0.4, 1.0]], dtype=torch.float64).requires_grad_()
    b = torch.linspace(-1, 1, 3, dtype=torch.float64)
    exact = {"tolerance": 1e-12}
    symmetric = {"symmetric": True, **exact}
    return [
        hopkit.Sample((lambda x: matrix @ x, b), exact, name="gmres"),
        hopkit.Sample((lambda x: matrix.t() @ (matrix @ x), b), symmetric, name="cg"),
        hopkit.Sample((lambda x: matrix @ x, b, lambda b: torch.linalg.solve_ex(matrix, b)[0]), exact, name="solve"),
        hopkit.Sample(
            (lambda t: {"a": 2 * t["a"] + t["b"][0], "b": (t["b"][0] - t["a"],)}, {"a": b, "b": (b + 1,)}),
            exact,
            name="tree",
        ),
    ]


def _inputs(matvec: object, b: object, *solvers: object, **options: object) -> tuple[object, ...]:
    unknown(f"op '{NAME}' argument 'b'", b)
    return ((b,),) * (1 + len(solvers))


def _outputs(matvec: hopkit.Subgraph[T], b: T, *solvers: hopkit.Subgraph[T], **options: object) -> tuple[T, Status]:
    tensors, fill = unknown(f"op '{NAME}' argument 'b'", b)
    fitting(NAME, "matvec", matvec(b), b)
    for solver in solvers:
        fitting(NAME, "solve", solver(b), b)
    one = tensors[0].new_empty(())
    return fill([t.new_empty(t.shape) for t in tensors]), Status(one.to(torch.bool), one.to(torch.int64))


@hopkit.define(NAME, inputs=_inputs, outputs=_outputs, samples=samples)
def linear_solve(
    matvec: hopkit.Subgraph[T],
    b: T,
    *solvers: hopkit.Subgraph[T],
    symmetric: bool = False,
    tolerance: float = 1e-5,
    iterations: int | None = None,
    must_converge: bool = False,
) -> tuple[T, Status]:
    """``x`` with ``matvec(x) == b``, and how the solver ended.

    As ``jax.lax.custom_linear_solve``: derivatives, by ``b`` and by what ``matvec`` closes over, are solutions of
    linear systems with the same matrix or its transpose, whatever the solver does.

    Args:
        matvec: Linear. Gives a pytree as ``b``.
        b: A pytree of floating-point tensors of one dtype.
        solvers: ``solve``, or ``solve`` and ``transpose_solve``. ``solve(b)`` gives ``x``, and ``transpose_solve`` does
            it for the transposed matrix (of complex numbers, also conjugated). What is not given is iterated.
        symmetric: The matrix is its own transpose. Without ``solve`` it is positive definite too, and conjugate
            gradients solve it; others are solved by the smallest residual in all directions so far (GMRES), which are
            kept.
        tolerance: How large the residual may be, relative to ``b``.
        iterations: At most so many. None: as many as there are unknowns, and ten times as many if ``symmetric``.
        must_converge: Raise where there is no solution. Derivatives do.

    Returns:
        ``x``, and a `Status` of two tensors: whether the residual is small enough, and how many iterations it took.
        If it is not, ``x`` is what there is, and may hold anything.

    Raises:
        hopkit.CallError: ``b`` is no vector.
        hopkit.SubgraphError: The matrix is not square, or a solver gives something unlike ``b``.
    """
    unknown(f"op '{NAME}' argument 'b'", b)
    right = ravel(b)

    def apply(x: torch.Tensor) -> torch.Tensor:
        return ravel(fitting(NAME, "matvec", matvec(unravel(x, b)), b))

    count = right.new_zeros((), dtype=torch.int64)
    if solvers:
        x = ravel(fitting(NAME, "solve", solvers[0](b), b)).clone()
    else:
        most = iterations if iterations is not None else right.numel() * (10 if symmetric else 1)
        x, count = (_conjugate_gradients if symmetric else _smallest_residual)(apply, right, tolerance / 2, most)
    with torch.no_grad():
        converged = _square(right - apply(x)) <= tolerance**2 * _square(right)
    status = checked(f"op '{NAME}'", Status(converged, count), must=must_converge)
    return unravel(x, b), status


def _square(x: torch.Tensor) -> torch.Tensor:
    return (x.conj() * x).real.sum()


def _conjugate_gradients(apply: Map, b: torch.Tensor, tolerance: float, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    limit = tolerance**2 * _square(b).detach()
    x, residual, direction, count = torch.zeros_like(b), b, b, b.new_zeros((), dtype=torch.int64)
    for _ in range(most):
        image = apply(direction)
        before, curvature = _square(residual), (direction.conj() * image).real.sum()
        going = (before > limit) & (curvature > 0)
        if not hopkit.anywhere(going):
            break
        before, curvature = torch.where(going, before, 1), torch.where(going, curvature, 1)
        left = residual - before / curvature * image
        moved = x + before / curvature * direction, left, left + _square(left) / before * direction, count + 1
        x, residual, direction, count = chosen(going, moved, (x, residual, direction, count))
    return x, count


def _smallest_residual(apply: Map, b: torch.Tensor, tolerance: float, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every direction is the image of the one before; the images are made orthogonal."""
    limit = tolerance**2 * _square(b).detach()
    x, residual, direction, count = torch.zeros_like(b), b, b, b.new_zeros((), dtype=torch.int64)
    known: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(most):
        image = apply(direction)
        for other, its_image in known:
            along = (its_image.conj() * image).sum()
            direction, image = direction - along * other, image - along * its_image
        length = _square(image)
        going = (_square(residual) > limit) & (length > 0)
        if not hopkit.anywhere(going):
            break
        length = torch.where(going, length, 1).sqrt()
        direction, image = direction / length, image / length
        along = (image.conj() * residual).sum()
        moved = x + along * direction, residual - along * image, count + 1
        x, residual, count = chosen(going, moved, (x, residual, count))
        known.append((direction, image))
        direction = image
    return x, count


class _Equation:
    """``b - matvec(x) = 0``."""

    like = "b"

    def residual(self, values: Values, x: Any) -> Any:
        return unravel(ravel(values["b"]) - ravel(values["matvec"](x)), x)

    def solve(self, values: Values, x: Any, right: Any, *, transposed: bool) -> Any:
        matvec, solvers = values["matvec"], values["solvers"]
        options = {name: values[name] for name in ("symmetric", "tolerance", "iterations")}
        if transposed and not values["symmetric"]:
            straight, solvers = matvec, solvers[::-1] if len(solvers) == 2 else ()
            matvec = lambda right: pull(straight, right, right)  # noqa: E731 # a subgraph; it is linear, so anywhere
        return linear_solve(matvec, right, *solvers, **options, must_converge=True)[0]


derive(linear_solve, _Equation())
