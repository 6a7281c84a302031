"""The digest of an op: the same in every process, another once its meaning may be another, none where nobody knows."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit import HopkitWarning, Op, Subgraph, hookimpl, layout
from hopkit.digest import digest, other_body
from hopkit.op import AnyOp
from tests.recording import define_once, define_twice, nodes, record, same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 3)

HELPERS = """
import enum, functools
import torch

class Join(enum.Enum):
    ADD = 1

class Base:
    factor = 2

    @staticmethod
    def join(x):
        return x + 1

class Scaled(Base):
    def __init__(self, by):
        self.by = by

    @property
    def twice(self):
        return self.by * self.factor

@functools.lru_cache
def cached(n):
    return n + 1

def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

@decorated
def inner(x):
    return x * 3

def unused(x):
    return x
"""

BODY = """
import math
import torch
import hopkit
from . import helpers
from .helpers import Scaled, Join, inner

SCALE = 2.0
SIZES = {"a": [1, 2], "b": (3, {4, 5})}
TABLE = torch.tensor([1.0, 2.0, 3.0])

def made(offset):
    return lambda x: x + offset

shifted = made(4)

def helper(x, y=5, *, z=6):
    # a comment
    return x * SCALE * y + z

def body(f: hopkit.Subgraph, x: torch.Tensor, *, join: Join = Join.ADD) -> torch.Tensor:
    \"\"\"What it does.\"\"\"
    from .late import late
    y = shifted(inner(helper(f(x)))) * Scaled(7).twice + helpers.cached(8)
    try:
        y = y + SIZES["a"][0] * TABLE
    except ValueError:
        pass
    return late([part for part in (y, math.pi) if Join.ADD is join])
"""

LATE = """
def late(parts):
    return sum(parts)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Imports a package ``t_package`` of these sources, each time anew."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)

    def imported(*, body: str = BODY, helpers: str = HELPERS, late: str = LATE) -> ModuleType:
        folder = tmp_path / "t_package"
        folder.mkdir(exist_ok=True)
        for name, source in {"__init__": "", "body": body, "helpers": helpers, "late": late}.items():
            (folder / f"{name}.py").write_text(source)
        for name in [name for name in sys.modules if name.startswith("t_package")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        return importlib.import_module("t_package.body")

    return imported


@pytest.fixture(autouse=True)
def forget_package() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.startswith("t_package")]:
        del sys.modules[name]


def of(body: Any, **properties: Any) -> str:
    """The digest of an op with this body."""
    op: Any = hopkit.define("t_op", **properties)(body)
    hopkit.undefine(op)
    text = digest(op.spec, op.table)
    assert text is not None
    return text


def no_digest(body: Any) -> bool:
    op: Any = hopkit.define("t_op")(body)
    hopkit.undefine(op)
    return digest(op.spec, op.table) is None


# What changes it


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x * SCALE", "x / SCALE"),
        ("SCALE = 2.0", "SCALE = 2.5"),
        ("y=5", "y=50"),
        ("z=6", "z=60"),
        ("made(4)", "made(40)"),
        ("Scaled(7)", "Scaled(70)"),
        ("except ValueError", "except KeyError"),
        ("math.pi", "math.e"),
        ("join: Join = Join.ADD", "join: Join"),
        ("self.by * self.factor", "self.by + self.factor"),
        ("factor = 2", "factor = 3"),
        ("ADD = 1", "ADD = 10"),
        ("return n + 1", "return n - 1"),
        ("return x * 3", "return x * 4"),
        ("function(*args)", "function(*args[:2])"),
        ("sum(parts)", "max(parts)"),
    ],
)
def test_what_the_body_reaches_in_its_package(old: str, new: str, package: Callable[..., ModuleType]) -> None:
    before = of(package().body)
    assert sum(source.count(old) for source in (BODY, HELPERS, LATE)) == 1
    changed = package(body=BODY.replace(old, new), helpers=HELPERS.replace(old, new), late=LATE.replace(old, new))
    assert other_body(before, of(changed.body))


@pytest.mark.parametrize(("old", "new"), [("[1, 2]", "[1, 3]"), ("{4, 5}", "{4, 6}"), ("[1.0, 2.0", "[1.0, 2.5")])
def test_what_can_change_while_the_process_runs(old: str, new: str, package: Callable[..., ModuleType]) -> None:
    before, after = of(package().body), of(package(body=BODY.replace(old, new)).body)
    assert before != after
    assert not other_body(before, after)


