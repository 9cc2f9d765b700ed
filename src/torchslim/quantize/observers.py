"""Observers: find the range of a tensor's values in one pass, without storing the tensor.

A `QuantizationSpec` takes them as `observer_or_fake_quant_ctr`. An observer accepts batches in any floating-point
format, also tensors without elements; `calculate_qparams()` returns scale and zero point. The range always includes
zero, which is exact in integers. NaN and infinite values are left out of the range and counted in `ignored`;
`calculate_qparams` warns of them. An observer that saw nothing has scale 1; a tensor of zeros has the smallest scale,
`eps`.

`min_val` and `max_val` are the range that will be quantized, not the range that was seen. They may be widened in place
before `calculate_qparams`, until the next batch is seen. torchao passes the channel axis only to classes with
`PerChannel` in their name, hence the twins.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchao.quantization.pt2e import UniformQuantizationObserverBase

from torchslim.errors import QuantizeError
from torchslim.quantize.clipping import entropy_clip, mse_clip, percentile_clip

SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
PER_CHANNEL = (torch.per_channel_symmetric, torch.per_channel_affine)
CHUNK = 2**15  # elements counted at once: they stay in the cache, and one thread counts them without waking others
SMALLEST_EXPONENT = -80  # all values below 2**-80 share a bin; the quantizer's smallest scale is 1e-20, about 2**-66


class Observer(UniformQuantizationObserverBase):
    """Base class: state with one row, or one for each channel, and qparams from `min_val` and `max_val`.

    The formulas are torchao's, in float64: with float32, a range from -3e38 to 3e38 gives an infinite scale.
    """

    per_channel: ClassVar[bool] = False
    dynamic: ClassVar[bool] = False

    min_val: Tensor
    max_val: Tensor
    ignored: Tensor

    def __init__(self, *, ch_axis: int | None = None, qscheme: torch.qscheme | None = None, **options: Any) -> None:
        default = torch.per_channel_affine if self.per_channel else torch.per_tensor_affine
        super().__init__(qscheme=qscheme or default, **options)
        name = type(self).__name__
        if (self.qscheme in PER_CHANNEL) != self.per_channel:
            raise QuantizeError(f"{name} is per {'channel' if self.per_channel else 'tensor'}, got {self.qscheme}")
        if self.is_dynamic and not self.dynamic:
            raise QuantizeError(f"{name} cannot be dynamic: a dynamic range is of one batch; use 'min-max'")
        self.ch_axis = (ch_axis or 0) if self.per_channel else -1
        self._fills: dict[str, float] = {}
        self.register_buffer("ignored", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Observe a batch; returns `x` unchanged."""
        if x.numel():
            with torch.no_grad():
                self._see(x.detach())
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales (float32) and zero points (integers), of one element or one for each channel."""
        if self.ignored:
            warnings.warn("NaN or infinite values were left out of an observed range", stacklevel=2)
        low, high = self.min_val.double(), self.max_val.double()
        seen = low <= high
        if not seen.any():
            warnings.warn("an observer has seen no values; its scale is 1", stacklevel=2)
            shape = low.shape if low.numel() else (1,)
            return low.new_ones(shape, dtype=torch.float32), low.new_zeros(shape, dtype=torch.int64)
        low, high = low.where(seen, 0.0), high.where(seen, 0.0)
        scale, zero_point = self._calculate_qparams(low, high)
        return scale.where(seen, 1.0).float(), zero_point

    def extra_repr(self) -> str:
        """The range, for `repr`."""
        return f"min_val={self.min_val}, max_val={self.max_val}"

    def _see(self, x: Tensor) -> None:
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            x = x.float()
        rows = x.movedim(self.ch_axis, 0).flatten(1) if self.per_channel else x
        low, high = torch.aminmax(rows, dim=1) if self.per_channel else (bound[None] for bound in torch.aminmax(rows))
        finite = None
        if not bool((low.isfinite() & high.isfinite()).all()):  # NaN shows in both
            rows = rows if self.per_channel else rows.reshape(1, -1)
            finite = rows.isfinite()
            self.ignored += (~finite).sum()
            low, high = rows.where(finite, torch.inf).amin(1), rows.where(finite, -torch.inf).amax(1)
        self._fit(len(low))
        self._update(rows, low.float(), high.float(), finite)

    def _update(self, rows: Tensor, low: Tensor, high: Tensor, finite: Tensor | None) -> None:
        """Observe a batch: (rows, values) or any shape for one row, its range, and a mask of finite values."""
        raise NotImplementedError

    def _state(self, name: str, fill: float, columns: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> None:
        """Register a buffer with a row for each channel; the first batch determines how many."""
        self._fills[name] = fill
        self.register_buffer(name, torch.full((0 if self.per_channel else 1, *columns), fill, dtype=dtype))

    def _fit(self, rows: int) -> None:
        for name, fill in self._fills.items():
            buffer = getattr(self, name)
            if len(buffer) not in (0, rows):
                raise QuantizeError(
                    f"a batch has {rows} channels along axis {self.ch_axis}, those before had {len(buffer)}"
                )
            if len(buffer) < rows:
                setattr(self, name, buffer.new_full((rows, *buffer.shape[1:]), fill))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for name in self._fills:
            if prefix + name in state_dict:
                getattr(self, name).resize_(state_dict[prefix + name].shape)
        super()._load_from_state_dict(state_dict, prefix, *others)


class MinMax(Observer):
    """The smallest and the largest value of all batches.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.1 (weights).
    """

    dynamic = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._state("min_val", torch.inf)
        self._state("max_val", -torch.inf)

    def _update(self, rows: Tensor, low: Tensor, high: Tensor, finite: Tensor | None) -> None:
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))


class MovingAverage(Observer):
    """The average of the batches' smallest and of their largest values; exponential once there are many.

    Batch number n has weight max(averaging_constant, 1 / n), so the average starts as the plain mean. torchao's average
    starts from the first batch alone, which still makes 91 % of the range after ten batches at 0.01.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.1 (activations).
    """

    batches: Tensor

    def __init__(self, *, averaging_constant: float = 0.01, **options: Any) -> None:
        if not 0 < averaging_constant <= 1:
            raise QuantizeError(f"averaging_constant must be above 0 and at most 1, got {averaging_constant}")
        super().__init__(**options)
        self.averaging_constant = averaging_constant
        self._state("min_val", torch.inf)
        self._state("max_val", -torch.inf)
        self._state("batches", 0, dtype=torch.int64)

    def _update(self, rows: Tensor, low: Tensor, high: Tensor, finite: Tensor | None) -> None:
        seen = low <= high  # a row without finite values counts as no batch
        self.batches += seen
        weight = (1 / self.batches).clamp(min=self.averaging_constant)
        for value, new in ((self.min_val, low), (self.max_val, high)):
            mean = torch.where(self.batches <= 1, new, value + weight * (new - value))
            value.copy_(mean.where(seen, value))


class Histogram(Observer):
    """Counts values in bins of one width; subclasses choose the range from the counts when it is read.

    Bin k counts the values x with trunc(x / width) = k, from -(bins - 1) to bins - 1. The width is a power of two, and
    doubles until all values fit: two bins become one, and no count is ever split. So the histogram depends neither on
    how the data was cut into batches nor on their order. Between bins / 2 and bins of the bins cover the largest
    magnitude: a few values thousands of times larger than all others cost the others their resolution.
    """

    default_bins: ClassVar[int] = 4096

    seen_min: Tensor
    seen_max: Tensor
    histogram: Tensor
    exponent: Tensor

    def __init__(self, *, bins: int | None = None, **options: Any) -> None:
        bins = self.default_bins if bins is None else bins
        if bins < 2 or bins & (bins - 1):
            raise QuantizeError(f"bins must be a power of two, got {bins}")
        super().__init__(**options)
        self.bins = bins
        self._state("seen_min", torch.inf)
        self._state("seen_max", -torch.inf)
        self._state("histogram", 0, columns=(2 * bins - 1,), dtype=torch.int64)
        self._state("exponent", SMALLEST_EXPONENT, dtype=torch.int32)  # values of a row are below 2**exponent
        self._chosen: tuple[Tensor, Tensor] | None = None

    @property
    def min_val(self) -> Tensor:  # type: ignore[override]
        """Smallest value to be quantized."""
        return self._range()[0]

    @property
    def max_val(self) -> Tensor:  # type: ignore[override]
        """Largest value to be quantized."""
        return self._range()[1]

    def _range(self) -> tuple[Tensor, Tensor]:
        if self._chosen is None:
            seen = self.seen_min <= self.seen_max
            low, high = (bound.double().where(seen, 0.0) for bound in (self.seen_min, self.seen_max))
            width = self._width()
            low, high = self._clip(low / width, high / width)
            low, high = (low * width).float(), (high * width).float()
            self._chosen = low.where(seen, torch.inf), high.where(seen, -torch.inf)
        return self._chosen

    def _clip(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range to quantize, from the range that was seen; both in bins, (rows,) each."""
        raise NotImplementedError

    def _below(self) -> int | None:
        """Number of integers below that of zero; None where the zero point is free."""
        if self.qscheme not in SYMMETRIC:
            return None
        _, zero_point = self._calculate_qparams(torch.zeros_like(self.eps), torch.ones_like(self.eps))
        return int(zero_point) - int(self.quant_min)

    def _update(self, rows: Tensor, low: Tensor, high: Tensor, finite: Tensor | None) -> None:
        self._chosen = None
        self.seen_min.copy_(torch.minimum(self.seen_min, low))
        self.seen_max.copy_(torch.maximum(self.seen_max, high))
        largest = torch.maximum(-low, high).clamp(min=2.0**SMALLEST_EXPONENT / 2)
        exponent = torch.maximum(self.exponent, torch.frexp(largest).exponent)
        self._coarsen(exponent - self.exponent)
        self.exponent.copy_(exponent)

        count = len(low)
        rows = rows.reshape(count, -1)
        per_width = (1 / self._width()).float()[:, None]  # exact, as is the product: both are powers of two
        zero_bin = torch.arange(count, dtype=torch.int32, device=rows.device)[:, None] * (2 * self.bins - 1)
        zero_bin += self.bins - 1
        columns = max(CHUNK, self.histogram.numel()) // count
        for start in range(0, rows.shape[1], columns):
            window = slice(start, start + columns)
            index = (rows[:, window].float() * per_width).to(torch.int32)
            index += zero_bin
            index = index.flatten() if finite is None else index[finite[:, window]]
            self.histogram += torch.bincount(index, minlength=self.histogram.numel()).view_as(self.histogram)

    def _coarsen(self, doublings: Tensor) -> None:
        if doublings.any():
            old = torch.arange(1 - self.bins, self.bins, device=self.histogram.device)
            new = old.sign() * (old.abs() >> doublings.clamp(max=62)[:, None])
            self.histogram = torch.zeros_like(self.histogram).scatter_add_(1, new + self.bins - 1, self.histogram)

    def _width(self) -> Tensor:
        ones = torch.ones_like(self.exponent, dtype=torch.float64)
        return torch.ldexp(ones, self.exponent) / self.bins

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Histogram:
        self._chosen = None  # the stored range is on the old device
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._chosen = None
        super()._load_from_state_dict(*arguments)


