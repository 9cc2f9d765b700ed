"""Measurements behind `sensitivity`: prunes one group or quantizes one layer at a time, the rest is unchanged.

With `reconstruct`, the weights that read the pruned group are solved for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from torchslim.analysis.activation_cache import Changed, Replays
from torchslim.analysis.measures import Gauge, Measure, MetricGauge, OutputGauge
from torchslim.analysis.result import Known, Point
from torchslim.core.batches import EXAMPLES, Batch
from torchslim.core.isolation import copy_model, untouched
from torchslim.core.layer_patterns import Patterns, as_list, class_names, matches
from torchslim.core.parts import signature_of
from torchslim.core.reason import Reason
from torchslim.core.step import Event, Inputs, log_progress
from torchslim.core.task import Task
from torchslim.core.trees import device_of, to_device
from torchslim.errors import ExportError, PruneError, QuantizeError, TorchslimError
from torchslim.graph.calling import Flat, bind
from torchslim.graph.dynamic_sizes import find_batch_axis
from torchslim.graph.io_structure import Structure, build, describe
from torchslim.prune.criteria.registry import Criterion, Scorer, find_criterion, needs
from torchslim.prune.criteria.statistics import Gathered, gather
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.dependency.groups import Unit
from torchslim.prune.reconstruction.reconstruct import Calibration, reconstruct
from torchslim.prune.structured.attributes import mend
from torchslim.prune.structured.plan import Plan, analyze
from torchslim.prune.structured.ranking import Ranking
from torchslim.prune.structured.selection import Amount, Selection, select
from torchslim.prune.structured.surgery import cuts_of, perform
from torchslim.quantize import prepare
from torchslim.quantize.layerwise import Passes, singles
from torchslim.quantize.schemes import find_scheme
from torchslim.training.calibration import CalibrationData

RETREATS = 60
"""The most rounds of ruling out a removal that fails; after them the coupling is used as it is."""


@dataclass(kw_only=True)
class Sensing:
    """Measures points; the arguments are those of `sensitivity`, and `fixed`: names of weights that stay whole."""

    model: nn.Module
    task: Task
    example_inputs: Inputs
    measure: Measure = "sqnr"
    runtime: str = "onnxruntime"
    include: Patterns = None
    exclude: Patterns = None
    fixed: tuple[str, ...] = ()
    samples: int = 512
    criterion: str | Criterion | Scorer = "lamp"
    reconstruct: bool = False
    seed: int = 0
    progress: Callable[[Event], None] = log_progress
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = copy_model(self.model)[0].eval()

    @cached_property
    def batches(self) -> list[Batch]:
        """Calibration batches, labels included."""
        return CalibrationData(self.task, self.seed, self.samples).batches

    @cached_property
    def gauge(self) -> Gauge:
        """Gauge that measures the points."""
        if self.measure == "metric":
            return MetricGauge(self.task, self.model, self.seed)
        return OutputGauge(self.measure, self.task, self.batches)

    def more_of_key(self) -> list[Any]:
        """What the points depend on besides the arguments."""
        return []

    # channel groups ---------------------------------------------------------------------------------------------------

    def channels(self, changes: Sequence[str], known: Known) -> Iterator[Point]:
        """Yield a point for each unit of groups and each ratio; `changes` are ratios as `percent` writes them."""
        few = small(self.model, self.example_inputs)
        try:
            kept = [*as_list(self.exclude), *self.fixed] or None
            plan = analyze(self.model, few, include=self.include, exclude=kept)
        except PruneError as error:
            self.notes.append(f"no channel group was measured: {error}")
            return
        coupling = settled(plan)
        yield from _unverified(coupling, changes, known)
        selection = self._selection(plan, coupling)
        runs = Replays(self.model, self.gauge.inputs, plan.inputs)
        rows = []
        for place, (name, unit) in enumerate(_named(coupling)):
            for change in changes:
                if (name, change) not in known:
                    count, removed = self._removal(plan, coupling, selection, place, float(change.rstrip(" %")) / 100)
                    begins = runs.story.begins({cut.weight for cut in cuts_of(coupling, removed)}, ())
                    rows.append((begins, place, name, unit, change, count, removed))
        rows.sort(key=lambda row: row[:2])
        if rows:
            self.gauge.start(runs)
        for number, (_, _, name, unit, change, gone, removed) in enumerate(rows):
            self.progress(Event(step="sensitivity", phase="channels", current=number, total=len(rows)))
            groups = tuple(coupling.groups[group].name for group in unit.groups)
            value, refused = None, ""
            if not gone:
                refused = f"too narrow: {unit.width} channels"
            else:
                value, refused = self._pruned(plan, coupling, removed, runs)
            yield Point(
                name=name,
                kind="channels",
                change=change,
                amount=gone / unit.width if gone else None,
                value=value,
                refused=refused,
                groups=groups,
            )

    def gathered(self, model: nn.Module) -> Gathered:
        """Statistics that the criterion needs, on the calibration data."""
        statistics = needs(find_criterion(self.criterion))
        return gather(model, statistics, self.batches, forward=self.task.forward, loss=self.task.compute_loss)

    def _selection(self, plan: Plan, coupling: Coupling) -> Selection:
        criterion = find_criterion(self.criterion)
        gathered = self.gathered(plan.model) if needs(criterion) else Gathered()
        ranking = Ranking(criterion=criterion, gathered=gathered, seed=self.seed)
        amount = Amount(of="channels", round_to=1, min_channels=1)
        return select(coupling, amount, plan.names, ranking.scores(plan.model, plan), narrowest=plan.narrowest)

    def _removal(
        self, plan: Plan, coupling: Coupling, selection: Selection, place: int, ratio: float
    ) -> tuple[int, Mask]:
        """Number of channels to remove from one unit, and the mask of everything that is removed with them."""
        kept = [unit.width for unit in coupling.units]
        gone = min(max(round(ratio * kept[place]), 1), kept[place] - plan.narrowest)
        kept[place] -= max(gone, 0)
        return max(gone, 0), selection.removed(kept)

    def _pruned(self, plan: Plan, coupling: Coupling, removed: Mask, runs: Replays) -> tuple[float | None, str]:
        """Value of the measure without these channels, or the reason why they cannot be removed."""
        surgery, diverged = mend(plan.model, coupling, removed, plan.inputs)
        if diverged is not None:
            return None, f"{diverged.path}: {diverged.what}"
        weights = {cut.weight for cut in surgery.cuts}
        begins = runs.story.begins(weights, {patch.module for patch in surgery.patches})
        pruned = perform(plan.model, surgery).eval()
        try:
            if self.reconstruct:  # a weight that lost outputs alone gives what it gave, and is left
                reconstruct(plan.model, pruned, self._calibration(), cuts=surgery.cuts, only=weights, seed=self.seed)
            change = Changed(model=pruned, begins=begins)
            return self.gauge.value(runs, change), ""
        except TorchslimError:
            raise
        except Exception as error:  # noqa: BLE001 - any error of the user's code on other shapes is the result
            return None, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"

    def _calibration(self) -> Calibration:
        return Calibration(batches=self.batches, forward=self.task.forward, mask=self.task.mask)

    # layers -----------------------------------------------------------------------------------------------------------

    def layers(self, schemes: Sequence[str], known: Known) -> Iterator[Point]:
        """Yield a point for each layer and each scheme."""
        for scheme in schemes:
            yield from self._scheme(scheme, known)

    def _scheme(self, scheme: str, points: Known) -> Iterator[Point]:
        inputs = [self.task.inputs(batch) for batch in self.batches]
        try:
            examples = inputs[:EXAMPLES] or self.example_inputs  # their sizes may differ
            prepared = prepare(self.model, examples, runtime=self.runtime, scheme=scheme)
            if find_scheme(scheme).activations == "static":
                prepared.calibrate(inputs)
        except (QuantizeError, ExportError) as error:
            self.notes.append(f"{scheme}: no layer was measured: {error}")
            return
        for record in prepared.records:
            if record.action == "refused" and record.reason != Reason.AS_ASKED and (record.layer, scheme) not in points:
                yield Point(name=record.layer, kind="layer", change=scheme, refused=record.reason)
        included = self._wanted()
        changes = [
            single for single in singles(prepared) if included(single.layer) and (single.layer, scheme) not in points
        ]
        if not changes:
            return
        runs = Passes(prepared, self.gauge.inputs)
        self.gauge.start(runs)
        for number, change in enumerate(changes):
            self.progress(Event(step="sensitivity", phase=scheme, current=number, total=len(changes)))
            yield Point(name=change.layer, kind="layer", change=scheme, value=self.gauge.value(runs, change))

    def _wanted(self) -> Callable[[str], bool]:
        types = class_names(self.model)
        included, excluded = as_list(self.include), as_list(self.exclude)

        def wanted(layer: str) -> bool:
            def covered(patterns: Sequence[str]) -> bool:
                return any(matches(pattern, layer, types) for pattern in patterns)

            return (self.include is None or covered(included)) and not covered(excluded)

        return wanted


def settled(plan: Plan) -> Coupling:
    """Coupling of a plan in which half of the channels of any single group can be removed.

    Pruning retreats only when the joint removal fails; the removal from a single group may fail before.
    """
    fine: set[tuple[str, int]] = set()
    for _ in range(RETREATS):
        coupling = plan.coupling()
        order = [[cell.classes for cell in unit.cells] for unit in coupling.units]
        ranks = [np.zeros(unit.width) for unit in coupling.units]
        selection = Selection(coupling, Amount(), plan.names, order, ranks)
        for place, (name, unit) in enumerate(_named(coupling)):
            if (name, unit.width) in fine:
                continue
            kept = [coupled.width for coupled in coupling.units]
            kept[place] = min(max(unit.width // 2, plan.narrowest), unit.width)
            removed = selection.removed(kept)
            diverged = mend(plan.model, coupling, removed, plan.inputs)[1] if removed.any() else None
            if diverged is None:
                fine.add((name, unit.width))
                continue
            if plan.narrowest == 1 and kept[place] == 1:
                plan.narrowest = 2
            elif not plan.retreat(diverged, coupling, removed):
                fine.add((name, unit.width))  # its points will be refused with the reason
                continue
            break
        else:
            return coupling
    return plan.coupling()


def small(model: nn.Module, inputs: Inputs) -> Inputs:
    """Two samples of the inputs; the inputs as they are if the batch dimension cannot be found."""
    bound = to_device(bind(model, inputs), device_of(model))
    classes: dict[str, type] = {}
    leaves: list[Any] = []
    structure: Structure = {
        "dict": {name: describe(value, leaves, classes, f"input {name!r}") for name, value in bound.items()}
    }
    with untouched(model):
        axis, few, _ = find_batch_axis(Flat(model, structure, classes), [leaf.detach().clone() for leaf in leaves])
    kinds = {parameter.kind for parameter in signature_of(model).parameters.values()}
    plain = not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    if axis is None or not (plain and inspect.Parameter.POSITIONAL_ONLY not in kinds):
        return inputs
    named: dict[str, Any] = build(structure, few, classes)
    return named


def _named(coupling: Coupling) -> list[tuple[str, Unit]]:
    """Units with the name of their first group; units that share a name are numbered."""
    units: list[tuple[str, Unit]] = []
    seen: dict[str, int] = {}
    for unit in coupling.units:
        name = coupling.groups[unit.groups[0]].name
        seen[name] = seen.get(name, 0) + 1
        units.append((name if seen[name] == 1 else f"{name} ({seen[name]})", unit))
    return units


def _unverified(coupling: Coupling, changes: Sequence[str], points: Known) -> Iterator[Point]:
    """Yield a refused point for each group whose removal could not be verified, and each change."""
    reasons: Mapping[str, str] = {
        group.name: group.reason for group in coupling.groups if Reason.NOT_VERIFIED.given_in(group.reason)
    }
    for name, why in reasons.items():
        for change in changes:
            if (name, change) not in points:
                yield Point(name=name, kind="channels", change=change, refused=why)
