"""Run a body once on stand-ins, and learn what each subgraph is called with and what it closes over.

This is the one recording step. A body receives a `Probe` for every subgraph; what the probes saw becomes the node's
graphs, its inputs (operands, then captures) and its `Layout`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch.fx import GraphModule

from hopkit import codec
from hopkit._torch import levels, sizes, trees
from hopkit._torch.autograd import computed, needs_gradient, tied
from hopkit._torch.fakes import Stage, same_storage, without_effects
from hopkit._torch.state import autocasting, functionalizing, is_tracked, opaque, tracked
from hopkit._torch.watch import Substitute, Watch, wiring
from hopkit.codec import Slot
from hopkit.deciding import no_value
from hopkit.errors import (
    CallError,
    CaptureError,
    DataDependentError,
    HopkitError,
    LayoutError,
    SpecError,
    SubgraphError,
)
from hopkit.layout import KEYWORD, Layout, Meta, Slots, Variant, fill, parameter_of
from hopkit.origin import origin
from hopkit.probe import Graph, Probe, Unrecordable, Unrehearsable, identity, variable_name
from hopkit.spec import Kind, OpSpec, Parameter


@dataclasses.dataclass(frozen=True)
class Recording:
    """A call in flat form.

    Args:
        graphs: The closed subgraphs.
        inputs: Operands, then captures.
        options: What torch can keep as a node's keyword; other options are in the layout.
        layout: How they make up the call.
        result: The body's result, with a `Slot` for every output of the node; what is an input stands for itself.
    """

    graphs: tuple[Graph, ...]
    inputs: tuple[object, ...]
    options: Mapping[str, object]
    layout: Layout
    result: object

    def restore(self, outputs: Sequence[object]) -> object:
        """The body's result, from what the node returned."""
        return fill(self.result, outputs)