def test_a_docstring_may_be_read_and_is_no_other_body(package: Callable[..., ModuleType]) -> None:
    before, after = of(package().body), of(package(body=BODY.replace("What it does", "What it is")).body)
    assert before != after
    assert not other_body(before, after)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a comment", "# another\n    # comment"),
        ("SCALE = 2.0\n", "\n\nSCALE = 2.0\n"),
        ("def unused(x):\n    return x", "def unused(x):\n    return -x"),
    ],
)
def test_what_means_nothing(old: str, new: str, package: Callable[..., ModuleType]) -> None:
    before = of(package().body)
    changed = package(body=BODY.replace(old, new), helpers=HELPERS.replace(old, new))
    assert of(changed.body) == before


def plain(f: Subgraph, x: Tensor) -> Tensor:
    return f(x)


@pytest.mark.parametrize(
    "properties",
    [
        {"autograd": "error"},
        {"pure": False},
        {"mutates": "x"},
        {"aliases": "x"},
        {"effectful": True},
        {"random": True},
        {"outline": True},
        {"inputs": lambda f, x: ((x,),)},
        {"outputs": lambda f, x: x + 1},
    ],
    ids=str,
)
def test_what_is_declared(properties: dict[str, Any]) -> None:
    assert other_body(of(plain), of(plain, **properties))


def test_a_global_that_has_another_value_now() -> None:
    scope: dict[str, Any] = {"Subgraph": Subgraph, "Tensor": Tensor, "scale": 2}
    exec("def body(f: Subgraph, x: Tensor) -> Tensor: return scale * f(x)", scope)
    before = of(scope["body"])
    scope["scale"] = 3
    assert other_body(before, of(scope["body"]))


def test_an_op_that_the_body_calls() -> None:
    def outer(inner: AnyOp) -> str:
        def body(f: Subgraph, x: Tensor) -> Tensor:
            return inner(f, x)  # type: ignore[return-value] # any op

        return of(body)

    once = define_once()
    before = outer(once)
    assert before != outer(define_twice())

    @once.rule("device")
    def kernel(body: Subgraph, *xs: Tensor) -> Tensor:
        return body(*xs) + 0

    assert before != outer(once)
    assert not other_body(before, outer(once))


def test_a_body_that_calls_its_own_op() -> None:
    @hopkit.define("t_again")
    def again(f: Subgraph, x: Tensor, *, times: int) -> Tensor:
        return f(x) if times == 1 else again(f, f(x), times=times - 1)

    assert digest(again.spec, again.table)


# Rules


def test_a_rule_of_the_authors_is_no_other_body() -> None:
    once = define_once()
    before = digest(once.spec, once.table)
    texts = {before}
    for scale in (1, 2):

        @once.rule("device")
        def kernel(body: Subgraph, *xs: Tensor, scale: int = scale) -> Tensor:
            return body(*xs) * scale

        texts.add(digest(once.spec, once.table))
    assert len(texts) == 3
    assert None not in texts
    assert not any(other_body(str(before), str(text)) for text in texts)


def test_plugins_come_and_go() -> None:
    class Plugin:
        @hookimpl
        def hopkit_device_rule(self, op: hopkit.OpSpec) -> object:
            return op.body

    once, plugin = define_once(), Plugin()
    before = digest(once.spec, once.table)
    hopkit.register(plugin, "t_first")
    first = digest(once.spec, once.table)
    hopkit.unregister(plugin)
    assert digest(once.spec, once.table) == before
    hopkit.register(plugin, "t_second")
    assert len({before, first, digest(once.spec, once.table)}) == 3


# What has none


def unhashable(value: object) -> Callable[..., Tensor]:
    def body(f: Subgraph, x: Tensor) -> Tensor:
        return f(x) if value else x

    return body


