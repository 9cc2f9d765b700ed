"""Checks of a quantized model's outputs against float: thresholds, and the outputs and channels that miss them.

A channel is any index of any dimension of an output except the batch dimension: a class score of a detector, a feature
or token of a transformer, a row of pixels. Its signal is its variance, its noise the mean squared difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from torchslim.core.checks import check_fields
from torchslim.errors import QuantizeError

Outputs = Sequence[Sequence[Tensor]]
"""The flat output tensors of each run."""

CHANCE = 1e-3  # probability that a healthy output counts as faulty because few samples were seen
GRID = 255  # steps of an 8-bit grid
LOOKED_AT = 2**16  # values of an output that are searched for a grid
VISIBLE = 8  # steps of its own 8-bit grid that a channel must span to count as varying
SPREAD = 6  # multiple of the noise's root mean square: two roundings of one network differ by less
ALIKE_DB = 10.0  # dB above the threshold that an output's best channel must reach for others to count as lost
TINY = 1e-6  # of the output's largest value: float32 itself does not represent smaller channels
FEWEST = 4  # elements that a channel must have to be judged
POSITIONS = 64  # of a sample that count as independent, at most: neighbors in a feature map are not


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """Thresholds for a quantized model; layers that keep it from meeting them go back to float.

    Args:
        channel_db: smallest signal over noise of every output and every channel of it, against float.
        apart_db: how much nearer to float the graph may be than the deployed model.
        apart_share: largest share of an output's elements that differ by more than one step between the two.
        samples: number of samples that are compared, of at least two batches.
    """

    channel_db: float = 10.0
    apart_db: float = 6.0
    apart_share: float = 1e-3
    samples: int = 32

    def __post_init__(self) -> None:
        check_fields(self, QuantizeError)
        if self.apart_db <= 0:
            raise QuantizeError(f"apart_db must be above 0, got {self.apart_db}")
        if not 0 <= self.apart_share < 1:
            raise QuantizeError(f"apart_share must be in [0, 1), got {self.apart_share}")
        if self.samples < 2:
            raise QuantizeError(f"samples must be a whole number of at least 2, got {self.samples}")

    @classmethod
    def of(cls, given: Any) -> Checks | None:
        """The `Checks` that a `checks` argument stands for: itself, None, or the defaults updated by a mapping.

        Raises:
            QuantizeError: `given` is of another type, or a mapping with unknown keys.
        """
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise QuantizeError(f"checks must be Checks(...), a mapping of its fields, or None, got {given!r}")
        names = [field_.name for field_ in fields(cls)]
        if unknown := [key for key in given if key not in names]:
            raise QuantizeError(f"checks has no {', '.join(map(repr, unknown))}; known: {', '.join(names)}")
        return cls(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An output, or one of its channels: index `channel` of dimension `dim`."""

    output: int
    dim: int | None = None
    channel: int | None = None

    def named(self, names: Sequence[str]) -> str:
        """Name of the output or channel, for messages.

        Args:
            names: names of the outputs.
        """
        name = names[self.output] if self.output < len(names) and names[self.output] else ""
        output = f"output {name!r}" if name else "the output" if len(names) == 1 else f"output {self.output}"
        return output if self.dim is None else f"channel {self.channel} (dimension {self.dim}) of {output}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A failed check: `kind` is "not finite", "constant", "output", "channel", "apart" or "steps"."""

    kind: str
    place: Place
    decibels: float | None
    words: str
    short: float = math.inf  # decibels below the threshold

    def told(self, names: Sequence[str]) -> str:
        """Message about the fault."""
        return f"{self.place.named(names)} {self.words}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """The worst output or channel and its signal over noise."""

    place: Place
    decibels: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One output over all runs, float64, batch in dimension 0; values that are not finite in float itself are 0."""

    output: int
    values: tuple[Tensor, ...]  # of the float model, then of one or two others
    axis: int | None  # batch dimension of the output
    broken: int | None  # index of the first of `values` that is not finite where float is
    integer: bool

    def dims(self) -> Iterator[int | None]:
        """None for the whole output, then the dimensions of channels."""
        yield None
        yield from (dim for dim in range(1, self.values[0].dim()) if self.values[0].shape[dim] > 1)

    def rows(self, dim: int | None) -> list[Tensor]:
        """All `values` as (channels, elements)."""
        if dim is None:
            return [value.reshape(1, -1) for value in self.values]
        return [value.movedim(dim, 0).flatten(1) for value in self.values]

    def place(self, dim: int | None, channel: int) -> Place:
        """The place in the dimensions of the model's output."""
        if dim is None:
            return Place(output=self.output)
        output_dim = dim if self.axis is not None and dim > self.axis else dim - 1
        return Place(output=self.output, dim=output_dim, channel=channel)


