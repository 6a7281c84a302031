"""``fold``: what a model computes from its weights alone becomes one node, which runs once."""

from __future__ import annotations

import copy
import itertools
import operator
import weakref
from collections.abc import Callable, Container, Mapping
from typing import TypeVar, cast

import torch
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

import hopkit
from hopkit_constgraph import constants
from hopkit_constgraph.choose import choose, size
from hopkit_constgraph.folded import Folded
from hopkit_constgraph.norms import absorb
from hopkit_constgraph.op import run_const_graph_once
from hopkit_constgraph.policy import Policy
from hopkit_constgraph.release import computed, final, release
from hopkit_constgraph.report import Constant, FoldReport, Left

ExportedProgram = torch.export.ExportedProgram
M = TypeVar("M", torch.nn.Module, ExportedProgram)

NAME = "_const_graph"
"""What a graph calls the graph of its constants."""

_reports: weakref.WeakKeyDictionary[torch.nn.Module, FoldReport] = weakref.WeakKeyDictionary()


def fold(
    model: M,
    example_inputs: tuple[object, ...] | None = None,
    *,
    policy: Policy | None = None,
    kwargs: Mapping[str, object] | None = None,
    dynamic_shapes: dict[str, object] | tuple[object, ...] | list[object] | None = None,
) -> M:
    """Move all that depends on parameters, buffers and constants alone into a graph that runs once.

    Args:
        model: A module, a graph with metadata (``node.meta["val"]``), or an exported program. It stays as it is.
        example_inputs: Positional arguments to trace a module with; a graph and a program need none.
        policy: What is folded. None: `Policy()`.
        kwargs: Keyword arguments to trace a module with.
        dynamic_shapes: Which sizes of the inputs may vary, as for ``torch.export.export``.

    Returns:
        The same kind: for a module, a graph that shares its weights under their names. What was done is in
        ``report_of(result)``. If nothing is folded, this is ``model``.

    Raises:
        HopkitError: A module without example inputs, a graph without metadata, or no model at all.
    """
    policy = policy or Policy()
    if isinstance(model, ExportedProgram):
        program: object = _fold_program(model, policy)
        return cast("M", program)
    if isinstance(model, GraphModule) and example_inputs is None:
        return cast("M", _fold_graph(model, policy))
    if not isinstance(model, torch.nn.Module):
        raise hopkit.HopkitError(
            "fold()",
            f"expected a torch.nn.Module or a torch.export.ExportedProgram, got a {type(model).__qualname__}",
            why="what a model computes is read from its graph",
            todo="Pass the module and example inputs, or export it: `torch.export.export(module, inputs)`",
        )
    if example_inputs is None:
        raise hopkit.HopkitError(
            f"fold() of a {type(model).__qualname__}",
            "was given no example inputs",
            why="a module has no graph until it is traced",
            todo="Pass them: `fold(model, (x,))`",
        )
    traced = torch.export.export(model, example_inputs, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    folded = _fold_program(traced, policy)
    if folded is traced:
        _reports[model] = report_of(traced)
        return model
    module = Folded.of(folded, report_of(folded).released)
    module.training = model.training
    _reports[module] = report_of(folded)
    return cast("M", module)


def report_of(folded: torch.nn.Module | ExportedProgram) -> FoldReport:
    """What `fold` did to make this.

    Raises:
        HopkitError: It comes from somewhere else.
    """
    module = folded.graph_module if isinstance(folded, ExportedProgram) else folded
    report = _reports.get(module)
    if report is None:
        raise hopkit.HopkitError(
            "report_of()",
            f"was given a {type(folded).__qualname__} that `fold` did not make",
            why="a report is of one fold",
            todo="Pass what `fold` returned; a copy, or what was loaded, has no report",
        )
    return report


def _fold_program(program: ExportedProgram, policy: Policy) -> ExportedProgram:
    tensors = {**program.state_dict, **program.constants}
    module = _copied(program.graph_module)
    names, changed = constants.weights_of(program, module.graph)
    signature = copy.deepcopy(program.graph_signature)
    held: dict[str, torch.Tensor] = {}

    def hold(node: Node, value: torch.Tensor) -> Node:
        name = _free(f"_constant_{node.name}", tensors)
        held[name] = value
        with module.graph.inserting_before(next(iter(module.graph.nodes))):
            placeholder = module.graph.placeholder(f"b_{name}")
        argument = TensorArgument(placeholder.name)
        signature.input_specs.insert(0, InputSpec(InputKind.BUFFER, argument, name, persistent=True))
        return placeholder

    sources = {n: tensors[name] for n, name in names.items()}
    report, gone = _move(module, sources, names, policy, hold, changed)
    if not report.constants:
        _reports[program.graph_module] = report
        return program
    without = {node.name for node in names if names[node] in gone}
    for node in [node for node in names if node.name in without]:
        module.graph.erase_node(node)
    signature.input_specs[:] = [spec for spec in signature.input_specs if spec.arg.name not in without]
    module.recompile()
    folded = ExportedProgram(
        module,
        module.graph,
        signature,
        held | {name: value for name, value in program.state_dict.items() if name not in gone},
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        {name: value for name, value in program.constants.items() if name not in gone},
        verifiers=program.verifiers,
    )
    release(gone)
    _reports[folded.graph_module] = report
    return folded


def _fold_graph(model: GraphModule, policy: Policy) -> GraphModule:
    module = _copied(model)
    sources: dict[Node, torch.Tensor] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(node.target)(module)
        if isinstance(value, torch.Tensor):
            sources[node] = value
            node.meta.setdefault("val", value.detach().to("meta"))

    def hold(node: Node, value: torch.Tensor) -> Node:
        name = _free(f"_constant_{node.name}", dir(module))
        module.register_buffer(name, value)
        return module.graph.get_attr(name)

    report, gone = _move(module, sources, {node: str(node.target) for node in sources}, policy, hold)
    for name in gone:
        owner, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
    release(gone)
    _reports[module if report.constants else model] = report
    return module if report.constants else model


def _free(name: str, taken: Container[str]) -> str:
    """A name like this that is not taken."""
    return next(n for n in itertools.chain([name], map((name + "_{}").format, itertools.count(1))) if n not in taken)


def _copied(module: GraphModule) -> GraphModule:
    """A graph module with a graph of its own, and the same weights."""
    copied = GraphModule(module, copy.deepcopy(module.graph))
    copied.meta.update(module.meta)
    for old, new in zip(module.graph.nodes, copied.graph.nodes, strict=True):
        new.name = old.name  # torch renames what is called as a builtin, such as an "input"
    copied.recompile()
    return copied


def _move(
    module: GraphModule,
    sources: Mapping[Node, torch.Tensor],
    names: Mapping[Node, str],
    policy: Policy,
    hold: Callable[[Node, torch.Tensor], Node],
    changed: Container[Node] = (),
) -> tuple[FoldReport, dict[str, torch.Tensor]]:
    """Move the constant part of a graph into a graph of its own, in place.

    Args:
        module: The graph.
        sources: Its weights, by their nodes.
        names: Their names.
        policy: What is moved.
        hold: Makes a node that stands for a value that is computed for good.
        changed: The weights that the model changes, though nothing in the graph says so.

    Returns:
        What was done, and the weights that are to be released.
    """
    graph = module.graph
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            raise hopkit.HopkitError(
                f"node '{node.name}'",
                "does not say what it gives",
                why="how much memory a constant takes is read from there",
                todo="Trace the model with example inputs, `fold(model, inputs)`, or record it with make_fx",
            )
    if policy.norms:
        absorb(graph, sources)
    found = constants.find(graph, sources, changed)
    chosen, left = choose(found, policy)
    told = tuple(Left(names.get(node, node.name), left[node]) for node in sorted(left))
    if not chosen:
        return FoldReport((), told, 0, 0), {}
    done, unused = final(chosen, found) if policy.release else ([], [])
    values = computed(done, found)
    lost = {id(sources[node]) for node in unused}
    gone = {names[node]: tensor for node, tensor in sources.items() if id(tensor) in lost}  # all names of a tied weight
    within = constants.ancestors(chosen)
    moved = sorted([*(n for n in within if n not in found.sources), *constants.checks(within, found)])
    taken = sum(size(node) for node in within if node in found.sources)
    report = FoldReport(
        tuple(_constant(node, found.sources, names) for node in chosen), told, len(moved), taken, tuple(gone)
    )
    first = next(node for node in graph.nodes if node.op == "call_function")
    with graph.inserting_before(first):
        items = {node: hold(node, values[node]) for node in done}
        items |= _kept(module, [node for node in chosen if node not in values], found)
    for node, item in items.items():
        item.meta = {**node.meta, **item.meta}
        node.replace_all_uses_with(item)
    for node in reversed([*sources, *moved]):
        if node.op != "placeholder" and not node.users:
            graph.erase_node(node)
    for node, item in items.items():
        if item.op == "call_function":
            item.name = node.name  # a program knows its outputs by their names
    graph.lint()
    module.recompile()
    return report, gone


def _kept(module: GraphModule, chosen: list[Node], found: constants.Constants) -> dict[Node, Node]:
    """Write a node that computes these constants once, and give what stands for each of them."""
    if not chosen:
        return {}
    graph = module.graph
    folded, weights = constants.graph_of(chosen, found)
    name = _free(NAME, dir(module))
    setattr(module, name, folded)
    taken = [node if node.op == "placeholder" else graph.node_copy(node) for node in weights]
    results = graph.call_function(run_const_graph_once.operator, (graph.get_attr(name), tuple(taken)))
    results.meta["val"] = tuple(node.meta["val"] for node in chosen)
    return {node: graph.call_function(operator.getitem, (results, number)) for number, node in enumerate(chosen)}


def _constant(node: Node, sources: Mapping[Node, torch.Tensor], names: Mapping[Node, str]) -> Constant:
    nodes = constants.ancestors([node])
    weights = [n for n in nodes if n in sources]
    return Constant(
        node.name, tuple(names[n] for n in weights), len(nodes) - len(weights), sum(map(size, weights)), size(node)
    )
