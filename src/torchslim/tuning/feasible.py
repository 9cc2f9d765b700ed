"""Whether every end of every range and every choice can be used in some recipe, told before any work.

A value is looked at in three rounds, and the first fault found is told: alone, against its field; with the others of
its step; with all others. What holds in a step is put together for the whole recipe, so that few combinations show it.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchslim.core.checks import shown, types_of
from torchslim.errors import RecipeError
from torchslim.pipeline.recipe import KINDS, checked_value, find_kind, names_of, parse_step

if TYPE_CHECKING:
    from torchslim.tuning.space import Parameter, Space

Values = dict[str, Any]
TRIES = 200  # combinations that are looked at for one in which a value can be used
ENOUGH = 20  # combinations of a step that hold, from which whole recipes are put together
FAULTS = 5  # values that cannot be used, of which the clearest is told


def check_values(space: Space) -> None:
    """Raise RecipeError for a value that no recipe can use, whatever the others have to be for that."""
    for parameter in space.parameters:
        _check_alone(space, parameter)
    held: list[list[Values]] = []
    for number in range(len(space.document["step"])):
        mine = [each for each in space.parameters if each.path[:2] == ("step", number)]
        held.append(_held(mine, functools.partial(_try_step, space, number), _drawn(mine)))
    rest = [each for each in space.parameters if each.path[0] != "step"]
    _held(space.parameters, space.recipe, _put_together(rest, held))


def _check_alone(space: Space, parameter: Parameter) -> None:
    """The ends of a range, or its choices, against the field that they stand for."""
    *inside, key = parameter.path
    table: Any = space.document
    for part in inside:
        table = table[part]
    do = table.get("do") if isinstance(table, Mapping) else None
    if not isinstance(key, str) or not isinstance(do, str) or parameter.skips or key == "do":
        return
    kind = KINDS.get(do) or find_kind(do, space.where)
    if key not in names_of(kind):
        return  # a table of names, as of layers
    where = f"{parameter.name} = "
    for value in parameter.ends:
        try:
            checked_value(value, types_of(kind)[key], f"key {key!r}", key)
        except RecipeError as error:
            raise RecipeError(f"{space.where}: {where}{shown(value)} cannot be used: {error}") from error


def _try_step(space: Space, number: int, values: Values) -> None:
    """Make one step of the recipe; one that is skipped says nothing of its values."""
    whole = space.first | values
    table = space.chosen_step(number, whole)
    table.pop("skip", None)
    parse_step(table, f"{space.where}: step {number + 1}", space._steps)


def _drawn(parameters: Sequence[Parameter]) -> Iterator[Values]:
    """Combinations: the first ends, then at random."""
    generator = random.Random(0)
    yield {parameter.name: parameter.ends[0] for parameter in parameters}
    while True:
        yield {parameter.name: parameter.drawn(generator) for parameter in parameters}


def _put_together(rest: Sequence[Parameter], held: Sequence[Sequence[Values]]) -> Iterator[Values]:
    """Whole recipes from what holds in each step."""
    generator = random.Random(0)
    for number in itertools.count():
        first = number == 0
        values: Values = {each.name: each.ends[0] if first else each.drawn(generator) for each in rest}
        for known in held:
            values |= known[0] if first else generator.choice(known)
        yield values


def _held(
    parameters: Sequence[Parameter], attempt: Callable[[Values], object], drawn: Iterator[Values]
) -> list[Values]:
    """Combinations that hold, among them one with every value of every parameter.

    Raises:
        RecipeError: no combination holds, or none with some value.
    """
    held: list[Values] = []
    first_error: RecipeError | None = None
    proven: set[tuple[str, str]] = set()

    def holds(values: Values) -> RecipeError | None:
        try:
            attempt(values)
        except RecipeError as error:
            return error
        new = {(parameter.name, repr(values[parameter.name])) for parameter in parameters}
        if len(held) < ENOUGH or not new <= proven:
            held.append(values)
        proven.update(new)
        return None

    tried = [next(drawn) for _ in range(TRIES if parameters else 1)]
    for values in tried:
        error = holds(values)
        first_error = first_error or error
        if len(held) >= ENOUGH:
            break
    if not held:
        assert first_error is not None
        raise first_error
    faults: list[tuple[bool, RecipeError]] = []
    for parameter in parameters:
        for value in parameter.ends:
            if (parameter.name, repr(value)) in proven:
                continue
            errors = []
            for values in [*held, *tried]:
                error = holds(values | {parameter.name: value})
                if error is None:
                    break
                errors.append(error)
            else:
                named = repr(parameter.path[-1]) in str(errors[0])  # where one is wrong, others may fail with it
                told = RecipeError(f"{parameter.name} = {shown(value)} cannot be used: {errors[0]}")
                told.__cause__ = errors[0]
                faults.append((not named, told))
            if len(faults) >= FAULTS:
                break
    if faults:
        raise min(faults, key=lambda fault: fault[0])[1]
    return held
