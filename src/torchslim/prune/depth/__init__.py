"""Depth pruning: find residual blocks, remove them, and verify the result."""
