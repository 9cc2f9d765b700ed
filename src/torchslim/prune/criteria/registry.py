"""Criteria, which score weights and channels: those with the lowest scores are removed first.

A criterion scores single weights, `weights(weight, statistics) -> scores` of the weight's shape, or whole slices,
`channels(weight, dim, statistics) -> (weight.shape[dim],)`, or both; `needs` lists the statistics of data that it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchslim.core.checks import check_fields
from torchslim.core.imports import resolve
from torchslim.errors import PruneError
from torchslim.prune.criteria.statistics import Statistic, Statistics

Scorer = Callable[[Tensor, Statistics], Tensor]
ChannelScorer = Callable[[Tensor, int, Statistics], Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """A way to score weights or channels.

    Args:
        name: its name in messages and recipes.
        weights: gives the scores of single weights, of the weight's shape; None: the criterion ranks channels only.
        channels: gives the scores of slices along a dimension, or None for a weight that it cannot score. Without it,
            a slice's score is the sum of its weights' scores.
        needs: statistics that must be gathered from data first.
    """

    name: str
    weights: Scorer | None = None
    channels: ChannelScorer | None = None
    needs: frozenset[Statistic] = frozenset()

    def __post_init__(self) -> None:
        check_fields(self, PruneError)
        if self.weights is None and self.channels is None:
            raise PruneError(f"criterion {self.name!r} scores nothing; give weights=... or channels=...")

    @property
    def about(self) -> str:
        """First line of the scorer's docstring."""
        return ((self.weights or self.channels).__doc__ or "").strip().split("\n")[0]

    @property
    def needs_loss(self) -> bool:
        """Whether the data must have labels."""
        return any(need.needs_loss for need in self.needs)


def l1(weight: Tensor, statistics: Statistics) -> Tensor:
    """Magnitude: |w|, summed over a channel.

    Shapes: any -> the same. Source: Han et al. 2015, arXiv:1506.02626, section 3; channels: Li et al. 2016,
    arXiv:1608.08710, section 3.1.
    """
    return weight.abs()


def l2(weight: Tensor, statistics: Statistics) -> Tensor:
    """Magnitude: |w|, for a channel its Euclidean norm.

    Shapes: any -> the same. Source: as `l1`.
    """
    return weight.abs()


def _l2_channels(weight: Tensor, dim: int, statistics: Statistics) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(slices(weight, dim), dim=1)
    return norms


def random(weight: Tensor, statistics: Statistics) -> Tensor:
    """Uniform scores in [0, 1), drawn with the run's seed: the baseline that a criterion must beat.

    Shapes: any -> the same.
    """
    return torch.rand(weight.shape, generator=statistics.generator).to(weight.device)


def _random_channels(weight: Tensor, dim: int, statistics: Statistics) -> Tensor:
    return torch.rand(weight.shape[dim], generator=statistics.generator).to(weight.device)


def bn_scale(weight: Tensor, dim: int, statistics: Statistics) -> Tensor | None:
    """Magnitude of a batch norm's scale, which an L1 penalty in training drives to zero.

    Shapes: (channels,) -> (channels,). Source: Liu et al. 2017 (network slimming), arXiv:1708.06519, section 3.
    """
    return weight.abs() if statistics.norm_scale and weight.dim() == 1 else None


def fpgm(weight: Tensor, dim: int, statistics: Statistics) -> Tensor | None:
    """Sum of a filter's distances to all filters of its layer: those near the geometric median are redundant.

    Shapes: (filters, ...) -> (filters,). Source: He et al. 2019, arXiv:1811.00250, section 3.4.
    """
    if weight.dim() < 2 or statistics.role == "in":  # distances are between filters, which make outputs
        return None
    filters = slices(weight, dim).double()
    filters = filters - filters.mean(0)  # changes no distance, and loses fewer digits to cancellation
    return torch.cdist(filters, filters).sum(1)


def lamp(weight: Tensor, statistics: Statistics) -> Tensor:
    """Squared magnitude over the sum of all squares in the layer that are no smaller, comparable between layers.

    Shapes: any -> the same. For channels the same formula with the sums of squares of slices. Among equals the earlier
    counts as smaller. Source: Lee et al. 2021, arXiv:2010.07611, section 3.
    """
    return _over_survivors(weight.double().square().flatten()).reshape(weight.shape)


def _lamp_channels(weight: Tensor, dim: int, statistics: Statistics) -> Tensor:
    return _over_survivors(slices(weight, dim).double().square().sum(1))


def taylor(weight: Tensor, statistics: Statistics) -> Tensor:
    """First-order change of the loss, squared: (w g)**2, for a channel (sum of w g)**2, averaged over batches.

    Shapes: any -> the same. Source: Molchanov et al. 2019, arXiv:1906.10771, section 3.1 (the first-order criterion of
    single parameters, and of sets of them).
    """
    scores: Tensor = _known(statistics.taylor)
    return scores


def _taylor_channels(weight: Tensor, dim: int, statistics: Statistics) -> Tensor:
    scores: Tensor = _known(statistics.slice_taylor)[dim]
    return scores


def taylor_activation(weight: Tensor, dim: int, statistics: Statistics) -> Tensor | None:
    """First-order change of the loss when the channel's output is zeroed: |sum of a da|, averaged over samples.

    Shapes: (..., channels, ...) -> (channels,). Source: Molchanov et al. 2017, arXiv:1611.06440, section 2.2, without
    the division by the number of positions, so that channels of different layers stay comparable in loss.
    """
    return _of_output(statistics.activation_taylor, weight, dim, statistics)


