"""The columns of the matrix: each runs one sample of an op in one mode, and says what to compare with the body.

A column gets the callable that it runs, since it runs twice where the op fails: if the body itself cannot be run in
this mode, in plain PyTorch, there is nothing that the op could be compared with.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, cast

import torch
from functorch.compile import aot_function, make_boxed_func  # type: ignore[import-untyped] # torch's own
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from hopkit._torch import trees
from hopkit._torch.fakes import FakeMode
from hopkit.op import AnyOp
from hopkit.spec import Kind, Sample
from hopkit.testing.compare import Pair, difference

Callee = Callable[..., object]
Run = Callable[..., object]
"""A function of the sample's tensors."""

Tensors = Sequence[torch.Tensor]
TracingMode = Literal["real", "fake", "symbolic"]


class NotApplicable(Exception):
    """The column says nothing about this sample; the message says why."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a column found: what to compare, the result first, and a remark."""

    pairs: Sequence[Pair]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: its name, the group of columns that it belongs to, and what it does."""

    name: str
    group: str
    run: Callable[[Case, Callee], Outcome]


COLUMNS: dict[str, Column] = {}


def _column(group: str) -> Callable[[Callable[[Case, Callee], Outcome]], Callable[[Case, Callee], Outcome]]:
    def add(run: Callable[[Case, Callee], Outcome]) -> Callable[[Case, Callee], Outcome]:
        COLUMNS[run.__name__] = Column(run.__name__, group, run)
        return run

    return add


# What a sample is to the columns


class Case:
    """One op on one sample, whose tensors are cloned for every run.

    Args:
        op: The op.
        sample: The call. A subgraph in it must not write to what it closes over.
    """

    def __init__(self, op: AnyOp, sample: Sample) -> None:
        self.op = op
        self.body: Callee = op.spec.body
        self._leaves, self._tree = trees.flatten((tuple(sample.args), dict(sample.kwargs)))
        found = {id(leaf): leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)}
        self._position = {key: i for i, key in enumerate(found)}
        self.tensors: Tensors = list(found.values())

    @property
    def derives(self) -> bool:
        """Whether the op has derivatives."""
        return self.op.spec.autograd == "derive"

    def arguments(self, tensors: Tensors) -> tuple[tuple[object, ...], dict[str, object]]:
        """The sample's ``(args, kwargs)``, with these tensors in it."""
        filled = [tensors[self._position[id(leaf)]] if id(leaf) in self._position else leaf for leaf in self._leaves]
        return cast("tuple[tuple[object, ...], dict[str, object]]", trees.unflatten(filled, self._tree))

    def on(self, callee: Callee) -> Run:
        """``callee`` as a function of the sample's tensors."""

        def run(*tensors: torch.Tensor) -> object:
            args, kwargs = self.arguments(tensors)
            return callee(*args, **kwargs)

        return run

    def clones(self, tensors: Tensors | None = None) -> list[torch.Tensor]:
        """The sample's tensors (or these), as new leaves."""
        source = self.tensors if tensors is None else tensors
        return [t.detach().clone().requires_grad_(t.requires_grad and self.derives) for t in source]

    def leaves(self, tensors: Tensors | None = None) -> list[torch.Tensor]:
        """As `clones`, to differentiate by: what the sample wants gradients of, or else whatever can have one."""
        source = self.tensors if tensors is None else tensors
        wanted = [t.requires_grad for t in self.tensors]
        wanted = wanted if any(wanted) else [differentiable(t) for t in self.tensors]
        return [t.detach().clone().requires_grad_(want) for t, want in zip(source, wanted, strict=True)]

    @functools.cached_property
    def others(self) -> list[list[torch.Tensor]]:
        """Other inputs of the same shapes, as far as the body takes them."""
        changed = [[change(t) for t in self.clones()] for change in (_smaller, _negated)]
        return [tensors for tensors in changed if self._accepts(tensors)]

    @functools.cached_property
    def resized(self) -> list[torch.Tensor] | None:
        """Inputs of another leading size: wherever that size occurs, one more. None where the body does not take it."""
        shapes = [t.shape for t in self.tensors if t.dim()]
        if not shapes or shapes[0][0] < 2:
            return None
        tensors = [_grown(t, shapes[0][0]) for t in self.clones()]
        return tensors if self._accepts(tensors) else None

    def _accepts(self, tensors: Tensors) -> bool:
        try:
            self.on(self.body)(*self.clones(tensors))
        except Exception:  # whatever the body raises, it does not take them
            return False
        return True


