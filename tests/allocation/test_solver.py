"""The solver against trying every choice."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.allocations import chain, problems
from torchslim.allocation.problem import Decision, Problem, Term
from torchslim.allocation.reduction import merged, reduced
from torchslim.allocation.solver import TOLERANCE, Infeasible, front, least, solve
from torchslim.errors import AllocationError

CLOSE = 1e-6


def choices(problem: Problem) -> list[tuple[int, ...]]:
    """Every choice."""
    return list(itertools.product(*(range(len(decision.options)) for decision in problem.decisions)))


def limited(problem: Problem, shares: tuple[float, float]) -> Problem:
    """Limits between the least and the most of each cost, or somewhat below the least."""
    limits = {}
    for (name, terms), share in zip(problem.costs.items(), shares, strict=True):
        totals = [problem.total(terms, choice) for choice in choices(problem)]
        limits[name] = min(totals) + share * (max(totals) - min(totals))
    return replace(problem, limits=limits)


def keeping(problem: Problem, slack: float = 0.0) -> list[tuple[int, ...]]:
    """Every choice within the limits."""
    return [
        choice
        for choice in choices(problem)
        if all(
            problem.total(problem.costs[name], choice) <= limit + slack * abs(limit) + 1e-12
            for name, limit in problem.limits.items()
        )
    ]


shares = st.tuples(st.floats(-0.1, 1), st.floats(-0.1, 1))


@settings(max_examples=60, deadline=None)
@given(problems(), shares)
def test_finds_the_best_of_all_choices(problem: Problem, given_shares: tuple[float, float]) -> None:
    problem = limited(problem, given_shares)
    possible = keeping(problem)
    if not possible:
        if keeping(problem, 2 * TOLERANCE):
            return  # within the solver's accuracy of the limit
        with pytest.raises(Infeasible) as caught:
            solve(problem, gap=0)
        assert set(caught.value.binding) <= set(problem.limits)
        assert caught.value.binding
        return
    found = solve(problem, gap=0)
    best = min(problem.total(problem.damage, choice) for choice in possible)
    assert found.damage <= best + CLOSE
    assert found.places in keeping(problem, 2 * TOLERANCE)
    assert found.damage == pytest.approx(problem.total(problem.damage, found.places))
    assert found.costs == {
        name: pytest.approx(problem.total(terms, found.places)) for name, terms in problem.costs.items()
    }
    assert found.bound <= best + CLOSE
    assert found.damage - found.bound <= CLOSE


@settings(max_examples=25, deadline=None)
@given(problems(), shares)
def test_reduction_keeps_a_best_choice_and_all_totals(problem: Problem, given_shares: tuple[float, float]) -> None:
    problem = limited(problem, given_shares)
    small = reduced(problem)
    remaining = [small.original(places) for places in itertools.product(*map(range, small.sizes))]
    possible = keeping(problem)
    if possible:
        best = min(problem.total(problem.damage, choice) for choice in possible)
        kept = [choice for choice in remaining if choice in possible]
        assert min(problem.total(problem.damage, choice) for choice in kept) == pytest.approx(best)
    for places in itertools.product(*map(range, small.sizes)):
        total = sum(term.at(places) for term in small.damage)
        assert total == pytest.approx(problem.total(problem.damage, small.original(places)))


@settings(max_examples=25, deadline=None)
@given(problems())
def test_merged_terms_have_the_same_total(problem: Problem) -> None:
    tables = merged(problem.damage)
    assert all(list(scope) == sorted(scope) for scope in tables)
    for choice in choices(problem)[:20]:
        total = sum(values[tuple(choice[decision] for decision in scope)] for scope, values in tables.items())
        assert total == pytest.approx(problem.total(problem.damage, choice))


@settings(max_examples=20, deadline=None)
@given(problems())
def test_the_least_of_a_cost_is_its_minimum(problem: Problem) -> None:
    found = least(problem, "latency")
    lowest = min(problem.total(problem.costs["latency"], choice) for choice in choices(problem))
    assert found.costs["latency"] == pytest.approx(lowest, abs=CLOSE)
    assert found.bound <= lowest + CLOSE


@settings(max_examples=15, deadline=None)
@given(problems())
def test_a_front_trades_the_cost_for_damage(problem: Problem) -> None:
    found = front(problem, "latency", 4, gap=0)
    assert len({solution.places for solution in found}) == len(found)
    damages = [solution.damage for solution in found]
    assert damages == pytest.approx(sorted(damages), abs=CLOSE)
    best = min(problem.total(problem.damage, choice) for choice in choices(problem))
    assert damages[0] == pytest.approx(best, abs=CLOSE)


def test_a_pair_of_neighbours_is_chosen_together() -> None:
    found = solve(replace(chain(), limits={"latency": 16.0}))
    assert found.options == {"width 0": 4, "width 1": 2, "width 2": 4}  # the middle one halves both layers
    assert found.costs["latency"] == 16.0


@settings(max_examples=20, deadline=None)
@given(problems(), st.data())
def test_only_allowed_options_are_chosen(problem: Problem, data: st.DataObject) -> None:
    allowed = [
        data.draw(st.lists(st.sampled_from(range(len(decision.options))), min_size=1, unique=True))
        for decision in problem.decisions
    ]
    found = solve(problem, allowed=allowed, gap=0)
    assert all(place in own for place, own in zip(found.places, allowed, strict=True))
    best = min(problem.total(problem.damage, choice) for choice in itertools.product(*allowed))
    assert found.damage == pytest.approx(best, abs=CLOSE)


def test_names_the_limit_that_binds_and_the_least() -> None:
    with pytest.raises(Infeasible, match=r"latency of at most 1.5, at least 2") as caught:
        solve(replace(chain(), limits={"latency": 1.5, "params": 12.0}))
    assert caught.value.binding == ("latency",)
    assert caught.value.least == {"latency": 2.0, "params": 3.0}


def test_names_limits_that_exclude_each_other() -> None:
    opposed = Problem(
        decisions=(Decision(name="a", options=(0, 1)),),
        damage=(),
        costs={
            "latency": (Term(decisions=(0,), values=np.array([1.0, 0.0])),),
            "size_bytes": (Term(decisions=(0,), values=np.array([0.0, 1.0])),),
        },
        limits={"latency": 0.5, "size_bytes": 0.5},
    )
    with pytest.raises(Infeasible, match="together") as caught:
        solve(opposed)
    assert caught.value.binding == ("latency", "size_bytes")
    assert caught.value.least == {"latency": 1.0, "size_bytes": 1.0}


def test_a_decision_of_one_option_and_no_limit_need_no_solver() -> None:
    alone = Problem(
        decisions=(Decision(name="a", options=("only",)),), damage=(Term(decisions=(0,), values=np.array([2.0])),)
    )
    found = solve(alone)
    assert (found.options, found.damage, found.gap) == ({"a": "only"}, 2.0, 0.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: solve(chain(), gap=-1), "gap"),
        (lambda: solve(chain(), allowed=[[0], [], [0]]), "allows"),
        (lambda: solve(chain(), allowed=[[0], [3], [0]]), "allows"),
        (lambda: solve(chain(), seconds=0), "seconds"),
        (lambda: least(chain(), "macs"), "no cost"),
        (lambda: front(chain(), "latency", 0), "one point"),
    ],
)
def test_refuses_arguments_out_of_range(call, words: str) -> None:
    with pytest.raises(AllocationError, match=words):
        call()


def test_scales_of_costs_do_not_matter() -> None:
    tiny = replace(chain(), limits={"latency": 16.0})
    for factor in (1e-9, 1e9):
        terms = tuple(Term(decisions=t.decisions, values=t.values * factor) for t in tiny.costs["latency"])
        damage = tuple(Term(decisions=t.decisions, values=t.values / factor) for t in tiny.damage)
        scaled = replace(tiny, damage=damage, costs={"latency": terms}, limits={"latency": 16.0 * factor})
        assert solve(scaled).places == solve(tiny).places
