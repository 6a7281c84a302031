"""The live operator: how a call finds its way, in place or into torch's dispatcher."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, Literal, TypeAlias, cast, overload

import torch
from typing_extensions import ParamSpec, TypeVar

from hopkit import binding, install, layout, live
from hopkit._torch import keys, schema, sizes, state, trees
from hopkit._torch.autograd import needs_gradient, raise_in_backward
from hopkit._torch.fakes import rehearsing
from hopkit._torch.operator import Operator
from hopkit._torch.operator import Place as TorchPlace
from hopkit.call import Call
from hopkit.errors import no_gradient
from hopkit.probe import Unrecordable, Unrehearsable
from hopkit.record import Recorder, plain_form, run_or_examples
from hopkit.rule import Answer, Place, Table, ask
from hopkit.spec import Kind, OpSpec

if TYPE_CHECKING:
    from hopkit.extend.autograd import AutogradRule, Vjp
    from hopkit.extend.functionalize import FunctionalizeRule
    from hopkit.extend.proxy import ProxyRule
    from hopkit.modes import Mode

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

F = TypeVar("F")

Attach: TypeAlias = "Callable[[AnyOp, str, object, str], None]"
AnyOp: TypeAlias = "Op[..., object]"

compiling = torch.compiler.is_dynamo_compiling

_vanished: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("hopkit.decompose", default=frozenset())


@contextlib.contextmanager
def decompose(*ops: AnyOp) -> Iterator[None]:
    """Inside, these ops vanish: their bodies run in their place, whatever records, and no rule is asked.

    Args:
        ops: The ops. At least one.
    """
    if not ops:
        raise TypeError("decompose() needs at least one op")
    token = _vanished.set(_vanished.get() | {op.spec.name for op in ops})
    try:
        yield
    finally:
        _vanished.reset(token)


class Op(Generic[P, R]):
    """An op: called like its author's function, and known to torch as ``torch.ops.higher_order.<name>``."""

    def __init__(self, spec: OpSpec, load: Callable[[], None] | None, attach: Attach) -> None:
        self.spec = spec
        self.before: AnyOp | None = None
        self.place = TorchPlace(spec.name)
        self.operator = Operator(spec.name, self._enter_flat, self._run_flat, self._schema)
        if spec.effectful:
            torch.fx.node.has_side_effect(self.operator)
        self.author: list[Answer] = []
        self.table: Table = {}
        self._body = cast("Callable[..., R]", spec.body)
        self._checks = binding.checks(spec)
        self._load, self._attach = load, attach
        self._transparent = self._shortest = False
        self._derives = spec.autograd == "derive"
        self._deferred_error = raise_in_backward(spec.name)
        self._asking: frozenset[type] = frozenset()
        self._eager = False
        self._kernels: tuple[Answer, ...] = ()
        functools.update_wrapper(self, spec.body)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if compiling():  # Dynamo reads this code, and goes on to the body
            return self._body(*args, **kwargs)
        if self._transparent and state.quiet() and binding.passes(self._checks, args, kwargs):
            try:
                result = self._body(*args, **kwargs)
            except TypeError:
                binding.bind(self.spec, args, kwargs)  # a call that does not fit gets the better message
                raise
            except RuntimeError as error:  # tensors without values, and no mode that says so
                if self.spec.outputs is None or not sizes.data_dependent(error):
                    raise
                return cast("R", self._enter(args, kwargs))
            return result if self._derives else cast("R", self._defer(result))
        return cast("R", self._enter(args, kwargs))

    def __repr__(self) -> str:
        return f"<op {self.spec.name}{self.spec.shown()}>"

    def __reduce__(self) -> str:
        return self.spec.body.__qualname__

    # -- rules -------------------------------------------------------------------------------------------------------

    def loaded(self) -> None:
        """The installed plugins are there. Until then no call takes the short cut: a plugin may ask for the op.

        They come with the first call, not with the import: a plugin may be what is being imported.
        """
        self._load = None
        self._transparent = self._shortest

    @overload
    def rule(self, mode: Literal["device"], *, device: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]: ...
    @overload
    def rule(self, mode: Literal["fake"]) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
    @overload
    def rule(self, mode: Literal["autograd"]) -> Callable[[Vjp[P, R] | AutogradRule], Vjp[P, R] | AutogradRule]: ...
    @overload
    def rule(self, mode: Literal["functionalize"]) -> Callable[[FunctionalizeRule], FunctionalizeRule]: ...
    @overload
    def rule(self, mode: Literal["proxy"]) -> Callable[[ProxyRule], ProxyRule]: ...
    @overload
    def rule(self, mode: str) -> Callable[..., object]: ...
    def rule(self, mode: str, *, device: str = "") -> object:
        """Attach a rule of the author's: ``@op.rule("fake")``.

        Args:
            mode: The mode it answers in. The signature that a rule must have is the mode's; see `hopkit.extend`.
            device: For mode "device", the device type it is limited to, such as "cuda".

        Raises:
            PluginError: There is no such mode, or the rule does not fit it.
        """

        def attach(rule: F) -> F:
            self._attach(self, mode, rule, device)
            return rule

        return attach

    def install(self, table: Table, modes: Sequence[Mode]) -> None:
        """Let these rules answer, in torch's tables and in plain eager."""
        self.table = table
        self.operator.install(install.kernels(self.spec.name, table, modes, self._decode))
        written = self._written = {
            mode for mode, answers in table.items() if answers and answers[0].place is not Place.BUILTIN
        }
        self._eager = bool(written & {"device", "autograd"})
        added = {mode.entry for mode in modes if mode.name in written and isinstance(mode.entry, type)}
        named = {"fake": keys.FAKE, "proxy": keys.PROXY, "functionalize": keys.FUNCTIONALIZE}
        self._asking = frozenset(added | {key for mode, key in named.items() if mode in written})
        self._subclasses = tuple(kind for kind in added if issubclass(kind, torch.Tensor))
        self._backends = any(not isinstance(mode.entry, (type, str)) for mode in modes if mode.name in written)
        self._kernels = table["device"] if self._eager and not (self._subclasses or self._backends) else ()
        asks = self._eager or self._subclasses or self._backends
        self._shortest = not asks and self.spec.autograd != "error"
        self._transparent = self._shortest and self._load is None

    # -- the way in, with the author's arguments ---------------------------------------------------------------------

    def _enter(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if self._load is not None:
            self._load()
        values = binding.bind(self.spec, args, kwargs)
        operands = [values[p.name] for p in self.spec.of_kind(Kind.OPERAND)]
        if self._kernels and self._undisturbed() and (device := state.only_device(trees.leaves(operands))):
            kernels = [cast("Callable[..., object]", a.rule) for a in self._kernels if a.device in ("", device)]
            arguments, keywords = self.spec.arguments(live.values(self.spec, values))
            return ask(self.spec.name, "device", kernels, *arguments, **keywords)
        unrehearsable: Unrecordable | None = None
        if self._asked(operands):
            try:
                return self._dispatch(values)
            except Unrehearsable as reason:
                unrehearsable = reason  # if the fault is the author's, the body says so itself
            except Unrecordable as reason:
                reason.report(self.spec)
        if rehearsing():
            return self._in_place(lambda: run_or_examples(self.spec, values), (args, kwargs))
        result = self._in_place(lambda: self._body(*args, **kwargs), (args, kwargs))
        if unrehearsable is not None:
            unrehearsable.report(self.spec)
        return result

    def _undisturbed(self) -> bool:
        """Whether nothing records, differentiates or transforms: then a kernel is all that a call needs."""
        return not (torch.is_grad_enabled() or state.transforming() or state.forward_mode()) and (
            state.quiet() and self.spec.name not in _vanished.get()
        )

    def _asked(self, operands: Sequence[object]) -> bool:
        """Whether something active asks for the op whole; otherwise its body runs in place."""
        if self.spec.name in _vanished.get() or (rehearsing() and keys.FAKE not in self._asking):
            return False
        if state.recording():
            # A graph knows an operator by its name alone, which another op may have taken.
            return self.place.holds(self.operator) and not (
                state.overridden() or any(state.foreign(leaf) for leaf in trees.leaves(operands))
            )
        if state.transforming() or state.forward_mode():
            return False
        if self._eager or self._backends:
            return True
        if self.spec.outputs is not None and state.shapes_only(trees.leaves(operands)):
            return True
        if any(type(mode) in self._asking or state.takes_ops(mode) for mode in state.dispatch_modes()):
            return True
        return bool(self._subclasses) and any(isinstance(leaf, self._subclasses) for leaf in trees.leaves(operands))

    def _dispatch(self, values: Mapping[str, object]) -> object:
        plain, recorder = plain_form(self.spec, values), Recorder(self.spec, values)
        # A derivative written by hand sees the author's arguments, and so needs the layout.
        if plain is not None and "autograd" not in self._written:
            recorder.refuse_writes()
            graph, inputs, options = plain
            return self.operator.redispatch(graph, inputs, **options)
        recording = recorder.record()
        keywords = {layout.KEYWORD: recording.layout.dumps()}
        outputs = self.operator.redispatch(*recording.graphs, recording.inputs, **recording.options, **keywords)
        return recording.restore(cast("Sequence[object]", outputs))

    def _in_place(self, run: Callable[[], object], inputs: object) -> object:
        if self.spec.autograd == "error" and needs_gradient(trees.leaves(inputs)):
            raise no_gradient(self.spec.name)
        with torch.profiler.record_function(self.spec.name) if state.profiling() else contextlib.nullcontext():
            result = run()
        return result if self._derives else self._defer(result)

    def _defer(self, result: object) -> object:
        """For "deferred_error": what would have a gradient gets one that raises. Dynamo sees the body alone."""
        if not torch.is_grad_enabled():
            return result
        if not needs_gradient(trees.quick_leaves(result)) or state.transforming() or state.forward_mode():
            return result
        return self._deferred_error(result)

    # -- the way in, as a node of a graph ----------------------------------------------------------------------------

    def _enter_flat(self, /, *args: object, **kwargs: object) -> object:
        if self._load is not None:
            self._load()
        if args and state.symbolic(args[-1]):
            return self.operator.redispatch(*args, **kwargs)
        if layout.KEYWORD not in kwargs:  # then these are the author's own arguments
            return cast("AnyOp", self)(*args, **kwargs)
        call = self._decode(*args, **kwargs)
        if not (self._transparent and state.quiet()) and self._asked(call.inputs):
            return self.operator.redispatch(*args, **kwargs)
        return self._in_place(call.like_body if rehearsing() else call.run, call.inputs)

    def _run_flat(self, /, *args: object, **kwargs: object) -> object:
        return self._decode(*args, **kwargs).run()

    def _decode(self, /, *args: object, **kwargs: object) -> Call:
        *graphs, inputs = args
        text = kwargs.pop(layout.KEYWORD, None)
        known = layout.loads(cast("str", text)) if text is not None else None
        return Call(
            self.spec,
            self.operator,
            tuple(cast("list[Callable[..., object]]", graphs)),
            tuple(cast("Sequence[object]", inputs)),
            kwargs,
            known,
        )

    def _schema(self, /, *args: object, **kwargs: object) -> object:
        call = self._decode(*args, **kwargs)
        outputs = trees.leaves(call.rehearsal.outputs)
        mutated = [i for i in range(len(call.inputs)) if call.parameter(i) in self.spec.mutates]
        return schema.generate(self.operator, call.graphs, call.inputs, call.keywords, outputs, mutated)
