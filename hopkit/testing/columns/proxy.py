"""The op in graphs that ``make_fx`` records."""

from __future__ import annotations

import copy
import pickle
from typing import cast

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from hopkit._torch import trees
from hopkit.spec import Kind
from hopkit.testing.case import Callee, Case, Group, NotApplicable, Outcome, Run
from hopkit.testing.compare import Pair, difference
from hopkit.testing.derivatives import first_derivatives
from hopkit.testing.graphs import TracingMode, kept, rerun, trace
from hopkit.testing.tensors import Tensors, detached, differentiable, floats_in, smaller
from hopkit.testing.values import seeded, values

GROUP = Group("proxy")


@GROUP.column
def make_fx_real(case: Case, callee: Callee) -> Outcome:
    """As a graph, from real tensors."""
    return _recorded(case, callee, "real")


@GROUP.column
def make_fx_fake(case: Case, callee: Callee) -> Outcome:
    """As a graph, from fake tensors."""
    return _recorded(case, callee, "fake")


@GROUP.column
def make_fx_symbolic(case: Case, callee: Callee) -> Outcome:
    """As a graph with symbolic sizes, run on another size too."""
    graph = trace(case, case.on(callee), "symbolic")
    pairs, note = rerun(case, graph), kept(case, graph)
    if case.resized is None:
        return Outcome(pairs, f"{note}; no other size fits the sample")
    if _differs(case, graph, case.resized) and _fixes_size(case, case.resized):
        return Outcome(pairs, f"{note}; the body fixes the size")
    return Outcome([*pairs, *values(case, graph, case.resized)], f"{note}; two sizes")


@GROUP.column
def make_fx_pre_dispatch(case: Case, callee: Callee) -> Outcome:
    """As a graph, from above autograd."""
    return _recorded(case, callee, "real", pre_dispatch=True)


def _recorded(case: Case, callee: Callee, tracing_mode: TracingMode, *, pre_dispatch: bool = False) -> Outcome:
    graph = trace(case, case.on(callee), tracing_mode, pre_dispatch=pre_dispatch)
    return Outcome(rerun(case, graph), kept(case, graph))


def _fixes_size(case: Case, resized: Tensors) -> bool:
    """Whether torch's own graph of the body is no better on another size."""
    try:
        graph = trace(case, case.on(case.body), "symbolic")
    except Exception:  # torch has no such graph, and so nothing says that the size is fixed
        return False
    return _differs(case, graph, resized)


def _differs(case: Case, graph: Run, tensors: Tensors) -> bool:
    try:
        return any(difference(pair)[1] for pair in values(case, graph, tensors))
    except Exception:  # a graph may say in any way that it was not recorded for this
        return True


@GROUP.column
def training(case: Case, callee: Callee) -> Outcome:
    """Forward and backward as one graph."""
    if not case.derives:
        raise NotApplicable(f'autograd="{case.op.spec.autograd}": it has no derivative')
    if not any(t.requires_grad for t in case.leaves()):
        raise NotApplicable("no operand has a gradient")

    def step(callee: Callee) -> Run:
        def run(*tensors: torch.Tensor) -> object:
            outputs = case.on(callee)(*tensors)
            return detached(outputs), first_derivatives(outputs, [t for t in tensors if t.requires_grad])

        return run

    graph = make_fx(step(callee))(*case.leaves())
    pairs = []
    for tensors in case.others:
        inputs, expected_inputs = case.leaves(tensors), case.leaves(tensors)
        (value, gradients) = cast("tuple[object, object]", seeded(graph, inputs))
        (expected, wanted) = cast("tuple[object, object]", seeded(step(case.body), expected_inputs))
        pairs += [Pair("the value", value, expected), Pair("a gradient", gradients, wanted, strides=False)]
    return Outcome(pairs, kept(case, graph))


@GROUP.column
def copies(case: Case, callee: Callee) -> Outcome:
    """A deep copy and a pickle of the graph."""
    graph = trace(case, case.on(callee))
    copied, pickled = copy.deepcopy(graph), cast("GraphModule", pickle.loads(pickle.dumps(graph)))
    return Outcome([*rerun(case, copied), *rerun(case, pickled)], kept(case, copied))


@GROUP.column
def twice(case: Case, callee: Callee) -> Outcome:
    """Two calls in one trace, on different values."""

    def both(callee: Callee) -> Run:
        run = case.on(callee)
        return lambda *tensors: (run(*tensors), run(*map(smaller, tensors)))

    graph = trace(case, both(callee))
    return Outcome(rerun(case, graph, want=both(case.body)), kept(case, graph))


@GROUP.column
def nested(case: Case, callee: Callee) -> Outcome:
    """The op inside a subgraph of itself, eagerly and as a graph."""
    first = case.op.spec.of_kind(Kind.SUBGRAPH, Kind.SUBGRAPHS)[0]
    if first.graph_only:
        raise NotApplicable(f"'{first.name}' is always a graph, and no graph calls the op")
    run, want = _inside_itself(case, callee), _inside_itself(case, case.body)
    graph = trace(case, run)
    return Outcome([*values(case, run, want=want), *rerun(case, graph, want=want)], kept(case, graph))


def _inside_itself(case: Case, callee: Callee) -> Run:
    """The call, with its first subgraph made to call the op once more and to add the mean of what that gives."""

    def run(*tensors: torch.Tensor) -> object:
        leaves, tree = trees.flatten(case.arguments(tensors))
        index = next(i for i, leaf in enumerate(leaves) if callable(leaf))
        subgraph = cast("Callee", leaves[index])

        def outer(*args: object, **kwargs: object) -> object:
            means = [t.mean() for t in floats_in(case.on(callee)(*tensors))]
            offset = torch.stack([m.abs() for m in means]).sum() if means else 0
            return trees.map_only(
                torch.Tensor,
                lambda t: t + cast("torch.Tensor", offset).to(t.dtype) if means and differentiable(t) else t,
                subgraph(*args, **kwargs),
            )

        leaves[index] = outer
        args, kwargs = cast("tuple[tuple[object, ...], dict[str, object]]", trees.unflatten(leaves, tree))
        return callee(*args, **kwargs)

    return run