def differentiable(value: object) -> bool:
    """Whether this is a tensor of a dtype that has gradients."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _smaller(tensor: torch.Tensor) -> torch.Tensor:
    """Other values that are as good: a positive number stays one, an index stays in its range."""
    if differentiable(tensor):
        return (tensor.detach() * 0.875).requires_grad_(tensor.requires_grad)
    return tensor.flip(tuple(range(tensor.dim()))) if tensor.layout is torch.strided else tensor


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    """Values on the other side of zero, where a body may decide otherwise."""
    if differentiable(tensor):
        return (-tensor.detach()).requires_grad_(tensor.requires_grad)
    return ~tensor if tensor.dtype is torch.bool else tensor


def _grown(tensor: torch.Tensor, size: int) -> torch.Tensor:
    grown = tensor.detach()
    for dim in [d for d, n in enumerate(tensor.shape) if n == size]:
        grown = torch.cat([grown, grown.narrow(dim, 0, 1)], dim)
    return grown.requires_grad_(tensor.requires_grad)


def _slope(tensor: torch.Tensor) -> torch.Tensor:
    """A direction that is different in every element, so that no two can be confused."""
    steps = torch.linspace(0.5, 1.5, max(tensor.numel(), 1), dtype=torch.float64)[: tensor.numel()]
    return steps.reshape(tensor.shape).to(tensor.device, tensor.dtype)


def _seeded(run: Run, tensors: Tensors) -> object:
    torch.manual_seed(0)
    return run(*tensors)


def _detached(value: object) -> object:
    return trees.map_only(torch.Tensor, lambda t: t.detach(), value)


def _tensors(value: object) -> list[torch.Tensor]:
    return [leaf for leaf in trees.leaves(value) if isinstance(leaf, torch.Tensor)]


def _floats(value: object) -> list[torch.Tensor]:
    return [leaf for leaf in _tensors(value) if differentiable(leaf)]


# What is compared with the body


def _values(case: Case, run: Run, tensors: Tensors | None = None, *, want: Run | None = None) -> list[Pair]:
    """What ``run`` gives on clones of the tensors, and what is in them afterwards."""
    inputs, expected_inputs = case.clones(tensors), case.clones(tensors)
    expected = _seeded(want or case.on(case.body), expected_inputs)
    got = _seeded(run, inputs)
    return [
        Pair("the value", _detached(got), _detached(expected)),
        Pair("an operand afterwards", _detached(inputs), _detached(expected_inputs)),
    ]


def _metadata(got: object, want: object) -> Pair:
    return Pair("the result", got, want, values=False)


def _derivatives(case: Case, run: Run, *, second: bool = False) -> list[Pair]:
    """Values, and first (or second) derivatives by the operands and by whatever else the result depends on."""
    if not case.derives:
        raise NotApplicable(f'autograd="{case.op.spec.autograd}": it has no derivative')
    inputs, expected_inputs = case.leaves(), case.leaves()
    expected = _seeded(case.on(case.body), expected_inputs)
    captures = _captures(expected, expected_inputs)
    if not any(t.requires_grad for t in [*expected_inputs, *captures]):
        raise NotApplicable("nothing in this sample has a gradient")
    got = _seeded(run, inputs)
    backward = _second if second else _first
    return [
        Pair("the value", _detached(got), _detached(expected)),
        Pair("requires_grad", _requires_grad(got), _requires_grad(expected)),
        Pair(
            "a gradient",
            backward(got, [*inputs, *captures]),
            backward(expected, [*expected_inputs, *captures]),
            strides=False,
        ),
    ]


def _requires_grad(value: object) -> list[bool]:
    return [t.requires_grad for t in _tensors(value)]


def _captures(outputs: object, inputs: Tensors) -> list[torch.Tensor]:
    """What the result depends on besides the inputs: the other ends of its autograd graph."""
    pending = [t.grad_fn for t in _tensors(outputs)]
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


def _first(outputs: object, sources: Tensors) -> list[torch.Tensor]:
    results = [t for t in _floats(outputs) if t.requires_grad]
    return _grad(results, sources, [_slope(t) for t in results])


def _second(outputs: object, sources: Tensors) -> list[torch.Tensor]:
    # The directions are differentiated by as well: the second derivative of a linear op is there, and nowhere else.
    results = [t for t in _floats(outputs) if t.requires_grad]
    directions = [_slope(t).requires_grad_() for t in results]
    first = [t for t in _grad(results, sources, directions, create_graph=True) if t.requires_grad]
    return _grad(first, [*sources, *directions], [_slope(t) for t in first])


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


# Graphs


def _graph(case: Case, run: Run, tracing_mode: TracingMode = "real", *, pre_dispatch: bool = False) -> GraphModule:
    return make_fx(run, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)(*case.clones())


def _rerun(case: Case, graph: Run, *, want: Run | None = None) -> list[Pair]:
    """A graph on other inputs than it was recorded with."""
    return [pair for tensors in case.others for pair in _values(case, graph, tensors, want=want)]


def _kept(case: Case, *graphs: torch.nn.Module) -> str:
    """Whether the op is a node of the graphs."""
    modules = [m for graph in graphs for m in graph.modules() if isinstance(m, GraphModule)]
    count = sum(node.target is case.op.operator for m in modules for node in m.graph.nodes)
    return f"kept, {count} node{'s' if count > 1 else ''}" if count else "decomposed"


def _recorded(case: Case, callee: Callee, tracing_mode: TracingMode, *, pre_dispatch: bool = False) -> Outcome:
    graph = _graph(case, case.on(callee), tracing_mode, pre_dispatch=pre_dispatch)
    return Outcome(_rerun(case, graph), _kept(case, graph))


# The columns


@_column("device")
def eager(case: Case, callee: Callee) -> Outcome:
    """The call as it stands."""
    inputs, expected_inputs = case.clones(), case.clones()
    got, expected = _seeded(case.on(callee), inputs), _seeded(case.on(case.body), expected_inputs)
    flags = [Pair("requires_grad", _requires_grad(got), _requires_grad(expected))] if case.derives else []
    return Outcome([*_values(case, case.on(callee)), *flags])


@_column("device")
def no_grad(case: Case, callee: Callee) -> Outcome:
    """The call without gradients."""
    with torch.no_grad():
        flags = _requires_grad(_seeded(case.on(callee), case.clones()))
        return Outcome([*_values(case, case.on(callee)), Pair("requires_grad", any(flags), False)])


@_column("device")
def conj(case: Case, callee: Callee) -> Outcome:
    """Complex operands that are views which conjugate."""
    if not any(t.is_complex() for t in case.tensors):
        raise NotApplicable("no operand is complex")

    def lazily(*tensors: torch.Tensor) -> object:
        return case.on(callee)(*(t.conj().resolve_conj().conj() if t.is_complex() else t for t in tensors))

    return Outcome(_values(case, lazily))


@_column("device")
def neg(case: Case, callee: Callee) -> Outcome:
    """Real operands that are views which negate."""
    kinds = (torch.float32, torch.float64)
    if not any(t.dtype in kinds and t.layout is torch.strided for t in case.tensors):
        raise NotApplicable("no operand can be a view of the imaginary part of a complex tensor")

    def imaginary(run: Run, *, lazily: bool) -> Run:
        def view(t: torch.Tensor) -> torch.Tensor:
            if t.dtype not in kinds or t.layout is not torch.strided:
                return t
            zeros = torch.zeros_like(t)
            return torch.complex(zeros, -t).conj().imag if lazily else torch.complex(zeros, t).imag

        return lambda *tensors: run(*map(view, tensors))

    lazy, plain = imaginary(case.on(callee), lazily=True), imaginary(case.on(case.body), lazily=False)
    return Outcome(_values(case, lazy, want=plain))


@_column("device")
def meta(case: Case, callee: Callee) -> Outcome:
    """Operands on the meta device."""
    if not case.tensors:
        raise NotApplicable("it has no operand to put there")
    expected = _seeded(case.on(case.body), case.clones())
    got = _seeded(case.on(callee), [t.to("meta") for t in case.clones()])
    return Outcome([_metadata(got, trees.map_only(torch.Tensor, lambda t: t.to("meta"), expected))])


@_column("fake")
def fake(case: Case, callee: Callee) -> Outcome:
    """Operands that are fake tensors."""
    expected = _seeded(case.on(case.body), case.clones())
    with FakeMode(allow_non_fake_inputs=True) as mode:
        got = _seeded(case.on(callee), [mode.from_tensor(t) for t in case.clones()])
    fakes = [type(t).__name__ for t in _tensors(got)]
    return Outcome([_metadata(got, expected), Pair("the result", fakes, ["FakeTensor"] * len(fakes))])


@_column("autograd")
def grad(case: Case, callee: Callee) -> Outcome:
    """Gradients, or the error that the op's policy promises."""
    return Outcome(_derivatives(case, case.on(callee))) if case.derives else _policy(case, callee)


