"""The code of a folded module's graph, which reads weights where modules keep them."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen

from hopkit.extend.dynamo import AHEAD
from hopkit_constgraph.op import run_const_graph_once

Operands = tuple[GraphModule, tuple[torch.Tensor, ...]]
"""A constant graph, and what it takes."""

_READ = re.compile(r'(\w+) = ((?:getattr\()*self(?:\.\w+|, "[^"]*"\))+)(;  \1 = None)?\n')
_CHECK = re.compile(r"\w+ = self\._guards_fn\((.*)\);  (.* = None)\n")
_RUN = re.compile(r"(\w+ = )(torch\.ops\.higher_order\.\w+)(\(\w+, [(\[][\w, ]*[)\]]\))(?:;  (.* = None))?\n")
_EITHER = """if torch.compiler.is_dynamo_compiling():
    {0}
else:
    {1}
{2}
"""
_AHEAD = f"_known = torch.ops.higher_order.{AHEAD.__name__}(self) if torch.compiler.is_dynamo_compiling() else None\n"
_STEP = re.compile(r'\.(\w+)|, "([^"]*)"\)')


class Flat(CodeGen):
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


def kinds_of(module: torch.nn.Module) -> dict[str, str]:
    """Where a module keeps each of its parameters, buffers and graphs."""
    graphs = (name for name, part in module.named_modules() if name and isinstance(part, GraphModule))
    kinds = dict.fromkeys(graphs, "_modules")
    kinds |= dict.fromkeys((name for name, _ in module.named_parameters(remove_duplicate=False)), "_parameters")
    return kinds | dict.fromkeys((name for name, _ in module.named_buffers(remove_duplicate=False)), "_buffers")


def quicken(kinds: Mapping[str, str], flat: bool, body: list[str]) -> list[str]:
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


def operands(graph: Graph, kinds: Mapping[str, str]) -> Callable[[torch.nn.Module], Operands] | None:
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
    return cast("Callable[[torch.nn.Module], Operands]", made["read"])


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
