"""Data that a criterion needs from the task: checked before the run, and gathered in it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from torchslim.core.batches import Batch, take_first
from torchslim.core.step import Context
from torchslim.errors import PruneError
from torchslim.prune.criteria.registry import CRITERIA, Criterion
from torchslim.prune.criteria.statistics import Gathered, gather
from torchslim.training.calibration import calibration_of


def check_data(criterion: Criterion, ctx: Context) -> None:
    """Raise if the task lacks batches or labels that the criterion needs."""
    if not criterion.needs:
        return
    first = take_first(getattr(ctx.task, ctx.task.calibration_split), ctx.task.calibration_split)
    if criterion.needs_loss and ctx.task.loss is None and ctx.task.target(first) is None:
        unlabeled = ", ".join(name for name, entry in CRITERIA.items() if not entry.needs_loss)
        raise PruneError(
            f"criterion {criterion.name!r} needs labels, but Task.target gives None; give Task(loss=...), or "
            f"choose one of {unlabeled}"
        )


def gather_for(
    criterion: Criterion, model: nn.Module, ctx: Context, batches: Iterable[Batch] | None = None
) -> Gathered:
    """Statistics that the criterion needs, of the model as it is now; empty if it needs none."""
    if not criterion.needs:
        return Gathered()
    batches = calibration_of(ctx).batches if batches is None else batches
    return gather(model, criterion.needs, batches, forward=ctx.task.forward, loss=ctx.task.compute_loss)
