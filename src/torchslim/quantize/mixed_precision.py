"""Mixed precision by budget: leaves out the fewest layers with which the metric stays within a drop."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import nn

from torchslim.core.batches import predictor
from torchslim.core.isolation import copy_model, preserved_globals
from torchslim.core.layer_patterns import check_patterns
from torchslim.core.parts import WHOLE, mounted, under
from torchslim.core.program_names import first_programs
from torchslim.core.step import CHOICE_SECONDS, Context, Event
from torchslim.errors import SelectError
from torchslim.quantize.modules import Prepared
from torchslim.quantize.preparation import convert
from torchslim.quantize.schemes import FLOAT, find_scheme
from torchslim.quantize.stored_rows import StoredRows
from torchslim.training.calibration import PartCalibration
from torchslim.training.loaders import seeded_splits

GIVE_BACK = 12  # layers that are tried on integers again, one at a time, after the bisection
PROBES = (0.25, 0.5, 0.75)  # of the longest list of layers, tried where even that list does not hold the metric
WIDENINGS = 2  # how often a trained model that misses the metric is trained again with twice the layers left out
KEPT = {FLOAT: "kept in float to hold the metric", "int8-weights": "kept in 8 bits to hold the metric"}


def fallback(scheme: str) -> str:
    """Scheme of the layers that `scheme` damages too much: 8-bit weights instead of 4 bits, else float."""
    return "int8-weights" if find_scheme(scheme).weight_bits < 8 else FLOAT


def exceptions(left: Sequence[str], layers: Sequence[str], scheme: str) -> dict[str, str]:
    """The mapping for `Quantize.layers` that leaves out the layers of `left`.

    A name there covers all modules inside. So layers that stay on `scheme` inside of a layer that is left out, such as
    the projections of an attention whose products are left out, get entries behind it.
    """
    inside = (name for name in layers if any(name.startswith(f"{outer}.") for outer in left))
    schemes = dict.fromkeys(inside, scheme) | dict.fromkeys(left, fallback(scheme))
    # outer modules first: the last match counts
    return dict(sorted(schemes.items(), key=lambda pair: pair[0].count(".")))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The layers that are left out, most sensitive first, and the metric's drop, in its own unit."""

    layers: tuple[str, ...]
    drop: float
    held: bool


def fewest(
    ranked: Sequence[str], drop: Callable[[Sequence[str]], float], allowed: float, *, most: int | None = None
) -> Choice:
    """The fewest layers to leave out so that a metric drops by no more than is allowed.

    Bisection finds how many of the most sensitive layers are left out. Then single layers return to the scheme, the
    least sensitive first, where the drop stays allowed. The result has always been measured; where no choice holds, it
    is the measured choice with the smallest drop.

    Args:
        ranked: layers, the most sensitive first.
        drop: measures the drop with these layers left out; called once for each choice.
        allowed: the largest drop.
        most: how many layers may be left out; None: all.
    """
    drops: dict[tuple[str, ...], float] = {}

    def measured(layers: Sequence[str]) -> float:
        key = tuple(layers)
        if key not in drops:
            drops[key] = drop(key)
        return drops[key]

    def holds(layers: Sequence[str]) -> bool:
        return measured(layers) <= allowed + 1e-9

    most = len(ranked) if most is None else most
    low, high = 0, most
    if holds(()):
        return Choice(layers=(), drop=drops[()], held=True)
    if not holds(ranked[:most]):
        probes = sorted({round(share * most) for share in PROBES} - {0, most})
        high = next((count for count in probes if holds(ranked[:count])), 0)
        if not high:
            nearest = min(drops, key=lambda key: (drops[key], len(key)))
            return Choice(layers=nearest, drop=drops[nearest], held=False)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(ranked[:middle]) else (middle, high)
    chosen = tuple(ranked[:high])
    for name in chosen[::-1][:GIVE_BACK]:
        without = tuple(layer for layer in chosen if layer != name)
        if holds(without):
            chosen = without
    return Choice(layers=chosen, drop=drops[chosen], held=True)


def most_choices(most: int) -> int:
    """How many choices `fewest` measures at most, where the longest list of layers holds the metric."""
    return 2 + math.ceil(math.log2(most)) + min(GIVE_BACK, most) if most > 0 else 1


class Way(Protocol):
    """Quantization of a model with some layers left out, as the search needs it; `Quantize` is one."""

    @property
    def scheme(self) -> str:
        """Scheme of the layers that are not left out."""
        ...

    def prepared(
        self, model: nn.Module, ctx: Context, layers: Mapping[str, str], data: PartCalibration
    ) -> dict[str, Prepared]:
        """The calibrated parts of a model by path, for post-training quantization."""
        ...


