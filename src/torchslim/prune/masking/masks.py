"""Masks that set single weights, N:M blocks and slices to zero, and hooks that hold them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer

from torchslim.core.arguments import checks_arguments
from torchslim.core.isolation import copy_model
from torchslim.core.layer_patterns import Patterns, by_pattern, computed_weights, select_weights
from torchslim.core.step import LayerRecord
from torchslim.errors import PruneError
from torchslim.prune.criteria.registry import Criterion
from torchslim.prune.criteria.scoring import channel_scores, score, silence
from torchslim.prune.criteria.statistics import Gathered, Role, Statistics
from torchslim.prune.masking.patterns import Pattern, Slice
from torchslim.prune.masking.selection import keep_globally, keep_per_row
from torchslim.training.masks import MaskKeeper

Masks = dict[str, Tensor]
NO_DATA = Gathered()
COMPUTED = "a parametrization computes it; torch.nn.utils.parametrize.remove_parametrizations makes it a plain weight"
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskOptions:
    """Which weights to mask, how much of them, and by which criterion."""

    sparsity: float | Mapping[str, float] | None
    threshold: float | None
    criterion: Criterion
    pattern: Pattern
    scope: Literal["global", "layer"]
    include: Patterns = None
    exclude: Patterns = None

    def targets(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, float]]:
        """The weights to prune, and their sparsities, by path."""
        weights = select_weights(model, self.include, self.exclude)
        if not isinstance(self.sparsity, Mapping):
            return weights, dict.fromkeys(weights, self.sparsity if self.sparsity is not None else 0.0)
        covered = by_pattern(self.sparsity, weights, model)
        targets = {path: self.sparsity[covered[path]] for path in weights if path in covered}
        return {path: weights[path] for path in targets}, targets


def plan(
    model: nn.Module,
    options: MaskOptions,
    *,
    previous: Mapping[str, Tensor],
    seed: int = 0,
    gathered: Gathered = NO_DATA,
) -> tuple[Masks, list[LayerRecord]]:
    """Masks (True where kept) by parameter name, and a record per layer. The model is only read.

    `gathered` holds the statistics of data that the criterion needs. Weights that `previous` masks already are
    removed first and never come back.
    """
    pattern = options.pattern
    weights, targets = options.targets(model)
    owners = dict(model.named_modules())
    input_dims = {path: _input_dim(owners[path.rpartition(".")[0]], weight) for path, weight in weights.items()}
    misfits = {path: pattern.refusal(weight.shape, input_dims[path]) for path, weight in weights.items()}
    refusals = dict(misfits)
    generator = torch.Generator().manual_seed(seed)
    units: dict[str, Tensor] = {}
    for path, weight in weights.items():
        if not refusals[path]:
            statistics = gathered.of(path, generator=generator, role=_role(pattern, weight, input_dims[path]))
            scored = _scored(options, weight, statistics, input_dims[path], previous)
            if isinstance(scored, str):
                refusals[path] = scored
            else:
                units[path] = scored
    if not units:
        reason = "follow the pattern" if any(misfits.values()) else "be ranked"
        raise PruneError(
            f"no chosen layer can {reason}: {'; '.join(f'{path}: {refusal}' for path, refusal in refusals.items())}"
        )
    kept = _kept(units, options, targets, {path: weights[path].numel() for path in units})
    masks = dict(previous)
    for path in units:
        mask = pattern.spread(kept[path], weights[path].shape, input_dims[path])
        masks[path] = mask & previous[path].to(mask.device) if path in previous else mask
    refusals |= dict.fromkeys(computed_weights(model, options.include, options.exclude), COMPUTED)
    records = [
        LayerRecord(layer=path, action="refused", reason=refusal) for path, refusal in refusals.items() if refusal
    ]
    return masks, [*records, *(pruned_record(path, masks[path]) for path in units)]


def _role(pattern: Pattern, weight: Tensor, input_dim: int) -> Role:
    """Whether the dimension of whole slices holds the layer's inputs, its outputs, or neither."""
    if not isinstance(pattern, Slice):
        return "other"
    dim = pattern.dim % weight.dim()
    return "in" if dim == input_dim else "out" if dim == 1 - input_dim else "other"


def _scored(
    options: MaskOptions, weight: Tensor, statistics: Statistics, input_dim: int, previous: Mapping[str, Tensor]
) -> Tensor | str:
    """Scores of the units of one layer, (rows, units), or the reason why the criterion has none."""
    criterion = options.criterion
    if refusal := silence(criterion, statistics):
        return refusal
    units = _units(options, weight, statistics, input_dim, previous.get(statistics.name))
    return units if units is not None else f"criterion {criterion.name!r} gives it no scores"


