"""Recalibration of the running statistics of batch norms, which any change of the layers before them invalidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchslim.core.batches import Batch, checked
from torchslim.core.train_modes import eval_mode
from torchslim.core.trees import device_of, to_device

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def tracked(model: nn.Module) -> list[_BatchNorm]:
    """List the batch norms that keep running statistics."""
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
    """Replace the running statistics of batch norms by averages over `batches`; return the number of norms replaced.

    The mean and the unbiased variance of each batch have equal weight: batches should have one size, of at least about
    ten samples. All other modules run in eval mode, so that only these statistics change. Modes, momenta and the
    statistics of a norm that no batch reaches stay the same. When `forward` raises, the old statistics are restored.

    Args:
        model: changed in place.
        forward: called with the model and a batch, such as `Task.forward`.
        batches: inputs; labels are not needed.

    Raises:
        TaskError: there are no batches.
    """
    norms = tracked(model)
    momenta = [norm.momentum for norm in norms]
    before = [[getattr(norm, name).clone() for name in STATISTICS] for norm in norms]
    reached = 0
    finished = False
    with eval_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.training = True
        try:
            for batch in checked(batches, "calibration"):
                forward(model, to_device(batch, device_of(model)))
            finished = True
        finally:
            for norm, momentum, old in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                if finished and int(norm.num_batches_tracked):  # type: ignore[arg-type]
                    reached += 1
                    continue
                for name, value in zip(STATISTICS, old, strict=True):
                    getattr(norm, name).copy_(value)
    return reached
