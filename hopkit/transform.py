"""The body of an op in flat form, and what a transform makes of it: T(op) is the op whose body is T(body)."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn, cast

import torch

from hopkit._torch import levels, random, sizes, trees
from hopkit._torch.autograd import needs_gradient, unhooked
from hopkit._torch.fakes import autograd_on, copied, zeros_of_stand_ins
from hopkit._torch.sizes import Equal
from hopkit._torch.state import before_dispatch, forward_mode
from hopkit._torch.tracing import draws_for_backward
from hopkit._torch.watch import beyond
from hopkit.codec import Slot
from hopkit.errors import AutogradError, LayoutError, RuleError, SignatureError
from hopkit.layout import DRAWING, FUNCTIONAL, REDRAWN, REGION, Layout, Variant, arguments, fill
from hopkit.spec import Kind, OpSpec

_GIVEN = (torch.Tensor, int, float, *sizes.SYMBOLIC)
"""What a node gives: tensors, and numbers that only running tells."""

Flat = Callable[[Sequence[object]], tuple[object, ...]]
"""A function of a node's inputs that gives the node's outputs."""

Rule = Callable[..., object]

_told: contextvars.ContextVar[bool] = contextvars.ContextVar("hopkit.told", default=False)

NOTHING = (None,)
"""What a node gives where its op gives no tensor: torch cannot make an operator functional that gives nothing."""


def _is_slot(leaf: object) -> bool:
    return isinstance(leaf, Slot)


class Replayed:
    """A recorded subgraph: calls the graph that was recorded for what it is called with."""

    def __init__(
        self,
        op: str,
        name: str,
        variants: Sequence[Variant],
        graphs: Sequence[Callable[..., object]],
        inputs: Sequence[object],
        symbols: Mapping[str, int],
    ) -> None:
        self._op, self._name, self._variants = op, name, variants
        self._graphs, self._inputs, self._symbols = graphs, inputs, symbols
        # A loop calls it again and again on tensors of one kind.
        self._met: dict[object, Variant] = {}

    @property
    def captures(self) -> tuple[object, ...]:
        """The values that the subgraph closes over, each once."""
        return tuple(self._inputs[i] for i in dict.fromkeys(i for v in self._variants for i in v.captures))

    @property
    def graphs(self) -> tuple[Callable[..., object], ...]:
        """The graphs that were recorded, one for each thing that it is called with."""
        return tuple(self._graphs[i] for i in dict.fromkeys(v.graph for v in self._variants))

    def __call__(self, /, *args: object, **kwargs: object) -> object:
        signature = None if kwargs else _signature(args)
        if signature and (met := self._met.get(signature)):
            return self._run(met, args)
        leaves, tree = trees.flatten((args, kwargs))
        # A graph for just these sizes comes before one for sizes that only running the op can tell.
        for equal in Equal:
            for variant in self._variants:
                slots = variant.match(leaves, tree, self._symbols, equal)
                if slots is not None:
                    if signature:
                        self._met[signature] = variant
                    return self._run(variant, slots)
        return self._refused(args, kwargs)

    def _run(self, variant: Variant, slots: Sequence[object]) -> object:
        captures = [self._inputs[i] for i in variant.captures]
        outputs = cast("Sequence[object]", sizes.readable(self._graphs[variant.graph])(*slots, *captures))
        for i, new in zip(variant.writes, outputs[len(outputs) - len(variant.writes) :], strict=True):
            cast("torch.Tensor", slots[i]).copy_(cast("torch.Tensor", new))
        return variant.result(outputs, slots)

    def _refused(self, args: Sequence[object], kwargs: Mapping[str, object]) -> NoReturn:
        recorded = "; ".join(variant.describe() for variant in self._variants) or "nothing, it was never called"
        found = arguments()
        found.split((args, kwargs))
        raise SignatureError(
            f"subgraph '{self._name}' of op '{self._op}'",
            f"was recorded for {recorded}, and is called with {Variant.of(found.inputs).describe()}",
            why="a graph is right only for what it was recorded with",
            todo="Record again with these arguments, or with dynamic sizes; name untaken branches with `inputs=`",
        )


def _signature(args: Sequence[object]) -> tuple[object, ...] | None:
    """Equal for calls on different tensors of one kind. None: more has to be known of this call."""
    found: list[object] = []
    for arg in args:
        if type(arg) not in trees.TENSORS or any(arg is other for other in args[: len(found)]):
            return None
        tensor = cast("torch.Tensor", arg)
        if any(type(size) is not int for size in tensor.shape):
            return None
        found.append((tensor.shape, tensor.dtype, tensor.device))
    return tuple(found)


def check_parameters(spec: OpSpec, layout: Layout, options: Iterable[str]) -> None:
    """Check that the parameters that a node was recorded with are those that the op has.

    Raises:
        LayoutError: The op has changed.
    """
    known = {*layout.values, *layout.subgraphs, *options}
    with_tensors = {name for name, value in layout.values.items() if any(map(_is_slot, trees.leaves(value)))}
    fits = (
        known == {p.name for p in spec.parameters}
        and {*layout.subgraphs} == {p.name for p in spec.of_kind(Kind.SUBGRAPH, Kind.SUBGRAPHS)}
        and with_tensors <= {p.name for p in spec.of_kind(Kind.OPERAND)}
        and all(len(layout.subgraphs[p.name]) == 1 for p in spec.of_kind(Kind.SUBGRAPH))
    )
    if not fits:
        raise LayoutError(
            f"a node of op '{spec.name}'",
            f"was recorded with the parameters {', '.join(sorted(known))}, and the op now takes {spec.shown()}",
            why="the op has changed since, and the node's arguments no longer fit it",
            todo="Record the graph again",
        )


def values(
    spec: OpSpec,
    layout: Layout,
    graphs: Sequence[Callable[..., object]],
    inputs: Sequence[object],
    options: Mapping[str, object],
) -> dict[str, object]:
    """The author's arguments, by parameter, that a node in flat form stands for."""
    check_parameters(spec, layout, options)
    symbols = layout.symbols(inputs)
    found: dict[str, object] = {name: fill(value, inputs) for name, value in layout.values.items()} | dict(options)
    for p in spec.of_kind(Kind.SUBGRAPH, Kind.SUBGRAPHS):
        many = layout.subgraphs[p.name]
        names = [f"{p.name}[{i}]" for i in range(len(many))] if p.kind is Kind.SUBGRAPHS else [p.name]
        replayed = tuple(
            Replayed(spec.name, name, variants, graphs, inputs, symbols)
            for name, variants in zip(names, many, strict=True)
        )
        found[p.name] = replayed if p.kind is Kind.SUBGRAPHS else replayed[0]
    return found


