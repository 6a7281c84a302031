"""A program: plain data that prints, and that `source` writes as Python. Every number in it is taken modulo what there
is, so that a program stays one whatever is taken out of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from random import Random
from typing import Any, Literal, TypeVar

from tests.fuzz import flow

Step = tuple[str, int, int]
"""What is computed, and by the numbers of which values."""

Layer = tuple[str, int, int]
"""A mode or transform by its name in `stacks`, and two numbers that it may use."""

PLAIN = {
    "sin": "torch.sin({x})",
    "tanh": "torch.tanh({x})",
    "relu": "torch.relu({x})",
    "half": "{x} * 0.5",
    "add": "{x} + {y}",
    "sub": "{x} - {y}",
    "mul": "{x} * {y}",
    "maximum": "torch.maximum({x}, {y})",
    "where": "torch.where({x} > 0, {x}, {y})",
    "mm": "mm({x}, {y})",
    "total": "total({x}, {j})",
    "mean": "mean({x}, {j})",
    "highest": "highest({x})",
    "running": "running({x})",
    "softmax": "softmax({x})",
    "turned": "turned({x})",
    "first": "first({x})",
    "flat": "flat({x})",
    "same": "{x}",
    "sized": "{x} / max({x}.numel(), 1)",
    "constant": "{x} + torch.full((), 0.25)",
    "double": "{x}.double()",
    "float": "{x}.float()",
}
"""What a body and a subgraph may do."""

INSIDE = {
    **PLAIN,
    "literal": "{x} * torch.tensor(0.5)",
    "detach": "{x}.detach() * {y}",
    "bumped": "bumped({x})",
    "quiet": "quiet({x})",
    "largest": "largest({x})",
    "mapped": "mapped({x})",
    "derived": "derived({x})",
    "tenfold": "tenfold({x})",
    "inner": "inner(lambda z: torch.sin(z) * {y}, {x})",
    "inner_same": "inner(torch.cos, {x})",
}
"""What a subgraph may do besides."""

FLOW = {name: flow.step(text) for name, text in flow.STEPS.items()}
"""What both may do in a program with control flow."""

TEXT = {**INSIDE, **FLOW}

RULED = ("device", "jvp", "vmap", "autograd")
"""Modes for which an op may have a rule of its own."""

CALLS = ("call", "call", "call", "repeat", "scan", "halving", "chain")
"""How a body may call a subgraph."""

RARE = ("largest", "literal", "detach", "quiet", "double", "float", "same")

SHAPES: tuple[tuple[int, ...], ...] = ((3, 3), (3, 3), (3, 3), (3,), (3,), (), (2, 3, 3), (1, 3), (3, 1), (0, 3))
LAYOUTS = ("plain", "plain", "plain", "turned", "apart", "spread")
DTYPES = ("float32", "float32", "float32", "float64", "float64", "int64")


@dataclasses.dataclass(frozen=True)
class Held:
    """An operand or a capture."""

    shape: tuple[int, ...] = (3, 3)
    dtype: str = "float32"
    layout: str = "plain"
    grad: bool = False


@dataclasses.dataclass(frozen=True)
class Function:
    """A subgraph.

    Args:
        arity: How many tensors it takes.
        steps: What it computes.
        gives: Its result.
        packed: Whether it takes its tensors as one dictionary.
        module: Whether it is a module, and its captures are parameters and buffers.
        captures: Numbers of what it closes over: captures, and then the operands of the call.
    """

    arity: int = 1
    steps: tuple[Step, ...] = ()
    gives: Literal["tensor", "pair", "dict"] = "tensor"
    packed: bool = False
    module: bool = False
    captures: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """An op, a call of it, and the modes around the call, the outermost first.

    Args:
        functions: The subgraphs.
        many: Whether the op takes them as one tuple.
        operands: The tensors of the call.
        form: How the op takes its operands: one by one, as a tuple, in a dictionary with other things, or variadic.
        steps: What the body computes.
        gives: The op's result.
        results: How many values that has, of those computed last.
        times: An option: how often loops run.
        captures: What the subgraphs may close over.
        stack: The modes.
        rules: The modes for which the op has a rule of its own.
    """

    functions: tuple[Function, ...] = (Function(),)
    many: bool = False
    operands: tuple[Held, ...] = (Held(),)
    form: Literal["each", "tuple", "dict", "variadic"] = "each"
    steps: tuple[Step, ...] = (("call", 0, 0),)
    gives: Literal["tensor", "tuple", "dict", "nested"] = "tensor"
    results: int = 1
    times: int = 2
    captures: tuple[Held, ...] = ()
    stack: tuple[Layer, ...] = ()
    rules: tuple[str, ...] = ()

    @property
    def flowing(self) -> bool:
        """Whether there is control flow in it."""
        return any(name in FLOW for steps in (self.steps, *(f.steps for f in self.functions)) for name, *_ in steps)


def generate(random: Random, layers: dict[str, float], *, flowing: bool = False) -> Program:
    """A random program, whose stack is of these layers, by weight; with control flow, if ``flowing``."""
    many = random.choices((1, 2, 3), (5, 3, 2))[0]
    operands = tuple(_held(random, 0.35) for _ in range(random.choices((1, 2, 3), (4, 4, 2))[0]))
    captures = tuple(_held(random, 0.6) for _ in range(random.randrange(3)))
    functions = tuple(_function(random, len(captures), len(operands), flowing) for _ in range(many))
    steps = [(random.choice(CALLS), random.randrange(20), random.randrange(20))]
    for _ in range(random.randrange(4)):
        kinds = CALLS if random.random() < 0.5 else tuple(PLAIN)
        kinds = tuple(FLOW) if flowing and random.random() < 0.5 else kinds
        steps.append((random.choice(kinds), random.randrange(20), random.randrange(20)))
    depth = random.choices((1, 2, 3, 4), (3, 4, 3, 2))[0]
    names = random.choices(list(layers), list(layers.values()), k=depth)
    closed = any(f.captures for f in functions)
    rules = [mode for mode in RULED if random.random() < 0.1 and not (closed and mode == "autograd")]
    return Program(
        functions,
        random.random() < 0.3,
        operands,
        random.choice(("each", "each", "each", "tuple", "dict", "variadic")),
        tuple(steps),
        random.choice(("tensor", "tensor", "tuple", "dict", "nested")),
        random.randrange(1, 4),
        random.randrange(1, 4),
        captures,
        tuple((name, random.randrange(16), random.randrange(4)) for name in names),
        tuple(rules),
    )


def _held(random: Random, grad: float) -> Held:
    return Held(random.choice(SHAPES), random.choice(DTYPES), random.choice(LAYOUTS), random.random() < grad)


def _function(random: Random, captures: int, operands: int, flowing: bool) -> Function:
    steps = []
    for _ in range(random.randrange(4)):
        name = random.choice(tuple(INSIDE))
        name = random.choice(tuple(INSIDE)) if name in RARE else name
        name = random.choice(tuple(FLOW)) if flowing and random.random() < 0.5 else name
        steps.append((name, random.randrange(12), random.randrange(12)))
    module = random.random() < 0.15
    closed = random.choices(range(captures + (0 if module else operands)), k=random.randrange(3)) if captures else []
    return Function(
        random.choice((1, 1, 2)),
        tuple(steps),
        random.choice(("tensor", "tensor", "tensor", "pair", "dict")),
        random.random() < 0.15,
        module,
        tuple(closed),
    )


# -- text ------------------------------------------------------------------------------------------------------------


def source(program: Program) -> str:
    """The program as Python: captures, operands, the op, and ``call``, a function of the operands' tensors."""
    held = [f"c{i} = {_tensor(i + 50, c)}" for i, c in enumerate(program.captures)]
    held += [f"operands = [{', '.join(_tensor(i, o) for i, o in enumerate(program.operands))}]"]
    modules = [line for i, f in enumerate(program.functions) if f.module for line in _module(program, i, f)]
    local = [f"    {line}" for i, f in enumerate(program.functions) if not f.module for line in _local(program, i, f)]
    call = f"    return op({', '.join([*_passed(program), f'times={program.times}'])})"
    tensors = ", ".join(f"t{i}: Tensor" for i in range(len(program.operands)))
    inner = [
        '@define("fuzz_inner")',
        "def inner(body: Subgraph, x: Tensor) -> Tensor:",
        "    return body(body(x)) * 0.5",
    ]
    parts = [held, inner, _op(program), modules, [f"def call({tensors}) -> object:", *local, call]]
    return "\n\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _tensor(seed: int, held: Held) -> str:
    return f"tensor({seed}, {held.shape}, torch.{held.dtype}, {held.layout!r}, {held.grad})"


