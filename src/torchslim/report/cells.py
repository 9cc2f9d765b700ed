"""Cells and headings of the tables on a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from torchslim.report.numbers import TO, exact, is_measured, spread, with_unit
from torchslim.report.records import Entry

Write = Callable[[float], str]
NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A table cell: the visible text, and the entry of the run with the exact number."""

    field: str
    entry: Entry
    text: str
    note: str = ""
    tone: str = ""

    @property
    def data(self) -> dict[str, str]:
        """The exact JSON numbers, by HTML attribute."""
        names = {"value": "data-value", "low": "data-low", "high": "data-high", "repeats": "data-repeats"}
        return {names[key]: json.dumps(value) for key, value in self.entry.items() if key in names}

    @property
    def title(self) -> str:
        """The tooltip: all digits, unit, repeats and spread, or why there is no number."""
        if not is_measured(self.entry):
            return f"not measured: {self.entry['not_measured']}"
        text = with_unit(exact(self.entry["value"]), self.entry["unit"])
        if "low" in self.entry:
            text += f"; p10 {exact(self.entry['low'])}, p90 {exact(self.entry['high'])}"
        return f"{text}; repeats: {self.entry['repeats']}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """The heading of a column."""

    name: str
    unit: str = ""


def cell_of(field: str, entry: Entry, write: Write) -> Cell:
    """The cell of an entry, with its value as `write` shows it."""
    if not is_measured(entry):
        return absent_cell(field, entry)
    return Cell(field=field, entry=entry, text=write(entry["value"]))


def absent_cell(field: str, entry: Entry) -> Cell:
    """The cell of an entry that was not measured."""
    return Cell(field=field, entry=entry, text=NOT_MEASURED, tone="absent")


def latency_cell(field: str, entry: Entry) -> Cell:
    """The cell of a latency: the median, with p10 and p90 as the note."""
    if not is_measured(entry):
        return absent_cell(field, entry)
    median, low, high = spread(entry)
    return Cell(field=field, entry=entry, text=median, note=f"{low}{TO}{high}" if "low" in entry else "")
