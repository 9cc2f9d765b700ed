"""The rehearsal's cost, on the demo and on the same recipe with longer trainings: python -m benchmarks.rehearsal

Nothing is run but the rehearsals; the time of a run is their forecast. The figures stand in docs/rehearsal.md, between
two marks.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchslim.core.hardware import describe_machine
from torchslim.core.step import Step
from torchslim.pipeline.options import RunOptions
from torchslim.pipeline.recipe import load_recipe
from torchslim.pipeline.runner import rehearse_steps
from torchslim.quantize import Quantize
from torchslim.training.finetune import Training

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "fashion_mnist" / "recipe.toml"
PAGE = ROOT / "docs" / "rehearsal.md"
BEGIN, END = "<!-- python -m benchmarks.rehearsal -->\n", "<!-- end -->\n"
LONGER = 10  # times as many epochs


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of a rehearsal, of the clock and of the processor, and of the run as it forecasts it.

    `load` is the mean number of programs that wanted to run on this machine in the last minutes.
    """

    name: str
    seconds: float
    processor: float
    run: float
    load: float

    @property
    def share(self) -> float:
        """The rehearsal's fraction of rehearsal and run."""
        return self.seconds / (self.seconds + self.run)


def longer(step: Step, times: int) -> Step:
    """The step with `times` as many epochs in its trainings."""
    changed: Any = step
    if isinstance(changed, Training):
        return replace(changed, epochs=times * changed.epochs)
    if isinstance(changed, Quantize) and changed.train is not None:
        return replace(changed, train=replace(changed.train, epochs=times * changed.train.epochs))
    return step


def rehearsed(name: str, times: int) -> Cost:
    """Rehearse the demo with `times` as many epochs."""
    recipe = load_recipe(RECIPE)
    model, task, _ = recipe.load()
    steps = [longer(step, times) for step in recipe.steps]
    start, processor = time.perf_counter(), time.process_time()
    forecast = rehearse_steps(
        model, task, steps, RunOptions(target=recipe.target, progress=lambda event: None)
    ).forecast
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    assert forecast is not None
    assert forecast.seconds is not None
    return Cost(name=name, seconds=seconds, processor=processor, run=forecast.seconds, load=os.getloadavg()[1])


def table(costs: Sequence[Cost]) -> str:
    """The figures as Markdown."""
    machine = describe_machine(None)
    rows = [
        f"| {cost.name} | {cost.seconds:.0f} s | {cost.processor:.0f} s | {cost.run / 60:.0f} min | {cost.share:.1%} |"
        for cost in costs
    ]
    return "\n".join(
        [
            "| recipe | rehearsal | of the processor | forecast of the run | share |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Measured on {os.cpu_count()} cores of {machine['processor']} ({machine['instruction_set']}), shared with "
            "other programs: a load of",
            f"{' and '.join(f'{cost.load:.0f}' for cost in costs)}. The runs are not made: their time is the forecast.",
            "",
        ]
    )


def main() -> None:
    """Rehearse both recipes, then write their figures into the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    costs = [rehearsed("the demo", 1), rehearsed(f"the demo with {LONGER} times the epochs", LONGER)]
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table(costs) + "\n" + END + rest.split(END)[1])
    print(table(costs))


if __name__ == "__main__":
    main()
