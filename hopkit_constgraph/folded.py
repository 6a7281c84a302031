"""What `fold` makes of a module: a graph that shares its weights, and that is called like a module written by hand."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import io
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch.export.graph_signature import ExportGraphSignature, InputKind, TensorArgument
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen

import hopkit
from hopkit.extend.dynamo import undecorated
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
                module.graph.set_codegen(_Flat(module, given, named))
        module.graph.on_generate_code(lambda _: functools.partial(_quicken, _kinds(module), "_checked" in body))
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


# -- reading weights -------------------------------------------------------------------------------------------------

_READ = re.compile(r'(\w+) = ((?:getattr\()*self(?:\.\w+|, "[^"]*"\))+)(;  \1 = None)?\n')
_CHECK = re.compile(r"\w+ = self\._guards_fn\((.*)\);  (.* = None)\n")
_RUN = re.compile(r"(\w+ = )(torch\.ops\.higher_order\.\w+)(\(\w+, [(\[][\w, ]*[)\]]\))(?:;  (.* = None))?\n")
_EITHER = """if torch.compiler.is_dynamo_compiling():
    {0}
else:
    {1}
{2}
"""
_STEP = re.compile(r'\.(\w+)|, "([^"]*)"\)')


class _Flat(CodeGen):
    """Code of a graph that takes tensors and numbers and gives one tensor: without pytrees."""

    def __init__(self, module: GraphModule, given: tuple[object, ...], named: Mapping[str, object]) -> None:
        super().__init__()
        signature = inspect.signature(module.forward)
        self._lines = [f"def forward(self, {str(signature)[1:]}:"]
        for name, example in signature.bind(*given, **named).arguments.items():
            if example is None:  # torch's checks do not look at it
                told = f"the model was traced with {name}=None"
                self._lines.append(f"if {name} is not None: raise TypeError({told!r})")
        for name, node in zip(signature.parameters, module.graph.find_nodes(op="placeholder"), strict=True):
            if name != node.name:
                self._lines.append(f"{node.name} = {name}")

    def gen_fn_def(self, *_: object, **__: object) -> str:
        """The line, and the inputs under the names that they have in the graph."""
        return "\n    ".join(self._lines)

    def generate_output(self, output_args: Any, **_: object) -> str:
        """The one output."""
        return f"return {output_args[0]!r}"

    def process_outputs(self, outputs: Any) -> Any:
        """The one output, for whoever interprets the graph."""
        return outputs[0]


def _kinds(module: torch.nn.Module) -> dict[str, str]:
    """Where a module keeps each of its parameters, buffers and graphs."""
    graphs = (name for name, part in module.named_modules() if name and isinstance(part, GraphModule))
    kinds = dict.fromkeys(graphs, "_modules")
    kinds |= dict.fromkeys((name for name, _ in module.named_parameters(remove_duplicate=False)), "_parameters")
    return kinds | dict.fromkeys((name for name, _ in module.named_buffers(remove_duplicate=False)), "_buffers")


def _quicken(kinds: Mapping[str, str], flat: bool, body: list[str]) -> list[str]:
    """The code of a graph, in which weights are read where modules keep them: ``module.name`` takes ten times longer.

    Where one is not there any more, because it is parametrized now say, all are read as usual.
    """
    quick: list[str] = []
    usual: list[str] = []
    rest: list[str] = []
    known = {"": "self"}
    for line in "".join(body).splitlines(keepends=True):
        read = _READ.fullmatch(line)
        path = [step or item for step, item in _STEP.findall(read[2])] if read else []
        kind = kinds.get(".".join(path))
        if read is None or kind is None:
            rest.append(_aside(line, flat))
            continue
        for depth in range(1, len(path)):
            inner = ".".join(path[:depth])
            if inner not in known:
                known[inner] = f"_module_{len(known)}"
                quick.append(f'{known[inner]} = {known[".".join(path[: depth - 1])]}._modules["{path[depth - 1]}"]')
        quick.append(f'{read[1]} = {known[".".join(path[:-1])]}.{kind}["{path[-1]}"]')
        usual.append(f"{read[1]} = {read[2]}")
    if not quick:
        return body
    block = ["try:", *map("    {}".format, quick), "except (KeyError, AttributeError):", *map("    {}".format, usual)]
    return ["\n".join(block) + "\n", *rest]


def _aside(line: str, flat: bool) -> str:
    """A line of code, which goes the short way where Dynamo does not read it."""
    if flat and (check := _CHECK.fullmatch(line)):
        return _EITHER.format(f"self._guards_fn({check[1]})", f"self._checked({check[1]})", check[2])
    run = _RUN.fullmatch(line)
    if run is None or not run[2].endswith(f".{run_const_graph_once.spec.name}"):
        return line
    return _EITHER.format(f"{run[1]}{run[2]}{run[3]}", f"{run[1]}self._once{run[3]}", run[4] or "")
