"""Settings of the optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from torchslim.core.checks import check_fields, shown
from torchslim.core.imports import resolve
from torchslim.core.layer_patterns import covering
from torchslim.errors import SelectError, TrainError

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant")
LR_SCALE = "torchslim_lr_scale"  # key of an optimizer's group: the factor that its learning rate contains


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Settings of the optimizer, its learning rate and its steps.

    Args:
        optimizer: "sgd" (Nesterov momentum), "adamw", or a factory `params -> Optimizer` (in a recipe
            "package.module:name"). Biases and norms (tensors of at most one dimension) have no weight decay.
        lr: the highest learning rate.
        schedule: the learning rate after the warmup: down to zero along a cosine, or constant.
        warmup: fraction of the training in which the learning rate rises linearly from zero.
        clip_norm: largest joint norm of the gradients of a step.
        accumulate: batches of one optimizer step, which follows the mean of their losses; the last step of an epoch
            takes the batches that remain. Losses that compare samples see those of one batch.
        average: decay of a moving average of the weights over the steps, such as 0.999; evaluation, the best epoch and
            the result use the averaged weights. `WeightAverage` documents it. None: the weights themselves.
        lr_scale: factors of the learning rate by glob over parameters and layers or "type:NAME"; the last pattern that
            matches counts. 0 freezes the weights (batch norms still update their statistics).
    """

    optimizer: Literal["sgd", "adamw"] | str | Callable[[Iterable[Any]], Optimizer] = "adamw"
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 1e-2
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    clip_norm: float | None = None
    accumulate: int = 1
    average: float | None = None
    lr_scale: Mapping[str, float] = field(default_factory=dict, hash=False)

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
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("average", self.average is None or 0 <= self.average < 1, "in [0, 1), such as 0.999"),
        ):
            if not valid:
                raise TrainError(f"{name} must be {rule}, got {getattr(self, name)!r}")
        for pattern, factor in self.lr_scale.items():
            if not 0 <= factor < math.inf:
                raise TrainError(
                    f"lr_scale must be finite numbers of at least 0, by pattern, got {factor} for {shown(pattern)}"
                )

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
        factors = self.factors(model)
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        parameters: list[Tensor] = [parameter for name, parameter in named.items() if factors.get(name) != 0]
        if not parameters:
            scaled = (
                f", and scale its learning rate by more than 0 in lr_scale={shown(self.lr_scale)}" if factors else ""
            )
            raise TrainError(
                f"the model has no trainable parameter; set requires_grad on what should be trained{scaled}"
            )
        parameters += (
            [parameter for parameter in companion.parameters() if parameter.requires_grad] if companion else []
        )
        optimizer = self._optimizer(parameters)
        if factors:
            _scale(optimizer, {named[name]: factor for name, factor in factors.items() if name in named})
        return optimizer

    def _optimizer(self, parameters: list[Tensor]) -> Optimizer:
        """Make the optimizer of these parameters, with one learning rate."""
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

    def factors(self, model: nn.Module) -> dict[str, float]:
        """Return the factors of `lr_scale` by parameter of the model; parameters without a pattern are left out.

        Raises:
            SelectError: a pattern matches no layer or parameter, with the nearest names.
        """
        if not self.lr_scale:
            return {}
        return {name: self.lr_scale[pattern] for name, pattern in covering(self.lr_scale, model).items()}

    def check_patterns(self, model: nn.Module) -> None:
        """Raise SelectError for a pattern of `lr_scale` that covers no parameter."""
        for pattern in self.lr_scale:
            if not covering([pattern], model):
                raise SelectError(
                    f"pattern {pattern!r} of lr_scale matches only layers without parameters; leave it out"
                )

    @contextmanager
    def freezing(self, model: nn.Module) -> Iterator[None]:
        """Let no gradients be computed for parameters whose learning rate is scaled by 0, inside a block."""
        factors = self.factors(model)
        frozen = [
            parameter
            for name, parameter in model.named_parameters()
            if factors.get(name) == 0 and parameter.requires_grad
        ]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def factor(self, progress: float) -> float:
        """Return the factor of the learning rate at a progress in [0, 1]."""
        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


def _scale(optimizer: Optimizer, factors: Mapping[Tensor, float]) -> None:
    """Split the groups of a new optimizer, so that each has one factor, and scale their learning rates.

    Splitting after the fact works with any optimizer: a factory always gets a plain list of parameters.
    """
    optimizer.param_groups[:] = [
        {
            **group,
            "params": [parameter for parameter in group["params"] if factors.get(parameter, 1.0) == factor],
            "lr": group["lr"] * factor,
            LR_SCALE: factor,
        }
        for group in optimizer.param_groups
        for factor in dict.fromkeys(factors.get(parameter, 1.0) for parameter in group["params"])
    ]
