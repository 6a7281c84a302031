"""From a spec to an op, and the op author's other verbs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import cast, overload

from typing_extensions import ParamSpec, TypeVar

from hopkit import kit
from hopkit._torch.trees import is_node
from hopkit.errors import CallError, HopkitError, SpecError
from hopkit.manager import PluginInfo
from hopkit.op import AnyOp, Op
from hopkit.parameters import parse
from hopkit.spec import AutogradPolicy, OpSpec, Sample

P = ParamSpec("P")
R = TypeVar("R")


@overload
def define(name: OpSpec, /, *, replace: bool = False) -> AnyOp: ...
@overload
def define(
    name: str,
    /,
    *,
    inputs: Callable[..., object] | None = None,
    outputs: Callable[..., object] | None = None,
    abstract: Callable[..., object] | None = None,
    autograd: AutogradPolicy = "derive",
    pure: bool = True,
    mutates: Iterable[str] = (),
    aliases: Iterable[str] = (),
    effectful: bool = False,
    random: bool = False,
    outline: bool = False,
    samples: Callable[[], Iterable[Sample]] | None = None,
    replace: bool = False,
) -> Callable[[Callable[P, R]], Op[P, R]]: ...
def define(name: str | OpSpec, /, *, replace: bool = False, **properties: object) -> object:
    """Define an op: ``@hopkit.define("mine_twice")`` on an annotated body, or ``hopkit.define(spec)``.

    Args:
        name: torch's name for the op, or the whole spec.
        replace: Take the name from the op that has it. `undefine` gives it back. Names that other modules have
            imported already stay what they were; what goes by the name finds the new op. (So ``torch.cond``, which
            Dynamo looks up by name, refuses while another op is called "cond".)
        properties: See `OpSpec`.

    Returns:
        The op, called and typed like the body.

    Raises:
        CallError: ``name`` is neither a name nor a spec.
        SpecError: The name, a parameter or a property is wrong; torch's registry is as it was.
        DuplicateOpError: The name is taken.
    """
    if callable(name):
        raise SpecError(
            f"op body '{getattr(name, '__qualname__', name)}'",
            "was given to `define` without a name",
            why="torch knows an op by its name",
            todo='Write `@hopkit.define("mypackage_myop")`',
        )
    if isinstance(name, OpSpec):
        return kit.current().define(name, replace=replace)
    if not isinstance(name, str):
        raise CallError(
            "hopkit.define()",
            f"expected a name or an OpSpec, got {name!r}",
            why="torch knows an op by its name",
            todo='Write `@hopkit.define("mypackage_myop")`',
        )
    localns = sys._getframe(1).f_locals

    def decorate(body: Callable[P, R]) -> Op[P, R]:
        return cast("Op[P, R]", kit.current().define(make_spec(name, body, localns, properties), replace=replace))

    return decorate


def make_spec(
    name: str, body: Callable[..., object], localns: Mapping[str, object], properties: Mapping[str, object]
) -> OpSpec:
    """The spec of an annotated body.

    Raises:
        SpecError: A parameter or a property is wrong.
    """
    for keyword in properties.keys() - {field.name for field in dataclasses.fields(OpSpec)}:
        raise _no_property(name, f"got `{keyword}=`, which is no property", "See `hopkit.OpSpec` for those there are")
    for keyword in ("pure", "effectful", "random", "outline"):
        if not isinstance(properties.get(keyword, False), bool):
            raise _no_property(name, f"got `{keyword}={properties[keyword]!r}`", "Say True or False")
    for keyword in ("inputs", "outputs", "abstract", "samples"):
        if not (properties.get(keyword) is None or callable(properties[keyword])):
            raise _no_property(name, f"got `{keyword}={properties[keyword]!r}`", f"Write `{keyword}=lambda ...: ...`")
    settled = {k: _names(v) if k in ("mutates", "aliases") else v for k, v in properties.items()}
    return OpSpec(name, body, parse(body, localns, is_node), **settled)  # type: ignore[arg-type] # define's own types


def _no_property(name: str, found: str, todo: str) -> SpecError:
    return SpecError(f"define('{name}')", found, why="what is declared of an op steers every mode", todo=todo)


def _names(value: object) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(cast("Iterable[str]", value))


def undefine(op: AnyOp) -> None:
    """Take an op away: torch's registry, ``torch.ops`` and Dynamo's table are as they were before it.

    Raises:
        CallError: It is no op.
        SpecError: It is not defined, or another op took its name since.
    """
    kit.current().undefine(op)


def register(plugin: object, name: str | None = None) -> str:
    """Register a plugin, a module or an object, by hand; every op follows at once.

    Returns:
        The name it is known by.

    Raises:
        PluginError: It cannot be used; nothing has changed then.
        RuleConflictError: It claims a place that another plugin has.
    """
    return kit.current().register(plugin, name)


def unregister(plugin: object) -> None:
    """Take a plugin away, given itself or its name; every op follows at once.

    Raises:
        PluginError: It is not registered, or is one of hopkit's own.
    """
    kit.current().unregister(plugin)


def plugins() -> tuple[PluginInfo, ...]:
    """Every plugin: its name, distribution, version, what it answers, and why it is not loaded if it is not."""
    return kit.current().infos()


def ops() -> Mapping[str, AnyOp]:
    """Every op, by torch's name."""
    host = kit.current()
    host.load()
    return dict(host.ops)


def adopt(name: str) -> AnyOp:
    """Reserved: rules for an op that hopkit did not define, such as torch's own ``cond``.

    Raises:
        HopkitError: Always, in this version.
    """
    raise HopkitError(
        f"op '{name}'",
        "cannot be adopted in this version of hopkit",
        why="an op of torch has no body to derive rules from",
        todo="Define an op of your own with the same meaning",
    )
