"""What the commands share: how they draw progress and name results."""

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
    """What a recipe's results are called: as its file, or as the folder of a plain recipe.toml."""
    return recipe.stem if recipe.stem != "recipe" else recipe.resolve().parent.name


def with_report(found: object, report: Path) -> str:
    """What a command has found, as text, and where its report is."""
    return printable(f"{found}\n\nreport: {report}", lines=True)


class TimeLeft:
    """How long the trainings of a recipe will still take, at the pace of those that have run."""

    def __init__(self, steps: Sequence[Step]) -> None:
        trainings = [(step_name(step), step.trainings()) for step in steps if isinstance(step, Trains)]
        self.names = [name for name, counts in trainings for _ in counts]
        self.epochs = [count for _, counts in trainings for count in counts]
        self.place, self.running = -1, ("", "")
        self.begun: tuple[float, float] | None = None  # when the first training was seen, and after how many epochs

    def after(self, event: Event) -> float | None:
        """Seconds that are left after an event; None where no training has run that could tell."""
        if not event.total or "epoch" not in event.values:
            return None
        if (event.step, event.phase) != self.running:
            if event.step not in self.names[self.place + 1 :]:
                return None
            self.running, self.place = (event.step, event.phase), self.names.index(event.step, self.place + 1)
        done = sum(self.epochs[: self.place]) + self.epochs[self.place] * event.current / event.total
        now = time.monotonic()
        self.begun = self.begun or (now, done)
        started, before = self.begun
        return (sum(self.epochs) - done) * (now - started) / (done - before) if done > before else None


@contextmanager
def progress_shown(steps: Sequence[Step] = ()) -> Iterator[Callable[[Event], None]]:
    """A bar on a terminal, a line for each tenth of a phase elsewhere; on stderr, so that stdout stays the result.

    With the steps of a run, how long their trainings will still take is shown.
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
            left = [] if seconds is None else [f"about {_duration(seconds)} of training left"]
            note = escape(printable("  ".join([*values, *left])))
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
