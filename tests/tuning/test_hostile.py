"""A shared study holds whatever another worker wrote: nothing of it runs, and only values within their ranges count."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from tests.mutations.studies import BUDGET, ENTRY, FIGURES, TRIALS
from tests.support.search_worker import PARAMETERS, answer, ledger, work
from torchslim.errors import RecipeError, StorageError
from torchslim.tuning.shared import Unusable, read_row
from torchslim.tuning.storage import hushed, open_storage
from torchslim.tuning.study import Design, Ledger


@pytest.fixture(params=["journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return open_storage(tmp_path / "study" if request.param == "journal" else f"sqlite:///{tmp_path / 'study.db'}")


def theirs(storage: Any, name: str = "study") -> Any:
    """The study as any program with Optuna sees it."""
    return optuna.load_study(study_name=name, storage=storage)


def add(storage: Any, params: dict[str, Any], result: Any, distributions: Any) -> None:
    """A finished trial that no worker of this search has drawn."""
    with hushed():
        theirs(storage).add_trial(
            optuna.trial.create_trial(
                params=params, distributions=distributions, values=[0.0, 0.0], user_attrs={"result": result}
            )
        )


EVIL = json.dumps({"do": "os:system", "command": "touch pwned"})
FLOAT, WIDE = (optuna.distributions.FloatDistribution(0.0, high) for high in (1.0, 1e9))
PLACE = optuna.distributions.CategoricalDistribution([0, 1])
CODE = optuna.distributions.CategoricalDistribution([EVIL, "os:system"])
GOOD = json.dumps({"state": "candidate", "stage": "short", "figures": FIGURES})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "result", "distributions"),
    [
        ({"x": 1e8, "kind": 0}, GOOD, {"x": WIDE, "kind": PLACE}),
        ({"x": 0.5, "kind": EVIL}, GOOD, {"x": FLOAT, "kind": CODE}),
        ({"x": 0.5}, GOOD, {"x": FLOAT}),
        ({"x": 0.5, "kind": 0}, "[" * 5_000, {"x": FLOAT, "kind": PLACE}),
        ({"x": 0.5, "kind": 0}, {"state": "candidate"}, {"x": FLOAT, "kind": PLACE}),
        ({"x": 0.5, "kind": 0}, '{"state": "candidate", "figures": {"latency": 1e999}}', {"x": FLOAT, "kind": PLACE}),
        ({"x": 0.5, "kind": 0}, '{"state": "candidate", "figures": {"../../x": 1}}', {"x": FLOAT, "kind": PLACE}),
        ({"x": 0.5, "kind": 0}, '{"state": "measured", "trial": "../../x"}', {"x": FLOAT, "kind": PLACE}),
    ],
)
def test_a_trial_that_does_not_fit_is_ignored_with_a_warning(
    storage: Any, params: Any, result: Any, distributions: Any
) -> None:
    book = ledger(storage, 2)
    add(storage, params, result, distributions)
    with pytest.warns(UserWarning, match="trial 0.*'study'.*ignored"):
        assert book.results() == []


@pytest.mark.parametrize(
    "queued", [{"x": 7.0, "kind": 0}, {"x": 0.5, "kind": EVIL}, {"x": "0.5", "kind": 0}, {"x": 0.5, "kind": True}]
)
def test_values_that_another_asks_for_are_taken_within_their_ranges_alone(storage: Any, queued: Any) -> None:
    book = ledger(storage, 2)
    with hushed():
        theirs(storage).enqueue_trial(queued)
        theirs(storage).enqueue_trial({"x": 0.25, "kind": 1})
    with pytest.warns(UserWarning, match="ignored.*parameter"):
        trial = book.ask()
    assert book.values(trial) == {"x": 0.25, "kind": {"do": "b"}}
    book.tell(trial, {"state": "candidate"}, answer(book.values(trial)))
    assert len(book.results()) == 1


def test_a_flood_of_values_that_do_not_fit_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["torchslim.tuning.study"], "REFUSALS", 5)
    storage = open_storage(tmp_path / "study")
    book = ledger(storage, 2)
    with hushed():
        for number in range(6):
            theirs(storage).enqueue_trial({"x": 7.0 + number, "kind": 0})
    with pytest.warns(UserWarning, match="is ignored"), pytest.raises(StorageError, match="beyond.*ranges"):
        book.ask()


@pytest.mark.slow
@pytest.mark.parametrize("attribute", ["constraints", "constraints:x", "fixed_params"])
def test_samplers_never_see_what_others_have_stored(storage: Any, attribute: str) -> None:
    book = ledger(storage, 8, seed=1, bounds=1)
    work_one(book)
    with hushed():
        study = theirs(storage)
        study.add_trial(
            optuna.trial.create_trial(
                params={"x": 0.5, "kind": 1}, distributions={"x": WIDE, "kind": PLACE}, values=[0.0, 0.0],
                system_attrs={attribute: "nonsense"}, user_attrs={"result": json.dumps({"state": "candidate"})},
            )
        )  # fmt: skip
    if attribute == "fixed_params":
        with pytest.warns(UserWarning, match="is ignored"):
            assert work(book) == 7
    else:
        assert work(book) == 6


def work_one(book: Ledger) -> None:
    trial = book.ask()
    book.tell(trial, {"state": "candidate", "bad": {"x": 0.0}}, answer(book.values(trial)))


@pytest.mark.parametrize("worker", [{"host": "a"}, 7, {"host": 1, "pid": "1", "started": []}, {"host": "a", "pid": -1}])
def test_a_worker_that_is_none_is_dead_when_its_beats_stop(tmp_path: Path, worker: Any) -> None:
    storage = open_storage(tmp_path / "study")
    book = ledger(storage, 2)
    trial = book.ask()
    trial.set_user_attr("worker", worker)
    trial.set_user_attr("beat", "x" * 100)
    book.take_back()
    assert book.waiting()


def test_what_follows_from_figures_is_computed_and_not_believed(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "study")
    book = Ledger(storage, "study", "key", Design(objectives=1, trials=9), budget=BUDGET)
    slow = {**ENTRY, "value": 30.0}
    lie = {"state": "measured", "trial": 0, "metric": {"val": ENTRY}, "within": True,
           "figures": {"metric_drop": ENTRY, "latency": slow}, "reason": "\x1b[2J"}  # fmt: skip
    book.tell(book.claim({"trial": 0}), lie, [0.0])
    ((_, _, found),) = book.results()
    assert found["within"] is False
    assert "\x1b" not in found["reason"]


@pytest.mark.parametrize("judged", [0.1, 2, "ab", {"a": 1, "b": 2}, [0.1]])
def test_a_trial_that_is_not_judged_by_numbers_is_unusable(judged: Any) -> None:
    given = TRIALS[0] | {"state": TrialState.COMPLETE, "values": judged}
    given["user_attrs"] = given["user_attrs"] | {"result": json.dumps(given["user_attrs"]["result"])}
    with pytest.raises(Unusable, match="2 objective values"):
        read_row(SimpleNamespace(**given), PARAMETERS, 2, BUDGET)


def test_a_study_with_other_objectives_is_refused(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "study")
    with hushed():
        optuna.create_study(storage=storage, study_name="study", directions=["maximize", "minimize"])
    with pytest.raises(RecipeError, match="belongs to another recipe"):
        ledger(storage, 2)


def test_a_line_that_is_no_operation_is_one_clear_error(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "study")
    book = ledger(storage, 2)
    with (tmp_path / "study").open("a") as file:
        file.write('{"op_code": 99, "worker_id": "a"}\n')
    with pytest.raises(StorageError, match="'study'.*read or written"):
        book.results()
    with pytest.raises(StorageError, match="cannot be opened"):
        open_storage(tmp_path / "study")


def test_no_storage_of_ours_unpickles() -> None:
    from optuna.storages._rdb import models
    from optuna.storages.journal import JournalFileBackend
    from optuna.storages.journal._base import BaseJournalSnapshot
    from sqlalchemy import PickleType

    assert not issubclass(JournalFileBackend, BaseJournalSnapshot)  # only snapshots are pickles
    columns = [column for table in models.BaseModel.metadata.tables.values() for column in table.columns]
    assert columns
    assert not any(isinstance(column.type, PickleType) for column in columns)


@pytest.mark.parametrize("kind", ["int", "float"])
def test_a_number_beyond_any_float_is_unusable(kind: str) -> None:
    parameter = replace(next(each for each in PARAMETERS if each.kind == "float"), kind=kind)
    given = TRIALS[0] | {"state": TrialState.RUNNING, "params": {parameter.name: 10**400}}
    with pytest.raises(Unusable, match="beyond its range"):
        read_row(SimpleNamespace(**given), [parameter], 2, BUDGET)
