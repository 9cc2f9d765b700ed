"""Helpers of the commands: progress bars and names of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchslim.core.step import FORECAST, SECONDS_LEFT, TRAINING_LEFT, Event
from torchslim.core.terminal import printable
from torchslim.report.numbers import duration

LEFT = {SECONDS_LEFT: "left", TRAINING_LEFT: "of training left"}
EXAMPLE = "\b\nExample:\n  "


def default_name(recipe: Path) -> str:
    """Return the name of a recipe's results: that of its file, or of its folder for a plain recipe.toml."""
    return recipe.stem if recipe.stem != "recipe" else recipe.resolve().parent.name


def with_report(found: object, report: Path) -> str:
    """Return the result of a command as text, with the path of its report."""
    return printable(f"{found}\n\nreport: {report}", lines=True)


@contextmanager
def progress_shown() -> Iterator[Callable[[Event], None]]:
    """Show progress on stderr, apart from the result on stdout: bars on a terminal, else a line per tenth of a phase.

    A forecast is shown as a table, and the remaining time where events have it.
    """
    from rich import progress as rich
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    started, last = time.monotonic(), [""]
    bars = dict[str, Any]()
    columns = (
        "{task.description}",
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.fields[note]}"),
    )
    with rich.Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def show(event: Event) -> None:
            if event.step == FORECAST:
                console.print(printable(forecast_table(event), lines=True), highlight=False, markup=False)
                return
            name = escape(printable(f"{event.step}: {event.phase}"))  # rich reads [...] as markup
            values = [f"{key} {value:.4g}" for key, value in event.values.items() if key not in LEFT]
            remaining = [
                f"about {duration(event.values[key])} {text}" for key, text in LEFT.items() if key in event.values
            ]
            note = escape(printable("  ".join([*values, *remaining])))
            if console.is_terminal:
                if name not in bars:
                    for bar in bars.values():
                        progress.update(bar, total=progress.tasks[bar].total or 1, refresh=True)
                        if not progress.tasks[bar].finished:
                            progress.update(bar, completed=progress.tasks[bar].total or 1)
                    bars[name] = progress.add_task(name, total=event.total, note=note)
                progress.update(bars[name], completed=event.current, total=event.total, note=note)
                return
            tenth = 10 * event.current // event.total if event.total else 0
            line = f"{name} {tenth * 10} %" if event.total else name
            if line != last[0]:
                last[0] = line
                console.print(f"{time.monotonic() - started:6.0f} s  {line}  {note}", highlight=False, soft_wrap=True)

        yield show


def forecast_table(event: Event) -> str:
    """The forecast of a run as lines: the time of every part that is known, and the memory."""
    minutes = {name: value for name, value in event.values.items() if not name.endswith("_mib")}
    memory = [
        f"{value:,.0f} MiB{' on the device' if name == 'cuda_mib' else ''}"
        for name, value in event.values.items()
        if name.endswith("_mib") and value
    ]
    width = max(map(len, ("forecast", *minutes)))
    lines = [f"  {name:<{width}}  {duration(60 * value):>7}" for name, value in minutes.items()]
    if "total" not in minutes:
        lines.append("  a loader without a length: the rest cannot be foreseen")
    return "\n".join(["forecast", *lines, *([f"  memory at the peak: {', '.join(memory)}"] if memory else [])])
