"""Costs in the units of a budget, and decisions that a recipe leaves out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from torchslim.allocation.problem import Decision, Problem, Term
from torchslim.tuning.solved_costs import Costs, scaled, without

DECISIONS = (
    Decision(name="width conv1.weight[0]", options=(8, 4, 2)),
    Decision(name="scheme conv1", options=("float", "int8")),
    Decision(name="width conv2.weight[0]", options=(8, 4)),
)
TERMS = (
    Term(decisions=(1, 0), values=np.arange(6.0).reshape(2, 3) + 1),
    Term(decisions=(2,), values=np.array([3.0, 2.0])),
    Term(decisions=(), values=np.array(0.5)),
)


def total(decisions: tuple[Decision, ...], terms: tuple[Term, ...], places: tuple[int, ...]) -> float:
    return Problem(decisions=decisions, damage=terms).total(terms, places)


def test_a_kind_that_is_left_out_stays_at_its_first_option() -> None:
    left = without(Costs(decisions=DECISIONS, costs={"latency": TERMS}), "width")
    assert [decision.name for decision in left.decisions] == ["scheme conv1"]
    for place in range(2):
        assert total(left.decisions, left.costs["latency"], (place,)) == total(DECISIONS, TERMS, (0, place, 0))


def test_scaled_costs_are_those_of_the_original_and_keep_their_ratios() -> None:
    terms = scaled(TERMS, 9.0)
    assert total(DECISIONS, terms, (0, 0, 0)) == pytest.approx(9.0)
    full = total(DECISIONS, TERMS, (0, 0, 0))
    for places in itertools.product(range(3), range(2), range(2)):
        assert total(DECISIONS, terms, places) / 9.0 == pytest.approx(total(DECISIONS, TERMS, places) / full)