def flat(
    spec: OpSpec,
    layout: Layout,
    graphs: Sequence[Callable[..., object]],
    options: Mapping[str, object],
    body: Rule | None = None,
) -> Flat:
    """The node's meaning: its body (or ``body``), under the transforms that the layout names."""

    def run(inputs: Sequence[object]) -> tuple[object, ...]:
        args, kwargs = spec.arguments(values(spec, layout, graphs, inputs, options))
        leaves = trees.leaves((body or spec.body)(*args, **kwargs))
        given = tuple(leaves[i] for i in layout.outputs) if len(leaves) == layout.leaves else None
        wrong = [value for value in given or () if not isinstance(value, _GIVEN)]
        if given is None or wrong:
            told = f"a result of {len(leaves)} leaves" if given is None else repr(wrong[0])
            raise RuleError(
                f"op '{spec.name}'",
                f"gave {told} where it was recorded with {layout.leaves if given is None else 'a tensor'}",
                why="a node has a fixed number of outputs",
                todo="Let every rule, `outputs=` and every branch of the body give a result of the same structure",
            )
        return given or NOTHING

    def part(inputs: Sequence[object]) -> tuple[object, ...]:
        if needs_gradient(inputs) and draws_for_backward(graphs[0]):
            raise AutogradError(
                f"op '{spec.name}'",
                "draws random numbers and trains, inside what trains by running again, or a second time",
                why="its backward has what it drew, and no derivative",
                todo="Record the body in its place, `hopkit.decompose(op)`",
            )
        return tuple(cast("Sequence[object]", sizes.readable(graphs[0])(*inputs)))

    result: Flat = run
    for name, *rest in layout.transforms:
        result = part if name == REGION else TRANSFORMS[cast("str", name)](result, *rest)
    return result


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Inside, a derivative is recorded with all that it depends on: who runs the graph may differentiate it again."""
    token = _told.set(True)
    try:
        yield
    finally:
        _told.reset(token)


def vjp(run: Flat, wrt: Sequence[int], given: Sequence[int]) -> Flat:
    """The vector-Jacobian product of ``run``.

    Takes the inputs of ``run`` and then the gradients of its outputs ``given``; gives the gradients of its inputs
    ``wrt``, zeros where an output does not depend on them.
    """

    def transformed(inputs: Sequence[object]) -> tuple[object, ...]:
        primals, gradients = list(inputs[: len(inputs) - len(given)]), inputs[len(inputs) - len(given) :]
        # Inside functionalize no tensor becomes a leaf; before dispatch a tracer loses what torch.func wraps.
        if (_told.get() and not before_dispatch()) or levels.top() is not None or forward_mode():
            return _vjp_inside_transforms(run, primals, wrt, given, gradients)
        again = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
        hooked = contextlib.nullcontext() if again else unhooked()  # of what is used up here nobody saves anything
        with torch.inference_mode(False), autograd_on(), torch.enable_grad(), hooked:
            primals, gradients = list(map(_saveable, primals)), list(map(_saveable, gradients))
            for i in wrt:
                primals[i] = leaf(cast("torch.Tensor", primals[i]))
            outputs = run(primals)
            pairs = [
                (output, _sized(cast("torch.Tensor", gradient), output))
                for output, gradient in zip((outputs[i] for i in given), gradients, strict=True)
                if isinstance(output, torch.Tensor) and output.requires_grad
            ]
            sources = [cast("torch.Tensor", primals[i]) for i in wrt]
            if not pairs:
                return tuple(map(torch.zeros_like, sources))
            results = torch.autograd.grad(
                [output for output, _ in pairs],
                sources,
                [gradient for _, gradient in pairs],
                create_graph=again,
                allow_unused=True,
                materialize_grads=True,
            )
            results = tuple(map(_sized, results, sources))
        # A leaf that was made here is nobody's; what depends on it alone has no gradient.
        return tuple(result if again and beyond(result, sources) else result.detach() for result in results)

    return transformed


def _vjp_inside_transforms(
    run: Flat, primals: Sequence[object], wrt: Sequence[int], given: Sequence[int], gradients: Sequence[object]
) -> tuple[object, ...]:
    def chosen(*sources: object) -> tuple[object, ...]:
        changed = dict(zip(wrt, sources, strict=True))
        outputs = run([changed.get(i, primal) for i, primal in enumerate(primals)])
        return tuple(outputs[i] for i in given)

    with unhooked():  # torch.func works in no checkpoint
        _, pull, *_ = torch.func.vjp(chosen, *(primals[i] for i in wrt))
        return cast("tuple[object, ...]", pull(tuple(gradients)))


def _sized(gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A gradient of ``value``. On stand-ins, sizes that only running the op tells have other symbols each time."""
    if not any(map(sizes.unbacked, (*gradient.shape, *value.shape))):
        return gradient
    return torch.zeros_like(value, dtype=gradient.dtype) + gradient.sum()


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as something to differentiate by, on its own: other inputs may have been computed from it."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return tensor.view_as(tensor)
    return cast("torch.Tensor", _saveable(tensor)).detach().requires_grad_()


