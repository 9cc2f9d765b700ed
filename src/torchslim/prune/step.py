"""The pruning step, and the same as a plain function."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from torchslim.core.batches import Batch
from torchslim.core.checks import check_fields
from torchslim.core.fingerprint import canonical
from torchslim.core.layer_patterns import by_pattern, select_weights
from torchslim.core.step import Context, Form, LayerRecord, Outcome, Step
from torchslim.errors import PruneError
from torchslim.prune import schedule as schedules
from torchslim.prune.channel_step import ChannelPruning
from torchslim.prune.criteria.gathering import check_data, gather_for
from torchslim.prune.criteria.registry import Criterion, Scorer, find_criterion
from torchslim.prune.criteria.scoring import Normalisation, Reduction, check_ranks_weights
from torchslim.prune.criteria.statistics import Gathered
from torchslim.prune.dependency.resolve import Heads
from torchslim.prune.masking.masks import NO_DATA, Masks, apply_masks, notes, plan, pruned_record
from torchslim.prune.masking.patterns import CHANNEL, Order, Slice, find_pattern
from torchslim.prune.masking.selection import check_sparsity
from torchslim.prune.structured.penalties import Sparsify
from torchslim.prune.structured.plan import UnseenCode
from torchslim.prune.structured.selection import Amount, Of
from torchslim.training.calibration import calibration_of
from torchslim.training.finetune import Training
from torchslim.training.loop import Hook, Loop

SCHEDULES = ("one-shot", "iterative", "gradual")
AMOUNT = ("of", "scope", "round_to", "min_channels")
COMMON = ("include", "exclude", "train")
CHANNELS = ("heads", "reduction", "normalisation", "sparsify", "strength", "sparsify_train", "latency_table", "unseen")
UPDATES = 100  # how often a gradual schedule moves; more often costs time and changes nothing that can be measured


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Set the least important weights to zero, or with the pattern "channel" remove whole channels.

    Args:
        sparsity: fraction of the chosen weights to remove; or one per layer, {"conv1": 0.3, "layer4.*": 0.8}, where
            later patterns overrule earlier ones and layers that none covers are left alone. For channels one number:
            the fraction of the model that the step receives.
        threshold: instead of a sparsity, remove whatever scores below it.
        criterion: a name of `CRITERIA`, a `Criterion`, a function (weight, statistics) -> scores, or
            "package.module:name"; by default "l1" for weights and "lamp" for channels. One that needs data gets the
            task's `calibration`, by default the first 512 samples of train; those that rank channels only go with the
            patterns "slice" and "channel".
        pattern: "unstructured"; "slice", whole slices along `dim` by their L_`n` norm; "N:M", such as "2:4"; or
            "channel": channels, neurons and heads, with all that is coupled to them, are physically gone.
        scope: rank all chosen layers together ("global") or each by itself ("layer"). Sparsities given per layer
            are always per layer.
        include: globs over layer or parameter paths, or "type:Linear".
        exclude: the same, of what stays whole.
        schedule: "one-shot"; "iterative" (`rounds` of pruning and training); "gradual" (cubic, done when `until` of
            the training is over; weights only). The last two need `train`; after one-shot pruning it is optional.
        train: Finetune(...) or Distill(...).
        of: of channels, as for `ts.prune.channels`; "latency" is measured on the run's target, in the numbers that the
            recipe ends with.
        round_to: of channels, as for `ts.prune.channels`.
        min_channels: of channels, as for `ts.prune.channels`.
        heads: of channels, as for `ts.prune.channels`.
        reduction: of channels, as for `ts.prune.channels`.
        normalisation: of channels, as for `ts.prune.channels`.
        sparsify: of channels: "group-lasso" or "bn-l1" is added, times `strength` (1e-4), to the loss of a training
            before the cut, `sparsify_train` or else `train`, and of the trainings between rounds.
        unseen: of channels, as for `ts.prune.channels`; further calls of the model are the task's `examples`.
        latency_table: with of="latency", the `latency.json` of a machine that the times were taken on, in place of
            measuring here.
    """

    accepts: ClassVar[Form] = Form.MODULE
    produces: ClassVar[Form] = Form.MODULE

    sparsity: float | Mapping[str, float] | None = None
    threshold: float | None = None
    criterion: str | Criterion | Scorer | None = None
    pattern: str = "unstructured"
    n: Order = 2.0
    dim: int = 0
    scope: Literal["global", "layer"] | None = None
    include: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None
    schedule: Literal["one-shot", "iterative", "gradual"] = "one-shot"
    rounds: int = 3
    until: float = 0.75
    train: Training | None = None
    of: Of | None = None
    round_to: int | None = None
    min_channels: int | None = None
    heads: Heads | None = None
    reduction: Reduction | None = None
    normalisation: Normalisation | None = None
    sparsify: Sparsify | None = None
    strength: float | None = None
    sparsify_train: Training | None = None
    latency_table: str | None = None
    unseen: UnseenCode | None = None

    def __post_init__(self) -> None:
        check_fields(self, PruneError)
        if not isinstance(self._criterion, str) or ":" not in self._criterion:
            self._check_criterion()
        if self.pattern == CHANNEL:
            self._check_channels()
            return
        for name in (*CHANNELS, *(each for each in AMOUNT if each != "scope")):
            if getattr(self, name) is not None:
                raise PruneError(f"{name} is for pattern 'channel', got pattern {self.pattern!r}; leave {name} out")
        fixed = find_pattern(self.pattern, n=self.n, dim=self.dim).fixed_sparsity
        self._check_amount(fixed)
        self._check_schedule(fixed)

    @property
    def _criterion(self) -> str | Criterion | Scorer:
        return self.criterion if self.criterion is not None else "lamp" if self.pattern == CHANNEL else "l1"

    def _check_channels(self) -> None:
        if self.threshold is not None or isinstance(self.sparsity, Mapping):
            got = f"sparsity={self.sparsity}" if self.threshold is None else f"threshold={self.threshold}"
            raise PruneError(
                f"pattern 'channel' takes one sparsity, as layers share their channels; got {got}; choose layers with "
                "include and exclude"
            )
        for name, default in (("n", 2.0), ("dim", 0)):
            if getattr(self, name) != default:
                raise PruneError(f"{name} is for pattern 'slice', got {getattr(self, name)!r}; leave {name} out")
        if self.sparsity is None:
            raise PruneError("nothing to do: give sparsity=... (the fraction removed)")
        if self.schedule == "gradual":
            raise PruneError(
                "schedule 'gradual' is not for pattern 'channel': shapes cannot change while an optimizer steps; use "
                "'iterative' with more rounds"
            )
        if self.sparsify is None and (self.strength is not None or self.sparsify_train is not None):
            raise PruneError("strength and sparsify_train belong to sparsify='group-lasso' or 'bn-l1'; give it too")
        self._check_schedule(None)
        self._channels()

    def _channels(self) -> ChannelPruning:
        """The channel side, its defaults filled in."""

        def given(*names: str) -> dict[str, Any]:
            return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

        assert isinstance(self.sparsity, (int, float))
        return ChannelPruning(
            amount=Amount(sparsity=self.sparsity, **given(*AMOUNT)),
            criterion=self._criterion,
            rounds=self.rounds if self.schedule == "iterative" else 1,
            **given(*COMMON, *CHANNELS),
        )

    def _check_amount(self, fixed: float | None) -> None:
        if self.sparsity is not None and self.threshold is not None:
            raise PruneError(f"give a sparsity or a threshold, not both: {self.sparsity}, {self.threshold}")
        if self.sparsity is None and self.threshold is None and fixed is None:
            raise PruneError("nothing to do: give sparsity=... (the fraction removed) or threshold=...")
        if isinstance(self.sparsity, Mapping):
            if not self.sparsity:
                raise PruneError("sparsity names no layer: {}; give at least one pattern, such as {'conv1': 0.5}")
            for pattern, each in self.sparsity.items():
                check_sparsity(each, f"sparsity of {pattern!r}")
            if self.scope == "global":
                raise PruneError("a sparsity for each layer cannot be ranked globally; leave out scope='global'")
        elif self.sparsity is not None:
            check_sparsity(self.sparsity)
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise PruneError(f"threshold must be a finite number of at least 0, got {self.threshold}")
        if fixed is not None and (self.threshold is not None or not self._agrees(fixed)):
            raise PruneError(
                f"pattern {self.pattern!r} fixes the sparsity at {fixed:g}; leave sparsity and threshold out"
            )

    def _check_schedule(self, fixed: float | None) -> None:
        if self.schedule != "one-shot":
            if self.train is None:
                raise PruneError(f"schedule {self.schedule!r} needs train=Finetune(...) or Distill(...)")
            if fixed is not None or not isinstance(self.sparsity, (int, float)):
                raise PruneError(f"schedule {self.schedule!r} needs one number as sparsity, got {self.sparsity!r}")
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise PruneError(f"rounds must be a whole number of at least 1, got {self.rounds}")
        if not 0 < self.until <= 1:
            raise PruneError(f"until must be in (0, 1], the fraction of the training, got {self.until}")

    def _agrees(self, fixed: float) -> bool:
        return self.sparsity is None or (isinstance(self.sparsity, (int, float)) and math.isclose(self.sparsity, fixed))

    def _check_criterion(self) -> Criterion:
        criterion = find_criterion(self._criterion)
        if self.pattern != CHANNEL and not isinstance(find_pattern(self.pattern, n=self.n, dim=self.dim), Slice):
            check_ranks_weights(criterion)
        return criterion

    def gather(self, model: nn.Module, ctx: Context, batches: Iterable[Batch] | None = None) -> Gathered:
        """What the criterion needs of the task's data, with the model as it is now."""
        return gather_for(find_criterion(self._criterion), model, ctx, batches)

    def check(self, ctx: Context) -> None:
        """The patterns match, the criterion exists, and there is data for it and for the training."""
        if self.pattern == CHANNEL:
            self._channels().check(ctx)
            return
        check_data(self._check_criterion(), ctx)
        model = ctx.model if ctx.model is not None else ctx.teacher
        chosen = select_weights(model, self.include, self.exclude)
        if isinstance(self.sparsity, Mapping):
            by_pattern(self.sparsity, chosen, model)
        if self.train is not None:
            self.train.check_training(ctx)

    def cache_inputs(self, steps: Sequence[Step]) -> list[Any]:
        """With of="latency" the whole recipe, in whose numbers the model is timed, and what the table says."""
        if self.of != "latency":
            return []
        table = None if self.latency_table is None else Path(self.latency_table)
        told = [table.read_bytes() if table.is_file() else b""] if table else []
        return [*map(canonical, steps), *told]

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        if self.pattern == CHANNEL:
            return self._channels()(model, ctx)
        if self.schedule == "gradual":
            return self._gradual(model, ctx)
        targets: list[Any] = [self.sparsity]
        if self.schedule == "iterative" and isinstance(self.sparsity, (int, float)):
            targets = schedules.rounds(self.sparsity, self.rounds)
        masks: Mapping[str, Tensor] = ctx.masks
        history: list[Mapping[str, float]] = []
        records: list[LayerRecord] = []
        taught: Sequence[LayerRecord] = ()
        for part, target in enumerate(targets):
            masks, records = self.masks(model, masks, target, ctx.seed, self.gather(model, ctx))
            apply_masks(model, masks)
            if self.train is not None:
                report = self.train.fit(model, ctx, masks=masks, phase=f"prune-{part + 1}", part=part)
                history += [{"round": part + 1.0, **row} for row in report.history]
                taught = report.layers
        layers = [*records, *taught]
        return Outcome(model=model, masks=masks, layers=layers, warnings=notes(records), history=history)

    def masks(
        self,
        model: nn.Module,
        previous: Mapping[str, Tensor],
        sparsity: float | Mapping[str, float] | None,
        seed: int,
        gathered: Gathered = NO_DATA,
    ) -> tuple[Masks, list[LayerRecord]]:
        """What this step would keep of `model` at a sparsity; the model is only read."""
        return plan(
            model,
            sparsity=sparsity,
            threshold=self.threshold,
            criterion=find_criterion(self._criterion),
            pattern=find_pattern(self.pattern, n=self.n, dim=self.dim),
            scope=self.scope or ("layer" if isinstance(sparsity, Mapping) else "global"),
            include=self.include,
            exclude=self.exclude,
            previous=previous,
            seed=seed,
            gathered=gathered,
        )

    def _gradual(self, model: nn.Module, ctx: Context) -> Outcome:
        assert self.train is not None
        hook = _Gradual(self, ctx)
        report = self.train.fit(model, ctx, hooks=[hook], phase="prune")
        apply_masks(model, report.masks)
        # the records of the masks that are kept; what the pattern refuses does not depend on the sparsity
        _, planned = self.masks(model, report.masks, self.sparsity, ctx.seed, self.gather(model, ctx, hook.batches))
        records = [
            pruned_record(each.layer, report.masks[each.layer]) if each.action == "pruned" else each for each in planned
        ]
        layers = [*records, *report.layers]
        return Outcome(model=model, masks=report.masks, layers=layers, warnings=notes(records), history=report.history)


