"""What `fold` makes of a module: a graph that shares its weights, and that is called like a module written by hand."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import io
import operator
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch.export.graph_signature import ExportGraphSignature, InputKind, TensorArgument
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen

import hopkit
from hopkit.extend.dynamo import undecorated
from hopkit_constgraph.kept import known
from hopkit_constgraph.op import run_const_graph_once
from hopkit_constgraph.release import refuse

ExportedProgram = torch.export.ExportedProgram
Operands = tuple[GraphModule, tuple[torch.Tensor, ...]]


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
    _operands: Callable[[Folded], Operands] | None
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
        kinds = _kinds(module)
        body["_operands"] = _operands(module.graph, kinds)
        module.graph.on_generate_code(lambda _: functools.partial(_quicken, kinds, "_checked" in body))
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
_AHEAD = "_known = torch.ops.higher_order.hopkit_ahead(self) if torch.compiler.is_dynamo_compiling() else None\n"
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

    Dynamo would guard all that it reads. Where it takes what the constant graph gives from the module (`AHEAD`), the
    weights that only that graph takes are not read.
    """
    reads: dict[str, tuple[str, str]] = {}
    rest: list[str] = []
    for line in "".join(body).splitlines(keepends=True):
        read = _READ.fullmatch(line)
        path = ".".join(step or item for step, item in _STEP.findall(read[2])) if read else ""
        if read and path in kinds:
            reads[read[1]] = path, read[2]
        else:
            rest.append(line)
    if not reads:
        return body
    runs = [line for line in rest if _runs(line)]
    others = {word for line in rest if line not in runs for word in re.findall(r"\w+", line)}
    begin = _AHEAD if len(runs) == 1 else "_known = None\n"
    shared = {name: read for name, read in reads.items() if name in others}
    blocks = [textwrap.indent(_reading(part, kinds), "    ") for part in (reads, shared)]
    return [f"{begin}if _known is None:\n{blocks[0]}else:\n{blocks[1]}", *(_aside(line, flat) for line in rest)]


def _reading(reads: Mapping[str, tuple[str, str]], kinds: Mapping[str, str]) -> str:
    """Lines that read weights. Where one is not there any more, because it is parametrized now say, all as usual."""
    quick = _quick({name: path for name, (path, _) in reads.items()}, kinds)
    usual = [f"{name} = {text}" for name, (_, text) in reads.items()]
    lines = ["try:", *map("    {}".format, quick), "except (KeyError, AttributeError):", *map("    {}".format, usual)]
    return "\n".join(lines if reads else ["pass"]) + "\n"


def _quick(reads: Mapping[str, str], kinds: Mapping[str, str]) -> Iterator[str]:
    """Lines that give names to what is at these paths in ``self``."""
    known = {"": "self"}
    for name, path in reads.items():
        steps = path.split(".")
        for depth in range(1, len(steps)):
            inner = ".".join(steps[:depth])
            if inner not in known:
                known[inner] = f"_module_{len(known)}"
                yield f'{known[inner]} = {known[".".join(steps[: depth - 1])]}._modules["{steps[depth - 1]}"]'
        yield f'{name} = {known[".".join(steps[:-1])]}.{kinds[path]}["{steps[-1]}"]'


def _operands(graph: Graph, kinds: Mapping[str, str]) -> Callable[[Folded], Operands] | None:
    """What reads the constant graph of a module, and what that takes. None: it takes more than weights."""
    runs = graph.find_nodes(op="call_function", target=run_const_graph_once.operator)
    nodes = [node for run in runs for node in (run.args[0], *run.args[1])]
    if len(runs) != 1 or not all(node.op == "get_attr" and node.target in kinds for node in nodes):
        return None
    reads = {f"_{number}": str(node.target) for number, node in enumerate(nodes)}
    first, *names = reads
    lines = ["def read(self):", *_quick(reads, kinds), f"return {first}, ({', '.join(names)},)"]
    made: dict[str, Any] = {}
    exec("\n    ".join(lines), made)  # as torch does with the code of a graph
    return cast("Callable[[Folded], Operands]", made["read"])


def _runs(line: str) -> re.Match[str] | None:
    """The call of the constant graph, where this is one."""
    run = _RUN.fullmatch(line)
    return run if run and run[2].endswith(f".{run_const_graph_once.spec.name}") else None


def _aside(line: str, flat: bool) -> str:
    """A line of code, which goes the short way where Dynamo does not read it."""
    if flat and (check := _CHECK.fullmatch(line)):
        return _EITHER.format(f"self._guards_fn({check[1]})", f"self._checked({check[1]})", check[2])
    run = _runs(line)
    if run is None:
        return line
    known = f"if _known is not None:\n    {run[1]}_known\nel"
    return known + _EITHER.format(f"{run[1]}{run[2]}{run[3]}", f"{run[1]}self._once{run[3]}", run[4] or "")
