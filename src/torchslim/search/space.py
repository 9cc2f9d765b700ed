"""What may vary in a recipe: every `{ search = [...] }` is a parameter, and a choice for each makes a plain recipe."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torchslim.budget import Budget
from torchslim.errors import RecipeError
from torchslim.files import digest
from torchslim.recipe import Recipe, parse_document, parse_table

Path = tuple[str | int, ...]
OPTIONS = ("search", "log", "step")
TRIES = 200  # combinations that are looked at for one in which a value can be used


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

    def to_json(self) -> dict[str, Any]:
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
    _known: dict[str, Recipe] = field(default_factory=dict, repr=False)

    def chosen(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The document of one recipe, without ranges, budget and steps that are skipped."""
        document = copy.deepcopy(dict(self.document))
        document.pop("budget", None)
        for each in self.parameters:
            place: Any = document
            for part in each.path[:-1]:
                place = place[part]
            place[each.path[-1]] = copy.deepcopy(values[each.name])
        steps = [dict(table) for table in document.get("step", [])]
        document["step"] = [table for table in steps if not table.pop("skip", False)]
        return document

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """One recipe of the space, validated.

        Raises:
            RecipeError: these values do not go together.
        """
        document = self.chosen(values)
        key = json.dumps(document, sort_keys=True, default=str)
        if key not in self._known:
            self._known[key] = parse_document(document, self.where, may_be_empty=True)
        return self._known[key]

    @property
    def first(self) -> dict[str, Any]:
        """The first end of all parameters."""
        return {each.name: each.ends[0] for each in self.parameters}

    def whole(self, part: float) -> dict[str, Any]:
        """No step is skipped, the numbers are at a part of their ways, everything else is the first choice."""
        return {
            each.name: False if each.skips else each.at(part) if each.kind != "choice" else each.choices[0]
            for each in self.parameters
        }

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Where a search begins: at most half of the budget's trials, if that is three or more.

        The first of everything; the whole recipe at the middle and the end of its numbers; the first with each step
        that may be skipped the other way; the whole at the quarters; the first with each other choice. So it sees how
        far the numbers can go, and each technique by itself.
        """
        alone = [
            (each.skips, {**self.first, each.name: choice})
            for each in self.parameters if each.kind == "choice" for choice in each.choices[1:]
        ]  # fmt: skip
        ordered = [
            self.first, self.whole(0.5), self.whole(1.0), *(values for skips, values in alone if skips),
            self.whole(0.25), self.whole(0.75), *(values for skips, values in alone if not skips),
        ]  # fmt: skip
        known: list[dict[str, Any]] = []
        found = []
        for values in ordered:
            try:
                self.recipe(values)
            except RecipeError:  # a choice needs another beside it
                continue
            if self.chosen(values) not in known:
                known.append(self.chosen(values))
                found.append(values)
        return found[: max(3, self.budget.trials // 2)]

    @property
    def runtimes(self) -> tuple[str, ...]:
        """All that the recipe may be deployed on."""
        found = [each.choices for each in self.parameters if each.path == ("runtime",)]
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
    parameters = tuple(_found(document, (), document, where))
    given = document.get("budget", {})
    budget: Budget = parse_table(Budget, given, f"{where}: budget")
    for index, table in enumerate(document.get("step", ()), 1):
        skip = table.get("skip", False) if isinstance(table, Mapping) else False
        if not isinstance(skip, bool | Mapping):
            raise RecipeError(f"{where}: step {index}, key 'skip' must be true or false, got {skip!r}")
    space = Space(document=document, parameters=parameters, budget=budget, where=where)
    if not parameters:
        raise RecipeError(
            f"{where} has nothing to search: write a range in place of a value, such as "
            "sparsity = { search = [0.2, 0.8] }, or take `torchslim run`"
        )
    _check_values(space)
    return space


def has_ranges(document: Mapping[str, Any]) -> bool:
    """Is it a recipe for a search?"""
    return "budget" in document or any(True for _ in _tables(document, ()))


def _tables(value: Any, path: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if "search" in value:
            yield path, value
            return
        for key, each in value.items():
            yield from _tables(each, (*path, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _tables(each, (*path, index))


def _found(value: Any, path: Path, document: Mapping[str, Any], where: str) -> Iterator[Parameter]:
    for place, table in _tables(value, path):
        name = _name(place, document)
        if place[:1] in {("model",), ("task",), ("teacher",), ("budget",), ("seed",), ("sensitivity",)}:
            raise RecipeError(f"{where}: {name} cannot be searched over; name one")
        yield _parameter(name, place, table, where)


def _name(path: Path, document: Mapping[str, Any]) -> str:
    if path[:1] == ("step",) and len(path) > 1 and isinstance(path[1], int):
        table = document["step"][path[1]]
        return ".".join((f"{path[1] + 1}-{table.get('do', 'step')}", *map(str, path[2:])))
    return ".".join(map(str, path))


def _parameter(name: str, path: Path, table: Mapping[str, Any], where: str) -> Parameter:
    unknown = [key for key in table if key not in OPTIONS]
    if unknown:
        raise RecipeError(f"{where}: {name}: unknown key {unknown[0]!r} beside 'search'; known: {', '.join(OPTIONS)}")
    given, log, step = table["search"], table.get("log", False), table.get("step")
    if not isinstance(given, list) or len(given) < 2:
        raise RecipeError(f"{where}: {name}: search takes [low, high] or several choices, got {given!r}")
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in given)
    if not numbers or len(given) > 2:
        if log or step is not None:
            raise RecipeError(f"{where}: {name}: log and step belong to a range [low, high], got {given!r}")
        texts = [json.dumps(each, sort_keys=True) for each in given]
        if len(set(texts)) < len(texts):
            raise RecipeError(f"{where}: {name}: search names a choice twice: {given!r}")
        return Parameter(name=name, path=path, kind="choice", choices=tuple(given))
    low, high = given
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise RecipeError(f"{where}: {name}: a range goes from low to high, got {given!r}")
    if not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        raise RecipeError(f"{where}: {name}: log = true needs a low end above 0 and no step, got {dict(table)!r}")
    whole = all(isinstance(each, int) for each in given)
    if step is not None and (
        isinstance(step, bool) or not isinstance(step, int if whole else (int, float)) or not 0 < step <= high - low
    ):
        kind = "whole number" if whole else "number"
        raise RecipeError(f"{where}: {name}: step must be a {kind} above 0 and at most {high - low}, got {step!r}")
    return Parameter(name=name, path=path, kind="int" if whole else "float", low=low, high=high, log=log, step=step)


def _check_values(space: Space) -> None:
    """Every end of every range and every choice must make a valid recipe, whatever the others have to be for that."""
    first = space.first
    skips = {each.path: each.name for each in space.parameters if each.skips}
    failed: list[tuple[bool, str, RecipeError]] = []
    for parameter in space.parameters:
        skip = skips.get((*parameter.path[:2], "skip"))
        taken = {} if skip is None else {skip: False}  # a step that is left out says nothing of its values
        for value in parameter.ends:
            error: RecipeError | None = None
            for others in _others(first, space.parameters):
                try:
                    space.recipe(others | taken | {parameter.name: value})
                    break
                except RecipeError as found:
                    error = error or found
            else:
                assert error is not None
                named = repr(parameter.path[-1]) in str(error)  # where one is wrong, all others fail with it
                failed.append((not named, f"{parameter.name} = {value!r} cannot be used: {error}", error))
    if failed:
        _, message, error = min(failed, key=lambda each: each[0])
        raise RecipeError(message) from error


def _others(first: Mapping[str, Any], parameters: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
    yield dict(first)
    generator = random.Random(0)
    for _ in range(TRIES):
        yield {each.name: each.drawn(generator) for each in parameters}
