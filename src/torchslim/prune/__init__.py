"""Pruning: scores (criteria), weights removed together (patterns), how much (sparsity) and when (schedule)."""

from torchslim.prune.criteria.registry import CRITERIA, Criterion
from torchslim.prune.criteria.statistics import Statistic, Statistics
from torchslim.prune.depth.scores import BLOCK_CRITERIA
from torchslim.prune.functional import blocks, channels, weights
from torchslim.prune.masking.masks import HeldZeros, Sparsity, hold_zeros, sparsity
from torchslim.prune.masking.patterns import PATTERNS
from torchslim.prune.step import Prune
from torchslim.prune.structured.inspection import ChannelGroup, Inspection, ResidualBlock, inspect
from torchslim.prune.structured.record import apply_surgery, surgery

__all__ = [
    "BLOCK_CRITERIA",
    "CRITERIA",
    "PATTERNS",
    "ChannelGroup",
    "Criterion",
    "HeldZeros",
    "Inspection",
    "Prune",
    "ResidualBlock",
    "Sparsity",
    "Statistic",
    "Statistics",
    "apply_surgery",
    "blocks",
    "channels",
    "hold_zeros",
    "inspect",
    "sparsity",
    "surgery",
    "weights",
]
