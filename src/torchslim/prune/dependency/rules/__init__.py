"""Rules that carry tags through operations; an operation without a rule freezes its inputs and is never an error.

Rules apply to operations of the dispatcher, below `linear`, `einsum` or `scaled_dot_product_attention`, so that a few
dozen rules serve every model. Pointwise operations are recognized by their tag; views are applied to the layers.
"""

from torchslim.prune.dependency.rules import (  # every module registers its rules
    elementwise,
    layout,
    products,
    sequences,
    spectral,
)
from torchslim.prune.dependency.rules.registry import RULES, Call, apply, rule

__all__ = ["RULES", "Call", "apply", "elementwise", "layout", "products", "rule", "sequences", "spectral"]
