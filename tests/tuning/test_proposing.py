"""The proposals of a solved search on a model that is simulated: its costs and its drops are formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchslim.allocation.problem import Decision, Problem, Term
from torchslim.analysis.damage import DamageTable, plain_law
from torchslim.tuning.pareto import volume
from torchslim.tuning.proposing import BEYOND, ORIGINAL, Proposer, Seen, Tables

WIDTHS = (32, 24, 16, 8)
LAYERS = 6
WORK = np.array([4.0, 1.0, 2.0, 1.0, 3.0, 1.0])
PAIN = np.array([0.1, 0.4, 0.2, 1.0, 0.1, 0.5])  # of removing all of a layer


def tables(bias: float = 1.0) -> Tables:
    """Widths in a row, each with a scheme; `bias` is the time that the tables do not see."""
    removed = np.array([1 - width / WIDTHS[0] for width in WIDTHS])
    widths = tuple(Decision(name=f"width {n}", options=WIDTHS) for n in range(LAYERS))
    schemes = tuple(Decision(name=f"scheme {n}", options=("float", "int8")) for n in range(LAYERS))
    singles = [PAIN[n] * removed**2 for n in range(LAYERS)] + [np.array([0.0, 0.005])] * LAYERS
    latency = []
    for n in range(LAYERS):
        before = (n - 1,) if n else ()
        shape = np.multiply.outer(1 - removed, 1 - removed) if n else 1 - removed
        values = WORK[n] / bias * np.multiply.outer(shape, np.array([1.0, 0.4]))
        latency.append(Term(decisions=(*before, n, LAYERS + n), values=values))
    damage = DamageTable(decisions=(*widths, *schemes), singles=tuple(singles))
    law = plain_law(damage)
    problem = Problem(decisions=damage.decisions, damage=damage.terms(law), costs={"latency": tuple(latency)})
    return Tables(problem=problem, damage=damage, law=law, cost="latency")


def train(
    proposer: Proposer, count: int, cliff: float = 0.0, unit: float = 1.0, untrained: int = 0, fee: float = 0.0
) -> list[Seen]:
    """Recipes that were proposed one after the other and measured: the drop is half of the damage, in points.

    Recipes that cost less than `cliff` lose five points more, which no table shows. `unit` is that of the metric. The
    last `untrained` recipes do not train: they keep half of the damage of the trained one before them, and add all of
    their own. Every training loses the `fee`.
    """
    truth = tables()
    seen: list[Seen] = []
    for number in range(count + 1 + untrained):
        proposal = proposer.propose(seen, max(count - number, 0))
        if proposal is None or not (proposal.train or untrained):
            break
        assert proposal.train == (number == 0 or number < count)
        places = proposal.solution.places
        assert places not in {each.places for each in seen}
        parents = [each for each in seen if each.number == proposal.after]
        assert proposal.after == ORIGINAL or parents
        assert all(parent.trains for parent in parents)
        for parent in parents:  # what the recipe before has removed does not come back
            assert all(a >= b for a, b in zip(places[:LAYERS], parent.places[:LAYERS], strict=True))
        damage = truth.damage.predicted(places, truth.law)
        cost = truth.problem.total(truth.problem.costs["latency"], places)
        trains = any(places[:LAYERS]) and proposal.train
        before = [truth.damage.predicted(parent.places, truth.law) for parent in parents] or [0.0]
        lasting = 0.5 * damage if proposal.train else 0.5 * before[0] + damage - before[0]
        drop = unit * (lasting + 5.0 * (cost < cliff)) + fee * (trains or bool(parents))
        after = proposal.after
        seen.append(Seen(number=number, places=places, cost=cost, drop=drop, trains=trains, after=after))
    return seen


def test_the_first_recipe_only_quantizes() -> None:
    first = train(Proposer(tables()), 0)[0]
    assert first.places == (0,) * LAYERS + (1,) * LAYERS


def test_a_chain_goes_down_and_the_gaps_are_filled() -> None:
    seen = train(Proposer(tables(), wanted_drop=0.5), 8)
    assert len(seen) >= 7
    costs = [each.cost for each in seen]
    assert min(costs) < 0.5 * costs[0]
    assert max(each.drop or 0 for each in seen) < 2.0


@pytest.mark.slow
@settings(max_examples=8)
@given(cliff=st.floats(1.5, 4.5), count=st.integers(5, 8))
def test_a_step_that_lost_too_much_is_followed_by_recipes_in_its_gap(cliff: float, count: int) -> None:
    seen = train(Proposer(tables(), wanted_drop=0.5), count, cliff)
    too_far = next(number for number, each in enumerate(seen) if (each.drop or 0.0) > BEYOND * 0.5)
    kept = min(each.cost for each in seen[:too_far])
    assert too_far < count - 1
    assert seen[too_far].cost < seen[too_far + 1].cost < kept


def test_a_gap_is_filled_only_if_it_is_larger_than_noise() -> None:
    proposer = Proposer(tables(), wanted_cost=3.3)
    *earlier, last = train(proposer, 2)
    assert proposer.propose([*earlier, replace(last, drop=0.04)], 5) is None
    between = proposer.propose([*earlier, replace(last, drop=0.4)], 5)
    assert between is not None
    assert last.cost < between.cost < earlier[-1].cost


def test_the_unit_of_the_metric_does_not_matter() -> None:
    percent = train(Proposer(tables(), wanted_drop=0.5), 6)
    fraction = train(Proposer(tables(), wanted_drop=0.005, metric=1.0), 6, unit=0.01)
    assert [each.places for each in fraction] == [each.places for each in percent]


def test_solving_beats_uniform_widths() -> None:
    seen = train(Proposer(tables(), wanted_drop=0.5), 8)
    truth = tables()
    uniform = []
    for place in range(len(WIDTHS)):
        places = (place,) * LAYERS + (1,) * LAYERS
        cost = truth.problem.total(truth.problem.costs["latency"], places)
        uniform.append((0.5 * truth.damage.predicted(places, truth.law), cost))
    full = float(WORK.sum())
    covered = volume([(each.drop or 0.0, each.cost) for each in seen], (0.5, full))
    assert covered > 1.05 * volume(uniform, (0.5, full))


def test_a_bound_of_the_cost_is_reached_although_the_tables_are_wrong() -> None:
    bound = 1.5
    seen = train(Proposer(tables(bias=1.2), wanted_cost=bound), 8)
    assert min(each.cost for each in seen) <= bound * 1.02


def test_expected_drops_come_near_once_some_were_measured() -> None:
    proposer = Proposer(tables(), wanted_drop=0.5)
    seen = train(proposer, 6)
    errors = [proposer.expected(each.places, seen) / (each.drop or 1.0) for each in seen if each.trains]
    assert np.median(np.abs(np.log(errors))) < np.log(1.5)
    assert np.isnan(proposer.expected(seen[0].places, []))


def test_measured_costs_correct_predicted_ones() -> None:
    proposer = Proposer(tables())
    places = (1,) * LAYERS + (1,) * LAYERS
    predicted = proposer.predicted(places)
    seen = [Seen(number=0, places=places, cost=1.3 * predicted, drop=0.1)]
    assert proposer.corrected(predicted, seen) == pytest.approx(1.3 * predicted)
    assert proposer.corrected(predicted, []) == predicted


def test_what_every_training_loses_does_not_end_the_chain() -> None:
    """A law without an offset took the first recipe's loss for that of its small cut, and stopped there."""
    seen = train(Proposer(tables(), wanted_drop=0.7), 6, fee=0.5)
    assert min(each.cost for each in seen) < 0.6 * seen[1].cost