class _Gradual(Hook):
    """Raises the sparsity along the cubic schedule while the model trains."""

    def __init__(self, step: Prune, ctx: Context) -> None:
        self.step, self.ctx = step, ctx
        self.updated = 0
        self.batches = calibration_of(ctx).batches if find_criterion(step._criterion).needs else []
        self.gathered, self.gathered_epoch = NO_DATA, -1

    def on_start(self, loop: Loop) -> None:
        """A resumed run has made its updates up to here."""
        self.updated = int(min(loop.progress / self.step.until, 1.0) * UPDATES)

    def on_step(self, loop: Loop) -> None:
        """Move on when another hundredth of the schedule is over."""
        done = min(loop.progress / self.step.until, 1.0)
        if int(done * UPDATES) > self.updated:
            self.updated = int(done * UPDATES)
            assert isinstance(self.step.sparsity, (int, float))
            target = self.step.sparsity if done >= 1 else self.step.sparsity * schedules.cubic(done)
            with loop.whole():
                masks, _ = self.step.masks(loop.model, loop.masks, target, self.ctx.seed, self.statistics(loop))
            loop.masks.update(masks)

    def statistics(self, loop: Loop) -> Gathered:
        """Gathered at the first update of each epoch: often enough, and the same in a run that resumes between two."""
        epoch = loop.epoch if loop.step_in_epoch else loop.epoch - 1  # at an epoch's end, that epoch
        if epoch != self.gathered_epoch:
            self.gathered, self.gathered_epoch = self.step.gather(loop.model, self.ctx, self.batches), epoch
        return self.gathered

    def on_epoch(self, loop: Loop) -> None:
        """A loader without a length only tells at the epochs' ends how far the training is."""
        self.on_step(loop)

    def settled(self, loop: Loop) -> bool:
        """Only an epoch at the full sparsity may be kept."""
        return loop.progress >= self.step.until
