"""The live operator: how a call finds its way, in place or into torch's dispatcher."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, Literal, TypeAlias, cast, overload

import torch
from typing_extensions import ParamSpec, TypeVar

from hopkit import binding, install, layout, live
from hopkit._torch import checkpoint, dynamo, inductor, keys, state, trees
from hopkit._torch.autograd import needs_gradient, raise_in_backward
from hopkit._torch.constant import outcome
from hopkit._torch.fakes import bound, effectless, rehearsing
from hopkit._torch.operator import Operator
from hopkit._torch.operator import Place as TorchPlace
from hopkit._torch.read import Instead
from hopkit._torch.tracing import gradients_changed
from hopkit._torch.watch import replaced
from hopkit.asking import Asking, asking
from hopkit.call import Call
from hopkit.deciding import deciding
from hopkit.digest import cacheable, digest, other_body
from hopkit.errors import CallError, CaptureError, DataDependentError, HopkitWarning, RuleError, no_gradient
from hopkit.probe import Unrecordable, Unrehearsable, real_captures
from hopkit.record import Recorder, plain_form, run_or_examples, subgraphs
from hopkit.region import outlined
from hopkit.rule import Answer, Place, Table, ask
from hopkit.spec import Kind, OpSpec
from hopkit.transform import told

if TYPE_CHECKING:
    from types import FunctionType

    from hopkit._torch.frame import Frame
    from hopkit.extend.autograd import AutogradRule, Vjp
    from hopkit.extend.dynamo import DynamoRule
    from hopkit.extend.functionalize import FunctionalizeRule
    from hopkit.extend.inductor import InductorRule
    from hopkit.extend.jvp import JvpRule, TangentRule
    from hopkit.extend.proxy import ProxyRule
    from hopkit.extend.vmap import BatchRule, VmapRule
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

    Raises:
        CallError: There is none, or one of them is no op.
    """
    if not ops:
        raise TypeError("decompose() needs at least one op")
    for op in ops:
        check_op("hopkit.decompose()", op)
    token = _vanished.set(_vanished.get() | {op.spec.name for op in ops})
    try:
        yield
    finally:
        _vanished.reset(token)


def check_op(who: str, given: object) -> None:
    """Check that ``given`` is an op.

    Raises:
        CallError: It is something else.
    """
    if not isinstance(given, Op):
        raise CallError(
            who,
            f"expected an op, got {given!r}",
            why="an op is known by itself, as another may take its name",
            todo='Pass what `hopkit.define` made, or look it up: `hopkit.ops()["mypackage_myop"]`',
        )


def _told() -> contextlib.AbstractContextManager[None]:
    """For a node that is run in place: what is recorded of it may be differentiated again."""
    return told() if state.recording() and not rehearsing() else contextlib.nullcontext()


