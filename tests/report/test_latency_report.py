"""Predicted against measured, in the table, on the page, and refused where it is damaged."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.run_records import make_run
from torchslim.errors import ArtifactError
from torchslim.report import findings, load_run, render, table


def cut(**changes: Any) -> dict[str, Any]:
    rounds = [
        {"target": 0.4775, "predicted": 0.4712, "measured": 0.5321},
        {"target": 0.43, "predicted": 0.4297, "measured": 0.4811},
    ]
    return {"ceiling": 0.5, "rounds": rounds, "best": 2, "programs": 44, "elsewhere": "", **changes}


def run_with(*cuts: Any) -> dict[str, Any]:
    run: dict[str, Any] = make_run()
    run["rows"][1]["evidence"] = {"latency": list(cuts)}
    return run


def test_the_table_shows_every_round():
    text = table(run_with(cut()))
    assert "times of 44 narrowed programs, taken on this machine" in text
    assert "prune, round 1  at most 0.500  predicted 0.471  measured 0.532  1.06 of the ceiling" in text
    assert "prune, round 2  at most 0.500  predicted 0.430  measured 0.481  0.962 of the ceiling  taken" in text
    assert "predicted" not in table(make_run())


def test_the_page_shows_every_round():
    page = render(run_with(cut()))
    assert "Latency, predicted against measured" in page
    for value in ("0.4712", "0.5321", "0.4297", "0.4811"):
        assert f'data-value="{value}"' in page
    assert "Latency, predicted against measured" not in render(make_run())


def test_what_was_not_measured_says_so():
    rounds = [{"target": 0.4775, "predicted": 0.4712, "measured": None}]
    run = run_with(cut(rounds=rounds, best=1, elsewhere="a <board>"))
    assert "measured -" in table(run)
    assert "taken on a <board>" in table(run)
    page = render(run)
    assert "taken on a &lt;board&gt;" in page
    assert "a <board>" not in page


def test_several_cuts_are_told_apart():
    found = findings.ceilings(run_with(cut(ceiling=0.7), cut()))
    assert [(each.label, each.round, each.chosen) for each in found] == [
        ("prune, cut 1", 1, False), ("prune, cut 1", 2, True), ("prune, cut 2", 1, False), ("prune, cut 2", 2, True),
    ]  # fmt: skip


def test_runs_with_and_without_it_load(tmp_path):
    for run in (run_with(cut()), run_with(), make_run()):
        (tmp_path / "run.json").write_text(json.dumps(run))
        assert load_run(tmp_path) == run


@pytest.mark.parametrize(
    "changes", [{"best": 3}, {"best": 0}, {"ceiling": "half"}, {"rounds": [{"target": 0.5}]}, {"rounds": None}]
)
def test_a_damaged_one_is_refused(tmp_path, changes):
    (tmp_path / "run.json").write_text(json.dumps(run_with(cut(**changes))))
    with pytest.raises(ArtifactError, match=r"rows(\.1\.|\[1\]\.)evidence.*; run again"):
        load_run(tmp_path)


def test_a_choice_of_layers_by_latency_has_a_line_in_the_table_and_on_the_page():
    choice = {"in_float": 17, "layers": 53, "programs": 9, "latency_ms": 5.1, "float_ms": 7.5, "integer_ms": 20.7}
    run = make_run()
    run["rows"][1]["evidence"] = {"faster_in_float": {"": choice, "backbone": choice}}
    (line, part) = findings.choices_by_latency(run)
    assert "17 of 53 layers stay in float" in line
    assert all(figure in line for figure in ("5.10 ms", "20.7 ms", "7.50 ms", "9 programs"))
    assert "part backbone" in part
    assert line in table(run)
    assert "17 of 53 layers stay in float" in render(run)
    assert "layers chosen by latency" not in table(make_run())
