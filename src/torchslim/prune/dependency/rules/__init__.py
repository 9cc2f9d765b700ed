"""What each operation does to tags. An operation without a rule freezes what goes into it; it is never an error.

Operations are seen as the dispatcher sees them, below `linear`, `einsum` or `scaled_dot_product_attention`, so that a
few dozen rules serve every model. Pointwise operations are known by their tag, views are applied to the layers.
"""

from torchslim.prune.dependency.rules import (  # each registers its rules
    elementwise,
    layout,
    products,
    sequences,
    spectral,
)
from torchslim.prune.dependency.rules.registry import RULES, Call, apply, rule

__all__ = ["RULES", "Call", "apply", "elementwise", "layout", "products", "rule", "sequences", "spectral"]
