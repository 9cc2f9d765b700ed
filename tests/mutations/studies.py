"""What a hostile worker may write into a shared study: trials as Optuna gives them, and journals."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st
from optuna.trial import TrialState

from tests.mutations.base import Kind, absurd, mutated
from tests.support.search_worker import PARAMETERS, ledger
from torchslim.core.budget import Budget
from torchslim.tuning.shared import Unusable, read_row
from torchslim.tuning.storage import open_storage

BUDGET = Budget(latency_ms=3.0)
FIGURES = {"metric": 90.0, "metric_drop": 0.5, "latency": 2.5}
ENTRY = {"value": 2.5, "unit": "ms", "repeats": 50, "low": 2.4, "high": 2.6, "machine": "this"}
RESULTS: tuple[Any, ...] = (
    {"state": "candidate", "stage": "short", "reason": "", "cheap": FIGURES, "figures": FIGURES, "seconds": 1.5,
     "excess": {"latency": -0.2}, "bad": {"latency": -0.2}},
    {"state": "failed", "stage": "cheap", "reason": "it diverged"},
    {"state": "candidate", "same_as": 0, "figures": FIGURES},
    {"state": "measured", "trial": 3, "figures": dict.fromkeys(FIGURES, ENTRY), "within": True,
     "metric": {"val": ENTRY, "test": {"not_measured": "no test batches"}}},
)  # fmt: skip
TRIALS: list[Any] = [
    {
        "number": number, "state": state, "params": {"x": 0.5, "kind": 1}, "values": [0.1, 0.2],
        "system_attrs": {"fixed_params": {"x": 0.25, "kind": 0}, "constraints": [0.0]},
        "user_attrs": {"result": result, "worker": {"host": "a", "pid": 7, "started": "5"}, "beat": 3, "about": {"trial": 2}},
    }
    for number, state in enumerate(("COMPLETE", "RUNNING", "FAIL", "WAITING"))
    for result in RESULTS
]  # fmt: skip
VALUES = absurd(
    {"do": "os:system", "command": "false"}, "candidate", "measured", "COMPLETE", [0.1, 0.2], {"x": 0.5, "kind": 0}
)


def read(document: Any) -> object:
    """As a worker reads a trial of another."""
    if not isinstance(document, dict):
        return None
    given = {**TRIALS[0], **document}
    attributes = given["user_attrs"]
    if isinstance(attributes, dict) and isinstance(attributes.get("result"), dict):
        try:
            attributes = attributes | {"result": json.dumps(attributes["result"], default=str)}
        except (ValueError, RecursionError):  # what JSON cannot hold nobody can have stored
            return None
    trial = SimpleNamespace(**{key: given[key] for key in ("number", "params", "values", "system_attrs")})
    trial.state = TrialState[given["state"]] if given["state"] in TrialState.__members__ else TrialState.FAIL
    trial.user_attrs = attributes
    try:
        row = read_row(trial, PARAMETERS, 2, BUDGET)
    except Unusable:
        return None
    for values in (row.values, row.queued):
        assert values is None or (0 <= values["x"] <= 1 and values["kind"] in (0, 1))
    return row


@st.composite
def trials(draw: st.DrawFn) -> Any:
    """A mutated trial whose state is a name."""
    found = draw(mutated(TRIALS, values=VALUES))
    if isinstance(found, dict) and not isinstance(found.get("state", ""), str):
        found = {**found, "state": "FAIL"}
    return found


def lines() -> list[str]:
    """A journal with two trials of this search."""
    with tempfile.TemporaryDirectory() as folder:
        book = ledger(open_storage(Path(folder) / "study"), 2)
        for _ in range(2):
            trial = book.ask()
            book.tell(trial, {"state": "candidate"}, [0.0, 0.0])
        return (Path(folder) / "study").read_text().splitlines()


JOURNALS: list[str] = []


@st.composite
def journals(draw: st.DrawFn) -> str:
    """A journal of which some lines are mutated."""
    if not JOURNALS:
        JOURNALS.extend(lines())
    found = [json.loads(line) for line in JOURNALS]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(found) - 1))
        found[place] = draw(mutated([found[place]], values=VALUES))
    try:
        return "".join(json.dumps(each, default=str) + "\n" for each in found)
    except (ValueError, RecursionError):
        return "[" * 100_000 + "\n"


def opened(journal: str) -> object:
    """As a worker that joins the search."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "study"
        path.write_text(journal)
        book = ledger(open_storage(path), 3, bounds=0)
        found = [book.results(), book.claims(), book.waiting(), book.ask()]
        return len(found)


KINDS_OF_STUDIES = (
    Kind(name="trial of another worker", group="studies", examples=trials(), attempt=read),
    Kind(name="journal of a study", group="studies", examples=journals(), attempt=opened),
)
