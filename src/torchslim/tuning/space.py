"""What may vary in a recipe: every `{ search = [...] }` is a parameter, and a choice for each makes a plain recipe."""

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
PARAMETERS, CHOICES = 100, 100  # at most so many that vary, and so many choices of one
STEPS = 10**6  # values of a range that has a step
FIXED = ("model", "task", "teacher", "budget", "seed", "sensitivity", "engine", "step")  # the same in every trial


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One thing that varies: a range of numbers, or choices.

    Attributes:
        name: as reports show it: "2-quantize.scheme".
        path: where it stands in the document.
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
        """Values that must all be possible for the whole parameter to be: the ends of a range, or all choices."""
        return self.choices if self.kind == "choice" else (self.low, self.high)

    @property
    def skips(self) -> bool:
        """Does it say whether a step is left out?"""
        return self.path[-1] == "skip"

    def at(self, part: float) -> Any:
        """A value at a part of the way from the first to the last."""
        if self.kind == "choice":
            return self.choices[int(part * (len(self.choices) - 1) + 0.5)]
        value = self.low * (self.high / self.low) ** part if self.log else self.low + part * (self.high - self.low)
        step = self.step or (1 if self.kind == "int" else None)
        if step:
            value = self.low + round((value - self.low) / step) * step
        return int(value) if self.kind == "int" else value

    def drawn(self, generator: random.Random) -> Any:
        """A value at random, for checks."""
        return generator.choice((*self.ends, self.at(0.5)))

    def to_dict(self) -> dict[str, Any]:
        """For reports."""
        if self.kind == "choice":
            return {"name": self.name, "kind": self.kind, "choices": list(self.choices)}
        return {"name": self.name, "kind": self.kind, "low": self.low, "high": self.high}


