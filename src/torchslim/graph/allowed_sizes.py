"""Which sizes a captured program takes, in words: for the error of a call with another size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from torchslim.core.terminal import printable
from torchslim.graph.size_guards import NAME, InputSizes, holding, readable, readable_sizes

TRIED = 1_024  # sizes from 1 on; more where a relation names a larger number
EVALUATIONS = 20_000  # of relations, at most
LISTED = 8  # sizes of a text that lists all of them


def refusal(
    takes: InputSizes, shapes: Sequence[Sequence[int]], names: Sequence[str], places: Mapping[str, str] | None = None
) -> str | None:
    """Return why a program does not take inputs of these shapes, and which sizes it takes; None if it takes them.

    Args:
        takes: the sizes that the program takes.
        shapes: of the flat inputs of the call.
        names: of the inputs.
        places: the lines of the model's code that need a relation.
    """
    misfit = takes.misfit(shapes)
    if misfit is None:
        return None
    if isinstance(misfit, int):
        return (
            f"input {names[misfit]!r} must have the shape {readable_sizes(takes.sizes[misfit])}, got "
            f"{tuple(shapes[misfit])}"
        )
    got = ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(names, shapes, strict=True))
    allowed = allowed_text(misfit, takes.guards, shapes, names)
    needs = f"the captured program needs {readable(misfit, names)}{printable((places or {}).get(misfit, ''))}"
    return f"the sizes do not fit: {f'{allowed}; ' if allowed else ''}{needs}, got {got}"


def allowed_text(broken: str, relations: Sequence[str], shapes: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Return which values of the sizes in a broken relation fit, as "x.shape[2] must be a multiple of 4: 4, 8, ...".

    All relations count in which a size occurs; the other sizes are those of the call. Empty where no value was found.

    Args:
        broken: one of `relations`.
        relations: of the program, as of `size_guards`.
        shapes: of the flat inputs of the call.
        names: of the inputs.
    """
    for index, dim in dict.fromkeys((int(index), int(dim)) for index, dim in NAME.findall(broken)):
        name = f"s{index}_{dim}"
        of_size = [relation for relation in relations if name in _names(relation)]
        alone = [relation for relation in of_size if _names(relation) == {name}]
        if not holding(alone, shapes, (index, dim), [shapes[index][dim]]):
            of_size = alone  # the size is wrong whatever the others are
        largest = max(
            [shapes[index][dim], *(int(number) for text in of_size for number in re.findall(r"\b\d+\b", text))]
        )
        limit = min(max(TRIED, 2 * largest), EVALUATIONS // len(of_size))
        text = _described(holding(of_size, shapes, (index, dim), range(1, limit + 1)), limit)
        if text:
            others = {other for relation in of_size for other in _names(relation)} - {name}
            given = ", with the other sizes of this call," if others else ""
            return f"{readable(name, names)}{given} must be {text}"
    return ""


def _names(relation: str) -> set[str]:
    return {match[0] for match in NAME.finditer(relation)}


def _described(values: Sequence[int], limit: int) -> str:
    """Values from 1 to a limit in words; empty for none, and for all of them."""
    if not values or len(values) == limit:
        return ""
    steps = {after - before for before, after in pairwise(values)}
    first, last = values[0], values[-1]
    if len(values) <= LISTED and last <= limit // 2 and (len(values) < 3 or steps != {1}):
        return " or ".join(filter(None, [", ".join(map(str, values[:-1])), str(last)]))
    if steps == {1}:
        if first == 1:
            return f"at most {last}"
        return f"at least {first}" if last == limit else f"from {first} to {last}"
    if len(steps) == 1:
        (step,) = steps
        start = ", ".join(map(str, values[:3]))
        end = "..." if last + step > limit else f"... {last}"
        return f"{f'a multiple of {step}: ' if first % step == 0 else 'one of '}{start}, {end}"
    return f"one of {', '.join(map(str, values[:LISTED]))}, ..."
