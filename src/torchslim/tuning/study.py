"""One study that any number of workers share: who takes which trial, and who takes over what a dead one left."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torchslim.core.budget import Budget
from torchslim.core.folder_lock import is_dead, started
from torchslim.errors import RecipeError, StorageError
from torchslim.tuning.sampling import Sampler, distributions, draw
from torchslim.tuning.shared import SAME, Row, Unusable, read_row
from torchslim.tuning.space import Parameter
from torchslim.tuning.storage import consulting

BEAT_SECONDS = 5.0
GRACE_BEATS = 12  # so many beats that are missed, and a worker on another machine counts as dead
REFUSALS = 1_000  # trials in a row that others have asked for with values that do not fit: somebody floods the study


@dataclass
class Worker:
    """This process, as other workers know it."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def to_dict(self) -> dict[str, Any]:
        """With when it was started: numbers of processes are used again."""
        return {"host": self.host, "pid": self.pid, "started": started(self.pid)}


class Ledger:
    """A study: gives trials to this worker, beats while it works, and takes back what dead workers left.

    A trial counts once it has a result, good or bad; one that ended without is lost, and was given to somebody else.

    Args:
        storage: of `open_storage`.
        name: of the study in it.
        key: what is searched; a study of the same name with another key belongs to another recipe.
        objectives: how many numbers a trial is judged by, all to be small.
        parameters: what varies.
        sampler, seed: of the values; equal seeds and results give equal trials.
        bounds: how many constraints there are.
        budget: under which results are read.
        trials: how many to take.
        beat: seconds between signs of life.
    """

    def __init__(
        self,
        storage: Any,
        name: str,
        key: str,
        *,
        objectives: int,
        parameters: Sequence[Parameter],
        trials: int,
        sampler: Sampler = "gp",
        seed: int = 0,
        bounds: int = 0,
        budget: Budget | None = None,
        beat: float = BEAT_SECONDS,
    ) -> None:
        import optuna

        self.parameters, self.trials, self.seed = parameters, trials, seed
        self.sampler, self.bounds, self.beat, self.name = sampler, bounds, beat, name
        self.objectives, self.budget = objectives, budget
        self.storage, self.worker = storage, Worker().to_dict()
        self.seen: dict[int, tuple[Any, float]] = {}
        self.given: dict[int, dict[str, Any]] = {}  # the values of this worker's trials, as they are stored
        self.ignored: dict[int, str] = {}  # trials that are of no use, and why
        self.told: set[int] = set()
        with consulting(name):
            self.study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=["minimize"] * objectives,
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(seed=0),
            )
            other = self.study.user_attrs.get("key")
            minimized = [direction == optuna.study.StudyDirection.MINIMIZE for direction in self.study.directions]
            if (other is not None and other != key) or minimized != [True] * objectives:
                raise RecipeError(
                    f"the study {name!r} belongs to another recipe, budget, model or data; choose another with "
                    "--study, or another folder"
                )
            if other is None:
                self.study.set_user_attr("key", key)

    def enqueue(self, starts: Sequence[Mapping[str, Any]]) -> None:
        """Values to begin with, where nobody has begun."""
        with self._consulting():
            if not self.study.get_trials(deepcopy=False):
                for values in starts:
                    self.study.enqueue_trial(self._stored(values), skip_if_exists=True)

    def ask(self) -> Any:
        """The next trial; None where enough are taken."""
        import optuna

        with self._consulting():
            self.take_back()
            for _ in range(REFUSALS):
                if self._taken() >= self.trials:
                    return None
                number = sum(row.result is not None for row in self._rows())
                sampler = "random" if self.repeats() else self.sampler  # what repeats itself must look elsewhere
                trial = self.study.ask()
                trial.set_user_attr("worker", self.worker)
                with self.beating(trial):  # drawing takes its time, too
                    usable = self._set_values(trial, number, sampler)
                if not usable or self._taken(before=trial.number) >= self.trials:  # several workers asked at once
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                if usable:
                    return trial if self._taken(before=trial.number) < self.trials else None
        raise StorageError(
            f"the study {self.name!r} holds more than {REFUSALS:,} trials with values beyond the recipe's ranges; "
            "choose another with --study"
        )

    def values(self, trial: Any) -> dict[str, Any]:
        """The values of the parameters of a trial that this worker was given."""
        return self._decoded(self.given[trial.number])

    def _decoded(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        return {
            parameter.name: parameter.choices[stored[parameter.name]]
            if parameter.kind == "choice"
            else stored[parameter.name]
            for parameter in self.parameters
        }

    @contextmanager
    def beating(self, trial: Any) -> Iterator[None]:
        """Show signs of life while the block runs."""
        import optuna

        stop = threading.Event()

        def beat() -> None:
            count = 0
            while not stop.wait(self.beat):
                count += 1
                with suppress(optuna.exceptions.UpdateFinishedTrialError):  # somebody took this worker for dead
                    self.storage.set_trial_user_attr(trial._trial_id, "beat", count)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def tell(self, trial: Any, result: Mapping[str, Any], values: Sequence[float] | None) -> None:
        """Keep a result; without values the trial has failed. Of a trial that another has taken over it is dropped."""
        import optuna

        with self._consulting(), suppress(optuna.exceptions.UpdateFinishedTrialError):
            trial.set_user_attr("result", json.dumps(result))
            if values is None:
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            else:
                self.study.tell(trial.number, list(values))

    def results(self) -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
        """Number, values and result of each trial that has one of its own, in order."""
        with self._consulting():
            return [
                (row.number, self._decoded(row.values), row.result)
                for row in self._rows()
                if row.result is not None and row.values is not None and SAME not in row.result
            ]

    def repeats(self) -> int:
        """How many of the latest trials were the same as an earlier one."""
        count = 0
        for row in reversed(self._rows()):
            if SAME not in (row.result or {}):
                break
            count += 1
        return count

    def waiting(self) -> bool:
        """Is somebody still at work, who may yet be lost?"""
        with self._consulting():
            self.take_back()
            return any(row.running for row in self._rows())

    def claim(self, about: Mapping[str, int]) -> Any:
        """A trial for something that is named, and not drawn; None where another worker has it."""
        import optuna

        with self._consulting():
            self.take_back()
            trial = self.study.ask()
            trial.set_user_attr("about", dict(about))
            trial.set_user_attr("worker", self.worker)
            for other in self._rows():
                mine = other.about == about["trial"]
                if mine and (other.result is not None or other.running) and other.number < trial.number:
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                    return None
        return trial

    def claims(self) -> dict[int, dict[str, Any] | None]:
        """By the number that was claimed its result, None while somebody is at work on it."""
        found: dict[int, dict[str, Any] | None] = {}
        with self._consulting():
            self.take_back()
            for row in self._rows():
                if row.about is None:
                    continue
                if row.result is not None:
                    found[row.about] = row.result
                elif row.running:
                    found.setdefault(row.about, None)
        return found

    def take_back(self) -> None:
        """Trials of dead workers fail, and their values are asked for again."""
        now = time.monotonic()
        for row in self._rows():
            if not row.running:
                continue
            dead = is_dead(row.worker) if row.worker else None
            if dead is None:
                if row.number not in self.seen or self.seen[row.number][0] != row.beat:
                    self.seen[row.number] = (row.beat, now)
                dead = now - self.seen[row.number][1] > GRACE_BEATS * self.beat
            if dead:
                self._lose(row.number, row.values)

    def give_back(self, trial: Any) -> None:
        """Of this worker, which cannot go on."""
        with self._consulting():
            self._lose(trial.number, self.given.get(trial.number))

    def _lose(self, number: int, values: Mapping[str, Any] | None) -> None:
        import optuna

        try:
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)
        except (ValueError, RuntimeError):  # another worker was faster, or it was alive and is done
            return
        if self.parameters:  # what is claimed by name is claimed again
            self.study.enqueue_trial(dict(values or {}), user_attrs={"instead_of": number})

    @contextmanager
    def _consulting(self) -> Iterator[None]:
        """Around the use of the storage; afterwards each trial that was found to be of no use is told once."""
        with consulting(self.name):
            yield
        for number, reason in self.ignored.items():
            if number not in self.told:
                self.told.add(number)
                warnings.warn(
                    f"trial {number} of the study {self.name!r} is ignored: {reason}; another worker, or somebody "
                    "else, has written it",
                    stacklevel=4,
                )

    def _all(self) -> list[Any]:
        trials: list[Any] = self.study.get_trials(deepcopy=False)
        return trials

    def _rows(self) -> list[Row]:
        """The trials that are of use; the others are left out, with a warning."""
        found = []
        for trial in self._all():
            try:
                found.append(read_row(trial, self.parameters, self.objectives, self.budget))
            except Unusable as unusable:
                self.ignored.setdefault(trial.number, str(unusable))
        return found

    def _taken(self, before: int | None = None) -> int:
        """How many trials have a result of their own or are worked on."""
        return sum(
            row.running if row.result is None else SAME not in row.result
            for row in self._rows()
            if before is None or row.number < before
        )

    def _set_values(self, trial: Any, number: int, sampler: Sampler) -> bool:
        """Give a trial the values that it was asked for with, or draw them; False where those are beyond a range."""
        rows = {row.number: row for row in self._rows()}
        if trial.number not in rows:
            return False
        values = rows[trial.number].queued
        if values is None:
            others = [row for row in rows.values() if row.number != trial.number]
            values = draw(
                self.parameters,
                others,
                sampler,
                seed=(self.seed * 1_000_003 + number) % 2**32,
                number=number,
                trials=self.trials,
                objectives=self.objectives,
                bounds=self.bounds,
            )
        for name, kind in distributions(self.parameters).items():
            self.storage.set_trial_param(trial._trial_id, name, kind.to_internal_repr(values[name]), kind)
        self.given[trial.number] = values
        return True

    def _stored(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            parameter.name: parameter.choices.index(values[parameter.name])
            if parameter.kind == "choice"
            else values[parameter.name]
            for parameter in self.parameters
        }
