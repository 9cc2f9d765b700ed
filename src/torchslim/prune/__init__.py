"""Pruning: what a weight is worth (criteria), what goes together (patterns), how much (budget), when (schedule)."""

from torchslim.prune.criteria import CRITERIA, Criterion, Statistics
from torchslim.prune.patterns import PATTERNS
from torchslim.prune.sparsify import HeldZeros, Sparsity, hold_zeros, sparsity
from torchslim.prune.step import Prune, weights

__all__ = [
    "CRITERIA",
    "PATTERNS",
    "Criterion",
    "HeldZeros",
    "Prune",
    "Sparsity",
    "Statistics",
    "hold_zeros",
    "sparsity",
    "weights",
]
