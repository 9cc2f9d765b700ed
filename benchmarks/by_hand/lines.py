"""Lines of code that a user writes: without blank lines, comments and docstrings."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Collection
from pathlib import Path

SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    tokenize.ENCODING,
}  # fmt: skip


def python_lines(text: str, *, only: Collection[str] = ()) -> int:
    """Lines of Python code.

    Args:
        text: the source.
        only: top-level functions and classes to count; empty: everything.
    """
    tree = ast.parse(text)
    counted = [node for node in tree.body if not only or getattr(node, "name", None) in only]
    spans = {line for node in counted for line in _span(node)}
    documented = {line for node in ast.walk(tree) if (doc := _docstring(node)) for line in _span(doc)}
    tokens = tokenize.tokenize(io.BytesIO(text.encode()).readline)
    code = {line for token in tokens if token.type not in SILENT for line in range(token.start[0], token.end[0] + 1)}
    return len(code & spans - documented)


def _span(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _docstring(node: ast.AST) -> ast.stmt | None:
    holds = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    return node.body[0] if holds and ast.get_docstring(node, clean=False) is not None else None


def toml_lines(text: str) -> int:
    """Lines of a TOML file with a key or a table in them."""
    lines = (line.strip() for line in text.splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def lines_of(path: Path, *, only: Collection[str] = ()) -> int:
    """Lines of a file, by its suffix."""
    text = path.read_text()
    return toml_lines(text) if path.suffix == ".toml" else python_lines(text, only=only)
