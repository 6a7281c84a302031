"""A call that Dynamo met while it read a frame, and the steps of putting it into Dynamo's graph.

Private to torch, all of it (torch/_dynamo/variables/higher_order_ops.py, seen in 2.13 and 2.14; if it is gone, an op's
body is what Dynamo reads, and no node is left). Only `hopkit._torch.dynamo` imports this module, once torch's compiler
is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn, Protocol, TypeAlias, cast

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.exc import Unsupported, unimplemented
from torch._dynamo.output_graph import SubgraphTracer
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.utils import _make_inlined, unpack_iterable
from torch._dynamo.variables import (
    ConstantVariable,
    LazyVariableTracker,
    ListVariable,
    SymNodeVariable,
    TensorVariable,
    TupleVariable,
)
from torch._dynamo.variables import higher_order_ops as hops
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import SourcelessBuilder, wrap_fx_proxy, wrap_fx_proxy_cls
from torch._guards import TracingContext
from torch.fx import GraphModule, Proxy
from torch.utils import _pytree as pytree

from hopkit._torch import alike, equal, likeness, sizes, trees
from hopkit._torch.autograd import computed
from hopkit._torch.fakes import FakeMode, left, like, run_in_mode, stand_in
from hopkit._torch.inputs import inputs
from hopkit._torch.read import Instead, Read, drop_decided, identity

GraphBreak: TypeAlias = Unsupported
Variable: TypeAlias = VariableTracker
"""What Dynamo knows of one of the user's values."""


@dataclasses.dataclass(frozen=True)
class Written:
    """A node, to be written again on other inputs.

    Args:
        graphs: Its graphs, by the name under which Dynamo's graph holds each.
        keywords: Its keywords.
        examples: Stand-ins of what it gives.
        leaves: The leaves of the call's result: numbers of outputs of the node, and other values in a tuple.
        tree: Its structure.
    """

    graphs: Sequence[tuple[str, GraphModule]]
    keywords: Mapping[str, object]
    examples: Sequence[object]
    leaves: Sequence[int | tuple[object]]
    tree: trees.Tree

    def likes(self, mode: FakeMode) -> tuple[torch.Tensor, ...]:
        """New stand-ins of what it gives."""
        with left(mode), mode:
            return tuple(like(cast("torch.Tensor", example)) for example in self.examples)

    def repeatable(self, mode: FakeMode) -> bool:
        """Whether new stand-ins say all of what it gives, which is computed and nobody else's."""
        plain = all(isinstance(leaf, int) or likeness.is_constant(leaf[0]) for leaf in self.leaves)
        known = all(isinstance(x, torch.Tensor) and not any(map(sizes.unbacked, x.shape)) for x in self.examples)
        if not plain or not known:
            return False
        return all(map(likeness.equal, self.likes(mode), self.examples))


