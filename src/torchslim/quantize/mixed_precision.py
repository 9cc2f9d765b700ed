"""Mixed precision by budget: the fewest layers out of a scheme's integers that keep the metric within a drop."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import nn

from torchslim.core import distributed
from torchslim.core.batches import predictor
from torchslim.core.files import present
from torchslim.core.isolation import preserved_globals, warn
from torchslim.core.layer_patterns import check_patterns
from torchslim.core.seals import read_sealed, write_sealed
from torchslim.core.step import Context, Event
from torchslim.errors import SelectError, StorageError
from torchslim.quantize.modules import Prepared
from torchslim.quantize.preparation import convert
from torchslim.quantize.schemes import FLOAT, find_scheme
from torchslim.training.calibration import calibration_of
from torchslim.training.loaders import seeded_splits

GIVE_BACK = 12  # layers that are tried on integers again, one at a time, after the bisection
PROBES = (0.25, 0.5, 0.75)  # of all layers, where even the longest list does not hold the metric
WIDENINGS = 2  # how often a trained model that misses the metric is trained again with twice the layers left out
KEPT = {FLOAT: "kept in float to hold the metric", "int8-weights": "kept in 8 bits to hold the metric"}


def fallback(scheme: str) -> str:
    """What layers get instead that a scheme hurts too much: 8 bits for 4, else float."""
    return "int8-weights" if find_scheme(scheme).weight_bits < 8 else FLOAT


def exceptions(left: Sequence[str], layers: Sequence[str], scheme: str) -> dict[str, str]:
    """Some layers left out, as `Quantize.layers` takes them.

    A name there covers what is inside of it, so the layers that stay inside of one that is left out, as the
    projections of an attention whose products are, are named after it.
    """
    inside = (name for name in layers if any(name.startswith(f"{each}.") for each in left))
    found = dict.fromkeys(inside, scheme) | dict.fromkeys(left, fallback(scheme))
    return dict(sorted(found.items(), key=lambda pair: pair[0].count(".")))  # the outer first: the last counts


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which layers stay out, in the order in which they hurt, and what the metric then loses, in its own unit."""

    layers: tuple[str, ...]
    drop: float
    held: bool


def fewest(
    ranked: Sequence[str], drop: Callable[[Sequence[str]], float], allowed: float, *, most: int | None = None
) -> Choice:
    """The fewest layers to leave out so that a metric drops by no more than is allowed.

    How many of the most sensitive ones are left out is found by bisection; then single ones are given back, the least
    sensitive first, as long as the budget holds. Whatever is returned has been measured. Where nothing holds, the
    nearest that was measured.

    Args:
        ranked: layers, the most sensitive first.
        drop: measures what is lost where these layers are left out; asked about each choice once.
        allowed: the largest drop.
        most: how many may be left out; None: all.
    """
    known: dict[tuple[str, ...], float] = {}

    def measured(layers: Sequence[str]) -> float:
        key = tuple(layers)
        if key not in known:
            known[key] = drop(key)
        return known[key]

    def holds(layers: Sequence[str]) -> bool:
        return measured(layers) <= allowed + 1e-9

    most = len(ranked) if most is None else most
    low, high = 0, most
    if holds(()):
        return Choice(layers=(), drop=known[()], held=True)
    if not holds(ranked[:most]):
        probes = sorted({round(share * most) for share in PROBES} - {0, most})
        high = next((count for count in probes if holds(ranked[:count])), 0)
        if not high:
            nearest = min(known, key=lambda key: (known[key], len(key)))
            return Choice(layers=nearest, drop=known[nearest], held=False)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(ranked[:middle]) else (middle, high)
    chosen = tuple(ranked[:high])
    for name in chosen[::-1][:GIVE_BACK]:
        without = tuple(each for each in chosen if each != name)
        if holds(without):
            chosen = without
    return Choice(layers=chosen, drop=known[chosen], held=True)


class Way(Protocol):
    """How a model is quantized, with some layers left out: what a `Quantize` gives to the search."""

    @property
    def scheme(self) -> str:
        """Of the layers that are not left out."""
        ...

    def prepared(self, model: nn.Module, ctx: Context, layers: Mapping[str, str]) -> Prepared:
        """A calibrated model, for post-training quantization."""
        ...


