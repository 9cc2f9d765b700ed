"""Workers of one search that an engine starts: the recipe, the running trials, and what the study holds afterwards."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchslim.tuning.storage import hushed, open_storage

TRIALS = 3
RECIPE = f"""
model = "tests.support.toy:model"
task = "tests.support.toy:task"
runtime = "eager"
threads = 1
rehearse = false
[[step]]
do = "prune"
pattern = "channel"
sparsity = {{ search = [0.3, 0.6] }}
round_to = 2
min_channels = 2
[[step]]
do = "tests.support.slow:Wait"
seconds = 3.0
[[step]]
do = "distill"
epochs = 1
lr = {{ search = [1e-3, 1e-2], log = true }}
[budget]
metric_drop = 90.0
minimize = ["metric_drop", "macs"]
trials = {TRIALS}
finalists = 1
"""
"""Trials that mostly sleep, so that a worker can be killed in one of them."""


@dataclass(frozen=True)
class Watched:
    """A study that workers share, as somebody else sees it."""

    storage: Path
    name: str

    def trials(self) -> list[Any]:
        """All trials; none before the study exists."""
        import optuna

        if not self.storage.exists():
            return []
        with hushed():
            try:
                return optuna.load_study(study_name=self.name, storage=open_storage(self.storage)).trials
            except KeyError:
                return []

    def running(self, mark: str) -> tuple[int, int] | None:
        """Number and process id of a running trial whose worker has `mark`, "NAME=VALUE", in its environment."""
        import optuna

        for trial in self.trials():
            worker = trial.user_attrs.get("worker")
            if trial.state == optuna.trial.TrialState.RUNNING and worker:
                with suppress(OSError):
                    if mark.encode() in Path(f"/proc/{worker['pid']}/environ").read_bytes().split(b"\0"):
                        return trial.number, worker["pid"]
        return None

    def lost(self) -> tuple[list[int], list[int]]:
        """Numbers of the trials whose worker ended without a result, and of those that were given to a worker again."""
        lost, repeated = [], []
        for trial in self.trials():
            if "result" in trial.user_attrs:
                assert trial.state.is_finished()
            elif "worker" in trial.user_attrs:
                lost.append(trial.number)
            if "instead_of" in trial.user_attrs:
                repeated.append(trial.user_attrs["instead_of"])
        return lost, repeated


def tried(folder: Path) -> list[str]:
    """States of the trials of a finished search."""
    return [trial["state"] for trial in json.loads((folder / "search.json").read_text())["trials"]]