def _units(
    options: MaskOptions, weight: Tensor, statistics: Statistics, input_dim: int, mask: Tensor | None
) -> Tensor | None:
    """Scores of units, (rows, units), lowest for those that `mask` removes; None if the criterion has none."""
    criterion, pattern = options.criterion, options.pattern
    if criterion.weights is None and isinstance(pattern, Slice):
        masked = weight if mask is None else weight.masked_fill(~mask.to(weight.device), 0)
        slices = channel_scores(criterion, masked, pattern.dim, statistics)
        if slices is None:
            return None
        units: Tensor = slices.unsqueeze(0)
    else:
        scores = score(criterion, weight, statistics)
        masked = scores if mask is None else scores.masked_fill(~mask.to(scores.device), 0)
        units = pattern.units(masked, input_dim)
    if mask is None:
        return units
    dead = pattern.units(mask.to(units), input_dim) == 0
    return units.masked_fill(dead, -torch.inf)


def pruned_record(path: str, mask: Tensor) -> LayerRecord:
    """Record of one pruned layer; its reason says if no weight is left."""
    removed = int((~mask).sum())
    reason = "every weight is removed" if removed == mask.numel() else ""
    return LayerRecord(layer=path, action="pruned", reason=reason, sparsity=removed / mask.numel())


def _kept(
    units: Mapping[str, Tensor], options: MaskOptions, targets: Mapping[str, float], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Mask of the units that stay, by layer; `sizes` holds the number of weights by layer."""
    if options.threshold is not None:
        return {path: scores >= options.threshold for path, scores in units.items()}
    fixed = options.pattern.fixed_sparsity
    if fixed is not None:
        return {path: keep_per_row(scores, fixed) for path, scores in units.items()}
    if options.scope == "layer":
        return {path: keep_per_row(scores, targets[path]) for path, scores in units.items()}
    costs = [sizes[path] // scores.numel() for path, scores in units.items()]
    (target,) = {targets[path] for path in units}
    return dict(zip(units, keep_globally(list(units.values()), costs, target), strict=True))


def _input_dim(owner: nn.Module, weight: Tensor) -> int:
    return 0 if isinstance(owner, TRANSPOSED) or weight.dim() < 2 else 1


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the weights whose mask is False to zero, in place."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


def notes(records: Sequence[LayerRecord]) -> list[str]:
    """Warnings about the records: layers that were not pruned, and layers that lost every weight."""
    return [
        f"{'not pruned' if record.action == 'refused' else 'emptied'}: {record.layer}: {record.reason}"
        for record in records
        if record.reason
    ]


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Fraction of zeros, by layer and over all layers."""

    layers: Mapping[str, float]
    total: float

    def __str__(self) -> str:
        width = max(map(len, self.layers), default=5)
        rows = [f"{path:<{width}}  {value:7.2%}" for path, value in self.layers.items()]
        return "\n".join([*rows, f"{'total':<{width}}  {self.total:7.2%}"])


@checks_arguments(PruneError)
def sparsity(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> Sparsity:
    """Fraction of weights that are exactly zero, in the layers that pruning touches.

    >>> layer = nn.Linear(2, 2)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    >>> sparsity(layer).total
    0.25
    """
    if prune.is_pruned(model):  # the zeros are in masks, not yet in the parameters
        model, _ = copy_model(model)
    weights = select_weights(model, include, exclude)
    zeros = {path: int((weight == 0).sum()) for path, weight in weights.items()}
    layers = {path: zeros[path] / max(weight.numel(), 1) for path, weight in weights.items()}
    return Sparsity(layers, sum(zeros.values()) / max(sum(weight.numel() for weight in weights.values()), 1))


class HeldZeros:
    """Handle that `hold_zeros` returns: `remove()`, or the end of a `with` block, stops holding the zeros."""

    def __init__(self, keeper: MaskKeeper, optimizer: Optimizer) -> None:
        self.masks = keeper.masks
        self._handles = (
            optimizer.register_step_pre_hook(keeper.before_step),
            optimizer.register_step_post_hook(keeper.after_step),
        )

    def remove(self) -> None:
        """Remove the hooks, so that the weights can change again."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> HeldZeros:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


@checks_arguments(PruneError)
def hold_zeros(model: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor] | None = None) -> HeldZeros:
    """Keep pruned weights at zero while your own loop trains, also against weight decay and momentum.

    Without `masks` (boolean, by parameter name, True where kept), every weight that pruning touches by default and
    that is exactly zero now is held.

    Raises:
        PruneError: a weight is all zeros, as a freshly initialized head may be, and would never learn if held. Pass
            `masks` to choose the weights to hold.
    """
    if masks is None:
        masks = {path: weight.detach() != 0 for path, weight in select_weights(model).items()}
        masks = {path: mask for path, mask in masks.items() if not mask.all()}
        empty = [path for path, mask in masks.items() if not mask.any()]
        if empty:
            raise PruneError(
                f"{', '.join(empty)} is all zeros, and all its weights would stay 0; pass masks={{name: keep}} to "
                "choose the weights to hold"
            )
    keeper = MaskKeeper(dict(model.named_parameters()), optimizer, masks)
    keeper.after_step()
    return HeldZeros(keeper, optimizer)
