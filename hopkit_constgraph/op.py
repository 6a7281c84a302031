"""``run_const_graph``: one body, and two rules that keep a graph in the form in which it was given.

torch's own op of this name (torch/_higher_order_ops/run_const_graph.py) writes six kernels by hand. Here they are
derived; what is written by hand is only what makes the node look like torch's: the graph itself is its submodule.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch

import hopkit
from hopkit.extend import Call, Decline, OpSpec, hookimpl
from hopkit.extend.functionalize import Functionalizer
from hopkit.extend.inductor import inline, lowered, packaging, untouched
from hopkit.extend.proxy import Tracer, node
from hopkit_constgraph.kept import KEPT, kept, remember
from hopkit_constgraph.samples import constant_part, samples


@hopkit.define("constgraph_run", autograd="deferred_error", samples=samples)
def run_const_graph(graph: torch.fx.GraphModule, args: tuple[object, ...]) -> object:
    """Run a graph that computes with constants, such as the weights of a model.

    Args:
        graph: What to run. A recorded call keeps it as the submodule ``_const_graph``.
        args: What it runs on: tensors, numbers, and pytrees of them.

    Returns:
        What the graph returns. Its backward raises: constants have no gradients; see `run_const_graph_derive`.
    """
    return graph(*args)


@hopkit.define("constgraph_run_derive", samples=samples)
def run_const_graph_derive(graph: torch.fx.GraphModule, args: tuple[object, ...]) -> object:
    """As `run_const_graph`, with the gradients of ``args`` and of the graph's own parameters."""
    return graph(*args)


@hopkit.define("constgraph_run_once", pure=False, samples=samples)
def run_const_graph_once(graph: torch.fx.GraphModule, args: tuple[object, ...]) -> object:
    """As `run_const_graph_derive`, and what it gives is kept until one of ``args`` changes (hopkit_constgraph/kept.py).

    Do not write to what it gives: whoever has it from another call would see that. It is declared not to be pure, so
    that a graph that trains, in which weights change at every step, has what it computes and no node.
    """
    return kept(graph, args)


@run_const_graph_once.rule("inductor")
def lower(call: Call) -> object:
    """A call back, since Inductor's own code would compute it at every run. Packaged code has no Python to call."""
    if packaging() or call.transformed:
        return inline(call)
    results = cast("list[object]", lowered(KEPT, remember(call), list(call.inputs)))
    return tuple(map(untouched, results))


@run_const_graph.rule("proxy")
def record(tracer: Tracer, call: Call) -> object:
    """The node ``(graph, args)``, with the graph as it was given."""
    tracer.register("_const_graph", as_given(call))
    return node(tracer, call)


@run_const_graph.rule("functionalize")
def functionalize(layer: Functionalizer, call: Call) -> object:
    """The op on plain tensors. The graph stays as it is: one that writes to its inputs never gets here."""
    as_given(call)
    inputs = layer.unwrap_tensors(call.inputs)
    with layer.redispatch_to_next():
        outputs = call.replace(inputs=inputs)()
        return layer.wrap_tensors(cast("tuple[object, ...]", outputs))


def as_given(call: Call) -> torch.fx.GraphModule:
    """The graph of a call that needs no layout.

    Raises:
        Decline: Its graph is another one, traced anew to take one flat tuple; the built-in rules know what to do.
    """
    if call.layout is not None:
        raise Decline("its graph was traced anew")
    (graph,) = call.graphs
    return cast("torch.fx.GraphModule", graph)


@hookimpl
def hopkit_add_ops() -> Iterable[hopkit.Op[..., object]]:
    """All ops."""
    return run_const_graph, run_const_graph_derive, run_const_graph_once


@hookimpl
def hopkit_samples_from_program(op: OpSpec, program: torch.export.ExportedProgram) -> Iterable[hopkit.Sample] | None:
    """What the program computes from its weights alone."""
    return [constant_part(program)] if op in [ours.spec for ours in hopkit_add_ops()] else None
