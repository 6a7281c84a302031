"""Programs without hopkit: every node of an op replaced by what its body does."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from hopkit import kit
from hopkit._torch import dynamo, sizes, trees
from hopkit._torch.operator import Operator
from hopkit._torch.retrace import Lost, annotate, rebind, retrace
from hopkit.call import Call
from hopkit.deciding import no_value
from hopkit.errors import AutogradError, CallError, DataDependentError, HopkitError, UnknownOpError
from hopkit.op import AnyOp, decompose

if TYPE_CHECKING:
    from types import FunctionType

    from torch.export import ExportedProgram
    from torch.export.graph_signature import ExportGraphSignature


@overload
def flatten(program: GraphModule, /, *example_inputs: object) -> GraphModule: ...
@overload
def flatten(program: ExportedProgram, /) -> ExportedProgram: ...
def flatten(program: GraphModule | ExportedProgram, /, *example_inputs: object) -> GraphModule | ExportedProgram:
    """``program`` with every node of an op replaced by the op's body, for what knows no operators but torch's.

    That goes for nested graphs too, such as the branches of ``torch.cond``. While gradients are enabled, the result has
    the gradients of ``program`` or there is an error; under ``torch.no_grad()`` values alone count.

    Flatten before compiling: in a function that torch.compile reads, the call breaks the graph.

    Args:
        program: A graph, or an exported program. It stays as it is, and the result shares its tensors.
        example_inputs: What a graph takes that has lost its metadata (``node.meta["val"]``), as a pickled one has.

    Returns:
        A program of the same type. Who runs or loads it need not know hopkit.

    Raises:
        CallError: It is neither.
        AutogradError: Its gradients would be others.
        DataDependentError: A body decides on a tensor's value.
        HopkitError: A body has an effect, the metadata is missing, or torch has wrapped the op in one of its own.
    """
    if torch.compiler.is_dynamo_compiling():
        dynamo.leave(
            "hopkit.flatten() changes a graph, which no graph can do. Flatten before compiling, and call that."
        )
    if not isinstance(program, GraphModule):
        return _flatten_program(_checked(program))
    module = _copied(program)
    if example_inputs:
        annotate(module, example_inputs)
    _flatten(module)
    return module


dynamo.skip(cast("FunctionType", flatten))  # after a graph break Dynamo would read hopkit's frames


def _checked(program: object) -> ExportedProgram:
    from torch.export import ExportedProgram  # loads torch's compiler; who has such a program has loaded it

    if not isinstance(program, ExportedProgram):
        raise CallError(
            "hopkit.flatten()",
            f"expected a torch.fx.GraphModule or a torch.export.ExportedProgram, got {program!r}",
            why="nodes of ops are in graphs alone",
            todo="Record the function first: `make_fx(f)(*inputs)`, or `torch.export.export(module, inputs)`",
        )
    return program


def _flatten_program(program: ExportedProgram) -> ExportedProgram:
    module = _copied(program.graph_module)
    replaced = _flatten(module, functional=program.dialect != "TRAINING")
    signature = copy.deepcopy(program.graph_signature)
    calls = [
        dataclasses.replace(call, signature=_copied_signature(call.signature)) for call in program.module_call_graph
    ]
    for old, new in replaced.items():
        signature.replace_all_uses(old.name, new.name)
        for call in calls:
            if call.signature is not None:
                call.signature.replace_all_uses_with(old, new)
    state, constants = dict(program.state_dict), dict(program.constants)
    _lift(module, signature, state, constants)
    return type(program)(
        module,
        module.graph,
        signature,
        state,
        program.range_constraints,
        calls,
        program.example_inputs,
        constants,
        verifiers=program.verifiers,
    )


def _copied(module: GraphModule) -> GraphModule:
    """A copy that shares all tensors, with nodes of the same names."""
    tensors = [t for m in module.modules() for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    tensors += [t for m in module.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    result = copy.deepcopy(module, {id(t): t for t in tensors})
    for old, new in zip(module.modules(), result.modules(), strict=True):
        if isinstance(old, GraphModule) and isinstance(new, GraphModule):
            for before, after in zip(old.graph.nodes, new.graph.nodes, strict=True):
                after.name = before.name  # torch renames what is called as a builtin, such as an "input"
            new.recompile()
    return result


def _copied_signature(signature: Any) -> Any:
    # The specs in it are shared: torch warns when they are copied.
    if signature is None:
        return None
    inputs, outputs = (list(map(copy.copy, arguments)) for arguments in (signature.inputs, signature.outputs))
    return dataclasses.replace(signature, inputs=inputs, outputs=outputs)


# -- one graph, and those inside it ----------------------------------------------------------------------------------


def _flatten(module: GraphModule, *, functional: bool = False) -> dict[Node, Node]:
    """Replace every node of an op, in place; gives what stands for which in the outermost graph.

    Args:
        module: A graph.
        functional: Whether to write no mutation into it.
    """
    ops = dict(_operators())
    replaced: dict[Node, Node] = {}
    with decompose(*ops.values()) if ops else contextlib.nullcontext():
        _flatten_module(module, ops, functional, replaced)
    return replaced


def _operators() -> Iterator[tuple[object, AnyOp]]:
    for newest in kit.current().ops.values():
        op: AnyOp | None = newest
        while op is not None:
            yield op.operator, op
            op = op.before


def _flatten_module(
    module: torch.nn.Module, ops: Mapping[object, AnyOp], functional: bool, replaced: dict[Node, Node]
) -> None:
    if isinstance(module, GraphModule):
        nodes = [node for node in module.graph.nodes if any(isinstance(v, Operator) for v in (node.target, *node.args))]
        names = {id(t): name for name, t in _tensors(module)} if nodes else {}
        graphs = [cast("Node", graph) for node in nodes for graph in node.args[:-1]]
        for node in nodes:
            result = _inline(module, node, _call(module, node, ops), names, functional)
            rebind(node, result)
            _replace(node, result, replaced)
        if nodes:
            _tidy(module, dict.fromkeys(graphs))
    for child in module.children():
        _flatten_module(child, ops, functional, {})


def _call(module: GraphModule, node: Node, ops: Mapping[object, AnyOp]) -> Call:
    """The call that a node records, on stand-ins."""
    if not isinstance(node.target, Operator):
        raise HopkitError(
            f"node '{node.name}'",
            f"holds an op within torch's own {node.target}",
            why="its body alone is not what that operator does",
            todo="Flatten the program before torch makes it functional",
        )
    if node.target not in ops:
        raise UnknownOpError(
            f"op '{node.target}' of node '{node.name}'",
            "is not defined here any more",
            why="its body stands in the node's place",
            todo="Import the package that defines it, and load the program again",
        )
    *graphs, inputs = node.args
    modules = [_attribute(module, graph) for graph in graphs]
    for inner in (inner for graph in modules for inner in graph.modules() if isinstance(inner, GraphModule)):
        inner.graph.eliminate_dead_code()  # torch 2.13 writes a detach for what autograd saves, and nobody uses it
        inner.recompile()
    values = map_arg(inputs, lambda given: _value(module, node, given))
    call = ops[node.target].decode(*modules, values, **node.kwargs)
    if call.op.effectful:
        raise HopkitError(
            f"op '{call.op.name}'",
            "has an effect, and cannot be flattened",
            why="a graph has only what its operators compute",
            todo="Keep the node, or run the body in its place while you record: `with hopkit.decompose(op)`",
        )
    return call


def _value(module: GraphModule, node: Node, given: Node) -> Any:
    for key in ("val", "example_value"):
        if key in given.meta:
            return given.meta[key]
    if given.op == "get_attr":
        return _attribute(module, given)
    raise HopkitError(
        f"node '{node.name}'",
        f"has an input '{given.name}' whose shape nobody knows: there is no metadata",
        why="the body is traced on stand-ins of the node's inputs",
        todo="Give what the graph takes, `hopkit.flatten(graph, *example_inputs)`, or record it again",
    )


def _attribute(module: GraphModule, node: object) -> Any:
    return operator.attrgetter(str(cast("Node", node).target))(module)


def _inline(module: GraphModule, node: Node, call: Call, names: Mapping[int, str], functional: bool) -> object:
    """Write what a call does before its node; gives the new nodes of its result."""
    new = _traced(call, functional)
    origin = {key: value for key, value in node.meta.items() if key not in _OF_A_VALUE}
    inputs = trees.leaves(node.args[-1])
    places: dict[Node, Any] = dict(zip(new.graph.find_nodes(op="placeholder"), inputs, strict=True))
    (output,) = new.graph.find_nodes(op="output")
    with module.graph.inserting_before(node):
        for step in new.graph.nodes:
            if step is output or step in places:
                continue
            if step.op == "get_attr":
                value = _attribute(new, step)
                places[step] = module.graph.get_attr(names.get(id(value)) or _add(module, step.target, value))
            else:
                places[step] = module.graph.node_copy(step, places.__getitem__)
            places[step].meta = {**origin, **step.meta}
            if "example_value" in node.meta and "val" in step.meta:
                places[step].meta["example_value"] = step.meta["val"]
    return map_arg(output.args[0], places.__getitem__)


_OF_A_VALUE = {"val", "example_value", "tensor_meta", "unbacked_bindings"}
"""The metadata that says what a node gives. The rest says where it comes from, and goes for what replaces it."""


def _traced(call: Call, functional: bool) -> GraphModule:
    def run(*inputs: object) -> object:
        return call.replace(inputs=inputs).run()

    try:
        written = () if call.transformed else call.declared
        return retrace(run, call.inputs, derivative=call.derivative, functional=functional, written=written)
    except Lost as lost:
        raise AutogradError(
            f"op '{call.op.name}'",
            f"cannot be flattened with its gradients: {lost.reason}",
            why="a graph does not say so, and would have other gradients",
            todo="Flatten under torch.no_grad(), for inference alone, or keep the node",
        ) from lost
    except Exception as error:
        asked = error.__cause__ if isinstance(error, DataDependentError) else error
        if not (isinstance(asked, Exception) and sizes.data_dependent(asked)):
            raise
        raise no_value(
            call.op.name,
            "cannot be flattened",
            asked,
            why="a graph has one way through it",
            todo="Keep the node, or let the body decide with torch.cond or torch.while_loop",
        ) from error


def _replace(node: Node, result: Any, replaced: dict[Node, Node]) -> None:
    """Put a value in the place of a node, and its items in the place of those that are taken from the node."""
    for user in list(node.users):
        if user.target is operator.getitem and not isinstance(result, Node):
            _replace(user, result[user.args[1]], replaced)
        else:
            user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda n: result if n is node else n)
    if isinstance(result, Node):
        replaced[node] = result
    node.graph.erase_node(node)


# -- attributes ------------------------------------------------------------------------------------------------------


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _add(module: torch.nn.Module, name: object, value: Any) -> str:
    """Make ``value`` an attribute of this name, or the next that is free."""
    free, count = str(name), 0
    while hasattr(module, free):
        count += 1
        free = f"{name}_{count}"
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        module.register_buffer(free, value)
    else:
        setattr(module, free, value)
    return free


def _tidy(module: GraphModule, graphs: Iterable[Node]) -> None:
    """Drop the graphs of nodes that are gone. What is used of their tensors stays, under its name."""
    for graph in graphs:
        if not graph.users:
            module.graph.erase_node(graph)
    used = {str(node.target): node for node in module.graph.find_nodes(op="get_attr")}
    for target in dict.fromkeys(str(graph.target) for graph in graphs):
        if target not in used:
            kept = {name: _attribute(module, node) for name, node in used.items() if name.startswith(f"{target}.")}
            module.delete_submodule(target)
            for name, value in kept.items():
                *path, last = name.split(".")
                owner: torch.nn.Module = module
                for part in path:
                    if not hasattr(owner, part):
                        owner.add_module(part, torch.nn.Module())
                    owner = getattr(owner, part)
                _add(owner, last, value)
    module.graph.lint()
    module.recompile()


def _lift(
    module: GraphModule, signature: ExportGraphSignature, state: dict[str, Any], constants: dict[str, Any]
) -> None:
    """Make inputs of the tensors in a graph, as it is in an exported program: they come before the user's."""
    from torch.export.graph_signature import InputKind, InputSpec, TensorArgument  # it has loaded torch.export

    specs = signature.input_specs
    for node in module.graph.find_nodes(op="get_attr"):
        value = _attribute(module, node)
        if isinstance(value, torch.Tensor):
            is_parameter = isinstance(value, torch.nn.Parameter)
            kind, store = (InputKind.PARAMETER, state) if is_parameter else (InputKind.CONSTANT_TENSOR, constants)
            name, count = str(node.target), 0
            while name in store:
                count += 1
                name = f"{node.target}_{count}"
            store[name] = value
            first = next((i for i, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT), len(specs))
            with module.graph.inserting_before(list(module.graph.nodes)[first]):
                lifted = module.graph.placeholder(f"{'p' if is_parameter else 'c'}_{name.replace('.', '_')}")
            lifted.meta = {"val": node.meta["val"]}
            specs.insert(first, InputSpec(kind, TensorArgument(lifted.name), name))
            node.replace_all_uses_with(lifted)
            module.graph.erase_node(node)
    module.recompile()
