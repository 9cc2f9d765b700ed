"""Observation of values: specs for calibration, and modules that round to the grid while a model trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import FakeQuantize, PerChannelMinMaxObserver, PlaceholderObserver
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from torchslim.graph.row_ranges import rounded_by_row
from torchslim.quantize.aten_ops import along
from torchslim.quantize.observers import observer
from torchslim.quantize.quantizer import Specs
from torchslim.quantize.schemes import Scheme, weight_range
from torchslim.quantize.weight_only import dequantize_groups, quantize_groups

SMALLEST_SCALE = 1e-20  # the usual 1e-7 turns networks with tiny activations into zeros
UNSIGNED = (0, 255)


def specs(runtime: str, activations: str, *, training: bool = False, learned_step: bool = False) -> Specs:
    """The quantization specs for a runtime.

    Args:
        runtime: determines the integer range of weights.
        activations: observer of static activations, a name of `OBSERVERS`.
        training: whether to round as well as observe (quantization-aware training).
        learned_step: whether to learn the scales of weights, too (LSQ).
    """
    static: Any = observer(activations, eps=SMALLEST_SCALE)
    dynamic: Any = PlaceholderObserver.with_args(eps=SMALLEST_SCALE)
    rows = dynamic
    if training:
        static = FakeQuantizedActivation.with_args(observer=observer("moving-average", eps=SMALLEST_SCALE))
        dynamic, rows = RangeOfEachCall, RangeOfEachRow

    def weight(scheme: Scheme, axis: int) -> QuantizationSpec:
        low, high = weight_range(runtime, scheme)
        # torchao passes the axis only to constructors with PerChannel in their name
        if scheme.group_size is not None:
            kind: Any = LearnedGroups if learned_step else GroupWeights
            factory: Any = kind.with_args(ch_axis=axis, group_size=scheme.group_size, training_step=training)
        elif learned_step:
            factory = LearnedStep.with_args(ch_axis=axis)
        elif training:
            factory = FakeQuantizedWeight.with_args(ch_axis=axis, observer=PerChannelMinMaxObserver, eps=SMALLEST_SCALE)
        else:
            factory = WeightRange.with_args(ch_axis=axis, eps=SMALLEST_SCALE)
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=factory,
            quant_min=low,
            quant_max=high,
            qscheme=torch.per_channel_symmetric,
            ch_axis=axis,
        )

    def activation(factory: Any, is_dynamic: bool) -> QuantizationSpec:
        return QuantizationSpec(
            dtype=torch.uint8,
            observer_or_fake_quant_ctr=factory,
            quant_min=UNSIGNED[0],
            quant_max=UNSIGNED[1],
            qscheme=torch.per_tensor_affine,
            is_dynamic=is_dynamic,
        )

    return Specs(
        static=activation(static, False),
        dynamic=activation(dynamic, True),
        rows=activation(rows, True),
        weight=weight,
    )


class WeightRange(PerChannelMinMaxObserver):
    """Observes the range of each channel of a weight once: weights do not change from batch to batch."""

    def forward(self, x_orig: Tensor) -> Tensor:
        """Return the weight unchanged."""
        return x_orig if self.min_val.numel() else super().forward(x_orig)


class FakeQuantizedActivation(FakeQuantize):
    """Rounds to the grid of the observed range, which a trainer may have averaged, or loaded, since it was observed.

    torchao rounds to the grid of the last batch in place of it: averages of models, which are taken of floating-point
    buffers alone, would then pair an averaged scale with the first zero point.
    """

    def forward(self, X: Tensor) -> Tensor:
        """`X` on its grid; gradients pass through where nothing is clipped."""
        observer = self.activation_post_process
        if self.observer_enabled[0] != 1 and observer.min_val.numel() and (observer.min_val <= observer.max_val).all():
            for stored, current in zip((self.scale, self.zero_point), self.calculate_qparams(), strict=True):
                stored.resize_(current.shape).copy_(current)
        return super().forward(X)  # type: ignore[no-any-return]


class FakeQuantizedWeight(FakeQuantizedActivation):
    """Rounds a weight to the grid of its current range, not of the largest that it ever had."""

    def forward(self, X: Tensor) -> Tensor:
        """The weight on its grid; gradients pass through where nothing is clipped."""
        if self.observer_enabled[0] == 1:  # in place: averages of models hold these tensors
            self.activation_post_process.min_val.fill_(torch.inf)
            self.activation_post_process.max_val.fill_(-torch.inf)
        return super().forward(X)


class RangeOfEachCall(FakeQuantizeBase):
    """Rounds activations as dynamic kernels do, with the range of each call."""

    is_dynamic = True

    def __init__(self, dtype: Any, quant_min: int, quant_max: int, qscheme: Any, **_: Any) -> None:
        super().__init__()
        self.dtype, self.quant_min, self.quant_max, self.qscheme = dtype, quant_min, quant_max, qscheme
        self.eps = SMALLEST_SCALE

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale 1 and zero point 0: the range is unknown before the call."""
        return torch.ones(1), torch.zeros(1, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid of its own range."""
        if self.fake_quant_enabled[0] != 1 or not x.numel():
            return x
        low, high = (
            bound.clamp(max=0) if is_low else bound.clamp(min=0)
            for bound, is_low in zip(torch.aminmax(x.detach().float()), (True, False), strict=True)
        )
        scale = ((high - low) / (self.quant_max - self.quant_min)).clamp(min=self.eps)
        zero_point = (self.quant_min - torch.round(low / scale)).clamp(self.quant_min, self.quant_max).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, self.quant_min, self.quant_max)


class RangeOfEachRow(RangeOfEachCall):
    """Rounds the input of a linear layer as dynamic kernels do, with the range of each row of features."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grids of its rows; the gradient passes through."""
        if self.fake_quant_enabled[0] != 1 or not x.numel():
            return x
        return x + (rounded_by_row(x.detach()) - x.detach())


class LearnedStep(FakeQuantizeBase):
    """Rounds weights to a grid whose step is learned, one for each channel.

    The step starts at 2 mean|w| / sqrt(high), at most at max|w| / high, and its gradient is scaled by
    1 / sqrt(weights * high). With 8 bits the first start is several times the second: it is meant for 2 to 4 bits.
    Source: Esser et al. 2020, "Learned Step Size Quantization", arXiv:1902.08153, section 2; the bound is ours.
    """

    is_dynamic = False

    def __init__(self, dtype: Any, quant_min: int, quant_max: int, qscheme: Any, ch_axis: int, **_: Any) -> None:
        super().__init__()
        self.dtype, self.quant_min, self.quant_max = dtype, quant_min, quant_max
        self.qscheme, self.ch_axis = qscheme, ch_axis
        self.scale = nn.Parameter(torch.empty(0))

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """The learned steps; the zero points are zero."""
        scale = self.scale.detach().abs().clamp(min=SMALLEST_SCALE)
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def start(self, weight: Tensor) -> None:
        """Set the steps from a weight."""
        other_dims = [dim for dim in range(weight.dim()) if dim != self.ch_axis]
        magnitudes = weight.detach().abs()
        step = 2 * magnitudes.mean(other_dims) / math.sqrt(self.quant_max)
        step = torch.minimum(step, magnitudes.amax(other_dims) / self.quant_max)
        self.scale = nn.Parameter(step.clamp(min=SMALLEST_SCALE))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on the grid; gradients reach the weight and the steps."""
        if not self.scale.numel():
            self.start(weight)
        if self.fake_quant_enabled[0] != 1:
            return weight
        factor = 1 / math.sqrt(weight.numel() / self.scale.numel() * self.quant_max)
        step = self.scale.abs().clamp(min=SMALLEST_SCALE)
        step = along(step * factor + (step - step * factor).detach(), weight, self.ch_axis)
        scaled = (weight / step).clamp(self.quant_min, self.quant_max)
        rounded: Tensor = (scaled + (scaled.round() - scaled).detach()) * step
        return rounded


class GroupWeights(FakeQuantizeBase):
    """Rounds weights in training, with one scale per group of a row; `weight_only.emit` stores them."""

    is_dynamic = False

    def __init__(
        self,
        dtype: Any,
        quant_min: int,
        quant_max: int,
        qscheme: Any,
        ch_axis: int,
        group_size: int,
        training_step: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.dtype, self.quant_min, self.quant_max = dtype, quant_min, quant_max
        self.qscheme, self.ch_axis, self.group_size = qscheme, ch_axis, group_size
        self.chosen: tuple[Tensor, Tensor] | None = None  # integers and scales from a rounding method
        self.enable_fake_quant(training_step)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Not implemented: groups have scales, channels have none."""
        raise NotImplementedError("groups have scales, channels have none")

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on the grid of its groups; the gradient passes through."""
        if self.fake_quant_enabled[0] != 1:
            return weight
        return weight + (self.rounded(weight.detach()) - weight.detach())

    def stored(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integers (rows, length) and scales (rows, groups) of a weight, its outputs in dimension 0."""
        return self.chosen or quantize_groups(weight.transpose(0, self.ch_axis), group_size=self.group_size)

    def rounded(self, weight: Tensor) -> Tensor:
        """The weight as it will be stored."""
        rows = weight.transpose(0, self.ch_axis)
        values = dequantize_groups(*self.stored(weight), self.group_size).to(weight.dtype)
        return values.reshape(rows.shape).transpose(0, self.ch_axis)


class LearnedGroups(GroupWeights):
    """As `GroupWeights`, with learned steps as in `LearnedStep`, which start from each group's largest magnitude.

    The start of `LearnedStep`, twice the mean magnitude over sqrt(7), would leave a third of the few levels unused.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.scale = nn.Parameter(torch.empty(0))

    def start(self, weight: Tensor) -> None:
        """Set the steps from a weight."""
        self.scale = nn.Parameter(super().stored(weight.detach())[1])

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on the grid; gradients reach the weight and the steps."""
        if not self.scale.numel():
            self.start(weight)
        if self.fake_quant_enabled[0] != 1:
            return weight
        scaled, step = self._scaled(weight, 1 / math.sqrt(self.group_size * self.quant_max))
        rounded = (scaled + (scaled.round() - scaled).detach()) * step
        rows = weight.transpose(0, self.ch_axis)
        values = rounded.flatten(1)[:, : rows[0].numel()].to(weight.dtype)
        return values.reshape(rows.shape).transpose(0, self.ch_axis)

    def stored(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integers (rows, length) and the learned scales (rows, groups)."""
        if not self.scale.numel():
            self.start(weight)
        scaled, step = self._scaled(weight.detach(), 1.0)
        length = weight.numel() // weight.shape[self.ch_axis]
        return scaled.round().flatten(1)[:, :length].to(torch.int8).contiguous(), step.detach().squeeze(-1)

    def _scaled(self, weight: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """The weight in steps and clipped, (rows, groups, group_size), and the steps, (rows, groups, 1)."""
        rows = weight.transpose(0, self.ch_axis).flatten(1).float()
        grouped = nn.functional.pad(rows, (0, -rows.shape[1] % self.group_size)).unflatten(1, (-1, self.group_size))
        step = self.scale.abs().clamp(min=SMALLEST_SCALE).unsqueeze(-1)
        step = step * factor + (step - step * factor).detach()
        return (grouped / step).clamp(self.quant_min, self.quant_max), step


def rounding_modules(model: nn.Module) -> Iterator[FakeQuantizeBase]:
    """Every module of `model` that rounds while it trains."""
    return (module for module in model.modules() if isinstance(module, FakeQuantizeBase))