class Frame:
    """One call of an op in the code that Dynamo reads.

    Args:
        tx: Dynamo's own.
        target: The operator that is called.
        args: The call's positional arguments.
        kwargs: Its keyword arguments.
    """

    flat = False  # whether the call is a node of a graph that was recorded, and its arguments those of a node
    needed: Exception | None = None  # why the body must not be read in the op's place

    def __init__(
        self,
        tx: InstructionTranslatorBase,
        target: Callable[..., object],
        args: Sequence[Variable],
        kwargs: Mapping[str, Variable],
    ) -> None:
        self._tx, self.target = tx, target
        assert tx.fake_mode is not None  # Dynamo always has one
        self._mode = tx.fake_mode
        self.args: list[Variable]
        self.kwargs: dict[str, Variable]
        self.args, self.kwargs = LazyVariableTracker.realize_all((list(args), dict(kwargs)))
        self._known: dict[object, Variable] = {}
        self._proxies: dict[object, Proxy] = {}
        self._call: alike.Call[Written] | None = None

    def again(self) -> Variable | None:
        """The result of the call, whose node is that of an equal call before it. None: there was none, as far as seen.

        Dynamo then reads nothing.
        """
        try:
            self._call = alike.Call(self._tx, self.target, self.args, self.kwargs)
        except likeness.UnlikeError:
            return None
        found = self._call.found()
        if found is None or any(self._tx.output.nn_modules.get(name) is not graph for name, graph in found[0].graphs):
            return None
        node, inputs = found
        return self._written(dataclasses.replace(node, examples=node.likes(self._mode)), inputs)

    def items(self, given: object) -> list[object]:
        """The items of a sequence."""
        if isinstance(given, Variable):
            return list(unpack_iterable(self._tx, given))
        return list(cast("Sequence[object]", given))

    def value(self, given: object) -> object:
        """A pytree as stand-ins for tensors, symbols for sizes that are not fixed, and constants."""
        if isinstance(given, tuple):  # of variables, or a default of the author's
            return tuple(map(self.value, given))
        if not isinstance(given, Variable):
            return given
        given = cast("Variable", LazyVariableTracker.realize_all(given))
        if isinstance(given, _LEAVES):
            return self._leaf(given)
        if type(given) in (TupleVariable, ListVariable):  # of torch's pytree Dynamo would guard on all that it reads
            return given.python_type()(map(self.value, self.items(given)))
        leaves, tree = unpack_iterable(self._tx, _make_inlined(self._tx, pytree.tree_flatten)(given))
        return trees.unflatten(map(self._leaf, unpack_iterable(self._tx, leaves)), tree.as_python_constant())

    def _leaf(self, leaf: Variable) -> object:
        if not isinstance(leaf, (TensorVariable, SymNodeVariable)):
            return leaf.as_python_constant()
        proxy = leaf.as_proxy()
        value = proxy.node.meta["example_value"]
        self._known[identity(value)] = leaf
        self._proxies[identity(value)] = proxy
        return value

    def unflatten(self, leaves: Sequence[object], tree: trees.Tree) -> Variable:
        """The pytree of these leaves, each a variable, a value that `value` gave, or a constant."""
        return _unflatten(self._tx, iter([self._variable(leaf) for leaf in leaves]), tree)

    def option(self, given: object) -> object:
        """The value of a constant; a symbolic size in it is fixed, with a guard.

        Raises:
            NotImplementedError: Dynamo takes it for no constant.
        """
        if not isinstance(given, Variable):
            return given
        given = cast("Variable", LazyVariableTracker.realize_all(given))
        if isinstance(given, SymNodeVariable):
            return given.evaluate_expr(self._tx.output)
        if type(given) is TupleVariable:
            return tuple(map(self.option, self.items(given)))
        kind = type(getattr(given, "value", None))
        if dataclasses.is_dataclass(kind):  # Dynamo guards on the fields that are read
            names = [field.name for field in dataclasses.fields(kind) if field.init]
            read = _make_inlined(self._tx, _attribute)
            return kind(**{name: self.option(read(given, self._constant(name))) for name in names})
        return given.as_python_constant()

    def callee(self, given: object) -> object:
        """The module or the constant that a variable stands for; for other callables, something callable."""
        if isinstance(given, Variable) and given.is_python_constant():
            return given.as_python_constant()
        return getattr(given, "value", self.callee)

    def read(self, name: str, subgraph: Variable, called: object, inputs: Sequence[object]) -> Read:
        """Let Dynamo read a subgraph on stand-ins of the arguments it is called with.

        Args:
            name: What it is called.
            subgraph: The subgraph.
            called: ``(args, kwargs)``.
            inputs: The tensors and sizes in it, as the graph is to take them.

        Raises:
            Unsupported: Dynamo cannot read it in one piece.
        """
        tx = self._tx
        leaves, tree = trees.flatten(called)
        numbers = {id(x): number for number, x in enumerate(inputs)}
        numbered = inputs
        with left(self._mode):
            inputs = [self._example(x) if isinstance(x, torch.Tensor) else x for x in inputs]
            made = self._made(inputs)
            # A scratch graph gives what the op's body made a name; the subgraph's own inputs are made from that.
            with hops.discard_graph_changes(tx):
                extra = [self._input(cast("torch.Tensor", inputs[i]).shape[dim]) for i, dim in made]
                taken = list(map(self._input, inputs))
                places = [numbers[id(x)] if isinstance(x, _INPUTS) else self._constant(x) for x in leaves]
            try:
                (_, spec), graph, lifted = hops.speculate_subgraph(
                    tx,
                    _Call(subgraph, tree, places, len(extra), self._call),
                    [*extra, *taken],
                    {},
                    name,
                    set_subgraph_inputs="manual",
                    should_flatten_outputs=True,
                    supports_input_mutation=True,
                    supports_aliasing=True,
                )
            finally:
                first_seen = self._keep_floats()
            self._mode.epoch += 1
        if first_seen:  # each graph takes them from outside
            return self.read(name, subgraph, called, numbered)
        for proxy in lifted:
            self._proxies.setdefault(identity(proxy.node.meta["example_value"]), proxy)
        drop_decided(graph)
        run = GraphModule(dict(tx.output.nn_modules), graph)
        told = zip(spec.masks_to_filter_const_values or (), spec.const_values or (), strict=True)
        gives = tuple((constant,) if is_constant else None for is_constant, constant in told)
        tree = cast("Variable", spec.treespec).as_python_constant()
        captured = tuple(proxy.node.meta["example_value"] for proxy in lifted)
        return Read(graph, run, len(inputs), made, captured, (tree, gives))

    def _keep_floats(self) -> bool:
        """Take the floats that Dynamo saw first in a subgraph, and knows there alone, from where the call is.

        With ``dynamic=True`` a float that may change is the one number of a tensor, an input of Dynamo's graph.
        """
        output, moved = self._tx.output, False
        around, tracer = list[SubgraphTracer](), cast("SubgraphTracer | None", output.current_tracer)
        while tracer is not None:
            around.append(tracer)
            tracer = tracer.parent
        tensors = output.unspec_variable_map
        for source, variable in list(output.variable_tracker_cache.items()) if tensors else ():
            tensor = tensors.get(source.name)
            found = variable.realize() if tensor and variable.is_realized() else None
            if tensor and isinstance(found, SymNodeVariable) and found.proxy.tracer not in around:
                item = output.create_proxy("call_method", "item", (tensor.as_proxy(),), {})
                found.proxy = wrap_fx_proxy(self._tx, item, example_value=found.sym_num).as_proxy()
                moved = True
        return moved

    def close(self, read: Read, captured: Sequence[object]) -> GraphModule:
        """As `Read.closed`."""
        return read.closed(captured, self._tx.output.nn_modules)

    def emit(
        self,
        names: Mapping[GraphModule, str],
        graphs: Sequence[GraphModule],
        inputs: Sequence[object],
        keywords: Mapping[str, object],
        leaves: Sequence[int | tuple[object]] | None = None,
        tree: trees.Tree | None = None,
    ) -> Variable:
        """Write the node ``op(*graphs, inputs, **keywords)``; gives the call's result, a pytree of its outputs.

        Args:
            names: A name for every graph.
            graphs: The node's graphs.
            inputs: Values that `value` gave, or that a subgraph read captured.
            keywords: The node's keywords.
            leaves: The result's leaves: numbers of outputs of the node, and other values in a tuple. Default: a tuple
                of all outputs.
            tree: The result's structure.
        """
        installed = [self._installed(names[graph], graph) for graph in graphs]
        held = [(name, cast("GraphModule", self._tx.output.nn_modules[name])) for name in installed]
        with left(self._mode), enable_python_dispatcher():
            run = [graph for _, graph in held]
            examples = run_in_mode(lambda: self.target(*run, tuple(inputs), **keywords), self._mode)
        examples = tuple(cast("Sequence[object]", examples))
        if leaves is None or tree is None:
            leaves, (_, tree) = range(len(examples)), trees.flatten(examples)
        node = Written(held, dict(keywords), examples, leaves, tree)
        proxies = [self._proxies[identity(value)] for value in inputs]
        if self._call and node.repeatable(self._mode):
            self._call.keep(node, proxies)
        return self._written(node, proxies)

    def _written(self, node: Written, inputs: Sequence[Proxy]) -> Variable:
        tx = self._tx
        proxies = (*(hops.make_attr(tx, name) for name, _ in node.graphs), tuple(inputs))
        proxy = tx.output.create_proxy("call_function", self.target, proxies, dict(node.keywords))
        outputs = unpack_iterable(tx, wrap_fx_proxy(tx, proxy, example_value=node.examples))
        leaves = [outputs[leaf] if isinstance(leaf, int) else leaf[0] for leaf in node.leaves]
        return self.unflatten(leaves, node.tree)

    def _installed(self, name: str, graph: GraphModule) -> str:
        """The name under which Dynamo's graph holds this graph, or one that is equal: it is then compiled once."""
        output = self._tx.output
        known, key = _equal.setdefault(output.tracing_context, {}), equal.key(graph.graph, output.nn_modules)
        taken = known.get(key)
        if taken is None or output.nn_modules.get(taken[0]) is not taken[1]:  # what Dynamo takes back, it forgets
            taken = known[key] = (output.install_subgraph(name, graph), graph)
        return taken[0]

    def refuse(self, what: str, error: Exception) -> NoReturn:
        """End reading here: a graph break, or an error where there must be none.

        Raises:
            Unsupported: Always.
        """
        unimplemented(
            gb_type="hopkit: an op that Dynamo cannot record",
            context=what,
            explanation=str(error),
            hints=[],
            from_exc=error,
        )

    def knows(self, result: object) -> bool:
        """Whether this can be the result of a call that Dynamo reads."""
        return isinstance(result, VariableTracker)

    def unread(self, error: Exception, what: str) -> None:
        """As `refuse`, where Dynamo broke the graph; what it refuses in a subgraph alone it can read in place.

        Raises:
            Unsupported: Dynamo's own, with a word on where it is.
        """
        kind = (error.gb_type or "") if isinstance(error, Unsupported) else "HOP"
        if not (kind.startswith("HOP") or "higher order" in kind):
            unimplemented(
                gb_type="hopkit: a subgraph that Dynamo cannot read",
                context=what,
                explanation=f"{what} is to be one graph, and Dynamo cannot read it in one piece.",
                hints=["Move what breaks the graph out of the subgraph."],
                from_exc=error,
            )

    def inlined(self) -> Variable:
        """Says that the op's body is to be read in its place.

        Raises:
            Unsupported: The call is a node's, which has the body's arguments in another form; or `needed` says why not.
        """
        if self.needed:
            self.refuse("a call that must be a node", self.needed)
        if self.flat:
            self.refuse("a node of a graph", NotImplementedError("It can be read as a node alone, under no transform."))
        return self._constant(Instead.BODY)

    def taken(self, module: object, look: str, take: str, uses: Callable[[], Iterable[torch.Tensor]]) -> Variable:
        """As `inputs`; None is a constant."""
        found = inputs(self._tx, cast("Variable", module), look, take, uses)
        return self._constant(None) if found is None else found

    def _made(self, inputs: Sequence[object]) -> tuple[tuple[int, int], ...]:
        """Sizes that nobody knows before the op has run, and that Dynamo has not seen yet."""
        seen: set[object] = set(self._tx.output.current_tracer.bound_symbols)
        made: list[tuple[int, int]] = []
        for i, x in enumerate(inputs):
            for dim, n in enumerate(x.shape if isinstance(x, torch.Tensor) else ()):
                new = sizes.symbols([n]) - seen
                if sizes.unbacked(n) and new and str(n).isidentifier():
                    made.append((i, dim))
                    seen |= new
        return tuple(made)

    def _example(self, argument: torch.Tensor) -> torch.Tensor:
        fake = stand_in(argument, self._mode)
        return fake if argument.is_leaf else computed(fake)  # then it may be written to

    def _input(self, example: object) -> Variable:
        kind = TensorVariable if isinstance(example, torch.Tensor) else SymNodeVariable
        proxy = self._tx.output.current_tracer.create_graph_input("arg", type(example), example)
        return wrap_fx_proxy_cls(kind, self._tx, proxy, example_value=example)

    def _constant(self, value: object) -> Variable:
        return SourcelessBuilder.create(self._tx, value)

    def _variable(self, leaf: object) -> Variable:
        if isinstance(leaf, VariableTracker):
            return leaf
        if not isinstance(leaf, _INPUTS):
            return self._constant(leaf)
        if identity(leaf) in self._known:
            return self._known[identity(leaf)]
        return wrap_fx_proxy(self._tx, self._proxies[identity(leaf)], example_value=leaf)