def _policy(case: Case, callee: Callee) -> Outcome:
    inputs, expected_inputs = case.leaves(), case.leaves()
    name, policy = case.op.spec.name, case.op.spec.autograd
    expected = _seeded(case.on(case.body), expected_inputs)
    if not any(_requires_grad(expected)):
        raise NotApplicable("nothing in this sample has a gradient")
    pairs: list[Pair] = []
    try:
        got = _seeded(case.on(callee), inputs)
        pairs = [Pair("the value", _detached(got), _detached(expected))]
        # Not `_grad`: an output that is cut off from the inputs raises only where backward runs it.
        results = _floats(got)
        torch.autograd.backward(results, [_slope(t) for t in results])
        raised = "no error"
    except RuntimeError as error:
        raised = str(error)
    promised = f"Autograd not implemented for {name}" if policy == "deferred_error" else f"op '{name}'"
    where = "in backward" if pairs else "at the call"
    found = Pair(
        "the error",
        (where, promised if promised in raised else raised),
        ("in backward" if policy == "deferred_error" else "at the call", promised),
    )
    return Outcome([*pairs, found], f'raises {where}, as autograd="{policy}" says')


@_column("autograd")
def gradgrad(case: Case, callee: Callee) -> Outcome:
    """Second derivatives."""
    return Outcome(_derivatives(case, case.on(callee), second=True))


