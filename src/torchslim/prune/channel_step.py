"""The pruning step for whole channels: rounds of sparse training, cutting, recalibration and training, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from torchslim.core.batches import batch_size
from torchslim.core.layer_patterns import check_patterns
from torchslim.core.step import Context, Event, LayerRecord, Outcome
from torchslim.errors import PruneError
from torchslim.prune.channel_cut import CutPart, parts_to_cut
from torchslim.prune.channel_records import pruned_records, refused_records, shapes_of_parameters
from torchslim.prune.channel_state import PartState, PruningState, restored_state
from torchslim.prune.criteria.gathering import check_data
from torchslim.prune.criteria.registry import find_criterion, named_by_path
from torchslim.prune.latency.table import load_rows
from torchslim.prune.masking.masks import apply_masks
from torchslim.prune.reconstruction.in_step import reconstruct_in_step, with_solved
from torchslim.prune.schedule import Schedule
from torchslim.prune.structured.options import ChannelOptions
from torchslim.prune.structured.penalties import Sparsify, make_penalty
from torchslim.prune.structured.removal import Stuck
from torchslim.prune.structured.selection import Amount
from torchslim.prune.structured.surgery import Cut
from torchslim.prune.structured.widths import weight_pattern
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
    reconstruct: bool = False

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

    def targets(self) -> list[float]:
        """The sparsity after each round; for widths the share of the way to them."""
        if self.amount.widths is None:
            return self.schedule.targets(self.amount.sparsity)
        rounds = len(self.schedule.targets(0.0))
        return [(number + 1) / rounds for number in range(rounds)]

    def check(self, ctx: Context) -> None:
        """Raise if no layer matches, or if the criterion, a training or the measurement lacks its data."""
        check_data(find_criterion(self.options.criterion), ctx)
        model = ctx.model if ctx.model is not None else ctx.teacher
        check_patterns(model, self.options.include, self.options.exclude)
        check_patterns(model, [weight_pattern(name) for name in self.amount.widths or ()], None)
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

    def timed_programs(self, model: nn.Module, ctx: Context) -> dict[str, int]:
        """Number of programs that are timed for a table of latencies and to check the widths, by part; may be empty."""
        if self.amount.of != "latency" or self.latency_table is not None:
            return {}
        state = PruningState(model, dict(ctx.masks), {path: PartState() for path in ctx.paths})
        return {part.path: part.timed_programs() for part in self.parts(ctx, state, model)}

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        apply_masks(model, ctx.masks)
        return Rounds(self, model, ctx).run()

    def parts(self, ctx: Context, state: PruningState, received: nn.Module) -> list[CutPart]:
        """The parts of the state's model that have layers to prune."""
        return [
            CutPart(self.latency_table, ctx, state, path, options, received)
            for path, options in parts_to_cut(state.model, self.options, ctx.paths)
        ]

    def hooks(self, ctx: Context, state: PruningState, received: nn.Module) -> list[Hook]:
        """Hooks that add the penalty to a training before a cut."""
        penalty = self.penalty
        if penalty is None:
            return []
        return [
            make_penalty(penalty.kind, part.plan(state.model).coupling(), penalty.strength, part.path)
            for part in self.parts(ctx, state, received)
        ]


class Part(Protocol):
    """A part of a model, or the whole model, that shrinks in every round."""

    @property
    def path(self) -> str:
        """Path of the part; empty for the whole model."""
        ...

    @property
    def cuts(self) -> Sequence[Cut]:
        """The slices that the last cut removed, by the names of the whole model."""
        ...

    def cut(self, target: float, *, last: bool) -> None:
        """Shrink the part by a fraction of its size when the step received it."""
        ...


class Shrinks(Protocol):
    """A step that shrinks a model in rounds."""

    @property
    def schedule(self) -> Schedule:
        """How the removal is spread."""
        ...

    @property
    def penalty(self) -> SparsePenalty | None:
        """The penalty in every training before a cut."""
        ...

    @property
    def reconstruct(self) -> bool:
        """Whether the remaining weights are solved for after every cut."""
        ...

    def targets(self) -> list[float]:
        """The sparsity after each round."""
        ...

    def parts(self, ctx: Context, state: PruningState, received: nn.Module) -> Sequence[Part]:
        """The parts of the state's model that shrink."""
        ...

    def hooks(self, ctx: Context, state: PruningState, received: nn.Module) -> list[Hook]:
        """Hooks of a training before a cut."""
        ...


class Rounds:
    """One run of the step. Every target is a fraction of the model, or of the part, that the step received."""

    def __init__(self, step: Shrinks, model: nn.Module, ctx: Context) -> None:
        self.step, self.ctx = step, ctx
        self.received, self.received_shapes = model, shapes_of_parameters(model)
        fresh = PruningState(model, dict(ctx.masks), {path: PartState() for path in ctx.paths})
        self.state = restored_state(model, ctx) or fresh

    def run(self) -> Outcome:
        """Train with the penalty, then cut and train in every round."""
        step, state = self.step, self.state
        targets = step.targets()
        trained: Sequence[LayerRecord] = ()
        if not state.cuts:
            self._train_sparsely()
        for number in range(max(state.cuts, 1), len(targets) + 1):
            last = number == len(targets)
            if number > state.cuts:
                self.ctx.progress(Event(step=self.ctx.name, phase=f"cut-{number}"))
                before = state.model
                parts = step.parts(self.ctx, state, self.received)
                self._cut(parts, targets[number - 1], last=last)
                if state.model is not before:
                    if step.reconstruct:  # layers are fitted to the batch norms' present statistics
                        cuts = [cut for part in parts for cut in part.cuts]
                        state.note_solved(
                            reconstruct_in_step(before, state.model, self.ctx, cuts=cuts, masks=state.masks)
                        )
                    else:
                        state.warnings += _recalibrate(state.model, self.ctx)
                state.cuts = number
                state.save(self.ctx)
            if step.schedule.train is not None:
                trained = self._train(step.schedule.train, number, last=last).layers
        pruned = pruned_records(self.received_shapes, state.model)
        records = [
            *with_solved(pruned, state.solved(), by_module=True),
            *refused_records(state.refused),
            *trained,
        ]
        return Outcome(
            model=state.model,
            masks=state.masks,
            layers=records,
            warnings=list(dict.fromkeys(state.warnings)),
            history=state.history,
            evidence=state.evidence,
        )

    def _cut(self, parts: Sequence[Part], target: float, *, last: bool) -> None:
        """Cut every part; one of several that cannot shrink stays, with a warning, as long as another part shrinks."""
        stuck = 0
        for part in parts:
            try:
                part.cut(target, last=last)
            except Stuck as error:
                stuck += 1
                if stuck == len(parts):
                    raise
                self.state.warnings.append(f"part {part.path!r} is not pruned: {error}")

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
        return self.step.hooks(self.ctx, self.state, self.received)


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
