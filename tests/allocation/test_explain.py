"""Explanations agree with the totals of the problem."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from tests.support.allocations import chain, problems
from torchslim.allocation.explain import explain
from torchslim.allocation.problem import Problem
from torchslim.allocation.solver import least


@settings(max_examples=25, deadline=None)
@given(problems())
def test_trades_are_differences_of_totals(problem: Problem) -> None:
    found = least(problem, "latency")
    told = explain(problem, found.places, "latency", count=100)
    for trade in (*told.bought, *told.refused):
        after = problem.places({**found.options, trade.decision: trade.after})
        before = problem.places({**found.options, trade.decision: trade.before})
        for terms, value in ((problem.costs["latency"], -trade.saved), (problem.damage, trade.damage)):
            assert problem.total(terms, after) - problem.total(terms, before) == pytest.approx(value)
        assert trade.saved > 0
    assert not told.refused  # nothing is faster than the least


def test_the_best_trades_come_first() -> None:
    problem = chain(3)
    told = explain(problem, (1, 1, 0), "latency")
    assert [trade.decision for trade in told.bought] == ["width 1", "width 0"]
    assert [(trade.before, trade.after) for trade in told.bought] == [(4, 2), (4, 2)]
    rates = [trade.rate for trade in told.refused]
    assert rates == sorted(rates, reverse=True)
    assert np.isfinite(rates).all()
    assert {trade.decision for trade in told.refused} == {"width 0", "width 1", "width 2"}
