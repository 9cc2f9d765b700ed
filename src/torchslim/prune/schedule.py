"""Schedules: how much has been removed at each point of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchslim.errors import PruneError
from torchslim.training.finetune import Training

ScheduleKind = Literal["one-shot", "iterative", "gradual"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How the removal is spread: at once, over rounds of pruning and training, or over one training."""

    kind: ScheduleKind = "one-shot"
    rounds: int = 3
    until: float = 0.75  # the fraction of the training after which a gradual schedule ends
    train: Training | None = None

    def __post_init__(self) -> None:
        if self.kind != "one-shot" and self.train is None:
            raise PruneError(f"schedule {self.kind!r} needs train=Finetune(...) or Distill(...)")
        if self.rounds < 1:
            raise PruneError(f"rounds must be a whole number of at least 1, got {self.rounds}")
        if not 0 < self.until <= 1:
            raise PruneError(f"until must be in (0, 1], the fraction of the training, got {self.until}")

    def targets(self, sparsity: float) -> list[float]:
        """The sparsity after each round."""
        return rounds(sparsity, self.rounds if self.kind == "iterative" else 1)


def cubic(progress: float) -> float:
    """The fraction of the final sparsity at `progress` in [0, 1]: fast while many weights are idle, slow at the end.

    Source: Zhu & Gupta 2017, arXiv:1710.01878, section 3, with initial sparsity 0 and final sparsity 1.
    """
    progress = min(max(progress, 0.0), 1.0)
    return 1 - (1 - progress) ** 3


def rounds(sparsity: float, count: int) -> list[float]:
    """The sparsity after each of `count` rounds that each remove the same fraction of the remaining weights.

    Source: Frankle & Carbin 2019, arXiv:1803.03635, section 2 (iterative pruning).
    """
    return [1 - (1 - sparsity) ** (index / count) for index in range(1, count)] + [sparsity]