class Recorder:
    """Rehearses one call of an op."""

    def __init__(self, spec: OpSpec, values: Mapping[str, object]) -> None:
        self.spec = spec
        slots = Slots()
        self._values = {p.name: slots.split(values[p.name]) for p in spec.of_kind(Kind.OPERAND)}
        options = specialised(spec, values)
        self._options = {name: value for name, value in options.items() if is_keyword(name, value)}
        self._values.update({name: value for name, value in options.items() if name not in self._options})
        self.inputs = slots.inputs
        # An operand that a subgraph closes over is one more input: the graph takes both, and they may differ later.
        self._index: dict[object, int] = {}
        self._stage = Stage(self.inputs)
        self._only_inputs = functionalizing()
        self._fakes: list[object] = []
        self._watch = Watch(tracked())
        # What subgraphs give of the memory of what they are given, and how far the rehearsal was then.
        self._views: list[tuple[torch.Tensor, int]] = []
        self._inside: set[int] = set()  # the steps of subgraphs; the others are the body's own
        self._probes = {
            p.name: [Probe(self, name, f) for name, f in subgraphs(p.name, values[p.name])]
            for p in spec.of_kind(Kind.SUBGRAPH, Kind.SUBGRAPHS)
        }

    def record(self, digest: str = "") -> Recording:
        """The call in flat form.

        Args:
            digest: What the op is today, where this becomes a node.

        Raises:
            Unrecordable: The call cannot be one node.
            DataDependentError: The body decides on a value, and ``inputs=`` or ``outputs=`` is missing.
        """
        for name, value in self._values.items():
            self._check_writable(name, value)
        with self._rehearsed() as result:
            return self._close(result, digest)

    def refuse_writes(self) -> None:
        """All that has to be known of a call whose graph is carried as it stands.

        Raises:
            Unrecordable: It writes to an input or to a tensor of the graph's own, or nobody can tell.
        """
        try:
            with self._rehearsed() as result:
                self._refuse_writes(result)
        except DataDependentError as error:
            raise Unrecordable("what it writes to cannot be learnt without values") from error

    @contextlib.contextmanager
    def _rehearsed(self) -> Iterator[object]:
        with self._stage.open(gradients=torch.is_grad_enabled()):
            self._fakes.extend(self._writable(i, self._fake(value)) for i, value in enumerate(self.inputs))
            try:
                with self._watch, without_effects(not self.spec.effectful):
                    result = self._checked(self._rehearse())
            except (HopkitError, Unrecordable):
                raise
            except Exception as error:  # the author's, or one that only stand-ins raise
                raise Unrehearsable(f"its body cannot be rehearsed ({type(error).__name__}: {error})") from error
            if self._watch.hidden:
                raise Unrecordable("it uses a tensor from outside that is neither an operand nor a capture")
            declared = self.spec.stood_for and self.spec.outputs is not None  # then nothing here is the body's own
            if (
                autocasting()
                and not declared
                and any(self._watch.casts(i) for i in range(len(self._watch.steps)) if i not in self._inside)
            ):
                raise Unrecordable("autocast changes what the body itself computes")
            yield result

    def _fake(self, value: object) -> object:
        return self._stage.fake(value) if isinstance(value, torch.Tensor) else value

    def _writable(self, index: int, fake: object) -> object:
        """What is computed may be written to, and autograd follows; a leaf that requires a gradient may not."""
        value = self.inputs[index]
        if parameter_of(self._values, index) in self.spec.mutates and needs_gradient([fake]):
            fake, value = cast("torch.Tensor", fake), cast("torch.Tensor", value)
            return fake if value.is_leaf else computed(fake)
        return fake

    def _rehearse(self) -> object:
        values: dict[str, object] = {name: fill(v, self._fakes) for name, v in self._values.items()}
        values.update(self._options)
        for p in self.spec.of_kind(Kind.SUBGRAPH, Kind.SUBGRAPHS):
            probes = self._probes[p.name]
            values[p.name] = tuple(probes) if p.kind is Kind.SUBGRAPHS else probes[0]
        return run_or_examples(self.spec, values)

    def _checked(self, result: object) -> object:
        for leaf in trees.leaves(result):
            if not isinstance(leaf, _GIVEN):
                raise SubgraphError(
                    f"the body of op '{self.spec.name}'",
                    f"returned a {type(leaf).__qualname__}: {leaf!r}",
                    why="a graph cannot see the tensors in it",
                    todo="Return a pytree (tuple, list, dict, named tuple, registered dataclass) of tensors or numbers",
                )
        return result

    # -- what a probe tells while its subgraph runs ------------------------------------------------------------------

    def names(self) -> sizes.Names:
        """As `hopkit.probe.Rehearsing` says."""
        return sizes.Names(self._watch.made)

    def run(
        self,
        function: Callable[..., object],
        args: Sequence[object],
        kwargs: Mapping[str, object],
        inputs: Sequence[object],
    ) -> tuple[object, list[int], tuple[object, ...]]:
        """As `hopkit.probe.Rehearsing` says."""
        used: list[int] = []
        covered = sizes.symbols(inputs)
        before = frozenset(self._watch.made)
        names = self.names()
        for value in inputs:
            Meta.of(value, names)  # the first names are theirs

        def replace(value: object) -> object:
            if isinstance(value, torch.Tensor):
                if self._stage.owns(value):
                    return value
            elif not sizes.symbols([value]) - covered - (self._watch.made - before):
                return value
            if levels.inside(value):  # no transform that is around the call is active here
                raise Unrecordable("a subgraph applies a transform of torch.func to what it closes over")
            self._refuse_constant(function, value)
            index = self._capture(value)
            if index not in used:
                used.append(index)
                covered.update(sizes.symbols([self._fakes[index]]))
            return self._fakes[index]

        first = len(self._watch.steps)
        with Substitute(replace, names) as mode:
            result = mode.replaced(function(*args, **kwargs))
        if mode.compiles:
            raise Unrecordable(f"it calls '{mode.compiles}' on functions, which torch compiles itself")
        self._inside.update(range(first, len(self._watch.steps)))
        taken = [*inputs, *(self._fakes[i] for i in used)]
        leaves = trees.leaves(result)
        now = len(self._watch.steps)
        self._views.extend((leaf, now) for leaf in leaves if isinstance(leaf, torch.Tensor) and _is_view(leaf, taken))
        flow = wiring(self._watch.steps[first:], taken, leaves, names)
        return result, used, (*mode.steps, *flow)

    def _refuse_constant(self, function: Callable[..., object], value: object) -> None:
        """AOTAutograd differentiates by its own inputs: a parameter from elsewhere would lose its gradient."""
        if self._only_inputs and needs_gradient([value]) and not is_tracked(value):
            raise CaptureError(
                f"op '{self.spec.name}'",
                f"closes over '{variable_name(function, value)}', which requires a gradient and is no input of the "
                "graph that AOTAutograd records",
                why="its gradient would be lost without a word",
                todo="Pass it as an argument of the function that is compiled, or detach it",
            )

    def _capture(self, value: object) -> int:
        if opaque(value):
            raise Unrecordable(f"it closes over a {type(value).__qualname__}, which torch cannot take apart")
        key = identity(value)
        if key not in self._index:
            self._index[key] = len(self.inputs)
            self.inputs.append(value)
            self._fakes.append(self._fake(value))
        return self._index[key]

    # -- afterwards --------------------------------------------------------------------------------------------------

    def _close(self, result: object, digest: str) -> Recording:
        self._refuse_writes(result)
        leaves, tree = trees.flatten(result)
        kept: list[int] = []
        restored: list[object] = []
        outputs: dict[int, Slot] = {}
        inputs = {id(fake): value for fake, value in zip(self._fakes, self.inputs, strict=True)}
        for position, leaf in enumerate(leaves):
            if id(leaf) in inputs:
                restored.append(inputs[id(leaf)])
            elif isinstance(leaf, torch.Tensor) or sizes.unbacked(leaf):
                if id(leaf) not in outputs:
                    self._refuse_view(leaf, [leaves[k] for k in kept])
                    outputs[id(leaf)] = Slot(len(kept))
                    kept.append(position)
                restored.append(outputs[id(leaf)])
            else:
                restored.append(leaf)
        graphs: list[Graph] = []
        variants: dict[str, tuple[tuple[Variant, ...], ...]] = {}
        for name, probes in self._probes.items():
            many: list[tuple[Variant, ...]] = []
            for probe in probes:
                new, told = probe.close(len(graphs))
                graphs.extend(new)
                many.append(told)
            variants[name] = tuple(many)
        metas = tuple(map(Meta.of, self.inputs))
        layout = Layout(
            self._values, variants, metas, tuple(kept), len(leaves), digest=digest, origin=origin(self.spec.body)
        )
        return Recording(tuple(graphs), tuple(self.inputs), self._options, layout, trees.unflatten(restored, tree))

    def _check_writable(self, name: str, value: object) -> None:
        try:
            codec.dumps(value)
        except LayoutError as error:
            who, found = f"{self.spec.name}() argument '{name}'", f"holds {error.who}, which {error.found}"
            raise LayoutError(who, found, why=error.why, todo=error.todo) from None

    def _refuse_writes(self, result: object) -> None:
        for index, fake in enumerate(self._fakes):
            name = parameter_of(self._values, index)
            if isinstance(fake, torch.Tensor) and self._watch.wrote_to(fake) and name not in self.spec.mutates:
                raise self._undeclared(index, f"it writes to {self._name(index)}", "mutates", self.spec.mutates)
        # Without mutation, what a subgraph gives is no view of what it wrote to.
        for view, when in self._views:
            used = [*trees.leaves(result), *(leaf for _, leaves, _ in self._watch.steps[when:] for leaf in leaves)]
            if self._watch.wrote_to(view) and any(leaf is view for leaf in used):
                raise Unrecordable("it uses a view that a subgraph gives of what it is given, and that is written to")

    def _refuse_view(self, leaf: object, earlier: Sequence[object]) -> None:
        if not isinstance(leaf, torch.Tensor):
            return
        for index, fake in enumerate(self._fakes):
            if isinstance(fake, torch.Tensor) and same_storage(leaf, fake):
                raise self._undeclared(
                    index, f"an output is a view of {self._name(index)}", "aliases", self.spec.aliases
                )
        if any(isinstance(other, torch.Tensor) and same_storage(leaf, other) for other in earlier):
            raise Unrecordable("two outputs share memory")

    def _undeclared(self, index: int, found: str, keyword: str, declared: Sequence[str]) -> Unrecordable:
        name = parameter_of(self._values, index)
        return Unrecordable(found, f'{keyword}=("{name}",)' if name else "", declared=name in declared)

    def _name(self, index: int) -> str:
        """What the author calls input number ``index``."""
        if name := parameter_of(self._values, index):
            return f"operand '{name}'"
        for probes in self._probes.values():
            for probe in probes:
                if any(index in call.used for call in probe.calls):
                    name = variable_name(probe.function, self.inputs[index])
                    return f"'{name}', which subgraph '{probe.name}' closes over"
        return f"input {index}"


