"""A round of channel pruning in one part of a model, or in the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import nn

from torchslim.core.layer_patterns import as_list
from torchslim.core.parts import WHOLE, inside, part_at, patterns_inside, shared_with_the_rest, under
from torchslim.core.reason import Reason
from torchslim.core.step import Context, Event
from torchslim.core.tensor_objects import by_structure
from torchslim.errors import PruneError
from torchslim.prune.channel_records import refusals
from torchslim.prune.channel_state import PartState, PruningState, cut_masks
from torchslim.prune.criteria.gathering import gather_for
from torchslim.prune.criteria.registry import find_criterion
from torchslim.prune.dependency.coupling import Coupling
from torchslim.prune.latency.solve import ROUNDS, Told, reach
from torchslim.prune.latency.table import Table, load_rows, programs
from torchslim.prune.structured.options import ChannelOptions
from torchslim.prune.structured.plan import Plan
from torchslim.prune.structured.removal import (
    Shrunk,
    Stuck,
    TooLittle,
    chooser,
    finish_part,
    gave_way,
    missed_target,
    shrink,
    tolerance,
    vacuous,
)
from torchslim.prune.structured.selection import Amount, Of, Scores
from torchslim.prune.structured.surgery import Cut
from torchslim.prune.structured.widths import widths_inside


def parts_to_cut(model: nn.Module, options: ChannelOptions, paths: Sequence[str]) -> list[tuple[str, ChannelOptions]]:
    """The parts with layers to prune, and the options with patterns over the names inside of each.

    Weights that a part shares with the rest of the model stay.

    Raises:
        PruneError: `include` or the widths name no layer of a part.
    """
    chosen = []
    for path in paths:
        if path == WHOLE:
            chosen.append((path, options))
            continue
        included, excluded = (
            [name for names in patterns_inside(model, path, as_list(patterns)).values() for name in names]
            for patterns in (options.include, options.exclude)
        )
        widths = None if options.amount.widths is None else widths_inside(model, path, options.amount.widths)
        if (options.include is not None and not included) or widths == {}:
            continue
        excluded += shared_with_the_rest(model, path)
        include = None if options.include is None else included
        amount = replace(options.amount, widths=widths)
        chosen.append((path, replace(options, amount=amount, include=include, exclude=excluded or None)))
    if not chosen:
        given = f"include={options.include!r}" if options.amount.widths is None else f"widths={options.amount.widths}"
        raise PruneError(f"{given} names no layer of the parts {', '.join(map(repr, paths))}; name layers in them")
    return chosen


class CutPart:
    """One part of the model of a pruning state; a cut replaces the state's model.

    Args:
        latency_table: file of latencies from another machine.
        ctx: the context of the whole model.
        state: its model is cut.
        path: of the part; empty for the whole model.
        options: how much to remove in all rounds, and patterns over the names inside of the part.
        received: the model that the step received.
    """

    def __init__(
        self,
        latency_table: str | None,
        ctx: Context,
        state: PruningState,
        path: str,
        options: ChannelOptions,
        received: nn.Module,
    ) -> None:
        self.amount, self.latency_table = options.amount, latency_table
        self.whole_ctx, self.state, self.path = ctx, state, path
        self.options, self.received = options, received
        self.cuts: tuple[Cut, ...] = ()  # of this round, by the names of the whole model

    @cached_property
    def ctx(self) -> Context:
        """The context as the part sees it."""
        return self.whole_ctx.within(self.path)

    @property
    def own(self) -> PartState:
        """The figures of the part."""
        return self.state.parts[self.path]

    def plan(self, model: nn.Module) -> Plan:
        """The analysis of the part of a model."""
        examples: Sequence[Any] = self.ctx.task.examples
        if self.path != WHOLE:  # calls of other structures may run other branches
            examples = [group[0] for group in by_structure(self.whole_ctx.parts[self.path])[1:]]
        inputs = self.whole_ctx.parts[self.path][0] if self.path else self.ctx.example_inputs
        return self.options.plan(part_at(model, self.path), inputs, examples)

    def timed_programs(self) -> int:
        """Number of programs that a table of latencies times for the part, and those of the rounds that check it."""
        _, rows = programs(self.plan(self.state.model), self.amount)
        return sum(len(row.widths) for row in rows) + ROUNDS

    def cut(self, target: float, *, last: bool) -> None:
        """Remove channels up to a target sparsity of the part as it was received, or a share of the way to widths."""
        if self.amount.widths is not None:
            self._cut_to_widths(target, last=last)
        elif self.amount.of == "latency":
            self._cut_to_latency(target)
        else:
            self._cut_to_size(target, last=last)

    def _scores(self, plan: Plan) -> Scores:
        gathered = gather_for(find_criterion(self.options.criterion), self.state.model, self.whole_ctx)
        priors = {
            name: value
            for whole_name, value in self.ctx.priors.items()
            if (name := inside(self.path, whole_name)) is not None
        }
        ranking = self.options.ranking(gathered.inside(self.path), self.ctx.seed, priors)
        return ranking.scores(plan.model, plan)

    def _cut_to_size(self, target: float, *, last: bool) -> None:
        """Remove what is still missing to a sparsity of parameters, MACs or channels."""
        own, amount = self.own, self.amount
        plan = self.plan(self.state.model)
        sparsity = self._missing_sparsity(target, plan)
        try:
            if sparsity > 0:  # widths are whole steps: an earlier round may have removed enough
                self._remove(plan, replace(amount, sparsity=sparsity))
        except TooLittle:
            if last and not own.total:
                raise
        except Stuck as error:
            if not own.total:
                raise
            self.state.warnings.append(f"a later round stopped: {error}")
        if last:
            self.state.warnings += missed_target(own.kept / own.total, amount, own.tolerance)

    def _cut_to_widths(self, target: float, *, last: bool) -> None:
        """Remove what is still missing to a share of the way from the received widths to the named ones."""
        own = self.own
        passed = 1 - own.kept if own.total else 0.0
        plan = self.plan(self.state.model)
        try:
            choose = chooser(plan, self.amount, (target - passed) / (1 - passed))
            self._accept(plan, shrink(plan, self.amount, self._scores(plan), choose), self.amount)
        except TooLittle:
            if last and not own.total:
                raise
            return
        own.total, own.kept = 1.0, 1 - target

    def _missing_sparsity(self, target: float, plan: Plan) -> float:
        """The fraction to remove from the part as it is, for a target that is a fraction of the received one."""
        own = self.own
        if not own.total:
            return target
        size = _size(plan, plan.coupling(), self.amount.of)
        stuck = max(own.kept - size, 0.0)  # channels of units that can shrink no further
        return 0.0 if not size else min(1 - ((1 - target) * own.total - stuck) / size, 1 - 1e-9)

    def _remove(self, plan: Plan, amount: Amount) -> None:
        own = self.own
        removal = shrink(plan, amount, self._scores(plan))
        size = _size(plan, removal.coupling, amount.of)
        stuck = max(own.kept - size, 0.0) if own.total else 0.0
        own.total = own.total or size
        own.tolerance = own.tolerance or tolerance(plan, removal.coupling, self.amount)
        own.kept = stuck + removal.left * size
        self._accept(plan, removal, amount)

    def _cut_to_latency(self, target: float) -> None:
        """Shrink to at most 1 - target of the time that the received part takes."""
        own, state = self.own, self.state
        if own.total and own.kept <= 1 - target:  # an earlier round removed enough
            return
        plan = self.plan(state.model)
        table = self._table(plan if state.model is self.received else self.plan(self.received))
        amount = replace(self.amount, sparsity=target)

        def report_attempt(number: int) -> None:
            self.ctx.progress(Event(step=self.ctx.name, phase=f"widths, attempt {number}"))

        scores = self._scores(plan)
        try:
            reached = reach(plan, amount, scores, table, progress=report_attempt)
        except (Stuck, TooLittle) as error:
            if not own.total:
                raise
            state.warnings.append(f"a later round stopped: {error}")
            return
        own.total, own.kept, own.rows = 1.0, reached.left, table.rows
        state.evidence = {"latency": [*state.evidence.get("latency", ()), dict(reached.evidence)]}
        self._accept(plan, reached.done, amount)
        state.warnings += reached.warnings

    def _table(self, plan: Plan) -> Table:
        """Table of the times that decide the widths, measured on another machine or here."""
        assert self.ctx.workbench is not None
        workbench, amount = Told(bench=self.ctx.workbench), self.amount
        if self.latency_table is not None:
            rows, machine = load_rows(self.latency_table, workbench.about(plan.model))
            return Table(plan=plan, amount=amount, rows=rows, elsewhere=machine)
        event = partial(Event, step=self.ctx.name, phase="table of latencies")

        def report_timed(done: int, total: int) -> None:
            self.ctx.progress(event(current=done, total=total))

        return Table(plan=plan, amount=amount, workbench=workbench, progress=report_timed, rows=self.own.rows)

    def _accept(self, plan: Plan, removal: Shrunk, amount: Amount) -> None:
        """Make the model of a verified removal the current one, with its masks, refusals and warnings."""
        state, own = self.state, self.own
        before = state.model if self.path else plan.model
        surgery = removal.surgery.under(self.path)
        self.cuts = surgery.cuts
        state.masks = cut_masks(state.masks, surgery, before)
        state.model = finish_part(before, self.path, plan, removal, amount, find_criterion(self.options.criterion).name)
        own.refused = refusals(removal.coupling)
        state.warnings += [
            f"not pruned: {under(self.path, layer)}: {reason}"
            for layer, reason in own.refused
            if Reason.NOT_VERIFIED.given_in(reason)
        ]
        state.warnings += [
            f"no rule for {name} ({count} times): channels that reach it are kept"
            for name, count in plan.trace.unruled.items()
        ]
        state.warnings += [*plan.notes(), *vacuous(removal), *gave_way(removal, amount)]


def _size(plan: Plan, coupling: Coupling, of: Of) -> float:
    """The size of a model before a removal, in the measure of the amount."""
    if of == "channels":
        return float(sum(unit.width for unit in coupling.units))
    nothing = np.zeros(coupling.atoms.count, dtype=bool)
    return float(coupling.macs(nothing) if of == "macs" else coupling.parameters(nothing, plan.names))
