"""Helpers of the commands: progress bars and names of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchslim.core.step import Event, Step, Trains, step_name
from torchslim.core.terminal import printable

EXAMPLE = "\b\nExample:\n  "


def default_name(recipe: Path) -> str:
    """Return the name of a recipe's results: that of its file, or of its folder for a plain recipe.toml."""
    return recipe.stem if recipe.stem != "recipe" else recipe.resolve().parent.name


def with_report(found: object, report: Path) -> str:
    """Return the result of a command as text, with the path of its report."""
    return printable(f"{found}\n\nreport: {report}", lines=True)


class TimeLeft:
    """Estimates the remaining time of a recipe's trainings from the pace of the epochs so far."""

    def __init__(self, steps: Sequence[Step]) -> None:
        trainings = [(step_name(step), step.trainings()) for step in steps if isinstance(step, Trains)]
        self.names = [name for name, counts in trainings for _ in counts]
        self.epochs = [count for _, counts in trainings for count in counts]
        self.place, self.running = -1, ("", "")
        self.begun: tuple[float, float] | None = None  # time of the first event, and epochs done by then

    def after(self, event: Event) -> float | None:
        """Return the seconds left after an event; None where no training has run yet to estimate from."""
        if not event.total or "epoch" not in event.values:
            return None
        if (event.step, event.phase) != self.running:
            if event.step not in self.names[self.place + 1 :]:
                return None
            self.running, self.place = (event.step, event.phase), self.names.index(event.step, self.place + 1)
        if "last_epoch" in event.values:  # the training has stopped early
            self.epochs[self.place] = int(event.values["last_epoch"])
        finished = sum(self.epochs[: self.place]) + self.epochs[self.place] * event.current / event.total
        now = time.monotonic()
        self.begun = self.begun or (now, finished)
        started, before = self.begun
        return (sum(self.epochs) - finished) * (now - started) / (finished - before) if finished > before else None


@contextmanager
def progress_shown(steps: Sequence[Step] = ()) -> Iterator[Callable[[Event], None]]:
    """Show progress on stderr, apart from the result on stdout: bars on a terminal, else a line per tenth of a phase.

    With the steps of a run, the remaining time of their trainings is shown.
    """
    from rich import progress as rich
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    started, last = time.monotonic(), [""]
    time_left, bars = TimeLeft(steps), dict[str, Any]()
    columns = (
        "{task.description}",
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.fields[note]}"),
    )
    with rich.Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def show(event: Event) -> None:
            name = escape(printable(f"{event.step}: {event.phase}"))  # rich reads [...] as markup
            values = [f"{key} {value:.4g}" for key, value in event.values.items()]
            seconds = time_left.after(event)
            remaining = [] if seconds is None else [f"about {_duration(seconds)} of training left"]
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


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
