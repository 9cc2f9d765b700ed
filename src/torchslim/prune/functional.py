"""Pruning as functions: a model goes in, a pruned copy comes out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from torchslim.core.arguments import checks_arguments
from torchslim.core.batches import Batch, Outputs, batch_inputs, call, checked
from torchslim.core.isolation import copy_model, duplicate
from torchslim.core.layer_patterns import Patterns
from torchslim.core.step import Inputs, Workbench
from torchslim.core.usable import usable
from torchslim.errors import PruneError
from torchslim.prune.criteria.registry import Criterion, Scorer, find_criterion
from torchslim.prune.criteria.scoring import Normalization, Reduction
from torchslim.prune.criteria.statistics import Gathered, gather
from torchslim.prune.dependency.resolve import Heads
from torchslim.prune.dependency.trace import call as run
from torchslim.prune.depth.plan import BlockMeasure, analyze_depth
from torchslim.prune.depth.removal import (
    block_request,
    check_block_request,
    finish_blocks,
    remove_blocks,
    remove_named,
)
from torchslim.prune.depth.scores import BlockScores, Damage, Data, find_block_criterion
from torchslim.prune.latency.solve import shrink_to_latency
from torchslim.prune.masking.masks import NO_DATA, apply_masks, notes
from torchslim.prune.masking.patterns import Order
from torchslim.prune.reconstruction.reconstruct import Calibration
from torchslim.prune.reconstruction.reconstruct import reconstruct as solve_remaining
from torchslim.prune.step import Prune
from torchslim.prune.structured.options import ChannelOptions
from torchslim.prune.structured.plan import Plan, UnseenCode
from torchslim.prune.structured.removal import finish, gave_way, missed_target, shrink, tolerance, vacuous
from torchslim.prune.structured.selection import Of, Scope, amount_of
from torchslim.prune.structured.surgery import Cut


@checks_arguments(PruneError)
def channels(
    model: nn.Module,
    example_inputs: Inputs,
    sparsity: float | None = None,
    *,
    widths: Mapping[str, int] | None = None,
    of: Of = "params",
    criterion: str | Scorer | Criterion = "lamp",
    scope: Scope = "global",
    round_to: int | None = None,
    min_channels: int | None = None,
    heads: Heads = "auto",
    include: Patterns = None,
    exclude: Patterns = None,
    reduction: Reduction = "mean",
    normalization: Normalization = "mean",
    batches: Iterable[Batch] | None = None,
    loss: Callable[[Outputs, Batch], Tensor] | None = None,
    seed: int = 0,
    workbench: Workbench | None = None,
    examples: Sequence[Any] = (),
    unseen: UnseenCode = "keep",
    reconstruct: bool | Iterable[Batch] = False,
) -> nn.Module:
    """A smaller copy of `model`, with its least important channels, neurons and heads physically removed.

    One run of the model on `example_inputs` finds the coupled channels. The result is compared with the original in
    float64, operation by operation, and channels whose removal cannot be verified stay. `ts.surgery(model)` returns the
    record of the removal. The copy has the same class and mode, and can be trained, exported, and pruned again.

    Args:
        model: any module that runs on `example_inputs`; it is not modified.
        example_inputs: a tuple of positional or a dict of keyword arguments.
        sparsity: the fraction to remove, in [0, 1), of the whole model, including channels that must stay; default 0.5.
        widths: instead, the number of channels that groups keep, by the name of a layer (for its outputs) or of a
            member as `inspect` lists it: {"conv1": 48, "layer4.*": 256, "fc.weight[1]": 100}. For each member the last
            pattern counts. Groups without a name stay as they are; the criterion decides which channels go.
        of: what the sparsity is a fraction of: parameters ("params"), multiply-accumulates on these inputs ("macs"),
            the "channels" that may go, or "latency": the result takes at most 1 - sparsity of the time, and widths are
            chosen and measured again until it is near that.
        criterion: a name in `CRITERIA`, "package.module:name", or a callable of a weight and its statistics.
        scope: rank over the whole model, or remove the same fraction everywhere.
        round_to: widths become multiples of this number; narrower groups ignore it. Default 8; 1 if `widths` are given.
        min_channels: no group becomes narrower than this; groups that are narrower already ignore it. Default as for
            `round_to`.
        heads: attention loses "whole" heads, the same number of "dim"ensions from every head, or what the model
            allows ("auto").
        include: patterns of layers; only groups with a member among them lose channels.
        exclude: patterns of layers that keep all their weights. Outputs of the model always stay.
        reduction: over the members of a group: "mean", "sum", "max" or "first".
        normalization: of a group's scores, so that groups can be ranked together: "none", "mean", "max" or "gaussian".
        batches: for criteria that need data; read as a `Task` reads them.
        loss: for criteria that need gradients: loss(outputs, batch); default cross-entropy.
        seed: of the "random" criterion.
        workbench: measures for of="latency": `ts.Bench(example_inputs=example_inputs, target=ts.Target(runtime=...))`.
        examples: further calls that reach other branches and methods: tuples of positional arguments, dicts of keyword
            arguments, or {"method": "embed", "args": (...), "kwargs": {...}}. All are traced and verified together.
        unseen: channels that weights which no call reaches may share: "keep" leaves them in; "prune" lets them go, and
            those weights may not fit afterwards. Either way a warning names the weights and the methods.
        reconstruct: batches on which the remaining weights are solved for, as for `Prune`; True: on `batches`. They are
            held in memory. Batch norms need no recalibration afterwards: layers are fitted to their statistics.

    Raises:
        PruneError: nothing can go, an argument is out of its range, or a group cannot have its width.
        SelectError: a pattern that matches no layer.
    """
    if sparsity is not None and widths is not None:
        raise PruneError(f"give sparsity or widths, not both: {sparsity}, {dict(widths)}")
    least = {"round_to": round_to, "min_channels": min_channels}
    given = {name: value for name, value in least.items() if value is not None}
    options = ChannelOptions(
        amount=amount_of(sparsity=sparsity, widths=widths, of=of, scope=scope, **given),
        criterion=criterion,
        heads=heads,
        include=include,
        exclude=exclude,
        reduction=reduction,
        normalization=normalization,
        unseen=unseen,
    )
    _check_workbench(of, workbench)
    data, batches = _calibration(reconstruct, batches)
    plan = options.plan(usable(model, PruneError), example_inputs, examples)
    statistics = _Statistics(batches=batches, loss=loss, seed=seed)
    pruned, messages, cuts = _remove_channels(plan, options, statistics, workbench)
    if data is not None:
        solve_remaining(plan.model, pruned, data, cuts=cuts, seed=seed)
    for message in messages:
        warnings.warn(message, stacklevel=3)  # past the check of the arguments
    return pruned


@checks_arguments(PruneError)
def blocks(
    model: nn.Module,
    example_inputs: Inputs,
    sparsity: float | None = None,
    *,
    blocks: Patterns = None,
    of: BlockMeasure = "params",
    criterion: str | Damage | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    batches: Iterable[Batch] | None = None,
    seed: int = 0,
    workbench: Workbench | None = None,
    examples: Sequence[Any] = (),
    reconstruct: bool | Iterable[Batch] = False,
) -> nn.Module:
    """A copy of `model` without its least important residual blocks: depth pruning.

    One run of the model on `example_inputs` finds the branches that are added to the value that they start from, and
    the modules around several of them, such as the layers of a transformer. A removed block is replaced by a module
    without weights, and its weights and operations are gone. The result is compared with the original whose branches
    are zero, in float64 and on inputs of two sizes; a block whose removal cannot be verified stays. `ts.surgery(model)`
    returns the record of the removal. The copy can be trained, exported, and pruned again.

    Args:
        model: any module that runs on `example_inputs`; it is not modified.
        example_inputs: a tuple of positional or a dict of keyword arguments.
        sparsity: the least fraction to remove, in (0, 1). Blocks go one by one, and the others are scored again.
        blocks: instead of a sparsity, names or globs of blocks, as `ts.prune.inspect(...).blocks` lists them.
        of: what the sparsity is a fraction of: parameters ("params"), multiply-accumulates on these inputs ("macs"),
            the number of "blocks", or "latency".
        criterion: a name in `ts.prune.BLOCK_CRITERIA`, "package.module:name", or a function (outputs before, outputs
            after) -> damage; the default is "error". Blocks of the lowest score per saved cost go first.
        include: globs over names of blocks; others stay.
        exclude: globs over layers that stay, with the blocks around them.
        batches: calibration data, read as a `Task` reads it; the default is `example_inputs`.
        seed: of the criterion "random".
        workbench: measures for of="latency": `ts.Bench(example_inputs=example_inputs, target=ts.Target(runtime=...))`.
        examples: as for `ts.prune.channels`. Give calls of a method, such as one step of a generation, to keep blocks
            that only these calls need.
        reconstruct: as for `ts.prune.channels`.

    Raises:
        PruneError: the model has no block that can go, or too few; an argument is out of its range.
        SelectError: a pattern that matches no layer.
    """
    check_block_request(sparsity, blocks)
    _check_workbench(of, workbench)
    calibration, batches = _calibration(reconstruct, batches)
    criterion = None if criterion is None else find_block_criterion(criterion)
    plan = analyze_depth(usable(model, PruneError), example_inputs, include=include, exclude=exclude, examples=examples)
    if blocks is not None:
        removal = remove_named(plan, blocks)
    else:
        assert sparsity is not None
        data = (
            Data(batches=[plan.inputs], forward=run)
            if batches is None
            else Data(batches=list(batches), forward=_forward)
        )
        removal = remove_blocks(plan, sparsity, of, BlockScores(plan, criterion, data, seed=seed), workbench=workbench)
    if plan.trial.imprecise:
        warnings.warn(plan.trial.imprecise, stacklevel=3)
    request = block_request(sparsity, blocks, of, criterion)
    pruned = finish_blocks(plan.model, "", plan, removal, request)
    if calibration is not None:
        solve_remaining(plan.model, pruned, calibration, seed=seed)
    return pruned


def _calibration(
    reconstruct: bool | Iterable[Batch], batches: Iterable[Batch] | None
) -> tuple[Calibration | None, Iterable[Batch] | None]:
    """The data of a reconstruction, None without one, and the batches of the criterion."""
    if reconstruct is False:
        return None, batches
    if reconstruct is True:
        if batches is None:
            raise PruneError("reconstruct=True needs data; give batches=..., or reconstruct=batches")
        batches = list(batches)
    given = batches if reconstruct is True else reconstruct
    return Calibration(batches=list(checked(given, "reconstruct")), forward=_forward), batches


def _forward(model: nn.Module, batch: Batch) -> Outputs:
    return call(model, batch_inputs(batch))


def _check_workbench(of: Of | BlockMeasure, workbench: Workbench | None) -> None:
    """Raise PruneError unless a workbench is given for latencies, and for nothing else."""
    if (of == "latency") != (workbench is not None):
        raise PruneError(
            f"of={of!r} with workbench={workbench!r}: of='latency' is measured by a workbench, and nothing else is; "
            "give workbench=ts.Bench(example_inputs=example_inputs, target=ts.Target(runtime='onnxruntime')) with it"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Statistics:
    """The data, loss and seed that a criterion may need."""

    batches: Iterable[Batch] | None
    loss: Callable[[Outputs, Batch], Tensor] | None
    seed: int

    def gather(self, model: nn.Module, criterion: Criterion) -> Gathered:
        """Statistics of the model that the criterion needs; none without batches."""
        return NO_DATA if self.batches is None else gather(model, criterion.needs, self.batches, loss=self.loss)


def _remove_channels(
    plan: Plan, options: ChannelOptions, statistics: _Statistics, workbench: Workbench | None
) -> tuple[nn.Module, list[str], tuple[Cut, ...]]:
    """Remove the channels from the plan's model; returns the pruned model, the warnings and the cuts."""
    criterion, amount = find_criterion(options.criterion), options.amount
    ranking = options.ranking(statistics.gather(plan.model, criterion), statistics.seed)
    scores = ranking.scores(plan.model, plan)
    misses: Iterable[str]
    if workbench is None:
        removal = shrink(plan, amount, scores)
        misses = missed_target(removal.left, amount, tolerance(plan, removal.coupling, amount))
    else:
        removal, misses = shrink_to_latency(plan, amount, scores, workbench)
    finish(plan, removal, amount, criterion.name)
    messages = [*plan.notes(), *vacuous(removal), *gave_way(removal, amount), *misses]
    return removal.model, messages, removal.surgery.cuts