@dataclass
class Trials:
    """Choices of layers, each measured as the artifact that it would be; what was measured is kept in `ctx.state`."""

    model: nn.Module
    ctx: Context
    way: Way
    rows: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = None if self.ctx.state is None else self.ctx.state / "mixed.rows"
        if self.path is not None and present(self.path):
            try:
                self.rows = json.loads(read_sealed(self.path, self.ctx.key))
            except StorageError as error:
                if distributed.is_first():
                    warn(f"{error}; the choices of layers are measured again")
        self.base = self._known("base", lambda: self.metric(predictor(self.model)))

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Those that can be left out, the most sensitive first.

        From what is known beforehand where that speaks of all of them, else from the noise of the outputs when each
        alone is on integers.
        """
        from torchslim.quantize.layerwise import damages, singles

        prepared = self.way.prepared(self.model, self.ctx, {})
        spared = {
            record.layer for record in prepared.records if record.weight_bits == 8
        }  # have what they would get instead
        names = [single.layer for single in singles(prepared)]
        if fallback(self.way.scheme) != FLOAT:
            names = [name for name in names if name not in spared]
        names = [name for name in names if self._can_be_named(name)]
        if all(name in self.ctx.priors for name in names):
            hurts: Mapping[str, float] = self.ctx.priors
        elif all(f"damage {name}" in self.rows for name in names):
            hurts = {name: self.rows[f"damage {name}"] for name in names}
        else:
            hurts = damages(prepared, calibration_of(self.ctx).inputs)
            self._keep(
                {f"damage {name}": min(hurts[name], sys.float_info.max) for name in names}
            )  # JSON has no infinity
        return tuple(sorted(names, key=lambda name: -hurts[name]))

    @property
    def most(self) -> int:
        """How many may be left out: all in float are no quantized model."""
        return max(len(self.layers) - (fallback(self.way.scheme) == FLOAT), 0)

    def drop(self, layers: Sequence[str]) -> float:
        """What of the metric is lost where these layers are left out, after training or without."""
        self.ctx.progress(Event(step=self.ctx.name, phase="choose layers", values={"left out": len(layers)}))

        def value() -> float:
            # the choice that is taken is checked, the metric judges those on the way
            quantized = convert(self.way.prepared(self.model, self.ctx, self.exceptions(layers)), checks=None)
            return self.metric(self._ships(quantized))

        return self.lost(self._known(json.dumps(sorted(layers)), value))

    def lost_by(self, quantized: nn.Module) -> float:
        """What of the metric a finished model loses."""
        return self.lost(self.metric(self._ships(quantized)))

    def lost(self, value: float) -> float:
        """How much worse a value is than that of the model that the step received; below 0 where it is better."""
        worse = self.base - value
        return worse if self.ctx.task.as_metric().higher_is_better else -worse

    def exceptions(self, layers: Sequence[str]) -> dict[str, str]:
        """With these left out, as `Quantize.layers` takes them."""
        return exceptions(layers, self.layers, self.way.scheme)

    def metric(self, predict: Any) -> float:
        """On val; every evaluation sees the same batches."""
        with preserved_globals(self.ctx.seed), seeded_splits(self.ctx.task, self.ctx.seed):
            return self.ctx.task.evaluate(predict, "val")

    def _ships(self, quantized: nn.Module) -> Any:
        return predictor(quantized) if self.ctx.workbench is None else self.ctx.workbench.deploy(quantized)

    def _can_be_named(self, layer: str) -> bool:
        """A function that the model itself calls belongs to no module."""
        try:
            check_patterns(self.model, [layer], None)
        except SelectError:
            return False
        return True

    def _known(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self.rows:
            self._keep({key: measure()})
        return self.rows[key]

    def _keep(self, rows: Mapping[str, float]) -> None:
        self.rows |= rows
        if self.path is not None and distributed.is_first():
            write_sealed(self.path, json.dumps(self.rows, allow_nan=False).encode(), self.ctx.key)
