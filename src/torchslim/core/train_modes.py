"""Train and eval modes of a model, module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Set every module's `training` back at the end to the value that it has now, also when a batch fails."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, without calling the modules' own `eval`, which some override."""
    with modes_restored(model):
        for module in model.modules():
            module.training = False
        yield
