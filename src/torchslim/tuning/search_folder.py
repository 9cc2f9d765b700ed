"""Check a search before any work, and open its folder and its studies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from torchslim.core.files import clean_temporaries, present, write_json
from torchslim.core.folder_lock import LOCK, holding
from torchslim.core.isolation import warn
from torchslim.core.schema import Schema
from torchslim.errors import RecipeError, StorageError
from torchslim.pipeline.work_folder import SHARED_SECONDS, own
from torchslim.report.records import Text, strict
from torchslim.runtimes import find_runtime
from torchslim.tuning.sampling import Sampler
from torchslim.tuning.space import Space
from torchslim.tuning.study import Design, Ledger


def check_space(space: Space) -> None:
    """Raise RecipeError if a runtime has no file to bound the size of, or the trials are fewer than the finalists."""
    budget = space.budget
    for name in space.runtimes:
        runtime = find_runtime(name)
        if "size" in budget.figures and runtime.suffix is None:
            raise RecipeError(
                f"budget: runtime {name!r} has no file whose size could be bounded; leave out size, or this runtime"
            )
    if budget.method == "sample" and budget.finalists > budget.trials:
        raise RecipeError(
            f"budget: {budget.finalists} finalists cannot come from {budget.trials} trials; take more trials"
        )


def make_ledgers(
    space: Space, name: str, key: str, storage: Any, sampler: Sampler, beat: float
) -> tuple[Ledger, Ledger]:
    """Ledgers of the trials and of the finals in a storage, as `open_storage` returns it."""
    budget = space.budget
    trials = Design(
        trials=budget.trials,
        objectives=len(budget.objectives),
        bounds=len(budget.bounds),
        parameters=space.parameters,
        sampler=sampler,
        seed=space.document.get("seed", 0),
    )
    finals = Design(trials=10**9, objectives=1)
    return (
        Ledger(storage, name, key, trials, budget=budget, beat=beat),
        Ledger(storage, f"{name}/finals", key, finals, budget=budget, beat=beat),
    )


@strict
class Claim(TypedDict):
    """Content of `space.json`: what is searched in the folder."""

    key: Text
    document: dict[Text, Any]


CLAIM: Schema[Claim] = Schema(Claim, "space.json", StorageError)


def mark_folder(folder: Path) -> None:
    """Mark the folder as one of a search, before anything else is written."""
    own(folder, RecipeError, "search", (folder / CLAIM.what).is_file, ("study.journal",))
    with holding(folder / LOCK, nothing):
        clean_temporaries(folder, older_s=SHARED_SECONDS)


def nothing(who: str) -> None:
    """Do nothing while waiting: other workers hold the folder only for moments."""


def claim_folder(folder: Path, key: str, space: Space) -> None:
    """Write `space.json`, or raise RecipeError if the folder belongs to another search."""
    path = folder / CLAIM.what
    with holding(folder / LOCK, nothing):
        if present(path):
            try:
                stored_key = CLAIM.read(path)["key"]
            except StorageError as error:
                warn(f"{error}; the study identifies the search, and the file is written again")
            else:
                if stored_key != key:
                    raise RecipeError(
                        f"{folder} holds the search of another recipe, budget, model or data; name another folder"
                    )
                return
        document = json.loads(json.dumps(space.document, default=str))
        write_json(path, {"key": key, "document": document})
