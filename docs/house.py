"""Draw the rooms of `src/torchslim` from its imports: python -m docs.house

Rewrites the part of docs/design/012-house.md that stands between the two markers.
"""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
SOURCE, PAGE = ROOT / "src" / "torchslim", ROOT / "docs" / "design" / "012-house.md"
BEGIN, END = "<!-- written by python -m docs.house -->\n", "<!-- end -->\n"
FRONT = ("__init__", "__main__", "_version", "errors", "facade")  # modules that are rooms of their own


def room(module: str) -> str:
    """The room of a module, as "torchslim.prune.step" is of prune."""
    return [*module.split("."), "__init__"][1]


def imports() -> Counter[tuple[str, str]]:
    """How many modules of one room import a module of another."""
    graph = grimp.build_graph("torchslim", exclude_type_checking_imports=True, cache_dir=None)
    pairs = ((room(a), room(b)) for a in graph.modules for b in graph.find_modules_directly_imported_by(a))
    return Counter((a, b) for a, b in pairs if a != b)


def files(name: str) -> list[Path]:
    """The modules of a room."""
    return [SOURCE / f"{name}.py"] if name in FRONT else sorted((SOURCE / name).rglob("*.py"))


def functions() -> Iterator[tuple[str, int, int]]:
    """Every function with its lines and its parameters."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{path.relative_to(SOURCE)}: {node.name}"
                given = node.args
                count = len([*given.posonlyargs, *given.args, *given.kwonlyargs])
                yield name, (node.end_lineno or node.lineno) - node.lineno + 1, count


def drawing() -> str:
    """The table of rooms, the arrows between them, and the extremes."""
    rooms = [name for floor in floors() for name in floor]
    lines = ["| room | holds | modules | lines |", "| --- | --- | --- | --- |"]
    for name in rooms:
        found = files(name)
        about = ast.get_docstring(ast.parse(found[0].read_text())) or ""
        size = sum(len(each.read_text().splitlines()) for each in found)
        lines.append(f"| `{name}` | {about.splitlines()[0]} | {len(found)} | {size:,} |")
    arrows = [(a, b) for a, b in imports() if "__init__" not in (a, b) and b not in ("errors", "_version")]
    lines += ["", "```mermaid", "flowchart TD"]
    lines += [
        f"    {a} --> {b}" for a, b in sorted(direct(arrows), key=lambda pair: [rooms.index(each) for each in pair])
    ]
    lines += [
        "```",
        "",
        "An arrow that a path of others stands for is left out, and so are those to `errors` and `_version`.",
    ]
    lines += [""]
    longest = max(SOURCE.rglob("*.py"), key=lambda path: len(path.read_text().splitlines()))
    by_lines, by_count = max(functions(), key=lambda each: each[1]), max(functions(), key=lambda each: each[2])
    lines += [
        f"- Longest file: `{longest.relative_to(SOURCE)}`, {len(longest.read_text().splitlines())} lines.",
        f"- Longest function: `{by_lines[0]}`, {by_lines[1]} lines.",
        f"- Most parameters: `{by_count[0]}`, {by_count[2]}.",
    ]
    return "\n".join(lines) + "\n"


def floors() -> list[list[str]]:
    """The rooms of each floor, from the top down, as the contract in pyproject.toml has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["type"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in layers]


def direct(arrows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The arrows that no path over other rooms stands for."""
    below: dict[str, set[str]] = {}
    for a, b in arrows:
        below.setdefault(a, set()).add(b)

    def reached(name: str) -> set[str]:
        return {far for near in below.get(name, ()) for far in {near} | reached(near)}

    return [(a, b) for a, b in sorted(arrows) if not any(b in reached(other) for other in below[a] if other != b)]


def page(text: str) -> str:
    """The page with a new drawing."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{drawing()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    print(PAGE)
