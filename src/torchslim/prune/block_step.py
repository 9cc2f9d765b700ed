"""The pruning step for residual blocks: rounds of removal, recalibration and training, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, get_args

from torch import Tensor, nn

from torchslim.core.batches import call, take_first
from torchslim.core.layer_patterns import Patterns, as_list, check_patterns
from torchslim.core.parts import WHOLE, part_at, patterns_inside, under
from torchslim.core.reason import Reason
from torchslim.core.step import Context, Event, Inputs, Outcome
from torchslim.core.tensor_objects import by_structure
from torchslim.core.trees import device_of, to_device
from torchslim.errors import PruneError
from torchslim.prune.channel_state import PartState, PruningState, cut_masks
from torchslim.prune.channel_step import Rounds
from torchslim.prune.depth.plan import BlockMeasure, DepthPlan, analyze_depth
from torchslim.prune.depth.removal import (
    DepthRemoval,
    NoBlocks,
    block_request,
    check_block_request,
    finish_blocks,
    remove_blocks,
    remove_named,
)
from torchslim.prune.depth.scores import BlockScores, Damage, Data, find_block_criterion
from torchslim.prune.latency.solve import Told
from torchslim.prune.masking.masks import apply_masks
from torchslim.prune.schedule import Schedule
from torchslim.prune.structured.surgery import Cut
from torchslim.training.calibration import calibration_of
from torchslim.training.loop import Hook

SAMPLES = 128
"""Calibration samples that blocks are scored on, at least: every block takes a forward pass of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneBlocks:
    """Removes residual blocks: `Prune` with the pattern "block" and defaults filled in."""

    sparsity: float | None = None
    blocks: Patterns = None
    of: BlockMeasure = "params"
    criterion: str | Damage | None = None
    include: Patterns = None
    exclude: Patterns = None
    schedule: Schedule = field(default_factory=Schedule)
    reconstruct: bool = False

    penalty: None = None

    def __post_init__(self) -> None:
        check_block_request(self.sparsity, self.blocks)
        if self.of not in get_args(BlockMeasure):
            choices = ", ".join(map(repr, get_args(BlockMeasure)))
            raise PruneError(f"of must be one of {choices} for pattern 'block', got {self.of!r}")
        if self.criterion is not None and not (isinstance(self.criterion, str) and ":" in self.criterion):
            find_block_criterion(self.criterion)
        if self.schedule.kind == "gradual":
            raise PruneError(
                "schedule 'gradual' is not for pattern 'block': a block goes as a whole; use 'iterative' with more "
                "rounds"
            )
        if self.blocks is not None and self.schedule.kind != "one-shot":
            raise PruneError("named blocks go at once: leave out schedule, or give sparsity=... in place of blocks")

    def targets(self) -> list[float]:
        """The sparsity after each round."""
        return [1.0] if self.sparsity is None else self.schedule.targets(self.sparsity)

    def check(self, ctx: Context) -> None:
        """Raise if no layer matches, or if the criterion, the training or the measurement lacks its data."""
        if self.criterion is not None:
            find_block_criterion(self.criterion)
        model = ctx.model if ctx.model is not None else ctx.teacher
        check_patterns(model, self.include, self.exclude)
        check_patterns(model, [name.partition("#")[0] for name in as_list(self.blocks)], None)
        if self.sparsity is not None:
            take_first(getattr(ctx.task, ctx.task.calibration_split), ctx.task.calibration_split)
        if self.of == "latency" and ctx.workbench is None:
            raise PruneError(
                "of='latency' needs a workbench to measure latency: run the step by ts.compress or `torchslim run`, or "
                "give a Context with workbench=ts.Bench(...)"
            )
        if self.schedule.train is not None:
            self.schedule.train.check_training(ctx)

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        apply_masks(model, ctx.masks)
        return Rounds(self, model, ctx).run()

    def parts(self, ctx: Context, state: PruningState, received: nn.Module) -> list[BlockPart]:
        """The parts of the state's model."""
        return [BlockPart(self, ctx, state, path, received) for path in ctx.paths]

    def hooks(self, ctx: Context, state: PruningState, received: nn.Module) -> list[Hook]:
        """No hooks: no penalty makes blocks sparse."""
        return []


