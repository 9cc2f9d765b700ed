"""The search: trials at little cost, then the best in full, from as many workers as share the study."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torchslim._version import __version__
from torchslim.analysis.result import Sensitivity
from torchslim.core import distributed
from torchslim.core.arguments import checks_arguments
from torchslim.core.batches import take_first
from torchslim.core.files import digest, write_bytes, write_json
from torchslim.core.fingerprint import fingerprint
from torchslim.core.step import Event, Inputs, Target, ignore_progress, log_progress
from torchslim.core.task import Task
from torchslim.core.toml_writer import dumps
from torchslim.core.usable import usable
from torchslim.errors import RecipeError, TorchslimError
from torchslim.pipeline.options import RunOptions
from torchslim.pipeline.result import Result
from torchslim.pipeline.runner import run_steps
from torchslim.report import render_search
from torchslim.tuning.pareto import WHOLE, hopeless, near, next_finalist
from torchslim.tuning.result import SearchResult, data_of, entries_of
from torchslim.tuning.sampling import Sampler
from torchslim.tuning.search_folder import check_space, claim_folder, make_ledgers, mark_folder
from torchslim.tuning.shared import SAME
from torchslim.tuning.space import Space, make_space
from torchslim.tuning.study import Ledger
from torchslim.tuning.trial import Lab, trainings
from torchslim.tuning.warm_start import informed_start

WAIT_SECONDS = 1.0  # between looks at what other workers do
REPEATS = 30  # trials in a row that were tried before: the space is exhausted
GIVE_UP = 3  # so many trials that all fail, and none succeeded: something is wrong with all


@checks_arguments(RecipeError, earlier=("recipe", "model", "task"))
def search(
    model: nn.Module,
    task: Task,
    recipe: Mapping[str, Any] | Space,
    *,
    workdir: str | Path,
    teacher: nn.Module | None = None,
    storage: str | Path | None = None,
    study: str | None = None,
    sampler: Sampler = "gp",
    example_inputs: Inputs | None = None,
    dynamic_shapes: Any = "batch",
    beat: float = 5.0,
    progress: Callable[[Event], None] = log_progress,
) -> SearchResult:
    """Find the best recipes under a budget: a Pareto front of artifacts, each with its recipe.

    Each trial first runs without training and on a part of the data. Trials that violate a bound which training cannot
    change, or that others beat in everything, stop there. The others are trained in part. The best are then trained in
    full, deployed and measured. Steps that candidates share run once.

    An interrupted search resumes when it is called with the same folder. Any number of processes can share the storage
    and work on one search.

    Args:
        model, task: as for `compress`.
        recipe: the parsed TOML, with `{"search": [...]}` in place of each value that varies, and a "budget" table.
        teacher, example_inputs, dynamic_shapes: as for `compress`.
        workdir: folder of the search; the front's artifacts are in `front/`.
        storage: what workers share: an Optuna URL, or a file; by default one in `workdir`.
        study: its name in the storage; by default the folder's name.
        sampler: "gp" (Gaussian processes) needs few trials; "tpe" (densities) suits many trials or objectives, and "gp"
            turns to it there; "random" does not learn.
        beat: seconds between a worker's signs of life.
        progress: called with an `Event` at every phase.

    Raises:
        RecipeError: a range or budget that cannot be, or a folder or study that belongs to another search.
        StorageError: the storage cannot be reached.
    """
    model = usable(model)
    teacher = None if teacher is None else usable(teacher, what="the teacher")
    space = recipe if isinstance(recipe, Space) else make_space(recipe)
    folder = Path(workdir)
    check_space(space)
    distributed.connect()
    first = take_first(task.val, "val")
    whole = digest(
        space.key,
        __version__,
        fingerprint(model.state_dict()),
        fingerprint(first),
        "" if teacher is None else fingerprint(teacher.state_dict()),
        *_priors(space),
    )
    names = study or folder.resolve().name
    inputs: Any = task.inputs(first) if example_inputs is None else example_inputs
    if distributed.is_first():
        mark_folder(folder)
    studies = make_ledgers(space, names, whole, storage or folder / "study.journal", sampler, beat)
    if distributed.is_first():
        claim_folder(folder, whole, space)
    distributed.wait()
    lab = Lab(
        model=model,
        task=task,
        teacher=teacher,
        budget=space.budget,
        folder=folder / "cache",
        example_inputs=inputs,
        seed=space.document.get("seed", 0),
        dynamic_shapes=dynamic_shapes,
        short=space.budget.short,
        progress=progress if distributed.is_first() else ignore_progress,
    )
    work = _Search(space, lab, folder, studies)
    work.baselines()
    work.trials()
    work.finals()
    return work.result()


def _priors(space: Space) -> list[dict[str, float]]:
    known = space.document.get("sensitivity")
    return [Sensitivity.load(known).priors()] if known else []


class _Search:
    """One worker's part of a search."""

    def __init__(self, space: Space, lab: Lab, folder: Path, ledgers: tuple[Ledger, Ledger] | None) -> None:
        self.space, self.lab, self.folder, self.budget = space, lab, folder, space.budget
        self.ledgers = ledgers
        self.started = time.monotonic()
        self.results: dict[int, Result] = {}
        self.metric = lab.task.as_metric()

    def baselines(self) -> None:
        """Measure the original on every runtime, before any trial, so that deployment errors come at once."""
        for target in self._targets():
            if distributed.is_first():
                self.lab.progress(Event(step="search", phase=f"baseline on {target.runtime}"))
                self.lab.baseline(target)
        distributed.wait()

    def trials(self) -> None:
        """Until there are enough, and all other workers' are done."""
        if self.ledgers:
            known = self.space.document.get("sensitivity")
            informed = [informed_start(self.space, Sensitivity.load(known))] if known else []
            self.ledgers[0].enqueue([*informed, *self.space.starts])
        while True:
            job = self._next_trial()
            if job is None:
                break
            self._try(*job)

    def _next_trial(self) -> tuple[Any, dict[str, Any]] | None:
        """The next trial and its values, in all processes of this worker; None when the trials are over."""
        job: Any = None
        while self.ledgers:
            ledger = self.ledgers[0]
            late = self.budget.hours is not None and time.monotonic() - self.started > 3600 * self.budget.hours
            late = late or ledger.repeats() >= REPEATS
            trial = None if late else ledger.ask()
            if trial is not None:
                values = ledger.values(trial)
                if self._repeated(trial, values):
                    continue
                job = (trial, values)
                break
            if late or not ledger.waiting():
                break
            time.sleep(WAIT_SECONDS)  # what another worker is at work on may be left to this one
        told = distributed.told(None if job is None else job[1])
        return None if told is None else (job[0] if job else None, told)

    def _repeated(self, trial: Any, values: Mapping[str, Any]) -> bool:
        """Was the same recipe tried before? What differs then belongs to steps that are skipped."""
        assert self.ledgers
        ledger, recipe = self.ledgers[0], self._recipe(values)
        for first, earlier, result in ledger.results():
            if self._recipe(earlier) == recipe:
                ledger.tell(trial, {**result, SAME: first}, None)  # the sampler has heard of it
                return True
        return False

    def _try(self, trial: Any, values: dict[str, Any]) -> None:
        """One trial, and its result in the ledger."""
        start = time.perf_counter()
        if not self.ledgers:
            self._attempt(values, [])
            return
        ledger = self.ledgers[0]
        done = ledger.results()
        self.lab.progress(
            Event(step="search", phase=f"trial {trial.number}", current=len(done), total=self.budget.trials)
        )
        others = [each["cheap"] for _, _, each in done if each.get("cheap")]
        try:
            with ledger.beating(trial):
                result = self._attempt(values, others)
        except BaseException:
            ledger.give_back(trial)
            raise
        result["seconds"] = time.perf_counter() - start
        figures = result.get("figures")
        ledger.tell(trial, result, None if not figures else [figures[name] for name in self.budget.objectives])
        failed = [each["reason"] for _, _, each in ledger.results() if each["state"] == "failed"]
        if len(failed) >= GIVE_UP and len(failed) == len(ledger.results()):
            raise RecipeError(f"each of the first {len(failed)} trials failed; the last: {failed[-1]}")

    def _attempt(self, values: Mapping[str, Any], others: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Little, then more: figures, how far it came, and why no farther."""
        cheap, short = self.lab.efforts()
        result: dict[str, Any] = {"state": "failed", "stage": cheap.name, "reason": ""}
        try:
            recipe = self.space.recipe(values)
            figures = self.lab.attempt(recipe, cheap)
            result["cheap"] = figures
            why = distributed.told(hopeless(figures, others, self.budget))
            if not why:
                result["stage"] = short.name if any(map(trainings, recipe.steps)) else WHOLE
                figures = self.lab.attempt(recipe, short)
            excess = self.budget.excess(figures)
            return result | {
                "state": "stopped" if why else "candidate",
                "reason": why,
                "figures": figures,
                "excess": excess,
                "bad": excess if result["stage"] == WHOLE else near(figures, self.budget),
            }
        except TorchslimError as error:  # these values do not go together, or diverge: the search learns of it
            return result | {"reason": str(error)}

    def finals(self) -> None:
        """Train the best fully, one at a time, until there are enough."""
        while True:
            job = self._next_final()
            if job is None:
                break
            trial, chosen, values = job
            if not self.ledgers:
                self._full(chosen, values)
                continue
            ledger = self.ledgers[1]
            self.lab.progress(Event(step="search", phase=f"full training of trial {chosen}"))
            try:
                with ledger.beating(trial):
                    result = self._full(chosen, values)
            except BaseException:
                ledger.give_back(trial)
                raise
            ledger.tell(trial, result, [0.0] if result["state"] == "measured" else None)

    def _recipe(self, values: Mapping[str, Any]) -> str:
        return json.dumps(self.space.chosen(values), sort_keys=True, default=str)

    def _next_final(self) -> tuple[Any, int, dict[str, Any]] | None:
        job: Any = None
        while self.ledgers:
            trials, finals = self.ledgers
            found = {chosen: values for chosen, values, _ in trials.results()}
            results = {chosen: result for chosen, _, result in trials.results()}
            claims = {each: result for each, result in finals.claims().items() if "figures" in results.get(each, {})}
            chosen = next_finalist(results, claims, self.budget)
            if chosen is not None:
                trial = finals.claim({"trial": chosen})
                if trial is not None:
                    job = (trial, chosen, found[chosen])
                    break
            elif not finals.waiting():
                break
            time.sleep(WAIT_SECONDS)
        told = distributed.told(None if job is None else job[1:])
        return None if told is None else (job[0] if job else None, *told)

    def _full(self, chosen: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """A whole run of one recipe, saved with it."""
        recipe, lab = self.space.recipe(values), self.lab
        folder = self.folder / "front" / f"{chosen:03d}"
        try:
            options = RunOptions(
                target=recipe.target,
                example_inputs=lab.example_inputs,
                dynamic_shapes=lab.dynamic_shapes,
                teacher=lab.teacher,
                engine=recipe.engine,
                sensitivity=recipe.known_sensitivity(),
                seed=lab.seed,
                workdir=self.folder / "runs" / f"{chosen:03d}",
                stages=self.folder / "stages",
                names={"model": recipe.model, "task": recipe.task},
                progress=lab.progress,
            )
            result = run_steps(lab.model, lab.task, recipe.steps, options)
        except TorchslimError as error:
            return {"state": "failed", "trial": chosen, "reason": str(error), "within": False}
        self.results[chosen] = result
        if not distributed.is_first():
            return {}
        result.save(folder)
        write_bytes(folder / "recipe.toml", dumps(self.space.chosen(values)).encode())
        entries = entries_of(result, recipe.target, lab.baseline(recipe.target), self.metric, self.budget)
        figures = {name: entry["value"] for name, entry in entries.items()}
        return {
            "state": "measured",
            "trial": chosen,
            "metric": result.run["rows"][-1]["metric"],
            "figures": entries,
            "within": max(self.budget.excess(figures).values(), default=0.0) <= 0,
        }

    def _targets(self) -> list[Target]:
        threads = self.space.recipe(self.space.first).target.threads
        return [Target(runtime=name, threads=threads) for name in self.space.runtimes]

    def result(self) -> SearchResult:
        """The front, as it is measured; written to the folder by the first process."""
        data: Any = None
        if self.ledgers:
            trials, finals = (ledger.results() for ledger in self.ledgers)
            target = self._targets()[0]
            data = data_of(self.space, self.metric, target, self.lab.baseline(target), trials, finals, self.folder)
            write_json(self.folder / "search.json", data)
            write_bytes(self.folder / "report.html", render_search(data).encode())
        return SearchResult.of(distributed.told(data), self.folder, self.results)