def fisher(weight: Tensor, statistics: Statistics) -> Tensor:
    """Second-order change of the loss with the Fisher information as diagonal Hessian: w**2 E[g**2] / 2.

    Shapes: any -> the same. Source: LeCun et al. 1990 (optimal brain damage), section 2; Theis et al. 2018,
    arXiv:1801.05787, section 2.
    """
    curvature: Tensor = _known(statistics.squared_gradient)
    return 0.5 * weight.to(curvature.dtype).square() * curvature


def activation(weight: Tensor, dim: int, statistics: Statistics) -> Tensor | None:
    """Mean magnitude of the channel's output, behind its activation function.

    Shapes: (..., channels, ...) -> (channels,). Source: Molchanov et al. 2017, arXiv:1611.06440, section 2.2
    (activation).
    """
    return _of_output(statistics.activation, weight, dim, statistics)


def apoz(weight: Tensor, dim: int, statistics: Statistics) -> Tensor | None:
    """Share of the channel's outputs that are not zero, behind its activation function: 1 - APoZ.

    Shapes: (..., channels, ...) -> (channels,). Source: Hu et al. 2016 (network trimming), arXiv:1607.03250,
    section 3.1, eq. 1.
    """
    zeros = _of_output(statistics.zeros, weight, dim, statistics)
    return None if zeros is None else 1 - zeros


def wanda(weight: Tensor, statistics: Statistics) -> Tensor:
    """Magnitude times the norm of the weight's input: |w| ||x||.

    Shapes: any -> the same. The paper ranks the weights of each output separately; scope "layer" and N:M come nearest
    to that. Source: Sun et al. 2024, arXiv:2306.11695, section 3, eq. 1.
    """
    norm: Tensor = _known(statistics.input_norm)
    scores: Tensor = weight.abs() * norm
    return scores


CRITERIA: Mapping[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(name="l1", weights=l1),
        Criterion(name="l2", weights=l2, channels=_l2_channels),
        Criterion(name="random", weights=random, channels=_random_channels),
        Criterion(name="bn_scale", channels=bn_scale),
        Criterion(name="fpgm", channels=fpgm),
        Criterion(name="lamp", weights=lamp, channels=_lamp_channels),
        Criterion(
            name="taylor",
            weights=taylor,
            channels=_taylor_channels,
            needs=frozenset({Statistic.TAYLOR, Statistic.SLICE_TAYLOR}),
        ),
        Criterion(
            name="taylor_activation",
            channels=taylor_activation,
            needs=frozenset({Statistic.ACTIVATION_TAYLOR}),
        ),
        Criterion(name="fisher", weights=fisher, needs=frozenset({Statistic.SQUARED_GRADIENT})),
        Criterion(name="activation", channels=activation, needs=frozenset({Statistic.ACTIVATION})),
        Criterion(name="apoz", channels=apoz, needs=frozenset({Statistic.ZEROS})),
        Criterion(name="wanda", weights=wanda, needs=frozenset({Statistic.INPUT_NORM})),
    )
}


def find_criterion(criterion: str | Scorer | Criterion) -> Criterion:
    """A criterion by its name in `CRITERIA`, by "package.module:name", or a function that scores single weights."""
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion):
        return Criterion(name=getattr(criterion, "__name__", repr(criterion)), weights=criterion)
    if criterion in CRITERIA:
        return CRITERIA[criterion]
    if ":" in criterion:
        resolved: Any = resolve(criterion, "criterion", PruneError)
        if not isinstance(resolved, Criterion) and not callable(resolved):
            raise PruneError(
                f"criterion {criterion!r} must be a function or a Criterion, got {type(resolved).__name__}"
            )
        return find_criterion(resolved)
    raise PruneError(f"criterion {criterion!r} is not known; one of {', '.join(CRITERIA)}, or 'package.module:name'")


def named_by_path(criterion: str | Scorer | Criterion) -> bool:
    """Whether `criterion` is a "package.module:name", which is imported only where it is used."""
    return isinstance(criterion, str) and ":" in criterion


def needs(criterion: str | Scorer | Criterion) -> frozenset[Statistic]:
    """Statistics that must be gathered before the criterion can score."""
    return find_criterion(criterion).needs


def slices(weight: Tensor, dim: int) -> Tensor:
    """The weight as a matrix with one row per slice along `dim`: (slices, weights per slice)."""
    return weight.movedim(dim, 0).reshape(weight.shape[dim], -1)


def _over_survivors(squares: Tensor) -> Tensor:
    """Every square over the sum of itself and all squares ranked above it; shape (n,)."""
    order = squares.argsort(stable=True)
    ranked = squares[order]
    survivors = ranked.flip(0).cumsum(0).flip(0)
    scores = torch.where(survivors > 0, ranked / survivors, 0.0)
    return torch.empty_like(scores).scatter_(0, order, scores)


def _of_output(scores: Tensor | None, weight: Tensor, dim: int, statistics: Statistics) -> Tensor | None:
    # a bias has the same output as its weight, and would only repeat its scores
    if scores is None or statistics.role != "out" or "bias" in statistics.name.rpartition(".")[2]:
        return None
    return scores if scores.shape == weight.shape[dim : dim + 1] else None


def _known(value: Any) -> Any:
    assert value is not None  # `silence` has checked
    return value
