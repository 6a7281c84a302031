"""Who may import whom (DESIGN, section 3), and who may name private torch."""

from __future__ import annotations

from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hopkit
import hopkit.testing
from tests.contract.seam import ROOT, imports, parse, private

# From the ground up: a module imports from the layers below its own, never from its own or above. Imports that only
# type checkers read do not count. A folder stands for all of its modules.
LAYERS = [
    ["constants", "errors", "modes", "new", "table"],
    ["_torch", "spec"],
    ["binding", "codec", "deciding", "origin", "program", "rule"],
    ["asking", "hookspecs", "layout", "parameters"],
    ["digest", "manager", "probe", "transform"],
    ["installed", "record", "saved", "structured"],
    ["call", "live", "resolve"],
    ["authored", "region"],
    ["extend", "handwritten"],
    ["install", "rules"],
    ["op"],
    ["kit"],
    ["define", "explain", "flatten", "sample"],
    ["testing"],
    ["cli", "__init__"],
    ["__main__"],
]
LAYER = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}

FACES = [hopkit, hopkit.testing]
PUBLIC = {face.__name__ for face in FACES} | {f"{face.__name__}.{name}" for face in FACES for name in face.__all__}
PLUGINS = [ROOT / "hopkit_constgraph", *(ROOT / "plugins").glob("*/src"), *(ROOT / "plugins").glob("*/tests")]
PLUGIN_SOURCES = [path for folder in PLUGINS for path in sorted(folder.rglob("*.py"))]
SOURCES = sorted((ROOT / "hopkit").rglob("*.py"))
OUTSIDE = [path for folder in [*PLUGINS, ROOT / "tests", ROOT / "docs"] for path in sorted(folder.rglob("*.py"))]
EVERY = [path for path in [*SOURCES, *OUTSIDE] if not path.is_relative_to(ROOT / "hopkit" / "_torch")]


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _part(module: str) -> str:
    """What a module of hopkit is in the table."""
    return module.split(".")[1] if "." in module else "__init__"


MODULES = {_module(path): path for path in SOURCES}


def _imported(path: Path) -> set[str]:
    """The modules of hopkit that a module imports when it runs."""
    found = set()
    for name, _ in imports(parse(path)):
        while name not in MODULES and "." in name:
            name = name.rpartition(".")[0]
        if name in MODULES:
            found.add(name)
    return found


def _ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_every_module_has_its_layer() -> None:
    assert {_part(module) for module in MODULES} <= set(LAYER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    upward = [
        name
        for name in _imported(MODULES[module])
        if _part(name) != _part(module) and LAYER[_part(name)] >= LAYER[_part(module)]
    ]
    assert not upward


def test_no_module_imports_itself_round_a_circle() -> None:
    # A package's face is imported before its modules, whatever it holds; a module of it may be what another needs.
    graph = {module: {name for name in _imported(path) if name != module} for module, path in MODULES.items()}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", sorted((ROOT / "hopkit" / "rules").glob("*.py")), ids=lambda path: path.stem)
def test_a_built_in_rule_imports_what_any_plugin_can(path: Path) -> None:
    assert all(name.startswith("hopkit.extend") for name in _imported(path))


@pytest.mark.parametrize("path", PLUGIN_SOURCES, ids=_ids(PLUGIN_SOURCES))
def test_a_plugin_imports_public_faces(path: Path) -> None:
    named = {name for name, _ in imports(parse(path), run=False) if name.split(".")[0] == "hopkit"}
    assert {name for name in named if not name.startswith("hopkit.extend")} <= PUBLIC


def test_hopkit_does_not_know_its_plugins() -> None:
    named = {name.split(".")[0] for path in SOURCES for name, _ in imports(parse(path), run=False)}
    assert not [name for name in named if name.startswith("hopkit_")]


@pytest.mark.parametrize("part", LAYERS[0])
def test_the_ground_stands_without_torch_and_pluggy(part: str) -> None:
    roots = {name.split(".")[0] for name, _ in imports(parse(ROOT / "hopkit" / f"{part}.py"))}
    assert not roots & {"torch", "pluggy"}


@pytest.mark.parametrize("path", EVERY, ids=_ids(EVERY))
def test_nobody_but_the_seam_names_private_torch(path: Path) -> None:
    assert not private(parse(path))
