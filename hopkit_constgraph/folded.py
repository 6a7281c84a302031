"""What `fold` makes of a module: a graph that shares its weights, and that is called like a module written by hand."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch.export.graph_signature import ExportGraphSignature, InputKind, TensorArgument
from torch.fx import Graph, GraphModule

import hopkit
from hopkit.extend.dynamo import undecorated
from hopkit_constgraph.code import Flat, Operands, kinds_of, operands, quicken
from hopkit_constgraph.kept import known
from hopkit_constgraph.op import run_const_graph_once
from hopkit_constgraph.release import refuse

ExportedProgram = torch.export.ExportedProgram


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A program without its weights."""

    graph: GraphModule
    signature: ExportGraphSignature
    objects: Mapping[str, Any]
    parts: Mapping[str, Any]

    @classmethod
    def of(cls, program: ExportedProgram) -> Recipe:
        """That of a program."""
        objects = {name: value for name, value in program.constants.items() if not isinstance(value, torch.Tensor)}
        names = ("range_constraints", "module_call_graph", "example_inputs", "verifiers")
        parts = {name: getattr(program, name) for name in names}
        return cls(program.graph_module, program.graph_signature, objects, parts)

    def program(self, module: torch.nn.Module) -> ExportedProgram:
        """The program, with the weights that a module has."""
        state: dict[str, torch.Tensor] = {}
        constants: dict[str, Any] = dict(self.objects)
        for spec in self.signature.input_specs:
            if isinstance(spec.arg, TensorArgument) and spec.target is not None:
                saved = spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent)
                (state if saved else constants)[spec.target] = operator.attrgetter(spec.target)(module)
        return ExportedProgram(self.graph, self.graph.graph, self.signature, state, constants=constants, **self.parts)


class Folded(GraphModule):
    """A folded module: what ``program.module()`` gives, as fast as a module written by hand, and able to pickle."""

    _recipe: Recipe
    _released: frozenset[str]
    _operands: Callable[[torch.nn.Module], Operands] | None
    _once = staticmethod(run_const_graph_once)

    @classmethod
    def of(cls, program: ExportedProgram, released: Iterable[str] = ()) -> Folded:
        """The module of a program.

        Args:
            program: A folded program with example inputs.
            released: The names of weights that it has no more.
        """
        module = program.module()
        given, named = program.example_inputs or ((), {})
        body = {name: value for name, value in module.__dict__.items() if name not in ("train", "eval")}
        if hasattr(module, "_guards_fn") and all(map(_is_leaf, (*given, *named.values()))):
            # What torch does before and after a call: compare trees, of which there are none here.
            body |= {name: v for name, v in torch.nn.Module().__dict__.items() if name.startswith("_forward_")}
            body["_checked"] = undecorated(module.get_submodule("_guards_fn").forward)
            if program.call_spec.out_spec.is_leaf():
                module.graph.set_codegen(Flat(module, given, named))
        kinds = kinds_of(module)
        body["_operands"] = operands(module.graph, kinds)
        module.graph.on_generate_code(lambda _: functools.partial(quicken, kinds, "_checked" in body))
        made = cls._made({**body, "_recipe": Recipe.of(program), "_released": frozenset(released)})
        for name in made._released:
            owner, _, leaf = name.rpartition(".")
            part = next((m for n, m in made.named_modules() if n == owner), None)
            if type(part) is torch.nn.Module:  # as torch makes them; it holds weights, and nothing else
                part.__class__ = _Emptied
            if isinstance(part, _Emptied):
                part.__dict__.setdefault("_gone", {})[leaf] = name
        return made

    @classmethod
    def _made(cls, body: Mapping[str, object]) -> Folded:
        made = cls.__new__(cls)
        made.__dict__.update(body)
        made.graph = cast("Graph", body["_graph"])  # writes the code
        setattr(type(made), "__call__", torch.nn.Module.__call__)  # noqa: B010 - torch's adds code to errors, and time
        return made

    def train(self, mode: bool = True) -> Folded:
        """Nothing, where the model was traced in this mode.

        Raises:
            HopkitError: It was traced in the other one.
        """
        if mode is not self.training:
            raise hopkit.HopkitError(
                "a folded model",
                f"is in {_mode(self.training)} for good, and cannot be put into {_mode(mode)}",
                why="it is the graph that was traced",
                todo=f"Fold the model again: `fold(model.{'train' if mode else 'eval'}(), inputs)`",
            )
        return self

    def _ahead(self) -> tuple[torch.Tensor, ...] | None:
        """What the constant graph gives, for compiled code. None: what is kept is not good there."""
        return self._known(ahead=False)

    def _look_ahead(self) -> tuple[torch.Tensor, ...] | None:
        """The same, for whoever only compares it."""
        return self._known(ahead=True)

    def _known(self, *, ahead: bool) -> tuple[torch.Tensor, ...] | None:
        try:
            graph, args = self._operands(self) if self._operands else (None, ())
        except (KeyError, AttributeError):  # one is parametrized now, say
            return None
        return known(graph, args, ahead=ahead) if graph is not None else None

    def _ahead_of(self) -> tuple[torch.Tensor, ...]:
        """The weights that the constant graph takes."""
        return self._operands(self)[1] if self._operands else ()

    def _load_from_state_dict(self, state_dict: dict[str, object], prefix: str, *rest: object) -> None:
        if gone := [name for name in self._released if prefix + name in state_dict]:
            refuse(sorted(gone))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _replicate_for_data_parallel(self) -> Folded:
        """As that of any module, with the code of this one. That of torch's graphs keeps the parameters."""
        replica = object.__new__(type(self))
        own = {"_parameters": {}, "_buffers": self._buffers.copy(), "_modules": self._modules.copy()}
        replica.__dict__.update({**self.__dict__, **own, "_is_replica": True})
        return replica

    def __deepcopy__(self, memo: dict[int, object]) -> Folded:
        same = {name: self.__dict__[name] for name in ("_recipe", "_released")}
        body = {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items() if name not in same}
        made = memo[id(self)] = self._made({**body, **same})
        return made

    def __reduce__(self) -> tuple[object, ...]:
        """As a program, with the weights of today. torch's way would bake in all that depends on weights alone."""
        file = io.BytesIO()
        torch.export.save(self._recipe.program(self), file)
        return _loaded, (file.getvalue(), self._released, self.training)


def module_of(program: ExportedProgram) -> torch.nn.Module:
    """The module of a folded program, a loaded one say, as `fold` makes it of a module.

    It gives what ``program.module()`` gives, with less work before and after each call, and can be copied and pickled.

    Raises:
        HopkitError: It is no exported program.
    """
    if not isinstance(program, ExportedProgram):
        raise hopkit.HopkitError(
            "module_of()",
            f"expected a torch.export.ExportedProgram, got a {type(program).__qualname__}",
            why="a module is made of a program's graph and weights",
            todo="Pass what `fold` made of a program, or `torch.export.load`",
        )
    return Folded.of(program)


class _Emptied(torch.nn.Module):
    """Part of a folded module, which had weights that are released."""

    def __setattr__(self, name: str, value: torch.Tensor | torch.nn.Module) -> None:
        if gone := self.__dict__.get("_gone", {}).get(name):
            refuse([gone])
        super().__setattr__(name, value)


def _loaded(text: bytes, released: frozenset[str], training: bool) -> Folded:
    made = Folded.of(torch.export.load(io.BytesIO(text)), released)
    made.training = training
    return made


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


def _is_leaf(value: object) -> bool:
    return value is None or isinstance(value, (torch.Tensor, bool, int, float, str))
