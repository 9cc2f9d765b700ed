"""Mutated inputs of every kind are accepted or refused with a TorchslimError; `benchmarks/fuzz.py` tries many more."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import torchslim as ts
from tests.mutations import KINDS
from tests.mutations.base import NUMBERS, OTHERS, at, places, replaced, typo
from tests.mutations.recipes import PLAIN, RANGES, check, documents
from torchslim.errors import RecipeError, TorchslimError

GOOD = documents((*PLAIN, *RANGES))


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import what checks need before they are timed: modules are imported when they are first used."""
    for document in GOOD:
        check(document)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KINDS))
@settings(max_examples=40)
@given(data=st.data())
def test_mutated_inputs_are_accepted_or_refused_clearly(name: str, data: st.DataObject) -> None:
    kind = KINDS[name]
    with suppress(TorchslimError):
        kind.attempt(data.draw(kind.examples))


@pytest.mark.parametrize("number", range(len(GOOD)))
def test_what_is_mutated_is_good_before(number: int) -> None:
    assert check(GOOD[number])


def keys_of_steps(document: Any) -> list[tuple[Any, ...]]:
    """Paths of keys whose values are no tables."""
    return [path for path in places(document) if isinstance(path[-1], str) and not isinstance(at(document, path), dict)]


LEAVES = [(number, path) for number, document in enumerate(GOOD) for path in keys_of_steps(document)]


@pytest.mark.slow
@settings(max_examples=150)
@given(st.sampled_from(LEAVES), st.integers(0, 5))
def test_a_misspelled_key_is_the_first_thing_to_say(leaf: tuple[int, tuple[Any, ...]], place: int) -> None:
    number, path = leaf
    key = typo(str(path[-1]), place)

    def rename(container: Any, old: Any) -> None:
        container[key] = container.pop(old)

    document = replaced(GOOD[number], path, rename)
    if (
        {"layers", "taps", "lr_scale"} & {*path}
        or "conv1" in path
        or "head*" in path
        or key in at(GOOD[number], path[:-1])
    ):
        return  # names of the model's layers, which may be any
    start = time.process_time()
    with pytest.raises(RecipeError) as caught:
        check(document)
    seconds = time.process_time() - start
    assert repr(key) in str(caught.value) or "is missing" in str(caught.value) or "needs a key" in str(caught.value)
    assert seconds < 5


@settings(max_examples=200)
@given(st.sampled_from(LEAVES), st.sampled_from([*NUMBERS[-12:], *OTHERS[2:], [[]], {"x": {"y": {}}}, {"": 0}]))
def test_an_absurd_value_is_refused_by_the_name_of_its_key(leaf: tuple[int, tuple[Any, ...]], value: Any) -> None:
    number, path = leaf
    if "layers" in path or "taps" in path:
        return
    if path[-1] == "n" and value in (math.inf, -math.inf):
        return  # orders of a norm, which may be infinite

    def put(container: Any, key: Any) -> None:
        container[key] = value

    with pytest.raises(RecipeError) as caught:
        check(replaced(GOOD[number], path, put))
    named = next(part for part in reversed(path) if isinstance(part, str))
    assert named in str(caught.value) or (named == "search" and str(path[-2]) in str(caught.value))


@pytest.mark.parametrize("field", ["temperature", "n", "variance"])
@given(value=st.floats(0, 1e-31, exclude_min=True) | st.floats(-1e-31, 0, exclude_max=True) | st.just(math.nan))
def test_numbers_that_others_are_divided_by_are_not_tiny(field: str, value: float) -> None:
    make: Any = {"temperature": ts.distill.KD, "n": ts.Prune, "variance": ts.distill.VID}[field]
    with pytest.raises(TorchslimError, match=f"{field} must be"):
        make(**{field: value})
