"""A study that workers share: every trial is taken once, a dead worker's is taken over, and resuming changes nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.postgres import database
from tests.support.search_worker import answer, ledger, work
from torchslim.errors import RecipeError, StorageError
from torchslim.tuning.storage import open_storage
from torchslim.tuning.study import Design, Ledger

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """What workers share, in each of its kinds."""
    if request.param == "postgresql":
        with database() as url:
            yield url
    else:
        yield str(tmp_path / "study.journal") if request.param == "journal" else f"sqlite:///{tmp_path / 'study.db'}"


def start(storage: str, trials: int, seconds: float, *options: str) -> subprocess.Popen[str]:
    """A worker in a process of its own."""
    command = [sys.executable, "-m", "tests.support.search_worker", storage, str(trials), str(seconds), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def outcomes(book: Ledger) -> list[Any]:
    """What was tried, in order."""
    return [values for _, values, _ in book.results()]


@pytest.mark.slow
def test_two_workers_share_the_trials(storage: str) -> None:
    open_storage(storage)  # two that make a database's tables at once get in each other's way
    workers = [start(storage, 8, 0.2) for _ in range(2)]
    assert [each.wait(timeout=120) for each in workers] == [0, 0]
    counts = [len((each.stdout or iter(())).read().split("\n")) - 1 for each in workers]  # type: ignore[union-attr]
    book = ledger(open_storage(storage), 8)
    assert len(book.results()) == 8
    assert all(count > 0 for count in counts)
    assert not book.waiting()


@pytest.mark.slow
def test_a_killed_workers_trial_is_taken_over_with_its_values(storage: str) -> None:
    open_storage(storage)
    victim = start(storage, 4, 0.0, "--hang")
    assert victim.stdout is not None
    assert victim.stdout.readline() == "at 0\n"
    book = ledger(open_storage(storage), 4)
    assert book.waiting()
    lost = dict(book.study.trials[0].params)
    victim.send_signal(signal.SIGKILL)
    victim.wait(timeout=30)
    assert work(book) == 4
    assert len(book.results()) == 4
    assert [dict(trial.params) for trial in book.study.trials if "instead_of" in trial.user_attrs] == [lost]


@pytest.mark.slow
def test_a_worker_of_another_machine_is_dead_when_its_beats_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["torchslim.tuning.study"], "GRACE_BEATS", 2)
    storage = open_storage(tmp_path / "study")
    far = ledger(storage, 2)
    far.worker = {**far.worker, "host": "elsewhere"}
    trial = far.ask()
    near = ledger(storage, 2)
    with far.beating(trial):
        for _ in range(8):
            near.take_back()
            time.sleep(0.1)
        assert near.waiting()
        assert len(near.study.trials) == 1
    assert work(near) == 2  # waits for the grace, then takes over
    assert len(near.results()) == 2


def test_a_worker_that_dies_as_it_takes_a_trial_loses_no_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["torchslim.tuning.study"], "GRACE_BEATS", 1)
    book = ledger(open_storage(tmp_path / "study"), 2)
    values = {"x": 0.25, "kind": {"do": "b"}}
    book.queue(values)
    book.study.ask()  # and before it says who it is, it is killed
    assert book.size() == 1
    while not book.queued():
        time.sleep(0.1)
    assert book.values(book.ask(drawn=False)) == values


def test_values_of_lost_trials_stay_known(tmp_path: Path) -> None:
    book = ledger(open_storage(tmp_path / "study"), 2)
    trial = book.ask()
    values = book.values(trial)
    book.give_back(trial)
    assert (book.known_values(), book.known_values(lost=True)) == ({}, {0: values})
    assert book.size() == 2  # it waits to be given again


def test_who_is_taken_for_dead_and_is_not_goes_on(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "study")
    slow, quick = ledger(storage, 2), ledger(storage, 2)
    trial = slow.ask()
    with slow.beating(trial):
        quick.give_back(trial)  # as one would whose clock ran on while the other slept
        time.sleep(0.5)
    slow.tell(trial, {"state": "candidate"}, answer(slow.values(trial)))
    assert quick.results() == []
    assert work(slow) == 2
    assert len(quick.results()) == 2


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_as_an_undisturbed_one(tmp_path: Path) -> None:
    whole = ledger(open_storage(tmp_path / "whole"), 14, seed=3)
    work(whole)
    part = ledger(open_storage(tmp_path / "part"), 14, seed=3)
    for number in range(9):
        trial = part.ask()
        if number == 5:
            part.worker = {**part.worker, "pid": 2**22 + 1}  # this one dies at its work
            part.give_back(trial)
            continue
        values = part.values(trial)
        part.tell(trial, {"state": "candidate"}, answer(values))
    again = ledger(open_storage(tmp_path / "part"), 14, seed=3)
    work(again)
    assert outcomes(again) == outcomes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_equal_seeds_give_equal_trials_and_others_do_not(tmp_path: Path, sampler: Any) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        book = ledger(open_storage(tmp_path / name), 6, seed=seed, sampler=sampler)
        work(book)
        found.append(outcomes(book))
    assert found[0] == found[1] != found[2]


def test_starts_are_tried_first_and_failures_count(tmp_path: Path) -> None:
    book = ledger(open_storage(tmp_path / "study"), 3)
    book.enqueue([{"x": 0.25, "kind": {"do": "b"}}, {"x": 0.5, "kind": "a"}])
    book.enqueue([{"x": 0.75, "kind": "a"}])  # somebody has begun
    first, second, third = (book.ask() for _ in range(3))
    assert [book.values(each) for each in (first, second)] == [
        {"x": 0.25, "kind": {"do": "b"}}, {"x": 0.5, "kind": "a"}
    ]  # fmt: skip
    assert book.ask() is None
    book.tell(first, {"state": "failed", "reason": "no"}, None)
    book.tell(second, {"state": "candidate"}, [0.0, 0.0])
    book.tell(third, {"state": "candidate"}, [0.0, 0.0])
    assert book.ask() is None
    assert len(book.results()) == 3


@pytest.mark.slow
def test_enqueued_trials_are_taken_and_none_is_drawn(tmp_path: Path) -> None:
    book = ledger(open_storage(tmp_path / "study"), 3)
    assert book.ask(drawn=False) is None
    assert not book.queued()
    values = {"x": 0.25, "kind": {"do": "b"}}
    book.queue(values)
    assert book.queued()
    trial = book.ask(drawn=False)
    assert book.values(trial) == values
    assert (book.queued(), book.count(), book.known_values()) == (False, 1, {trial.number: values})
    assert book.ask(drawn=False) is None
    book.tell(trial, {"state": "candidate"}, answer(values))
    assert (book.count(), book.known_values()) == (1, {trial.number: values})


def test_after_a_repeat_it_looks_elsewhere(tmp_path: Path) -> None:
    book = ledger(open_storage(tmp_path / "study"), 12, seed=5, bounds=1)
    best = {"x": 0.0, "kind": {"do": "b"}}
    book.enqueue([best])
    drawn = []
    for _ in range(60):  # the sampler is told that one place is best, and that all near it are the same
        trial = book.ask()
        values = book.values(trial)
        same = values["x"] < 0.5 and values != best
        drawn.append(values["x"])
        result = {"state": "candidate", "bad": {"x": values["x"] - 0.7}} | ({"same_as": 0} if same else {})
        book.tell(trial, result, None if same else answer(values))
        if len(book.results()) == 12:
            break
    assert len(book.results()) == 12
    assert book.repeats() < 12


@pytest.mark.slow
def test_few_trials_are_enough_to_find_what_keeps_a_bound(tmp_path: Path) -> None:
    book = ledger(open_storage(tmp_path / "study"), 16, seed=2, bounds=1)
    while (trial := book.ask()) is not None:
        values = book.values(trial)
        away = abs(values["x"] - 0.31) + (values["kind"] == "a")
        book.tell(trial, {"state": "candidate", "bad": {"away": away - 0.05}}, [away, values["x"]])
    late = [values for _, values, _ in book.results()[8:]]
    assert sum(abs(values["x"] - 0.31) < 0.05 and values["kind"] != "a" for values in late) >= 4


def test_starts_that_are_too_many_are_not_waited_for(tmp_path: Path) -> None:
    book = ledger(open_storage(tmp_path / "study"), 1)
    book.enqueue([{"x": each, "kind": "a"} for each in (0.25, 0.5, 0.75)])
    assert work(book) == 1
    assert not book.waiting()


def test_what_is_claimed_is_claimed_once_until_its_worker_dies(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "study")
    one, two = (Ledger(storage, "finals", "key", Design(objectives=1, trials=10**9), beat=0.2) for _ in range(2))
    claim = one.claim({"trial": 7})
    assert two.claim({"trial": 7}) is None
    assert two.claims() == {7: None}
    one.give_back(claim)
    assert two.claims() == {}
    claim = two.claim({"trial": 7})
    two.tell(claim, {"state": "measured", "trial": 7}, [0.0])
    assert one.claims() == {7: {"state": "measured", "trial": 7}}
    assert one.claim({"trial": 7}) is None


def test_a_study_of_another_recipe_is_refused(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "study")
    ledger(storage, 3)
    with pytest.raises(RecipeError, match="belongs to another recipe"):
        Ledger(storage, "study", "other", Design(objectives=2, trials=3))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+psycopg://somebody:secret@/none?host=/nowhere/at/all", "cannot be reached"),
        ("sqlite:////nowhere/at/all/study.db", "cannot be reached"),
        ("mystery://host/db", "cannot be reached"),
        ("mysql://host/db", "driver.*mysql://host/db.*missing"),
    ],
)
def test_a_storage_that_cannot_be_reached_is_told_without_its_password(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        open_storage(url)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study").write_text("not a journal\n")
    with pytest.raises(StorageError, match="cannot be opened"):
        open_storage(tmp_path / "study")


def test_a_search_leaves_optunas_logging_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    work(ledger(open_storage(tmp_path / "study"), 2))
    assert optuna.logging.get_verbosity() == before
    assert "Trial" not in capfd.readouterr().err