def _is_view(leaf: torch.Tensor, values: Sequence[object]) -> bool:
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return not any(leaf is t for t in tensors) and any(same_storage(leaf, t) for t in tensors)


_NATIVE = (bool, int, float, str, type(None), torch.dtype, torch.device)
_SETTINGS = (bytes, enum.Enum, torch.layout, torch.memory_format, torch.Size)
_GIVEN = (torch.Tensor, *sizes.SYMBOLIC, complex, *_NATIVE, *_SETTINGS)
_RESERVED = (KEYWORD, "self", "dispatch_key", "public_api", "relevant_args")
"""Names that a node's keywords cannot have: hopkit's own, and those of parameters on torch's way to a kernel."""


def is_keyword(name: str, value: object) -> bool:
    """Whether an option can be a keyword of the node as it stands; others are in the layout."""
    return type(value) in _NATIVE and name not in _RESERVED


def specialised(spec: OpSpec, values: Mapping[str, object]) -> dict[str, object]:
    """The options of a call, with numbers in place of symbols: torch guards on them.

    Raises:
        CallError: Only running the graph tells such a number.
    """
    options = {p.name: values[p.name] for p in spec.of_kind(Kind.OPTION)}
    for name, value in options.items():
        if any(map(sizes.unbacked, trees.leaves(value))):
            raise CallError(
                f"{spec.name}() argument '{name}'",
                f"expected a constant, got {value}, which only running the graph tells",
                why="an option is written into the graph",
                todo=f"Make it an operand: `{name}: int | torch.SymInt`",
            )
    return {name: trees.map_leaves(_number, value) for name, value in options.items()}