class Op(Generic[P, R]):
    """An op: called like its author's function, and known to torch as ``torch.ops.higher_order.<name>``."""

    def __init__(self, spec: OpSpec, load: Callable[[], None] | None, attach: Attach) -> None:
        self.spec = spec
        self.before: AnyOp | None = None
        self.place = TorchPlace(spec.name)
        self.operator = Operator(
            spec.name, self._enter_flat, self._run_flat, self._schema, self._read_call, self._digest, layout.KEYWORD
        )
        self.operator.decides = spec.stood_for
        if spec.effectful or spec.mutates:
            torch.fx.node.has_side_effect(self.operator)
        self.author: list[Answer] = []
        self.table: Table = {}
        self._body = cast("Callable[..., R]", spec.body)
        self._checks = binding.checks(spec)
        self._load, self._attach = load, attach
        self._transparent = False
        self._looks: Callable[[object], bool] | None = None
        self.revision = ""
        self._derives = spec.autograd == "derive"
        self._deferred_error = raise_in_backward(spec.name)
        self._asking = Asking(spec)
        self._compared: set[str] = set()
        functools.update_wrapper(self, spec.body)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if compiling():  # Dynamo reads this code
            return self._read(*args, **kwargs)
        quickly = self._transparent and state.quiet() and (not self._looks or self._looks((args, kwargs)))
        if quickly and binding.passes(self._checks, args, kwargs):
            try:
                result = self._body(*args, **kwargs)
            except TypeError:
                binding.bind(self.spec, args, kwargs)  # a call that does not fit gets the better message
                raise
            except RuntimeError:  # tensors without values, and no mode that says so
                if not self._asking.declared([args, kwargs]):
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
        self._settle()

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
    def rule(self, mode: Literal["inductor"]) -> Callable[[InductorRule], InductorRule]: ...
    @overload
    def rule(self, mode: Literal["vmap"]) -> Callable[[VmapRule | BatchRule], VmapRule | BatchRule]: ...
    @overload
    def rule(self, mode: Literal["jvp"]) -> Callable[[JvpRule | TangentRule], JvpRule | TangentRule]: ...
    @overload
    def rule(self, mode: Literal["dynamo"]) -> Callable[[DynamoRule], DynamoRule]: ...
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
        self.revision = uuid.uuid4().hex
        self.operator.install(install.kernels(self.spec.name, table, modes, self.decode))
        self._asking = asking(self.spec, table, modes)
        self._settle()

    def _settle(self) -> None:
        """Whether calls may take the short cut. Asked once, and not per call."""
        self._transparent = self._load is None and self.spec.autograd != "error" and not self._asking.quietly
        looks = functools.partial(state.ordinary, meta=keys.FAKE not in self._asking.modes)
        self._looks = looks if self._asking.by_operands else None

    # -- the way in, with the author's arguments ---------------------------------------------------------------------

    def _enter(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if self._load is not None:
            self._load()
        values = binding.bind(self.spec, args, kwargs)
        if state.recording():  # an operand may be what a subgraph around this call closes over
            values |= replaced({p.name: values[p.name] for p in self.spec.of_kind(Kind.OPERAND)})
        operands = [values[p.name] for p in self.spec.of_kind(Kind.OPERAND)]
        if self._asking.kernels and self._undisturbed() and (device := state.only_device(trees.leaves(operands))):
            kernels = [cast("Callable[..., object]", a.rule) for a in self._asking.kernels if a.device in ("", device)]
            arguments, keywords = self.spec.arguments(live.values(self.spec, values))
            return ask(self.spec.name, "device", kernels, *arguments, **keywords)
        unrehearsable: Unrecordable | None = None
        if self._asked(operands):
            try:
                return self._dispatch(values)
            except DataDependentError:
                if state.recording() or keys.FAKE not in self._asking.modes:
                    raise
                rules = [cast("Callable[..., object]", answer.rule) for answer in self.table["fake"]]
                arguments, keywords = self.spec.arguments(live.values(self.spec, values))
                return ask(self.spec.name, "fake", rules, *arguments, **keywords)
            except Unrehearsable as reason:
                unrehearsable = reason  # if the fault is the author's, the body says so itself
            except Unrecordable as reason:
                reason.report(self.spec)
        known = unrehearsable or (self.spec.stood_for and state.transforming())
        if rehearsing() or (known and self.spec.outputs and self._asking.declared(operands)):
            return self._in_place(lambda: run_or_examples(self.spec, values), args, kwargs)
        arguments, keywords = self.spec.arguments(values)
        vanished = self.spec.name in _vanished.get()
        body = self._body if vanished else self._asking.instead(self._body, operands)
        try:
            result = self._in_place(lambda: body(*arguments, **keywords), args, kwargs)
        except AssertionError as error:
            if state.mixes_fakes(error):
                self._refuse_captures(values, error)
            raise
        if unrehearsable is not None:
            unrehearsable.report(self.spec)
        return result

    def _refuse_captures(self, values: Mapping[str, object], error: AssertionError) -> None:
        for p in self.spec.of_kind(Kind.SUBGRAPH, Kind.SUBGRAPHS):
            for name, function in subgraphs(p.name, values[p.name]):
                for captured in real_captures(function):
                    raise CaptureError(
                        f"subgraph '{name}' of op '{self.spec.name}'",
                        f"closes over '{captured}', which has values where only stand-ins may be",
                        why="torch does not compute with both",
                        todo=f"Pass '{captured}' as an operand, or make a stand-in of it: `mode.from_tensor(...)`",
                    ) from error

    def _undisturbed(self) -> bool:
        """Whether nothing records, differentiates or transforms: then a kernel is all that a call needs."""
        return not (torch.is_grad_enabled() or state.transforming() or state.forward_mode()) and (
            state.quiet() and self.spec.name not in _vanished.get() and not torch.jit.is_tracing()
        )

    def _asked(self, operands: Sequence[object]) -> bool:
        """Whether something active asks for the op whole; otherwise its body runs in place."""
        if self.spec.name in _vanished.get() or (rehearsing() and keys.FAKE not in self._asking.modes):
            return False
        if state.recording() or state.functionalizing():
            # Of what is computed again only the second time may be kept, and that without its effect.
            if (self.spec.effectful and checkpoint.inside()) or (inductor.compiling() and self._inlined()):
                return False
            # A graph knows an operator by its name alone, which another op may have taken.
            return self.place.holds(self.operator) and not (
                state.overridden()
                or any(state.foreign(leaf) for leaf in trees.leaves(operands))
                or (self.spec.untransformed and state.transforming())
            )
        return self._asking.asks(operands)

    def _inlined(self) -> bool:
        """Whether Inductor gets the body: it fuses then, and shares what backward needs, like any code."""
        if install.lowered(self.table):
            inductor.lower(self.operator, self._lower)
            return False
        deferred = self.spec.autograd == "deferred_error" and torch.is_grad_enabled()  # a node, whose backward raises
        asked = self._asking.always or deferred or self._asking.by_transform()
        return not (asked or install.called_back(self.spec) or outlined(self.spec))

    def _lower(self, /, *args: object, **kwargs: object) -> object:
        call = self.decode(*args, **kwargs)
        answers = self.table["inductor"]
        if call.transformed:  # what was written for the op is not its derivative
            answers = tuple(answer for answer in answers if answer.place is Place.BUILTIN)
        outputs = ask(self.spec.name, "inductor", [cast("Callable[..., object]", a.rule) for a in answers], call)
        if not inductor.is_lowered(outputs):
            raise self._gave("inductor", outputs, "the node's outputs, a tuple, in Inductor's terms: `lowered(...)`")
        return outputs

    def _gave(self, mode: str, found: object, wanted: str) -> RuleError:
        return RuleError(
            f"the {mode} rule of op '{self.spec.name}'",
            f"gave {found!r}",
            why="it would be taken for what the op gives",
            todo=f"Let it give {wanted}",
        )

    def _dispatch(self, values: Mapping[str, object]) -> object:
        recorder = Recorder(self.spec, values)
        if plain := self._plain(values):
            recorder.refuse_writes()
            graph, inputs, options = plain
            return self.operator.redispatch(graph, inputs, **options)
        recording = recorder.record(self.operator.digest())
        keywords = {layout.KEYWORD: recording.layout.dumps()}
        if self._untold(lambda: self.decode(*recording.graphs, recording.inputs, **recording.options, **keywords)):
            raise Unrecordable("the gradient would be that of something else", declared=True)
        outputs = self.operator.redispatch(*recording.graphs, recording.inputs, **recording.options, **keywords)
        return recording.restore(cast("Sequence[object]", outcome(outputs, recording.inputs)))

    def _untold(self, call: Callable[[], Call]) -> bool:
        """Whether a node would not tell the derivative, or that there is none: above autograd, which comes later."""
        if not (state.before_dispatch() and state.recording()):
            return False
        if torch.compiler.is_exporting() and gradients_changed():
            return True
        if not (torch.is_grad_enabled() and self._derives):
            return False
        told = call()
        if torch.compiler.is_exporting() or not needs_gradient(told.inputs):
            return False
        # Of a body that decides on values there is nothing else to record.
        return (self._asking.derivative and self.spec.outputs is None) or bool(told.unseen)

    def _plain(self, values: Mapping[str, object]) -> tuple[object, object, dict[str, object]] | None:
        # Rules that see the author's arguments, and those that transform them, need the layout.
        if self._asking.derivative or state.transforming():
            return None
        # The built-in proxy rule traces the graph anew; one of the op's own may keep what takes nested arguments.
        return plain_form(self.spec, values, nested=keys.PROXY in self._asking.modes)

    def _in_place(self, run: Callable[[], object], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if self.spec.autograd == "error" and needs_gradient(trees.leaves([args, kwargs])):
            raise no_gradient(self.spec.name)
        if self.spec.effectful and self.spec.name not in _vanished.get():
            self._refuse_lost_effect()
        result = self._observed(run, args, kwargs)
        return result if self._derives else self._defer(result)

    def _refuse_lost_effect(self) -> None:
        if effectless():
            raise Unrecordable(f"it calls op '{self.spec.name}', which has an effect", declared=True)
        if state.recording():
            raise self._lost_effect()

    def _lost_effect(self) -> CallError:
        return CallError(
            f"op '{self.spec.name}'",
            "has an effect, and cannot be recorded here: under a transform of torch.func, in a checkpoint, or on "
            "tensors of a class of their own there is no node of it",
            why="its body would run now, and not when the graph runs",
            todo="Call it outside of these; or, for an effect while recording, inside `hopkit.decompose(op)`",
        )

    def _observed(self, run: Callable[[], object], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Run the inside where those that see operators are told of the op: a profile, a log, a checkpoint's policy."""
        if self.spec.name in _vanished.get():
            return run()
        name = torch.profiler.record_function(self.spec.name) if state.logged() else contextlib.nullcontext()
        # What a function mode keeps from being a node is one when it is computed again, if the mode is over by then.
        apart = checkpoint.uncounted() if state.recording() and state.overridden() else contextlib.nullcontext()
        with name, checkpoint.decided(self.operator, args, kwargs), apart, deciding(self.spec):
            return run()

    def _defer(self, result: object) -> object:
        """For "deferred_error": what would have a gradient gets one that raises. Dynamo sees the body alone."""
        if not torch.is_grad_enabled():
            return result
        if not needs_gradient(trees.quick_leaves(result)) or state.transforming() or state.forward_mode():
            return result
        return self._deferred_error(result)

    # -- what Dynamo reads, and what answers it ---------------------------------------------------------------------

    def _read(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        # Dynamo guards on what it has to read: compiled code is for this revision of the rules alone.
        result = self.operator(*args, **kwargs) if self.revision else Instead.BODY
        return self._body(*args, **kwargs) if result is Instead.BODY else cast("R", result)

    def _read_call(self, frame: Frame) -> object:
        if self._load is not None:
            self._load()
        frame.flat = layout.KEYWORD in frame.kwargs
        if frame.flat:
            self._compare(layout.loads(cast("str", frame.option(frame.kwargs[layout.KEYWORD]))))
        if self.spec.name in _vanished.get():
            return frame.inlined()
        if self.spec.effectful and torch.compiler.is_exporting():  # torch.compile does again what the body did
            frame.needed = self._lost_effect()
        if self.spec.untransformed and state.transforming():
            return frame.inlined()
        rules = [cast("Callable[..., object]", answer.rule) for answer in self.table["dynamo"]]
        result = ask(self.spec.name, "dynamo", rules, frame, self.spec)
        if not frame.knows(result):
            raise self._gave("dynamo", result, "what `record(frame, op)` or `inline(frame, op)` of hopkit.extend gives")
        return result

    # -- the way in, as a node of a graph ----------------------------------------------------------------------------

    def _enter_flat(self, /, *args: object, **kwargs: object) -> object:
        if self._load is not None:
            self._load()
        if args and state.symbolic(args[-1]):
            return self.operator.redispatch(*args, **kwargs)
        if layout.KEYWORD not in kwargs:  # then these are the author's own arguments
            return cast("AnyOp", self)(*args, **kwargs)
        call = self.decode(*args, **kwargs)
        quickly = self._transparent and state.quiet() and (not self._looks or self._looks(call.inputs))
        asked = not quickly and self._asked(call.inputs)
        if asked and not self._untold(lambda: call):
            return self._stamped(call)()
        self._compare(call.layout)
        with _told():
            stands_in = rehearsing() or (self.spec.stood_for and self._asking.declared(call.inputs))
            result = self._in_place(call.like_body if stands_in else call.run, args, kwargs)
        return result if state.quiet() else bound(result, call.inputs)

    def _stamped(self, call: Call) -> Call:
        """``call`` as it would be recorded today: it is today's body that is compiled, and that caches must go by."""
        assert call.layout is not None
        self._compare(call.layout)
        return call.replace(layout=dataclasses.replace(call.layout, digest=self.operator.digest()))

    def _compare(self, recorded_as: layout.Layout | None) -> None:
        """Warn where the author has written something else since a node was recorded."""
        # A region has what it computes in it.
        recorded = recorded_as.digest if recorded_as and not recorded_as.region else ""
        if recorded not in self._compared:
            self._compared.add(recorded)
            if other_body(recorded, self.operator.digest()):
                warnings.warn(
                    f"op '{self.spec.name}' was recorded with another body; the new body runs. Record the graph again "
                    "where the values must be those of the old one.",
                    HopkitWarning,
                    stacklevel=3,
                )

    def _digest(self) -> tuple[str, bool]:
        text = digest(self.spec, self.table)
        return text or "", text is not None and cacheable(self.spec)

    def _run_flat(self, /, *args: object, **kwargs: object) -> object:
        with _told():
            return self._observed(self.decode(*args, **kwargs).run, args, kwargs)

    def decode(self, /, *args: object, **kwargs: object) -> Call:
        """The call that a node with these arguments stands for."""
        *graphs, inputs = args
        text = kwargs.pop(layout.KEYWORD, None)
        known = layout.loads(cast("str", text)) if text is not None else None
        leaves, tree = trees.flatten(inputs)
        return Call(
            self.spec,
            self.operator,
            tuple(cast("list[Callable[..., object]]", graphs)),
            tuple(leaves),
            kwargs,
            known,
            tree if known is None else None,
            self._asking.whole,
        )

    def _schema(self, /, *args: object, **kwargs: object) -> object:
        call = self.decode(*args, **kwargs) if layout.KEYWORD in kwargs else self._recorded(args, kwargs)
        return call.schema(() if call.transformed else call.declared)

    def _recorded(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Call:
        """The call that the author's arguments become in a graph."""
        values = binding.bind(self.spec, args, kwargs)
        if plain := self._plain(values):
            graph, inputs, options = plain
            return self.decode(graph, inputs, **options)
        try:
            recording = Recorder(self.spec, values).record(self.operator.digest())
        except Unrecordable as reason:
            raise CallError(
                f"{self.spec.name}.gen_schema()",
                f"got a call that is no node of a graph: {reason}",
                why="a schema is that of a node",
                todo="Pass what a node has: `gen_schema(*node.args, **node.kwargs)`",
            ) from reason
        keywords = {layout.KEYWORD: recording.layout.dumps()}
        return self.decode(*recording.graphs, recording.inputs, **recording.options, **keywords)


dynamo.skip(cast("FunctionType", Op._dispatch))  # a mode that Dynamo does not know makes it read single frames
