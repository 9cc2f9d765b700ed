"""The model of times, and the choice of widths under a ceiling."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchslim.prune.latency.cost_model import Cost, choose, fit, smoothed

UNIT = st.fixed_dictionaries({width: st.floats(0.05, 1.0) for width in (8, 16, 24)}, optional={}).map(
    lambda curve: {32: 1.0, **{width: curve[width] for width in curve}}
)
LOSSES = st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3).map(
    lambda steps: dict(zip((32, 24, 16, 8), np.cumsum([0.0, *steps]).tolist(), strict=True))
)


def separable(shares: Any, curves: Any) -> Cost:
    shares = np.array(shares)
    return Cost(np.eye(len(curves), dtype=bool), shares / max(shares.sum(), 1.0), curves)


@given(st.lists(st.tuples(st.floats(0.02, 1.0), UNIT, LOSSES), min_size=1, max_size=4), st.floats(0.1, 1.0))
def test_widths_keep_the_ceiling_and_lose_the_least(units, ceiling):
    shares, curves, lost = zip(*units, strict=True)
    cost = separable(shares, curves)
    fastest = cost.of(np.array([min(each.values()) for each in curves]))
    widths = choose(cost, lost, ceiling)
    took = cost.time(widths)
    if fastest > ceiling:
        assert took == pytest.approx(fastest)
        return
    assert took <= ceiling + 1e-9
    gone = sum(each[width] for each, width in zip(lost, widths, strict=True))
    assert gone <= cheapest(cost, lost, ceiling) * (1 + 1e-3) + 1e-6


def cheapest(cost: Cost, lost: Any, ceiling: float) -> float:
    """The least loss within a ceiling, by trying all widths."""
    return min(
        sum(each[width] for each, width in zip(lost, widths, strict=True))
        for widths in product(*lost)
        if cost.time(widths) <= ceiling + 1e-12
    )


@given(st.integers(0, 1000), st.floats(0.4, 0.9))
def test_operations_between_two_units_are_chosen_exactly(seed, ceiling):
    generator = np.random.default_rng(seed)
    curves = [{32: 1.0, 24: 0.8, 16: 0.5, 8: generator.uniform(0.2, 0.45)} for _ in range(4)]
    lost = [
        dict(zip((32, 24, 16, 8), np.cumsum([0, *generator.uniform(0.1, 1, 3)]).tolist(), strict=True)) for _ in curves
    ]
    touches = np.array([[True, True, False, False], [False, True, True, False], [False, False, True, True]])
    cost = Cost(touches, generator.dirichlet(np.ones(3)), curves)
    widths = choose(cost, lost, ceiling)
    assert cost.time(widths) <= ceiling + 1e-9
    gone = sum(each[width] for each, width in zip(lost, widths, strict=True))
    assert gone <= cheapest(cost, lost, ceiling) * (1 + 1e-3) + 1e-6


def test_an_operation_that_many_units_touch_is_linearized():
    regrets = []
    for seed in range(12):
        generator = np.random.default_rng(seed)
        curves = [{32: 1.0, 24: 0.8, 16: 0.5, 8: generator.uniform(0.2, 0.45)} for _ in range(5)]
        lost = [
            dict(zip((32, 24, 16, 8), np.cumsum([0, *generator.uniform(0.1, 1, 3)]).tolist(), strict=True))
            for _ in curves
        ]
        cost = Cost(np.array([[True] * 5, [True, False] * 2 + [True]]), np.array([0.4, 0.5]), curves)
        widths = choose(cost, lost, 0.6)
        assert cost.time(widths) <= 0.6 + 1e-9
        gone = sum(each[width] for each, width in zip(lost, widths, strict=True))
        regrets.append(gone / cheapest(cost, lost, 0.6) - 1)
    assert float(np.mean(regrets)) < 0.1


@given(st.lists(st.tuples(st.floats(0.02, 1.0), UNIT, LOSSES), min_size=2, max_size=4))
def test_more_time_costs_no_more(units):
    shares, curves, lost = zip(*units, strict=True)
    cost = separable(shares, curves)
    previous = np.inf
    for ceiling in (0.4, 0.6, 0.8, 1.0):
        widths = choose(cost, lost, ceiling)
        if cost.time(widths) > ceiling + 1e-9:
            continue
        gone = sum(each[width] for each, width in zip(lost, widths, strict=True))
        assert gone <= previous * (1 + 1e-3) + 1e-6
        previous = gone
    assert sum(each[width] for each, width in zip(lost, choose(cost, lost, 1.0), strict=True)) == 0


@pytest.mark.slow
@given(st.lists(UNIT, min_size=2, max_size=4), st.lists(st.floats(0.0, 1.0), min_size=6, max_size=6))
def test_a_unit_narrowed_alone_takes_what_was_measured(ratios, work):
    count = len(ratios)
    pairs = [pair for pair in product(range(count), repeat=2) if pair[0] < pair[1]][:6]
    touches = np.array([[unit in pair for unit in range(count)] for pair in pairs])
    total = max(sum(work[: len(pairs)]), 1.0)
    cost = fit(touches, np.array(work[: len(pairs)]) / total, ratios)
    assert (cost.shares >= 0).all()
    for unit, each in enumerate(ratios):
        for width, ratio in smoothed(each).items():
            widths = [32] * count
            widths[unit] = width
            assert cost.time(widths) == pytest.approx(ratio, abs=1e-9)
            assert cost.curves[unit][width] >= -1e-9


def test_a_layer_between_two_narrowed_groups_is_not_counted_twice():
    """Three convolutions in a row: with all times proportional to the work the fit is exact for every width."""
    touches = np.array([[True, False], [True, True], [False, True]])
    work = np.array([0.2, 0.6, 0.2])

    def truth(first: float, second: float) -> float:
        return 0.2 * first + 0.6 * first * second + 0.2 * second

    ratios = [{width: truth(width / 32, 1.0) for width in (32, 24, 16, 8)},
              {width: truth(1.0, width / 32) for width in (32, 24, 16, 8)}]  # fmt: skip
    cost = fit(touches, work, ratios)
    for first, second in product((32, 24, 16, 8), repeat=2):
        assert cost.time([first, second]) == pytest.approx(truth(first / 32, second / 32), abs=0.01)
    assert cost.time([8, 8]) > ratios[0][8] + ratios[1][8] - 1 + 0.2  # what adding up would say is far too low


def test_slopes_are_the_derivatives():
    generator = np.random.default_rng(1)
    touches = generator.random((6, 4)) < 0.5
    cost = Cost(touches, generator.dirichlet(np.ones(6)), [{8: 1.0}] * 4)
    factors = generator.uniform(0.2, 1.0, 4)
    factors[2] = 0.0  # nothing is divided by a factor
    for unit in range(4):
        moved = factors.copy()
        moved[unit] += 1e-3
        assert (cost.of(moved) - cost.of(factors)) / 1e-3 == pytest.approx(cost.slopes(factors)[unit], abs=1e-9)


def test_noise_is_no_staircase():
    assert smoothed({32: 1.0, 24: 1.005, 16: 0.7, 8: 0.75}) == {32: 1.0, 24: 1.0, 16: 0.7, 8: 0.75}


def test_fast_widths_are_preferred():
    """16 of 32 channels are as fast as 24 are slow: nothing is gained by 24, so it is never taken."""
    cost = Cost(np.eye(1, dtype=bool), np.ones(1), [{32: 1.0, 24: 1.1, 16: 0.6, 8: 0.59}])
    lost = [{32: 0.0, 24: 1.0, 16: 2.0, 8: 3.0}]
    assert choose(cost, lost, 0.99) == [16]
    assert choose(cost, lost, 0.595) == [8]