def _number(leaf: object) -> object:
    kind = _NUMBERS.get(type(leaf))
    return leaf if kind is None else kind(leaf)


_NUMBERS: dict[type, Callable[..., object]] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


def plain_form(
    spec: OpSpec, values: Mapping[str, object], *, nested: bool
) -> tuple[object, object, dict[str, object]] | None:
    """``(graph, inputs, options)`` where the call needs no layout, or None.

    That is an op of one ``GraphModule`` and one flat tuple, without a derivative to record: the node says nothing but
    ``(graph, args)``. If ``nested``, args may be any list or tuple; not in a program that is exported, which could not
    be saved.
    """
    if len(spec.parameters) < 2 or spec.autograd == "derive" or spec.mutates:
        return None
    subgraph, operand, *options = spec.parameters
    if not subgraph.graph_only or operand.kind is not Kind.OPERAND or any(p.kind is not Kind.OPTION for p in options):
        return None
    inputs, chosen = values[operand.name], specialised(spec, values)
    exporting = torch.compiler.is_exporting()
    if exporting and not _savable(cast("GraphModule", values[subgraph.name])):
        return None
    nested = nested and isinstance(inputs, (tuple, list)) and not exporting
    fits = trees.is_plain(inputs) if nested else trees.is_flat(inputs)
    if not fits or not all(is_keyword(name, value) for name, value in chosen.items()):
        return None
    return values[subgraph.name], inputs, chosen


def _savable(graph: GraphModule) -> bool:
    """Whether torch can save a graph as it stands: without tensors of its own, and with stand-ins of all values."""
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    return all(node.op in ("placeholder", "call_function") and "val" in node.meta for node in nodes)