def _saveable(value: object) -> object:
    """An inference tensor cannot be saved for backward; its clone can."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def functional(run: Flat, written: Sequence[int]) -> Flat:
    """``run`` without mutation: it writes to copies of the inputs ``written``, and gives them after its outputs."""

    def transformed(inputs: Sequence[object]) -> tuple[object, ...]:
        values = list(inputs)
        for i in written:
            values[i] = copied(cast("torch.Tensor", inputs[i]))
        return (*run(values), *(values[i] for i in written))

    return transformed


def vmap(run: Flat, dims: tuple[int | None, ...], randomness: str) -> Flat:
    """``run``, batched: input number i is batched in dimension ``dims[i]``, and outputs are in their first."""

    def transformed(inputs: Sequence[object]) -> tuple[object, ...]:
        # What an op gives that gives no tensor has no batch.
        def tensors(*values: object) -> tuple[object, ...]:
            found = run(values)
            return () if found is NOTHING else found

        return torch.vmap(tensors, in_dims=dims, randomness=randomness)(*inputs) or NOTHING

    return transformed


def of_inputs(gradients: Sequence[torch.Tensor], dims: Sequence[int | None]) -> tuple[torch.Tensor, ...]:
    """Gradients for every item, in their first dimension, as those of inputs that are batched in ``dims``.

    What is one for all items has the sum of theirs.
    """
    pairs = zip(gradients, dims, strict=True)
    return tuple(gradient.sum(0) if dim is None else gradient.movedim(0, dim) for gradient, dim in pairs)


def jvp(run: Flat, wrt: Sequence[int], given: Sequence[int]) -> Flat:
    """``run`` and its derivative: tangents of the inputs ``wrt`` follow the inputs, those of outputs ``given`` them."""

    def transformed(inputs: Sequence[object]) -> tuple[object, ...]:
        primals, tangents = inputs[: -len(wrt)], inputs[-len(wrt) :]

        def chosen(*sources: object) -> tuple[tuple[object, ...], tuple[object, ...]]:
            changed = dict(zip(wrt, sources, strict=True))
            outputs = run([changed.get(i, primal) for i, primal in enumerate(primals)])
            return tuple(outputs[i] for i in given), outputs

        with levels.duals_shared(), zeros_of_stand_ins():
            _, found, *aside = torch.func.jvp(chosen, tuple(primals[i] for i in wrt), tuple(tangents), has_aux=True)
        outputs = cast("tuple[object, ...]", aside[0])
        pairs = zip(cast("tuple[torch.Tensor, ...]", found), given, strict=True)
        return (*outputs, *(typed(tangent, outputs[i]) for tangent, i in pairs))

    return transformed


def typed(tangent: torch.Tensor, output: object) -> torch.Tensor:
    """``tangent`` in the dtype of what it is the tangent of.

    torch's own, of a tensor without dimensions times a number, is a double.
    """
    return tangent.to(output.dtype) if isinstance(output, torch.Tensor) else tangent


def drawing(run: Flat, devices: Sequence[str]) -> Flat:
    """``run``, which also gives, after its outputs, the states that the generators of these devices were in before."""

    def transformed(inputs: Sequence[object]) -> tuple[object, ...]:
        states = random.states(devices)
        return (*run(inputs), *states)

    return transformed


def redrawn(run: Flat, devices: Sequence[str]) -> Flat:
    """``run``, drawing what it drew: such states follow its inputs."""

    def transformed(inputs: Sequence[object]) -> tuple[object, ...]:
        count = len(inputs) - len(devices)
        with random.drawing_from(devices, inputs[count:]):
            return run(inputs[:count])

    return transformed


TRANSFORMS: dict[str, Callable[..., Flat]] = {
    "vjp": vjp,
    "vmap": vmap,
    "jvp": jvp,
    FUNCTIONAL: functional,
    DRAWING: drawing,
    REDRAWN: redrawn,
}
