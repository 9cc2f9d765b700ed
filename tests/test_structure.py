"""Test modules import nothing from each other, and nothing private of torchslim: what they share stands in tests/support."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "src" / "torchslim").rglob("*.py"))}
MODULES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("*.py"))}


def is_private(name: str) -> bool:
    """`_name`, but neither `__name__` nor `_`."""
    return name.startswith("_") and not name.endswith("__") and name != "_"


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of all that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_attributes(tree: ast.Module) -> Iterator[str]:
    """Private names that a module defines: functions, methods, classes, and what its code assigns to attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


PRIVATE = frozenset(name for tree in SOURCES.values() for name in own_attributes(tree) if is_private(name))


def strangers(tree: ast.Module) -> Iterator[str]:
    """Names that a module gives to what it imports from other packages."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                package = (node.module if isinstance(node, ast.ImportFrom) else None) or alias.name
                if package.partition(".")[0] not in ("torchslim", "tests"):
                    yield (alias.asname or alias.name).partition(".")[0]


def reached(tree: ast.Module) -> Iterator[str]:
    """Attributes that a module reads, sets or replaces: `a.b`, and `b` of `setattr(a, "b", c)`."""
    excluded = {"self", "cls", *strangers(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in excluded):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "delattr")):
            names = (argument.value for argument in node.args if isinstance(argument, ast.Constant))
            yield from (part for name in names if isinstance(name, str) for part in name.split("."))


def parts(name: str, package: str) -> list[str]:
    """The names below a package; none where the name is of another package."""
    first, *rest = name.split(".")
    return rest if first == package else []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_a_test_module_stands_alone(path: Path) -> None:
    names = set(imported(MODULES[path]))
    assert not {name for name in names if any(part.startswith("test_") for part in parts(name, "tests"))}
    assert not {name for name in names if any(map(is_private, parts(name, "torchslim")))} - {"torchslim._version"}
    assert not set(reached(MODULES[path])) & PRIVATE


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_hides_a_module_of_its_name(path: Path) -> None:
    name = f"torchslim.{'.'.join(path.relative_to(ROOT / 'src' / 'torchslim').with_suffix('').parts)}"
    package, _, module = name.rpartition(".")
    if module not in ("__init__", "__main__"):
        importlib.import_module(name)
        assert getattr(importlib.import_module(package), module) is sys.modules[name]


def loaded_first(path: Path) -> set[str]:
    """Modules of torchslim that importing a module runs before the end of its own code, except its own packages."""
    name = module_name(path)
    modules = {module_name(other) for other in SOURCES}
    nodes: list[ast.AST] = list(SOURCES[path].body)
    found: set[str] = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for full in imported(ast.Module([node], [])):
                pieces = full.split(".")
                found |= {".".join(pieces[:count]) for count in range(1, len(pieces) + 1)} & modules
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return {other for other in found if not f"{name}.".startswith(f"{other}.")}


def module_name(path: Path) -> str:
    """Full name of a source file's module; a package's own for its `__init__.py`."""
    return ".".join(("torchslim", *path.relative_to(ROOT / "src" / "torchslim").with_suffix("").parts)).removesuffix(
        ".__init__"
    )


def test_every_module_can_be_imported_first() -> None:
    graph = {module_name(path): loaded_first(path) for path in SOURCES if "starters" not in path.parts}
    assert "torchslim.core.step" in graph["torchslim.core.task"] | graph["torchslim.prune.step"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
