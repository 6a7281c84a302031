"""Reads sources: what a module imports, and which private names of torch it uses."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.Module, *, run: bool = True) -> Iterator[tuple[str, int]]:
    """Every dotted name that a module imports, and the line. ``run``: leave out what only type checkers read."""
    skipped = {id(n) for block in ast.walk(tree) if run and _for_types(block) for n in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def private(tree: ast.Module) -> dict[str, int]:
    """The private names of torch that a module uses, by import or as ``torch.x._y``, each with a line."""
    known = _aliases(tree)
    found: dict[str, int] = {}
    for name, line in imports(tree, run=False):
        found.setdefault(name, line)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node, known)):
            found.setdefault(name, node.lineno)
    return {name: line for name, line in found.items() if _is_private(name)}


# torch documents them: every operator is in torch.ops, and a wrapper subclass or a package is made in no other way.
_DOCUMENTED = ("torch.ops.aten.", "torch.Tensor._make_wrapper_subclass", "torch._inductor.aoti_")


def _is_private(name: str) -> bool:
    root, *parts = name.split(".")
    if name.startswith(_DOCUMENTED):
        return False
    return root == "torch" and any(part.startswith("_") and not part.startswith("__") for part in parts)


def _aliases(tree: ast.Module) -> dict[str, str]:
    """What local names stand for: by import, or by an assignment of a dotted name."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                known[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom) and node.module:
            known.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name):
            known[target.id] = _dotted(node.value, known)
    return known


def _dotted(node: ast.AST, known: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value, known)
        return f"{inner}.{node.attr}" if inner else ""
    return known.get(node.id, "") if isinstance(node, ast.Name) else ""
