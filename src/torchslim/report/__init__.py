"""`run.json` as a page and as a table. Imports no torch."""

from torchslim.report.load import RUN_FORMAT, load_run
from torchslim.report.page import render
from torchslim.report.text import table

__all__ = ["RUN_FORMAT", "load_run", "render", "table"]
