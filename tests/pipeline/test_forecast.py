"""The forecast is exact where costs are constant, and the time left follows the pace of the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import torchslim as ts
from tests.support.run_records import make_run
from torchslim.cli.console import forecast_table
from torchslim.core.step import CHOICE_SECONDS
from torchslim.pipeline.forecast import Counts, Forecast, Part, Progress, Timed, TimeLeft, expected
from torchslim.quantize.mixed_precision import fewest, most_choices
from torchslim.report import load_run, table
from torchslim.report.findings import time_words

SECONDS = st.floats(1e-3, 100.0)
NUMBERS = st.integers(1, 50)


@given(SECONDS, SECONDS, SECONDS, NUMBERS, NUMBERS, NUMBERS, st.integers(1, 20))
def test_constant_costs_give_the_exact_time(
    fixed: float, update: float, batch: float, train: int, val: int, test: int, epochs: int
) -> None:
    """A rehearsal of three updates, an evaluation of the epoch, and two that measure the stage, of two batches each."""
    warmup = 7 * update
    timed = Timed(seconds=fixed + 3 * update + 3 * 2 * batch, evaluations=[(2 * batch, 2)] * 3)
    for number in range(3):
        timed.see(ts.Event(step="s", phase="train", values={"epoch": 1}), warmup + number * update)
    part = expected("s", timed, Counts(train=train, val=val, test=test), [epochs], [1])
    training = epochs * (train * update + val * batch)
    assert part.training == pytest.approx(training)
    assert part.seconds == pytest.approx(fixed + training + (val + test) * batch, rel=1e-6, abs=1e-6)


@given(SECONDS, SECONDS, SECONDS, NUMBERS, NUMBERS, st.integers(1, 30))
def test_choices_of_layers_are_forecast_by_their_largest_number(
    fixed: float, choice: float, batch: float, val: int, test: int, most: int
) -> None:
    """A rehearsal of one choice: the metric before it, that of the choice, and two that measure the stage."""
    timed = Timed(seconds=fixed + choice + 4 * 2 * batch, evaluations=[(2 * batch, 2)] * 4)
    seconds = choice + 2 * batch
    timed.see(ts.Event(step="s", phase="choose layers", current=1, total=most, values={CHOICE_SECONDS: seconds}), 1.0)
    part = expected("s", timed, Counts(train=0, val=val, test=test), [], [])
    whole = fixed + most * choice + (1 + most) * val * batch + (val + test) * batch
    assert part.seconds == pytest.approx(whole, rel=1e-6, abs=1e-6)


@given(st.integers(0, 60), st.data())
def test_a_choice_of_layers_takes_no_more_measurements_than_are_forecast(count: int, data: st.DataObject) -> None:
    ranked = [str(number) for number in range(count)]
    harmful = data.draw(st.sets(st.sampled_from(ranked))) if ranked else set()
    measured: list[int] = []

    def drop(left_out: Sequence[str]) -> float:
        measured.append(len(left_out))
        return float(len(harmful - set(left_out)))

    assert fewest(ranked, drop, 0.0).held
    assert len(measured) <= most_choices(count)


@given(SECONDS, SECONDS)
def test_evaluations_that_were_repeated_on_more_batches_are_not_counted(batch: float, retries: float) -> None:
    timed = Timed(seconds=retries + 2 * batch, evaluations=[(2 * batch, 2)], retries=retries)
    part = expected("s", timed, Counts(train=0, val=10, test=0), [], [])
    assert part.seconds == pytest.approx(10 * batch, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("unknown", ["train", "val", "test"])
def test_a_loader_without_a_length_makes_the_time_unknown(unknown: str) -> None:
    counts = Counts(**{"train": 1, "val": 1, "test": 1, unknown: None})
    assert expected("s", Timed(), counts, [1], [1]).seconds is None
    assert "cannot be foreseen" in forecast_table(Forecast(parts=(Part(name="s", seconds=None),), memory_mib=1).event())


STEPS = [ts.Prune(sparsity=0.5), ts.Finetune(epochs=2), ts.Prune(sparsity=0.6), ts.Quantize("int8")]
FORECAST = Forecast(
    parts=(
        Part(name="baseline", seconds=10),
        Part(name="prune", seconds=20),
        Part(name="finetune", seconds=100, training=80),
        Part(name="prune", seconds=20),
        Part(name="quantize", seconds=30),
        Part(name="artifact", seconds=20),
    ),
    memory_mib=100,
)


def events() -> Iterator[tuple[float, ts.Event]]:
    """The events of a run as foreseen, and the seconds that are over."""
    yield 0, ts.Event(step="baseline", phase="deploy")
    yield 10, ts.Event(step="prune", phase="start")
    yield 30, ts.Event(step="finetune", phase="start")
    for current in range(1, 11):
        yield (
            30 + 8 * current,
            ts.Event(step="finetune", phase="train", current=current, total=10, values={"epoch": 1 + current // 6}),
        )
    yield 130, ts.Event(step="prune", phase="start")
    yield 150, ts.Event(step="quantize", phase="start")
    yield 180, ts.Event(step="artifact", phase="evaluate")


@pytest.mark.parametrize("slower", [1.0, 2.0])
def test_the_time_left_is_that_of_the_forecast_and_then_follows_the_pace(
    slower: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("torchslim.pipeline.forecast.time.monotonic", lambda: now[0])
    left, total = TimeLeft(STEPS, FORECAST), FORECAST.seconds or 0.0
    errors = []
    for moment, event in events():
        now[0] = slower * moment
        seconds = left.after(event)
        assert seconds is not None
        errors.append(abs(seconds - slower * (total - moment)) / total)
    assert errors[0] == pytest.approx(slower - 1)
    assert max(errors) == errors[0]
    assert errors[-1] < 0.02


def test_steps_that_an_earlier_run_has_finished_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("torchslim.pipeline.forecast.time.monotonic", lambda: now[0])
    left = TimeLeft(STEPS, FORECAST)
    for step in ("prune", "finetune"):
        left.after(ts.Event(step=step, phase="resumed"))
    assert left.after(ts.Event(step="prune", phase="start")) == pytest.approx(20 + 30 + 20)


def test_events_of_a_run_say_the_seconds_left_and_others_are_unchanged() -> None:
    seen: list[ts.Event] = []
    show = Progress(seen.append, STEPS, FORECAST)
    stranger = ts.Event(step="folder", phase="another process waits")
    for event in (ts.Event(step="baseline", phase="deploy"), stranger):
        show(event)
    assert seen[0].values["seconds_left"] == pytest.approx(200, abs=1)
    assert seen[1] is stranger


def test_a_forecast_is_read_as_it_was_stored_and_shown_with_every_part() -> None:
    assert Forecast.of(FORECAST.to_dict()) == FORECAST
    shown = forecast_table(FORECAST.event())
    for text in ("baseline", "1 prune", "2 finetune", "3 prune", "4 quantize", "artifact", "total", "100 MiB"):
        assert text in shown


def test_the_report_compares_the_forecast_with_the_time_that_each_part_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("torchslim.pipeline.forecast.time.monotonic", lambda: now[0])
    progress = Progress(lambda event: None, STEPS, FORECAST)
    for moment, event in events():
        now[0] = moment
        progress(replace(event, phase="resumed") if event.step == "quantize" else event)
    now[0] = 200
    parts = progress.report()["forecast"]["parts"]
    assert [part.get("took") for part in parts] == [10, 20, 100, 20, None, 20]
    assert Progress(print, STEPS, None).report() == {}
    (tmp_path / "run.json").write_text(json.dumps({**make_run(), **progress.report()}))
    run = load_run(tmp_path / "run.json")
    for text in ("3 min (3 min): ", "baseline 10 s (10 s)", "finetune 2 min (2 min)"):
        assert text in time_words(run)
    assert "quantize" not in time_words(run), "it was finished before"
    assert time_words(run) in table(run)
    assert time_words(make_run()) == ""


def test_work_without_events_of_its_own_counts_as_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("torchslim.pipeline.forecast.time.monotonic", lambda: now[0])
    left = TimeLeft(STEPS, FORECAST)
    for moment, event in events():
        now[0] = moment
        left.after(event)
        if event.step == "quantize":
            break
    for passed, expected_left in ((10, 40), (25, 25), (30, 20)):
        now[0] = 150 + passed
        assert left.after(ts.Event(step="quantize", phase="deploy")) == pytest.approx(expected_left)
    now[0] = 150 + 60
    late = left.after(ts.Event(step="quantize", phase="evaluate"))
    assert late is not None
    assert 20 < late < 30, "the artifact is left, and this run is slower than foreseen"
