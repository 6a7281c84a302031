"""Derivatives that a run gives, next to the body's: by operands and captures, in reverse and in forward mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from hopkit._torch import trees
from hopkit.testing.case import Case, NotApplicable, Outcome, Run
from hopkit.testing.compare import Pair
from hopkit.testing.tensors import Tensors, detached, differentiable, floats_in, tensors_in
from hopkit.testing.values import requires_grad, seeded, values

Change = Callable[[torch.Tensor], torch.Tensor]


def outcome(case: Case, run: Run, plain: Change = lambda tensor: tensor) -> Outcome:
    """What a column compares that changes nothing: values, and gradients where there are any.

    Args:
        case: The op and the sample.
        run: A function of the sample's tensors.
        plain: What makes a plain tensor of a gradient.
    """
    pairs = values(case, run)
    with contextlib.suppress(NotApplicable):
        pairs += derivatives(case, run, plain=plain)
    return Outcome(pairs)


def outcome_of_class(case: Case, run: Run, wrap: Change, unwrap: Change) -> Outcome:
    """As `outcome`, on tensors of a class: what goes in is wrapped, and what comes out is unwrapped.

    Args:
        case: The op and the sample.
        run: A function of the sample's tensors.
        wrap: Makes a tensor of the class, that holds a plain one.
        unwrap: Gives the plain tensor again, or a tensor that is plain as it is.
    """

    into, out_of = _step(wrap, unwrap), _step(unwrap, wrap)

    def inside(*tensors: torch.Tensor) -> object:
        return trees.map_only(torch.Tensor, out_of, run(*map(into, tensors)))

    return outcome(case, inside, unwrap)


def _step(there: Change, back: Change) -> Change:
    """``there``, whose derivative is ``back``."""

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(_: object, tensor: torch.Tensor) -> torch.Tensor:
            return there(tensor)

        @staticmethod
        def backward(_: object, gradient: torch.Tensor) -> torch.Tensor:
            return back(gradient)

    return Step.apply


def derivatives(case: Case, run: Run, *, second: bool = False, plain: Change = lambda tensor: tensor) -> list[Pair]:
    """Values, and first (or second) derivatives by the operands and by whatever else the result depends on."""
    if not case.derives:
        raise NotApplicable(f'autograd="{case.op.spec.autograd}": it has no derivative')
    inputs, expected_inputs = case.leaves(), case.leaves()
    expected = seeded(case.on(case.body), expected_inputs)
    captures = _captures(expected, expected_inputs)
    if not any(t.requires_grad for t in [*expected_inputs, *captures]):
        raise NotApplicable("nothing in this sample has a gradient")
    got = seeded(run, inputs)
    backward = _second_derivatives if second else first_derivatives
    return [
        Pair("the value", detached(got), detached(expected)),
        Pair("requires_grad", requires_grad(got), requires_grad(expected)),
        Pair(
            "a gradient",
            [plain(gradient) for gradient in backward(got, [*inputs, *captures])],
            backward(expected, [*expected_inputs, *captures]),
            strides=False,
        ),
    ]


def _captures(outputs: object, inputs: Tensors) -> list[torch.Tensor]:
    """What the result depends on besides the inputs: the other ends of its autograd graph."""
    pending = [t.grad_fn for t in tensors_in(outputs)]
    ends: dict[int, torch.Tensor] = {}
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(end := getattr(node, "variable", None), torch.Tensor):
            ends[id(end)] = end
        pending.extend(following for following, _ in node.next_functions)
    return [end for key, end in ends.items() if key not in {id(t) for t in inputs}]


def first_derivatives(outputs: object, sources: Tensors) -> list[torch.Tensor]:
    """Gradients of all that has one, by the sources that require one."""
    results = [t for t in floats_in(outputs) if t.requires_grad]
    return _grad(results, sources, [slope(t) for t in results])


def _second_derivatives(outputs: object, sources: Tensors) -> list[torch.Tensor]:
    # The directions are differentiated by as well: the second derivative of a linear op is there, and nowhere else.
    results = [t for t in floats_in(outputs) if t.requires_grad]
    directions = [slope(t).requires_grad_() for t in results]
    first = [t for t in _grad(results, sources, directions, create_graph=True) if t.requires_grad]
    return _grad(first, [*sources, *directions], [slope(t) for t in first])


def _grad(outputs: Tensors, sources: Tensors, directions: Tensors, *, create_graph: bool = False) -> list[torch.Tensor]:
    """As ``torch.autograd.grad``; a gradient that is not there is zero. What was captured may be needed again."""
    sources = [t for t in sources if t.requires_grad]
    if not outputs:
        return [torch.zeros_like(t) for t in sources]
    return list(
        torch.autograd.grad(
            outputs, sources, directions, create_graph=create_graph, retain_graph=True, materialize_grads=True
        )
    )


def slope(tensor: torch.Tensor) -> torch.Tensor:
    """A direction that is different in every element, so that no two can be confused."""
    steps = torch.linspace(0.5, 1.5, max(tensor.numel(), 1), dtype=torch.float64)[: tensor.numel()]
    return steps.reshape(tensor.shape).to(tensor.device, tensor.dtype)


def directional(case: Case) -> tuple[tuple[list[torch.Tensor], list[torch.Tensor]], list[torch.Tensor]]:
    """``((values, tangents), directions)`` of the body, by reverse mode alone."""
    body, inputs = of_floats(case, case.on(case.body))
    directions = [slope(t) for t in inputs]
    values, tangents = torch.autograd.functional.jvp(body, tuple(inputs), tuple(directions))
    return (list(values), list(tangents)), directions


def of_floats(case: Case, run: Run) -> tuple[Callable[..., tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """``run`` as a function of the inputs that have derivatives, giving the outputs that have; and those inputs."""
    inputs = case.clones()
    chosen = [t for t in inputs if differentiable(t)]
    if not chosen:
        raise NotApplicable("no operand has a derivative")

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        return tuple(floats_in(seeded(run, [next(given) if differentiable(t) else t for t in inputs])))

    return function, chosen
