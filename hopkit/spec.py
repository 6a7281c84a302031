"""What an op is: frozen data. Neither torch nor pluggy is imported here."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from typing_extensions import TypeVar

from hopkit.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

Out = TypeVar("Out", covariant=True, default="Tensor")

AutogradPolicy = Literal["derive", "deferred_error", "error"]
_POLICIES = ", ".join(map(repr, get_args(AutogradPolicy)))


class Subgraph(Protocol[Out]):
    """A callable that an op carries: a Python function before tracing, a ``GraphModule`` after.

    ``Subgraph`` alone returns a tensor; ``Subgraph[tuple[Tensor, Tensor]]`` returns what it says.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Out: ...


class Kind(enum.Enum):
    """What a parameter is to the modes."""

    SUBGRAPH = "subgraph"
    SUBGRAPHS = "tuple of subgraphs"
    OPERAND = "operand"
    OPTION = "option"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of an op.

    Args:
        name: As in the body.
        kind: What it is to the modes.
        annotation: The annotation as the author would write it, for messages and the repr.
        passing: How Python passes it (``inspect.Parameter.KEYWORD_ONLY`` and so on).
        default: ``inspect.Parameter.empty`` where there is none.
        graph_only: A subgraph that must be a ``torch.fx.GraphModule``.
        accepts: What an option may be: its annotation, made of classes, unions, literals and tuples alone.
    """

    name: str
    kind: Kind
    annotation: str
    passing: inspect._ParameterKind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    default: object = inspect.Parameter.empty
    graph_only: bool = False
    accepts: object = object

    @property
    def variadic(self) -> bool:
        """Whether this is ``*name``; its value is then a tuple."""
        return self.passing is inspect.Parameter.VAR_POSITIONAL


@dataclasses.dataclass(frozen=True)
class Sample:
    """One example call of an op, for ``check`` and for the tests.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        name: A short label, shown in reports.
    """

    args: tuple[object, ...]
    kwargs: Mapping[str, object] = dataclasses.field(default_factory=dict)
    name: str = ""


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """The frozen description of an op. ``hopkit.define`` makes the live op from it.

    Args:
        name: torch's name for the op; an identifier, unique in the process. Prefix it with your package.
        body: An ordinary function that calls the subgraphs it is given. It is the op's meaning.
        parameters: What the body takes; ``hopkit.parameters.parse(body)`` reads it from the annotations.
        inputs: ``inputs(*op_args)`` gives, for every subgraph, the tuple of example arguments that it is called with.
        outputs: A fake rule with the body's signature: the outputs' shapes, without deciding on values.
        abstract: Both at once: gives what ``outputs`` does, and itself calls every subgraph on what the body calls it
            with. It is then ``outputs``, too.
        autograd: "derive", "deferred_error" (outputs raise in backward) or "error" (the call raises).
        pure: The result depends on the arguments alone.
        mutates: Names of operands that the op writes to.
        aliases: Names of operands that outputs may share memory with.
        effectful: The op does more than return: it is ordered and never removed.
        random: The op draws random numbers.
        outline: Keep the op's subgraph as one compiled region.
        samples: Gives example calls, for ``check``.
    """

    name: str
    body: Callable[..., object]
    parameters: tuple[Parameter, ...]
    inputs: Callable[..., object] | None = None
    outputs: Callable[..., object] | None = None
    abstract: Callable[..., object] | None = None
    autograd: AutogradPolicy = "derive"
    pure: bool = True
    mutates: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    effectful: bool = False
    random: bool = False
    outline: bool = False
    samples: Callable[[], Iterable[Sample]] | None = None

    def __post_init__(self) -> None:
        operands = [p.name for p in self.of_kind(Kind.OPERAND)]
        for keyword, names in (("mutates", self.mutates), ("aliases", self.aliases)):
            for name in names:
                if name not in operands:
                    raise self._wrong(f"{keyword}={names!r}", f"'{name}' is no operand", f"Name one of {operands}")
        if self.autograd not in get_args(AutogradPolicy):
            raise self._wrong(f"autograd={self.autograd!r}", "there is no such policy", f"Say one of {_POLICIES}")
        given = {"inputs": self.inputs, "outputs": self.outputs, "abstract": self.abstract}
        if self.abstract is not None:
            if self.inputs is not None or self.outputs not in (None, self.abstract):
                todo = "Give `abstract` alone, or the other two"
                raise self._wrong("abstract=", "`inputs=` or `outputs=` was given, too", todo)
            del given["outputs"]
            object.__setattr__(self, "outputs", self.abstract)
        for keyword, function in given.items():
            if function is not None:
                try:
                    self.check_signature(function)
                except TypeError as error:
                    todo = f"Give `{keyword}` the body's parameters, {self.shown()}"
                    raise self._wrong(f"{keyword}=", f"it does not take the body's arguments: {error}", todo) from error

    def _wrong(self, what: str, found: str, todo: str) -> SpecError:
        why = "what is declared of an op steers every mode"
        return SpecError(f"op '{self.name}'", f"was declared with `{what}`: {found}", why=why, todo=todo)

    @property
    def stood_for(self) -> bool:
        """Whether something else than the body is run on stand-ins: the body decides on values, or loops for long."""
        return self.inputs is not None or self.abstract is not None

    @property
    def untransformed(self) -> bool:
        """Whether a transform of torch.func runs its body as it stands: what is declared of it has no transform."""
        return self.effectful or bool(self.mutates)

    def check_signature(self, function: Callable[..., object]) -> None:
        """Check that ``function`` can be called as the body is.

        Raises:
            TypeError: It takes other parameters, or the same in another order.
        """
        try:
            signature = inspect.signature(function)
        except ValueError:  # a builtin that has none
            return
        args, kwargs = self.arguments({p.name: () if p.variadic else None for p in self.parameters})
        signature.bind(*args, **kwargs)
        names = [p.name for p in self.parameters if p.passing is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        taken = [n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        if taken[: len(names)] != names[: len(taken)]:
            raise TypeError(f"it calls its parameters {taken}, and the body {names}")

    def __repr__(self) -> str:
        return f"OpSpec({self.name!r}, {self.shown()})"

    def of_kind(self, *kinds: Kind) -> tuple[Parameter, ...]:
        """The parameters of the given kinds, in order."""
        return tuple(p for p in self.parameters if p.kind in kinds)

    def signature(self) -> inspect.Signature:
        """The parameters as Python's own signature."""
        return inspect.Signature(
            [inspect.Parameter(p.name, p.passing, default=p.default, annotation=p.annotation) for p in self.parameters]
        )

    def shown(self) -> str:
        """The parameters as their author wrote them."""
        text = str(self.signature())
        for p in self.parameters:
            text = text.replace(repr(p.annotation), p.annotation)
        return text

    def arguments(self, values: Mapping[str, object]) -> tuple[list[object], dict[str, object]]:
        """``(args, kwargs)`` that pass ``values``, one for every parameter, to the body."""
        args: list[object] = []
        kwargs: dict[str, object] = {}
        for p in self.parameters:
            value = values[p.name]
            if p.variadic:
                assert isinstance(value, tuple)
                args.extend(value)
            elif p.passing is inspect.Parameter.KEYWORD_ONLY:
                kwargs[p.name] = value
            else:
                args.append(value)
        return args, kwargs
