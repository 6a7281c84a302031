"""One call of an op in flat form: what every rule that is not a body gets, and passes on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import torch

from hopkit import binding, transform
from hopkit import layout as layouts
from hopkit._torch import schema, sizes, trees
from hopkit._torch.autograd import computed, differentiable, needs_gradient
from hopkit._torch.fakes import Stage, copied, outside_modes, same_storage, together
from hopkit._torch.functional import is_functional, memory
from hopkit._torch.structured import Unstructured, loops_stay
from hopkit._torch.watch import WITHOUT_GRADIENTS, Count, Same, Substitute, Watch, custom_backward, sources
from hopkit.codec import Slot
from hopkit.deciding import deciding
from hopkit.layout import DRAWING, REDRAWN, Layout, Meta
from hopkit.probe import Graph, variable_name
from hopkit.record import run_or_examples
from hopkit.spec import Kind, OpSpec

GraphLike = Callable[..., object]

MOST_INLINED = 200
"""So many operators Inductor gets one after the other, and fuses them; of more it gets a call."""

MOST_UNROLLED = 64
"""So many it gets where the trips of a loop are among them: each of them takes its time to compile."""


class Target(Protocol):
    """The operator that torch sees."""

    def __call__(self, /, *args: object, **kwargs: object) -> object: ...

    def redispatch(self, /, *args: object, **kwargs: object) -> object:
        """Let the rule of the next mode answer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pure:
    """A graph as functionalization runs it, and as it was before: stand-ins need no functionalization."""

    run: GraphLike
    plain: GraphLike

    def __call__(self, *inputs: object) -> object:
        # torch cannot functionalize twice: one that wrapped the inputs already sees the graph as it was.
        return self.plain(*inputs) if any(map(is_functional, inputs)) else self.run(*inputs)


def as_before(graph: GraphLike) -> GraphLike:
    """A graph as it was before it was made functional: for stand-ins, which may be in a transform."""
    return graph.plain if isinstance(graph, Pure) else graph


def key_of(graph: GraphLike) -> tuple[object, ...]:
    """Equal for graphs that would be traced to the same code from the same inputs."""
    if isinstance(graph, Pure):
        return ("pure", *key_of(graph.plain))
    return graph.key if isinstance(graph, Graph) else (Same(graph),)


def with_gradients(graph: GraphLike) -> bool:
    """Whether a graph is to be traced with gradients on, as its op was called."""
    if isinstance(graph, Pure):
        return with_gradients(graph.plain)
    return not isinstance(graph, Graph) or graph.gradients


