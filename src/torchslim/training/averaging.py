"""Moving average of the weights of a model that trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from torchslim.core.distributed import local, share, spread
from torchslim.errors import TrainError

AVERAGED_BUFFERS = ("running_mean", "running_var")


class WeightAverage:
    """Exponential moving average of a model's weights, from those before the first step on.

    Step t keeps min(decay, (1 + t) / (10 + t)) of the average. Without this warmup, a short training would end near its
    initial weights: with a decay of 0.999, these would keep a weight of 0.37 after 1000 steps.

    The running statistics of norms are averaged as the weights, since they describe the activations of these; torch's
    `AveragedModel` offers this as `use_buffers=True`. It averages all buffers, though, and some have no meaning between
    two values, such as ranges of quantization with their zero points: other buffers stay those of the trained model.

    The formula is torch's own, `get_ema_multi_avg_fn`. `AveragedModel`, which calls it, is not used: it holds a deep
    copy of the model, which FSDP and modules with hooks do not allow, and it averages bfloat16 weights in bfloat16,
    where the small part of a new weight is rounded away. Here averages of 16-bit weights are in float32.

    Source: Polyak & Juditsky 1992 for averaging; the warmup is that of `num_updates` in TensorFlow's
    `tf.train.ExponentialMovingAverage`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.statistics = {
            name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in AVERAGED_BUFFERS
        }
        parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() or parameter.is_complex()
        }
        self.tensors: dict[str, Tensor] = {**parameters, **self.statistics}
        self.values = {
            name: tensor.detach().clone().to(torch.promote_types(tensor.dtype, torch.float32))
            for name, tensor in self.tensors.items()
        }

    def update(self, step: int) -> None:
        """Move the average towards the weights after the optimizer step of this number, counted from 1."""
        averages = [local(value) for value in self.values.values()]
        weights = [local(self.tensors[name].detach()).to(value.dtype) for name, value in self.values.items()]
        decay = min(self.decay, (1 + step) / (10 + step))
        if averages:
            get_ema_multi_avg_fn(decay)(averages, weights, step)

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor] | None) -> None:
        """Set the average to whole tensors of a checkpoint.

        Raises:
            TrainError: there are none, since the training had no average so far.
        """
        if saved is None:
            raise TrainError("it has no average of the weights, as it is of a training without")
        for name, value in self.values.items():
            local(value).copy_(local(spread(saved[name], value)))

    @torch.no_grad()
    def settle(self) -> None:
        """Replace the model's weights by their average."""
        for name, value in self.values.items():
            local(self.tensors[name]).copy_(local(value))
        share(self.statistics.values())  # each process has seen other batches

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Replace the model's weights by their average inside a block."""
        before = [local(tensor.detach()).clone() for tensor in self.tensors.values()]
        self.settle()
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(self.tensors.values(), before, strict=True):
                    local(tensor).copy_(value)
