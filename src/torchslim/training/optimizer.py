"""Settings of the optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from torchslim.core.checks import check_fields
from torchslim.core.imports import resolve
from torchslim.errors import TrainError

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Settings of the optimizer and its learning rate.

    `optimizer` is "sgd" (Nesterov momentum), "adamw", or a factory `params -> Optimizer` (in a recipe
    "package.module:name"). Biases and norms (tensors of at most one dimension) have no weight decay. `warmup` is the
    fraction of the training in which the learning rate rises linearly from zero.
    """

    optimizer: Literal["sgd", "adamw"] | str | Callable[[Iterable[Any]], Optimizer] = "adamw"
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 1e-2
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, TrainError)
        optimizer = self.optimizer
        for name, valid, rule in (
            (
                "optimizer",
                callable(optimizer) or optimizer in OPTIMIZERS or ":" in optimizer,
                f"one of {', '.join(OPTIMIZERS)}, a function params -> Optimizer, or 'package.module:name'",
            ),
            ("lr", self.lr > 0 and math.isfinite(self.lr), "a finite number above 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0"),
            ("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "above 0"),
        ):
            if not valid:
                raise TrainError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    def factory(self) -> Callable[[Iterable[Any]], Optimizer] | None:
        """Return the user's optimizer factory, imported if it is given by name; None for the built-in optimizers."""
        if callable(self.optimizer):
            return self.optimizer
        if self.optimizer in OPTIMIZERS:
            return None
        factory: Callable[[Iterable[Any]], Optimizer] = resolve(self.optimizer, "optimizer", TrainError)
        return factory

    def build(self, model: nn.Module, companion: nn.Module | None = None) -> Optimizer:
        """Make the optimizer of the trainable parameters of a model and its companion."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise TrainError("the model has no trainable parameter; set requires_grad on what should be trained")
        parameters += (
            [parameter for parameter in companion.parameters() if parameter.requires_grad] if companion else []
        )
        factory = self.factory()
        if factory is not None:
            made = factory(parameters)
            if not isinstance(made, Optimizer):
                raise TrainError(
                    f"the optimizer factory {self.optimizer!r} must return a torch Optimizer, got {type(made).__name__}"
                )
            return made
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimizer == "sgd":
            return SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)
        return AdamW(groups, lr=self.lr)

    def factor(self, progress: float) -> float:
        """Return the factor of the learning rate at a progress in [0, 1]."""
        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))