def faults(reference: Outputs, values: Outputs, axes: Sequence[int | None], checks: Checks) -> list[Fault]:
    """Faults of a quantized model's outputs against the float model's, the worst first.

    Args:
        reference: outputs of the float model.
        values: outputs of the quantized model on the same inputs; an output of another shape is not compared.
        axes: the batch dimension of each output; None where it has none.
        checks: the thresholds.
    """
    failures: list[Fault] = []
    for part in _parts([reference, values], axes):
        if part.broken is not None:
            failures.append(_broken(part))
            continue
        if part.integer:
            failures += _constant_integers(part)
            continue
        largest = float(part.values[0].abs().max()) if part.values[0].numel() else 0.0
        for dim in part.dims():
            failures += _lost(part, dim, largest, checks)
    order = ("not finite", "constant", "output", "channel")
    return sorted(
        failures, key=lambda fault: (order.index(fault.kind), -math.inf if fault.decibels is None else fault.decibels)
    )


def apart(
    reference: Outputs, graph: Outputs, deployed: Outputs, axes: Sequence[int | None], checks: Checks
) -> list[Fault]:
    """Faults of a deployed model's outputs against the graph that it was made from.

    The graph's noise counts as at least that of an 8-bit grid over the channel's own values. A channel that is constant
    in float may be one step away, of the grid over the whole output.
    """
    failures: list[Fault] = []
    for part in _parts([reference, graph, deployed], axes):
        if part.broken == 2:
            failures.append(_broken(part))
        if part.broken is not None or part.integer:
            continue
        for dim in part.dims():
            failures += _further(part, dim, checks)
    return failures


def worst(reference: Outputs, values: Outputs, axes: Sequence[int | None]) -> Figure | None:
    """The output or channel with the lowest signal over noise, of those that vary and have enough elements."""
    lowest: Figure | None = None
    for part in _parts([reference, values], axes):
        if part.integer or part.broken is not None:
            continue
        for dim in part.dims():
            expected, got = part.rows(dim)
            signal, noise = _signal(expected), _noise(expected, got)
            judged = _varies(expected, signal) & (_independent(part, expected) >= FEWEST)
            decibels = torch.where(judged, _decibels(signal, noise), math.inf)
            channel = int(decibels.argmin()) if decibels.numel() else 0
            if judged.any() and (lowest is None or float(decibels[channel]) < lowest.decibels):
                lowest = Figure(place=part.place(dim, channel), decibels=float(decibels[channel]))
    return lowest


def slack(elements: int, channels: int) -> float:
    """Factor by which chance alone may raise noise over signal, both estimated from few elements; inf: no limit.

    The upper quantile of an F distribution for `CHANCE` over all channels.
    Source: Paulson 1942, "An approximate normalization of the analysis of variance distribution".
    """
    if elements < 2:
        return math.inf
    z = NormalDist().inv_cdf(1 - CHANCE / max(channels, 1))
    a, b = 2 / (9 * elements), 2 / (9 * (elements - 1))
    square = (1 - b) ** 2 - z * z * b
    if square <= 0:
        return math.inf
    root = ((1 - a) * (1 - b) + math.sqrt(((1 - a) * (1 - b)) ** 2 - square * ((1 - a) ** 2 - z * z * a))) / square
    return root**3


def _lost(part: _Part, dim: int | None, largest: float, checks: Checks) -> Iterator[Fault]:
    expected, got = part.rows(dim)
    signal, noise = _signal(expected), _noise(expected, got)
    varies = _varies(expected, signal) & (expected.abs().amax(1) > TINY * largest)
    elements = _independent(part, expected)
    # with few values on a coarse grid, some of many channels are constant by chance
    constant = varies & (got.amax(1) == got.amin(1)) & (elements >= FEWEST + math.log2(len(signal)))
    chance = slack(elements, len(signal))
    noisy = varies & (noise > 10 ** (-checks.channel_db / 10) * chance * signal)
    decibels = _decibels(signal, noise)
    best = float(decibels[varies].max()) - 10 * math.log10(chance) if bool(varies.any()) else 0.0
    if dim is not None and best < checks.channel_db + ALIKE_DB:
        noisy &= False  # no channel stands out: the check of the whole output covers their common noise
    for channel in constant.nonzero().flatten().tolist():
        yield Fault(
            kind="constant",
            place=part.place(dim, channel),
            decibels=float(decibels[channel]),
            words="varies in float and is constant",
        )
    for channel in (noisy & ~constant).nonzero().flatten().tolist():
        yield Fault(
            kind="output" if dim is None else "channel",
            place=part.place(dim, channel),
            decibels=float(decibels[channel]),
            words=f"is {float(decibels[channel]):.1f} dB from float, at least {checks.channel_db:g} are required",
            short=checks.channel_db - float(decibels[channel]),
        )


