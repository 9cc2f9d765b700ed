"""Draw the values of the next trial with a sampler that sees only checked trials, never the storage itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torchslim.tuning.shared import Row
from torchslim.tuning.space import Parameter

Sampler = Literal["gp", "tpe", "random"]
CONSTRAINTS = "constraints"  # attribute in which Optuna's samplers read constraints; above 0 is a violation
GP_TRIALS, GP_OBJECTIVES = 150, 3  # beyond these numbers, Gaussian processes take too long
STARTUP = 10  # random trials before the sampler learns from results, or a third of all trials if that is less


def draw(
    parameters: Sequence[Parameter],
    rows: Sequence[Row],
    sampler: Sampler,
    *,
    seed: int,
    number: int,
    trials: int,
    objectives: int,
    bounds: int,
) -> dict[str, Any]:
    """Values of the next trial as Optuna stores them: choices as indices.

    Args:
        parameters: of the space.
        rows: the other trials of the study; Optuna sees only these, in a study in memory.
        sampler: "random" learns from none of the rows.
        seed: equal seeds and rows give equal values, so an interrupted search resumes with the same trials.
        number: number of trials with results.
        trials: number of trials in the budget.
        objectives: number of objectives.
        bounds: number of constraints.
    """
    import optuna

    kinds = distributions(parameters)
    options: Any = {
        "seed": seed,
        "n_startup_trials": min(STARTUP, max(4, trials // 3)),
        "constraints_func": (lambda trial: ()) if bounds else None,  # the constraints come with the trials
    }
    if sampler == "random":
        optuna_sampler: Any = optuna.samplers.RandomSampler(seed=seed)
    elif sampler == "gp" and number < GP_TRIALS and objectives <= GP_OBJECTIVES:
        optuna_sampler = optuna.samplers.GPSampler(**options)
    else:
        optuna_sampler = optuna.samplers.TPESampler(**options, multivariate=True)
    study = optuna.create_study(directions=["minimize"] * objectives, sampler=optuna_sampler)
    for row in rows:
        violations = list((row.result or {}).get("bad", {}).values())
        judged = row.objectives is not None and (not bounds or len(violations) == bounds)
        if row.values is None or not (judged or row.running):
            continue
        state = optuna.trial.TrialState.COMPLETE if judged else optuna.trial.TrialState.RUNNING
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=row.objectives if judged else None,
                params=row.values,
                distributions=kinds,
                system_attrs={CONSTRAINTS: violations} if judged and bounds else {},
            )
        )
    return dict(study.ask(kinds).params)


def distributions(parameters: Sequence[Parameter]) -> dict[str, Any]:
    """Optuna's distribution of each parameter, by name."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    by_name: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind == "choice":  # as indices: choices may be tables
            by_name[parameter.name] = CategoricalDistribution(list(range(len(parameter.choices))))
        elif parameter.kind == "int":
            low, high, step = int(parameter.low), int(parameter.high), int(parameter.step or 1)
            by_name[parameter.name] = IntDistribution(low, high, log=parameter.log, step=step)
        else:
            by_name[parameter.name] = FloatDistribution(
                parameter.low, parameter.high, log=parameter.log, step=parameter.step
            )
    return by_name
