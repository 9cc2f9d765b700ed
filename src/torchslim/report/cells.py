"""Cells and headings of the tables on a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from torchslim.report.numbers import TO, Entry, exact, spread, value_of, with_unit

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
        return {names[key]: json.dumps(self.entry[key]) for key in names if key in self.entry}

    @property
    def title(self) -> str:
        """The tooltip: all digits, unit, repeats and spread, or why there is no number."""
        if "not_measured" in self.entry:
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
    value = value_of(entry)
    return absent_cell(field, entry) if value is None else Cell(field=field, entry=entry, text=write(value))


def absent_cell(field: str, entry: Entry) -> Cell:
    """The cell of an entry that was not measured."""
    return Cell(field=field, entry=entry, text=NOT_MEASURED, tone="absent")


def latency_cell(field: str, entry: Entry) -> Cell:
    """The cell of a latency: the median, with p10 and p90 as the note."""
    if value_of(entry) is None:
        return absent_cell(field, entry)
    median, low, high = spread(entry)
    return Cell(field=field, entry=entry, text=median, note=f"{low}{TO}{high}" if "low" in entry else "")
