"""The comparison of criteria: what each stage runs, what validation chooses, the paired figures and the page."""

from __future__ import annotations

import pytest

from benchmarks.one_cut import Run, Way, seeded_task
from benchmarks.prune_page import page, paired
from benchmarks.prune_plan import CONTROL, DEFAULT, PEERS, SEEDS, SPARSITIES, Found, missing, stages
from torchslim.prune import CRITERIA

MACHINE = {"processor": "a processor", "versions": {"torch": "2.0"}}
UNPRUNED = {"side": "unpruned", "macs": 18_400_000, "parameters": 869_000, "val": 94.0, "test": 93.5}


def row(way=DEFAULT, sparsity=0.5, seed=0, val=90.0, test=None, **more):
    return Run(way=way, sparsity=sparsity, seed=seed, epochs=1).key | {
        "version": "v1", "reason": "", "macs_left": 1 - sparsity, "parameters": 400_000, "val_cut": 20.0,
        "val_recalibrated": 60.0, "val": val, "test": val if test is None else test,
    } | more  # fmt: skip


def rows_of(values, seeds=(0,), **more):
    return [
        row(way, sparsity, seed, val, **more)
        for way, val in values.items()
        for sparsity in SPARSITIES
        for seed in seeds
    ]


def run_all(accuracy):
    """Every stage in order, with `accuracy(run)` on validation and a point less on test."""
    rows = [UNPRUNED]
    counts = []
    for stage in stages(1):
        found = Found(rows)
        todo = missing(stage(found), found)
        counts.append(len(todo))
        rows += [row(each.way, each.sparsity, each.seed, accuracy(each), accuracy(each) - 1) for each in todo]
        again = Found(rows)
        assert missing(stage(again), again) == []
    return rows, counts


def accuracy(run):
    order = {"random": 99, "lamp": 92, "taylor": 91, "fpgm": 90}
    value = order.get(run.way.criterion, 85) if run.way.side == "ours" else 90
    options = (run.way.normalization == "max") * 0.5 + (run.way.reduction == "sum") * 0.25
    return value + options + 0.1 * run.seed - 2 * run.sparsity


def test_the_stages_follow_validation_and_never_the_control():
    rows, counts = run_all(accuracy)
    found = Found(rows)
    assert counts == [
        2 * (len(CRITERIA) + 2),  # all, and the peer's
        2 * 3 * 2,  # three more normalizations of the best two
        2 * 3,  # three more reductions of the best of those
        2 * 4 * 5 + 2 * 2 * 5,  # four more seeds of the best three and the peer's two, all five of blocks
        2 * 5,  # the best, reconstructed
    ]
    best = Way(criterion="lamp", normalization="max", reduction="sum")
    assert found.leaders() == [Way(criterion=name) for name in ("lamp", "taylor", "fpgm")]
    assert found.contestants() == [best, Way(criterion="taylor", normalization="max"), Way(criterion="fpgm")]
    assert found.chosen() == best
    assert CONTROL in CRITERIA


def test_test_accuracy_selects_nothing():
    a, b = Way(criterion="lamp"), Way(criterion="l1")
    found = Found([*rows_of({a: 91}, test=10), *rows_of({b: 90}, test=99)])
    assert found.contestants() == [a, b]


def test_a_run_that_failed_is_neither_ranked_nor_run_again():
    failed = row(Way(criterion="apoz"), reason="PruneError: no")
    found = Found([failed])
    assert found.leaders() == []
    assert missing([Run(way=Way(criterion="apoz"), sparsity=0.5, seed=0, epochs=1)], found) == []
    assert "| `apoz` | PruneError: no |" in page([failed], MACHINE)


def test_rows_of_another_number_of_epochs_do_not_mix():
    assert Found([row() | {"epochs": 2}]).rows == {}
    assert len(Found([row() | {"epochs": 2}], epochs=2).rows) == 1


def test_the_interval_is_that_of_paired_differences():
    difference, half = paired([3.0, 4.0, 5.0, 6.0, 8.0], [2.0, 2.0, 2.0, 2.0, 3.0])
    assert difference == pytest.approx(3.0)
    assert half == pytest.approx(2.776 * (2.5 / 5) ** 0.5)  # variance of 1, 2, 3, 4, 5


def test_the_page_of_a_finished_comparison():
    text = page(run_all(accuracy)[0], MACHINE)
    assert "18.40 M MACs, 869 k parameters, 94.00 % on validation and 93.50 % on test" in text
    assert "| `lamp` | 50.0 % | 400 k | 20.00 | 60.00 | 91.00 | 90.00 |" in text
    assert "| `lamp` | max | sum | 60.00 | 60.00 | 91.75 | 91.25 | 91.50 |" in text
    assert (
        "| `lamp`, max, sum | 50.0-50.0 % | 400 k | 20.00 +- 0.00 | 60.00 +- 0.00 | 91.95 +- 0.16 | 90.95 +- 0.16 | +2.75 [+2.75, +2.75] |"
        in text
    )
    assert "| `lamp`, max, sum, reconstructed | 50.0-50.0 % |" in text
    assert "Best on validation of those that ran with every seed: `lamp`, max, sum, 91.70 %" in text
    assert "With seed 0: 91.50 %, and the library's default, `lamp`, mean, mean, 90.75 %." in text
    assert "**met** (+2.75 at 2x fewer MACs, +2.75 at 4x fewer MACs)" in text
    for table in text.split("\n\n"):
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1


def test_the_bar_is_held_against_the_better_of_the_peers_at_each_target():
    ours = rows_of({DEFAULT: 90}, SEEDS)
    peers = [*rows_of({PEERS[0]: 89}, SEEDS), *rows_of({PEERS[1]: 91}, SEEDS)]
    text = page([*ours, *peers], MACHINE)
    assert "paired with Torch-Pruning `taylor`" in text
    assert "**not met** (-1.00 at 2x fewer MACs, -1.00 at 4x fewer MACs)" in text


def test_an_unfinished_page_says_so():
    text = page(rows_of({DEFAULT: 90}), MACHINE)
    assert "Unpruned: not measured." in text
    assert "Not all seeds have been run." in text


@pytest.mark.slow
def test_a_seed_draws_its_own_calibration_from_train():
    first, again, other = (next(iter(seeded_task(seed).calibration)) for seed in (0, 0, 1))
    assert first[0].equal(again[0])
    assert not first[0].equal(other[0])