@dataclass(frozen=True, kw_only=True)
class Space:
    """A recipe with ranges, checked: each value of each parameter can be used in some recipe."""

    document: Mapping[str, Any]
    parameters: tuple[Parameter, ...]
    budget: Budget
    where: str = "recipe"
    _steps: dict[str, Any] = field(default_factory=dict, repr=False)  # that were made, by their tables

    def chosen(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The document of one recipe, without ranges, budget and steps that are skipped."""
        document = {key: value for key, value in self.document.items() if key not in ("budget", "step")}
        for parameter in self.parameters:
            if parameter.path[0] != "step":
                document = _put(document, parameter.path, values[parameter.name])
        steps = [self.chosen_step(number, values) for number in range(len(self.document["step"]))]
        document["step"] = [table for table in steps if not table.pop("skip", False)]
        return copy.deepcopy(document)

    def chosen_step(self, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """The table of one step, its number counted from 0, without ranges."""
        table = dict(self.document["step"][number])
        for parameter in self.parameters:
            if parameter.path[:2] == ("step", number):
                table = _put(table, parameter.path[2:], values[parameter.name])
        return table

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """One recipe of the space, validated.

        Raises:
            RecipeError: these values do not go together.
        """
        return parse_document(self.chosen(values), self.where, may_be_empty=True, known=self._steps)

    @property
    def first(self) -> dict[str, Any]:
        """The first end of all parameters."""
        return {parameter.name: parameter.ends[0] for parameter in self.parameters}

    def whole(self, part: float) -> dict[str, Any]:
        """No step is skipped, the numbers are at a part of their ways, everything else is the first choice."""
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
        """Where a search begins: at most half of the budget's trials, if that is three or more.

        The first of everything; the whole recipe at the middle and the end of its numbers; the first with each step
        that may be skipped the other way; the whole at the quarters; the first with each other choice. So it sees how
        far the numbers can go, and each technique by itself.
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
        known: set[str] = set()
        found: list[dict[str, Any]] = []
        for values in ordered:
            if len(found) == max(3, self.budget.trials // 2):
                break
            try:
                self.recipe(values)
            except RecipeError:  # a choice needs another beside it
                continue
            text = json.dumps(self.chosen(values), sort_keys=True)
            if text not in known:
                known.add(text)
                found.append(values)
        return found

    @property
    def runtimes(self) -> tuple[str, ...]:
        """All that the recipe may be deployed on."""
        found = [parameter.choices for parameter in self.parameters if parameter.path == ("runtime",)]
        return tuple(found[0]) if found else (self.recipe(self.first).target.runtime,)

    @property
    def key(self) -> str:
        """A digest of what is searched, for which bounds; how long one looks is no part of it."""
        budget = {name: value for name, value in vars(self.budget).items() if name not in ("trials", "hours")}
        return digest({**self.document, "budget": budget})


def make_space(document: Mapping[str, Any], where: str = "recipe") -> Space:
    """A space from a document as `tomllib` gives it.

    Raises:
        RecipeError: nothing to search, a range that is none, or one that leaves the domain of its field.
    """
    document = sound(document, where)
    check_keys(document, where, ranges=True)
    parameters = tuple(_found(document, where))
    if not parameters:
        raise RecipeError(
            f"{where} has nothing to search: write a range in place of a value, such as "
            "sparsity = { search = [0.2, 0.8] }, or take `torchslim run`"
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
    """A copy with another value at a path; what is beside the path is shared."""
    if not path:
        return value
    copied: Any = dict(container) if isinstance(container, Mapping) else list(container)
    copied[path[0]] = _put(copied[path[0]], path[1:], value)
    return copied


def has_ranges(document: Any) -> bool:
    """Is it a recipe for a search?"""
    document = sound(document)
    return "budget" in document or any(True for _ in _tables(document, ()))


def _tables(value: Any, path: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if "search" in value and path:
            yield path, value
            return
        for key, each in value.items():
            yield from _tables(each, (*path, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _tables(each, (*path, index))


def _found(document: Mapping[str, Any], where: str) -> list[Parameter]:
    found: dict[str, Parameter] = {}
    for path, table in _tables(document, ()):
        name = _name(path, document)
        if path[0] in FIXED and len(path) <= (2 if path[0] == "step" else len(path)):
            raise RecipeError(f"{where}: {name} cannot be searched over; name one")
        if name in found:
            raise RecipeError(f"{where}: two ranges are called {name}; keys of tables must not look like paths")
        found[name] = _parameter(name, path, table, where)
        if found[name].skips and not all(isinstance(end, bool) for end in found[name].ends):
            raise RecipeError(f"{where}: {name}: skip is true or false, got {shown(table['search'])}")
    if len(found) > PARAMETERS:
        raise RecipeError(f"{where} has {len(found):,} ranges; a search takes at most {PARAMETERS}")
    return list(found.values())


def _name(path: Path, document: Mapping[str, Any]) -> str:
    if path[:1] == ("step",) and len(path) > 1 and isinstance(path[1], int):
        do = document["step"][path[1]].get("do")
        return ".".join((f"{path[1] + 1}-{do if isinstance(do, str) else 'step'}", *map(str, path[2:])))
    return ".".join(map(str, path))


def _parameter(name: str, path: Path, table: Mapping[str, Any], where: str) -> Parameter:
    given, log, step = table["search"], table.get("log", False), table.get("step")
    where = f"{where}: {name}"
    if not isinstance(given, list) or not 2 <= len(given) <= CHOICES:
        raise RecipeError(f"{where}: search takes [low, high] or 2 to {CHOICES} choices, got {shown(given)}")
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in given)
    if not numbers or len(given) > 2:
        if log is not False or step is not None:
            raise RecipeError(f"{where}: log and step belong to a range [low, high], got {shown(given)}")
        texts = [json.dumps(each, sort_keys=True) for each in given]
        if len(set(texts)) < len(texts):
            raise RecipeError(f"{where}: search names a choice twice: {shown(given)}")
        return Parameter(name=name, path=path, kind="choice", choices=tuple(given))
    low, high = given
    if not -LARGEST <= low < high <= LARGEST:
        raise RecipeError(f"{where}: a range goes from low to high, both finite numbers, got {shown(given)}")
    if not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        raise RecipeError(f"{where}: log = true needs a low end above 0 and no step, got {shown(dict(table))}")
    whole = all(isinstance(each, int) for each in given)
    if step is not None and (
        isinstance(step, bool)
        or not isinstance(step, int if whole else (int, float))
        or not (high - low) / STEPS <= step <= high - low
        or step <= 0
    ):
        kind = "whole number" if whole else "number"
        raise RecipeError(
            f"{where}: step must be a {kind} above 0, at most {high - low}, and at least a millionth of that, got "
            f"{shown(step)}"
        )
    return Parameter(name=name, path=path, kind="int" if whole else "float", low=low, high=high, log=log, step=step)
