"""One study that any number of workers share: gives trials to workers, and gives the trials of dead ones again."""

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
GRACE_BEATS = 12  # missed beats after which a worker on another machine counts as dead
REFUSALS = 1_000  # enqueued trials in a row with values beyond the ranges: the study is flooded with them


@dataclass
class Worker:
    """A process that runs trials; by default this one."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def to_dict(self) -> dict[str, Any]:
        """Host, process id and start time: the system uses process ids again."""
        return {"host": self.host, "pid": self.pid, "started": started(self.pid)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The trials of a study: their parameters, their number, and how values are drawn and judged.

    Args:
        trials: number of trials to run.
        objectives: number of objectives, all minimized.
        bounds: number of constraints.
        parameters: parameters of the space; none: trials are claimed by name, and no values are drawn.
        sampler: as for `ts.search`.
        seed: equal seeds and results give equal trials.
    """

    trials: int
    objectives: int
    bounds: int = 0
    parameters: Sequence[Parameter] = ()
    sampler: Sampler = "gp"
    seed: int = 0


class Ledger:
    """One worker's access to a study: asks for trials, shows signs of life, and frees the trials of dead workers.

    A trial counts once it has a result, good or bad. A trial that ended without one is lost; its values are enqueued
    again.

    Args:
        storage: as `open_storage` returns it.
        name: name of the study in the storage.
        key: identifies the search; a study of this name with another key belongs to another search.
        design: the trials of the study.
        budget: the budget that results are judged by; None: results are used as they are stored.
        beat: seconds between signs of life.

    Raises:
        RecipeError: the study belongs to another search.
        StorageError: the storage cannot be reached.
    """

    def __init__(
        self,
        storage: Any,
        name: str,
        key: str,
        design: Design,
        *,
        budget: Budget | None = None,
        beat: float = BEAT_SECONDS,
    ) -> None:
        import optuna

        self.storage, self.name, self.design = storage, name, design
        self.budget, self.beat = budget, beat
        self.worker = Worker().to_dict()
        self.last_beats: dict[int, tuple[Any, float]] = {}  # by running trial, and when this worker first saw the beat
        self.own_values: dict[int, dict[str, Any]] = {}  # of this worker's trials, as they are stored
        self.unusable: dict[int, str] = {}  # reasons by ignored trial
        self.warned: set[int] = set()  # ignored trials that a warning has named
        minimize = [optuna.study.StudyDirection.MINIMIZE] * design.objectives
        with consulting(name):
            self.study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=minimize,
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(seed=0),
            )
            stored_key = self.study.user_attrs.get("key")
            if stored_key not in (None, key) or list(self.study.directions) != minimize:
                raise RecipeError(
                    f"the study {name!r} belongs to another recipe, budget, model or data; choose another with "
                    "--study, or another folder"
                )
            if stored_key is None:
                self.study.set_user_attr("key", key)

    def enqueue(self, starts: Sequence[Mapping[str, Any]]) -> None:
        """Enqueue the values of the first trials, unless the study has trials already."""
        with self._consulting():
            if not self.study.get_trials(deepcopy=False):
                for values in starts:
                    self.study.enqueue_trial(self._stored(values), skip_if_exists=True)

    def queue(self, values: Mapping[str, Any]) -> None:
        """Enqueue the values of one more trial."""
        with self._consulting():
            self.study.enqueue_trial(self._stored(values))

    def queued(self) -> bool:
        """Whether a trial waits to be run."""
        import optuna

        with self._consulting():
            self.take_back()
            states = (optuna.trial.TrialState.WAITING,)
            return bool(self.study.get_trials(deepcopy=False, states=states))

    def ask(self, *, drawn: bool = True) -> Any:
        """Return the next trial; None if there are enough.

        Args:
            drawn: draw the values of a trial where none is enqueued; False: return None then.

        Raises:
            StorageError: too many enqueued trials in a row have values beyond the ranges of their parameters.
        """
        import optuna

        with self._consulting():
            self.take_back()
            for _ in range(REFUSALS):
                if self._count() >= self.design.trials or not (drawn or self.queued()):
                    return None
                number = sum(row.result is not None for row in self._rows())
                sampler = "random" if self.repeats() else self.design.sampler  # a sampler that repeats itself is stuck
                trial = self.study.ask()
                trial.set_user_attr("worker", self.worker)
                with self.beating(trial):  # drawing may take longer than the grace of a silent worker
                    usable = self._set_values(trial, number, sampler if drawn else None)
                if not usable or self._count(before=trial.number) >= self.design.trials:  # workers asked at once
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                if usable:
                    return trial if self._count(before=trial.number) < self.design.trials else None
        raise StorageError(
            f"the study {self.name!r} holds more than {REFUSALS:,} trials with values beyond the recipe's ranges; "
            "choose another with --study"
        )

    def values(self, trial: Any) -> dict[str, Any]:
        """Values by parameter of a trial that `ask` returned."""
        return self._decoded(self.own_values[trial.number])

    def _decoded(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Values from Optuna's form."""
        return {
            parameter.name: parameter.choices[stored[parameter.name]]
            if parameter.kind == "choice"
            else stored[parameter.name]
            for parameter in self.design.parameters
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
                with suppress(optuna.exceptions.UpdateFinishedTrialError):  # other workers took this one for dead
                    self.storage.set_trial_user_attr(trial._trial_id, "beat", count)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def tell(self, trial: Any, result: Mapping[str, Any], values: Sequence[float] | None) -> None:
        """Store the result of a trial, unless another worker took the trial for lost.

        Args:
            trial: as `ask` or `claim` returned it.
            result: stored as JSON.
            values: of the objectives; None: the trial failed.
        """
        import optuna

        with self._consulting(), suppress(optuna.exceptions.UpdateFinishedTrialError):
            trial.set_user_attr("result", json.dumps(result))
            if values is None:
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            else:
                self.study.tell(trial.number, list(values))

    def results(self) -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
        """Number, values and result of every finished trial in order, without repetitions of earlier recipes."""
        with self._consulting():
            return [
                (row.number, self._decoded(row.values), row.result)
                for row in self._rows()
                if row.result is not None and row.values is not None and SAME not in row.result
            ]

    def known_values(self, *, lost: bool = False) -> dict[int, dict[str, Any]]:
        """Values by number of every trial that is running or has a result; with `lost`, also of those without.

        A worker may die while it takes a trial: the values that were enqueued for it are then those of the lost trial.
        """
        with self._consulting():
            rows = [row for row in self._rows() if lost or row.running or row.result is not None]
            values = {row.number: row.values or (row.queued if lost and row.worker else None) for row in rows}
            return {number: self._decoded(each) for number, each in values.items() if each is not None}

    def size(self) -> int:
        """Number of all trials, also of those that wait or were lost; it never falls."""
        with self._consulting():
            return len(self.study.get_trials(deepcopy=False))

    def count(self) -> int:
        """Number of trials that are running or have a result."""
        with self._consulting():
            return self._count()

    def repeats(self) -> int:
        """Number of the latest trials, in a row, that repeated an earlier recipe."""
        count = 0
        for row in reversed(self._rows()):
            if SAME not in (row.result or {}):
                break
            count += 1
        return count

    def waiting(self) -> bool:
        """Whether a trial is running; if its worker dies, the trial is given again."""
        with self._consulting():
            self.take_back()
            return any(row.running for row in self._rows())

    def claim(self, about: Mapping[str, int]) -> Any:
        """Claim a full training; return its trial, or None if another worker has claimed or done it.

        Args:
            about: {"trial": number of the trial to train in full}.
        """
        import optuna

        with self._consulting():
            self.take_back()
            trial = self.study.ask()
            trial.set_user_attr("about", dict(about))
            trial.set_user_attr("worker", self.worker)
            for other in self._rows():
                same = other.about == about["trial"]
                if same and (other.result is not None or other.running) and other.number < trial.number:
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                    return None
        return trial

    def claims(self) -> dict[int, dict[str, Any] | None]:
        """Results by claimed number; None while a worker computes the result."""
        results: dict[int, dict[str, Any] | None] = {}
        with self._consulting():
            self.take_back()
            for row in self._rows():
                if row.about is None:
                    continue
                if row.result is not None:
                    results[row.about] = row.result
                elif row.running:
                    results.setdefault(row.about, None)
        return results

    def take_back(self) -> None:
        """Fail the running trials of dead workers, and enqueue their values again."""
        now = time.monotonic()
        for row in self._rows():
            if not row.running:
                continue
            dead = is_dead(row.worker) if row.worker else None
            if dead is None:  # on another machine: only its beats tell
                if row.number not in self.last_beats or self.last_beats[row.number][0] != row.beat:
                    self.last_beats[row.number] = (row.beat, now)
                dead = now - self.last_beats[row.number][1] > GRACE_BEATS * self.beat
            if dead:
                self._lose(row.number, row.values or row.queued)  # it may have died before it set the values

    def give_back(self, trial: Any) -> None:
        """Fail a trial of this worker, which cannot finish it, and enqueue its values again."""
        with self._consulting():
            self._lose(trial.number, self.own_values.get(trial.number))

    def _lose(self, number: int, values: Mapping[str, Any] | None) -> None:
        import optuna

        try:
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)
        except (ValueError, RuntimeError):  # the trial was finished meanwhile, by its own worker or by another
            return
        if self.design.parameters:  # a trial without parameters was claimed by name, and is claimed again
            self.study.enqueue_trial(dict(values or {}), user_attrs={"instead_of": number})

    @contextmanager
    def _consulting(self) -> Iterator[None]:
        """Use the storage in the block; afterwards warn once for every trial that was found unusable."""
        with consulting(self.name):
            yield
        for number, reason in self.unusable.items():
            if number not in self.warned:
                self.warned.add(number)
                warnings.warn(
                    f"trial {number} of the study {self.name!r} is ignored: {reason}; another worker, or somebody "
                    "else, has written it",
                    stacklevel=4,
                )

    def _rows(self) -> list[Row]:
        """The usable trials, checked; `_consulting` warns of the others."""
        rows = []
        for trial in self.study.get_trials(deepcopy=False):
            try:
                rows.append(read_row(trial, self.design.parameters, self.design.objectives, self.budget))
            except Unusable as error:
                self.unusable.setdefault(trial.number, str(error))
        return rows

    def _count(self, before: int | None = None) -> int:
        """Number of trials that are running or have a result of their own; with `before`, of those below it."""
        return sum(
            row.running if row.result is None else SAME not in row.result
            for row in self._rows()
            if before is None or row.number < before
        )

    def _set_values(self, trial: Any, number: int, sampler: Sampler | None) -> bool:
        """Set the values of a trial: those that it was enqueued with, or drawn ones.

        Args:
            trial: of Optuna.
            number: number of trials with results.
            sampler: draws the values; None: only enqueued ones are used.

        Returns:
            False if there are no values, or the enqueued ones are beyond the ranges of their parameters.
        """
        design = self.design
        rows = {row.number: row for row in self._rows()}
        if trial.number not in rows:
            return False
        values = rows[trial.number].queued
        if values is None and sampler is None:
            return False  # another worker took the enqueued trial
        if values is None:
            assert sampler is not None
            others = [row for row in rows.values() if row.number != trial.number]
            values = draw(
                design.parameters,
                others,
                sampler,
                seed=(design.seed * 1_000_003 + number) % 2**32,
                number=number,
                trials=design.trials,
                objectives=design.objectives,
                bounds=design.bounds,
            )
        for name, kind in distributions(design.parameters).items():
            self.storage.set_trial_param(trial._trial_id, name, kind.to_internal_repr(values[name]), kind)
        self.own_values[trial.number] = values
        return True

    def _stored(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values in Optuna's form: choices as indices."""
        return {
            parameter.name: parameter.choices.index(values[parameter.name])
            if parameter.kind == "choice"
            else values[parameter.name]
            for parameter in self.design.parameters
        }