def _op(program: Program) -> list[str]:
    count, many = len(program.operands), len(program.functions)
    takes = ["fs: tuple[Subgraph[Any], ...]"] if program.many else [f"f{i}: Subgraph[Any]" for i in range(many)]
    unpacked: list[str] = []
    values = [f"v{i}" for i in range(count)]
    if program.form == "each":
        takes += [f"v{i}: Tensor" for i in range(count)]
    elif program.form == "variadic":
        takes += ["*vs: Tensor"]
        unpacked = [f"{', '.join(values)}, = vs"]
    elif program.form == "tuple":
        takes += ["vs: tuple[Tensor, ...]"]
        unpacked = [f"{', '.join(values)}, = vs"]
    else:
        takes += ["d: dict[str, Tensor | int | None]"]
        unpacked = [f"{v} = d['{v}']" for v in values]
    if program.many:
        unpacked += [f"{', '.join(f'f{i}' for i in range(many))}, = fs"]
    if "*vs: Tensor" not in takes:
        takes.append("*")
    lines = [line for step in program.steps for line in _body_step(program, step, values)]
    results = [*reversed(values)][: program.results]
    given = {
        "tensor": results[0],
        "tuple": f"({', '.join(results)},)",
        "dict": "{" + ", ".join(f"'{i}': {r}" for i, r in enumerate(results)) + ", 'times': times}",
        "nested": f"([{', '.join(results)}], {{'last': {results[-1]}, 'none': None}})",
    }[program.gives]
    head = f"def op({', '.join([*takes, 'times: int'])}) -> Any:"
    ruled = [f"@ruled({', '.join(map(repr, program.rules))})"] if program.rules else []
    return [*ruled, '@define("fuzz_op")', head, *(f"    {line}" for line in [*unpacked, *lines, f"return {given}"])]


