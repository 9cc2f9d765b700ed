"""What a quantized model must keep of the float one: thresholds, and the outputs and channels that miss them.

A channel is every index of every dimension of an output but the batch's: class scores of a detector, features or tokens
of a transformer, pixels' rows. Its signal is its variation around its own mean, its noise the mean squared difference.
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

CHANCE = 1e-3  # probability that a healthy output is called off because few samples were seen
GRID = 255  # steps of an 8-bit grid
LOOKED_AT = 2**16  # values of an output that tell whether it lies on a grid
VISIBLE = 8  # steps of its own 8-bit grid that a channel must move over to count as one that varies
SPREAD = 6  # times the noise's root mean square: differences between two roundings of one network stay below
ALIKE_DB = 10.0  # above the threshold, what one channel of an output must reach for another to count as lost
TINY = 1e-6  # of the largest value of its output: float32 itself does not hold a channel that is smaller
FEWEST = 4  # elements of a channel, below which nothing is said of it
POSITIONS = 64  # of a sample that count as independent: neighbors in a map are not


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What must hold of a quantized model; layers that are in the way go back to float.

    Args:
        channel_db: signal over noise of every output and every channel of it, against float.
        apart_db: how much nearer to float the graph may be than the deployed model.
        apart_share: the share of the elements of an output that may differ by more than one step between the two.
        samples: how many samples are looked at, of at least two batches.
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
        """What a `checks` argument stands for: itself, None, or the defaults but for what a mapping has.

        Raises:
            QuantizeError: it is something else, or a mapping with other keys.
        """
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise QuantizeError(f"checks must be Checks(...), a mapping of its fields, or None, got {given!r}")
        known = [field_.name for field_ in fields(cls)]
        if wrong := [key for key in given if key not in known]:
            raise QuantizeError(f"checks has no {', '.join(map(repr, wrong))}; known: {', '.join(known)}")
        return cls(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An output, or a channel of it: index `channel` of dimension `dim`."""

    output: int
    dim: int | None = None
    channel: int | None = None

    def named(self, names: Sequence[str]) -> str:
        """As messages give it.

        Args:
            names: of the outputs.
        """
        name = names[self.output] if self.output < len(names) and names[self.output] else ""
        output = f"output {name!r}" if name else "the output" if len(names) == 1 else f"output {self.output}"
        return output if self.dim is None else f"channel {self.channel} (dimension {self.dim}) of {output}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is off: `kind` is "not finite", "constant", "output", "channel", "apart" or "steps"."""

    kind: str
    place: Place
    decibels: float | None
    words: str
    short: float = math.inf  # decibels below what is wanted

    def told(self, names: Sequence[str]) -> str:
        """In words."""
        return f"{self.place.named(names)} {self.words}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """The worst channel and its signal over noise."""

    place: Place
    decibels: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One output over all runs, in float64, its batch in dimension 0; values that float itself has not finite are 0."""

    output: int
    values: tuple[Tensor, ...]  # float, and one or two others
    axis: int | None  # where the output has its batch
    broken: int | None  # which of the others is not finite where float is
    integer: bool

    def dims(self) -> Iterator[int | None]:
        """The whole output first."""
        yield None
        yield from (dim for dim in range(1, self.values[0].dim()) if self.values[0].shape[dim] > 1)

    def rows(self, dim: int | None) -> list[Tensor]:
        """(channels, elements) of each."""
        if dim is None:
            return [value.reshape(1, -1) for value in self.values]
        return [value.movedim(dim, 0).flatten(1) for value in self.values]

    def place(self, dim: int | None, channel: int) -> Place:
        """In the dimensions that the model's output has."""
        if dim is None:
            return Place(output=self.output)
        own = dim if self.axis is not None and dim > self.axis else dim - 1
        return Place(output=self.output, dim=own, channel=channel)