def _further(part: _Part, dim: int | None, checks: Checks) -> Iterator[Fault]:
    expected, graph, deployed = part.rows(dim)
    if not expected.numel():
        return
    unit = (expected.abs().amax(1) / GRID).clamp(min=_grid(graph))
    constant = ~_varies(expected, _signal(expected))
    unit = torch.where(constant, unit.max(), unit)  # a constant channel has no range to take a grid from
    floor = unit.square() / torch.where(constant, 1, 12)  # a constant channel may be a whole step away
    graph_noise = _noise(expected, graph)
    deployed_noise = _noise(expected, deployed)
    elements = _independent(part, expected)
    few = elements < POSITIONS // 4  # too few to estimate the noise of one channel
    rounded = graph_noise[graph_noise > 0]  # zeros behind a ReLU have no error, which says nothing about the grid
    noise = torch.maximum(torch.maximum(graph_noise, rounded.median()) if few and len(rounded) else graph_noise, floor)
    ratio = deployed_noise / noise.clamp(min=1e-300)
    channel = int(ratio.argmax())
    if float(ratio[channel]) > 10 ** (checks.apart_db / 10) * slack(elements, len(ratio)):
        signal = _signal(expected)
        graph_db, deployed_db = (float(_decibels(signal, level)[channel]) for level in (graph_noise, deployed_noise))
        yield Fault(
            kind="apart",
            place=part.place(dim, channel),
            decibels=deployed_db,
            words=f"is {deployed_db:.1f} dB from float deployed and {graph_db:.1f} dB in the graph it was made from",
            short=graph_db - deployed_db - checks.apart_db,
        )
    step = torch.maximum(1.01 * unit, SPREAD * graph_noise.sqrt())
    if few:  # a rounding error is at most half a step, and smaller in most of few elements
        step = step.clamp(min=4 * float((expected - graph).abs().max()))
    over = int(((deployed - graph).abs() > step.unsqueeze(1)).sum())
    share = over / deployed.numel()
    expected_over = checks.apart_share * deployed.numel()
    if over > 1 + expected_over + 2 * math.sqrt(expected_over):  # more than the bound and its spread by chance
        yield Fault(
            kind="steps",
            place=Place(output=part.output),
            decibels=None,
            words=f"differs by more than a step from the graph it was made from on {100 * share:.2g} % of its elements",
        )


def _grid(values: Tensor) -> float:
    """Step of the grid that `values` lie on; 0 where none is recognized."""
    distinct = values.flatten()[:LOOKED_AT].unique()
    if not 8 <= len(distinct) <= GRID + 1:
        return 0.0
    gaps = distinct.diff()
    for part in range(1, 9):  # among few values, no two may be neighbors on the grid
        step = gaps.min() / part
        if bool((gaps / step - (gaps / step).round()).abs().max() < 0.01 * part):
            return float(step)
    return 0.0


def _parts(several: Sequence[Outputs], axes: Sequence[int | None]) -> Iterator[_Part]:
    """Every output over all runs; runs of other shapes are parts of their own."""
    for output, axis in enumerate(axes):
        groups: dict[tuple[int, ...], list[list[Tensor]]] = {}
        for runs in zip(*several, strict=True):
            tensors = [run[output].detach().cpu() for run in runs]
            if any(tensor.shape != tensors[0].shape for tensor in tensors):
                continue
            has_batch = axis is not None and tensors[0].dim() > axis
            moved = [
                tensor.movedim(axis, 0) if has_batch and axis is not None else tensor.unsqueeze(0) for tensor in tensors
            ]
            groups.setdefault(tuple(moved[0].shape[1:]), []).append(moved)
        for moved_runs in groups.values():
            joined = [torch.cat(pieces) for pieces in zip(*moved_runs, strict=True)]
            integer = not joined[0].is_floating_point()
            wide = [tensor.double() for tensor in joined]
            finite = wide[0].isfinite()
            bad = (index for index, tensor in enumerate(wide) if bool((~tensor.isfinite() & finite).any()))
            yield _Part(
                output=output,
                values=tuple(torch.where(finite, tensor, 0.0) for tensor in wide),
                axis=axis,
                broken=next(bad, None),
                integer=integer,
            )


def _broken(part: _Part) -> Fault:
    return Fault(
        kind="not finite", place=Place(output=part.output), decibels=None, words="has values that are not finite"
    )


def _constant_integers(part: _Part) -> Iterator[Fault]:
    """Fault of an integer output, such as class numbers, that is constant where float varies."""
    expected, got = (value.flatten() for value in part.values)
    if expected.numel() < 8 or bool((got != got[0]).any()):
        return
    if float((expected == expected.mode().values).double().mean()) < 0.75:
        yield Fault(
            kind="constant", place=Place(output=part.output), decibels=None, words="varies in float and is constant"
        )


def _signal(rows: Tensor) -> Tensor:
    return rows.var(1, correction=0)


def _noise(expected: Tensor, got: Tensor) -> Tensor:
    return (expected - got).square().mean(1)


def _decibels(signal: Tensor, noise: Tensor) -> Tensor:
    return torch.where(noise > 0, 10 * (signal / noise).log10(), math.inf)


def _varies(rows: Tensor, signal: Tensor) -> Tensor:
    """Whether each channel spans enough of its own 8-bit grid, zero included, to differ from a constant on it."""
    unit = rows.abs().amax(1) / GRID
    return (rows.amax(1) - rows.amin(1) >= VISIBLE * unit) & (signal >= 10 * unit.square() / 12) & (unit > 0)


def _independent(part: _Part, rows: Tensor) -> int:
    """Number of elements of a channel that count as independent of one another."""
    return min(rows.shape[1], POSITIONS * part.values[0].shape[0])
