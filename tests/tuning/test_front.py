"""Fronts, verdicts and hypervolumes: laws, and references that count instead of calculate."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchslim.core.budget import Budget
from torchslim.tuning.pareto import WHOLE, dominates, finalists, front_of, hopeless, judge, near, next_finalist, volume

NAMES = ("metric_drop", "latency")
FIGURES = st.dictionaries(
    st.integers(0, 40),
    st.fixed_dictionaries({"metric_drop": st.integers(0, 6).map(float), "latency": st.integers(1, 6).map(float)}),
    min_size=1,
    max_size=12,
)


@given(FIGURES)
def test_nothing_on_the_front_is_dominated_and_everything_else_is(figures: dict[int, Mapping[str, float]]) -> None:
    front = front_of(figures, NAMES)
    assert front
    for key, mine in figures.items():
        assert (key in front) == (not any(dominates(figures[other], mine, NAMES) for other in front))


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), max_size=6), st.sampled_from([1, 2, 3]))
def test_the_hypervolume_is_the_number_of_cells_that_are_covered(points: list[tuple[int, ...]], count: int) -> None:
    points = [point[:count] for point in points]
    cells = sum(
        any(all(a <= b for a, b in zip(point, cell, strict=True)) for point in points)
        for cell in itertools.product(range(5), repeat=count)
    )
    assert volume(points, [5] * count) == cells


@given(FIGURES, st.data())
def test_every_candidate_has_a_place_among_the_finalists_and_the_front_comes_first(
    figures: dict[int, Mapping[str, float]], data: st.DataObject
) -> None:
    short = set(data.draw(st.lists(st.sampled_from(sorted(figures)))))
    budget = Budget(minimize=NAMES)
    order = finalists(figures, short, budget)
    assert sorted(order) == sorted(figures)
    trained = {key: figures[key] for key in short}
    places = {tuple(each.values()) for key, each in trained.items() if key in front_of(trained, NAMES)}
    assert {tuple(figures[key].values()) for key in order[: len(places)]} == places  # one of each


def test_what_is_near_the_drop_is_trained_before_what_is_far_and_what_is_too_slow_last() -> None:
    figures = {
        0: {"metric_drop": 0.4, "latency": 2.0},
        1: {"metric_drop": 9.0, "latency": 1.0},  # far from the drop, if fast
        2: {"metric_drop": 0.9, "latency": 1.5},  # its training may bring it back
        3: {"metric_drop": 0.0, "latency": 5.0},  # no training makes it faster
    }
    assert finalists(figures, set(figures), Budget(metric_drop=0.5, latency_ms=3.0))[2:] == [1, 3]
    assert finalists(figures, {0, 1, 3}, Budget(metric_drop=0.5, latency_ms=3.0))[0] == 0


def test_a_drop_that_training_will_not_change_is_near_no_bound() -> None:
    budget = Budget(metric_drop=0.5, latency_ms=3.0)
    figures = {0: {"metric_drop": 0.9, "latency": 1.0}, 1: {"metric_drop": 0.9, "latency": 2.0}}
    assert finalists(figures, {0, 1}, budget) == [0, 1]
    assert finalists(figures, {0, 1}, budget, whole={0}) == [1, 0]
    budget = Budget(metric_drop=2.0, latency_ms=10.0)
    assert near({"metric_drop": 5.0, "latency": 11.0}, budget) == pytest.approx({"metric_drop": 0.5, "latency": 0.1})
    assert near({"metric_drop": 0.25}, Budget(metric_drop=0.0)) == {"metric_drop": 0.25}


def in_full(results: Mapping[int, Mapping[str, Any]], budget: Budget) -> list[int]:
    """What is taken in full, one after the other; each comes out as its trial said."""
    finished: dict[int, Mapping[str, Any] | None] = {}
    while (number := next_finalist(results, finished, budget)) is not None:
        assert number not in finished
        finished[number] = {"within": max(results[number]["excess"].values(), default=0.0) <= 0}
    return list(finished)


def result(drop: float, latency: float, budget: Budget, stage: str = "short") -> dict[str, Any]:
    """Of a trial."""
    figures = {"metric_drop": drop, "latency": latency}
    return {"state": "candidate", "stage": stage, "figures": figures, "excess": budget.excess(figures)}


@given(FIGURES, st.data(), st.integers(1, 4), st.integers(0, 6) | st.none())
def test_what_trains_nothing_comes_beside_the_finalists(
    figures: dict[int, Mapping[str, float]], data: st.DataObject, count: int, drop: int | None
) -> None:
    budget = Budget(metric_drop=drop, minimize=NAMES, finalists=count)
    whole = set(data.draw(st.lists(st.sampled_from(sorted(figures)))))
    results = {
        key: result(each["metric_drop"], each["latency"], budget, WHOLE if key in whole else "short")
        for key, each in figures.items()
    }  # fmt: skip
    chosen = in_full(results, budget)
    good = {key for key in whole if drop is None or figures[key]["metric_drop"] <= drop}
    free = [key for key in chosen if key in good]
    assert chosen[: len(free)] == free
    assert set(free) <= set(front_of({key: figures[key] for key in good}, NAMES))
    assert bool(free) == bool(good)
    others = [key for key in chosen if key not in good]
    met = any(drop is None or figures[key]["metric_drop"] <= drop for key in chosen)
    assert len(others) <= count * (1 if met else 2)
    assert len(others) >= min(count, len(set(figures) - good))


def test_what_came_out_as_another_waits() -> None:
    budget = Budget(metric_drop=0.5, minimize=NAMES, finalists=2)
    results = {0: result(0.2, 1.0, budget), 1: result(0.2, 1.0, budget), 2: result(0.4, 2.0, budget)}
    assert in_full(results, budget) == [0, 2]
    assert in_full({0: results[0], 1: results[1]}, budget) == [0, 1]


def test_what_is_worse_than_one_that_trains_nothing_waits() -> None:
    budget = Budget(metric_drop=0.5, minimize=NAMES, finalists=1)
    results = {
        0: result(0.1, 2.0, budget, WHOLE), 1: result(0.2, 2.0, budget), 2: result(0.6, 1.0, budget),
    }  # fmt: skip
    assert in_full(results, budget) == [0, 2]
    assert in_full({0: results[0], 1: results[1]}, budget) == [0, 1]


def test_what_is_at_work_elsewhere_is_waited_for() -> None:
    budget = Budget(metric_drop=0.5, minimize=NAMES, finalists=1)
    results = {0: result(9.0, 1.0, budget), 1: result(9.0, 2.0, budget), 2: {"state": "failed", "stage": "cheap"}}
    assert next_finalist(results, {}, budget) == 0
    assert next_finalist(results, {0: None}, budget) is None
    assert next_finalist(results, {0: {"within": False}}, budget) == 1
    assert next_finalist(results, {0: {"within": True}}, budget) is None


def test_hopeless_is_what_training_cannot_mend() -> None:
    budget = Budget(metric_drop=0.5, latency_ms=3.0)
    assert hopeless({"metric_drop": 60.0, "latency": 2.9}, [], budget) == ""  # the metric comes back
    assert hopeless({"metric_drop": 0.0, "latency": 3.1}, [], budget) == ""  # within the noise of the bound
    assert "latency 4 ms of at most 3 ms" in hopeless({"metric_drop": 0.0, "latency": 4.0}, [], budget)
    better = [{"metric_drop": 10.0, "latency": 2.0}] * 3
    assert "3 earlier" in hopeless({"metric_drop": 60.0, "latency": 2.5}, better, budget)
    assert hopeless({"metric_drop": 60.0, "latency": 2.5}, better[:2], budget) == ""
    assert hopeless({"metric_drop": 60.0, "latency": 1.5}, better, budget) == ""


@given(FIGURES, st.integers(0, 6), st.integers(1, 6))
def test_a_verdict_is_met_where_something_keeps_all_bounds(
    figures: dict[int, Mapping[str, float]], drop: int, latency: int
) -> None:
    verdict = judge(figures, Budget(metric_drop=float(drop), latency_ms=float(latency)))
    kept = [key for key, each in figures.items() if each["metric_drop"] <= drop and each["latency"] <= latency]
    assert verdict.met == bool(kept)
    assert verdict.nearest in (kept or figures)
    assert bool(verdict.binding) == (not kept)
    nearest = figures[verdict.nearest or 0]
    over = {"metric_drop": nearest["metric_drop"] > drop, "latency": nearest["latency"] > latency}
    assert set(verdict.binding) == {name for name in NAMES if over[name]}


def test_the_verdict_says_what_is_nearest_and_what_binds() -> None:
    figures = {3: {"metric_drop": 0.2, "latency": 4.0}, 5: {"metric_drop": 0.6, "latency": 2.9}}
    verdict = judge(figures, Budget(metric_drop=0.5, latency_ms=3.0))
    assert (verdict.nearest, verdict.binding) == (5, ("metric_drop",))
    assert "no measured artifact" in verdict.text
    assert "metric_drop 0.6 of at most 0.5" in verdict.text
    assert not judge({}, Budget(metric_drop=0.5)).met


@pytest.mark.parametrize(
    ("budget", "objectives"),
    [
        (Budget(), ("metric_drop", "latency")),
        (Budget(metric_drop=1.0, size_mb=2.0, macs=1e6), ("metric_drop", "size", "macs")),
        (Budget(minimize=("size",), latency_ms=1.0), ("size",)),
    ],
)
def test_what_is_made_small_where_nobody_says(budget: Budget, objectives: tuple[str, ...]) -> None:
    assert budget.objectives == objectives
    assert set(budget.figures) >= set(budget.bounds) | set(objectives)