def _body_step(program: Program, step: Step, values: list[str]) -> Iterator[str]:
    name, i, j = step
    x, y, new = values[i % len(values)], values[j % len(values)], f"v{len(values)}"
    if name in PLAIN or name in FLOW:
        yield f"{new} = {TEXT[name].format(x=x, y=y, j=j)}"
        values.append(new)
        return
    number = (i + j) % len(program.functions)
    function = program.functions[number]
    if name == "call":
        yield from _called(number, function, [x, y], new)
        if function.gives != "tensor":
            values.append(f"{new}_")
    elif name == "repeat":
        yield f"{new} = {x}"
        yield "for _ in range(times):"
        yield from (f"    {line}" for line in _called(number, function, [new, y], new))
    elif name == "scan":
        yield f"{new}, {new}s = {x}, []"
        yield f"for row in rows({y}):"
        yield from (f"    {line}" for line in _called(number, function, [new, "row"], new))
        yield f"    {new}s.append({new})"
        yield f"{new}_ = torch.stack({new}s)"
        values.append(f"{new}_")
    elif name == "halving":
        yield f"{new}s = [*rows({x})]"
        yield f"while len({new}s) > 1:"
        yield f"    {new}p, {new}q = {new}s.pop(0), {new}s.pop(0)"
        yield from (f"    {line}" for line in _called(number, function, [f"{new}p", f"{new}q"], new))
        yield f"    {new}s.append({new})"
        yield f"{new} = {new}s[0]"
    else:
        yield f"{new} = {x}"
        for each, f in enumerate(program.functions):
            yield from _called(each, f, [new, y], new)
    values.append(new)


def _called(number: int, function: Function, given: list[str], new: str) -> list[str]:
    args = given[: function.arity]
    if function.packed:
        args = ["{" + ", ".join(f"'x{i}': {a}" for i, a in enumerate(args)) + "}"]
    call = f"f{number}({', '.join(args)})"
    if function.gives == "dict":
        return [f"{new}d = {call}", f"{new}, {new}_ = {new}d['p'], {new}d['q']"]
    return [f"{new}, {new}_ = {call}" if function.gives == "pair" else f"{new} = {call}"]


def _passed(program: Program) -> list[str]:
    names = [f"f{i}" for i in range(len(program.functions))]
    tensors = [f"t{i}" for i in range(len(program.operands))]
    functions = [f"({', '.join(names)},)"] if program.many else names
    if program.form in ("each", "variadic"):
        return [*functions, *tensors]
    if program.form == "tuple":
        return [*functions, f"({', '.join(tensors)},)"]
    items = ", ".join(f"'v{i}': t{i}" for i in range(len(tensors)))
    return [*functions, f"{{{items}, 'n': 3, 'none': None}}"]


def _inside(function: Function, closed: list[str]) -> list[str]:
    values = [f"x{i}" for i in range(function.arity)] + closed
    lines = [f"{', '.join(values[: function.arity])}, = d.values()"] if function.packed else []
    for name, i, j in function.steps:
        x, y = values[i % len(values)], values[j % len(values)]
        lines.append(f"w{len(values)} = {TEXT[name].format(x=x, y=y, j=j)}")
        values.append(f"w{len(values)}")
    last, before = values[-1], values[-2] if len(values) > 1 else f"{values[-1]} * 2"
    if not function.steps and closed:
        last = f"x0 * {last}"
    given = {"tensor": last, "pair": f"({last}, {before})", "dict": f"{{'p': {last}, 'q': {before}}}"}
    return [*lines, f"return {given[function.gives]}"]


