"""The pruning step for single weights: masks once, in rounds of pruning and training, or along a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from torchslim.core.isolation import duplicate
from torchslim.core.layer_patterns import as_list, by_pattern, select_weights
from torchslim.core.parts import inside, outside
from torchslim.core.step import Context, LayerRecord, Outcome
from torchslim.errors import PruneError
from torchslim.prune.criteria.gathering import check_data, gather_for
from torchslim.prune.criteria.registry import Criterion, Scorer, find_criterion, named_by_path
from torchslim.prune.criteria.scoring import check_ranks_weights
from torchslim.prune.criteria.statistics import Gathered
from torchslim.prune.masking.masks import NO_DATA, MaskOptions, Masks, apply_masks, notes, plan, pruned_record
from torchslim.prune.masking.patterns import Order, Pattern, Slice, find_pattern
from torchslim.prune.masking.selection import check_sparsity
from torchslim.prune.reconstruction.in_step import reconstruct_in_step, with_solved
from torchslim.prune.schedule import Schedule, cubic
from torchslim.training.calibration import calibration_of
from torchslim.training.loop import Hook, Loop

UPDATES = 100  # of the masks in a gradual schedule; more of them cost time and change nothing measurable

WeightSparsity = float | Mapping[str, float] | None
"""One fraction, a fraction per pattern of layers, or None where a threshold or the pattern decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneWeights:
    """Sets weights to zero: `Prune` for all patterns except "channel", with defaults filled in."""

    sparsity: WeightSparsity = None
    threshold: float | None = None
    criterion: str | Criterion | Scorer = "l1"
    pattern: str = "unstructured"
    n: Order = 2.0
    dim: int = 0
    scope: Literal["global", "layer"] | None = None
    include: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None
    schedule: Schedule = field(default_factory=Schedule)
    reconstruct: bool = False

    def __post_init__(self) -> None:
        if not named_by_path(self.criterion):
            self._checked_criterion()
        if self.reconstruct and self.schedule.kind == "gradual":
            raise PruneError(
                "reconstruct is not for schedule 'gradual', whose masks change while the weights train; use 'one-shot' "
                "or 'iterative'"
            )
        self._check_amount()
        self._check_fixed_sparsity()

    @property
    def mask_pattern(self) -> Pattern:
        """The pattern that `pattern`, `n` and `dim` describe."""
        return find_pattern(self.pattern, n=self.n, dim=self.dim)

    def _check_amount(self) -> None:
        if self.sparsity is not None and self.threshold is not None:
            raise PruneError(f"give a sparsity or a threshold, not both: {self.sparsity}, {self.threshold}")
        if self.sparsity is None and self.threshold is None and self.mask_pattern.fixed_sparsity is None:
            raise PruneError("nothing to do: give sparsity=... (the fraction removed) or threshold=...")
        if isinstance(self.sparsity, Mapping):
            self._check_sparsity_per_layer(self.sparsity)
        elif self.sparsity is not None:
            check_sparsity(self.sparsity)
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise PruneError(f"threshold must be a finite number of at least 0, got {self.threshold}")

    def _check_sparsity_per_layer(self, sparsity: Mapping[str, float]) -> None:
        if not sparsity:
            raise PruneError("sparsity names no layer: {}; give at least one pattern, such as {'conv1': 0.5}")
        for layers, fraction in sparsity.items():
            check_sparsity(fraction, f"sparsity of {layers!r}")
        if self.scope == "global":
            raise PruneError("a sparsity for each layer cannot be ranked globally; leave out scope='global'")

    def _check_fixed_sparsity(self) -> None:
        """Raise if the pattern fixes another sparsity than the given one, or if a schedule lacks its one number."""
        fixed = self.mask_pattern.fixed_sparsity
        one_number = isinstance(self.sparsity, (int, float))
        if fixed is not None:
            agrees = self.sparsity is None or (
                isinstance(self.sparsity, (int, float)) and math.isclose(self.sparsity, fixed)
            )
            if self.threshold is not None or not agrees:
                raise PruneError(
                    f"pattern {self.pattern!r} fixes the sparsity at {fixed:g}; leave sparsity and threshold out"
                )
        if self.schedule.kind != "one-shot" and (fixed is not None or not one_number):
            raise PruneError(f"schedule {self.schedule.kind!r} needs one number as sparsity, got {self.sparsity!r}")

    def _checked_criterion(self) -> Criterion:
        criterion = find_criterion(self.criterion)
        if not isinstance(self.mask_pattern, Slice):
            check_ranks_weights(criterion)
        return criterion

    def check(self, ctx: Context) -> None:
        """Raise if no layer matches, the criterion does not exist, or it or the training lacks its data."""
        check_data(self._checked_criterion(), ctx)
        model = ctx.model if ctx.model is not None else ctx.teacher
        weights = select_weights(model, self.include, self._for_parts(model, ctx).exclude)
        if isinstance(self.sparsity, Mapping):
            by_pattern(self.sparsity, weights, model)
        if self.schedule.train is not None:
            self.schedule.train.check_training(ctx)

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        step = self._for_parts(model, ctx)
        return step._along_training(model, ctx) if self.schedule.kind == "gradual" else step._in_rounds(model, ctx)

    def _for_parts(self, model: nn.Module, ctx: Context) -> PruneWeights:
        """The step without the weights outside of the context's parts.

        Raises:
            PruneError: `include` names no layer of a part.
        """
        if not ctx.parts:
            return self
        names = select_weights(model, self.include, self.exclude)
        if self.include is not None and all(inside(path, name) is None for path in ctx.paths for name in names):
            raise PruneError(
                f"include={self.include!r} names no layer of the parts {', '.join(map(repr, ctx.paths))}; name layers "
                "in them"
            )
        return replace(self, exclude=(*as_list(self.exclude), *outside(model, ctx.paths)))

    def masks(
        self,
        model: nn.Module,
        previous: Mapping[str, Tensor],
        sparsity: WeightSparsity,
        seed: int,
        gathered: Gathered = NO_DATA,
    ) -> tuple[Masks, list[LayerRecord]]:
        """Masks (True where kept) at `sparsity`, and a record per layer; `model` is only read."""
        options = MaskOptions(
            sparsity=sparsity,
            threshold=self.threshold,
            criterion=find_criterion(self.criterion),
            pattern=self.mask_pattern,
            scope=self.scope or ("layer" if isinstance(sparsity, Mapping) else "global"),
            include=self.include,
            exclude=self.exclude,
        )
        return plan(model, options, previous=previous, seed=seed, gathered=gathered)

    def _in_rounds(self, model: nn.Module, ctx: Context) -> Outcome:
        targets: Sequence[WeightSparsity] = [self.sparsity]
        if isinstance(self.sparsity, (int, float)):
            targets = self.schedule.targets(self.sparsity)
        criterion, train = find_criterion(self.criterion), self.schedule.train
        masks: Mapping[str, Tensor] = ctx.masks
        history: list[Mapping[str, float]] = []
        pruned: list[LayerRecord] = []
        trained: Sequence[LayerRecord] = ()
        for index, target in enumerate(targets):
            masks, pruned = self.masks(model, masks, target, ctx.seed, gather_for(criterion, model, ctx))
            before = duplicate(model) if self.reconstruct else model
            apply_masks(model, masks)
            if self.reconstruct:
                pruned = with_solved(pruned, reconstruct_in_step(before, model, ctx, masks=masks), by_module=False)
            if train is not None:
                report = train.fit(model, ctx, masks=masks, phase=f"prune-{index + 1}", part=index)
                history += [{"round": index + 1.0, **row} for row in report.history]
                trained = report.layers
        return Outcome(model=model, masks=masks, layers=[*pruned, *trained], warnings=notes(pruned), history=history)

    def _along_training(self, model: nn.Module, ctx: Context) -> Outcome:
        assert self.schedule.train is not None
        hook = _GradualMasks(self, ctx)
        report = self.schedule.train.fit(model, ctx, hooks=[hook], phase="prune")
        apply_masks(model, report.masks)
        # records of the masks that the training kept; which layers the pattern refuses does not depend on the sparsity
        gathered = gather_for(hook.criterion, model, ctx, hook.batches)
        _, planned = self.masks(model, report.masks, self.sparsity, ctx.seed, gathered)
        pruned = [
            pruned_record(record.layer, report.masks[record.layer]) if record.action == "pruned" else record
            for record in planned
        ]
        layers = [*pruned, *report.layers]
        return Outcome(model=model, masks=report.masks, layers=layers, warnings=notes(pruned), history=report.history)