def subgraphs(name: str, value: object) -> list[tuple[str, Callable[..., object]]]:
    """The subgraphs that a parameter holds, each with a name for messages."""
    if isinstance(value, (tuple, list)):
        return [(f"{name}[{i}]", f) for i, f in enumerate(value)]
    return [(name, cast("Callable[..., object]", value))]


def _examples(
    spec: OpSpec, count: int, args: Sequence[object], kwargs: Mapping[str, object]
) -> Sequence[Sequence[object]]:
    """What ``inputs=`` gives: for every subgraph, what it is called with."""
    assert spec.inputs is not None
    cause: Exception | None = None
    try:
        given = spec.inputs(*args, **kwargs)
        found = f"gave {given!r}"
        if isinstance(given, (tuple, list)) and all(isinstance(example, (tuple, list)) for example in given):
            if len(given) == count:
                return given
            found = f"gave {len(given)} tuples"
    except (HopkitError, Unrecordable):
        raise
    except Exception as error:
        found, cause = f"raised {type(error).__name__}: {error}", error
    raise SpecError(
        f"`inputs=` of op '{spec.name}'",
        f"{found}, and its call has {count} subgraph{'s' if count > 1 else ''}",
        why="each subgraph is recorded on the arguments that are given for it",
        todo="Let it give a tuple with one tuple of arguments for every subgraph, in the order of the parameters",
    ) from cause


def _outputs(spec: OpSpec, given: object) -> object:
    """What ``outputs=`` gives. The body does not run here, and nobody else would notice a forgotten ``return``."""
    annotation = inspect.signature(spec.body).return_annotation
    if given is None and annotation not in (None, "None"):
        raise SpecError(
            f"`outputs=` of op '{spec.name}'",
            "gave None",
            why="it says what the op gives where its body cannot run, and the body would seem to give nothing",
            todo="Let it return a result of the right shapes; if the op gives nothing, annotate its body `-> None`",
        )
    return given


_CALLED = (Kind.SUBGRAPH, Kind.SUBGRAPHS)


def _each(
    parameter: Parameter, value: object, change: Callable[[Callable[..., object]], Callable[..., object]]
) -> object:
    changed = tuple(change(f) for _, f in subgraphs(parameter.name, value))
    return changed if parameter.kind is Kind.SUBGRAPHS else changed[0]


def _noted(function: Callable[..., object], results: list[object]) -> Callable[..., object]:
    def noting(*args: object, **kwargs: object) -> object:
        results.append(function(*args, **kwargs))
        return results[-1]

    return noting


def run_or_examples(spec: OpSpec, values: Mapping[str, object]) -> object:
    """The body's result on stand-ins. Where ``inputs=`` is declared, subgraphs are called as it says, and ``outputs=``
    gives the result; ``abstract=`` does both."""
    args, kwargs = spec.arguments(values)
    if spec.stood_for:
        operands = trees.leaves([values[p.name] for p in spec.of_kind(Kind.OPERAND)])
        for operand in operands:
            if isinstance(operand, torch.Tensor):
                torch.numel(operand)  # the body uses it; a recording that this call is part of must know
        results: list[object] = []
        if spec.abstract is not None:
            noting = {p.name: _each(p, values[p.name], lambda f: _noted(f, results)) for p in spec.of_kind(*_CALLED)}
            args, kwargs = spec.arguments({**values, **noting})
        else:
            called = [f for p in spec.of_kind(*_CALLED) for _, f in subgraphs(p.name, values[p.name])]
            examples = _examples(spec, len(called), args, kwargs)
            results.extend(function(*example) for function, example in zip(called, examples, strict=True))
        if spec.outputs is not None:
            outputs = _outputs(spec, spec.outputs(*args, **kwargs))
            return tied(outputs, [*operands, *trees.leaves(results)])
    try:
        return spec.body(*args, **kwargs)
    except Exception as error:
        if not sizes.data_dependent(error):
            raise
        raise no_value(
            spec.name,
            "cannot be recorded",
            error,
            why="while a graph is recorded, tensors have shapes and no values",
            todo="Give define both `inputs=lambda ...: (args_of_first_subgraph, args_of_second, ...)` and "
            "`outputs=lambda ...: example_result`, or `abstract=` for both at once",
        ) from error
