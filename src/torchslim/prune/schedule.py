"""When it goes: `schedule(progress)` is the fraction of the final sparsity reached, for progress in [0, 1]."""

from __future__ import annotations


def cubic(progress: float) -> float:
    """Fast while many weights are idle, slow at the end.

    Source: Zhu & Gupta 2017, arXiv:1710.01878, section 3, with initial sparsity 0 and final sparsity 1.
    """
    progress = min(max(progress, 0.0), 1.0)
    return 1 - (1 - progress) ** 3


def rounds(sparsity: float, count: int) -> list[float]:
    """The sparsity after each of `count` rounds that each remove the same fraction of what is left.

    Source: Frankle & Carbin 2019, arXiv:1803.03635, section 2 (iterative pruning).
    """
    return [1 - (1 - sparsity) ** (index / count) for index in range(1, count)] + [sparsity]