@checks_arguments(PruneError)
def weights(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    threshold: float | None = None,
    criterion: str | Criterion | Scorer = "l1",
    scope: Literal["global", "layer"] | None = None,
    pattern: str = "unstructured",
    n: Order = 2.0,
    dim: int = 0,
    include: Patterns = None,
    exclude: Patterns = None,
    batches: Iterable[Batch] | None = None,
    loss: Callable[[Outputs, Batch], Tensor] | None = None,
    seed: int = 0,
    reconstruct: bool | Iterable[Batch] = False,
) -> nn.Module:
    """A copy of `model` with its least important weights set to zero; the other arguments are those of `Prune`.

    Args:
        batches: for criteria that need data: (inputs, labels) tuples or dicts, as a `Task` reads them by default; some
            hundred samples suffice.
        loss: loss(outputs, batch), a mean over the batch; None: cross entropy, or squared error for real labels.
        reconstruct: batches on which the remaining weights are solved for, as for `Prune`; True: on `batches`.

    Weights that `torch.nn.utils.prune` has masked stay masked. Masked weights alone make a dense model neither faster
    nor smaller; `hold_zeros` keeps them at zero while you train on.

    >>> from torchslim.prune import sparsity as measure
    >>> measure(weights(nn.Linear(10, 10), sparsity=0.3)).total
    0.3

    Raises:
        PruneError: a sparsity outside [0, 1), an unknown criterion or pattern, a criterion without its data.
        TaskError: batches that cannot be used.
        SelectError: a pattern that matches no layer.
    """
    model = usable(model, PruneError)
    step = Prune(
        sparsity=sparsity,
        threshold=threshold,
        criterion=criterion,
        scope=scope,
        pattern=pattern,
        n=n,
        dim=dim,
        include=include if include is None or isinstance(include, str) else tuple(include),
        exclude=exclude if exclude is None or isinstance(exclude, str) else tuple(exclude),
    )
    data, batches = _calibration(reconstruct, batches)
    pruned, previous = copy_model(model)
    gathered = _Statistics(batches=batches, loss=loss, seed=seed).gather(pruned, find_criterion(criterion))
    masks, records = step.masks(pruned, previous, sparsity, seed, gathered)
    original = pruned if data is None else duplicate(pruned)
    apply_masks(pruned, masks)
    if data is not None:
        solve_remaining(original, pruned, data, masks=masks, seed=seed)
    for note in notes(records):
        warnings.warn(note, stacklevel=2)
    return pruned