@_column("autograd")
def forward_mode(case: Case, callee: Callee) -> Outcome:
    """Tangents of dual numbers."""
    inputs, run = case.clones(), case.on(callee)
    expected, directions = _directional(case)
    with forward_ad.dual_level():
        chosen = iter(directions)
        duals = [forward_ad.make_dual(t.detach(), next(chosen)) if differentiable(t) else t for t in inputs]
        results = [forward_ad.unpack_dual(t) for t in _floats(_seeded(run, duals))]
        tangents = [torch.zeros_like(p) if t is None else t for p, t in results]
        values = [p for p, _ in results]
    return Outcome([Pair("the value", values, expected[0]), Pair("a tangent", tangents, expected[1], strides=False)])


@_column("functionalize")
def functionalize(case: Case, callee: Callee) -> Outcome:
    """The call without mutation."""
    return Outcome(_values(case, torch.func.functionalize(case.on(callee))))


@_column("functionalize")
def functionalize_make_fx(case: Case, callee: Callee) -> Outcome:
    """The call without mutation, as a graph."""
    graph = _graph(case, torch.func.functionalize(case.on(callee)))
    return Outcome(_rerun(case, graph), _kept(case, graph))


@_column("proxy")
def make_fx_real(case: Case, callee: Callee) -> Outcome:
    """As a graph, from real tensors."""
    return _recorded(case, callee, "real")


@_column("proxy")
def make_fx_fake(case: Case, callee: Callee) -> Outcome:
    """As a graph, from fake tensors."""
    return _recorded(case, callee, "fake")


@_column("proxy")
def make_fx_symbolic(case: Case, callee: Callee) -> Outcome:
    """As a graph with symbolic sizes, run on another size too."""
    graph = _graph(case, case.on(callee), "symbolic")
    pairs, kept = _rerun(case, graph), _kept(case, graph)
    if case.resized is None:
        return Outcome(pairs, f"{kept}; no other size fits the sample")
    if _differs(case, graph, case.resized) and _fixes_size(case, case.resized):
        return Outcome(pairs, f"{kept}; the body fixes the size")
    return Outcome([*pairs, *_values(case, graph, case.resized)], f"{kept}; two sizes")


