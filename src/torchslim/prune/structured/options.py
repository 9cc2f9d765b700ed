"""The options of channel pruning that `Prune(pattern="channel")` and `ts.prune.channels` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torchslim.core.layer_patterns import Patterns
from torchslim.core.step import Inputs
from torchslim.prune.criteria.registry import Criterion, Scorer, find_criterion
from torchslim.prune.criteria.scoring import Normalization, Reduction, check_combination
from torchslim.prune.criteria.statistics import Gathered
from torchslim.prune.dependency.resolve import Heads
from torchslim.prune.structured.plan import Plan, UnseenCode, analyze
from torchslim.prune.structured.ranking import Ranking
from torchslim.prune.structured.selection import Amount

NO_PRIORS: Mapping[str, float] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelOptions:
    """How much to remove, from which groups, and ranked by which criterion."""

    amount: Amount = field(default_factory=Amount)
    criterion: str | Criterion | Scorer = "lamp"
    heads: Heads = "auto"
    include: Patterns = None
    exclude: Patterns = None
    reduction: Reduction = "mean"
    normalization: Normalization = "mean"
    unseen: UnseenCode = "keep"

    def __post_init__(self) -> None:
        check_combination(self.reduction, self.normalization)

    def plan(self, model: nn.Module, inputs: Inputs, examples: Sequence[Any] = ()) -> Plan:
        """The analyzed model, with its coupled groups; `examples` are further calls of the model."""
        return analyze(
            model,
            inputs,
            heads=self.heads,
            include=self.include,
            exclude=self.exclude,
            examples=examples,
            unseen=self.unseen,
        )

    def ranking(self, gathered: Gathered, seed: int, priors: Mapping[str, float] = NO_PRIORS) -> Ranking:
        """The ranking that scores the groups of a plan by the criterion."""
        return Ranking(
            criterion=find_criterion(self.criterion),
            reduction=self.reduction,
            normalization=self.normalization,
            gathered=gathered,
            seed=seed,
            priors=priors,
        )
