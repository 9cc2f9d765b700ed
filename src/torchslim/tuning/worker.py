"""One worker of a search: trials at reduced cost, then the best in full; workers share the study."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchslim.analysis.result import Sensitivity
from torchslim.core import distributed
from torchslim.core.files import write_bytes, write_json
from torchslim.core.program_names import first_programs
from torchslim.core.step import Event, Target
from torchslim.core.toml_writer import dumps
from torchslim.errors import RecipeError, TorchslimError
from torchslim.pipeline.options import RunOptions
from torchslim.pipeline.recipe import Recipe
from torchslim.pipeline.result import Result
from torchslim.pipeline.runner import run_steps
from torchslim.report import render_search
from torchslim.tuning.pareto import WHOLE, hopeless, near, next_finalist
from torchslim.tuning.result import Findings, SearchResult, data_of, entries_of
from torchslim.tuning.shared import SAME
from torchslim.tuning.space import Space
from torchslim.tuning.study import Ledger
from torchslim.tuning.trial import Lab, shortenable
from torchslim.tuning.warm_start import informed_start

WAIT_SECONDS = 1.0  # before asking again for a trial, while other workers run theirs
REPEATS = 30  # trials in a row with recipes that were tried before: the space is exhausted
GIVE_UP = 3  # failed trials without a success before the search stops: all have the same fault


class Worker:
    """One worker's part of a search.

    Args:
        space: searched space, with its budget.
        lab: runs trials.
        folder: folder of the search.
        ledgers: studies of the trials and of the full trainings; None in all but the first process of a worker.
    """

    def __init__(self, space: Space, lab: Lab, folder: Path, ledgers: tuple[Ledger, Ledger] | None) -> None:
        self.space, self.lab, self.folder, self.budget = space, lab, folder, space.budget
        self.ledgers = ledgers
        self.started = time.monotonic()
        self.results: dict[int, Result] = {}
        self.metric = lab.task.as_metric()

    def run(self) -> SearchResult:
        """Run baselines, trials and full trainings, and return the result."""
        self._measure_baselines()
        self._run_trials()
        self._run_finals()
        return self._result()

    def _measure_baselines(self) -> None:
        """Measure the original on every runtime, before any trial, so that deployment errors are raised at once."""
        for target in self._targets():
            if distributed.is_first():
                self.lab.progress(Event(step="search", phase=f"baseline on {target.runtime}"))
                self.lab.baseline(target)
        distributed.wait()

    def _run_trials(self) -> None:
        """Run trials until there are enough, and those of all other workers are finished."""
        self._enqueue_first()
        while (job := self._next_trial()) is not None:
            self._try(*job)

    def _enqueue_first(self) -> None:
        """Enqueue the first trials: those that a sensitivity analysis suggests, and the fixed ones."""
        if self.ledgers:
            sensitivity = self.space.document.get("sensitivity")
            informed = [informed_start(self.space, Sensitivity.load(sensitivity))] if sensitivity else []
            self.ledgers[0].enqueue([*informed, *self.space.starts])

    def _next_trial(self) -> tuple[Any, dict[str, Any]] | None:
        """Next trial and its values, the values in all processes of this worker; None if there are no more."""
        job: Any = None
        while self.ledgers:
            ledger = self.ledgers[0]
            over = self._out_of_time() or ledger.repeats() >= REPEATS
            trial = None if over else ledger.ask()
            if trial is not None:
                values = ledger.values(trial)
                if self._repeated(trial, values):
                    continue
                job = (trial, values)
                break
            if over or not ledger.waiting():
                break
            time.sleep(WAIT_SECONDS)  # a running trial is given to this worker if the other worker dies
        shared_values = distributed.told(None if job is None else job[1])
        return None if shared_values is None else (job[0] if job else None, shared_values)

    def _out_of_time(self) -> bool:
        hours = self.budget.hours
        return hours is not None and time.monotonic() - self.started > 3600 * hours

    def _repeated(self, trial: Any, values: Mapping[str, Any]) -> bool:
        """Store the result of an earlier trial with the same recipe, if there is one, and return whether there is.

        Different values give the same recipe if the steps that they belong to are skipped.
        """
        assert self.ledgers
        ledger, recipe = self.ledgers[0], self._recipe_text(values)
        for earlier, earlier_values, result in ledger.results():
            if self._recipe_text(earlier_values) == recipe:
                ledger.tell(trial, {**result, SAME: earlier}, None)  # without values: the sampler has this result
                return True
        return False

    def _try(self, trial: Any, values: dict[str, Any]) -> None:
        """Run a trial and store its result."""
        start = time.perf_counter()
        if not self.ledgers:
            self._attempt(values, [])
            return
        ledger = self.ledgers[0]
        earlier = [result for _, _, result in ledger.results()]
        self.lab.progress(
            Event(step="search", phase=f"trial {trial.number}", current=len(earlier), total=self.budget.trials)
        )
        others = [result["cheap"] for result in earlier if result.get("cheap")]
        try:
            with ledger.beating(trial):
                result = self._attempt(values, others)
        except BaseException:
            ledger.give_back(trial)
            raise
        self._tell(trial, result, start)

    def _tell(self, trial: Any, result: dict[str, Any], start: float) -> None:
        """Store the result of a trial that began at `start`; end a search whose first trials all failed."""
        assert self.ledgers
        ledger = self.ledgers[0]
        result["seconds"] = time.perf_counter() - start
        figures = result.get("figures")
        ledger.tell(trial, result, None if not figures else [figures[name] for name in self.budget.objectives])
        results = [result for _, _, result in ledger.results()]
        if len(results) >= GIVE_UP and all(result["state"] == "failed" for result in results):
            raise RecipeError(f"each of the first {len(results)} trials failed; the last: {results[-1]['reason']}")

    def _attempt(self, values: Mapping[str, Any], others: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Run a recipe without training, then, unless it is hopeless, with short training; return the trial's result.

        Args:
            values: values of the parameters.
            others: figures of earlier trials without training.
        """
        cheap, short = self.lab.efforts()
        result: dict[str, Any] = {"state": "failed", "stage": cheap.name, "reason": ""}
        try:
            recipe = self.space.recipe(values)
            figures = self.lab.attempt(recipe, cheap)
            result["cheap"] = figures
            reason = distributed.told(hopeless(figures, others, self.budget))
            if not reason:
                result["stage"] = short.name if any(map(shortenable, recipe.steps)) else WHOLE
                figures = self.lab.attempt(recipe, short)
            excess = self.budget.excess(figures)
            return result | {
                "state": "stopped" if reason else "candidate",
                "reason": reason,
                "figures": figures,
                "excess": excess,
                "bad": excess if result["stage"] == WHOLE else near(figures, self.budget),
            }
        except TorchslimError as error:  # a combination that cannot run is a result, too: the sampler avoids it
            return result | {"reason": str(error)}

    def _run_finals(self) -> None:
        """Train the best in full, one at a time, until there are enough."""
        while (job := self._next_final()) is not None:
            claim, number, values = job
            if not self.ledgers:
                self._train_fully(number, values)
                continue
            ledger = self.ledgers[1]
            self.lab.progress(Event(step="search", phase=f"full training of trial {number}"))
            try:
                with ledger.beating(claim):
                    result = self._train_fully(number, values)
            except BaseException:
                ledger.give_back(claim)
                raise
            ledger.tell(claim, result, [0.0] if result["state"] == "measured" else None)

    def _recipe_text(self, values: Mapping[str, Any]) -> str:
        """The recipe with these values, without the steps that are skipped, as comparable text."""
        return json.dumps(self.space.chosen(values), sort_keys=True, default=str)

    def _next_final(self) -> tuple[Any, int, dict[str, Any]] | None:
        """Claim, number and values of the next finalist, the last two in all processes of this worker; None if over."""
        job: Any = None
        while self.ledgers:
            trials, finals = self.ledgers
            finished = trials.results()
            results = {number: result for number, _, result in finished}
            claims = {
                number: result for number, result in finals.claims().items() if "figures" in results.get(number, {})
            }
            number = next_finalist(results, claims, self.budget)
            if number is not None:
                claim = finals.claim({"trial": number})
                if claim is not None:
                    job = (claim, number, next(values for trial, values, _ in finished if trial == number))
                    break
            elif not finals.waiting():
                break
            time.sleep(WAIT_SECONDS)
        shared_job = distributed.told(None if job is None else job[1:])
        return None if shared_job is None else (job[0] if job else None, *shared_job)

    def _train_fully(self, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run the recipe of a trial in full, save its artifact and its recipe, and return the result."""
        recipe, lab = self.space.recipe(values), self.lab
        folder = self.folder / "front" / f"{number:03d}"
        try:
            place = self.folder / "runs" / f"{number:03d}"
            options = run_options(recipe, lab, workdir=place, stages=self.folder / "stages")
            result = run_steps(lab.model, lab.task, recipe.steps, options)
        except TorchslimError as error:
            return {"state": "failed", "trial": number, "reason": str(error), "within": False}
        self.results[number] = result
        if not distributed.is_first():
            return {}
        result.save(folder)
        write_bytes(folder / "recipe.toml", dumps(self.space.chosen(values)).encode())
        entries = entries_of(result, recipe.target, lab.baseline(recipe.target), self.metric, self.budget)
        figures = {name: entry["value"] for name, entry in entries.items()}
        return {
            "state": "measured",
            "trial": number,
            "metric": result.run["rows"][-1]["metric"],
            "figures": entries,
            "within": max(self.budget.excess(figures).values(), default=0.0) <= 0,
        }

    def _targets(self) -> list[Target]:
        threads = self.space.recipe(self.space.first).target.threads
        return [Target(runtime=name, threads=threads) for name in self.space.runtimes]

    def _explained(self) -> dict[int, dict[str, Any]]:
        """Explanations by trial; a sampler has none."""
        return {}

    def _spent_on(self) -> dict[str, float]:
        """Seconds and epochs by what they were spent on; not counted for a sampler."""
        return {}

    def _result(self) -> SearchResult:
        """Write `search.json` and `report.html` in the first process, and return the result in every process."""
        data: Any = None
        if self.ledgers:
            trials, finals = (ledger.results() for ledger in self.ledgers)
            target = self._targets()[0]
            findings = Findings(
                target=target,
                baseline=self.lab.baseline(target),
                trials=trials,
                finals=finals,
                explained=self._explained(),
                spent=self._spent_on(),
            )
            data = data_of(self.space, self.metric, findings, self.folder)
            write_json(self.folder / "search.json", data)
            write_bytes(self.folder / "report.html", render_search(data).encode())
        return SearchResult.of(distributed.told(data), self.folder, self.results)


def run_options(recipe: Recipe, lab: Lab, workdir: Path | None = None, stages: Path | None = None) -> RunOptions:
    """Options of a run of one recipe in full, in the folders of the search."""
    return RunOptions(
        target=recipe.target,
        example_inputs=None if lab.examples else lab.example_inputs,  # the run then takes the same examples
        dynamic_shapes=lab.dynamic_shapes,
        part=first_programs(lab.parts) or None,
        teacher=lab.teacher,
        engine=recipe.engine,
        sensitivity=recipe.known_sensitivity(),
        seed=lab.seed,
        names={"model": recipe.model, "task": recipe.task},
        progress=lab.progress,
        rehearse=False,
        worker=lab.worker,
        workdir=workdir,
        stages=stages,
    )