def _fixes_size(case: Case, resized: Tensors) -> bool:
    """Whether torch's own graph of the body is no better on another size."""
    return _differs(case, _graph(case, case.on(case.body), "symbolic"), resized)


def _differs(case: Case, graph: Run, tensors: Tensors) -> bool:
    try:
        return any(difference(pair)[1] for pair in _values(case, graph, tensors))
    except Exception:  # a graph may say in any way that it was not recorded for this
        return True


@_column("proxy")
def make_fx_pre_dispatch(case: Case, callee: Callee) -> Outcome:
    """As a graph, from above autograd."""
    return _recorded(case, callee, "real", pre_dispatch=True)


@_column("proxy")
def training(case: Case, callee: Callee) -> Outcome:
    """Forward and backward as one graph."""
    if not case.derives:
        raise NotApplicable(f'autograd="{case.op.spec.autograd}": it has no derivative')
    if not any(t.requires_grad for t in case.leaves()):
        raise NotApplicable("no operand has a gradient")

    def step(callee: Callee) -> Run:
        def run(*tensors: torch.Tensor) -> object:
            outputs = case.on(callee)(*tensors)
            return _detached(outputs), _first(outputs, [t for t in tensors if t.requires_grad])

        return run

    graph = make_fx(step(callee))(*case.leaves())
    pairs = []
    for tensors in case.others:
        inputs, expected_inputs = case.leaves(tensors), case.leaves(tensors)
        (value, gradients) = cast("tuple[object, object]", _seeded(graph, inputs))
        (expected, wanted) = cast("tuple[object, object]", _seeded(step(case.body), expected_inputs))
        pairs += [Pair("the value", value, expected), Pair("a gradient", gradients, wanted, strides=False)]
    return Outcome(pairs, _kept(case, graph))


@_column("proxy")
def copies(case: Case, callee: Callee) -> Outcome:
    """A deep copy and a pickle of the graph."""
    graph = _graph(case, case.on(callee))
    copied, pickled = copy.deepcopy(graph), cast("GraphModule", pickle.loads(pickle.dumps(graph)))
    return Outcome([*_rerun(case, copied), *_rerun(case, pickled)], _kept(case, copied))


@_column("proxy")
def twice(case: Case, callee: Callee) -> Outcome:
    """Two calls in one trace, on different values."""

    def both(callee: Callee) -> Run:
        run = case.on(callee)
        return lambda *tensors: (run(*tensors), run(*map(_smaller, tensors)))

    graph = _graph(case, both(callee))
    return Outcome(_rerun(case, graph, want=both(case.body)), _kept(case, graph))


@_column("proxy")
def nested(case: Case, callee: Callee) -> Outcome:
    """The op inside a subgraph of itself, eagerly and as a graph."""
    first = case.op.spec.of_kind(Kind.SUBGRAPH, Kind.SUBGRAPHS)[0]
    if first.graph_only:
        raise NotApplicable(f"'{first.name}' is always a graph, and no graph calls the op")
    run, want = _inside_itself(case, callee), _inside_itself(case, case.body)
    graph = _graph(case, run)
    return Outcome([*_values(case, run, want=want), *_rerun(case, graph, want=want)], _kept(case, graph))


def _inside_itself(case: Case, callee: Callee) -> Run:
    """The call, with its first subgraph made to call the op once more and to add the mean of what that gives."""

    def run(*tensors: torch.Tensor) -> object:
        leaves, tree = trees.flatten(case.arguments(tensors))
        index = next(i for i, leaf in enumerate(leaves) if callable(leaf))
        subgraph = cast("Callee", leaves[index])

        def outer(*args: object, **kwargs: object) -> object:
            means = [t.detach().mean() for t in _floats(case.on(callee)(*tensors))]
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


@_column("aot")
def aot(case: Case, callee: Callee) -> Outcome:
    """AOTAutograd, forward."""
    graphs: list[GraphModule] = []
    with torch.no_grad():
        pairs = _values(case, _ahead(case, callee, graphs))
    return Outcome(pairs, _kept(case, *graphs))


@_column("aot")
def aot_grad(case: Case, callee: Callee) -> Outcome:
    """AOTAutograd, forward and backward."""
    graphs: list[GraphModule] = []
    pairs = _derivatives(case, _ahead(case, callee, graphs))
    return Outcome(pairs, _kept(case, *graphs))


