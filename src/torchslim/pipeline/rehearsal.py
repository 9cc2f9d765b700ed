"""The rehearsal of a run: every step at least effort through the run's own code, so that nothing fails late.

A rehearsal judges that things run, not how well: two or three batches of each split, one epoch, one round. It leaves
nothing behind but its record, which says that it passed, and holds the forecast that its timed batches give.
"""

from __future__ import annotations

import json
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from annotated_types import MaxLen
from torch import nn
from typing_extensions import TypedDict

from torchslim.artifact.assembled import AnyDeployed, pieces
from torchslim.artifact.deployment import UnverifiedDeployment
from torchslim.artifact.loading import load_opened, opened_for_loading
from torchslim.artifact.storage import write_artifact
from torchslim.core import distributed
from torchslim.core.files import TEMPORARY, digest, present, remove, write_json
from torchslim.core.imports import own_line
from torchslim.core.isolation import preserved_globals
from torchslim.core.parts import part_views
from torchslim.core.schema import Schema
from torchslim.core.seals import is_sealed, key_id, seal
from torchslim.core.step import REHEARSAL, Context, Event, Rehearses, Step, Target, Times, Trains, step_name
from torchslim.core.terminal import printable
from torchslim.errors import StorageError, TaskError, TorchslimError
from torchslim.pipeline.forecast import ARTIFACT, BASELINE, Counts, Forecast, Part, Timed, expected, memory
from torchslim.pipeline.small_task import small
from torchslim.pipeline.stage_timing import timing_seconds
from torchslim.pipeline.stages import Stage, stage_key
from torchslim.pipeline.target_bench import Bench
from torchslim.quantize import Quantize
from torchslim.quantize.rollback import Unverified
from torchslim.report.records import ForecastOf, strict
from torchslim.training.finetune import Training

RECORD_FILE = "rehearsal.json"
FOLDER = f"{TEMPORARY}rehearsal"
SKIP = "rehearse=False (--no-rehearse) leaves the rehearsal out"


class Attempt(Protocol):
    """A run that stores its stages in a folder."""

    def baseline(self, model: nn.Module, masks: Any) -> Stage: ...
    def take(self, index: int, step: Step, before: Stage) -> Stage: ...
    def report(self, stages: list[Stage], recipe: dict[str, Any]) -> dict[str, Any]: ...


Make = Callable[[Context, Sequence[Step], Path], Attempt]
"""Begins a run with a context and steps in a folder."""


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """Result of a rehearsal: the forecast, and the deployed baseline, which the run uses again; None without one."""

    forecast: Forecast | None = None
    baseline: AnyDeployed | None = None


@strict
class Record(TypedDict):
    """Content of `rehearsal.json`: the rehearsal of the run with this key has passed; `seal` binds the forecast."""

    format: Literal["torchslim-rehearsal"]
    version: Literal[1]
    key_id: Annotated[str, MaxLen(64)]
    forecast: ForecastOf
    seal: Annotated[str, MaxLen(64)]


RECORD: Schema[Record] = Schema(Record, RECORD_FILE, StorageError)


def run_key(origin: str, target: Target, steps: Sequence[Step], seed: int) -> str:
    """Digest of all that a run's last stage depends on."""
    key = digest(origin, asdict(target))
    for step in steps:
        key = stage_key(key, step, steps, seed)
    return key


def rehearsed_once(
    ctx: Context, steps: Sequence[Step], make: Make, folder: Path, key: str, *, older_s: float = 0.0
) -> Rehearsed:
    """Rehearse a run unless the record in its folder says that this was done; shows the forecast in either case.

    Args:
        ctx: the context of the run.
        steps: the steps of the run.
        make: begins a run; called with a task of few batches and with steps at least effort.
        folder: the working folder; it must exist, and its disk must hold the stages of the rehearsal meanwhile.
        key: see `run_key`.
        older_s: minimum age of folders that killed rehearsals left and that are deleted; above 0 where several
            processes rehearse in the folder at once.

    Raises:
        TorchslimError: of the kind of the error that the run would meet; names the step and the line.
    """
    stored = distributed.told(_read(folder / RECORD_FILE, key) if distributed.is_first() else None)
    if stored is not None:
        forecast = Forecast.of(stored)
        ctx.progress(forecast.event())
        return Rehearsed(forecast=forecast)
    if distributed.is_first():
        _clean(folder, older_s)
    rehearsed = rehearse(ctx, steps, make, folder / distributed.told(f"{FOLDER}-{secrets.token_hex(4)}"))
    if distributed.is_first() and rehearsed.forecast is not None:
        _write(folder / RECORD_FILE, key, rehearsed.forecast)
    return rehearsed