def faults(reference: Outputs, values: Outputs, axes: Sequence[int | None], checks: Checks) -> list[Fault]:
    """What of a quantized model's outputs is off against the float one's, the worst first.

    Args:
        reference: outputs of the float model.
        values: outputs of the quantized one on the same inputs; an output of another size is not compared.
        axes: the batch dimension of each output; None where it has none.
        checks: the thresholds.
    """
    found: list[Fault] = []
    for part in _parts([reference, values], axes):
        if part.broken is not None:
            found.append(_broken(part))
            continue
        if part.integer:
            found += _constant_integers(part)
            continue
        largest = float(part.values[0].abs().max()) if part.values[0].numel() else 0.0
        for dim in part.dims():
            found += _lost(part, dim, largest, checks)
    order = ("not finite", "constant", "output", "channel")
    return sorted(found, key=lambda each: (order.index(each.kind), each.decibels or -math.inf))


def apart(
    reference: Outputs, graph: Outputs, deployed: Outputs, axes: Sequence[int | None], checks: Checks
) -> list[Fault]:
    """What of a deployed model's outputs is off against the graph that it was made from.

    Noise below that of an 8-bit grid over the channel's own values is none; a channel that is constant in float
    may be a step away, of the grid over the whole output.
    """
    found: list[Fault] = []
    for part in _parts([reference, graph, deployed], axes):
        if part.broken == 2:
            found.append(_broken(part))
        if part.broken is not None or part.integer:
            continue
        for dim in part.dims():
            found += _further(part, dim, checks)
    return found


def worst(reference: Outputs, values: Outputs, axes: Sequence[int | None]) -> Figure | None:
    """The output or channel that is least like float, of those that vary and are seen often enough to tell."""
    found: Figure | None = None
    for part in _parts([reference, values], axes):
        if part.integer or part.broken is not None:
            continue
        for dim in part.dims():
            expected, got = part.rows(dim)
            signal, noise = _signal(expected), _noise(expected, got)
            judged = _varies(expected, signal) & (_independent(part, expected) >= FEWEST)
            decibels = torch.where(judged, _decibels(signal, noise), math.inf)
            channel = int(decibels.argmin()) if decibels.numel() else 0
            if decibels.numel() and (found is None or float(decibels[channel]) < found.decibels):
                found = Figure(place=part.place(dim, channel), decibels=float(decibels[channel]))
    return found


