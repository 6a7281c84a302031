"""torch's pytrees. ``torch.utils._pytree`` has no public face yet (2.13, 2.14); if it is gone, look for
``torch.utils.pytree`` or ``torch.export``'s registration functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeGuard, TypeVar, cast

import torch
from torch.compiler import is_dynamo_compiling
from torch.utils import _pytree as pytree

T = TypeVar("T")

Tree = pytree.TreeSpec


def flatten(value: object) -> tuple[list[object], Tree]:
    """The leaves of a pytree, in order, and its structure, in which a ``torch.Size`` is a tuple."""
    if _is_quick(value):
        return list(value), _of_tuple(len(value))
    leaves, tree = pytree.tree_flatten(value)
    if any(isinstance(leaf, (int, torch.SymInt)) for leaf in leaves):  # torch makes a tuple of it on the way back
        return pytree.tree_flatten(pytree.tree_unflatten(leaves, tree))
    return leaves, tree


def leaves(value: object) -> list[object]:
    """The leaves of a pytree, in order."""
    return list(value) if _is_quick(value) else pytree.tree_leaves(value)


def tensors(value: object) -> list[torch.Tensor]:
    """The tensors among the leaves of a pytree, in order."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def unflatten(leaves: Iterable[object], tree: Tree) -> object:
    """The pytree with these leaves and this structure."""
    return pytree.tree_unflatten(leaves, tree)


def map_only(kind: type[T], fn: Callable[[T], object], value: object) -> object:
    """``value`` with ``fn`` applied to every leaf of type ``kind``."""
    return pytree.tree_map_only(kind, fn, value)


def is_node(kind: type) -> bool:
    """Whether values of ``kind`` have leaves of their own."""
    return kind in pytree.SUPPORTED_NODES or pytree.is_namedtuple_class(kind)


def is_named_tuple(tree: Tree) -> bool:
    """Whether this is the structure of a named tuple, whose class is then its ``context``."""
    return pytree.is_namedtuple_class(tree.context)


def one_level(tree: Tree) -> Tree:
    """A structure whose children are leaves."""
    children = [object() for _ in tree.children()]
    spec: Tree = pytree.tree_structure(
        pytree.SUPPORTED_NODES[tree.type].unflatten_fn(children, tree.context), is_leaf=lambda v: v in children
    )
    return spec


def is_flat(value: object) -> bool:
    """Whether ``value`` is a plain tuple of leaves."""
    return type(value) is tuple and not any(is_node(type(v)) for v in value)


def is_plain(value: object) -> bool:
    """Whether a graph's node can hold ``value``: tuples, lists and dicts, of those or of leaves."""
    if not is_node(type(value)):
        return True
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return isinstance(value, (tuple, list)) and all(map(is_plain, value))


def map_leaves(fn: Callable[[object], object], value: T) -> T:
    """``value`` with ``fn`` applied to every leaf."""
    if _is_quick(value):
        return cast("T", tuple(map(fn, value)))
    return cast("T", pytree.tree_map(fn, value))


def quick_leaves(value: object) -> Sequence[object]:
    """As `leaves`, fast for a tensor and for a flat tuple of tensors."""
    if type(value) is torch.Tensor:
        return (value,)
    return value if _is_tuple_of_tensors(value) else leaves(value)


def map_tensors(fn: Callable[[torch.Tensor], torch.Tensor], value: object) -> object:
    """``value`` with ``fn`` applied to every tensor; fast for a tensor and for a flat tuple of tensors."""
    if type(value) is torch.Tensor:
        return fn(value)
    return tuple(map(fn, value)) if _is_tuple_of_tensors(value) else map_only(torch.Tensor, fn, value)


def holds(kinds: tuple[type, ...], values: Iterable[object]) -> bool:
    """Whether a leaf of one of these pytrees is of such a class; fast for what is plain, and for flat tuples of it."""
    return any(
        isinstance(leaf, kinds)
        for value in values
        if not (type(value) in _PLAIN or (type(value) is tuple and _PLAIN.issuperset(map(type, value))))
        for leaf in leaves(value)
    )


def _is_tuple_of_tensors(value: object) -> TypeGuard[tuple[torch.Tensor, ...]]:
    return type(value) is tuple and TENSORS.issuperset(map(type, value))


def _is_quick(value: object) -> TypeGuard[tuple[torch.Tensor, ...]]:
    """Whether this is as simple a pytree as most are. Dynamo knows torch's functions, and reads those here."""
    return not is_dynamo_compiling() and _is_tuple_of_tensors(value)


@functools.cache
def _of_tuple(length: int) -> Tree:
    spec: Tree = pytree.tree_structure((0,) * length)
    return spec


TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
"""The classes of plain tensors."""

_PLAIN = TENSORS | {int, float, bool, str, type(None)}


def like(value: object, tree: Tree, kind: type) -> list[object]:
    """The leaves of ``value`` beside those of ``tree``, each of ``kind`` or None; one alone counts for all."""
    if value is None or isinstance(value, kind):
        return [value] * tree.num_leaves
    if tree.num_leaves == 0:
        return []
    return pytree.tree_leaves(value, is_leaf=lambda leaf: leaf is None)
