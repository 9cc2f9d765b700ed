"""The values of the next trial, from a sampler that sees nothing of a storage but the checked trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torchslim.tuning.shared import Row
from torchslim.tuning.space import Parameter

Sampler = Literal["gp", "tpe", "random"]
CONSTRAINTS = "constraints"  # where Optuna's samplers look for how bad a trial is; above 0 is a violation
GP_TRIALS, GP_OBJECTIVES = 150, 3  # beyond, Gaussian processes take too long
STARTUP = 10  # trials at random before the sampler learns from them, or a third of all where that is less


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
    """Values as Optuna keeps them: choices by their places.

    Args:
        parameters: what varies.
        rows: the other trials of the study; Optuna sees a study in memory of these alone.
        sampler: "random" learns from none of them.
        seed: equal seeds and rows give equal values, so an interrupted search resumes with the same trials.
        number: how many trials have results.
        trials: how many there will be.
        objectives: how many numbers a trial is judged by.
        bounds: how many constraints there are.
    """
    import optuna

    kinds = distributions(parameters)
    options: Any = {
        "seed": seed,
        "n_startup_trials": min(STARTUP, max(4, trials // 3)),
        "constraints_func": (lambda trial: ()) if bounds else None,  # they come with the trials
    }
    if sampler == "random":
        chosen: Any = optuna.samplers.RandomSampler(seed=seed)
    elif sampler == "gp" and number < GP_TRIALS and objectives <= GP_OBJECTIVES:
        chosen = optuna.samplers.GPSampler(**options)
    else:
        chosen = optuna.samplers.TPESampler(**options, multivariate=True)
    study = optuna.create_study(directions=["minimize"] * objectives, sampler=chosen)
    for row in rows:
        bad = list((row.result or {}).get("bad", {}).values())
        judged = row.objectives is not None and (not bounds or len(bad) == bounds)
        if row.values is None or not (judged or row.running):
            continue
        state = optuna.trial.TrialState.COMPLETE if judged else optuna.trial.TrialState.RUNNING
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=row.objectives if judged else None,
                params=row.values,
                distributions=kinds,
                system_attrs={CONSTRAINTS: bad} if judged and bounds else {},
            )
        )
    return dict(study.ask(kinds).params)


def distributions(parameters: Sequence[Parameter]) -> dict[str, Any]:
    """What Optuna knows of each parameter, by name."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind == "choice":  # by their places, as choices may be tables
            found[parameter.name] = CategoricalDistribution(list(range(len(parameter.choices))))
        elif parameter.kind == "int":
            low, high, step = int(parameter.low), int(parameter.high), int(parameter.step or 1)
            found[parameter.name] = IntDistribution(low, high, log=parameter.log, step=step)
        else:
            found[parameter.name] = FloatDistribution(
                parameter.low, parameter.high, log=parameter.log, step=parameter.step
            )
    return found
