"""Measures what a solved search chooses from: the costs and the damage of every option, and how damages add up."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchslim.allocation.problem import Decision, Problem
from torchslim.analysis.activation_cache import story_of
from torchslim.analysis.damage import AdditionLaw, DamageTable, damage_table, fitted, kind_of
from torchslim.analysis.measures import Measure, OutputGauge
from torchslim.analysis.sensitivity import sensitivity
from torchslim.core.budget import Budget
from torchslim.core.files import digest, present
from torchslim.core.isolation import preserved_globals, warn
from torchslim.core.seals import read_sealed, write_sealed
from torchslim.core.step import Event
from torchslim.errors import StorageError, TaskError, TorchslimError
from torchslim.prune.reconstruction.reconstruct import Calibration
from torchslim.prune.reconstruction.reconstruct import reconstruct as reconstruct_weights
from torchslim.prune.structured.surgery import perform
from torchslim.training.calibration import CalibrationData
from torchslim.tuning.choices import AFTER, TRAIN, Places, SolvedSpace, inside
from torchslim.tuning.proposing import ORIGINAL, Tables
from torchslim.tuning.solved_costs import Costs
from torchslim.tuning.trial import Lab

RATIOS = tuple(eighth / 8 for eighth in range(1, 8))
"""Fractions of a group's channels whose removal is measured; widths between them are interpolated."""

JOINT = 8
"""Random joint choices on which it is measured how single damages add up."""

SAMPLES = 256
"""Calibration samples for damages."""

BEHIND = 12
"""Parameters behind a dropped block that are solved for: all of them would take too long in a deep model."""


def measure_damage(
    lab: Lab, space: SolvedSpace, costs: Costs, folder: Path, key: str
) -> tuple[DamageTable, AdditionLaw]:
    """Single damages, and how they add up; what was measured before is read from `folder`.

    Args:
        lab: runs untrained recipes.
        space: of the decisions.
        costs: of the decisions.
        folder: of the measurements.
        key: of the search; seals its files.
    """
    measure = _measure(lab)
    damage = _damage(lab, space, costs, measure, folder, _reconstructs(space))
    return damage, _law(lab, space, damage, measure, folder / "joint.rows", key)


def make_tables(budget: Budget, costs: Costs, damage: DamageTable, law: AdditionLaw) -> Tables:
    """The tables of a search under a budget."""
    problem = Problem(
        decisions=costs.decisions,
        damage=damage.terms(law),
        costs=costs.costs,
        limits={name: bound for name, bound in budget.bounds.items() if name in costs.costs},
    )
    traded = next((name for name in budget.objectives if name in costs.costs), next(iter(costs.costs)))
    return Tables(problem=problem, damage=damage, law=law, cost=traded)


def _measure(lab: Lab) -> Measure:
    """Divergence of the logits where the outputs have logits, else the noise of the outputs."""
    batches = CalibrationData(lab.task, lab.seed, 1).batches
    gauge = OutputGauge("kl", lab.task, batches)
    try:
        gauge.start(Alone(lab.model, gauge.inputs))
    except TaskError:
        return "sqnr"
    return "kl"


def _reconstructs(space: SolvedSpace) -> bool:
    """Whether the cuts of the recipes solve for the weights that remain: the tables are then measured like this too."""
    place = Places.of(space.document["step"]).prune
    return place is not None and bool(space.document["step"][place]["reconstruct"])


def _damage(
    lab: Lab, space: SolvedSpace, costs: Costs, measure: Measure, folder: Path, reconstruct: bool
) -> DamageTable:
    kinds = {kind_of(decision) for decision in space.decisions}
    schemes = [str(o) for d in space.decisions if kind_of(d) == "scheme" for o in d.options if o != "float"]
    blocks = _blocks(lab, costs, measure, reconstruct)
    if not kinds & {"width", "scheme"}:
        return damage_table(space.decisions, [], blocks)
    found = sensitivity(
        lab.model,
        lab.task,
        example_inputs=lab.example_inputs,
        ratios=RATIOS if "width" in kinds else (),
        schemes=tuple(dict.fromkeys(schemes)),
        measure=measure,
        samples=SAMPLES,
        reconstruct=reconstruct,
        seed=lab.seed,
        workdir=folder,
        progress=lab.progress,
        runtime=space.recipe(space.first).target.runtime,
    )
    return damage_table(space.decisions, [found], blocks)