@dataclass
class Trials:
    """Measures choices of layers, each as the artifact that it would be, and stores the results in `ctx.state`."""

    model: nn.Module
    ctx: Context
    way: Way
    tried: int = 0

    def __post_init__(self) -> None:
        self.rows = StoredRows(self.ctx, "mixed.rows")
        self.data = PartCalibration(self.model, self.ctx, self.ctx.paths)
        self.base: float = self.rows.known("base", lambda: self.metric(predictor(self.model)))

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The layers that can be left out, the most sensitive first.

        Sensitivities come from `ctx.priors` where it has all layers, else from the noise of the outputs with one layer
        alone on integers.
        """
        from torchslim.quantize.layerwise import damages, singles

        programs = self.way.prepared(self.model, self.ctx, {}, self.data)
        parts = {path: programs[path] for path in first_programs(programs)}  # further ones have the same layers
        spared = {  # have their fallback already
            under(path, record.layer)
            for path, prepared in parts.items()
            for record in prepared.records
            if record.weight_bits == 8
        }
        names = [under(path, single.layer) for path, prepared in parts.items() for single in singles(prepared)]
        if fallback(self.way.scheme) != FLOAT:
            names = [name for name in names if name not in spared]
        names = [name for name in names if self._can_be_named(name)]
        if all(name in self.ctx.priors for name in names):
            sensitivities: Mapping[str, float] = self.ctx.priors
        elif all(f"damage {name}" in self.rows for name in names):
            sensitivities = {name: self.rows[f"damage {name}"] for name in names}
        else:
            sensitivities = {
                under(path, layer): damage
                for path, prepared in parts.items()
                for layer, damage in damages(prepared, self.data.inputs(path)).items()
            }
            self.rows.keep(
                {f"damage {name}": min(sensitivities[name], sys.float_info.max) for name in names}
            )  # JSON has no infinity
        return tuple(sorted(names, key=lambda name: -sensitivities[name]))

    @property
    def most(self) -> int:
        """How many layers may be left out: with all of them in float, no layer would be quantized."""
        return max(len(self.layers) - (fallback(self.way.scheme) == FLOAT), 0)

    def drop(self, layers: Sequence[str]) -> float:
        """The metric's drop with these layers left out, after post-training quantization."""
        self.ctx.progress(Event(step=self.ctx.name, phase="choose layers", values={"left out": len(layers)}))

        def value() -> float:
            # only the final choice is checked, the metric judges the others
            parts = self.way.prepared(self.model, self.ctx, self.exceptions(layers), self.data)
            quantized = {path: convert(prepared, checks=None) for path, prepared in parts.items()}
            whole = self.model if WHOLE in parts else copy_model(self.model)[0]
            return self.metric(self._ships(mounted(whole, quantized)))

        start = time.perf_counter()
        lost = self.lost(float(self.rows.known(json.dumps(sorted(layers)), value)))
        self.tried += 1
        self.ctx.progress(
            Event(
                step=self.ctx.name,
                phase="choose layers",
                current=self.tried,
                total=most_choices(self.most),
                values={CHOICE_SECONDS: time.perf_counter() - start},
            )
        )
        return lost

    def lost_by(self, quantized: nn.Module) -> float:
        """The metric's drop of a finished model."""
        return self.lost(self.metric(self._ships(quantized)))

    def lost(self, value: float) -> float:
        """How much worse `value` is than the metric of the model that the step received; below 0 if better."""
        worse = self.base - value
        return worse if self.ctx.task.as_metric().higher_is_better else -worse

    def exceptions(self, layers: Sequence[str]) -> dict[str, str]:
        """The mapping for `Quantize.layers` with these layers left out."""
        return exceptions(layers, self.layers, self.way.scheme)

    def metric(self, predict: Any) -> float:
        """The task's metric on val; every evaluation sees the same batches."""
        with preserved_globals(self.ctx.seed), seeded_splits(self.ctx.task, self.ctx.seed):
            return self.ctx.task.evaluate(predict, "val")

    def _ships(self, quantized: nn.Module) -> Any:
        return predictor(quantized) if self.ctx.workbench is None else self.ctx.workbench.deploy(quantized)

    def _can_be_named(self, layer: str) -> bool:
        """Whether `layer` is a module of the model; a function that the model itself calls is in none."""
        try:
            check_patterns(self.model, [layer], None)
        except SelectError:
            return False
        return True