@dataclasses.dataclass(frozen=True)
class Giving:
    """A graph that writes to copies of its inputs ``written``, and gives them after its outputs."""

    graph: GraphLike
    written: tuple[int, ...]

    def __call__(self, *inputs: object) -> tuple[object, ...]:
        values = list(inputs)
        for i in self.written:
            values[i] = copied(cast("torch.Tensor", inputs[i]))
        outputs = cast("Sequence[object]", sizes.readable(self.graph)(*values))
        return (*outputs, *(values[i] for i in self.written))


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What a call does, learnt on stand-ins.

    Args:
        examples: Per graph, stand-ins of the inputs that it is called with.
        random: The devices where random numbers are drawn.
        handwritten: What part has a derivative of its own, as far as its inputs require a gradient, or "".
        by_hand: Whether that part is the body, and no graph, and nothing else is the matter.
        opaque: Why a recorded graph cannot be differentiated, or "".
        outputs: Stand-ins of what the call gives.
        sources: Per output, the inputs that it has a gradient for. None: nobody knows.
        written: The inputs that are written to.
        writing: Per graph, the inputs of its own that it writes to.
        entwined: Whether one of these shares memory with another of the graph's inputs.
    """

    examples: tuple[tuple[object, ...], ...]
    random: tuple[str, ...]
    handwritten: str
    by_hand: bool
    opaque: str
    outputs: object
    sources: tuple[tuple[int, ...], ...] | None
    written: frozenset[int]
    writing: tuple[tuple[int, ...], ...]
    entwined: bool


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op in flat form.

    Args:
        op: What is called.
        target: The operator that torch sees.
        graphs: The subgraphs, closed: each takes tensors and SymInts, and gives a tuple of them.
        inputs: Operands, then what the subgraphs capture.
        options: Keywords of the node.
        layout: How these make up the author's arguments. None: the first graph takes the inputs, nested as ``tree``.
        tree: How the node holds the inputs. None: as one flat tuple.
        whole: Whether somebody's rule has to see the op itself: it has a kernel written by hand, say.
    """

    op: OpSpec
    target: Target
    graphs: tuple[GraphLike, ...]
    inputs: tuple[object, ...]
    options: Mapping[str, object]
    layout: Layout | None
    tree: trees.Tree | None = None
    whole: bool = False

    def __call__(self) -> object:
        """Call the op again: the rule of the next mode answers."""
        return self.target.redispatch(*self.graphs, self.nested, **self.keywords)

    @property
    def nested(self) -> object:
        """The inputs as the node holds them."""
        return self.inputs if self.tree is None else trees.unflatten(self.inputs, self.tree)

    @property
    def keywords(self) -> dict[str, object]:
        """The node's keywords."""
        layout = {layouts.KEYWORD: self.layout.dumps()} if self.layout else {}
        return {**self.options, **layout}

    def replace(
        self,
        *,
        graphs: Sequence[GraphLike] | None = None,
        inputs: Sequence[object] | None = None,
        layout: Layout | None = None,
    ) -> Call:
        """This call with other graphs or other inputs."""
        return dataclasses.replace(
            self,
            graphs=self.graphs if graphs is None else tuple(graphs),
            inputs=self.inputs if inputs is None else tuple(inputs),
            layout=layout or self.layout,
        )

    def run(self, body: Callable[..., object] | None = None) -> object:
        """Run the body (or ``body``) here, in whatever modes are active: the op vanishes."""
        if self.layout is None:
            args, kwargs = self.arguments()
            return (body or self.op.body)(*args, **kwargs)
        with deciding(self.op):
            return transform.flat(self.op, self.layout, self.graphs, self.options, body)(self.inputs)

    def graph_names(self) -> list[str]:
        """A name for every graph: the op's, and the subgraph's."""
        if self.layout is None:
            return [f"{self.op.name}_{p.name}" for p in self.op.of_kind(Kind.SUBGRAPH)]
        if self.part:
            return [f"{self.op.name}_{self.part}"]
        return [
            f"{self.op.name}_{name}"
            for name, many in self.layout.subgraphs.items()
            for variants in many
            for _ in variants
        ]

    def values(self) -> dict[str, object]:
        """The author's arguments, by parameter; a subgraph among them has ``captures``, and calls its graphs."""
        if self.layout is not None:
            return transform.values(self.op, self.layout, self.graphs, self.inputs, self.options)
        (graph,), (operand,) = self.op.of_kind(Kind.SUBGRAPH), self.op.of_kind(Kind.OPERAND)
        return {**self.options, graph.name: self.graphs[0], operand.name: self.nested}

    def arguments(self) -> tuple[list[object], dict[str, object]]:
        """The author's ``(args, kwargs)``."""
        return self.op.arguments(self.values())

    @property
    def operands(self) -> int:
        """How many of the inputs are operands; captures follow."""
        if self.layout is None:
            return len(self.inputs)
        return len({leaf.index for leaf in trees.leaves(dict(self.layout.values)) if isinstance(leaf, Slot)})

    def parameter(self, index: int) -> str:
        """The operand parameter that input number ``index`` belongs to, or "" for a capture."""
        if self.layout is None:
            return self.op.of_kind(Kind.OPERAND)[0].name
        return layouts.parameter_of(self.layout.values, index)

    def name_of(self, index: int) -> str:
        """What the author calls input number ``index``."""
        assert self.layout is not None
        for name, many in self.layout.subgraphs.items():
            for variant in (v for variants in many for v in variants):
                graph = self.graphs[variant.graph]
                if index in variant.captures and isinstance(graph, Graph):
                    return f"'{variable_name(graph.function, self.inputs[index])}', which subgraph '{name}' closes over"
        return f"input {index}"

    @property
    def transformed(self) -> bool:
        """Whether this is not the op itself but, say, its vector-Jacobian product."""
        return self.layout is not None and bool(self.layout.transforms)

    @property
    def batches(self) -> tuple[tuple[tuple[int | None, ...], str], ...] | None:
        """Of every vmap that the call is under, from the inside out, the dimensions of its inputs, and the randomness.

        None: It is under another transform, or has no layout.
        """
        if self.layout is None or any(name != "vmap" for name, *_ in self.layout.transforms):
            return None
        return tuple(cast("tuple[tuple[int | None, ...], str]", step[1:]) for step in self.layout.transforms)

    @property
    def item(self) -> Call:
        """The call without its transforms: where those are vmaps, that of one item."""
        assert self.layout is not None
        return self.replace(layout=dataclasses.replace(self.layout, transforms=()))

    @property
    def derivative(self) -> bool:
        """Whether this is a transform of the op that computes something else than the op."""
        return self.layout is not None and any(name != layouts.FUNCTIONAL for name, *_ in self.layout.transforms)

    @functools.cached_property
    def written(self) -> tuple[int, ...]:
        """The inputs that the call writes to, as its op declares. Such a call is no function of its inputs.

        What the body of an op with ``outputs=`` writes to cannot be learnt: all that is declared counts.
        """
        if self.transformed or not self.declared:
            return ()
        return tuple(i for i in self.declared if self.op.outputs is not None or i in self.rehearsal.written)

    @property
    def declared(self) -> tuple[int, ...]:
        """The tensors among the inputs that the op's author says it may write to."""
        tensors = (i for i, value in enumerate(self.inputs) if self.op.mutates and isinstance(value, torch.Tensor))
        return tuple(i for i in tensors if self.parameter(i) in self.op.mutates)

    @property
    def entangled(self) -> bool:
        """Whether an input that the call writes to shares memory with another: copies of them would be two."""
        held = [memory(value) if isinstance(value, torch.Tensor) else None for value in self.inputs]
        return any(held[i] is None or held.count(held[i]) > 1 for i in self.written)

    def functional(self) -> Call:
        """The call without mutation: it gives, after its outputs, what the inputs ``written`` are to hold."""
        assert self.layout is not None
        step = (layouts.FUNCTIONAL, self.written)
        return self.replace(layout=dataclasses.replace(self.layout, transforms=(*self.layout.transforms, step)))

    def on_copies(
        self, rule: Callable[[Call], object], write: Callable[[torch.Tensor, torch.Tensor], object]
    ) -> object:
        """What ``rule`` gives for the call without mutation, once its inputs hold what it gives for them.

        Args:
            rule: Answers for `functional`.
            write: Called with every input that the call writes to, and what it is to hold.
        """
        outputs = cast("Sequence[torch.Tensor]", rule(self.functional()))
        count = len(outputs) - len(self.written)
        for i, new in zip(self.written, outputs[count:], strict=True):
            write(cast("torch.Tensor", self.inputs[i]), new)
        return tuple(outputs[:count])

    def schema(self, mutated: Sequence[int]) -> torch.FunctionSchema:
        """torch's schema of the node, with the inputs ``mutated`` marked as written to."""
        call = self.replace(inputs=together(self.inputs))
        outputs = trees.leaves(call.rehearsal.outputs)
        return schema.generate(self.target, self.graphs, self.inputs, self.nested, self.keywords, outputs, mutated)

    @property
    def part(self) -> str:
        """Which part of an op that trains this is, "forward" or "backward"; "" for a call of the op itself."""
        return self.layout.region if self.layout else ""

    def vjp(self, wrt: Sequence[int], given: Sequence[int], gradients: Sequence[object]) -> Call:
        """The call that gives the gradients of the inputs ``wrt`` for the gradients of the outputs ``given``."""
        return self._transformed((*self.inputs, *gradients), ("vjp", tuple(wrt), tuple(given)))

    def vmap(self, inputs: Sequence[object], dims: Sequence[int | None], randomness: str) -> Call:
        """The call on batches: input number i is batched in dimension ``dims[i]``, outputs in their first."""
        return self._transformed(inputs, ("vmap", tuple(dims), randomness))

    def jvp(self, inputs: Sequence[object], tangents: Mapping[int, torch.Tensor], given: Sequence[int]) -> Call:
        """The call, and tangents of its outputs ``given``, for the tangents of these inputs, by number."""
        return self._transformed([*inputs, *tangents.values()], ("jvp", tuple(tangents), tuple(given)))

    def giving(self) -> Call | None:
        """The call with graphs that write to nothing, and give what they would write. None: that is not the same."""
        written = self.rehearsal.writing
        if self.layout is None or self.rehearsal.entwined or (self.written and self.entangled):
            return None
        graphs = [Giving(graph, those) if those else graph for graph, those in zip(self.graphs, written, strict=True)]
        return self.replace(graphs=graphs, layout=self.layout.writing(written))

    def capturing(self, values: Sequence[Sequence[object]]) -> Call:
        """The call where graph number i takes ``values[i]``, too, after what it takes: they are inputs of the op."""
        assert self.layout is not None
        at = len(self.inputs) - self.layout.added
        layout = self.layout.capturing([tuple(map(Meta.of, many)) for many in values], at)
        return self.replace(inputs=(*self.inputs[:at], *itertools.chain(*values), *self.inputs[at:]), layout=layout)

    def _transformed(self, inputs: Sequence[object], step: tuple[object, ...]) -> Call:
        assert self.layout is not None
        layout = dataclasses.replace(self.layout, transforms=(*self.layout.transforms, step))
        return self.replace(inputs=inputs, layout=layout)

    @property
    def examples(self) -> tuple[tuple[object, ...], ...]:
        """Per graph, what it is called with, or stand-ins of that."""
        if self.layout is not None and self.part and len(self.layout.transforms) == 1:
            with outside_modes():  # the state of a generator is a real tensor, whatever the others are
                return (tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in self.inputs),)
        return self.rehearsal.examples

    def region(self, part: str, graph: GraphLike, inputs: Sequence[object]) -> Call:
        """The call whose body is ``graph``: a ``part`` of this call and its derivative."""
        assert self.layout is not None
        layout = dataclasses.replace(
            self.layout, values={}, subgraphs={}, metas=(), outputs=(), leaves=0, transforms=((layouts.REGION, part),)
        )
        return dataclasses.replace(self, graphs=(graph,), inputs=tuple(inputs), options={}, layout=layout)

    def inlined(self, run: Callable[[], object]) -> object:
        """What ``run``, the body in some modes, gives: Inductor gets its operators, and not a call of it.

        A loop that takes many is a loop there, too.

        Raises:
            Unstructured: The body decides on values as Inductor knows no way to, or takes too many operators.
        """
        if self.layout is not None and any(name in (DRAWING, REDRAWN) for name, *_ in self.layout.transforms):
            raise Unstructured("no operator of torch's is the state of a generator")
        for around, most in ((contextlib.nullcontext, MOST_UNROLLED), (loops_stay, MOST_INLINED)):
            with around():
                if self._takes_few(most):
                    return run()
        raise Unstructured(f"op '{self.op.name}' takes too many operators, or needs values")

    def _takes_few(self, most: int) -> bool:
        if self.op.effectful:
            return False
        stage, count = Stage(self.inputs), Count()

        def inside(graph: GraphLike) -> GraphLike:
            def run(*inputs: object) -> object:
                if count.operators > most:  # said here, where an error is sure to arrive
                    raise OverflowError
                with Substitute(stage.stand_in):
                    return sizes.readable(graph)(*inputs)

            return run

        with stage.open():
            call = self.replace(graphs=list(map(inside, self.graphs)), inputs=list(map(stage.stand_in, self.inputs)))
            try:
                with count:
                    call.run()
            except Exception:  # too many, or one that needs a value
                return False
        return count.operators <= most

    @functools.cached_property
    def rehearsal(self) -> Rehearsal:
        """What the call does, learnt by running it once on stand-ins."""
        return self._rehearsed(lambda fake: fake)

    def _rehearsed(self, given: Callable[[object], object]) -> Rehearsal:
        stage, watch, declared = Stage(self.inputs), Watch(), () if self.transformed else self.declared
        seen: dict[int, list[tuple[object, ...]]] = {i: [] for i in range(len(self.graphs))}
        told: list[str] = []
        inside: list[str] = []
        writing: list[set[int]] = [set() for _ in self.graphs]
        shared: list[bool] = []

        def probe(index: int) -> GraphLike:
            def graph(*inputs: object) -> object:
                seen[index].append(tuple(map(stage.plain, inputs)))
                function, before = self.graphs[index], len(watch.written)
                with Substitute(stage.stand_in) as mode:
                    result = sizes.readable(as_before(function))(*inputs)
                told.append(mode.opaque)
                inside.append(custom_backward(trees.leaves(result), inputs))
                tensors = {i: value for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)}
                those = [i for i, value in tensors.items() if watch.wrote_to(value, since=before)]
                writing[index].update(those)
                shared.extend(same_storage(tensors[i], other) for i in those for j, other in tensors.items() if i != j)
                return result

            return graph

        with stage.open():
            fakes = tuple(given(stage.stand_in(value)) for value in self.inputs)
            # What requires a gradient and is written to was computed, or gradients are off where it counts.
            fakes = tuple(_writable(fake) if i in declared else fake for i, fake in enumerate(fakes))
            rehearsed = self.replace(graphs=[probe(i) for i in range(len(self.graphs))], inputs=fakes)
            with watch:
                outputs = rehearsed.like_body()
            handwritten = custom_backward(trees.leaves(outputs))
            examples = tuple(self._example(index, calls, fakes, stage) for index, calls in seen.items())
            # What was rehearsed is then the op itself, and not what a transform made of it.
            unknown = self.transformed and self.op.stood_for
            reached = None if unknown else tuple(sources(output, fakes) for output in trees.leaves(outputs))
            written = frozenset(i for i in declared if watch.wrote_to(cast("torch.Tensor", fakes[i])))
        hidden = next(filter(None, (*told, watch.opaque)), "")
        # Such a backward, and what is before it, runs without gradients.
        by_hand = handwritten and not any((*inside, *told)) and watch.reasons.keys() <= {WITHOUT_GRADIENTS}
        writes = tuple(tuple(sorted(those)) for those in writing)
        return Rehearsal(
            examples,
            tuple(watch.random),
            handwritten,
            bool(by_hand),
            handwritten or hidden,
            outputs,
            reached,
            written,
            writes,
            entwined=any(shared),
        )

    def _example(
        self, index: int, calls: Sequence[tuple[object, ...]], inputs: Sequence[object], stage: Stage
    ) -> tuple[object, ...]:
        """What graph number ``index`` is called with. Where that is nothing, or several things: as it was recorded.

        Sizes that nobody knows have bounds, and in several calls several bounds; a graph is for all of its calls.
        """
        if calls and (self.layout is None or len({tuple(map(Meta.of, call)) for call in calls}) == 1):
            return calls[-1]
        assert self.layout is not None
        symbols = self.layout.symbols(inputs)
        every = (v for many in self.layout.subgraphs.values() for variants in many for v in variants)
        variant = next(v for v in every if v.graph == index)
        return (
            *(meta.example(symbols, stage.unknown) for meta in variant.metas),
            *(inputs[i] for i in variant.captures),
        )

    @property
    def unseen(self) -> str:
        """Why running the body again in backward would give something else, or ""."""
        return self.lost or ("it draws random numbers" if self.random else "")

    @property
    def by_hand(self) -> bool:
        """Whether running the body again gives the same, and all that its graphs do not tell is the body's backward."""
        return self.rehearsal.by_hand and self.unseen == self.rehearsal.handwritten

    @property
    def random(self) -> tuple[str, ...]:
        """The devices where the call draws random numbers."""
        return (
            () if self.layout and any(name == REDRAWN for name, *_ in self.layout.transforms) else self.rehearsal.random
        )

    @property
    def lost(self) -> str:
        """Why running the body again would give something else, also if it drew the same random numbers, or ""."""
        if self.op.effectful:
            return "it has an effect"
        if not self.op.pure:
            return "it is not pure, and may give something else"
        if self.op.random:  # the body itself, which may not run on stand-ins: nobody knows from which generators
            return "it draws random numbers"
        return self.rehearsal.opaque

    def drawing(self) -> Call:
        """The call that also gives, after its outputs, the states of the generators that it draws from."""
        return self._transformed(self.inputs, (DRAWING, self.random))

    def redrawn(self, inputs: Sequence[object]) -> Call:
        """The call that draws what it drew before, if such states are the last of its inputs."""
        return self._transformed(inputs, (REDRAWN, self.random))

    @property
    def handwritten(self) -> str:
        """What part has a derivative of its own, which is not that of the operators in a graph, or ""."""
        return self._rehearsed(_leaf).handwritten

    def like_body(self) -> object:
        """What the call gives, on stand-ins. An op that decides on values declares it: ``inputs=`` and ``outputs=``."""
        if not self.op.stood_for or self.part:
            return self.run()

        def declared(*args: object, **kwargs: object) -> object:
            return run_or_examples(self.op, binding.by_name(self.op, args, kwargs))

        return self.run(declared)


def _leaf(fake: object) -> object:
    return fake.detach().requires_grad_() if isinstance(fake, torch.Tensor) and differentiable(fake) else fake


def _writable(fake: object) -> object:
    return computed(cast("torch.Tensor", fake)) if needs_gradient([fake]) else fake
