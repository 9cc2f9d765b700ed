"""Weights that stay zero while an optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchslim.core.distributed import local, share, spread
from torchslim.errors import TrainError


class MaskKeeper:
    """Holds masked weights at zero: gradients, weights, and what the optimizer remembers of them."""

    def __init__(self, parameters: Mapping[str, Tensor], optimizer: Optimizer, masks: Mapping[str, Tensor]) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.masks: dict[str, Tensor] = {}
        self.dropped: list[tuple[Tensor, Tensor]] = []
        self.follow(masks)

    def follow(self, masks: Mapping[str, Tensor]) -> None:
        """Hold these masks from now on; costs nothing while they are the same tensors."""
        if masks.keys() == self.masks.keys() and all(masks[name] is self.masks[name] for name in masks):
            return
        check_masks(masks, self.parameters)
        self.masks = dict(masks)
        for name, mask in masks.items():  # each process may have chosen by what it alone has seen
            share([mask], through=self.parameters[name].device)
        held = [(self.parameters[name], mask) for name, mask in masks.items()]
        self.dropped = [(each, local(spread(~mask.to(each.device), each))) for each, mask in held]

    @torch.no_grad()
    def before_step(self, *_: Any) -> None:
        """Clear the gradients of held weights, so that momentum and clipping never see them."""
        for parameter, dropped in self.dropped:
            if parameter.grad is not None:
                local(parameter.grad).masked_fill_(dropped, 0)

    @torch.no_grad()
    def after_step(self, *_: Any) -> None:
        """Clear held weights and their optimizer state (weight decay and old momentum included)."""
        for parameter, dropped in self.dropped:
            local(parameter).masked_fill_(dropped, 0)
            for value in self.optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    local(value).masked_fill_(dropped, 0)


def check_masks(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise TrainError for a mask that fits no parameter: an unknown name, another shape, or not boolean."""
    unknown = sorted(set(masks) - set(parameters))
    if unknown:
        raise TrainError(f"masks name parameters that the model does not have: {', '.join(unknown)}")
    for name, mask in masks.items():
        if mask.is_meta:
            raise TrainError(f"the mask of {name!r} is on the meta device and has no values; give a mask with values")
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise TrainError(
                f"the mask of {name!r} must be boolean (True where kept) and of shape "
                f"{tuple(parameters[name].shape)}, got {mask.dtype} of shape {tuple(mask.shape)}"
            )
