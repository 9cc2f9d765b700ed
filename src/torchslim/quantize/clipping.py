"""Choice of the range to quantize from a histogram; `observers.py` does the counting.

A histogram has bins -(bins - 1) ... bins - 1 of one width, which is the unit of length here. Bin k > 0 holds the values
in [k, k + 1), bin -k those in (-k - 1, -k], bin 0 those in (-1, 1), which count as zero: zero is exact anyway.
Shapes: histogram (rows, 2 * bins - 1), integers; smallest and largest value seen (rows,), float64 -> the ends of the
range, zero included, (rows,) and (rows,). `levels` is the largest integer minus the smallest; `below` is the number of
integers below that of zero, None where the zero point is free (affine schemes).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

POINT = 1e-6  # width, in bins, of a bin whose values are all the same
SEARCH_ELEMENTS = 2**22  # elements of one intermediate result: 32 MB


def percentile_clip(histogram: Tensor, low: Tensor, high: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The range that holds `percentile` % of the values, without the largest magnitudes.

    Values are assumed to be evenly spread within a bin.

    Source: Wu et al. 2020, arXiv:2004.09602, on calibration: a percentile of the absolute values.
    """
    bins = histogram.shape[1] // 2 + 1
    counts = histogram[:, bins - 1 :].clone()
    counts[:, 1:] += histogram[:, : bins - 1].flip(1)
    up_to = counts.cumsum(1)
    target = up_to[:, -1:].double() * (percentile / 100)
    number = (up_to >= target).int().argmax(1, keepdim=True)  # the first such bin
    excess = (up_to.gather(1, number) - target) / counts.gather(1, number).clamp(min=1)
    return _within(low, high, (number + 1 - excess)[:, 0])


