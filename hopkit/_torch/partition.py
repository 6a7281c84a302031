"""A function and its derivative as one graph, and that graph cut in two (torch/_functorch/partitioners.py).

What torch keeps there is imported where it is used: it loads torch's compiler, which AOTAutograd has loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode, dispatch_functionalize
from torch.autograd.graph import _engine_run_backward, get_gradient_edge
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from hopkit._torch import inductor, sizes
from hopkit._torch.autograd import needs_gradient
from hopkit._torch.casts import casting
from hopkit._torch.constant import Telling
from hopkit._torch.fakes import Stage, outside_modes, unfunctional
from hopkit._torch.watch import Substitute

Flat = Callable[[Sequence[object]], Sequence[object]]
Decompositions = Mapping[torch._ops.OpOverload, Callable[..., object]]


class OutsideError(Exception):
    """A derivative uses a tensor that the function was not given, where nothing can put another in its place."""


@dataclasses.dataclass(frozen=True)
class Joint:
    """What a function gives, and the gradients of its inputs, as one graph without mutation.

    Args:
        graph: Takes the function's inputs and gradients of its outputs; gives its outputs and gradients of its inputs.
        inputs: How many inputs the function has.
        outputs: How many outputs the function has.
        constant: The outputs that have no gradient.
    """

    graph: GraphModule
    inputs: int
    outputs: int
    constant: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a joint graph.

    Args:
        graph: Gives a tuple of what it computes, each value once.
        takes: The numbers of the inputs that the graph takes.
        gives: What the piece gives: numbers of ``[*inputs, *computed]``, sizes known outside, or None for nothing.
    """

    graph: GraphModule
    takes: tuple[int, ...]
    gives: tuple[int | torch.SymInt | None, ...]

    def run(self, call: Callable[[GraphModule, Sequence[object]], object], inputs: Sequence[object]) -> list[object]:
        """What the piece gives, where ``call`` runs its graph. A graph that computes nothing is not run."""
        computes = any(isinstance(number, int) and number >= len(inputs) for number in self.gives)
        computed = call(self.graph, [inputs[number] for number in self.takes]) if computes else ()
        values = [*inputs, *cast("Sequence[object]", computed)]
        return [values[number] if isinstance(number, int) else number for number in self.gives]


@dataclasses.dataclass(frozen=True)
class Cut:
    """A joint graph in two pieces.

    Args:
        joint: The graph.
        saved: What is saved, by name.
        given: The outputs whose gradients the gradients of the inputs depend on.
        forward: Takes the inputs; gives the outputs, and then what is saved.
        backward: Takes what is saved, and then the gradients of ``given``; gives the gradients of the inputs.
    """

    joint: Joint
    saved: tuple[str, ...]
    given: tuple[int, ...]
    forward: Piece
    backward: Piece


def trace(
    run: Flat,
    inputs: Sequence[object],
    fakes: Sequence[object],
    gradients: Mapping[int, torch.Tensor],
    stage: Stage,
    decompositions: Decompositions,
) -> Joint:
    """The joint graph of ``run``. Call it on ``stage``.

    Args:
        run: A function of its inputs. It may hold on to those of the call that is being recorded.
        inputs: Those of the call that is being recorded.
        fakes: Stand-ins of them. The gradients are by those that require one.
        gradients: Stand-ins of gradients of the outputs, by number.
        stage: Where the stand-ins are from.
        decompositions: As `make_fx` takes them.

    Raises:
        OutsideError: The gradients depend on what ``run`` was not given.
    """
    both = _Both(run, inputs, [i for i, fake in enumerate(fakes) if needs_gradient([fake])], list(gradients), stage)
    # Autograd sees the function as it is written, and only what it does is made functional.
    functional = dispatch_functionalize(both, FunctionalTensorMode())
    with preserve_node_meta(False):  # what is said of the operators around the call, as checkpointing does
        module = make_fx(functional, decompositions)(*fakes, *gradients.values())
    names = [*(f"primals_{i}" for i in range(len(fakes))), *(f"{_GRADIENT}{i}" for i in gradients)]
    for node, name in zip(module.graph.find_nodes(op="placeholder"), names, strict=True):
        node.name = node.target = name  # the partitioner goes by these names
    module = _without_copies(module)
    if inductor.compiling():
        with outside_modes():
            module = inductor.simplified(module)
    return Joint(module, len(inputs), both.count, both.constant)


