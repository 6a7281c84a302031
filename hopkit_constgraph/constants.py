"""What of a graph depends on its weights alone, and what of that may be computed once."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

OPERATOR = type(torch.ops.aten.add.Tensor)
"""The type of torch's operators, which has no public name."""

KNOWN = ("aten", "prims", "quantized", "quantized_decomposed")
"""Namespaces of operators that give a value and do nothing else, where their schemas do not say otherwise."""


@dataclasses.dataclass(frozen=True)
class Constants:
    """The constant part of a graph.

    Args:
        sources: The nodes that stand for weights, and the weights.
        computed: What is computed from them alone, and may be computed once.
        left: What depends on them alone and has to stay, and why.
    """

    sources: Mapping[Node, torch.Tensor]
    computed: frozenset[Node]
    left: Mapping[Node, str]


def weights_of(program: ExportedProgram, graph: Graph) -> tuple[dict[Node, str], set[Node]]:
    """The placeholders of a program's graph, or of a copy, that stand for its tensors; and those that it changes."""
    kinds = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
    signature = program.graph_signature
    targets = {spec.arg.name: str(spec.target) for spec in signature.input_specs if spec.kind in kinds}
    updated = {*signature.buffers_to_mutate.values(), *signature.parameters_to_mutate.values()}
    names = {n: targets[n.name] for n in graph.find_nodes(op="placeholder") if n.name in targets}
    return names, {node for node, name in names.items() if name in updated}


def find(graph: Graph, sources: Mapping[Node, torch.Tensor], changed: Container[Node] = ()) -> Constants:
    """The constant part of ``graph``, in which what is computed twice is then computed once.

    Args:
        graph: Operators of torch, as torch.export writes them.
        sources: The nodes that stand for weights, and the weights.
        changed: Those of them that the model changes, though nothing in the graph says so.
    """
    _unify(sources)
    written = _written(graph)
    weights = {n: tensor for n, tensor in sources.items() if n not in written and n not in changed}
    left = {node: "the model writes to it" for node in sources if node not in weights}
    computed: set[Node] = set()
    known: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not all(n in weights or n in computed for n in node.all_input_nodes):
            continue
        reason = "it is written to" if node in written else _reason(node)
        if reason and node.all_input_nodes:
            left[node] = reason
        if not reason:
            same = known.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
            if same is node:
                computed.add(node)
            else:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
    return Constants(weights, frozenset(computed), left)


def graph_of(results: Sequence[Node], found: Constants) -> tuple[GraphModule, list[Node]]:
    """A graph that computes ``results`` from weights, and checks what the model checks of these; and the weights."""
    graph, copies = Graph(), dict[Node, Node]()
    nodes = ancestors(results)
    nodes = sorted([*nodes, *checks(nodes, found)])
    weights = [node for node in nodes if node in found.sources]
    for node in weights:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta["val"] = node.meta["val"]
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    return GraphModule({}, graph), weights


def checks(nodes: Sequence[Node], found: Constants) -> list[Node]:
    """What gives nothing, and takes nothing but these: an assertion of the model's, or of torch.export's."""
    inside = set(nodes)
    return [n for n in found.computed if n.all_input_nodes and not n.users and inside.issuperset(n.all_input_nodes)]


def ancestors(nodes: Iterable[Node]) -> list[Node]:
    """These nodes and all that they are computed from, in the order of their graph."""
    found: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return sorted(found)


def shares(node: Node) -> bool:
    """Whether what the node gives lies in the memory of what it takes: a view, or a cast to what it is already."""
    if node.target is operator.getitem:
        (taken, _) = node.args
        return isinstance(taken, Node) and shares(taken)
    if not _may_share(node):
        return False
    taken, given = node.all_input_nodes[0].meta["val"], node.meta["val"]
    if not isinstance(given, torch.Tensor) or node.target is torch.ops.aten.detach.default:
        return True  # several parts, as of split
    if (taken.dtype, taken.device) != (given.dtype, given.device):
        return False
    source = torch.empty_strided(taken.shape, taken.stride(), dtype=taken.dtype, device="meta")
    try:
        made = cast("Any", node.target)(*torch.fx.map_arg(node.args, lambda _: source), **node.kwargs)
    except (RuntimeError, NotImplementedError, TypeError):  # it takes more than one tensor, or a device
        return True
    return made is source or made._base is source


def _may_share(node: Node) -> bool:
    """Whether an operator's schema says that what it gives may lie in the memory of what it takes."""
    returns = node.target._schema.returns if isinstance(node.target, OPERATOR) else ()
    return any(value.alias_info is not None for value in returns)


def _unify(sources: Mapping[Node, torch.Tensor]) -> None:
    """Let tied weights be one node."""
    first: dict[int, Node] = {}
    for node, tensor in sources.items():
        known = first.setdefault(id(tensor), node)
        if known is not node:
            node.replace_all_uses_with(known)


def _reason(node: Node) -> str:
    """Why what the node computes may not be computed once, or ""."""
    target = node.target
    if target is operator.getitem:
        return ""
    if not isinstance(target, OPERATOR):
        return "it is no operator of torch's"
    if torch.Tag.nondeterministic_seeded in target.tags:
        return "it draws random numbers"
    if target._schema.is_mutable:
        return "it writes to what it takes"
    if target.namespace not in KNOWN:
        return f"what else an operator of '{target.namespace}' does is not known"
    if "empty" in target.name():
        return "its memory holds whatever was there"
    given = _given(node)
    if any(given.get(name) is True for name in ("training", "train", "use_input_stats")):
        return "it is in training mode"
    if not all(isinstance(n, int) for value in values(node) for n in value.shape):
        return "its size is known only when it has run"
    return ""


def values(node: Node) -> list[torch.Tensor]:
    """Stand-ins of the tensors that a node gives."""
    given = node.meta.get("val")
    return [
        value for value in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(value, torch.Tensor)
    ]


def _written(graph: Graph) -> set[Node]:
    """Every node whose memory something in the graph writes to."""
    written: set[Node] = set()
    owners: dict[Node, Node] = {}  # of a view: what it is a view of

    def owner(node: Node) -> Node:
        while node in owners:
            node = owners[node]
        return node

    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        if node.target is operator.getitem or _may_share(node):
            for taken in node.all_input_nodes[:1]:
                owners[node] = taken
        if not isinstance(node.target, OPERATOR):
            if _may_write(node):
                written.update(map(owner, node.all_input_nodes))
        else:
            given = _given(node)
            for argument in node.target._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written.update(map(owner, _nodes(given.get(argument.name))))
    return {node for node in graph.nodes if owner(node) in written}


def _may_write(node: Node) -> bool:
    """Whether something that is no operator may write to what it takes: a graph inside it does, or nobody knows."""
    owner = node.graph.owning_module
    graphs = [] if owner is None else [n.target for n in node.all_input_nodes if n.op == "get_attr"]
    inner = [operator.attrgetter(str(name))(owner) for name in graphs]
    inside = [module.graph for module in inner if isinstance(module, GraphModule)]
    if node.target is operator.getitem:
        return False
    return not inside or any(n.op == "placeholder" for graph in inside for n in _written(graph))


def _given(node: Node) -> dict[str, object]:
    """What an operator is given, by the names in its schema."""
    known = node.target._schema.arguments if isinstance(node.target, OPERATOR) else ()
    return {**{argument.name: value for argument, value in zip(known, node.args, strict=False)}, **node.kwargs}


def _nodes(value: object) -> list[Node]:
    return [n for n in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(n, Node)]
