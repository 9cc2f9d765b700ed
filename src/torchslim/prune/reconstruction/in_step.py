"""Reconstruction as a part of a pruning step: its data, the weights that it may change, and its layer records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from torchslim.core.layer_patterns import parameter_paths
from torchslim.core.parts import inside
from torchslim.core.step import Context, Event, LayerRecord
from torchslim.prune.reconstruction.reconstruct import Calibration, Solved, reconstruct
from torchslim.prune.structured.surgery import Cut
from torchslim.training.calibration import calibration_of


def reconstruct_in_step(
    original: nn.Module,
    pruned: nn.Module,
    ctx: Context,
    *,
    cuts: Iterable[Cut] = (),
    masks: Mapping[str, Tensor] | None = None,
) -> list[Solved]:
    """Update the weights of `pruned` on the task's calibration data, in place: those in the context's parts alone."""

    def report(done: int, total: int) -> None:
        ctx.progress(Event(step=ctx.name, phase="reconstruct", current=done, total=total))

    # the rest of the model also uses a weight that has a path outside of the parts
    names = [
        name
        for name, paths in parameter_paths(pruned).items()
        if all(any(inside(part, path) is not None for part in ctx.paths) for path in paths)
    ]
    data = Calibration(batches=calibration_of(ctx).batches, forward=ctx.task.forward, mask=ctx.task.mask)
    solved: list[Solved] = reconstruct(
        original, pruned, data, cuts=cuts, masks=masks, only=names, seed=ctx.seed, progress=report
    )
    return solved


def with_solved(records: Sequence[LayerRecord], solved: Iterable[Solved], *, by_module: bool) -> list[LayerRecord]:
    """The records of a pruning, with what became of the weights in the reasons; further layers get their own record.

    Args:
        by_module: whether the records are of modules, not of parameters.
    """
    notes: dict[str, list[Solved]] = {}
    for result in solved:
        path = result.weight
        notes.setdefault((path.rpartition(".")[0] or path) if by_module else path, []).append(result)
    merged = []
    for record in records:
        results = notes.pop(record.layer, []) if record.action == "pruned" else []
        reason = "; ".join([*([record.reason] if record.reason else []), *map(str, results)])
        merged.append(replace(record, reason=reason))
    for layer, results in notes.items():
        updated = any(not result.reason for result in results)
        merged.append(
            LayerRecord(layer=layer, action="trained" if updated else "refused", reason="; ".join(map(str, results)))
        )
    return merged
