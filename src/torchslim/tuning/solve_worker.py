"""One worker of a solved search: it solves for a recipe, trains and measures it, learns from it, and solves again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchslim.allocation.problem import Problem
from torchslim.allocation.solver import solve
from torchslim.core import distributed
from torchslim.core.batches import take_first
from torchslim.core.budget import UNITS
from torchslim.core.step import Event, Trains
from torchslim.errors import RecipeError
from torchslim.tuning.choices import AFTER, ALONE, TRAIN, SolvedSpace, epochs_by_prefix, solved_space
from torchslim.tuning.explaining import explained
from torchslim.tuning.pareto import WHOLE
from torchslim.tuning.proposing import ORIGINAL, Proposal, Proposer, Seen, Tables
from torchslim.tuning.shared_tables import (
    COSTS,
    DAMAGE,
    SharedTables,
    costs_from_json,
    costs_to_json,
    damage_from_json,
    damage_to_json,
)
from torchslim.tuning.solved_costs import FIGURES, Costs, Question
from torchslim.tuning.space import Space
from torchslim.tuning.study import Design, Ledger
from torchslim.tuning.tables import make_tables, measure_damage
from torchslim.tuning.trial import Lab
from torchslim.tuning.worker import WAIT_SECONDS, Worker


@dataclass(frozen=True, kw_only=True)
class Solving:
    """The decisions of a search and their costs, measured before its study is opened."""

    space: SolvedSpace
    costs: Costs

    shared: SharedTables | None

    def worker(self, lab: Lab, folder: Path, ledgers: tuple[Ledger, Ledger] | None, key: str) -> SolveWorker:
        """The worker of this process."""
        return SolveWorker(self.space, lab, folder, ledgers, self.costs, self.shared, key)


def begun_solving(space: Space, lab: Lab, shared: SharedTables | None) -> Solving:
    """Measure the costs of the decisions, or read those of another worker, and share them with the other processes.

    Args:
        space, lab: of the search.
        shared: measurements in the storage; None in all but the first process of a distributed training.

    Raises:
        TaskError: a step trains, and the task has no training data.
        Infeasible: no choice keeps the budget's bounds of costs.
    """
    steps = space.recipe(space.whole(0.5)).steps
    if any(sum(step.trainings()) for step in steps if isinstance(step, Trains)):
        take_first(lab.task.train, "train")  # before what may take minutes
    costs: Costs | None = None
    if shared is not None:
        question = Question.of(lab, space)
        shared.agree(question.empty.decisions)
        names = [name for name in FIGURES if name in lab.budget.figures]
        costs = shared.once(
            COSTS,
            lambda: question.measured(lab),
            costs_to_json,
            lambda content: costs_from_json(content, question.empty, names),
        )
        bounds = {name: bound for name, bound in space.budget.bounds.items() if name in costs.costs}
        solve(Problem(decisions=costs.decisions, damage=(), costs=costs.costs, limits=bounds))
    decisions, members, blocks = distributed.told(
        None if costs is None else (costs.decisions, dict(costs.members), dict(costs.blocks))
    )
    if costs is None:
        costs = Costs(decisions=decisions, costs={}, members=members, blocks=blocks)
    return Solving(space=solved_space(space, decisions, members, blocks), costs=costs, shared=shared)


class SolveWorker(Worker):
    """A worker whose trials are solutions, each trained in full.

    Args:
        space: of the decisions.
        lab, folder, ledgers: as for `Worker`.
        costs: of the decisions.
        shared: measurements in the storage; None in all but the first process of a worker.
        key: of the search.
    """

    space: SolvedSpace

    def __init__(
        self,
        space: SolvedSpace,
        lab: Lab,
        folder: Path,
        ledgers: tuple[Ledger, Ledger] | None,
        costs: Costs,
        shared: SharedTables | None,
        key: str,
    ) -> None:
        super().__init__(space, lab, folder, ledgers)
        self.costs, self.shared, self.key = costs, shared, key
        self.tables: Tables | None = None
        self.damage_seconds = 0.0
        self.claims: Ledger | None = None
        if ledgers is not None:
            design = Design(trials=10**9, objectives=1)
            trials = ledgers[0]
            self.claims = Ledger(trials.storage, f"{trials.name}/proposals", key, design, beat=trials.beat)

    def _run_trials(self) -> None:
        """Measure the tables, then propose and train recipes until the front needs no more."""
        if self.shared is not None:
            start = time.perf_counter()
            damage, law = self.shared.once(
                DAMAGE,
                lambda: measure_damage(self.lab, self.space, self.costs, self.folder / "tables", self.key),
                damage_to_json,
                lambda content: damage_from_json(content, self.costs.decisions),
            )
            self.tables = make_tables(self.budget, self.costs, damage, law)
            self.damage_seconds = time.perf_counter() - start
        distributed.wait()
        super()._run_trials()

    def _enqueue_first(self) -> None:
        """Enqueue nothing: trials are proposed when the tables and the earlier ones are known."""

    def _run_finals(self) -> None:
        """Train nothing more: each trial was trained in full."""

    def _next_trial(self) -> tuple[Any, dict[str, Any]] | None:
        job: Any = None
        while self.ledgers:
            ledger = self.ledgers[0]
            self.space.trained.update(ledger.known_values(lost=True))  # others may go on from a trial that was lost
            if ledger.queued():
                trial = ledger.ask(drawn=False)
                if trial is not None:
                    job = (trial, ledger.values(trial))
                    break
                if ledger.count() >= self.budget.trials:
                    break
                continue
            if not self._out_of_time() and self._propose():
                continue
            if not ledger.waiting():
                break
            time.sleep(WAIT_SECONDS)
        message = None if job is None else (job[0].number, job[1], dict(self.space.trained))
        shared: Any = distributed.told(message)
        if shared is None:
            return None
        self.number, values, trained = shared
        self.space.trained.update(trained)
        return (job[0] if job else None, values)

    def _propose(self) -> bool:
        """Enqueue the next proposal, unless another worker proposes it; False if there is none."""
        assert self.ledgers
        assert self.claims is not None
        number = self.ledgers[0].size()  # before the trials are read: a stale proposal is then claimed already
        proposal = self._proposal(self._seen())
        if proposal is None:
            return False
        claim = self.claims.claim({"trial": number})
        if claim is None:
            time.sleep(WAIT_SECONDS)
            return True
        if self.ledgers[0].size() != number:  # meanwhile a trial was enqueued, such as that of a dead worker
            self.claims.give_back(claim)
            return True
        with self.claims.beating(claim):
            self.ledgers[0].queue({**proposal.solution.options, AFTER: proposal.after, TRAIN: proposal.train})
        self.claims.tell(claim, {"state": "candidate"}, [0.0])
        return True

    def _proposal(self, seen: list[Seen]) -> Proposal | None:
        cost = self._epochs_of_one()
        trials_left = self.budget.trials - len(seen)
        if trials_left < 1:
            return None
        remaining = min(trials_left, int((self._allowed() - self._spent()) // cost)) if cost else trials_left
        return self._proposer().propose(seen, remaining)

    def _proposer(self) -> Proposer:
        assert self.tables is not None
        bounds = self.budget.bounds
        wanted = bounds.get(self.tables.cost)
        if wanted is not None and self.tables.cost == "latency":
            wanted /= self.costs.spread  # the upper end of what the tables may be wrong by
        target = self.space.recipe(self.space.first).target
        return Proposer(
            self.tables,
            metric=self.lab.baseline(target)["metric"],
            wanted_drop=bounds.get("metric_drop"),
            wanted_cost=wanted,
            changes=bool(self.space.recipe(self.space.first).steps),
        )

    def _seen(self) -> list[Seen]:
        """Every trial as the proposer takes it; those without a result are being trained, or have failed."""
        assert self.ledgers
        assert self.tables is not None
        proposer = self._proposer()
        results = {number: result for number, _, result in self.ledgers[0].results()}
        seen = []
        for number, values in sorted(self.ledgers[0].known_values().items()):
            chosen = {name: value for name, value in values.items() if name not in ALONE}
            places = self.tables.problem.places(chosen)
            figures = results.get(number, {}).get("figures")
            removes = any(
                place and not decision.name.startswith("scheme ")
                for decision, place in zip(self.space.decisions, places, strict=True)
            )
            seen.append(
                Seen(
                    number=number,
                    places=places,
                    cost=figures[self.tables.cost] if figures else proposer.predicted(places),
                    drop=figures["metric_drop"] if figures else None,
                    trains=removes and values.get(TRAIN, True) and (figures is not None or number not in results),
                    after=values.get(AFTER, ORIGINAL),
                )
            )
        return seen

    def _explained(self) -> dict[int, dict[str, Any]]:
        seen = [each for each in self._seen() if each.drop is not None]
        units = {**UNITS, "metric_drop": self.metric.unit}
        proposer = self._proposer()
        return {
            each.number: explained(proposer, each, [other for other in seen if other.number < each.number], seen, units)
            for each in seen
        }

    def _spent_on(self) -> dict[str, float]:
        assert self.ledgers
        trained = sum(result.get("seconds", 0.0) for _, _, result in self.ledgers[0].results())
        return {
            "costs, seconds": self.costs.seconds,
            "damage, seconds": self.damage_seconds,
            "trials, seconds": trained,
            "training, epochs": float(self._spent()),
        }

    def _epochs_of_one(self) -> int:
        """Epochs that one more recipe trains."""
        steps = self.space.recipe(self.space.strongest).steps
        return sum(sum(step.trainings()) for step in steps if isinstance(step, Trains))

    def _allowed(self) -> float:
        """Most epochs of all trainings."""
        budget = self.budget
        if budget.epochs is not None:
            return budget.epochs
        return self._epochs_of_one() * (budget.trials * budget.short + budget.finalists)

    def _spent(self) -> int:
        """Epochs of all trainings of the trials so far, shared ones counted once."""
        assert self.ledgers
        epochs: dict[str, int] = {}
        for values in self.ledgers[0].known_values().values():
            with suppress(RecipeError):  # stored by somebody else, and after a trial that does not exist
                epochs |= epochs_by_prefix(self.space.recipe(values), self.space.chosen(values))
        return sum(epochs.values())

    def _try(self, trial: Any, values: dict[str, Any]) -> None:
        """Train and measure a recipe in full, and store the result."""
        start = time.perf_counter()
        if not self.ledgers:
            self._made(values)
            return
        ledger, finals = self.ledgers
        earlier = len(ledger.results())
        self.lab.progress(
            Event(step="search", phase=f"trial {trial.number}", current=earlier, total=self.budget.trials)
        )
        try:
            with ledger.beating(trial):
                result, final = self._made(values)
        except BaseException:
            ledger.give_back(trial)
            raise
        claim = finals.claim({"trial": trial.number}) if final else None
        if claim is not None:
            finals.tell(claim, final, [0.0] if final["state"] == "measured" else None)
        self._tell(trial, result, start)

    def _made(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Results of the trial and of its full training."""
        result: dict[str, Any] = {"state": "failed", "stage": WHOLE, "reason": ""}
        try:
            self.space.recipe(values)
        except RecipeError as error:
            return result | {"reason": str(error)}, {}
        final = self._train_fully(self.number, dict(values))
        if not final or final["state"] == "failed":
            return result | {"reason": final.get("reason", "")}, final
        figures = {name: final["figures"][name]["value"] for name in self.budget.figures}
        return result | {"state": "candidate", "figures": figures, "excess": self.budget.excess(figures)}, final
