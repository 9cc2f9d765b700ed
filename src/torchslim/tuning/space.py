"""Search space of a recipe: each `{ search = [...] }` is a parameter; with a value for each, the recipe is plain."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torchslim.core.budget import Budget
from torchslim.core.checks import shown
from torchslim.core.files import digest
from torchslim.errors import RecipeError
from torchslim.pipeline.document import LARGEST, sound
from torchslim.pipeline.recipe import Recipe, check_keys, parse_document, parse_table
from torchslim.tuning.feasible import check_values

Path = tuple[str | int, ...]
PARAMETERS, CHOICES = 100, 100  # at most so many parameters, and so many choices of one parameter
STEPS = 10**6  # at most so many steps from the low to the high end of a range
FIXED = (
    "model",
    "task",
    "teacher",
    "budget",
    "seed",
    "sensitivity",
    "dynamic_shapes",
    "rehearse",
    "engine",
    "step",
)  # the same in every trial


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A value of a recipe that varies: a range of numbers, or choices.

    Attributes:
        name: as reports show it: "2-quantize.scheme".
        path: keys and indices that lead to it in the document.
        kind: "float" and "int" have `low`, `high`, `log` and `step`; "choice" has `choices`.
    """

    name: str
    path: Path
    kind: Literal["float", "int", "choice"]
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that must be usable for the parameter to be valid: the ends of a range, or all choices."""
        return self.choices if self.kind == "choice" else (self.low, self.high)

    @property
    def skips(self) -> bool:
        """Whether the parameter decides if a step is skipped."""
        return self.path[-1] == "skip"

    def at(self, part: float) -> Any:
        """The value at the fraction `part` of the way from the first to the last."""
        if self.kind == "choice":
            return self.choices[int(part * (len(self.choices) - 1) + 0.5)]
        value = self.low * (self.high / self.low) ** part if self.log else self.low + part * (self.high - self.low)
        step = self.step or (1 if self.kind == "int" else None)
        if step:
            value = self.low + round((value - self.low) / step) * step
        return int(value) if self.kind == "int" else value

    def drawn(self, generator: random.Random) -> Any:
        """A random value for checks: an end, a choice or the middle."""
        return generator.choice((*self.ends, self.at(0.5)))

    def to_dict(self) -> dict[str, Any]:
        """The parameter as a dict for reports."""
        if self.kind == "choice":
            return {"name": self.name, "kind": self.kind, "choices": list(self.choices)}
        return {"name": self.name, "kind": self.kind, "low": self.low, "high": self.high}


@dataclass(frozen=True, kw_only=True)
class Space:
    """A checked recipe with ranges: each end of a range and each choice can be used in some recipe."""

    document: Mapping[str, Any]
    parameters: tuple[Parameter, ...]
    budget: Budget
    where: str = "recipe"
    _steps: dict[str, Any] = field(default_factory=dict, repr=False)  # steps parsed so far, by their tables

    def chosen(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The document of the recipe with these values, without ranges, budget and skipped steps."""
        document = {key: value for key, value in self.document.items() if key not in ("budget", "step")}
        for parameter in self.parameters:
            if parameter.path[0] != "step":
                document = _put(document, parameter.path, values[parameter.name])
        steps = [self.chosen_step(number, values) for number in range(len(self.document["step"]))]
        document["step"] = [table for table in steps if not table.pop("skip", False)]
        return copy.deepcopy(document)

    def chosen_step(self, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """The table of step `number`, counted from 0, with these values in place of its ranges."""
        table = dict(self.document["step"][number])
        for parameter in self.parameters:
            if parameter.path[:2] == ("step", number):
                table = _put(table, parameter.path[2:], values[parameter.name])
        return table

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """The validated recipe with these values.

        Raises:
            RecipeError: the values do not fit together.
        """
        return parse_document(self.chosen(values), self.where, may_be_empty=True, known=self._steps)

    @property
    def first(self) -> dict[str, Any]:
        """The first end or choice of every parameter."""
        return {parameter.name: parameter.ends[0] for parameter in self.parameters}

    def whole(self, part: float) -> dict[str, Any]:
        """Values that skip no step: numbers at the fraction `part` of their ranges, first choices of all else."""
        return {
            parameter.name: False
            if parameter.skips
            else parameter.at(part)
            if parameter.kind != "choice"
            else parameter.choices[0]
            for parameter in self.parameters
        }

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Values of the first trials: at most half of the budget's trials, or three if that is more.

        In order: `first`; the recipe without skips, its numbers at the middle and at the end; `first` with one skip
        changed; the recipe without skips at the quarters; `first` with one other choice changed. These trials show how
        far the numbers can go, and what each technique does alone.
        """
        alone = [
            (parameter.skips, {**self.first, parameter.name: choice})
            for parameter in self.parameters
            if parameter.kind == "choice"
            for choice in parameter.choices[1:]
        ]
        ordered = [
            self.first,
            self.whole(0.5),
            self.whole(1.0),
            *(values for skips, values in alone if skips),
            self.whole(0.25),
            self.whole(0.75),
            *(values for skips, values in alone if not skips),
        ]
        texts: set[str] = set()
        distinct: list[dict[str, Any]] = []
        for values in ordered:
            if len(distinct) == max(3, self.budget.trials // 2):
                break
            try:
                self.recipe(values)
            except RecipeError:  # a choice may fit only together with another one
                continue
            text = json.dumps(self.chosen(values), sort_keys=True)
            if text not in texts:
                texts.add(text)
                distinct.append(values)
        return distinct

    @property
    def runtimes(self) -> tuple[str, ...]:
        """All runtimes that the recipe may be deployed on."""
        choices = [parameter.choices for parameter in self.parameters if parameter.path == ("runtime",)]
        return tuple(choices[0]) if choices else (self.recipe(self.first).target.runtime,)

    @property
    def key(self) -> str:
        """Digest of the recipe and its bounds; `trials` and `hours` do not change it."""
        budget = {name: value for name, value in vars(self.budget).items() if name not in ("trials", "hours")}
        return digest({**self.document, "budget": budget})


def make_space(document: Mapping[str, Any], where: str = "recipe") -> Space:
    """The space of a document as `tomllib` gives it.

    Raises:
        RecipeError: there is nothing to search, or a range is invalid or leaves the domain of its field.
    """
    document = sound(document, where)
    check_keys(document, where, ranges=True)
    parameters = tuple(_found(document, where))
    if not parameters:
        raise RecipeError(
            f"{where} has nothing to search: write a range in place of a value, such as "
            "sparsity = { search = [0.2, 0.8] }, or use `torchslim run`"
        )
    budget: Budget = parse_table(Budget, document.get("budget", {}), f"{where}: budget")
    for index, table in enumerate(document["step"], 1):
        skip = table.get("skip", False)
        if not isinstance(skip, bool | Mapping):
            raise RecipeError(f"{where}: step {index}, key 'skip' must be true or false, got {shown(skip)}")
    space = Space(document=document, parameters=parameters, budget=budget, where=where)
    check_values(space)
    return space


def _put(container: Any, path: Path, value: Any) -> Any:
    """A copy of `container` with `value` at `path`; all parts beside the path are shared."""
    if not path:
        return value
    copied: Any = dict(container) if isinstance(container, Mapping) else list(container)
    copied[path[0]] = _put(copied[path[0]], path[1:], value)
    return copied


def has_ranges(document: Any) -> bool:
    """Whether a document is a recipe for a search: it has a budget or a range."""
    document = sound(document)
    return "budget" in document or any(True for _ in _tables(document, ()))


def _tables(value: Any, path: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if "search" in value and path:
            yield path, value
            return
        for key, item in value.items():
            yield from _tables(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _tables(item, (*path, index))


def _found(document: Mapping[str, Any], where: str) -> list[Parameter]:
    by_name: dict[str, Parameter] = {}
    for path, table in _tables(document, ()):
        name = _name(path, document)
        if path[0] in FIXED and len(path) <= (2 if path[0] == "step" else len(path)):
            raise RecipeError(f"{where}: {name} cannot be searched over; give one value")
        if name in by_name:
            raise RecipeError(f"{where}: two ranges are called {name}; keys of tables must not look like paths")
        by_name[name] = _parameter(name, path, table, where)
        if by_name[name].skips and not all(isinstance(end, bool) for end in by_name[name].ends):
            raise RecipeError(f"{where}: {name}: skip is true or false, got {shown(table['search'])}")
    if len(by_name) > PARAMETERS:
        raise RecipeError(f"{where} has {len(by_name):,} ranges; a search takes at most {PARAMETERS}")
    return list(by_name.values())


def _name(path: Path, document: Mapping[str, Any]) -> str:
    if path[:1] == ("step",) and len(path) > 1 and isinstance(path[1], int):
        do = document["step"][path[1]].get("do")
        return ".".join((f"{path[1] + 1}-{do if isinstance(do, str) else 'step'}", *map(str, path[2:])))
    return ".".join(map(str, path))


def _parameter(name: str, path: Path, table: Mapping[str, Any], where: str) -> Parameter:
    values, log, step = table["search"], table.get("log", False), table.get("step")
    where = f"{where}: {name}"
    if not isinstance(values, list) or not 2 <= len(values) <= CHOICES:
        raise RecipeError(f"{where}: search takes [low, high] or 2 to {CHOICES} choices, got {shown(values)}")
    numbers = all(isinstance(choice, (int, float)) and not isinstance(choice, bool) for choice in values)
    if not numbers or len(values) > 2:
        if log is not False or step is not None:
            raise RecipeError(f"{where}: log and step belong to a range [low, high], got {shown(values)}")
        texts = [json.dumps(choice, sort_keys=True) for choice in values]
        if len(set(texts)) < len(texts):
            raise RecipeError(f"{where}: search names a choice twice: {shown(values)}")
        return Parameter(name=name, path=path, kind="choice", choices=tuple(values))
    low, high = values
    if not -LARGEST <= low < high <= LARGEST:
        raise RecipeError(f"{where}: a range goes from low to high, both finite numbers, got {shown(values)}")
    if not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        raise RecipeError(f"{where}: log = true needs a low end above 0 and no step, got {shown(dict(table))}")
    integers = all(isinstance(choice, int) for choice in values)
    if step is not None and (
        isinstance(step, bool)
        or not isinstance(step, int if integers else (int, float))
        or not (high - low) / STEPS <= step <= high - low
        or step <= 0
    ):
        kind = "whole number" if integers else "number"
        raise RecipeError(
            f"{where}: step must be a {kind} above 0, at most {high - low}, and at least a millionth of that, got "
            f"{shown(step)}"
        )
    return Parameter(name=name, path=path, kind="int" if integers else "float", low=low, high=high, log=log, step=step)