def rehearse(ctx: Context, steps: Sequence[Step], make: Make, folder: Path) -> Rehearsed:
    """Take every step at least effort in a folder that is deleted at the end, and show the forecast of the run.

    Args, errors: as of `rehearsed_once`.
    """
    try:
        # a few batches and no training give warnings about quality; the run itself warns again
        with preserved_globals(ctx.seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            forecast, baseline = _Rehearsal(ctx, steps, make, folder).play()
    finally:
        if distributed.is_first():
            remove(folder)
    forecast = Forecast.of(distributed.told(forecast.to_dict()))
    ctx.progress(forecast.event())
    return Rehearsed(forecast=forecast, baseline=baseline)


def _clean(folder: Path, older_s: float) -> None:
    """Delete the folders of rehearsals that were killed."""
    for path in folder.glob(f"{FOLDER}-*"):
        with suppress(FileNotFoundError):  # another process has deleted it
            if path.lstat().st_mtime <= time.time() - older_s:
                remove(path)


def _read(path: Path, key: str) -> dict[str, Any] | None:
    """The forecast of an earlier rehearsal under this key; None where there is none, or its record is damaged."""
    if not present(path):
        return None
    try:
        record = RECORD.read(path)
    except StorageError:
        return None  # a rehearsal is cheap: it is done again
    content = {name: value for name, value in record.items() if name != "seal"}
    if record["key_id"] != key_id(key) or not is_sealed(record["seal"], key, content):
        return None
    return dict(record["forecast"])


def _write(path: Path, key: str, forecast: Forecast) -> None:
    record = {"format": "torchslim-rehearsal", "version": 1, "key_id": key_id(key), "forecast": forecast.to_dict()}
    record = json.loads(json.dumps(record, allow_nan=False))
    write_json(path, record | {"seal": seal(key, record)})


class _Rehearsal:
    """One rehearsal, with the times of its parts."""

    def __init__(self, ctx: Context, steps: Sequence[Step], make: Make, folder: Path) -> None:
        self.ctx, self.steps, self.folder = ctx, steps, folder
        self.least = [at_least_effort(step, folder) for step in steps]
        self.timed, self.started = Timed(), time.perf_counter()
        task = small(ctx.task, self._evaluated)
        self.attempt = make(replace(ctx, task=task, progress=self._see), self.least, folder / "run")

    def play(self) -> tuple[Forecast, AnyDeployed]:
        """Take all parts; returns the forecast and the deployed baseline."""
        ctx = self.ctx
        assert ctx.model is not None
        counts, parts, stages = Counts.of(ctx.task, distributed.count()), list[Part](), list[Stage]()
        with self._part(0, BASELINE):
            stages.append(self.attempt.baseline(ctx.model, ctx.masks))
        self.timed.seconds -= self.timed.deploying  # the run uses the deployed baseline again
        parts.append(expected(BASELINE, self.timed, counts, (), ()))
        for index, (step, least) in enumerate(zip(self.steps, self.least, strict=True), 1):
            name = step_name(step)
            with self._part(index, name):
                stages.append(self._taken(index, least, stages[-1]))
            part = expected(name, self.timed, counts, _epochs(step), _epochs(least))
            if part.seconds is not None:
                part = replace(part, seconds=part.seconds + self._timing_programs(step, stages[-2]))
            parts.append(part)
        run: dict[str, Any] = {}
        with self._part(len(self.steps) + 1, ARTIFACT):
            if distributed.is_first():
                run = self.attempt.report(stages, {})
                self._saved_and_loaded(stages[-1])
        measured = expected(ARTIFACT, self.timed, counts, (), ())
        if measured.seconds is not None and distributed.is_first():
            measured = replace(measured, seconds=measured.seconds + timing_seconds(run))
        return Forecast(parts=(*parts, measured), **memory()), stages[0].deployed

    def _timing_programs(self, step: Step, before: Stage) -> float:
        """Seconds in which the step times programs on the target: their number times the time for one of them."""
        bench = self.ctx.workbench
        if not isinstance(step, Times) or not isinstance(bench, Bench):
            return 0.0
        with explained("the timing of programs"):
            programs = step.timed_programs(before.model, replace(self.ctx, masks=before.masks))
            views = part_views(before.model, self.ctx.parts) if programs else {}
            return sum(
                count * (bench.within(path) if path else bench).seconds_by_program(views[path])
                for path, count in programs.items()
            )

    def _taken(self, index: int, step: Step, before: Stage) -> Stage:
        """Take a step; without checks where only these fail: they depend on weights that the run would train."""
        try:
            return self.attempt.take(index, step, before)
        except (Unverified, UnverifiedDeployment):
            if not isinstance(step, Quantize):
                raise
            return self.attempt.take(index, replace(step, checks=None), before)

    def _saved_and_loaded(self, last: Stage) -> None:
        """Save the artifact, load it or its parts in this process, and run them."""
        folder = self.folder / "saved"
        write_artifact(folder, deployed=last.deployed, module=last.module, masks=last.masks)
        places = opened_for_loading(folder, None, None).programs()
        for path, piece in pieces(last.deployed).items():
            if piece.suffixes:  # machine code in it was just written here
                loaded = load_opened(places[path], trusted=True)
                loaded.run(list(loaded.example))

    @contextmanager
    def _part(self, number: int, name: str) -> Iterator[None]:
        """Time a part, and say in its errors where they arose."""
        what = f"step {number} ({name!r})" if 0 < number <= len(self.steps) else f"the {name}"
        total = len(self.steps) + 2
        self.ctx.progress(Event(step=REHEARSAL, phase="parts", current=number, total=total))
        self.timed, self.started = Timed(), time.perf_counter()
        with explained(what):
            yield
        self.timed.seconds = time.perf_counter() - self.started
        if name == ARTIFACT:
            self.ctx.progress(Event(step=REHEARSAL, phase="parts", current=total, total=total))

    def _see(self, event: Event) -> None:
        self.timed.see(event, time.perf_counter() - self.started)

    def _evaluated(self, seconds: float, batches: int | None) -> None:
        """Note the time of an evaluation; without batches it was one that is repeated on more."""
        if batches is None:
            self.timed.retries += seconds
        else:
            self.timed.evaluations.append((seconds, batches))


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Name the part of the rehearsal in its errors, and the line of the user's code that they come from.

    An error of torchslim keeps its kind. An exception from the user's code becomes a TaskError; any other one is a bug
    of torchslim and stays as it is.
    """
    try:
        yield
    except TorchslimError as error:
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == TorchslimError.__module__)
        line = own_line(_first_cause(error))
        where = f" ({line})" if line and line not in str(error) else ""
        raise kind(f"the rehearsal of {what} failed: {error}{where}; {SKIP}") from error
    except (Exception, SystemExit) as error:
        line = own_line(error)
        if not line:
            error.add_note(f"raised in the rehearsal of {what}; {SKIP}")
            raise
        text = printable(" ".join(str(error).split())[:300])
        said = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise TaskError(f"the rehearsal of {what} failed: {said} ({line}); change this line; {SKIP}") from error


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def at_least_effort(step: Any, folder: Path) -> Any:
    """The step as a rehearsal takes it: `rehearsed`, or else with its trainings rehearsed, or else as it is."""
    if isinstance(step, Rehearses):
        return step.rehearsed(folder)
    if not is_dataclass(step) or isinstance(step, type):
        return step
    trainings = {
        field_.name: training.rehearsed(folder)
        for field_ in fields(step)
        if field_.init and isinstance(training := getattr(step, field_.name), Training)
    }
    return replace(step, **trainings) if trainings else step


def _epochs(step: Step) -> Sequence[int]:
    return step.trainings() if isinstance(step, Trains) else ()
