"""Latency tables: a model's time on the target by the width of each group, measured once for groups that are alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from torchslim.core.files import digest
from torchslim.core.schema import LIMITS, parse_json, read_file
from torchslim.core.step import Workbench
from torchslim.errors import PruneError
from torchslim.prune.dependency.coupling import Coupling
from torchslim.prune.dependency.groups import Group, Unit
from torchslim.prune.latency.cost_model import Cost, between, choose, fit
from torchslim.prune.structured.attributes import mend
from torchslim.prune.structured.plan import Plan
from torchslim.prune.structured.selection import Amount, Selection, least_steps, rounded, select, step_size
from torchslim.prune.structured.surgery import perform

FORMAT = "torchslim-latency-rows"

PROGRAMS = 48
"""Approximate number of narrowed programs that are timed for a model; each takes seconds to make."""

WIDTHS = (4, 15)
"""The least and the largest number of programs of one row."""

TOGETHER = 8
"""Programs timed together: more need more memory, fewer time the reference model more often."""

EVENLY = (75, 50, 25)
"""Percentages to which every unit is narrowed at once, to measure the combined effect."""

ALL = "all"
"""The key of the row in which all units are narrowed at once; its widths are percentages."""

Rows = dict[str, dict[int, float]]
"""For each row and width, the time divided by the whole model's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Units that are alike: narrowing any of them shrinks the same operations by as much."""

    key: str
    units: tuple[int, ...]
    widths: tuple[int, ...]  # narrower than the full width, falling


def _names(coupling: Coupling) -> list[str]:
    """Names of the units, from their groups: the same in every model that was cut from the same one."""
    return [" ".join(coupling.groups[number].name for number in unit.groups) for unit in coupling.units]