def _taken(function: Function) -> str:
    return "d: Any" if function.packed else ", ".join(f"x{i}: Tensor" for i in range(function.arity))


def _local(program: Program, number: int, function: Function) -> list[str]:
    known = [f"c{i}" for i in range(len(program.captures))] + [f"t{i}" for i in range(len(program.operands))]
    closed = [known[i % len(known)] for i in function.captures]
    return [f"def f{number}({_taken(function)}) -> Any:", *(f"    {line}" for line in _inside(function, closed))]


def _module(program: Program, number: int, function: Function) -> list[str]:
    closed = [i % len(program.captures) for i in function.captures if program.captures]
    return [
        f"class F{number}(torch.nn.Module):",
        "    def __init__(self) -> None:",
        "        super().__init__()",
        *(f"        held(self, 'c{i}', c{i})" for i in closed),
        f"    def forward(self, {_taken(function)}) -> Any:",
        *(f"        {line}" for line in _inside(function, [f"self.c{i}" for i in closed])),
        f"f{number} = F{number}()",
    ]


# -- smaller ---------------------------------------------------------------------------------------------------------


def smaller(program: Program) -> Iterator[Program]:
    """Programs that are simpler than this one by one thing."""
    for i in range(len(program.stack)):
        yield dataclasses.replace(program, stack=program.stack[:i] + program.stack[i + 1 :])
    for i in range(len(program.steps)):
        yield dataclasses.replace(program, steps=program.steps[:i] + program.steps[i + 1 :])
    for i in range(len(program.functions)):
        if len(program.functions) > 1:
            yield dataclasses.replace(program, functions=program.functions[:i] + program.functions[i + 1 :])
        for function in _simpler(program.functions[i]):
            yield dataclasses.replace(program, functions=_with(program.functions, i, function))
    for i, operand in enumerate(program.operands):
        if len(program.operands) > 1:
            yield dataclasses.replace(program, operands=program.operands[:i] + program.operands[i + 1 :])
        yield from (dataclasses.replace(program, operands=_with(program.operands, i, o)) for o in _plainer(operand))
    for i, capture in enumerate(program.captures):
        if not any(f.captures for f in program.functions):
            yield dataclasses.replace(program, captures=program.captures[:i] + program.captures[i + 1 :])
        yield from (dataclasses.replace(program, captures=_with(program.captures, i, c)) for c in _plainer(capture))
    for i, (name, a, b) in enumerate(program.stack):
        if a or b:
            yield dataclasses.replace(program, stack=_with(program.stack, i, (name, 0, 0)))
    for i, (name, a, b) in enumerate(program.steps):
        if name in ("repeat", "scan", "halving", "chain"):
            yield dataclasses.replace(program, steps=_with(program.steps, i, ("call", a, b)))
    for i in range(len(program.rules)):
        yield dataclasses.replace(program, rules=program.rules[:i] + program.rules[i + 1 :])
    for name in ("many", "form", "gives", "results", "times"):
        simple = {"many": False, "form": "each", "gives": "tensor"}.get(name, 1)
        if getattr(program, name) != simple:
            yield _replaced(program, name, simple)


def _simpler(function: Function) -> Iterator[Function]:
    for i, step in enumerate(function.steps):
        yield dataclasses.replace(function, steps=function.steps[:i] + function.steps[i + 1 :])
        if step[0] != "sin":
            yield dataclasses.replace(function, steps=_with(function.steps, i, ("sin", *step[1:])))
    for i in range(len(function.captures)):
        yield dataclasses.replace(function, captures=function.captures[:i] + function.captures[i + 1 :])
    for name, simple in {"arity": 1, "gives": "tensor", "packed": False, "module": False}.items():
        if getattr(function, name) != simple:
            yield _replaced(function, name, simple)


def _plainer(held: Held) -> Iterator[Held]:
    for name, simple in dataclasses.asdict(Held()).items():
        if getattr(held, name) != simple:
            yield _replaced(held, name, simple)
    if held.shape not in ((3,), ()):
        yield dataclasses.replace(held, shape=(3,))


T = TypeVar("T", Program, Function, Held)
Item = TypeVar("Item")


def _replaced(value: T, name: str, simple: object) -> T:
    changed: dict[str, Any] = {name: simple}
    return dataclasses.replace(value, **changed)


def _with(items: tuple[Item, ...], index: int, item: Item) -> tuple[Item, ...]:
    return (*items[:index], item, *items[index + 1 :])
