"""How long a run takes: seconds for each of its parts, from the batches that a rehearsal has timed, and the time left.

The parts of a run are its baseline, its steps, and the measurement of its artifact.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torchslim.core.step import CHOICE_SECONDS, FORECAST, SECONDS_LEFT, TRAINING_LEFT, Event, Step, Trains, step_name
from torchslim.training.loaders import batch_count

BASELINE, ARTIFACT = "baseline", "artifact"
MEMORY = "memory_mib"
TRUST = 0.1  # weight of the forecast against the pace so far, as a share of the run


@dataclass(frozen=True, kw_only=True)
class Part:
    """Expected seconds of a part of a run, and those among them that its trainings take; None where not known."""

    name: str
    seconds: float | None
    training: float | None = 0.0


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The expected time of every part of a run, and the peak of memory in its rehearsal."""

    parts: tuple[Part, ...]
    memory_mib: float
    cuda_mib: float | None = None

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole run; None where those of a part are not known."""
        known = [part.seconds for part in self.parts if part.seconds is not None]
        return sum(known) if len(known) == len(self.parts) else None

    def event(self) -> Event:
        """The forecast as an event: minutes by part and in total, and MiB of memory."""
        minutes = {
            part.name if part.name in (BASELINE, ARTIFACT) else f"{number} {part.name}": part.seconds / 60
            for number, part in enumerate(self.parts)
            if part.seconds is not None
        }
        total = {} if self.seconds is None else {"total": self.seconds / 60}
        memory = {MEMORY: self.memory_mib} | ({} if self.cuda_mib is None else {"cuda_mib": self.cuda_mib})
        return Event(step=FORECAST, phase="minutes", values={**minutes, **total, **memory})

    def to_dict(self) -> dict[str, Any]:
        """The forecast as `run.json` stores it."""
        parts = [{"name": part.name, "seconds": part.seconds, "training": part.training} for part in self.parts]
        cuda = {} if self.cuda_mib is None else {"cuda_mib": self.cuda_mib}
        return {"parts": parts, MEMORY: self.memory_mib, **cuda}

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Forecast:
        """The forecast that `to_dict` gave."""
        return cls(**{**stored, "parts": tuple(Part(**part) for part in stored["parts"])})


@dataclass
class Timed:
    """The time that a part took in the rehearsal.

    Attributes:
        seconds: of the whole part.
        updates: moments of the training updates, by training, from the start of the part.
        evaluations: seconds and batches of each evaluation of the metric.
        retries: seconds of evaluations that were repeated on more batches.
        choices: seconds of each choice of layers that was tried, without the evaluation of the metric.
        most_choices: how many choices a run may try.
        deploying: seconds from the event of the deployment to the next one.
    """

    seconds: float = 0.0
    updates: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    evaluations: list[tuple[float, int]] = field(default_factory=list)
    retries: float = 0.0
    choices: list[float] = field(default_factory=list)
    most_choices: int = 0
    deploying: float = 0.0
    begun: float | None = None  # moment of the event of a deployment that is running

    def see(self, event: Event, moment: float) -> None:
        """Note an event of a training or of the deployment, and its moment from the start of the part."""
        if self.begun is not None:
            self.deploying, self.begun = moment - self.begun, None
        if event.phase == "deploy":
            self.begun = moment
        if CHOICE_SECONDS in event.values:
            evaluated = self.evaluations[-1][0] if self.evaluations else 0.0
            self.choices.append(max(event.values[CHOICE_SECONDS] - evaluated, 0.0))
            self.most_choices = event.total or 0
        if "epoch" in event.values and "last_epoch" not in event.values:
            self.updates.setdefault((event.step, event.phase), []).append(moment)

    @property
    def seconds_per_update(self) -> float:
        """Seconds of an update: from the first to the second one of the slowest training, without its warm-up."""
        paces = [
            moments[1] - moments[0] if len(moments) > 1 else max(moments[0], 0.0) for moments in self.updates.values()
        ]
        return max(paces, default=0.0)

    @property
    def seconds_per_batch(self) -> float:
        """Seconds of a batch in an evaluation: those of the fastest, as the first ones warm up."""
        return min((seconds / max(batches, 1) for seconds, batches in self.evaluations), default=0.0)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Batches of a pass over each split; None where a loader has no length, 0 where there is no split."""

    train: int | None
    val: int | None
    test: int | None

    @classmethod
    def of(cls, task: Any, processes: int) -> Counts:
        """The counts of a task; each of several processes trains on its share."""
        train, val, test = (
            0 if batches is None else batch_count(batches) for batches in (task.train, task.val, task.test)
        )
        return cls(train=None if train is None else max(train // processes, min(train, 1)), val=val, test=test)

    @property
    def measured(self) -> int | None:
        """Batches on which a stage is measured."""
        return None if self.val is None or self.test is None else self.val + self.test


def expected(name: str, timed: Timed, counts: Counts, epochs: Sequence[int], rehearsed: Sequence[int]) -> Part:
    """Forecast a part of the run from its rehearsal.

    Args:
        name: name of the part.
        timed: time of its rehearsal.
        counts: batches of the task's splits.
        epochs: of each of its trainings.
        rehearsed: epochs of each of the trainings in the rehearsal.
    """
    updates = sum(map(len, timed.updates.values()))
    evaluated = sum(seconds for seconds, _ in timed.evaluations) + timed.retries
    fixed = max(timed.seconds - evaluated - updates * timed.seconds_per_update, 0.0)
    ratio = len(epochs) / len(rehearsed) if rehearsed else 1.0  # rounds of pruning
    if counts.measured is None or counts.val is None or (epochs and counts.train is None):
        return Part(name=name, seconds=None, training=None)
    at_stage = 2 if counts.test else 1  # evaluations that measure the stage; the others belong to the step's own work
    choosing = len(timed.choices) + 1 if timed.choices else 0  # with the metric before any choice
    within = max(len(timed.evaluations) - at_stage - choosing, 0) * counts.val * timed.seconds_per_batch
    if rehearsed:
        within *= sum(epochs) / sum(rehearsed)
    more = max(timed.most_choices - len(timed.choices), 0)
    fixed += more * min(timed.choices, default=0.0)
    fixed += (choosing + more) * counts.val * timed.seconds_per_batch
    training = sum(epochs) * (counts.train or 0) * timed.seconds_per_update + within
    seconds = fixed * ratio + training + counts.measured * timed.seconds_per_batch
    return Part(name=name, seconds=seconds, training=training)


def memory() -> dict[str, float]:
    """The highest memory so far in MiB: of this process, and of a CUDA device that was used."""
    peaks = {MEMORY: _process_mib()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["cuda_mib"] = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**20
    return peaks


def _process_mib() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 2**20 if sys.platform == "darwin" else largest / 2**10


class TimeLeft:
    """Estimates the remaining time of a run: from its forecast, corrected by the pace of the parts that are done.

    Without a forecast, estimates the time of the trainings alone, from the pace of the epochs so far.
    """

    def __init__(self, steps: Sequence[Step], forecast: Forecast | None = None) -> None:
        self.names = [BASELINE, *map(step_name, steps), ARTIFACT]
        self.epochs = [[], *([*step.trainings()] if isinstance(step, Trains) else [] for step in steps), []]
        self.known = forecast is not None and forecast.seconds is not None and len(forecast.parts) == len(self.names)
        if forecast is not None and self.known:
            self.weights = [part.seconds or 0.0 for part in forecast.parts]
            self.training = [part.training or 0.0 for part in forecast.parts]
        else:
            self.weights = self.training = [float(sum(epochs)) for epochs in self.epochs]
        self.place, self.phase, self.begun_trainings, self.inside = 0, "", -1, 0.0
        self.pace = 1.0  # seconds of the run by second of the forecast
        self.part_begun: tuple[float, float] | None = None  # time of the part's first event, and the pace by then
        self.resumed = 0.0  # weight of parts that an earlier run has finished, and of epochs that were left out
        self.begun: tuple[float, float] | None = None  # time of the first event, and the weight that was done by then

    def after(self, event: Event) -> float | None:
        """Return the seconds left after an event; None where nothing has run yet to estimate from."""
        if not self._follow(event):
            return None
        now, total = time.monotonic(), sum(self.weights)
        done = sum(self.weights[: self.place]) + self._inside(event)
        if self.known:
            done += self._without_events(now)
        self.begun = self.begun or (now, done)
        started, before = self.begun
        elapsed, advanced = now - started, done - before - self.resumed
        if self.known:
            trust = TRUST * total
            self.pace = (elapsed + trust) / (max(advanced, 0.0) + trust) if trust else 1.0
            return (total - done) * self.pace
        return (total - done) * elapsed / advanced if advanced > 0 else None

    def _follow(self, event: Event) -> bool:
        """Find the part of an event; False where it belongs to none, or says nothing about time."""
        if event.phase in ("start", "resumed") or event.step != self.names[self.place]:
            following = self.names[self.place + 1 :]
            if event.step not in following:
                return False
            place = self.place + 1 + following.index(event.step)
            if event.phase == "resumed":
                self.resumed += self.weights[place]
            self.place, self.phase, self.begun_trainings, self.inside = place, "", -1, 0.0
            self.part_begun = None
        return self.known or (bool(event.total) and "epoch" in event.values)

    def _without_events(self, now: float) -> float:
        """Weight that is done of the work without events of its own, such as deployment, at the pace so far."""
        began, pace = self.part_begun = self.part_begun or (now, self.pace)
        fixed = self.weights[self.place] - self.training[self.place]
        return min(max((now - began) / pace - self.inside, 0.0), fixed, self.weights[self.place] - self.inside)

    def _inside(self, event: Event) -> float:
        """Weight of what is done of the current part."""
        if event.phase == "resumed":
            self.inside = self.weights[self.place]
        elif event.phase == "deploy":
            self.inside = self.training[self.place]
        elif "epoch" in event.values:
            if event.phase != self.phase:
                self.phase, self.begun_trainings = event.phase, self.begun_trainings + 1
            epochs = self.epochs[self.place]
            if epochs and event.total:
                index = min(self.begun_trainings, len(epochs) - 1)
                finished = sum(epochs[:index]) + epochs[index] * event.current / event.total
                self.inside = self.training[self.place] * finished / sum(epochs)
                if "last_epoch" in event.values:  # the training has stopped early
                    saved = epochs[index] - event.values["last_epoch"]
                    self.resumed += self.training[self.place] * saved / sum(epochs)
        return self.inside


class Progress:
    """Progress callback of a run: adds the time left to the values of events, and notes how long the parts took."""

    def __init__(self, show: Callable[[Event], None], steps: Sequence[Step], forecast: Forecast | None) -> None:
        self.show, self.forecast, self.left = show, forecast, TimeLeft(steps, forecast)
        self.key = SECONDS_LEFT if self.left.known else TRAINING_LEFT
        self.moments: dict[int, float] = {}  # of the first event of each part
        self.resumed: set[int] = set()

    def __call__(self, event: Event) -> None:
        seconds = self.left.after(event)
        if event.step == self.left.names[self.left.place]:
            self.moments.setdefault(self.left.place, time.monotonic())
            if event.phase == "resumed":
                self.resumed.add(self.left.place)
        self.show(event if seconds is None else replace(event, values={**event.values, self.key: seconds}))

    def report(self) -> dict[str, Any]:
        """The forecast for `run.json`, with the seconds that each part took; without those that this run resumed."""
        if self.forecast is None:
            return {}
        stored, now = self.forecast.to_dict(), time.monotonic()
        for place, part in enumerate(stored["parts"]):
            if place in self.moments and place not in self.resumed:
                after = [moment for later, moment in self.moments.items() if later > place]
                part["took"] = min(after, default=now) - self.moments[place]
        return {FORECAST: stored}
