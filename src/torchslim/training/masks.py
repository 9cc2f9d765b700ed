"""Masked weights, held at zero while an optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchslim.core.distributed import local, share, spread
from torchslim.errors import TrainError


class MaskKeeper:
    """Holds masked weights at zero, with their gradients and optimizer state."""

    def __init__(self, parameters: Mapping[str, Tensor], optimizer: Optimizer, masks: Mapping[str, Tensor]) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.masks: dict[str, Tensor] = {}
        self.dropped: dict[str, Tensor] = {}
        self.follow(masks)

    def follow(self, masks: Mapping[str, Tensor]) -> None:
        """Use these masks from now on; does nothing while they are the same tensors."""
        if masks.keys() == self.masks.keys() and all(masks[name] is self.masks[name] for name in masks):
            return
        check_masks(masks, self.parameters)
        self.masks = dict(masks)
        for name, mask in masks.items():  # the masks of a process may come from its own batches only
            share([mask], through=self.parameters[name].device)
        pairs = [(name, self.parameters[name], mask) for name, mask in masks.items()]
        self.dropped = {name: local(spread(~mask.to(parameter.device), parameter)) for name, parameter, mask in pairs}

    @torch.no_grad()
    def before_step(self, *_: Any) -> None:
        """Zero the gradients of masked weights, so that they do not count in momentum and clipping."""
        for name, dropped in self.dropped.items():
            if (gradient := self.parameters[name].grad) is not None:
                local(gradient).masked_fill_(dropped, 0)

    @torch.no_grad()
    def after_step(self, *_: Any) -> None:
        """Zero masked weights and their optimizer state (weight decay and old momentum included)."""
        self.zero(self.parameters)
        for name, dropped in self.dropped.items():
            parameter = self.parameters[name]
            for value in self.optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    local(value).masked_fill_(dropped, 0)

    @torch.no_grad()
    def zero(self, values: Mapping[str, Tensor]) -> None:
        """Zero the entries of masked weights in tensors that are named like the parameters."""
        for name, dropped in self.dropped.items():
            local(values[name]).masked_fill_(dropped, 0)


def check_masks(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise TrainError for a mask that fits no parameter: unknown name, other shape, not boolean, or without values."""
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