class _GradualMasks(Hook):
    """Raises the sparsity along the cubic schedule while the model trains."""

    def __init__(self, step: PruneWeights, ctx: Context) -> None:
        assert isinstance(step.sparsity, (int, float))
        self.step, self.ctx = step, ctx
        self.sparsity, self.until = step.sparsity, step.schedule.until
        self.criterion = find_criterion(step.criterion)
        self.batches = calibration_of(ctx).batches if self.criterion.needs else []
        self.updates = 0
        self.gathered, self.gathered_epoch = NO_DATA, -1

    def on_start(self, loop: Loop) -> None:
        """Count the updates that a resumed run has made already."""
        self.updates = int(min(loop.progress / self.until, 1.0) * UPDATES)

    def on_step(self, loop: Loop) -> None:
        """Update the masks when another hundredth of the schedule is over."""
        progress = min(loop.progress / self.until, 1.0)
        if int(progress * UPDATES) > self.updates:
            self.updates = int(progress * UPDATES)
            target = self.sparsity if progress >= 1 else self.sparsity * cubic(progress)
            with loop.whole():
                masks, _ = self.step.masks(loop.model, loop.masks, target, self.ctx.seed, self.statistics(loop))
            loop.masks.update(masks)

    def statistics(self, loop: Loop) -> Gathered:
        """Statistics from the epoch's first update: often enough, and the same if a run resumes between two epochs."""
        epoch = loop.epoch if loop.step_in_epoch else loop.epoch - 1  # at an epoch's end, that epoch
        if epoch != self.gathered_epoch:
            self.gathered = gather_for(self.criterion, loop.model, self.ctx, self.batches)
            self.gathered_epoch = epoch
        return self.gathered

    def on_epoch(self, loop: Loop) -> None:
        """Update at an epoch's end too: without a loader's length, the progress is known only there."""
        self.on_step(loop)

    def settled(self, loop: Loop) -> bool:
        """Whether the schedule is over: only an epoch at the full sparsity may be kept as the best."""
        return loop.progress >= self.until