@pytest.mark.parametrize(
    "value",
    [
        threading.Lock(),
        iter([1]),
        torch.zeros(100_000),
        torch.zeros(3, requires_grad=True),
        torch.zeros(3, device="meta"),
        torch.nn.Linear(2, 2),
        [0] * 100_000,
        [[threading.Lock()]],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_hashed(value: object) -> None:
    assert no_digest(unhashable(value))


def test_code_that_can_reach_anything() -> None:
    def evaluated(f: Subgraph, x: Tensor) -> Tensor:
        return f(eval("x"))

    def whole_module(f: Subgraph, x: Tensor) -> Tensor:
        return f(getattr(THIS, "X"))  # noqa: B009 - the point

    assert no_digest(evaluated)
    assert no_digest(whole_module)


THIS = sys.modules[__name__]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Something of the author's own."""

    size: int
    kind: torch.dtype

    def area(self) -> int:
        return self.size**2


class Slotted:
    """Something else of the author's own."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Setting(1, torch.float32), Setting(1, torch.float64)),
        (Slotted(1), Slotted(2)),
        ((1, 2), (1, 2.0)),
        ({"a": 1}, {"a": True}),
        ({1, 2}, {1, 3}),
        (math.sqrt, math.exp),
        (torch.sin, torch.cos),
        (torch.nn.functional.relu, torch.nn.functional.gelu),
        (torch.ops.aten.sin, torch.ops.aten.cos),
        (torch.Tensor.sin, torch.Tensor.cos),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (Setting(1, torch.float32).area, Setting(2, torch.float32).area),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_values_that_a_body_closes_over(one: object, other: object) -> None:
    assert of(unhashable(one)) == of(unhashable(one))
    assert of(unhashable(one)) != of(unhashable(other))


# In a node


def in_nodes(graph: torch.fx.GraphModule, op: AnyOp) -> list[str]:
    """The digests in a graph's nodes of ``op``."""
    found = graph.graph.find_nodes(op="call_function", target=op.operator)
    return [hopkit.layout.loads(node.kwargs[layout.KEYWORD]).digest for node in found]


def test_a_node_has_the_digest_of_the_day() -> None:
    twice = define_twice()
    graph = record(lambda x: twice(torch.sin, twice(torch.cos, x)), X)
    assert in_nodes(graph, twice) == [digest(twice.spec, twice.table)] * 2


def defined(scale: int) -> Op[..., Tensor]:
    """One version of an op."""

    @hopkit.define("t_version", replace=True)
    def version(f: Subgraph, x: Tensor) -> Tensor:
        return scale * f(x)

    return version


def test_a_node_of_another_body_warns_once_and_runs_todays() -> None:
    old = defined(3)
    graph = record(lambda x: old(torch.sin, x), X)
    new = defined(5)
    (node,) = graph.graph.find_nodes(op="call_function", target=old.operator)
    node.target = new.operator  # as a program that is loaded: it knows the op by its name
    graph.recompile()
    with pytest.warns(HopkitWarning, match="'t_version' was recorded with another body; the new body runs"):
        got = graph(X)
    same(got, 5 * X.sin())
    same(graph(X), 5 * X.sin())
    assert in_nodes(make_fx(graph)(X), new) == [digest(new.spec, new.table)]


def test_a_node_of_another_version_of_torch_is_run_without_a_word() -> None:
    once = define_once()
    graph = record(lambda x: once(torch.sin, x), X)
    (node,) = graph.graph.find_nodes(op="call_function", target=once.operator)
    known = layout.loads(str(node.kwargs[layout.KEYWORD]))
    other = dataclasses.replace(known, digest=f"{known.digest.rpartition('-')[0]}-0")
    node.kwargs = {layout.KEYWORD: other.dumps()}
    graph.recompile()
    same(graph(X), X.sin())


# What torch may cache


@pytest.mark.parametrize(
    ("properties", "may"),
    [({}, True), ({"pure": False}, False), ({"effectful": True}, False), ({"random": True}, False)],
    ids=str,
)
def test_an_op_that_torch_may_cache(properties: dict[str, Any], may: bool) -> None:
    op: Any = hopkit.define("t_cached", **properties)(plain)
    assert not op.operator.cacheable()
    assert nodes(record(lambda x: op(torch.sin, x), X), op) == 1
    assert op.operator.cacheable() is may


def test_an_op_that_cannot_be_hashed_is_not_cached() -> None:
    lock = threading.Lock()

    @hopkit.define("t_locked")
    def locked(f: Subgraph, x: Tensor) -> Tensor:
        with lock:
            return f(x)

    graph = record(lambda x: locked(torch.sin, x), X)
    assert in_nodes(graph, locked) == [""]
    assert not locked.operator.cacheable()
    same(graph(X), X.sin())


def test_an_op_whose_node_may_say_nothing_is_not_cached() -> None:
    @hopkit.define("t_carried", autograd="deferred_error")
    def carried(
        graph: torch.fx.GraphModule, args: tuple[object, ...], *, axes: tuple[int, ...] | None = None
    ) -> object:
        return graph(*args)

    inner = torch.fx.symbolic_trace(torch.nn.ReLU())
    (bare,) = record(lambda x: carried(inner, (x,)), X).graph.find_nodes(op="call_function", target=carried.operator)
    assert layout.KEYWORD not in bare.kwargs
    assert all(in_nodes(record(lambda x: carried(inner, (x,), axes=(0,)), X), carried))
    assert not carried.operator.cacheable()


# Everywhere the same


def test_it_is_the_same_in_every_process(package: Callable[..., ModuleType], tmp_path: Path) -> None:
    here = of(package().body)
    program = """
import hopkit, t_package.body
from hopkit.digest import digest
op = hopkit.define("t_op")(t_package.body.body)
print(digest(op.spec, op.table))
"""
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "HOPKIT_PLUGINS": ""}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == here, done.stderr
