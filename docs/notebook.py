"""Make the notebook of the tutorial, with what its cells print: python -m docs.notebook

The page is the source: its text becomes cells of text, its Python blocks cells of code.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, NOTEBOOK = ROOT / "docs" / "tutorial.md", ROOT / "examples" / "tutorial.ipynb"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def cells(text: str) -> Iterator[tuple[str, str]]:
    """The kind of each cell, "markdown" or "code", and its content."""
    for number, part in enumerate(BLOCK.split(text)):
        content = part.strip()
        if number % 2 == 0:  # links lead to pages beside the tutorial
            content = re.sub(r"\]\((?!http)([^)]+\.md)\)", r"](../docs/\1)", content)
        if content:
            yield ("code" if number % 2 else "markdown"), content


def printed(code: str, scope: dict[str, Any]) -> str:
    """What a block prints."""
    output = io.StringIO()
    with redirect_stdout(output):
        exec(compile(code, "tutorial", "exec"), scope)
    return output.getvalue()


def notebook(text: str) -> dict[str, Any]:
    """The notebook of a page, in the format of Jupyter."""
    scope: dict[str, Any] = {}
    made = []
    for number, (kind, content) in enumerate(cells(text)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        cell["source"] = content.splitlines(keepends=True)
        if kind == "code":
            output = printed(content, scope)
            shown = {"output_type": "stream", "name": "stdout", "text": output.splitlines(keepends=True)}
            cell |= {"execution_count": None, "outputs": [shown] if output else []}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        made = notebook(PAGE.read_text())
    written = NOTEBOOK.with_suffix(".tmp")
    written.write_text(json.dumps(made, indent=1) + "\n")
    written.replace(NOTEBOOK)
    print(NOTEBOOK)


if __name__ == "__main__":
    main()
