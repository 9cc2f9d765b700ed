"""Show a run, a search or a sensitivity analysis as an HTML page or a text table. Imports no torch."""

from collections.abc import Callable, Mapping
from typing import Any

from torchslim.report.load import RUN_FORMAT, kind_of, load_run, load_search, load_sensitivity
from torchslim.report.page import render
from torchslim.report.run_table import table
from torchslim.report.search_page import explanation_text, render_search, search_table
from torchslim.report.sensitivity_page import render_sensitivity, sensitivity_table

REPORTS: Mapping[str, tuple[Callable[..., dict[str, Any]], Callable[..., str], Callable[..., str]]] = {
    "run": (load_run, render, table),
    "search": (load_search, render_search, search_table),
    "sensitivity": (load_sensitivity, render_sensitivity, sensitivity_table),
}
"""For each kind of report, the functions that load it, write its page and write its table."""

__all__ = [
    "REPORTS",
    "RUN_FORMAT",
    "explanation_text",
    "kind_of",
    "load_run",
    "load_search",
    "load_sensitivity",
    "render",
    "render_search",
    "render_sensitivity",
    "search_table",
    "sensitivity_table",
    "table",
]
