"""Pruning: what a weight is worth (criteria), what goes together (patterns), how much (budget), when (schedule)."""

from torchslim.prune.criteria import CRITERIA, Criterion
from torchslim.prune.inspect import ChannelGroup, Inspection, inspect
from torchslim.prune.patterns import PATTERNS
from torchslim.prune.record import surgery
from torchslim.prune.removal import channels
from torchslim.prune.sparsify import HeldZeros, Sparsity, hold_zeros, sparsity
from torchslim.prune.step import Prune, weights
from torchslim.statistics import Statistic, Statistics

__all__ = [
    "CRITERIA",
    "PATTERNS",
    "ChannelGroup",
    "Criterion",
    "HeldZeros",
    "Inspection",
    "Prune",
    "Sparsity",
    "Statistic",
    "Statistics",
    "channels",
    "hold_zeros",
    "inspect",
    "sparsity",
    "surgery",
    "weights",
]
