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
from pathlib import Path
from typing import Any, Literal

from torchslim.errors import RecipeError, StorageError
from torchslim.holding import is_dead, started
from torchslim.search.space import Parameter

Sampler = Literal["gp", "tpe", "random"]
BEAT_SECONDS = 5.0
GRACE_BEATS = 12  # so many beats that are missed, and a worker on another machine counts as dead
SAME = "same_as"  # in the result of a trial whose recipe was tried before: it does not count
GP_TRIALS, GP_OBJECTIVES = 150, 3  # beyond, Gaussian processes take too long
STARTUP = 10  # trials at random before the sampler learns from them, or a third of all where that is less


@contextmanager
def hushed() -> Iterator[None]:
    """Optuna tells nothing, and warns of nothing that is experimental."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


def open_storage(storage: str | Path) -> Any:
    """An Optuna storage: a URL of a database, or the path of a journal file.

    Raises:
        StorageError: it cannot be reached, or a package for it is missing.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise StorageError("a search needs Optuna: pip install 'torchslim[search]'") from error
    with hushed():
        if "://" not in str(storage):
            path = Path(storage)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.is_file():
                    with path.open("rb") as file:
                        first = file.readline()
                    if first.endswith(b"\n"):  # Optuna forgives a last line, which a killed worker may have cut off
                        json.loads(first)
                journal = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
                journal.get_all_studies()  # reads what is there
                return journal
            except (OSError, ValueError, KeyError) as error:  # the last two: lines that are no journal
                raise StorageError(f"the study {path} cannot be opened: {error}; name another storage") from error
        try:
            return optuna.storages.RDBStorage(str(storage))
        except ImportError as error:
            raise StorageError(
                f"the driver of {_without_password(str(storage))} is missing: {error}; for PostgreSQL, pip install "
                "'torchslim[postgresql]'"
            ) from error
        except Exception as error:  # of the database's own kinds
            what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise StorageError(
                f"the storage {_without_password(str(storage))} cannot be reached: {what}; check the URL and that its "
                "server runs"
            ) from error


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}://{user.partition(':')[0]}{at}{host}"