class Percentile(Histogram):
    """The range that holds `percentile` % of the values: `clipping.percentile_clip`."""

    def __init__(self, *, percentile: float = 99.99, **options: Any) -> None:
        if not 0 < percentile <= 100:
            raise QuantizeError(f"percentile must be above 0 and at most 100, got {percentile}")
        super().__init__(**options)
        self.percentile = percentile

    def _clip(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return percentile_clip(self.histogram, low, high, self.percentile)


class MSE(Histogram):
    """The range of least expected squared error: `clipping.mse_clip`."""

    octaves: ClassVar[int] = 7

    def _clip(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        levels, below = self.quant_max - self.quant_min, self._below()
        return mse_clip(self.histogram, low, high, levels=levels, below=below, octaves=self.octaves)


class Entropy(Histogram):
    """The range of least KL divergence: `clipping.entropy_clip`."""

    def _clip(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return entropy_clip(self.histogram, low, high, levels=self.quant_max - self.quant_min, below=self._below())


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverKind:
    """The classes of an observer, and its description.

    Args:
        per_tensor: class with one range for the tensor.
        per_channel: class with a range for each channel; None where there is none.
        about: description, with the source.
    """

    per_tensor: type[Observer]
    per_channel: type[Observer] | None
    about: str


class PerChannelMinMax(MinMax):
    """`MinMax` of each channel."""

    per_channel = True
    dynamic = False


class PerChannelMovingAverage(MovingAverage):
    """`MovingAverage` of each channel."""

    per_channel = True


class PerChannelPercentile(Percentile):
    """`Percentile` of each channel."""

    per_channel = True
    default_bins = 256  # 4 KB for each channel of a layer


class PerChannelMSE(MSE):
    """`MSE` of each channel; weights have no outliers that call for clipping to less than an eighth."""

    per_channel = True
    default_bins = 256
    octaves = 3


OBSERVERS: Mapping[str, ObserverKind] = {
    "min-max": ObserverKind(
        per_tensor=MinMax,
        per_channel=PerChannelMinMax,
        about="smallest and largest value (Jacob 2018, section 3.1)",
    ),
    "moving-average": ObserverKind(
        per_tensor=MovingAverage,
        per_channel=PerChannelMovingAverage,
        about="averages of the batches' smallest and largest values (Jacob 2018, section 3.1)",
    ),
    "percentile": ObserverKind(
        per_tensor=Percentile,
        per_channel=PerChannelPercentile,
        about="cuts off the largest magnitudes, one in 10,000 (Wu 2020)",
    ),
    "mse": ObserverKind(
        per_tensor=MSE,
        per_channel=PerChannelMSE,
        about="least expected squared error of rounding and clipping (Nagel 2021, section 3.1)",
    ),
    "entropy": ObserverKind(
        per_tensor=Entropy,
        per_channel=None,
        about="least KL divergence of the quantized distribution (Migacz 2017)",
    ),
}


def observer(name: str, *, per_channel: bool = False, **options: Any) -> Callable[..., Any]:
    """A constructor of observers for a `QuantizationSpec`.

    Args:
        name: one of `OBSERVERS`.
        per_channel: whether to find a range for each channel along the specification's `ch_axis`, not one in all.
        options: options of the class: `averaging_constant`, `percentile`, `bins`, `eps` and so on. Inside torchao's
            fake quantization also `ch_axis`, which torchao does not pass on.

    Raises:
        QuantizeError: unknown observer, no form per channel, or an unknown or invalid option.
    """
    if name not in OBSERVERS:
        near = difflib.get_close_matches(str(name).replace("_", "-"), list(OBSERVERS), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise QuantizeError(f"observer {name!r} is not known{hint}. One of {', '.join(OBSERVERS)}")
    kind = OBSERVERS[name]
    observer_class = kind.per_channel if per_channel else kind.per_tensor
    if observer_class is None:
        choices = ", ".join(key for key, row in OBSERVERS.items() if row.per_channel)
        raise QuantizeError(f"observer {name!r} has no form per channel; use one of {choices}")
    try:
        observer_class(**options)  # reject invalid options here, not in the middle of a calibration
    except (TypeError, ValueError, AssertionError) as error:
        raise QuantizeError(f"observer {name!r} cannot take {options}: {error}") from error
    return observer_class.with_args(**options)  # type: ignore[no-any-return]