def _ahead(case: Case, callee: Callee, graphs: list[GraphModule]) -> Run:
    structure: list[trees.Tree] = []

    def flat(*tensors: torch.Tensor) -> list[object]:
        # aot_function makes a list of a tuple.
        leaves, tree = trees.flatten(case.on(callee)(*tensors))
        structure.append(tree)
        return leaves

    def keep(graph: GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return cast("Callable[..., object]", make_boxed_func(graph.forward))

    compiled = cast("Callable[..., Iterable[object]]", aot_function(flat, fw_compiler=keep))
    return lambda *tensors: trees.unflatten(list(compiled(*tensors)), structure[-1])


@_column("dynamo")
def compiled(case: Case, callee: Callee) -> Outcome:
    """torch.compile, forward."""
    with torch.no_grad():
        return Outcome(_values(case, _compiled(case, callee)))


@_column("dynamo")
def compiled_grad(case: Case, callee: Callee) -> Outcome:
    """torch.compile, forward and backward."""
    return Outcome(_derivatives(case, _compiled(case, callee)))


def _compiled(case: Case, callee: Callee) -> Run:
    torch.compiler.reset()

    def entry(args: Iterable[object], kwargs: dict[str, object]) -> object:
        return callee(*args, **kwargs)

    run = torch.compile(entry, backend="aot_eager", fullgraph=True)
    return lambda *tensors: run(*case.arguments(tensors))


@_column("func")
def vmap(case: Case, callee: Callee) -> Outcome:
    """A batch of two, against two calls."""
    if case.op.spec.random:
        raise NotApplicable("it draws random numbers, and others for a batch than for two calls")
    if not case.tensors or not case.others:
        raise NotApplicable("there is nothing to batch")
    both = (case.clones(), case.others[0])
    expected = [_tensors(_detached(case.on(case.body)(*case.clones(tensors)))) for tensors in both]
    batches = [torch.stack(pair) for pair in zip(*both, strict=True)]
    got = _tensors(_detached(torch.vmap(case.on(callee))(*batches)))
    return Outcome([Pair("the value", got, [torch.stack(pair) for pair in zip(*expected, strict=True)], strides=False)])


@_column("func")
def jvp(case: Case, callee: Callee) -> Outcome:
    """``torch.func.jvp``."""
    (values, tangents), directions = _directional(case)
    run, chosen = _of_floats(case, case.on(callee))
    got = torch.func.jvp(run, tuple(t.detach() for t in chosen), tuple(directions))
    return Outcome([Pair("the value", list(got[0]), values), Pair("a tangent", list(got[1]), tangents, strides=False)])


@_column("func")
def vjp(case: Case, callee: Callee) -> Outcome:
    """``torch.func.vjp``."""
    run, chosen = _of_floats(case, case.on(callee))
    body, leaves = _of_floats(case, case.on(case.body))
    leaves = [t.detach().requires_grad_() for t in leaves]
    expected = body(*leaves)
    got, pull = cast("tuple[Tensors, Callable[..., Tensors]]", torch.func.vjp(run, *(t.detach() for t in chosen)))
    return Outcome(
        [
            Pair("the value", _detached(list(got)), _detached(list(expected))),
            Pair("a gradient", list(pull(tuple(map(_slope, got)))), _first(expected, leaves), strides=False),
        ]
    )


def _directional(case: Case) -> tuple[tuple[list[torch.Tensor], list[torch.Tensor]], list[torch.Tensor]]:
    """``((values, tangents), directions)`` of the body, by reverse mode alone."""
    body, inputs = _of_floats(case, case.on(case.body))
    directions = [_slope(t) for t in inputs]
    values, tangents = torch.autograd.functional.jvp(body, tuple(inputs), tuple(directions))
    return (list(values), list(tangents)), directions


def _of_floats(case: Case, run: Run) -> tuple[Callable[..., tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """``run`` as a function of the inputs that have derivatives, giving the outputs that have; and those inputs."""
    inputs = case.clones()
    chosen = [t for t in inputs if differentiable(t)]
    if not chosen:
        raise NotApplicable("no operand has a derivative")

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        return tuple(_floats(_seeded(run, [next(given) if differentiable(t) else t for t in inputs])))

    return function, chosen