def _within(low: Tensor, high: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """The seen range, limited to [-magnitude, magnitude] and extended to zero."""
    return torch.maximum(low, -magnitude).clamp(max=0), torch.minimum(high, magnitude).clamp(min=0)


def shrinking(octaves: int, per_octave: int, device: torch.device) -> Tensor:
    """A geometric series from 1 down to 2**-octaves."""
    steps = torch.arange(octaves * per_octave + 1, device=device, dtype=torch.float64)
    return 2 ** (-steps / per_octave)


def mse_clip(
    histogram: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    levels: int,
    below: int | None,
    octaves: int = 7,
    per_octave: int = 16,
) -> tuple[Tensor, Tensor]:
    """The range with the least expected squared error of rounding and clipping.

    Every zero point is tried with every scale of a geometric series from that of the full range down. Values are
    assumed to be evenly spread within a bin: with all in its middle, scales near the bin width would seem exact.

    Source: Nagel et al. 2021, arXiv:2106.08295, section 3.1 (the criterion); the search is ours.
    """
    ratios = shrinking(octaves, per_octave, low.device)
    at_once = max(1, SEARCH_ELEMENTS // (histogram.shape[1] * len(ratios)))
    parts = [
        _search_mse(*part, ratios, levels, below)
        for part in zip(histogram.split(at_once), low.split(at_once), high.split(at_once), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _search_mse(
    histogram: Tensor, low: Tensor, high: Tensor, ratios: Tensor, levels: int, below: int | None
) -> tuple[Tensor, Tensor]:
    full = (high.clamp(min=0) - low.clamp(max=0)) / levels if below is None else torch.maximum(-low, high) * 2 / levels
    negative = torch.arange(levels + 1) if below is None else torch.tensor([below])
    negative = negative.to(low.device)
    positive = levels - negative
    scales = full.where(full > 0, 1.0)[:, None] * ratios
    bins, counts = histogram.shape[1] // 2 + 1, histogram.double()
    error = _side_error(counts[:, bins:], low, high, scales, positive)
    error += _side_error(counts[:, : bins - 1].flip(1), -high, -low, scales, negative)
    if below is None:  # runtimes drop a relu whose input has no integers below zero's: give none to a sign not seen
        error.masked_fill_((low >= 0)[:, None, None] & (negative > 0), torch.inf)
        error.masked_fill_(((high <= 0) & (low < 0))[:, None, None] & (positive > 0), torch.inf)
    best = error.flatten(1).argmin(1)
    scale = scales.gather(1, (best // len(negative))[:, None])[:, 0] * (full > 0)
    if below is None:
        return -scale * negative[best % len(negative)], scale * positive[best % len(negative)]
    return -scale * levels / 2, scale * levels / 2


def _side_error(counts: Tensor, low: Tensor, high: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Sum of squared errors of the positive values, for every scale and number of levels above zero.

    Shapes: counts of bins 1, 2 ... (rows, bins), low and high (rows,), scales (rows, scales), levels (n,) -> (rows,
    scales, n).

    The levels are multiples of a scale. A value up to the last level is rounded to the nearest, a value beyond it is
    clipped to it. The last level does not change how values below it are rounded, so sums up to it and from it on are
    enough.
    """
    bins = counts.shape[1]
    grid = torch.arange(1, bins + 2, device=counts.device, dtype=torch.float64)
    edges = torch.maximum(torch.minimum(grid, high[:, None] + POINT), low[:, None])
    left, right = edges[:, :-1], edges[:, 1:]
    density = counts / (right - left).clamp(min=POINT)  # bins without a width have no counts

    top = scales[..., None] * levels
    last = torch.minimum(torch.maximum(top, edges[:, :1, None]), edges[:, -1:, None])
    number = (torch.searchsorted(edges, last.flatten(1), right=True) - 1).clamp(0, bins - 1)

    def at(values: Tensor) -> Tensor:
        return values.gather(1, number).view_as(last)

    at_last = at(density)
    integral = _rounding_integral(edges[:, None], scales[..., None])
    error = pad((density[:, None] * integral.diff(dim=-1)).cumsum(-1), (1, 0)).gather(2, number.view_as(last))
    error += at_last * (_rounding_integral(last, scales[..., None]) - _rounding_integral(at(left), scales[..., None]))
    for power, factor in ((1, top.square()), (2, -2 * top), (3, torch.ones_like(top))):  # (t - top)**2, term by term
        beyond = (density * (right**power - left**power) / power).flip(1).cumsum(1).flip(1)
        error += factor * (at(pad(beyond[:, 1:], (0, 1))) + at_last * (at(right) ** power - last**power) / power)
    return error


def _rounding_integral(x: Tensor, scale: Tensor) -> Tensor:
    """The integral from 0 to x of (t - scale * round(t / scale))**2 dt."""
    level = torch.round(x / scale)
    return level * (scale**3 / 12) + (x - level * scale) ** 3 / 3


def entropy_clip(
    histogram: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    levels: int,
    below: int | None,
    octaves: int = 7,
    per_octave: int = 16,
) -> tuple[Tensor, Tensor]:
    """The range whose quantized distribution is nearest, by KL divergence, to the distribution that was seen.

    The thresholds t are whole numbers of bins in a geometric series from the largest magnitude down. For each of them,
    P is the histogram within [-t, t] with the counts beyond added to its outermost bins. Q is the histogram within
    [-t, t] with each level's count spread evenly over those of its bins that are not empty. The t with the smallest
    KL(P || Q) wins. One row only.

    Source: Migacz 2017, "8-bit inference with TensorRT", GTC, slide "Entropy calibration - pseudocode". He quantizes
    magnitudes to 128 levels of equally many bins. Here:

    - positive and negative values have bins of their own, because affine ranges are asymmetric;
    - a bin belongs to the level that it is rounded to, among the scheme's levels over the seen range within [-t, t];
      ranges with fewer bins than levels are skipped;
    - counts beyond t go to the outermost bins that are not empty; otherwise the divergence would be infinite exactly
      where a lone outlier should be cut off;
    - Q is not scaled up to a sum of 1 again: a range that keeps one bin, or none, would then seem perfect;
    - bin 0 gets the counts of its neighbors: zero is exact, and its peak after a relu says nothing about the range.
    """
    bins, counts = histogram.shape[1] // 2 + 1, histogram[0].double()
    counts[bins - 1] = counts[bins - 2] + counts[bins]
    number = torch.arange(1 - bins, bins, device=counts.device)
    extent = torch.maximum(-low, high).floor() + 1
    cuts = (extent * shrinking(octaves, per_octave, low.device)).ceil().unique().flip(0)  # the widest is the first
    lows, highs = _within(low, high, cuts)
    fine = highs - lows >= levels
    fine[0] = True
    cuts, lows, highs = cuts[fine], lows[fine], highs[fine]

    inner = counts * (number.abs() < cuts[:, None])  # (thresholds, bins)
    occupied = (inner > 0).double()
    outermost = torch.stack([occupied.argmax(1), 2 * bins - 2 - occupied.flip(1).argmax(1)], 1)
    under = (counts * (number <= -cuts[:, None])).sum(1)
    over = (counts * (number >= cuts[:, None])).sum(1)
    p = inner.scatter_add(1, outermost, torch.stack([under, over], 1))

    full = highs - lows if below is None else 2 * torch.maximum(-lows, highs)
    scale = full[:, None].where(full[:, None] > 0, 1.0) / levels
    negative = (-lows[:, None] / scale).round() if below is None else below
    level = (((number + 0.5 * number.sign()) / scale).round() + negative).clamp(0, levels).long()
    zeros = torch.zeros(len(cuts), levels + 1, dtype=counts.dtype, device=counts.device)
    mean = zeros.scatter_add(1, level, inner) / zeros.scatter_add(1, level, occupied).clamp(min=1)
    q = mean.gather(1, level) * occupied
    divergence = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(1)  # infinite where q is 0
    return _within(low, high, cuts[divergence.argmin()])
