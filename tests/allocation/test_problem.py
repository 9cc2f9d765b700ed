"""Problems check their tables, and sum them up."""

from __future__ import annotations

import numpy as np
import pytest

from torchslim.allocation.problem import Decision, Problem, Term
from torchslim.errors import AllocationError

WIDTH = Decision(name="width a", options=(8, 4))
SCHEME = Decision(name="scheme a", options=("float", "int8", "int4-weights"))


def test_sums_terms_over_the_chosen_options() -> None:
    pair = Term(decisions=(1, 0), values=np.array([[6.0, 3.0], [2.0, 1.0], [4.0, 2.0]]))
    constant = Term(decisions=(), values=np.array(0.5))
    problem = Problem(decisions=(WIDTH, SCHEME), damage=(), costs={"latency": (pair, constant)})
    places = problem.places({"scheme a": "int8"})
    assert places == (0, 1)
    assert problem.total(problem.costs["latency"], places) == 2.5
    assert problem.options(places) == {"width a": 8, "scheme a": "int8"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Decision(name="a", options=()), "no options"),
        (lambda: Term(decisions=(0, 0), values=np.zeros((2, 2))), "distinct"),
        (lambda: Term(decisions=(0,), values=np.zeros((2, 2))), "axes"),
        (lambda: Term(decisions=(0,), values=np.array([np.nan, 0.0])), "finite"),
        (lambda: Problem(decisions=(WIDTH, WIDTH), damage=()), "one name"),
        (lambda: Problem(decisions=(WIDTH,), damage=(Term(decisions=(0,), values=np.zeros(3)),)), "shape"),
        (lambda: Problem(decisions=(WIDTH,), damage=(Term(decisions=(1,), values=np.zeros(2)),)), "names decisions"),
        (lambda: Problem(decisions=(WIDTH,), damage=(), limits={"latency": 1.0}), "unknown costs"),
        (lambda: Problem(decisions=(WIDTH,), damage=()).places({"width b": 8}), "no such"),
        (lambda: Problem(decisions=(WIDTH,), damage=()).places({"width a": 5}), "no option"),
    ],
)
def test_refuses_what_does_not_fit_together(make, words: str) -> None:
    with pytest.raises(AllocationError, match=words):
        make()
