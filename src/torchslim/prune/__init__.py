"""Pruning: scores (criteria), weights removed together (patterns), how much (sparsity) and when (schedule)."""

from typing import TYPE_CHECKING

from torchslim.core.lazy_names import lazy_names

if TYPE_CHECKING:
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

_HOMES = {
    "BLOCK_CRITERIA": "depth.scores",
    "CRITERIA": "criteria.registry",
    "PATTERNS": "masking.patterns",
    "ChannelGroup": "structured.inspection",
    "Criterion": "criteria.registry",
    "HeldZeros": "masking.masks",
    "Inspection": "structured.inspection",
    "Prune": "step",
    "ResidualBlock": "structured.inspection",
    "Sparsity": "masking.masks",
    "Statistic": "criteria.statistics",
    "Statistics": "criteria.statistics",
    "apply_surgery": "structured.record",
    "blocks": "functional",
    "channels": "functional",
    "hold_zeros": "masking.masks",
    "inspect": "structured.inspection",
    "sparsity": "masking.masks",
    "surgery": "structured.record",
    "weights": "functional",
}
if not TYPE_CHECKING:  # type checkers know the names from the imports above
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