def test_small_cuts_without_training_fill_the_gaps_at_the_end() -> None:
    few, more = (train(Proposer(tables(), wanted_drop=5.0), 4, unit=10.0, untrained=count) for count in (0, 12))
    assert more[: len(few)] == few
    assert len(more) > len(few)
    full = float(WORK.sum())
    covered = [volume([(each.drop or 0.0, each.cost) for each in seen], (5.0, full)) for seen in (few, more)]
    assert covered[1] > 1.01 * covered[0]


def test_cuts_without_training_end_when_the_gaps_are_small() -> None:
    seen = train(Proposer(tables(), wanted_drop=5.0), 3, unit=10.0, untrained=500)
    assert len(seen) < 100


def test_nothing_is_proposed_without_a_gap() -> None:
    single = tables()
    fixed = replace(
        single,
        problem=Problem(
            decisions=(Decision(name="width 0", options=(8,)),),
            damage=(),
            costs={"latency": (Term(decisions=(0,), values=np.array([1.0])),)},
        ),
        damage=DamageTable(decisions=(Decision(name="width 0", options=(8,)),), singles=(np.zeros(1),)),
        law=plain_law(DamageTable(decisions=(Decision(name="width 0", options=(8,)),), singles=(np.zeros(1),))),
    )
    assert Proposer(fixed).propose([], 5) is None


def test_equal_measurements_give_equal_proposals() -> None:
    runs = [train(Proposer(tables(), wanted_drop=0.5), 6) for _ in range(2)]
    assert runs[0] == runs[1]