def _blocks(lab: Lab, costs: Costs, measure: Measure, reconstruct: bool) -> dict[str, float]:
    """The damage of dropping each block."""
    if costs.depth is None or not costs.blocks:
        return {}
    batches = CalibrationData(lab.task, lab.seed, SAMPLES).batches
    gauge = OutputGauge(measure, lab.task, batches)
    runs = Alone(lab.model, gauge.inputs)
    data = Calibration(batches=batches, forward=lab.task.forward, mask=lab.task.mask)
    damages = {}
    with preserved_globals(lab.seed):
        gauge.start(runs)
        used = story_of(lab.model, gauge.inputs[0]).used
        for name, modules in costs.blocks.items():
            pruned = perform(lab.model, costs.depth.surgery([name])).eval()
            if reconstruct:
                reconstruct_weights(lab.model, pruned, data, only=_behind(used, modules), seed=lab.seed)
            damages[name] = _damage_of(gauge.value(runs, pruned), measure)
    return damages


def _behind(used: Mapping[str, int], modules: Collection[str]) -> list[str]:
    """The weights that are used first after those of some modules: they can make up for most of what is missing."""
    last = max((time for name, time in used.items() if inside(name, modules)), default=0)
    return sorted((name for name, time in used.items() if time > last), key=used.__getitem__)[:BEHIND]


def _damage_of(value: float, measure: Measure) -> float:
    return float(10 ** (-value / 10)) if measure == "sqnr" else value


class Alone:
    """Runs of whole models on several inputs, as `OutputGauge` takes them."""

    def __init__(self, model: Any, inputs: Sequence[Any]) -> None:
        self.model, self.inputs = model, inputs

    def outputs(self, change: Any = None) -> Any:
        """Outputs of a changed model, or of the model itself, on each of the inputs."""
        from torchslim.core.batches import call, predictor

        run = predictor(self.model if change is None else change)
        return (call(run, each) for each in self.inputs)

    def answer(self, change: Any, inputs: Any) -> Any:
        """Outputs on other inputs."""
        from torchslim.core.batches import call, predictor

        return call(predictor(self.model if change is None else change), inputs)


def joint_choices(decisions: Sequence[Decision], count: int, seed: int) -> list[tuple[int, ...]]:
    """Random choices from mild to strong ones: options up to a share of the way that differs from choice to choice."""
    generator = np.random.default_rng(seed)
    choices = []
    for number in range(count):
        share = (number + 1) / count
        choices.append(
            tuple(round(generator.uniform(0, share) * (len(decision.options) - 1)) for decision in decisions)
        )
    return choices


def _law(lab: Lab, space: SolvedSpace, damage: DamageTable, measure: Measure, path: Path, key: str) -> AdditionLaw:
    """How single damages add up, from untrained models with random joint choices."""
    key = digest(key, measure, _reconstructs(space), [decision.options for decision in space.decisions])
    rows = _read(path, key)
    choices = joint_choices(space.decisions, JOINT, lab.seed)
    gauge = OutputGauge(measure, lab.task, CalibrationData(lab.task, lab.seed, SAMPLES).batches)
    runs = Alone(lab.model, gauge.inputs)
    for number, choice in enumerate(choices):
        text = json.dumps(choice)
        if text in rows:
            continue
        lab.progress(Event(step="search", phase="joint choices", current=number, total=len(choices)))
        if not gauge.before:
            gauge.start(runs)
        rows[text] = _joint(lab, space, choice, gauge, runs, measure)
        write_sealed(path, json.dumps(rows, allow_nan=False).encode(), key)
    measured = [(choice, value) for choice in choices if (value := rows[json.dumps(choice)]) is not None]
    return fitted(damage, [choice for choice, _ in measured], [value for _, value in measured])


def _joint(
    lab: Lab, space: SolvedSpace, choice: Sequence[int], gauge: OutputGauge, runs: Alone, measure: Measure
) -> float | None:
    """The damage of one choice; None if its model cannot be built."""
    values: dict[str, Any] = {
        decision.name: decision.options[place] for decision, place in zip(space.decisions, choice, strict=True)
    }
    cheap, _ = lab.efforts()
    try:
        with preserved_globals(lab.seed):
            model = lab.made(space.recipe({**values, AFTER: ORIGINAL, TRAIN: False}), cheap)
            value = gauge.value(runs, model)
    except TorchslimError as error:
        warn(f"a joint choice was not measured: {error}")
        return None
    return _damage_of(value, measure)


def _read(path: Path, key: str) -> dict[str, float | None]:
    if not present(path):
        return {}
    try:
        stored: dict[str, float | None] = json.loads(read_sealed(path, key))
    except StorageError as error:
        warn(f"{error}; the joint choices are measured again")
        return {}
    return stored
