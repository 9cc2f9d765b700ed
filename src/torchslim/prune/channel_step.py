"""The pruning step for whole channels: rounds of sparse training, cutting, recalibration and training, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import nn

from torchslim.core.batches import batch_size
from torchslim.core.layer_patterns import check_patterns
from torchslim.core.reason import Reason
from torchslim.core.step import Context, Event, LayerRecord, Outcome
from torchslim.errors import PruneError
from torchslim.prune.channel_records import pruned_records, refusals, refused_records, shapes_of_parameters
from torchslim.prune.channel_state import PruningState, cut_masks, restored_state
from torchslim.prune.criteria.gathering import check_data, gather_for
from torchslim.prune.criteria.registry import find_criterion, named_by_path
from torchslim.prune.dependency.coupling import Coupling
from torchslim.prune.latency.solve import Told, reach
from torchslim.prune.latency.table import Table, load_rows
from torchslim.prune.masking.masks import apply_masks
from torchslim.prune.schedule import Schedule
from torchslim.prune.structured.options import ChannelOptions
from torchslim.prune.structured.penalties import Sparsify, make_penalty
from torchslim.prune.structured.plan import Plan
from torchslim.prune.structured.removal import (
    Shrunk,
    Stuck,
    TooLittle,
    finish,
    gave_way,
    missed_target,
    shrink,
    tolerance,
    vacuous,
)
from torchslim.prune.structured.selection import Amount, Of, Scores
from torchslim.training.batch_norm import recalibrate_batch_norm, tracked
from torchslim.training.calibration import calibration_of
from torchslim.training.finetune import Training
from torchslim.training.loop import FitReport, Hook

CALIBRATION_SAMPLES = 8
"""The smallest batch that batch norms are recalibrated on; smaller batches estimate the variance badly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsePenalty:
    """A penalty that drives channels to zero in every training before a cut."""

    kind: Sparsify
    strength: float = 1e-4
    train: Training | None  # the training before the first cut

    def __post_init__(self) -> None:
        if self.train is None:
            raise PruneError(f"sparsify={self.kind!r} needs a training; give sparsify_train=Finetune(...), or train")
        if not 0 < self.strength < float("inf"):
            raise PruneError(f"strength must be a finite number above 0, got {self.strength}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneChannels:
    """Removes channels, neurons and heads: `Prune` with the pattern "channel" and defaults filled in."""

    options: ChannelOptions
    schedule: Schedule
    penalty: SparsePenalty | None = None
    latency_table: str | None = None

    def __post_init__(self) -> None:
        if not named_by_path(self.options.criterion):
            find_criterion(self.options.criterion)
        if self.schedule.kind == "gradual":
            raise PruneError(
                "schedule 'gradual' is not for pattern 'channel': shapes cannot change while an optimizer steps; use "
                "'iterative' with more rounds"
            )
        if self.latency_table is not None and self.amount.of != "latency":
            raise PruneError(f"latency_table is for of='latency', got of={self.amount.of!r}; leave latency_table out")

    @property
    def amount(self) -> Amount:
        """How much to remove, and in what steps."""
        return self.options.amount

    def check(self, ctx: Context) -> None:
        """Raise if no layer matches, or if the criterion, a training or the measurement lacks its data."""
        check_data(find_criterion(self.options.criterion), ctx)
        model = ctx.model if ctx.model is not None else ctx.teacher
        check_patterns(model, self.options.include, self.options.exclude)
        if self.amount.of == "latency":
            self._check_measurement(ctx)
        for training in (self.schedule.train, self.penalty.train if self.penalty else None):
            if training is not None:
                training.check_training(ctx)

    def _check_measurement(self, ctx: Context) -> None:
        if ctx.workbench is None:
            raise PruneError(
                "of='latency' needs a workbench to measure latency: run the step by ts.compress or `torchslim run`, or "
                "give a Context with workbench=ts.Bench(...)"
            )
        if self.latency_table is not None:
            load_rows(self.latency_table, {"runtime": ctx.target.runtime, "threads": ctx.target.threads})

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        apply_masks(model, ctx.masks)
        return _Rounds(self, model, ctx).run()


class _Rounds:
    """One run of the step. Every target is a fraction of the model that the step received."""

    def __init__(self, step: PruneChannels, model: nn.Module, ctx: Context) -> None:
        self.step, self.ctx = step, ctx
        self.received, self.received_shapes = model, shapes_of_parameters(model)
        self.state = restored_state(model, ctx) or PruningState(model, dict(ctx.masks))

    def run(self) -> Outcome:
        """Train with the penalty, then cut and train in every round."""
        step, state = self.step, self.state
        targets = step.schedule.targets(step.amount.sparsity)
        trained: Sequence[LayerRecord] = ()
        if not state.cuts:
            self._train_sparsely()
        for number in range(max(state.cuts, 1), len(targets) + 1):
            last = number == len(targets)
            if number > state.cuts:
                self.ctx.progress(Event(step=self.ctx.name, phase=f"cut-{number}"))
                if step.amount.of == "latency":
                    self._cut_to_latency(targets[number - 1])
                else:
                    self._cut_to_size(targets[number - 1], last=last)
                state.cuts = number
                state.save(self.ctx)
            if step.schedule.train is not None:
                trained = self._train(step.schedule.train, number, last=last).layers
        records = [*pruned_records(self.received_shapes, state.model), *refused_records(state.refused), *trained]
        return Outcome(
            model=state.model,
            masks=state.masks,
            layers=records,
            warnings=list(dict.fromkeys(state.warnings)),
            history=state.history,
            evidence=state.evidence,
        )

    def _train_sparsely(self) -> None:
        penalty = self.step.penalty
        if penalty is None or penalty.train is None:
            return
        state = self.state
        report = penalty.train.fit(
            state.model, self.ctx, masks=state.masks, hooks=self._penalty_hooks(), phase="sparsify"
        )
        self._add_history(report, 0)

    def _train(self, training: Training, number: int, *, last: bool) -> FitReport:
        hooks = [] if last else self._penalty_hooks()  # the penalty prepares the next cut
        report = training.fit(
            self.state.model, self.ctx, masks=self.state.masks, hooks=hooks, phase=f"prune-{number}", part=number
        )
        self._add_history(report, number)
        return report

    def _add_history(self, report: FitReport, number: int) -> None:
        self.state.history += [{"round": float(number), **row} for row in report.history]

    def _penalty_hooks(self) -> list[Hook]:
        penalty = self.step.penalty
        if penalty is None:
            return []
        return [make_penalty(penalty.kind, self._plan(self.state.model).coupling(), penalty.strength)]

    def _plan(self, model: nn.Module) -> Plan:
        return self.step.options.plan(model, self.ctx.example_inputs, self.ctx.task.examples)

    def _scores(self, plan: Plan) -> Scores:
        criterion = find_criterion(self.step.options.criterion)
        gathered = gather_for(criterion, self.state.model, self.ctx)
        return self.step.options.ranking(gathered, self.ctx.seed, self.ctx.priors).scores(plan.model, plan)

    def _cut_to_size(self, target: float, *, last: bool) -> None:
        """Remove what is still missing to a sparsity of parameters, MACs or channels."""
        state, amount = self.state, self.step.amount
        plan = self._plan(state.model)
        sparsity = self._missing_sparsity(target, plan)
        try:
            if sparsity > 0:  # widths are whole steps: an earlier round may have removed enough
                self._remove(plan, replace(amount, sparsity=sparsity))
        except TooLittle:
            if last and not state.total:
                raise
        except Stuck as error:
            if not state.total:
                raise
            state.warnings.append(f"a later round stopped: {error}")
        if last:
            state.warnings += missed_target(state.kept / state.total, amount, state.tolerance)

    def _missing_sparsity(self, target: float, plan: Plan) -> float:
        """The fraction to remove from the model as it is, for a target that is a fraction of the received model."""
        state = self.state
        if not state.total:
            return target
        size = _size(plan, plan.coupling(), self.step.amount.of)
        stuck = max(state.kept - size, 0.0)  # channels of units that can shrink no further
        return 0.0 if not size else min(1 - ((1 - target) * state.total - stuck) / size, 1 - 1e-9)

    def _remove(self, plan: Plan, amount: Amount) -> None:
        state = self.state
        removal = shrink(plan, amount, self._scores(plan))
        size = _size(plan, removal.coupling, amount.of)
        stuck = max(state.kept - size, 0.0) if state.total else 0.0
        state.total = state.total or size
        state.tolerance = state.tolerance or tolerance(plan, removal.coupling, self.step.amount)
        state.kept = stuck + removal.left * size
        self._accept(plan, removal, amount)

    def _cut_to_latency(self, target: float) -> None:
        """Shrink to at most 1 - target of the time that the received model takes."""
        state = self.state
        if state.total and state.kept <= 1 - target:  # an earlier round removed enough
            return
        plan = self._plan(state.model)
        table = self._table(plan if state.model is self.received else self._plan(self.received))
        amount = replace(self.step.amount, sparsity=target)

        def report_attempt(number: int) -> None:
            self.ctx.progress(Event(step=self.ctx.name, phase=f"widths, attempt {number}"))

        scores = self._scores(plan)
        try:
            reached = reach(plan, amount, scores, table, progress=report_attempt)
        except (Stuck, TooLittle) as error:
            if not state.total:
                raise
            state.warnings.append(f"a later round stopped: {error}")
            return
        state.total, state.kept, state.rows = 1.0, reached.left, table.rows
        state.evidence = {"latency": [*state.evidence.get("latency", ()), dict(reached.evidence)]}
        self._accept(plan, reached.done, amount)
        state.warnings += reached.warnings

    def _table(self, plan: Plan) -> Table:
        """Table of the times that decide the widths, measured on another machine or here."""
        assert self.ctx.workbench is not None
        workbench, amount = Told(bench=self.ctx.workbench), self.step.amount
        if self.step.latency_table is not None:
            rows, machine = load_rows(self.step.latency_table, workbench.about(plan.model))
            return Table(plan=plan, amount=amount, rows=rows, elsewhere=machine)
        event = partial(Event, step=self.ctx.name, phase="table of latencies")

        def report_timed(done: int, total: int) -> None:
            self.ctx.progress(event(current=done, total=total))

        return Table(plan=plan, amount=amount, workbench=workbench, progress=report_timed, rows=self.state.rows)

    def _accept(self, plan: Plan, removal: Shrunk, amount: Amount) -> None:
        """Make the model of a verified removal the current one, with its masks, refusals and warnings."""
        state = self.state
        finish(plan, removal, amount, find_criterion(self.step.options.criterion).name)
        state.masks = cut_masks(state.masks, removal.surgery, plan.model)
        state.model = removal.model
        state.refused = refusals(removal.coupling)
        state.warnings += [
            f"not pruned: {layer}: {reason}" for layer, reason in state.refused if Reason.NOT_VERIFIED.given_in(reason)
        ]
        state.warnings += [
            f"no rule for {name} ({count} times): channels that reach it are kept"
            for name, count in plan.trace.unruled.items()
        ]
        state.warnings += [*plan.notes(), *vacuous(removal), *gave_way(removal, amount)]
        state.warnings += _recalibrate(state.model, self.ctx)


def _size(plan: Plan, coupling: Coupling, of: Of) -> float:
    """The size of a model before a removal, in the measure of the amount."""
    if of == "channels":
        return float(sum(unit.width for unit in coupling.units))
    nothing = np.zeros(coupling.atoms.count, dtype=bool)
    return float(coupling.macs(nothing) if of == "macs" else coupling.parameters(nothing, plan.names))


def _recalibrate(model: nn.Module, ctx: Context) -> list[str]:
    """Recalibrate the batch norms, whose inputs changed; returns a warning if no batch is large enough."""
    if not tracked(model):
        return []
    batches = calibration_of(ctx).batches
    large = [batch for batch in batches if batch_size(ctx.task.inputs(batch)) >= CALIBRATION_SAMPLES]
    if not large:
        return [
            f"batch norms are not recalibrated: no batch of {ctx.task.calibration_split} has {CALIBRATION_SAMPLES} "
            "samples"
        ]
    recalibrate_batch_norm(model, ctx.task.forward, large)
    return []