def rows_of(selection: Selection) -> list[Row]:
    """The rows of a model's table, in the order of its units."""
    coupling = selection.coupling
    numbers_by_key: dict[str, list[int]] = {}
    for number in range(len(coupling.units)):
        numbers_by_key.setdefault(_key(selection, number), []).append(number)
    if not numbers_by_key:
        return []
    count = int(np.clip(PROGRAMS // len(numbers_by_key), *WIDTHS))
    rows = [
        Row(key=key, units=tuple(numbers), widths=even_widths(coupling.units[numbers[0]], selection, count))
        for key, numbers in numbers_by_key.items()
    ]
    several = len(coupling.units) > 1
    return [*rows, *([Row(key=ALL, units=tuple(range(len(coupling.units))), widths=EVENLY)] if several else [])]


def programs(plan: Plan, amount: Amount) -> tuple[Selection, list[Row]]:
    """The selection and rows of a model's table; which channels go does not affect the time."""
    selection = select(plan.coupling(), amount, plan.names, _alike, narrowest=plan.narrowest)
    return selection, rows_of(selection)


def _key(selection: Selection, number: int) -> str:
    """A digest of all operations that change when a unit is narrowed: names, settings, sizes before and after."""
    coupling = selection.coupling
    kept = [unit.width for unit in coupling.units]
    kept[number] = max(kept[number] // 2, 1)
    removed = selection.removed(kept)
    changes = []
    for operation in coupling.trace.operations:
        values = (*operation.inputs, *operation.outputs)
        after = [coupling.shape(value, removed) for value in values]
        before = [value.shape for value in values]
        if before != after:
            changes.append(repr((operation.name, operation.scalars, before, after)))
    unit = coupling.units[number]
    # the same operations at the same width, with the same steps
    return digest(unit.width, step_size(unit, coupling, selection.amount), sorted(changes))[:16]


def even_widths(unit: Unit, selection: Selection, count: int) -> tuple[int, ...]:
    """About `count` evenly spaced widths, multiples of as large a power of two as possible, which suits kernels."""
    amount = selection.amount
    step = step_size(unit, selection.coupling, amount)
    while unit.width // (2 * step) > count:
        step *= 2
    targets = [unit.width * place / (count + 1) for place in range(count, 0, -1)]
    least = least_steps(unit, selection.coupling, amount.min_channels)
    widths = [rounded(unit, target, step, least, selection.narrowest) for target in targets]
    return tuple(dict.fromkeys(width for width in widths if width < unit.width))


def _kept(row: Row, width: int, selection: Selection) -> list[int]:
    """Number of steps that each unit keeps in a program of the table."""
    full_widths = [unit.width for unit in selection.coupling.units]
    if row.key == ALL:
        return selection.widths([full_width * width / 100 for full_width in full_widths])
    return [width if number == row.units[0] else full_width for number, full_width in enumerate(full_widths)]


def narrowed(plan: Plan, selection: Selection, kept: Sequence[int]) -> nn.Module | None:
    """The model with narrowed units, not verified; None if no unit is narrowed or the model cannot be built."""
    if all(steps == unit.width for steps, unit in zip(kept, selection.coupling.units, strict=True)):
        return None
    try:
        surgery, diverged = mend(plan.model, selection.coupling, selection.removed(kept), plan.inputs)
        return None if diverged is not None else perform(plan.model, surgery)
    except PruneError:
        return None


@dataclass(frozen=True)
class Variant:
    """A program of the table, which `make` builds when it is timed."""

    row: Row
    width: int
    name: str
    make: Callable[[], nn.Module | None]


def variants(plan: Plan, selection: Selection, rows: Sequence[Row]) -> list[Variant]:
    """Every program of the table."""
    programs_of_rows = []
    for row in rows:
        for width in row.widths:
            kept = _kept(row, width, selection)
            name = f"{row.key}-{digest(sorted(zip(_names(selection.coupling), kept, strict=True)))[:8]}-{width}"
            make = partial(narrowed, plan, selection, kept)
            programs_of_rows.append(Variant(row, width, name if row.key == ALL else f"{row.key}-{width}", make))
    return programs_of_rows


@dataclass
class Table:
    """Predicted times of a model and of models that are cut from it.

    Args:
        plan: of the model that all times are relative to.
        amount: the steps in which its groups shrink.
        workbench: measures the rows that are missing; None: only the given rows are used.
        progress: called with the number of programs timed, and the number to time.
        rows: times by row and width.
        elsewhere: the machine that the rows were measured on, if it is not this one.
    """

    plan: Plan
    amount: Amount
    workbench: Workbench | None = None
    progress: Callable[[int, int], None] = lambda timed, total: None
    rows: Rows = field(default_factory=dict)
    elsewhere: str = ""
    _own: dict[str, dict[int, float]] = field(default_factory=dict)  # times by unit name and width
    _names: list[str] = field(default_factory=list)  # of the units, in the order of `_cost`
    _cost: Cost | None = None
    _met: list[tuple[float, float]] = field(default_factory=list)  # of the row `ALL`: predicted and measured times

    def learn(self) -> None:
        """Measure the missing rows of the model's units, and fit the cost model."""
        selection, rows = programs(self.plan, self.amount)
        coupling = selection.coupling
        names = _names(coupling)
        if self._cost is not None and names == self._names:
            return
        missing = [row for row in rows if row.key not in self.rows]
        if self.workbench is not None:
            self._measure(selection, missing)
        elif missing and len(missing) == len(rows):
            raise PruneError("the table of latencies has none of the model's groups; make its folder again")
        self._names = names
        self._own = {
            names[number]: {coupling.units[number].width: 1.0, **self.rows.get(row.key, {})}
            for row in rows
            if row.key != ALL
            for number in row.units
        }
        touches, work_shares = _work(coupling)
        self._cost = fit(touches, work_shares, [self._own[name] for name in names])
        even_row = Row(key=ALL, units=(), widths=EVENLY)
        self._met = [
            (self._cost.time(_kept(even_row, width, selection)), ratio)
            for width, ratio in self.rows.get(ALL, {}).items()
        ]

    def _measure(self, selection: Selection, rows: Sequence[Row]) -> None:
        assert self.workbench is not None
        self.rows |= {row.key: {} for row in rows}
        missing = variants(self.plan, selection, rows)
        for start in range(0, len(missing), TOGETHER):
            group = missing[start : start + TOGETHER]
            times = self.workbench.latency({variant.name: variant.make for variant in group}, self.plan.model)
            for variant in group:
                if variant.name in times:
                    self.rows[variant.row.key][variant.width] = times[variant.name]
            self.progress(start + len(group), len(missing))

    def choose(self, selection: Selection, ceiling: float) -> list[int]:
        """Number of steps that each unit keeps, for a predicted time of at most `ceiling` of the whole model's."""
        times, cost = self._aligned(selection)
        losses_by_width = []
        for number, unit in enumerate(selection.coupling.units):
            ranks = selection.ranks[number] - min((float(rank.min()) for rank in selection.ranks), default=0.0)
            losses = np.concatenate([[0.0], np.cumsum(ranks)])
            widths = {unit.width, *(width for width in times[number] if width < unit.width)}
            losses_by_width.append({width: float(losses[unit.width - width]) for width in widths})
        return choose(
            cost, losses_by_width, between([(measured, predicted) for predicted, measured in self._met], ceiling)
        )

    def predict(self, selection: Selection, kept: Sequence[int]) -> float:
        """The predicted time over the whole model's."""
        return between(self._met, self._aligned(selection)[1].time(kept))

    def _aligned(self, selection: Selection) -> tuple[list[Mapping[int, float]], Cost]:
        """Measured times and the cost model, in the order of a selection's units, whose model may be cut already."""
        assert self._cost is not None, "learn before choosing"
        cost, places = self._cost, {name: place for place, name in enumerate(self._names)}
        unit_names = _names(selection.coupling)
        times: list[Mapping[int, float]] = [self._own.get(name, {}) for name in unit_names]
        curves = [cost.curves[places[name]] if name in places else {1: 1.0} for name in unit_names]
        columns = [places.get(name, -1) for name in unit_names]
        touches = np.zeros((len(cost.touches), len(unit_names)), dtype=bool)
        for column, place in enumerate(columns):
            if place >= 0:
                touches[:, column] = cost.touches[:, place]
        return times, Cost(touches, cost.shares, curves)

    def to_dict(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The table as plain values, in the format that `load_rows` reads."""
        rows = {key: {str(width): ratio for width, ratio in row.items()} for key, row in self.rows.items()}
        return {"format": FORMAT, "about": dict(about), "rows": rows}


def _alike(coupling: Coupling, group: Group) -> NDArray[np.float64]:
    """Equal scores for all classes, as which channels go does not affect the time."""
    return np.ones(len(group.classes))


def _work(coupling: Coupling) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Sets of units that operations depend on, (sets, units), and the share of the work of each set, (sets,)."""
    owner: dict[int, int] = {}
    for number, unit in enumerate(coupling.units):
        for cell in unit.cells:
            owner |= dict.fromkeys(cell.classes.tolist(), number)
    macs_by_units: dict[frozenset[int], float] = {}
    total = 0.0
    for operation in coupling.trace.operations:
        total += operation.macs
        if not operation.macs:
            continue
        classes = [ids for layers, _ in operation.factors for ids in coupling.classes(layers)]
        touched = frozenset(
            owner[identifier] for ids in classes for identifier in np.unique(ids).tolist() if identifier in owner
        )
        if touched:
            macs_by_units[touched] = macs_by_units.get(touched, 0.0) + operation.macs
    touches = np.zeros((len(macs_by_units), len(coupling.units)), dtype=bool)
    for place, units in enumerate(macs_by_units):
        touches[place, sorted(units)] = True
    return touches, np.array(list(macs_by_units.values())) / max(total, 1.0)


def load_rows(path: str | Path, about: Mapping[str, Any]) -> tuple[Rows, str]:
    """Rows that were measured elsewhere, and the machine that they were measured on.

    Args:
        path: of a `latency.json`.
        about: what the times must have been measured for, as `Workbench.about` gives it, or a part of that.

    Raises:
        PruneError: the file cannot be read, or is of another model, runtime or number of threads.
    """
    remedy = "give the latency.json that bench.py wrote"
    raw = read_file(Path(path), PruneError, size_bytes=LIMITS.size_bytes, mend=remedy)
    content = parse_json(raw, f"latency_table {path}", PruneError, mend=remedy)
    try:
        if content["format"] != FORMAT:
            raise KeyError("format")
        measured_about, machine = dict(content["about"]), str(content["machine"])
        rows = {key: {int(width): float(ratio) for width, ratio in row.items()} for key, row in content["rows"].items()}
        if not all(0 < ratio < float("inf") for row in rows.values() for ratio in row.values()):
            raise ValueError("a time is not above 0 and finite")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PruneError(f"latency_table {path} is no table of latencies ({error}); {remedy}") from error
    for key, label in (
        ("runtime", "runtime"),
        ("threads", "threads"),
        ("ends", "final numbers"),
        ("structure", "model"),
    ):
        if key in about and measured_about.get(key) != about[key]:
            measured, expected = (
                ("another", "this one") if key == "structure" else (repr(measured_about.get(key)), repr(about[key]))
            )
            raise PruneError(
                f"latency_table {path} was measured for {label} {measured}, and this is {expected}; make the folder "
                "again from this recipe, and measure it there"
            )
    return rows, machine