def slack(elements: int, channels: int) -> float:
    """By how much chance alone raises the noise over the signal, both estimated from few elements; inf: no limit.

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
    # of few values on a coarse grid some channels of many are alike by chance
    constant = varies & (got.amax(1) == got.amin(1)) & (elements >= FEWEST + math.log2(len(signal)))
    chance = slack(elements, len(signal))
    off = varies & (noise > 10 ** (-checks.channel_db / 10) * chance * signal)
    decibels = _decibels(signal, noise)
    best = float(decibels[varies].max()) - 10 * math.log10(chance) if bool(varies.any()) else 0.0
    if dim is not None and best < checks.channel_db + ALIKE_DB:
        off &= False  # none stands out: what they have in common, the output as a whole shows
    for channel in constant.nonzero().flatten().tolist():
        yield Fault(
            kind="constant",
            place=part.place(dim, channel),
            decibels=float(decibels[channel]),
            words="varies in float and is constant",
        )
    for channel in (off & ~constant).nonzero().flatten().tolist():
        yield Fault(
            kind="output" if dim is None else "channel",
            place=part.place(dim, channel),
            decibels=float(decibels[channel]),
            words=f"is {float(decibels[channel]):.1f} dB from float, {checks.channel_db:g} are wanted",
            short=checks.channel_db - float(decibels[channel]),
        )


def _further(part: _Part, dim: int | None, checks: Checks) -> Iterator[Fault]:
    expected, graph, deployed = part.rows(dim)
    if not expected.numel():
        return
    unit = (expected.abs().amax(1) / GRID).clamp(min=_grid(graph))
    still = ~_varies(expected, _signal(expected))
    unit = torch.where(still, unit.max(), unit)  # a dead channel has no values to take a grid from
    least = unit.square() / torch.where(still, 1, 12)  # it may be a whole step away
    made = _noise(expected, graph)
    more = _noise(expected, deployed)
    elements = _independent(part, expected)
    few = elements < POSITIONS // 4  # the noise of one channel is not known from so few
    rounded = made[made > 0]  # zeros behind a ReLU have no error, which says nothing of the grid
    noise = torch.maximum(torch.maximum(made, rounded.median()) if few and len(rounded) else made, least)
    ratio = more / noise.clamp(min=1e-300)
    channel = int(ratio.argmax())
    if float(ratio[channel]) > 10 ** (checks.apart_db / 10) * slack(elements, len(ratio)):
        signal = _signal(expected)
        before, after = (float(_decibels(signal, each)[channel]) for each in (made, more))
        yield Fault(
            kind="apart",
            place=part.place(dim, channel),
            decibels=after,
            words=f"is {after:.1f} dB from float deployed and {before:.1f} dB in the graph it was made from",
            short=before - after - checks.apart_db,
        )
    step = torch.maximum(1.01 * unit, SPREAD * made.sqrt())
    if few:  # an error of rounding is at most half a step, and less than that in most of few elements
        step = step.clamp(min=4 * float((expected - graph).abs().max()))
    over = int(((deployed - graph).abs() > step.unsqueeze(1)).sum())
    share = over / deployed.numel()
    if over > 1 and share > checks.apart_share:
        yield Fault(
            kind="steps",
            place=Place(output=part.output),
            decibels=None,
            words=f"differs by more than a step from the graph it was made from on {100 * share:.2g} % of its elements",
        )


def _grid(values: Tensor) -> float:
    """The step of the grid that values lie on; 0 where they lie on none that can be told."""
    distinct = values.flatten()[:LOOKED_AT].unique()
    if not 8 <= len(distinct) <= GRID + 1:
        return 0.0
    gaps = distinct.diff()
    for part in range(1, 9):  # of few values no two may be neighbors on the grid
        step = gaps.min() / part
        if bool((gaps / step - (gaps / step).round()).abs().max() < 0.01 * part):
            return float(step)
    return 0.0


def _parts(several: Sequence[Outputs], axes: Sequence[int | None]) -> Iterator[_Part]:
    """Every output over all runs; runs of other sizes are parts of their own."""
    for output, axis in enumerate(axes):
        groups: dict[tuple[int, ...], list[list[Tensor]]] = {}
        for runs in zip(*several, strict=True):
            tensors = [run[output].detach().cpu() for run in runs]
            if any(tensor.shape != tensors[0].shape for tensor in tensors):
                continue
            known = axis is not None and tensors[0].dim() > axis
            moved = [
                tensor.movedim(axis, 0) if known and axis is not None else tensor.unsqueeze(0) for tensor in tensors
            ]
            groups.setdefault(tuple(moved[0].shape[1:]), []).append(moved)
        for moved_runs in groups.values():
            joined = [torch.cat(each) for each in zip(*moved_runs, strict=True)]
            integer = not joined[0].is_floating_point()
            wide = [each.double() for each in joined]
            finite = wide[0].isfinite()
            bad = (index for index, each in enumerate(wide) if bool((~each.isfinite() & finite).any()))
            yield _Part(
                output=output,
                values=tuple(torch.where(finite, each, 0.0) for each in wide),
                axis=axis,
                broken=next(bad, None),
                integer=integer,
            )


def _broken(part: _Part) -> Fault:
    return Fault(
        kind="not finite", place=Place(output=part.output), decibels=None, words="has values that are not finite"
    )


def _constant_integers(part: _Part) -> Iterator[Fault]:
    """Of classes and the like: one answer for everything, where float gives several."""
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
    """Does a channel move over enough of its own 8-bit grid, zero included, to be told from a constant on it?"""
    unit = rows.abs().amax(1) / GRID
    return (rows.amax(1) - rows.amin(1) >= VISIBLE * unit) & (signal >= 10 * unit.square() / 12) & (unit > 0)


def _independent(part: _Part, rows: Tensor) -> int:
    """How many elements of a channel count as independent of one another."""
    return min(rows.shape[1], POSITIONS * part.values[0].shape[0])
