"""Sensitivity of a model to pruning and quantization, and its measures."""
