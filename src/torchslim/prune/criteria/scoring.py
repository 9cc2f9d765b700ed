"""Scores by a criterion: checked, and combined over coupled channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from torchslim.errors import PruneError
from torchslim.prune.criteria.registry import CRITERIA, Criterion, Scorer, find_criterion, slices
from torchslim.prune.criteria.statistics import Statistics

Reduction = Literal["mean", "sum", "max", "first"]
Normalization = Literal["none", "mean", "max", "gaussian"]


def check_ranks_weights(criterion: Criterion) -> None:
    """Raise PruneError for a criterion that ranks channels only."""
    if criterion.weights is None:
        names = ", ".join(name for name, entry in CRITERIA.items() if entry.weights is not None)
        raise PruneError(
            f"criterion {criterion.name!r} ranks whole channels, not single weights; those that can: {names}"
        )


def silence(criterion: Criterion, statistics: Statistics) -> str:
    """The reason why the criterion cannot score this weight; empty if it can.

    Raises:
        PruneError: the criterion needs data, and none was given.
    """
    if criterion.needs - statistics.gathered:
        labels = " with labels" if criterion.needs_loss else ""
        data_free = ", ".join(name for name, entry in CRITERIA.items() if not entry.needs)
        raise PruneError(
            f"criterion {criterion.name!r} needs data; give batches=...{labels}, or a task that has some. Criteria "
            f"that need none: {data_free}"
        )
    missing = sorted(need.value for need in criterion.needs if getattr(statistics, need.value) is None)
    return f"the data shows no {' and '.join(missing)} of it; it is unused, or not called as a layer" if missing else ""


@torch.no_grad()
def score(criterion: Criterion, weight: Tensor, statistics: Statistics) -> Tensor:
    """Checked scores of single weights, at least float32, so that halves are not ranked by rounded norms.

    Raises:
        PruneError: the criterion ranks channels only, has no data, or gave scores that cannot be used.
    """
    check_ranks_weights(criterion)
    assert criterion.weights is not None
    if reason := silence(criterion, statistics):
        raise PruneError(f"criterion {criterion.name!r} cannot score {statistics.name!r}: {reason}")
    scores = criterion.weights(weight.detach().clone(), statistics)  # the criterion may work in place
    return _checked(scores, weight.shape, criterion, statistics)


@torch.no_grad()
def channel_scores(
    criterion: str | Scorer | Criterion, weight: Tensor, dim: int, statistics: Statistics
) -> Tensor | None:
    """Scores of the slices of `weight` along `dim`: (weight.shape[dim],), at least float32.

    None if the criterion cannot score them: `bn_scale` of a convolution, `activation` of inputs, and weights that no
    data has reached.

    Raises:
        PruneError: the criterion needs data and there is none, or it gave scores that cannot be used.
    """
    criterion, dim = find_criterion(criterion), dim % weight.dim()
    if silence(criterion, statistics):
        return None
    if criterion.channels is None:
        return slices(score(criterion, weight, statistics), dim).sum(1)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    scores = criterion.channels(wide, dim, statistics)
    return None if scores is None else _checked(scores, weight.shape[dim : dim + 1], criterion, statistics)


def check_combination(reduction: Any, normalization: Any) -> None:
    """Raise PruneError for a reduction or normalization that `combine` does not know."""
    for option, value, choices in (
        ("reduction", reduction, get_args(Reduction)),
        ("normalization", normalization, get_args(Normalization)),
    ):
        if value not in choices:
            raise PruneError(f"{option} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def combine(
    members: Sequence[tuple[Tensor, Tensor]],
    size: int,
    *,
    reduction: Reduction = "mean",
    normalization: Normalization = "mean",
) -> Tensor:
    """One score per class of coupled channels, from the scores of a group's members.

    Within a member, slices of one class are summed. Members without scores for a class do not count for it. A class
    that no member scores gets the mean of the other classes, before the normalization.

    Args:
        members: each a pair of class indices (n,), -1 outside the group, and scores (n,).
        size: how many classes the group has.
        reduction: over the members; "first" takes the first that scores the class.
        normalization: of the group's scores: "mean" and "max" divide by the mean or maximum of their magnitudes;
            "gaussian" subtracts their mean and divides by their standard deviation. Scores that are all zero stay
            zero; scores that are all equal become zero under "gaussian".

    Returns:
        (size,), float64, on the CPU, as the members may live on several devices.
    """
    check_combination(reduction, normalization)
    if not members:
        raise PruneError("no member of the group has scores; choose a criterion that says something of its layers")
    values = torch.zeros(len(members), size, dtype=torch.float64)
    counts = torch.zeros(len(members), size, dtype=torch.bool)
    for row, (classes, scores) in enumerate(members):
        inside = (classes >= 0).cpu()
        index = classes.cpu()[inside]
        values[row].index_add_(0, index, scores.detach().cpu().double()[inside])
        counts[row, index] = True
    member_counts = counts.sum(0)
    if reduction == "max":
        total = values.masked_fill(~counts, -torch.inf).amax(0)
    elif reduction == "first":
        total = values.gather(0, counts.int().argmax(0, keepdim=True)).squeeze(0)
    else:
        total = values.sum(0) / (member_counts.clamp(min=1) if reduction == "mean" else 1)
    if bool((member_counts == 0).any()):
        scored = total[member_counts > 0]
        total = total.masked_fill(member_counts == 0, float(scored.mean()) if len(scored) else 0.0)
    return _normalized(total, normalization)


def _normalized(scores: Tensor, normalization: Normalization) -> Tensor:
    if normalization == "none" or not scores.numel():
        return scores
    largest = scores.abs().max()
    if largest == 0:
        return scores
    scores = scores / largest  # divided first, so that no sum or square leaves the range of floats
    if normalization == "max":
        return scores
    if normalization == "mean":
        return scores / scores.abs().mean()
    centered = scores - scores.mean()
    deviation = centered.square().mean().sqrt()
    if deviation <= 1e-12:  # equal up to rounding, which must not become a ranking
        return torch.zeros_like(scores)
    return centered / deviation


def _checked(scores: Any, shape: torch.Size, criterion: Criterion, statistics: Statistics) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != shape:
        actual = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise PruneError(f"criterion {criterion.name!r} must return scores of shape {tuple(shape)}, got {actual}")
    if not torch.isfinite(scores).all():
        raise PruneError(f"criterion {criterion.name!r} gave scores that are not finite for {statistics.name!r}")
    if not scores.is_floating_point():
        return scores.double()  # whole numbers: exact up to 2**53
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
