"""Whole channels, neurons and heads physically removed: what goes, how much, and the proof that it is right."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from torchslim.channels import oracle
from torchslim.channels.groups import Coupling, Group, Heads, Mask, Unit, couple
from torchslim.channels.trace import Trace, named_weights, trace
from torchslim.errors import PruneError
from torchslim.isolation import copy_model, preserved_globals
from torchslim.prune.shrink import Surgery, mend, perform
from torchslim.select import Patterns, as_list, class_names, matches
from torchslim.steps import Inputs
from torchslim.task import device_of, to_device

Of = Literal["params", "macs", "channels"]
Scope = Literal["global", "layer"]
Scores = Callable[[Coupling, Group], NDArray[np.float64]]

ROLLBACKS = 60
"""How often a removal that could not be verified is made smaller before everything is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much goes, and in what steps."""

    sparsity: float = 0.5
    of: Of = "params"
    scope: Scope = "global"
    round_to: int = 8
    min_channels: int = 8

    def __post_init__(self) -> None:
        for name, value, known in (("of", self.of, ("params", "macs", "channels")),
                                   ("scope", self.scope, ("global", "layer"))):  # fmt: skip
            if value not in known:
                raise PruneError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        for name, value in (("round_to", self.round_to), ("min_channels", self.min_channels)):
            if not isinstance(value, int) or value < 1:
                raise PruneError(f"{name} must be a whole number of at least 1, got {value!r}")


def step_size(unit: Unit, coupling: Coupling, round_to: int) -> int:
    """Steps of a unit that keep its widths multiples of `round_to`; 1 where it is no wider than that."""
    largest = 1
    for number in unit.groups:
        group = coupling.groups[number]
        for member in group.members:
            largest = max(largest, len(member.indices) // max(len(group.classes), 1))
    step = round_to // gcd(round_to, largest)
    return step if unit.width > step else 1


def rounded(unit: Unit, kept: float, step: int, least: int) -> int:
    """The nearest allowed width: a multiple of `step`, at least `least`, at most what there is."""
    low = least if unit.width > least else 1
    nearest = round(kept / step) * step if step > 1 else round(kept)
    return max(min(nearest, unit.width), min(low, unit.width), 1)


@dataclass
class Selection:
    """Which classes go, for any amount: units with their classes in the order in which they go."""

    coupling: Coupling
    amount: Amount
    names: Sequence[str]
    order: list[list[NDArray[np.int64]]]  # per unit and cell: classes, the least important first
    ranks: list[NDArray[np.float64]]  # per unit: the score of each of its steps, rising

    def removed(self, kept: Sequence[int]) -> Mask:
        """The atoms' mask when each unit keeps so many steps."""
        mask = np.zeros(self.coupling.atoms.count, dtype=bool)
        for unit, cells, left in zip(self.coupling.units, self.order, kept, strict=True):
            for cell, classes in zip(unit.cells, cells, strict=True):
                mask[classes[: (unit.width - left) * cell.stride]] = True
        return mask

    def left(self, kept: Sequence[int]) -> float:
        """The fraction of the model that is left, in the amount's measure."""
        if self.amount.of == "channels":
            total = sum(unit.width for unit in self.coupling.units)
            return sum(kept) / max(total, 1)
        removed = self.removed(kept)
        nothing = np.zeros_like(removed)
        if self.amount.of == "macs":
            return self.coupling.macs(removed) / max(self.coupling.macs(nothing), 1)
        return self.coupling.parameters(removed, self.names) / max(self.coupling.parameters(nothing, self.names), 1)

    def widths(self, wanted: Sequence[float]) -> list[int]:
        """Allowed widths near the wanted ones."""
        amount = self.amount
        return [
            rounded(unit, each, step_size(unit, self.coupling, amount.round_to), amount.min_channels)
            for unit, each in zip(self.coupling.units, wanted, strict=True)
        ]

    def choose(self) -> list[int]:
        """Per unit how many steps stay, so that what is left is as near the target as can be."""
        units, target = self.coupling.units, 1 - self.amount.sparsity
        if self.amount.scope == "layer":
            if self.amount.of == "channels":
                return self.widths([unit.width * target for unit in units])

            def at(progress: float) -> list[int]:
                return self.widths([unit.width * (1 - progress) for unit in units])

            return self._search(at, np.linspace(0, 1, 513))
        scores = np.concatenate([ranks for ranks in self.ranks]) if units else np.zeros(0)
        owner = np.concatenate([np.full(len(ranks), place) for place, ranks in enumerate(self.ranks)]) if units else []
        queue = np.asarray(owner)[np.argsort(scores, kind="stable")]

        def after(count: float) -> list[int]:
            gone = np.bincount(queue[: int(count)], minlength=len(units)) if units else np.zeros(0)
            return self.widths([unit.width - each for unit, each in zip(units, gone.tolist(), strict=True)])

        return self._search(after, np.arange(len(queue) + 1))

    def _search(self, at: Callable[[float], list[int]], grid: NDArray[Any]) -> list[int]:
        """Bisect: what is left falls along the grid."""
        target, low, high = 1 - self.amount.sparsity, 0, len(grid) - 1
        while low < high:
            middle = (low + high) // 2
            if self.left(at(float(grid[middle]))) > target:
                low = middle + 1
            else:
                high = middle
        options = [at(float(grid[place])) for place in {max(low - 1, 0), low}]
        return min(options, key=lambda kept: abs(self.left(kept) - target))


