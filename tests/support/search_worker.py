"""A worker of the tests, in a process of its own: python -m tests.support.search_worker STORAGE TRIALS SECONDS [--hang]"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from torchslim.tuning.space import Parameter
from torchslim.tuning.storage import open_storage
from torchslim.tuning.study import Design, Ledger

PARAMETERS = (
    Parameter(name="x", path=("x",), kind="float", low=0.0, high=1.0),
    Parameter(name="kind", path=("kind",), kind="choice", choices=("a", {"do": "b"})),
)


def ledger(storage: Any, trials: int, **options: Any) -> Ledger:
    """Of a study with two parameters and two objectives."""
    design = Design(objectives=2, parameters=PARAMETERS, trials=trials, **options)
    return Ledger(storage, "study", "key", design, beat=0.2)


def answer(values: dict[str, Any]) -> list[float]:
    """Objectives that depend on the values alone."""
    return [values["x"], 1 - values["x"] + (values["kind"] == "a")]


def work(book: Ledger, seconds: float = 0.0, *, hang: bool = False) -> int:
    """Trials until there are enough; how many this worker has taken."""
    count = 0
    while True:
        trial = book.ask()
        if trial is None:
            if not book.waiting():
                return count
            time.sleep(0.1)
            continue
        print(f"at {trial.number}", flush=True)
        with book.beating(trial):
            while hang:
                time.sleep(1)
            time.sleep(seconds)
        values = book.values(trial)
        book.tell(trial, {"state": "candidate", "values": json.dumps(values)}, answer(values))
        count += 1


if __name__ == "__main__":
    url, trials, seconds, *rest = sys.argv[1:]
    work(ledger(open_storage(url), int(trials)), float(seconds), hang="--hang" in rest)