@dataclass
class BlockPart:
    """One part of the model of a pruning state; a cut replaces the state's model."""

    step: PruneBlocks
    whole_ctx: Context
    state: PruningState
    path: str
    received: nn.Module
    cuts: tuple[Cut, ...] = ()  # no slices go, only whole weights

    @property
    def own(self) -> PartState:
        """The figures of the part."""
        return self.state.parts[self.path]

    @cached_property
    def plan(self) -> DepthPlan:
        """The blocks of the part as it is now."""
        ctx, step, model = self.whole_ctx, self.step, self.state.model
        examples: Sequence[Any] = ctx.task.examples
        inputs: Inputs = ctx.example_inputs
        include, exclude = step.include, step.exclude
        if self.path != WHOLE:
            inputs = ctx.parts[self.path][0]
            examples = [group[0] for group in by_structure(ctx.parts[self.path])[1:]]
            include, exclude = (None if patterns is None else self._inside(patterns) for patterns in (include, exclude))
        return analyze_depth(part_at(model, self.path), inputs, include=include, exclude=exclude, examples=examples)

    def _inside(self, patterns: Patterns) -> list[str]:
        found = patterns_inside(self.state.model, self.path, as_list(patterns))
        return [name for names in found.values() for name in names]

    def cut(self, target: float, *, last: bool) -> None:
        """Remove the named blocks, or blocks up to a target sparsity, a fraction of the part as it was received."""
        own, plan = self.own, self.plan
        if self.step.blocks is not None:
            self._accept(remove_named(plan, self._named()))
            return
        size = 1.0 if self.step.of == "latency" else float(plan.total(self.step.of))
        own.total = own.total or size
        own.kept = own.kept or size
        missing = 1 - (1 - target) * own.total / own.kept
        if missing <= 0:  # blocks are large: an earlier round may have removed enough
            return
        try:
            removal = self._removed(missing)
        except NoBlocks as error:
            if self.state.cuts == 0:
                raise
            self.state.warnings.append(f"a later round stopped: {error}")
            return
        own.kept *= 1 - removal.fraction
        self._accept(removal)

    def _named(self) -> list[str]:
        """Names of the blocks of the part that the patterns over the whole model's names select."""
        patterns = as_list(self.step.blocks)
        if self.path == WHOLE:
            return patterns
        names = [
            name for name in self.plan.blocks if any(fnmatchcase(under(self.path, name), each) for each in patterns)
        ]
        if not names:
            raise NoBlocks(f"none of {', '.join(patterns)} matches a residual block of it")
        return names

    def _removed(self, missing: float) -> DepthRemoval:
        step, ctx = self.step, self.whole_ctx.within(self.path)
        scores = BlockScores(
            self.plan,
            None if step.criterion is None else find_block_criterion(step.criterion),
            _data(self.whole_ctx),
            whole=self.state.model,
            path=self.path,
            seed=ctx.seed,
        )

        def report(done: int, total: int) -> None:
            ctx.progress(Event(step=ctx.name, phase="blocks, percent removed", current=done, total=total))

        bench = Told(bench=ctx.workbench) if step.of == "latency" and ctx.workbench is not None else None
        return remove_blocks(self.plan, missing, step.of, scores, workbench=bench, progress=report)

    def _accept(self, removal: DepthRemoval) -> None:
        """Make the model of a verified removal the current one, with its masks, refusals and warnings."""
        state, step, plan = self.state, self.step, self.plan
        request = block_request(step.sparsity, step.blocks, step.of, step.criterion)
        state.masks = cut_masks(state.masks, removal.surgery.under(self.path), state.model)
        state.model = finish_blocks(state.model, self.path, plan, removal, request)
        asked = (Reason.EXCLUDED, Reason.NOT_INCLUDED)
        self.own.refused = [
            (name, reason) for name, reason in plan.reasons.items() if not any(each.given_in(reason) for each in asked)
        ]
        state.warnings += [f"not removed: {under(self.path, name)}: {reason}" for name, reason in self.own.refused]
        state.warnings += [plan.trial.imprecise] if plan.trial.imprecise else []


def _data(ctx: Context) -> Data:
    """Calibration inputs, and whether the task's labels are classes."""
    task = ctx.task
    target = task.target(take_first(getattr(task, task.calibration_split), task.calibration_split))
    labels = isinstance(target, Tensor) and not target.is_floating_point() and task.loss is None

    def forward(model: nn.Module, inputs: Inputs) -> Any:
        return call(model, to_device(inputs, device_of(model)))

    return Data(batches=calibration_of(ctx).first(SAMPLES), forward=forward, logits=task.logits, classes=labels)