@dataclass
class Worker:
    """This process, as other workers know it."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def to_json(self) -> dict[str, Any]:
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
        beat: float = BEAT_SECONDS,
    ) -> None:
        import optuna

        self.parameters, self.trials, self.seed = parameters, trials, seed
        self.sampler, self.bounds, self.beat = sampler, bounds, beat
        self.storage, self.worker = storage, Worker().to_json()
        self.seen: dict[int, tuple[Any, float]] = {}
        with hushed():
            self.study = optuna.create_study(
                storage=storage, study_name=name, directions=["minimize"] * objectives, load_if_exists=True
            )
            other = self.study.user_attrs.get("key")
            if other is not None and other != key:
                raise RecipeError(
                    f"the study {name!r} belongs to another recipe, budget, model or data; choose another with "
                    "--study, or another folder"
                )
            if other is None:
                self.study.set_user_attr("key", key)

    def enqueue(self, starts: Sequence[Mapping[str, Any]]) -> None:
        """Values to begin with, where nobody has begun."""
        with hushed():
            if not self.study.get_trials(deepcopy=False):
                for values in starts:
                    self.study.enqueue_trial(self._stored(values), skip_if_exists=True)

    def ask(self) -> Any:
        """The next trial; None where enough are taken."""
        import optuna

        with hushed():
            self.take_back()
            if self._taken() >= self.trials:
                return None
            self.study.sampler = self._make_sampler(sum("result" in each.user_attrs for each in self._all()))
            trial = self.study.ask()
            trial.set_user_attr("worker", self.worker)
            with self.beating(trial):  # drawing takes its time, too
                self._draw(trial)
            if self._taken(before=trial.number) >= self.trials:  # several workers asked at once
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                return None
        return trial

    def values(self, trial: Any) -> dict[str, Any]:
        """The values of a trial's parameters."""
        found = dict(trial.params)
        return {
            each.name: each.choices[found[each.name]] if each.kind == "choice" else found[each.name]
            for each in self.parameters
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

        with hushed(), suppress(optuna.exceptions.UpdateFinishedTrialError):
            trial.set_user_attr("result", json.dumps(result))
            self.study.sampler = self._learner()  # keeps the constraints, whoever drew the trial
            if values is None:
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            else:
                self.study.tell(trial.number, list(values))

    def results(self) -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
        """Number, values and result of each trial that has one of its own, in order."""
        found = []
        for trial in self._all():
            if "result" in trial.user_attrs and trial.state.is_finished():
                result = json.loads(trial.user_attrs["result"])
                if SAME not in result:
                    found.append((trial.number, self.values(trial), result))
        return found

    def repeats(self) -> int:
        """How many of the latest trials were the same as an earlier one."""
        count = 0
        for trial in reversed(self._all()):
            if SAME not in json.loads(trial.user_attrs.get("result", "{}")):
                break
            count += 1
        return count

    def waiting(self) -> bool:
        """Is somebody still at work, who may yet be lost?"""
        import optuna

        with hushed():
            self.take_back()
            return any(trial.state == optuna.trial.TrialState.RUNNING for trial in self._all())

    def claim(self, about: Mapping[str, Any]) -> Any:
        """A trial for something that is named, and not drawn; None where another worker has it."""
        import optuna

        with hushed():
            self.take_back()
            trial = self.study.ask()
            trial.set_user_attr("about", dict(about))
            trial.set_user_attr("worker", self.worker)
            for other in self._all():
                mine = other.user_attrs.get("about") == about
                alive = "result" in other.user_attrs or other.state == optuna.trial.TrialState.RUNNING
                if mine and alive and other.number < trial.number:
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                    return None
        return trial

    def claims(self) -> dict[int, dict[str, Any] | None]:
        """By the number that was claimed its result, None while somebody is at work on it."""
        import optuna

        found: dict[int, dict[str, Any] | None] = {}
        with hushed():
            self.take_back()
            for trial in self._all():
                about = trial.user_attrs.get("about")
                if about is None:
                    continue
                if "result" in trial.user_attrs:
                    found[about["trial"]] = json.loads(trial.user_attrs["result"])
                elif trial.state == optuna.trial.TrialState.RUNNING:
                    found.setdefault(about["trial"], None)
        return found

    def take_back(self) -> None:
        """Trials of dead workers fail, and their values are asked for again."""
        import optuna

        now = time.monotonic()
        for trial in self._all():
            if trial.state != optuna.trial.TrialState.RUNNING:
                continue
            worker = trial.user_attrs.get("worker")
            dead = is_dead(worker) if worker else None
            if dead is None:
                beat = trial.user_attrs.get("beat")
                if trial.number not in self.seen or self.seen[trial.number][0] != beat:
                    self.seen[trial.number] = (beat, now)
                dead = now - self.seen[trial.number][1] > GRACE_BEATS * self.beat
            if dead:
                self._lose(trial)

    def give_back(self, trial: Any) -> None:
        """Of this worker, which cannot go on."""
        with hushed():
            self._lose(next(each for each in self._all() if each.number == trial.number))

    def _lose(self, trial: Any) -> None:
        import optuna

        try:
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        except (ValueError, RuntimeError):  # another worker was faster, or it was alive and is done
            return
        if self.parameters:  # what is claimed by name is claimed again
            self.study.enqueue_trial(dict(trial.params), user_attrs={"instead_of": trial.number})

    def _all(self) -> list[Any]:
        trials: list[Any] = self.study.get_trials(deepcopy=False)
        return trials

    def _taken(self, before: int | None = None) -> int:
        """How many trials have a result of their own or are worked on."""
        import optuna

        return sum(
            SAME not in json.loads(trial.user_attrs["result"])
            if "result" in trial.user_attrs
            else trial.state == optuna.trial.TrialState.RUNNING
            for trial in self._all()
            if before is None or trial.number < before
        )

    def _make_sampler(self, number: int) -> Any:
        """One for each trial, seeded by its place: a search that was killed goes on as an undisturbed one."""
        import optuna

        seed = (self.seed * 1_000_003 + number) % 2**32
        if self.sampler == "random" or self.repeats():  # what has learned to repeat itself must look elsewhere
            return optuna.samplers.RandomSampler(seed=seed)
        return self._learner(seed, number)

    def _learner(self, seed: int = 0, number: int = 0) -> Any:
        import optuna

        options: Any = {
            "seed": seed,
            "n_startup_trials": min(STARTUP, max(4, self.trials // 3)),
            "constraints_func": _excess if self.bounds else None,
        }
        if self.sampler == "gp" and number < GP_TRIALS and len(self.study.directions) <= GP_OBJECTIVES:
            return optuna.samplers.GPSampler(**options)
        return optuna.samplers.TPESampler(**options, multivariate=True)

    def _draw(self, trial: Any) -> None:
        for each in self.parameters:
            if each.kind == "choice":  # by their places, as choices may be tables
                trial.suggest_categorical(each.name, list(range(len(each.choices))))
            elif each.kind == "int":
                trial.suggest_int(each.name, int(each.low), int(each.high), log=each.log, step=int(each.step or 1))
            else:
                trial.suggest_float(each.name, each.low, each.high, log=each.log, step=each.step)

    def _stored(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            each.name: each.choices.index(values[each.name]) if each.kind == "choice" else values[each.name]
            for each in self.parameters
        }


def _excess(trial: Any) -> Sequence[float]:
    """How bad a trial is for each bound; Optuna takes what is above 0 for a violation."""
    result = json.loads(trial.user_attrs.get("result", "{}"))
    return list(result.get("bad", {}).values())
