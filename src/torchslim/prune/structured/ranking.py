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
    priors: Mapping[str, float] = field(default_factory=dict)  # by group or layer, how much its changes hurt

    def scores(self, model: nn.Module, plan: Plan) -> Scores:
        """A function of coupling and group, for `shrink`."""
        generator = torch.Generator().manual_seed(self.seed)
        weights: dict[str, torch.Tensor] = {
            name: each for name, each in model.named_parameters() if each.is_floating_point()
        }
        if not needs(self.criterion):  # complex weights by their magnitudes; what data gives is for real ones
            weights |= {name: each.detach().abs() for name, each in model.named_parameters() if each.is_complex()}
        known: dict[tuple[str, int], torch.Tensor | None] = {}

        def member(name: str, dim: int) -> torch.Tensor | None:
            if (name, dim) not in known:
                statistics = self.gathered.of(
                    name,
                    generator=generator,
                    role=plan.trace.roles.get((name, dim), "other"),
                    norm_scale=name in plan.trace.norm_scales,
                )
                known[name, dim] = channel_scores(self.criterion, weights[name], dim, statistics)
            return known[name, dim]

        def score(coupling: Coupling, group: Group) -> NDArray[np.float64]:
            members = []
            for each in group.members:
                found = member(each.weight, each.dim) if each.weight in weights else None
                if found is not None:
                    members.append((torch.from_numpy(each.classes), found[torch.from_numpy(each.indices)]))
            if not members:  # of a criterion that looks at norms, say: all alike
                return np.ones(len(group.classes))
            combined = combine(members, len(group.classes), reduction=self.reduction, normalization=self.normalization)
            return combined.numpy() * self._prior(group)

        return score

    def _prior(self, group: Group) -> float:
        names = (group.name, group.members[0].weight.rpartition(".")[0])
        return next((self.priors[name] for name in names if name in self.priors), 1.0)
