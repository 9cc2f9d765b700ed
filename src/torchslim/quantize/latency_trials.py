"""Programs with some layers in float, made from one calibration and timed on the target."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch.fx import GraphModule

from torchslim.core import distributed
from torchslim.core.measurement import Measurement, Speedup
from torchslim.core.parts import under
from torchslim.core.reason import Reason
from torchslim.core.step import CHOICE_SECONDS, Context, Event, Workbench
from torchslim.errors import DeployError, ExportError
from torchslim.quantize.conversion import integers
from torchslim.quantize.latency_search import MOST_PROGRAMS, UNUSABLE, Fastest, Group, Layers, Timed, fastest
from torchslim.quantize.modules import Prepared
from torchslim.quantize.stored_rows import StoredRows
from torchslim.quantize.units import kinds_of, layers_before, units_of

KINDS = (
    "depthwise convolutions",
    "pointwise convolutions",
    "convolutions",
    "transposed convolutions",
    "linear layers",
    "products of activations",
    "recurrent layers",
    "embeddings",
)
"""The order in which kinds of layers are tried."""


@dataclass
class LatencyTrials:
    """Makes and times programs of one prepared graph; layers are named by the keys of their units.

    Times are kept in `rows`, so that an interrupted search makes no program again that it has timed.

    Args:
        prepared: a calibrated graph.
        bench: deploys and times; of the part that the graph computes.
        ctx: of the step.
        path: of the part; "" for the whole model.
        rows: where times are kept.
    """

    prepared: Prepared
    bench: Workbench
    ctx: Context
    path: str
    rows: StoredRows
    timed: int = 0
    _deployed: dict[Layers, Callable[..., Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        program = self.prepared.program
        assert isinstance(program, GraphModule)
        self.units = units_of(program)
        self.kinds, self.before = kinds_of(program, self.units), layers_before(program, self.units)

    @cached_property
    def groups(self) -> list[Group]:
        """The layers by kind."""
        by_kind = {kind: [key for key in self.kinds if self.kinds[key] == kind] for kind in KINDS}
        return [Group(kind=kind, layers=tuple(layers), of=len(layers)) for kind, layers in by_kind.items() if layers]

    def released(self, layers: Layers) -> frozenset[str]:
        """Keys of all units in float: the layers, and the operations that read the result of one of them.

        With every layer in float, so are the operations that read no layer.
        """
        if len(layers) == len(self.kinds):
            return frozenset(unit.key for unit in self.units)
        return layers | {key for key, sources in self.before.items() if sources & layers}

    def fastest(self) -> Fastest:
        """The choice of layers; in every process that of the first."""
        found = None
        if distributed.is_first():
            found = fastest(self.groups, self.compare, self.profiled)
        choice: Fastest = distributed.told(found)
        return choice

    def compare(self, reference: Layers, candidates: Sequence[Layers]) -> Sequence[Timed]:
        """Make programs and time them in turn with a reference."""
        start = time.perf_counter()
        key = json.dumps([self.path, *(sorted(layers) for layers in (reference, *candidates))])
        timed = [_read(row) for row in self.rows.known(key, lambda: self._measured(reference, candidates))]
        self.timed += len(candidates)
        values = {CHOICE_SECONDS: (time.perf_counter() - start) / len(candidates)}
        self.ctx.progress(
            Event(step=self.ctx.name, phase="choose by latency", current=self.timed, total=MOST_PROGRAMS, values=values)
        )
        return timed

    def profiled(self, current: Layers) -> Layers | None:
        """Layers whose kernels take longer in a program on integers than in float; None without a profiler.

        Layers that are in float now stay there, unless the program with all layers on integers has them faster.
        """
        key = json.dumps([self.path, "profiled", sorted(current)])
        proposed = self.rows.known(key, lambda: self._profiled(current))
        return None if proposed is None else frozenset(proposed)

    def _profiled(self, current: Layers) -> list[str] | None:
        every = frozenset(self.kinds)
        programs = [self._program(layers) for layers in (every, current, frozenset())]
        times = [None if program is None else self.bench.layer_times(program) for program in programs]
        if None in times:
            return None
        floats, mixed, integers_ = (own or {} for own in times)
        paths = {unit.key: unit.layer for unit in self.units if not unit.operation}
        chosen = []
        for layer in self.kinds:
            own = integers_ if layer in current else mixed
            if own.get(paths[layer], 0.0) > floats.get(paths[layer], 0.0):
                chosen.append(layer)
        return chosen

    def _measured(self, reference: Layers, candidates: Sequence[Layers]) -> list[dict[str, Any] | None]:
        names = {layers: str(number) for number, layers in enumerate(dict.fromkeys((reference, *candidates)))}
        programs = {name: deployed for layers, name in names.items() if (deployed := self._program(layers)) is not None}
        first = names[reference] if names[reference] in programs else next(iter(programs))
        timings = self.bench.compare(programs, first)
        kept = {*names, frozenset(), frozenset(self.kinds)}  # needed again: the reference, one of the others, the ends
        self._deployed = {layers: deployed for layers, deployed in self._deployed.items() if layers in kept}
        return [_row(*timings[names[layers]]) if names[layers] in programs else None for layers in candidates]

    def _program(self, layers: Layers) -> Callable[..., Any] | None:
        """The deployed program; None where the runtime does not take it, though in float it does."""
        if layers not in self._deployed:
            try:
                self._deployed[layers] = self.bench.deploy(integers(self.prepared, self.released(layers)))
            except (DeployError, ExportError):
                if len(layers) == len(self.kinds):
                    raise
                self._deployed[layers] = None
        return self._deployed[layers]


def _row(latency: Measurement, speedup: Speedup) -> dict[str, Any]:
    return {"latency": asdict(latency), "speedup": asdict(speedup)}


def _read(row: Mapping[str, Any] | None) -> Timed:
    if row is None:
        return Timed(latency=None, speedup=Speedup(value=UNUSABLE))
    return Timed(latency=Measurement(**row["latency"]), speedup=Speedup(**row["speedup"]))


def unit_reasons(trials: LatencyTrials, choice: Fastest) -> dict[str, str]:
    """The reasons of a choice for all units that stay in float, those of operations included."""
    layers = frozenset(choice.reasons)
    follows = Reason.FASTER_IN_FLOAT.with_detail("layers before it are in float")
    return {key: choice.reasons.get(key, follows) for key in sorted(trials.released(layers) if layers else ())}


def layer_reasons(trials: LatencyTrials, choice: Fastest) -> Iterator[tuple[str, str]]:
    """Names of the layers that stay in float, in the whole model, with the reasons."""
    for unit in trials.units:
        if unit.key in choice.reasons:
            yield under(trials.path, unit.layer), choice.reasons[unit.key]


def _ms(latency: Measurement | None) -> float | None:
    return None if latency is None else latency.value


def evidence_of(choice: Fastest) -> dict[str, Any]:
    """A choice for the report."""
    return {
        "in_float": len(choice.reasons),
        "layers": choice.layers,
        "programs": choice.programs,
        "most_programs": MOST_PROGRAMS,
        "latency_ms": _ms(choice.latency),
        "float_ms": _ms(choice.float_latency),
        "integer_ms": _ms(choice.integer_latency),
    }
