"""Scores of channels, by criterion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from torchslim.prune.criteria.registry import Criterion, needs
from torchslim.prune.criteria.scoring import Normalization, Reduction, channel_scores, combine
from torchslim.prune.criteria.statistics import Gathered
from torchslim.prune.dependency.coupling import Coupling
from torchslim.prune.dependency.groups import Group
from torchslim.prune.structured.plan import Plan
from torchslim.prune.structured.selection import Scores


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How the classes of a group are scored: a criterion over its members, reduced and normalized."""

    criterion: Criterion
    reduction: Reduction = "mean"
    normalization: Normalization = "mean"
    gathered: Gathered = field(default_factory=Gathered)
    seed: int = 0
    priors: Mapping[str, float] = field(default_factory=dict)  # factors of scores: the damage by group or layer

    def scores(self, model: nn.Module, plan: Plan) -> Scores:
        """The function from a coupling and a group to scores that `shrink` takes."""
        generator = torch.Generator().manual_seed(self.seed)
        weights: dict[str, torch.Tensor] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()
        }
        if not needs(self.criterion):  # complex weights by magnitude; statistics of data are for real weights only
            weights |= {
                name: parameter.detach().abs() for name, parameter in model.named_parameters() if parameter.is_complex()
            }
        cache: dict[tuple[str, int], torch.Tensor | None] = {}

        def member(name: str, dim: int) -> torch.Tensor | None:
            if (name, dim) not in cache:
                statistics = self.gathered.of(
                    name,
                    generator=generator,
                    role=plan.trace.roles.get((name, dim), "other"),
                    norm_scale=name in plan.trace.norm_scales,
                )
                cache[name, dim] = channel_scores(self.criterion, weights[name], dim, statistics)
            return cache[name, dim]

        def score(coupling: Coupling, group: Group) -> NDArray[np.float64]:
            members = []
            for slices in group.members:
                values = member(slices.weight, slices.dim) if slices.weight in weights else None
                if values is not None:
                    members.append((torch.from_numpy(slices.classes), values[torch.from_numpy(slices.indices)]))
            if not members:  # as with a criterion of norm scales: all classes are alike
                return np.ones(len(group.classes))
            combined = combine(members, len(group.classes), reduction=self.reduction, normalization=self.normalization)
            return combined.numpy() * self._prior(group)

        return score

    def _prior(self, group: Group) -> float:
        names = (group.name, group.members[0].weight.rpartition(".")[0])
        return next((self.priors[name] for name in names if name in self.priors), 1.0)
