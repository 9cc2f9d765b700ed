"""Check before a search that some recipe can use each end of a range and each choice.

Each value is checked in three rounds, and the first round with an error raises it: alone, against its field; with the
other values of its step; with all other values. The last round combines the valid combinations of the steps, so that
few tries are enough.
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
TRIES = 200  # combinations tried to find one in which a value can be used
ENOUGH = 20  # valid combinations of a step, from which whole recipes are built
FAULTS = 5  # unusable values to collect before the clearest error is raised


def check_values(space: Space) -> None:
    """Raise RecipeError for a value that none of the recipes tried can use, whatever the other values."""
    for parameter in space.parameters:
        _check_alone(space, parameter)
    valid: list[list[Values]] = []
    for number in range(len(space.document["step"])):
        step_parameters = [parameter for parameter in space.parameters if parameter.path[:2] == ("step", number)]
        valid.append(_held(step_parameters, functools.partial(_try_step, space, number), _drawn(step_parameters)))
    rest = [parameter for parameter in space.parameters if parameter.path[0] != "step"]
    _held(space.parameters, space.recipe, _put_together(rest, valid))


def _check_alone(space: Space, parameter: Parameter) -> None:
    """Check the ends of a range, or the choices, against the type of their field."""
    *parents, key = parameter.path
    table: Any = space.document
    for part in parents:
        table = table[part]
    do = table.get("do") if isinstance(table, Mapping) else None
    if not isinstance(key, str) or not isinstance(do, str) or parameter.skips or key == "do":
        return
    kind = KINDS.get(do) or find_kind(do, space.where)
    if key not in names_of(kind):
        return  # the key of a table of names, such as layers
    where = f"{parameter.name} = "
    for value in parameter.ends:
        try:
            checked_value(value, types_of(kind)[key], f"key {key!r}", key)
        except RecipeError as error:
            raise RecipeError(f"{space.where}: {where}{shown(value)} cannot be used: {error}") from error


def _try_step(space: Space, number: int, values: Values) -> None:
    """Parse one step of the recipe with these values; `skip` is ignored, so that a skipped step is checked too."""
    all_values = space.first | values
    table = space.chosen_step(number, all_values)
    table.pop("skip", None)
    parse_step(table, f"{space.where}: step {number + 1}", space._steps)


def _drawn(parameters: Sequence[Parameter]) -> Iterator[Values]:
    """Yield combinations of values: all first ends, then random ones."""
    generator = random.Random(0)
    yield {parameter.name: parameter.ends[0] for parameter in parameters}
    while True:
        yield {parameter.name: parameter.drawn(generator) for parameter in parameters}


def _put_together(rest: Sequence[Parameter], valid_by_step: Sequence[Sequence[Values]]) -> Iterator[Values]:
    """Yield values of whole recipes: a valid combination of each step, and values of the parameters in `rest`."""
    generator = random.Random(0)
    for number in itertools.count():
        first = number == 0
        values: Values = {
            parameter.name: parameter.ends[0] if first else parameter.drawn(generator) for parameter in rest
        }
        for combinations in valid_by_step:
            values |= combinations[0] if first else generator.choice(combinations)
        yield values


def _held(
    parameters: Sequence[Parameter], attempt: Callable[[Values], object], drawn: Iterator[Values]
) -> list[Values]:
    """Valid combinations, in which each end and each choice of each parameter occurs.

    Raises:
        RecipeError: no combination is valid, or none with some value.
    """
    valid: list[Values] = []
    first_error: RecipeError | None = None
    proven: set[tuple[str, str]] = set()

    def holds(values: Values) -> RecipeError | None:
        try:
            attempt(values)
        except RecipeError as error:
            return error
        used = {(parameter.name, repr(values[parameter.name])) for parameter in parameters}
        if len(valid) < ENOUGH or not used <= proven:
            valid.append(values)
        proven.update(used)
        return None

    tried = [next(drawn) for _ in range(TRIES if parameters else 1)]
    for values in tried:
        error = holds(values)
        first_error = first_error or error
        if len(valid) >= ENOUGH:
            break
    if not valid:
        assert first_error is not None
        raise first_error
    faults: list[tuple[bool, RecipeError]] = []
    ends = [(parameter, value) for parameter in parameters for value in parameter.ends]
    for parameter, value in ends:
        if (parameter.name, repr(value)) in proven:
            continue
        errors = []
        for values in [*valid, *tried]:
            error = holds(values | {parameter.name: value})
            if error is None:
                break
            errors.append(error)
        else:
            # a wrong value makes others fail with it: prefer errors that name their own key
            names_key = repr(parameter.path[-1]) in str(errors[0])
            unusable = RecipeError(f"{parameter.name} = {shown(value)} cannot be used: {errors[0]}")
            unusable.__cause__ = errors[0]
            faults.append((not names_key, unusable))
        if len(faults) >= FAULTS:
            break
    if faults:
        raise min(faults, key=lambda fault: fault[0])[1]
    return valid