def _unflatten(tx: InstructionTranslatorBase, leaves: Iterator[Variable], tree: trees.Tree) -> Variable:
    """The next leaves as this pytree. Of torch's own code for it, Dynamo would guard on all that it reads."""
    if tree.is_leaf():
        return next(leaves)
    children = [_unflatten(tx, leaves, child) for child in tree.children()]
    if tree.type in (tuple, list):
        return SourcelessBuilder.create(tx, cast("list[object]", tree.type(children)))
    # Dynamo does not find what torch knows of named tuples, and makes them as code does.
    if trees.is_named_tuple(tree):
        return SourcelessBuilder.create(tx, tree.context).call_function(tx, children, {})
    level = SourcelessBuilder.create(tx, trees.one_level(tree))
    return _make_inlined(tx, pytree.tree_unflatten)(SourcelessBuilder.create(tx, children), level)


def _attribute(value: object, name: str) -> object:
    """Dynamo reads this, as it would read any code that asks for an attribute."""
    return getattr(value, name)


class _Call(VariableTracker):
    """Calls a subgraph with the pytrees that its op's body called it with, made from the graph's flat inputs."""

    def __init__(
        self,
        subgraph: Variable,
        tree: trees.Tree,
        leaves: Sequence[int | Variable],
        skip: int,
        of: alike.Call[Written] | None,
    ) -> None:
        super().__init__()
        self._subgraph, self._tree, self._leaves, self._skip, self._of = subgraph, tree, leaves, skip, of

    def call_function(
        self,
        tx: InstructionTranslatorBase,
        args: Sequence[Variable],
        kwargs: Mapping[str, Variable],  # noqa: ARG002 # as Dynamo calls any callable
    ) -> Variable:
        """The subgraph's result."""
        inputs = args[self._skip :]
        leaves = iter([inputs[leaf] if isinstance(leaf, int) else leaf for leaf in self._leaves])
        arguments, keywords = self._tree.children()
        positional = [_unflatten(tx, leaves, child) for child in arguments.children()]
        named = {
            key: _unflatten(tx, leaves, child) for key, child in zip(keywords.context, keywords.children(), strict=True)
        }
        with self._of.looking() if self._of else contextlib.nullcontext():
            return self._subgraph.call_function(tx, positional, named)


_INPUTS = (torch.Tensor, *sizes.SYMBOLIC)
_LEAVES = (TensorVariable, SymNodeVariable, ConstantVariable)

_equal: weakref.WeakKeyDictionary[TracingContext, dict[object, tuple[str, GraphModule]]] = weakref.WeakKeyDictionary()


class _Readable(Protocol):
    def read(self, frame: Frame) -> Variable: ...


class Operator(hops.TorchHigherOrderOperatorVariable):
    """How Dynamo reads a call of any op of hopkit."""

    _HOP_NAME = "hopkit"

    def _call_function(
        self, tx: InstructionTranslatorBase, args: Sequence[Variable], kwargs: Mapping[str, Variable]
    ) -> Variable:
        return cast("_Readable", self.value).read(Frame(tx, self.value, args, kwargs))
