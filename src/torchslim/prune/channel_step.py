"""The pruning step for whole channels: rounds of sparse training, cutting, recalibration and training, resumable."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchslim.core import distributed
from torchslim.core.batches import batch_size
from torchslim.core.checks import check_fields
from torchslim.core.files import present
from torchslim.core.isolation import warn
from torchslim.core.layer_patterns import check_patterns, parameter_paths
from torchslim.core.reason import Reason
from torchslim.core.seals import read_sealed, write_sealed
from torchslim.core.step import Context, Event, Inputs, LayerRecord, Outcome
from torchslim.core.trees import device_of
from torchslim.errors import PruneError, StorageError
from torchslim.prune import schedule as schedules
from torchslim.prune.criteria.gathering import check_data, gather_for
from torchslim.prune.criteria.registry import Criterion, Scorer, find_criterion
from torchslim.prune.criteria.scoring import Normalisation, Reduction, check_combination
from torchslim.prune.dependency.coupling import Coupling
from torchslim.prune.dependency.resolve import Heads
from torchslim.prune.latency.solve import Told, reach
from torchslim.prune.latency.table import Rows, Table, load_rows
from torchslim.prune.masking.masks import apply_masks
from torchslim.prune.structured.penalties import Sparsify, make_penalty
from torchslim.prune.structured.plan import Plan, UnseenCode, analyse
from torchslim.prune.structured.ranking import Ranking
from torchslim.prune.structured.record import replay, surgery
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
from torchslim.prune.structured.selection import Amount, Scores
from torchslim.prune.structured.surgery import Surgery
from torchslim.training.batch_norm import recalibrate_batch_norm, tracked
from torchslim.training.calibration import calibration_of
from torchslim.training.finetune import Training
from torchslim.training.loop import FitReport, Hook

CALIBRATION_SAMPLES = 8
"""A batch of fewer says too little of a variance."""

"""How the one reason to stay begins that says nothing about a model."""


@dataclass
class Standing:
    """Where the rounds stand; what is stored after each cut."""

    model: nn.Module
    masks: dict[str, Tensor]
    cuts: int = 0  # rounds whose cut is behind
    total: float = 0.0  # the size of the model that the step received; 0 before the first cut
    kept: float = 0.0  # what is left of it, in the same measure
    tolerance: float = 0.0  # how far from the target is no miss
    refused: list[tuple[str, str]] = field(default_factory=list)  # layer and reason
    warnings: list[str] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    rows: Rows = field(default_factory=dict)  # of times, where those are the measure
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPruning:
    """What `Prune(pattern="channel")` does: its fields, every default filled in."""

    amount: Amount
    criterion: str | Criterion | Scorer
    heads: Heads = "auto"
    include: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None
    reduction: Reduction = "mean"
    normalisation: Normalisation = "mean"
    rounds: int = 1
    train: Training | None = None
    sparsify: Sparsify | None = None
    strength: float = 1e-4
    sparsify_train: Training | None = None
    latency_table: str | None = None
    unseen: UnseenCode = "keep"

    def __post_init__(self) -> None:
        check_fields(self, PruneError)
        if self.latency_table is not None and self.amount.of != "latency":
            raise PruneError(f"latency_table is for of='latency', got of={self.amount.of!r}; leave latency_table out")
        check_combination(self.reduction, self.normalisation)
        if self.sparsify is not None and self.before_the_cut is None:
            raise PruneError(
                f"sparsify={self.sparsify!r} needs a training to act in; give sparsify_train=Finetune(...), or train"
            )
        if not 0 < self.strength < float("inf"):
            raise PruneError(f"strength must be a finite number above 0, got {self.strength}")

    @property
    def before_the_cut(self) -> Training | None:
        """The training under the penalty."""
        return self.sparsify_train or self.train

    def check(self, ctx: Context) -> None:
        """The patterns match, and there is data for the criterion and the trainings."""
        check_data(find_criterion(self.criterion), ctx)
        check_patterns(ctx.model if ctx.model is not None else ctx.teacher, self.include, self.exclude)
        if self.amount.of == "latency":
            if ctx.workbench is None:
                raise PruneError(
                    "of='latency' needs something to measure with: run the step by ts.compress or `torchslim run`, or "
                    "give a Context with workbench=ts.Bench(...)"
                )
            if self.latency_table is not None:
                load_rows(self.latency_table, {"runtime": ctx.target.runtime, "threads": ctx.target.threads})
        for training in (self.train, self.before_the_cut if self.sparsify else None):
            if training is not None:
                training.check_training(ctx)

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        apply_masks(model, ctx.masks)
        before = {name: each.shape for name, each in model.named_parameters()}
        now = _restored(model, ctx) or Standing(model, dict(ctx.masks))
        targets = schedules.rounds(self.amount.sparsity, self.rounds)
        taught: Sequence[LayerRecord] = ()
        if self.sparsify is not None and not now.cuts:
            assert self.before_the_cut is not None
            report = self.before_the_cut.fit(
                now.model, ctx, masks=now.masks, hooks=self._penalty(now.model, ctx), phase="sparsify"
            )
            _note(now, report, 0)
        for number in range(max(now.cuts, 1), len(targets) + 1):
            if number > now.cuts:
                ctx.progress(Event(step=ctx.name, phase=f"cut-{number}"))
                if self.amount.of == "latency":
                    self._hasten(now, model, targets[number - 1], ctx)
                else:
                    self._cut(now, targets[number - 1], ctx, last=number == len(targets))
                now.cuts = number
                _store(now, ctx)
            if self.train is not None:
                # every training that a cut follows prepares it
                hooks = self._penalty(now.model, ctx) if self.sparsify and number < len(targets) else []
                report = self.train.fit(
                    now.model, ctx, masks=now.masks, hooks=hooks, phase=f"prune-{number}", part=number
                )
                _note(now, report, number)
                taught = report.layers
        return Outcome(
            model=now.model,
            masks=now.masks,
            layers=[*_pruned(before, now.model), *_refused(now.refused), *taught],
            warnings=list(dict.fromkeys(now.warnings)),
            history=now.history,
            evidence=now.evidence,
        )

    def analysed(self, model: nn.Module, inputs: Inputs, examples: Sequence[Any] = ()) -> Plan:
        """The groups of a model, as the fields choose them; `examples` are further calls of the model."""
        return analyse(
            model,
            inputs,
            heads=self.heads,
            include=self.include,
            exclude=self.exclude,
            examples=examples,
            unseen=self.unseen,
        )

    def _plan(self, model: nn.Module, ctx: Context) -> Plan:
        return self.analysed(model, ctx.example_inputs, ctx.task.examples)

    def _penalty(self, model: nn.Module, ctx: Context) -> list[Hook]:
        assert self.sparsify is not None
        return [make_penalty(self.sparsify, self._plan(model, ctx).coupling(), self.strength)]

    def _cut(self, now: Standing, target: float, ctx: Context, *, last: bool) -> None:
        """Shrink to a target that is a fraction of the model that the step received."""
        plan = self._plan(now.model, ctx)
        share = self._share(now, target, plan)
        try:
            if share > 0:  # widths are whole steps: an earlier round may have gone as far
                self._shrink(now, plan, share, ctx)
        except TooLittle:
            if last and not now.total:
                raise
        except Stuck as error:
            if not now.total:
                raise
            now.warnings.append(f"a later round stopped: {error}")
        if last:
            now.warnings += missed_target(now.kept / now.total, self.amount, now.tolerance)

    def _shrink(self, now: Standing, plan: Plan, share: float, ctx: Context) -> None:
        criterion, scores = self._scores(now, plan, ctx)
        amount = replace(self.amount, sparsity=share)
        done = shrink(plan, amount, scores)
        size = _size(plan, done.coupling, self.amount.of)
        stuck = max(now.kept - size, 0.0) if now.total else 0.0
        now.total = now.total or size
        now.tolerance = now.tolerance or tolerance(plan, done.coupling, self.amount)
        now.kept = stuck + done.left * size
        _take(now, plan, done, amount, criterion, ctx)

    def _hasten(self, now: Standing, received: nn.Module, target: float, ctx: Context) -> None:
        """Shrink to a target that is a fraction of the time that the model takes that the step received."""
        if now.total and now.kept <= 1 - target:  # an earlier round went as far
            return
        plan = self._plan(now.model, ctx)
        whole = plan if now.model is received else self._plan(received, ctx)
        table = self._table(now, whole, ctx)
        criterion, scores = self._scores(now, plan, ctx)
        amount = replace(self.amount, sparsity=target)
        try:
            found = reach(
                plan, amount, scores, table,
                progress=lambda number: ctx.progress(Event(step=ctx.name, phase=f"widths, attempt {number}")),
            )  # fmt: skip
        except (Stuck, TooLittle) as error:
            if not now.total:
                raise
            now.warnings.append(f"a later round stopped: {error}")
            return
        now.total, now.kept, now.rows = 1.0, found.left, table.rows
        now.evidence = {"latency": [*now.evidence.get("latency", ()), dict(found.evidence)]}
        _take(now, plan, found.done, amount, criterion, ctx)
        now.warnings += found.warnings

    def _table(self, now: Standing, plan: Plan, ctx: Context) -> Table:
        """The times that the widths are chosen by: taken elsewhere, or here."""
        assert ctx.workbench is not None
        if self.latency_table is not None:
            rows, machine = load_rows(self.latency_table, Told(bench=ctx.workbench).about(plan.model))
            return Table(plan=plan, amount=self.amount, rows=rows, elsewhere=machine)

        def timed(done: int, total: int) -> None:
            ctx.progress(Event(step=ctx.name, phase="table of latencies", current=done, total=total))

        return Table(
            plan=plan, amount=self.amount, workbench=Told(bench=ctx.workbench), progress=timed, rows=now.rows
        )  # fmt: skip

    def _scores(self, now: Standing, plan: Plan, ctx: Context) -> tuple[Criterion, Scores]:
        criterion = find_criterion(self.criterion)
        ranking = Ranking(
            criterion=criterion, reduction=self.reduction, normalisation=self.normalisation,
            gathered=gather_for(criterion, now.model, ctx), seed=ctx.seed, priors=ctx.priors,
        )  # fmt: skip
        return criterion, ranking.scores(plan.model, plan)

    def _share(self, now: Standing, target: float, plan: Plan) -> float:
        """The fraction to remove from the model as it is, for a target that is a fraction of what it was."""
        if not now.total:
            return target
        size = _size(plan, plan.coupling(), self.amount.of)
        stuck = max(now.kept - size, 0.0)  # channels of units that can shrink no further
        return 0.0 if not size else min(1 - ((1 - target) * now.total - stuck) / size, 1 - 1e-9)


def _take(now: Standing, plan: Plan, done: Shrunk, amount: Amount, criterion: Criterion, ctx: Context) -> None:
    """Go on with a verified removal."""
    finish(plan, done, amount, criterion.name)
    now.masks = cut_masks(now.masks, done.surgery, plan.model)
    now.model = done.model
    now.refused = _reasons(done.coupling)
    now.warnings += [f"not pruned: {layer}: {why}" for layer, why in now.refused if Reason.NOT_VERIFIED.given_in(why)]
    now.warnings += [
        f"no rule for {name} ({count} times): channels that reach it stay" for name, count in plan.trace.unruled.items()
    ]
    now.warnings += [*plan.notes(), *vacuous(done), *gave_way(done, amount), *_recalibrate(now.model, ctx)]


def _size(plan: Plan, coupling: Coupling, of: str) -> float:
    if of == "channels":
        return float(sum(unit.width for unit in coupling.units))
    nothing = np.zeros(coupling.atoms.count, dtype=bool)
    return float(coupling.macs(nothing) if of == "macs" else coupling.parameters(nothing, plan.names))


def cut_masks(masks: Mapping[str, Tensor], done: Surgery, model: nn.Module) -> dict[str, Tensor]:
    """The masks of weights that are pruned already, without what the surgery removes from `model`."""
    first = {path: known for known, paths in parameter_paths(model).items() for path in paths}
    left = dict(masks)
    for cut in done.cuts:
        for name, mask in left.items():
            if first.get(name) == cut.weight:
                left[name] = mask.index_select(cut.dim, torch.tensor(cut.kept, device=mask.device))
    return left


def _recalibrate(model: nn.Module, ctx: Context) -> list[str]:
    """Batch norms see other inputs than before the cut; returns why they were left alone."""
    if not tracked(model):
        return []
    batches = calibration_of(ctx).batches
    sizes = [batch_size(ctx.task.inputs(batch)) for batch in batches]
    large = [batch for batch, size in zip(batches, sizes, strict=True) if size >= CALIBRATION_SAMPLES]
    if not large:
        return [
            f"batch norms keep their statistics: no batch of {ctx.task.calibration_split} holds {CALIBRATION_SAMPLES} "
            "samples, from which they could be taken again"
        ]
    recalibrate_batch_norm(model, ctx.task.forward, large)
    return []


def _note(now: Standing, report: FitReport, number: int) -> None:
    now.history += [{"round": float(number), **row} for row in report.history]


def _reasons(coupling: Coupling) -> list[tuple[str, str]]:
    """Groups that stay, by their first member, and why; that a kernel keeps its extent surprises nobody."""
    found = [(group.members[0].weight, group.reason) for group in coupling.groups if group.reason]
    return [pair for pair in dict.fromkeys(found) if not Reason.KERNEL_EXTENT.given_in(pair[1])]


def _refused(reasons: list[tuple[str, str]]) -> list[LayerRecord]:
    return [LayerRecord(layer=layer, action="refused", reason=why) for layer, why in reasons]


def _pruned(before: Mapping[str, torch.Size], model: nn.Module) -> list[LayerRecord]:
    """A record for each module whose parameters have become smaller."""
    after = {name: each.shape for name, each in model.named_parameters()}
    modules: dict[str, list[str]] = {}
    for name in before:
        if before[name] != after[name]:
            modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
    records = []
    for path, names in modules.items():
        wide = [name for name in names if len(before[name]) > 1] or names[:1]
        changes = ", ".join(_change(name, before[name], after[name]) for name in wide)
        sizes = [sum(shapes[name].numel() for name in names) for shapes in (before, after)]
        records.append(LayerRecord(layer=path, action="pruned", reason=changes, sparsity=1 - sizes[1] / sizes[0]))
    return records


def _change(name: str, before: torch.Size, after: torch.Size) -> str:
    own = name.rpartition(".")[2]
    prefix = "" if own == "weight" else f"{own} "
    return f"{prefix}{' x '.join(map(str, before))} -> {' x '.join(map(str, after))}"


def _path(ctx: Context) -> Path | None:
    return None if ctx.state is None else ctx.state / "cut.ckpt"


def _store(now: Standing, ctx: Context) -> None:
    """Keep a cut: the surgery that leads to it, and the weights after it."""
    path = _path(ctx)
    if path is None or not distributed.is_first():
        return
    kept: dict[str, Any] = {key: value for key, value in vars(now).items() if key not in ("model", "masks")}
    saved = {
        "about": json.dumps({**kept, "surgery": surgery(now.model)}),
        "weights": now.model.state_dict(),
        "masks": now.masks,
    }
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    write_sealed(path, buffer.getvalue(), ctx.key)


def _restored(model: nn.Module, ctx: Context) -> Standing | None:
    """The last stored cut, made again on the model that the step received."""
    path = _path(ctx)
    if path is None or not present(path):
        return None
    try:
        kept = read_sealed(path, ctx.key)
    except StorageError as error:
        if distributed.is_first():
            warn(f"{error}; the rounds of pruning start over")
        return None
    try:
        saved = torch.load(io.BytesIO(kept), map_location=device_of(model), weights_only=True)
        about = json.loads(saved["about"])
        record = about.pop("surgery")
        shrunk = model if record is None else replay(model, record)
        shrunk.load_state_dict(saved["weights"])
        about["refused"] = [(layer, why) for layer, why in about["refused"]]
        about["rows"] = {key: {int(width): ratio for width, ratio in row.items()} for key, row in about["rows"].items()}
        return Standing(model=shrunk, masks=saved["masks"], **about)
    except Exception as error:
        raise PruneError(
            f"the stored round {path} cannot be resumed from ({error}); delete it to start over"
        ) from error