_GRADIENT = "tangents_"


class _Both:
    """A function and its gradients as one function: of its inputs, and of gradients of the outputs ``given``."""

    def __init__(self, run: Flat, inputs: Sequence[object], wrt: Sequence[int], given: Sequence[int], stage: Stage):
        self._run, self._wrt, self._given, self._stage = run, wrt, given, stage
        self._inputs = len(inputs)
        self._numbers = {id(value): number for number, value in enumerate(inputs)}
        self.count = 0
        self.constant = frozenset[int]()

    def __call__(self, *values: object) -> tuple[object, ...]:
        inputs, gradients = values[: self._inputs], values[self._inputs :]

        def replaced(value: object) -> object:
            if id(value) in self._numbers:
                return inputs[self._numbers[id(value)]]
            if isinstance(value, FunctionalTensor) and self._outside(value):
                raise OutsideError
            return value

        with Substitute(replaced):  # backward, too, may use what a subgraph closes over
            with Telling():  # the forward half may be differentiated as part of another graph
                outputs = self._run(inputs)
            return (*outputs, *self._gradients(inputs, outputs, gradients))

    def _gradients(
        self, inputs: Sequence[object], outputs: Sequence[object], gradients: Sequence[object]
    ) -> Sequence[object]:
        sources = tuple(cast("torch.Tensor", inputs[i]) for i in self._wrt)
        varying = {i: o for i, o in enumerate(outputs) if isinstance(o, torch.Tensor) and o.requires_grad}
        self.count, self.constant = len(outputs), frozenset(range(len(outputs))).difference(varying)
        if any(map(self._outside, _ends(varying.values(), sources))):
            raise OutsideError
        pairs = [(varying[i], gradient) for i, gradient in zip(self._given, gradients, strict=True) if i in varying]
        if not pairs:
            return [None] * len(sources)
        with casting({}):
            # Not `torch.autograd.grad`, which would turn the substitution off while it runs.
            return _engine_run_backward(
                tuple(output for output, _ in pairs),
                tuple(gradient for _, gradient in pairs),
                False,  # retain_graph
                False,  # create_graph
                sources,
                True,  # allow_unused
                accumulate_grad=False,
            )

    def _outside(self, value: object) -> bool:
        return not (isinstance(value, torch.Tensor) and self._stage.owns(unfunctional(value)))


