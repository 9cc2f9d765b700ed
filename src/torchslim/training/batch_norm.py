"""Running statistics of batch norms, taken again from data: what every change of the layers before them puts out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchslim.core.batches import Batch, checked
from torchslim.core.trees import device_of, to_device

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def tracked(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and all(isinstance(getattr(module, name), Tensor) for name in STATISTICS)
    ]


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module, forward: Callable[[nn.Module, Batch], Any], batches: Iterable[Batch]
) -> int:
    """Replace the running statistics of all batch norms by the average over `batches`; returns how many were reached.

    The mean and the unbiased variance of each batch count the same: batches should be of one size, and of at least some
    ten samples. Everything else runs in eval mode, so that nothing but these statistics changes: neither modes nor
    momenta, nor the statistics of a norm that no batch reaches. When `forward` raises, the old ones come back.

    Args:
        model: changed in place.
        forward: called with the model and a batch, such as `Task.forward`.
        batches: inputs; labels are not needed.

    Raises:
        TaskError: no batches.
    """
    norms = tracked(model)
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    before = [[getattr(norm, name).clone() for name in STATISTICS] for norm in norms]
    for module, _ in modes:
        module.training = False
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.training = True
    finished = False
    try:
        for batch in checked(batches, "calibration"):
            forward(model, to_device(batch, device_of(model)))
        finished = True
    finally:
        reached = 0
        for norm, momentum, old in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            if finished and int(norm.num_batches_tracked):  # type: ignore[arg-type]
                reached += 1
                continue
            for name, value in zip(STATISTICS, old, strict=True):
                getattr(norm, name).copy_(value)
        for module, training in modes:
            module.training = training
    return reached
