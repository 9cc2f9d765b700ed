"""Damage tables interpolate measured points, and laws of addition recover known weights and powers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchslim.allocation.problem import Decision, Problem
from torchslim.analysis.damage import DamageTable, damage_table, fitted, plain_law
from torchslim.analysis.result import Point, Sensitivity

DECISIONS = (
    Decision(name="width conv1.weight[0]", options=(16, 12, 8, 4, 2)),
    Decision(name="width conv2.weight[0]", options=(8, 4)),
    Decision(name="scheme conv1", options=("float", "int8", "int4-weights")),
    Decision(name="block layer1", options=("keep", "drop")),
)


def analysis(points: list[Point], measure: str = "kl") -> Sensitivity:
    return Sensitivity(
        model="net",
        measure=measure,  # type: ignore[arg-type]
        unit="nats",
        higher_is_better=measure == "sqnr",
        reference=None if measure == "sqnr" else 0.0,
        runtime="onnxruntime",
        points=tuple(points),
    )


def channels(name: str, amount: float, value: float | None) -> Point:
    return Point(name=name, kind="channels", change=f"{100 * amount:g} %", amount=amount, value=value)


def test_widths_between_measured_amounts_are_interpolated() -> None:
    points = [channels("conv1.weight[0]", 0.25, 1.0), channels("conv1.weight[0]", 0.75, 3.0)]
    table = damage_table(DECISIONS[:1], [analysis(points)])
    assert table.singles[0] == pytest.approx([0.0, 1.0, 2.0, 3.0, 3.0 * 0.875 / 0.75])


def test_damage_never_falls_where_more_is_removed() -> None:
    points = [channels("conv1.weight[0]", amount, value) for amount, value in ((0.25, 2.0), (0.5, 1.0), (0.75, 5.0))]
    assert (np.diff(damage_table(DECISIONS[:1], [analysis(points)]).singles[0]) >= 0).all()


def test_schemes_blocks_and_unmeasured_groups() -> None:
    points = [
        Point(name="conv1", kind="layer", change="int8", value=0.5),
        Point(name="conv1", kind="layer", change="int4-weights", refused="no kernel"),
    ]
    table = damage_table(DECISIONS, [analysis(points)], {"layer1": 4.0})
    assert table.singles[2] == pytest.approx([0.0, 0.5, 4.0])  # not measured: as the worst
    assert table.singles[3] == pytest.approx([0.0, 4.0])
    assert table.singles[0] == pytest.approx([4.0 * removed for removed in (0, 0.25, 0.5, 0.75, 0.875)])


def test_decibels_become_noise_over_signal() -> None:
    point = Point(name="conv1", kind="layer", change="int8", value=20.0)
    assert damage_table(DECISIONS[2:3], [analysis([point], "sqnr")]).singles[0][1] == pytest.approx(0.01)


@st.composite
def tables(draw: st.DrawFn) -> DamageTable:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    singles = tuple(
        np.concatenate([[0.0], np.cumsum(generator.uniform(0.01, 1, len(decision.options) - 1))])
        for decision in DECISIONS
    )
    return DamageTable(decisions=DECISIONS, singles=singles)


def choices(table: DamageTable, count: int, seed: int) -> list[tuple[int, ...]]:
    generator = np.random.default_rng(seed)
    drawn = [tuple(int(generator.integers(len(d.options))) for d in table.decisions) for _ in range(count)]
    return [choice for choice in drawn if any(choice)]


@settings(max_examples=20, deadline=None)
@given(tables(), st.sampled_from((0.5, 1.0, 2.0)), st.integers(0, 1000))
def test_a_law_is_recovered_from_its_own_damages(table: DamageTable, power: float, seed: int) -> None:
    weights = np.random.default_rng(seed).uniform(0.5, 2, 3)
    seen = choices(table, 60, seed)
    damages = [float((table.sums(choice, power) @ weights) ** (1 / power)) for choice in seen]
    law = fitted(table, seen, damages)
    assert law.error < 1.05
    assert [table.predicted(choice, law) for choice in seen] == pytest.approx(damages, rel=0.3)


@settings(max_examples=20, deadline=None)
@given(tables())
def test_the_terms_rank_choices_as_the_law_does(table: DamageTable) -> None:
    seen = choices(table, 12, 1)
    law = fitted(table, seen, [sum(table.sums(choice, 1.0)) for choice in seen])
    problem = Problem(decisions=table.decisions, damage=table.terms(law))
    totals = [problem.total(problem.damage, choice) for choice in seen]
    predicted = [table.predicted(choice, law) for choice in seen]
    assert np.argsort(totals, kind="stable").tolist() == np.argsort(predicted, kind="stable").tolist()


def test_training_that_repairs_widths_but_not_blocks_changes_their_weights() -> None:
    table = DamageTable(
        decisions=DECISIONS[:2] + DECISIONS[3:],
        singles=(np.array([0, 1.0, 2, 3, 4]), np.array([0, 1.0]), np.array([0, 2.0])),
    )
    seen = [(2, 0, 0), (4, 1, 0), (1, 0, 1), (3, 1, 1), (0, 0, 1)]
    drops = [0.1 * (a + b) + 2.0 * c for a, b, c in [(2, 0, 0), (4, 1, 0), (1, 0, 1), (3, 1, 1), (0, 0, 1)]]
    law = fitted(table, seen, drops, prior=plain_law(table))
    equal = dict(zip(table.kinds, table.sums((2, 0, 1), law.power) * np.array(law.weights), strict=True))
    assert equal["block"] > 3 * equal["width"]  # both have a damage of 2 before training


def test_without_measurements_the_prior_stays() -> None:
    table = DamageTable(decisions=DECISIONS[3:], singles=(np.array([0, 2.0]),))
    assert fitted(table, [], []) == plain_law(table)
    prior = fitted(table, [(1,)], [2.0])
    assert fitted(table, [], [], prior=prior) == prior