def select(coupling: Coupling, amount: Amount, names: Sequence[str], scores: Scores) -> Selection:
    """Rank the classes of every unit; in units of several cells the cells' lowest go together."""
    values = np.zeros(coupling.atoms.count)
    for unit in coupling.units:
        for number in unit.groups:
            group = coupling.groups[number]
            values[group.classes] = scores(coupling, group)
    order, ranks = [], []
    for unit in coupling.units:
        cells, steps = [], np.zeros(unit.width)
        for cell in unit.cells:
            sorted_ = cell.classes[np.argsort(values[cell.classes], kind="stable")]
            cells.append(sorted_)
            steps += values[sorted_[: unit.width * cell.stride]].reshape(unit.width, cell.stride).mean(1)
        order.append(cells)
        ranks.append(np.maximum.accumulate(steps / len(unit.cells)))
    return Selection(coupling, amount, names, order, ranks)


@dataclass
class Plan:
    """An analysed model, and what of it could not be verified so far."""

    model: nn.Module  # read only
    inputs: Inputs
    trace: Trace
    frozen: list[str]
    heads: Heads = "auto"
    modes: dict[str, str] = field(default_factory=dict)
    tried: dict[str, set[str]] = field(default_factory=dict)
    stays: list[tuple[NDArray[np.int64], str]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The parameters, each once."""
        return [name for name, _ in self.model.named_parameters()]

    def coupling(self) -> Coupling:
        """The groups, with all that is known to be impossible left out."""
        return couple(
            self.trace, heads=self.heads, frozen=self.frozen, modes=self.modes, stays=self.stays
        )

    def retreat(self, divergence: oracle.Divergence, coupling: Coupling, removed: Mask) -> bool:
        """Give up what a divergence shows to be impossible: another way for the attention, or the groups at work."""
        kinds = {path: type(module) for path, module in self.model.named_modules()}
        path: str | None = divergence.path
        while path is not None:
            if path in coupling.modes and coupling.modes[path] != "none":
                mode = coupling.modes[path]
                alike = {other for other in coupling.modes if kinds.get(other) is kinds.get(path)}
                done = self.tried.setdefault(path, set()) | {mode}
                following = next(each for each in ("inner", "tied", "outer", "none") if each not in done)
                for other in alike:
                    self.tried.setdefault(other, set()).add(mode)
                    if coupling.modes[other] == mode:
                        self.modes[other] = following
                return True
            path = path.rpartition(".")[0] if path else None
        operation = coupling.trace.operations[divergence.index]
        suspects: set[int] = set()
        for value in (*operation.outputs, *operation.inputs):
            for classes in coupling.classes(value.layers):
                suspects |= set(np.unique(classes[removed[classes]]).tolist())
        if not suspects:  # nothing at hand: whatever goes in this module
            suspects = self._inside(divergence.path, coupling, removed)
        if not suspects:
            return False
        why = f"could not be verified: {divergence.what} ({divergence.path})"
        for unit in coupling.units:
            classes = np.concatenate([cell.classes for cell in unit.cells])
            if suspects & set(classes.tolist()):
                self.stays.append((classes, why))
        return True

    def _inside(self, path: str, coupling: Coupling, removed: Mask) -> set[int]:
        found: set[int] = set()
        for operation in coupling.trace.operations:
            if operation.path == path or operation.path.startswith(f"{path}." if path else ""):
                for value in operation.outputs:
                    for classes in coupling.classes(value.layers):
                        found |= set(np.unique(classes[removed[classes]]).tolist())
        return found


def analyse(
    model: nn.Module,
    inputs: Inputs,
    *,
    heads: Heads = "auto",
    include: Patterns = None,
    exclude: Patterns = None,
) -> Plan:
    """Trace a copy of the model, and find which weights the user wants left alone."""
    if heads not in ("auto", "whole", "dim"):
        raise PruneError(f"heads must be 'auto', 'whole' or 'dim', got {heads!r}")
    working, _ = copy_model(model)
    inputs = to_device(inputs, device_of(working))
    with preserved_globals(seed=0):
        found = trace(working, inputs)
    types = class_names(model)
    names = list(found.weights)
    for pattern in (*as_list(include), *as_list(exclude)):
        if not any(matches(pattern, path, types) for path in (*names, *types)):
            raise PruneError(f"pattern {pattern!r} matches no layer; there are {', '.join(names[:5])}, ...")
    frozen = [name for name in names if any(matches(each, name, types) for each in as_list(exclude))]
    plan = Plan(model, inputs, found, frozen, heads)
    if include is not None:
        wanted = {name for name in names if any(matches(each, name, types) for each in as_list(include))}
        for group in plan.coupling().groups:
            if not wanted & {member.weight for member in group.members}:
                plan.stays.append((group.classes, "not included"))
    return plan


@dataclass(frozen=True)
class Shrunk:
    """A verified removal."""

    model: nn.Module
    surgery: Surgery
    coupling: Coupling
    removed: Mask
    error: float  # the largest relative difference of any value, in float64
    left: float  # the fraction of the model that is left, in the amount's measure
    rollbacks: tuple[str, ...]


def shrink(plan: Plan, amount: Amount, scores: Scores) -> Shrunk:
    """Remove the least important channels, verify, and give up what cannot be verified.

    Raises:
        PruneError: nothing can go.
    """
    rollbacks: list[str] = []
    for _ in range(ROLLBACKS):
        coupling = plan.coupling()
        if not coupling.units:
            break
        selection = select(coupling, amount, plan.names, scores)
        kept = selection.choose()
        removed = selection.removed(kept)
        if not removed.any():
            raise PruneError(
                f"a sparsity of {amount.sparsity} of {amount.of} removes no channel; the smallest step is "
                f"{amount.round_to} channels: ask for more, or give a smaller round_to"
            )
        surgery, shrunk, diverged = mend(plan.model, coupling, removed, plan.inputs)
        error = float("inf")
        if diverged is None:
            working, _ = copy_model(plan.model)
            base, inputs = oracle.prepare(working.eval(), plan.inputs)
            diverged, error = oracle.verify(base, perform(base, surgery), coupling, removed, inputs)
        if diverged is None:
            return Shrunk(shrunk, surgery, coupling, removed, error, selection.left(kept), tuple(rollbacks))
        rollbacks.append(f"{diverged.path}: {diverged.what}")
        if not plan.retreat(diverged, coupling, removed):
            break
    reasons = "; ".join(dict.fromkeys(each.reason for each in plan.coupling().groups if each.reason))
    raise PruneError(f"no channel of {type(plan.model).__name__} can go: {reasons or 'it has no groups'}")
