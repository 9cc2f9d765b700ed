"""Lines of code that a user writes: without blank lines, comments, docstrings, and what only annotations need."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    tokenize.ENCODING,
}  # fmt: skip


def lines_of(path: Path) -> int:
    """Lines of a Python file."""
    return python_lines(path.read_text())


def python_lines(text: str) -> int:
    """Lines of Python code.

    Imports and names at the top of a file count if its code uses them. Those that only annotations use do not: a script
    may leave out annotations.
    """
    tree = ast.parse(text)
    idle = {line for node in ast.walk(tree) if (doc := _docstring(node)) for line in _span(doc)}
    used = _used(tree)
    for node in tree.body:
        names = _bound(node)
        if names is not None and not names & used:
            idle |= set(_span(node))
    tokens = tokenize.tokenize(io.BytesIO(text.encode()).readline)
    code = {line for token in tokens if token.type not in SILENT for line in range(token.start[0], token.end[0] + 1)}
    return len(code - idle)


def _bound(node: ast.stmt) -> set[str] | None:
    """Names that an import binds, or the plain name of an alias of types; None for other code."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        return set() if future else {(name.asname or name.name).partition(".")[0] for name in node.names}
    alias = isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript)
    return {target.id for target in node.targets if isinstance(target, ast.Name)} if alias else None


def _used(tree: ast.Module) -> set[str]:
    """Names that are read outside of annotations and aliases of types."""
    names, waiting = set[str](), list[ast.AST](tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
        if node in tree.body and isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            continue
        waiting += [
            child
            for field, value in ast.iter_fields(node)
            if field not in ("annotation", "returns")
            for child in (value if isinstance(value, list) else [value])
            if isinstance(child, ast.AST)
        ]
    return names


def _span(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _docstring(node: ast.AST) -> ast.stmt | None:
    holds = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    return node.body[0] if holds and ast.get_docstring(node, clean=False) is not None else None
