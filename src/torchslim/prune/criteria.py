"""What a weight is worth: `criterion(weight, statistics) -> scores` of the weight's shape; low scores go first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchslim.errors import PruneError
from torchslim.steps import resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What a criterion may use besides the weight: the parameter's path, and randomness."""

    name: str
    generator: torch.Generator


Criterion = Callable[[Tensor, Statistics], Tensor]


def l1(weight: Tensor, statistics: Statistics) -> Tensor:
    """Magnitude |w|.

    Shapes: any -> the same. Source: Han et al. 2015, arXiv:1506.02626, section 3.
    """
    return weight.abs()


def random(weight: Tensor, statistics: Statistics) -> Tensor:
    """Uniform scores in [0, 1), by the run's seed: the baseline that a criterion must beat.

    Shapes: any -> the same.
    """
    scores = torch.rand(weight.shape, generator=statistics.generator)
    return scores.to(weight.device)


CRITERIA: Mapping[str, Criterion] = {"l1": l1, "random": random}


def find_criterion(criterion: str | Criterion) -> Criterion:
    """A criterion by its name in `CRITERIA`, by "package.module:name", or as it is."""
    if callable(criterion):
        return criterion
    if criterion in CRITERIA:
        return CRITERIA[criterion]
    if ":" in criterion:
        found: Criterion = resolve(criterion, "criterion", PruneError)
        return found
    raise PruneError(f"criterion {criterion!r} is not known; one of {', '.join(CRITERIA)}, or 'package.module:name'")


def score(criterion: Criterion, weight: Tensor, statistics: Statistics) -> Tensor:
    """The criterion's scores, checked; at least float32, so that halves are not ranked by rounded norms."""
    with torch.no_grad():
        scores = criterion(weight.detach().clone(), statistics)  # the criterion may work in place
    name = getattr(criterion, "__name__", repr(criterion))
    if not isinstance(scores, Tensor) or scores.shape != weight.shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise PruneError(f"criterion {name!r} must return scores of shape {tuple(weight.shape)}, got {got}")
    if not torch.isfinite(scores).all():
        raise PruneError(f"criterion {name!r} gave scores that are not finite for {statistics.name!r}")
    if not scores.is_floating_point():
        return scores.double()  # whole numbers: exact up to 2**53
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
