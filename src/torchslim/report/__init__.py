"""`run.json` as a page and as a table. Imports no torch."""
from typing import Any


def render(run: dict[str, Any]) -> str:
    return "<html></html>"


def table(run: dict[str, Any]) -> str:
    return ""
