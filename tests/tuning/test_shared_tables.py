"""Tables that workers share through their storage: equal in each of them, and never more than numbers that fit."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from torchslim.allocation.problem import Decision, Term
from torchslim.analysis.damage import AdditionLaw, DamageTable
from torchslim.errors import RecipeError, StorageError
from torchslim.tuning.shared_tables import (
    COSTS,
    DAMAGE,
    SharedTables,
    costs_from_json,
    costs_to_json,
    damage_from_json,
    damage_to_json,
)
from torchslim.tuning.solved_costs import Costs
from torchslim.tuning.storage import open_storage

DECISIONS = (
    Decision(name="width conv1.weight[0]", options=(8, 4, 2)),
    Decision(name="width conv2.weight[0]", options=(8,)),
    Decision(name="scheme conv1", options=("float", "int8")),
)
TERMS = (
    Term(decisions=(2, 0), values=np.arange(6.0).reshape(2, 3) / 3),
    Term(decisions=(1,), values=np.array([0.1])),
    Term(decisions=(), values=np.array(1e-17)),
)
EMPTY = Costs(decisions=DECISIONS, costs={})
FULL = Costs(decisions=DECISIONS, costs={"latency": TERMS}, spread=1.1)
TABLE = DamageTable(decisions=DECISIONS, singles=(np.array([0.0, 0.1, 1 / 3]), np.array([0.0]), np.array([0.0, 1e-9])))
LAW = AdditionLaw(power=0.5, weights=(1.0, 0.2), outer=0.5, error=1.3, count=10)


def read_costs(content: dict[str, Any]) -> Costs:
    return costs_from_json(content, EMPTY, ["latency"])


def read_damage(content: dict[str, Any]) -> tuple[DamageTable, AdditionLaw]:
    return damage_from_json(content, DECISIONS)


@pytest.fixture(params=["journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return open_storage(tmp_path / "study" if request.param == "journal" else f"sqlite:///{tmp_path / 'study.db'}")


def never() -> Any:
    raise AssertionError("another worker has measured this")


def test_one_measures_and_others_read_the_same_numbers(storage: Any) -> None:
    first, second = (SharedTables(storage, "study", "key") for _ in range(2))
    assert first.once(COSTS, lambda: FULL, costs_to_json, read_costs) is FULL
    assert first.once(DAMAGE, lambda: (TABLE, LAW), damage_to_json, read_damage) == (TABLE, LAW)
    costs = second.once(COSTS, never, costs_to_json, read_costs)
    table, law = second.once(DAMAGE, never, damage_to_json, read_damage)
    assert (costs.decisions, costs.spread, law) == (DECISIONS, FULL.spread, LAW)
    for read, written in zip(costs.costs["latency"], TERMS, strict=True):
        assert read.decisions == written.decisions
        assert np.array_equal(read.values, written.values)
    assert all(map(np.array_equal, table.singles, TABLE.singles))


def test_large_tables_are_stored_in_parts(storage: Any) -> None:
    numbers = np.random.default_rng(0).random(20_000).tolist()
    first, second = (SharedTables(storage, "study", "key") for _ in range(2))
    first.once(COSTS, lambda: numbers, lambda value: {"it": value}, lambda content: content["it"])
    assert second.once(COSTS, never, lambda value: {"it": value}, lambda content: content["it"]) == numbers
    texts = [value for value in second.ledger.study.user_attrs.values() if isinstance(value, str)]
    assert len(texts) > 2
    assert max(map(len, texts)) <= 32_000


def test_a_worker_that_dies_while_it_measures_is_replaced(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "study")
    dead = SharedTables(storage, "study", "key")
    dead.ledger.worker = {**dead.ledger.worker, "pid": 2**22 + 1}
    assert dead.ledger.claim({"trial": COSTS}) is not None
    assert SharedTables(storage, "study", "key").once(COSTS, lambda: FULL, costs_to_json, read_costs) is FULL


def test_an_error_leaves_the_measurement_to_others(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "study")

    def fails() -> Costs:
        raise RecipeError("no")

    with pytest.raises(RecipeError, match="no"):
        SharedTables(storage, "study", "key").once(COSTS, fails, costs_to_json, read_costs)
    assert SharedTables(storage, "study", "key").once(COSTS, lambda: FULL, costs_to_json, read_costs) is FULL


def test_workers_with_other_options_are_refused(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "study")
    SharedTables(storage, "study", "key").agree(DECISIONS)
    SharedTables(storage, "study", "key").agree(DECISIONS)
    with pytest.raises(RecipeError, match="another kind of processor"):
        SharedTables(storage, "study", "key").agree(DECISIONS[:2])


def packed(content: Any) -> str:
    """As it is stored."""
    return base64.b64encode(
        zlib.compress(content if isinstance(content, bytes) else json.dumps(content).encode())
    ).decode()


@pytest.mark.parametrize(
    "attributes",
    [
        {"0": None},
        {"0": 10**9},
        {"0": 2},
        {"0": True},
        {"0.0": "!" * 10},
        {"0.0": {"do": "os:system"}},
        {"0.0": "A" * 40_000},
        {"0.0": packed(b"[" * 100_000)},
        {"0.0": packed(b'{"costs": NaN}')},
        {"0.0": packed([1, 2])},
        {"0.0": base64.b64encode(zlib.compress(b" " * 2**27, 9)).decode()[:32_000]},
    ],
)
def test_texts_that_are_no_tables_are_not_used(tmp_path: Path, attributes: dict[str, Any]) -> None:
    storage = open_storage(tmp_path / "study")
    SharedTables(storage, "study", "key").once(COSTS, lambda: FULL, costs_to_json, read_costs)
    theirs = optuna.load_study(study_name="study/tables", storage=storage)
    for name, value in attributes.items():
        theirs.set_user_attr(name, value)
    with pytest.warns(UserWarning, match="measures its own"):
        assert SharedTables(storage, "study", "key").once(COSTS, lambda: FULL, costs_to_json, read_costs) is FULL


def set_at(path: tuple[Any, ...], value: Any) -> Callable[[Any], None]:
    """Puts a value into the middle of JSON."""

    def put(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return put


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("costs",), []),
        (("costs",), {"latency": [], "size": []}),
        (("costs", "latency"), {}),
        (("costs", "latency", 0), [1]),
        (("costs", "latency", 0, "over"), [2, 2]),
        (("costs", "latency", 0, "over"), [2, 3]),
        (("costs", "latency", 0, "over"), [2, -3]),
        (("costs", "latency", 0, "over"), [True, 2]),
        (("costs", "latency", 0, "values"), [0.0] * 5),
        (("costs", "latency", 0, "values"), [0.0] * 5 + ["0"]),
        (("costs", "latency", 0, "values"), [0.0] * 5 + [1e300]),
        (("spread",), 0.5),
        (("spread",), None),
    ],
)
def test_costs_that_do_not_fit_are_refused(path: tuple[Any, ...], value: Any) -> None:
    content = costs_to_json(FULL)
    set_at(path, value)(content)
    with pytest.raises(StorageError):
        read_costs(content)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("singles",), [[0.0]]),
        (("singles", 0), [0.0, 0.1]),
        (("singles", 0, 1), -1.0),
        (("singles", 0, 0), 0.5),
        (("singles", 2, 1), None),
        (("law",), [1.0, 1.0]),
        (("law", 0), 0.0),
        (("law", 4), -1.0),
    ],
)
def test_damages_that_do_not_fit_are_refused(path: tuple[Any, ...], value: Any) -> None:
    content = damage_to_json((TABLE, LAW))
    set_at(path, value)(content)
    with pytest.raises(StorageError):
        read_damage(content)