def _ends(outputs: Iterable[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Iterator[object]:
    """What ``outputs`` have gradients for besides ``inputs``: leaves, and None for what has no name."""
    seen = {get_gradient_edge(value).node for value in inputs}
    pending = [output.grad_fn for output in outputs]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)
        if not node.next_functions:
            yield getattr(node, "variable", None)


def _without_copies(module: GraphModule) -> GraphModule:
    """Every value has one name: nothing is detached any more, and what is computed twice is computed once."""
    from torch._functorch.compile_utils import fx_graph_cse

    for target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
        for node in module.graph.find_nodes(op="call_function", target=target):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    return GraphModule(module, fx_graph_cse(module.graph))


def cut(joint: Joint) -> Cut:
    """Let torch choose what is saved, and what is cheap enough to be computed again."""
    from torch._functorch import config
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    # A view that is saved would be an output of the op.
    with (
        outside_modes(),
        _known_mode(joint.graph),
        config.patch(recompute_views=True),
        _floats_saved(joint.graph) as graphs,
    ):
        forward, backward = min_cut_rematerialization_partition(joint.graph, None, num_fwd_outputs=joint.outputs)
        graphs += [forward, backward]
    computed = _outputs(forward)
    kept = {node.name: node for node in filter(None, computed[joint.outputs :])}
    taken = [node.name for node in backward.graph.find_nodes(op="placeholder")]
    # The state of a generator, for what is drawn again, has another name in backward.
    renamed = iter([node for name, node in kept.items() if name not in taken])
    kept.update({name: next(renamed) for name in taken if name not in kept and not name.startswith(_GRADIENT)})
    for node in backward.graph.find_nodes(op="placeholder"):
        if not node.users:
            backward.graph.erase_node(node)
    taken = [node.name for node in backward.graph.find_nodes(op="placeholder")]
    saved = [name for name in taken if not name.startswith(_GRADIENT)]
    return Cut(
        joint,
        tuple(saved),
        tuple(int(name.removeprefix(_GRADIENT)) for name in taken[len(saved) :]),
        _piece(forward, [*computed[: joint.outputs], *(kept[name] for name in saved)]),
        _piece(backward, _outputs(backward)),
    )


@contextlib.contextmanager
def _floats_saved(module: GraphModule) -> Iterator[list[GraphModule]]:
    """Inside, symbolic floats among the inputs pass for integers: torch saves no float, for each of its own is the one
    number of a tensor. Gives the graphs in which they are floats again afterwards.
    """
    graphs, inputs = [module], {node.name: node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")}
    floats = {name: value for name, value in inputs.items() if isinstance(value, torch.SymFloat)}

    def tell(values: Mapping[str, object]) -> None:
        for node in (node for graph in graphs for node in graph.graph.nodes if node.name in values):
            node.meta["val"] = values[node.name]

    tell({name: torch.sym_int(value) for name, value in floats.items()})
    try:
        yield graphs
    finally:
        tell(floats)


@contextlib.contextmanager
def _known_mode(module: GraphModule) -> Iterator[None]:
    """Inside, torch finds the mode of a graph's stand-ins, which it needs for draws that are to be made again."""
    values = [node.meta.get("val") for node in module.graph.nodes]
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    known = TracingContext.try_get() is None and bool(modes)
    with tracing(TracingContext(modes[0])) if known else contextlib.nullcontext():
        yield


def again(cut: Cut, joint: Joint) -> Piece | None:
    """The backward piece for other gradients. None: what is saved is not enough for it.

    Args:
        cut: A cut through the same function.
        joint: The function's joint graph for those gradients.
    """
    nodes = {node.name: node for node in joint.graph.graph.nodes}
    if any(name not in nodes for name in cut.saved) or _history(joint, cut.saved) != _history(cut.joint, cut.saved):
        return None
    taken = [*(nodes[name] for name in cut.saved), *joint.graph.graph.find_nodes(op="placeholder")[joint.inputs :]]
    wanted = _outputs(joint.graph)[joint.outputs :]
    graph = _between(joint.graph, taken, wanted)
    return None if graph is None else _piece(graph, _outputs(graph))


def _history(joint: Joint, names: Sequence[str]) -> list[tuple[object, ...]]:
    """How the values of these names are computed."""
    pending = [node for node in joint.graph.graph.nodes if node.name in names]
    behind = set()
    while pending:
        node = pending.pop()
        if node not in behind:
            behind.add(node)
            pending.extend(node.all_input_nodes)
    return [(n.name, n.target, str(n.args), str(n.kwargs)) for n in joint.graph.graph.nodes if n in behind]


def _between(module: GraphModule, taken: Sequence[Node], wanted: Sequence[Node | None]) -> GraphModule | None:
    """The part of a graph that computes ``wanted`` from ``taken``, or None where it would have to draw or take more."""
    graph, copies = Graph(), dict[Node, Node]()
    for node in taken:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    pending, needed = [node for node in wanted if node], set[Node]()
    while pending:
        node = pending.pop()
        if node in copies or node in needed:
            continue
        if node.op == "placeholder" or node.is_impure():
            return None
        needed.add(node)
        pending.extend(node.all_input_nodes)
    for node in module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(node and copies[node] for node in wanted))
    return GraphModule(module, graph)


def _outputs(module: GraphModule) -> list[Node | None]:
    (output,) = module.graph.find_nodes(op="output")
    return list(cast("tuple[Node | None, ...]", output.args[0]))


def _piece(module: GraphModule, wanted: Sequence[Node | None]) -> Piece:
    """A graph as a piece that gives ``wanted``, nodes of it."""
    inputs = module.graph.find_nodes(op="placeholder")
    numbers = {node: number for number, node in enumerate(inputs)}
    gives: list[int | torch.SymInt | None] = []
    for node in wanted:
        size = node.meta.get("val") if node else None
        if isinstance(size, torch.SymInt) and not sizes.unbacked(size):
            gives.append(size)
        else:
            gives.append(None if node is None else numbers.setdefault(node, len(numbers)))
    (output,) = module.graph.find_nodes(op="output")
    output.args = (tuple(numbers)[len(inputs) :],)
    module.graph.eliminate_dead_code()
    takes = tuple(number for number, node in enumerate(inputs) if node.users)
    for node in inputs:
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return Piece(module, takes, tuple(gives))
