"""What other workers have written into a study, as far as it can be used.

A storage is shared: any worker, and whoever else can write to it, may put anything there. Only what is read here
reaches a search: numbers within the ranges of their parameters, choices by their places in the recipe that this worker
was started with, and results of known keys and types. No name, path or object ever comes from a storage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchslim.core.budget import UNITS, Budget
from torchslim.core.schema import MIB, Limits, parse_json
from torchslim.core.terminal import printable
from torchslim.errors import StorageError
from torchslim.tuning.pareto import WHOLE, near
from torchslim.tuning.space import Parameter

SAME = "same_as"  # in the result of a trial whose recipe was tried before: it does not count
Json = dict[str, Any]
NUMBERS = frozenset({*UNITS, "metric"})
STATES = ("failed", "stopped", "candidate", "measured")
STAGES = ("cheap", "short", WHOLE)
TEXT = 2_000  # characters of a reason that are kept
LARGEST = 1e18
LIMITS = Limits(size_bytes=MIB // 4, values=5_000, depth=6)


class Unusable(Exception):
    """What is stored does not fit; the message says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A trial of a study.

    Attributes:
        number: its place in the study.
        running: somebody is at work on it, or was.
        values: by parameter, as Optuna keeps them: choices by their places; None where some are missing.
        queued: likewise, of a trial that was asked for with its values.
        objectives: what it is judged by, where it has any.
        result: what came of it; None while there is none.
        about: the number of the trial that it was claimed for.
        worker: who has it: host, pid, started.
        beat: changes while its worker lives.
    """

    number: int
    running: bool
    values: Json | None
    queued: Json | None
    objectives: tuple[float, ...] | None
    result: Json | None
    about: int | None
    worker: Json | None
    beat: int | None


def read_row(trial: Any, parameters: Sequence[Parameter], objectives: int, budget: Budget | None = None) -> Row:
    """A trial as Optuna gives it, checked.

    Args:
        trial: of the study.
        parameters: what varies.
        objectives: how many numbers it is judged by.
        budget: of the search; what follows from a trial's figures under it is computed here, and not believed.

    Raises:
        Unusable: it has values or a result that no worker of this search writes.
    """
    import optuna

    known = _table(trial.user_attrs, "attributes")
    system = _table(trial.system_attrs, "attributes")
    finished = trial.state.is_finished()
    result = known.get("result") if finished else None  # while it runs nobody looks at it
    params = _table(trial.params, "parameters")
    complete = all(parameter.name in params for parameter in parameters)
    if finished and result is not None and not complete:
        raise Unusable("its parameters are not those of the recipe")
    queued = system.get("fixed_params")
    judged = trial.values if finished and result is not None else None
    if judged is not None and (not isinstance(judged, (list, tuple)) or len(judged) != objectives):
        raise Unusable(f"it is not judged by {objectives} numbers")
    return Row(
        number=_whole(trial.number, "number"),
        running=trial.state == optuna.trial.TrialState.RUNNING,
        values=stored_values(params, parameters) if complete else None,
        queued=stored_values(_table(queued, "parameters"), parameters) if queued else None,
        objectives=None if judged is None else tuple(_number(each, "figure") for each in judged),
        result=None if result is None else _judged(read_result(result), budget),
        about=None if "about" not in known else _whole(_table(known["about"], "about").get("trial"), "about"),
        worker=_worker(known.get("worker")),
        beat=beat if type(beat := known.get("beat")) is int and 0 <= beat < 2**63 else None,
    )


def stored_values(given: Mapping[str, Any], parameters: Sequence[Parameter]) -> Json | None:
    """Values as Optuna keeps them, each within its range; None where some are missing.

    Raises:
        Unusable: naming the parameter whose value is beyond its range.
    """
    if not all(parameter.name in given for parameter in parameters):
        return None
    return {parameter.name: _stored(given[parameter.name], parameter) for parameter in parameters}


def _stored(value: Any, parameter: Parameter) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if parameter.kind == "choice":
        fits = type(value) is int and 0 <= value < len(parameter.choices)
    elif parameter.kind == "int":
        fits = number and value == int(value) if number and math.isfinite(value) else False
        fits = fits and parameter.low <= value <= parameter.high
    else:
        fits = number and parameter.low <= value <= parameter.high  # NaN is not
    if not fits:
        raise Unusable(f"its parameter {parameter.name} is beyond its range")
    return value if parameter.kind == "choice" else int(value) if parameter.kind == "int" else float(value)


def read_result(text: Any) -> Json:
    """A result of a trial or of a full training, with its known keys alone.

    Raises:
        Unusable: a key has a value of another type, or beyond its limits.
    """
    if not isinstance(text, str):
        raise Unusable("its result is no text")
    try:
        given = _table(parse_json(text, "its result", StorageError, limits=LIMITS), "result")
    except StorageError as error:
        raise Unusable(str(error)) from error
    found: Json = {}
    for key, value in given.items():
        if key in _KEYS:
            found[key] = _KEYS[key](value, key)
    return found


def _judged(result: Json, budget: Budget | None) -> Json:
    """With how far the figures are over the bounds; those that the budget needs must be there."""
    if budget is None or SAME in result:
        return result
    least: Json = {"state": "failed", "stage": "cheap", "reason": ""}
    result = least | result
    needs = set(budget.figures)
    if not needs <= set(result.get("cheap", {})):
        result.pop("cheap", None)
    if result["state"] == "failed":
        result.pop("figures", None)
        return result
    figures = result.get("figures", {})
    entries = result["state"] == "measured"
    if not needs <= set(figures) or entries != all(isinstance(figure, Mapping) for figure in figures.values()):
        raise Unusable("it lacks figures that the budget needs")
    excess = budget.excess({name: each["value"] if entries else each for name, each in figures.items()})
    if entries:
        if "trial" not in result or "metric" not in result:
            raise Unusable("it does not say what was measured")
        return result | {"within": max(excess.values(), default=0.0) <= 0}
    return result | {"excess": excess, "bad": excess if result["stage"] == WHOLE else near(excess)}


def _table(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise Unusable(f"its {what} are no table")
    return value


def _one_of(*choices: str) -> Callable[[Any, str], str]:
    def check(value: Any, what: str) -> str:
        if value not in choices or not isinstance(value, str):
            raise Unusable(f"its {what} is none of {', '.join(choices)}")
        return value

    return check


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"its {what} is no text")
    return printable(value[:TEXT], lines=True)


def _boolean(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise Unusable(f"its {what} is neither true nor false")
    return value


def _whole(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 10**9:
        raise Unusable(f"its {what} is no number of a trial")
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST <= value <= LARGEST:
        raise Unusable(f"its {what} is no finite number")
    return value


def _numbers(value: Any, what: str) -> Json:
    table = _table(value, what)
    if not set(table) <= NUMBERS:
        raise Unusable(f"its {what} are of other things than a budget knows")
    return {key: _number(each, f"{what}.{key}") for key, each in table.items()}


def _excess(value: Any, what: str) -> Json:
    return {_text(key, what)[:60]: _number(each, what) for key, each in list(_table(value, what).items())[:20]}


def _entry(value: Any, what: str) -> Json:
    """A number with its unit, as `evidence.number` writes it."""
    table = _table(value, what)
    if "not_measured" in table:
        return {"not_measured": _text(table["not_measured"], what)}
    found: Json = {"value": _number(table.get("value"), what), "unit": _text(table.get("unit"), what)[:30]}
    for key in ("repeats", "low", "high"):
        if key in table:
            found[key] = _number(table[key], f"{what}.{key}")
    for key in ("machine", "verdict"):
        if key in table:
            found[key] = _text(table[key], f"{what}.{key}")[:60]
    return found


def _figures(value: Any, what: str) -> Json:
    """Numbers of a trial; of a full training entries with units."""
    table = _table(value, what)
    if table and all(isinstance(each, Mapping) for each in table.values()):
        if not set(table) <= NUMBERS or any("not_measured" in each for each in table.values()):
            raise Unusable(f"its {what} are of other things than a budget knows")
        return {key: _entry(each, f"{what}.{key}") for key, each in table.items()}
    return _numbers(table, what)


def _metric(value: Any, what: str) -> Json:
    table = _table(value, what)
    return {key: _entry(each, f"{what}.{key}") for key, each in table.items() if key in ("train", "val", "test")}


_KEYS: Mapping[str, Callable[[Any, str], Any]] = {
    "state": _one_of(*STATES),
    "stage": _one_of(*STAGES),
    "reason": _text,
    "figures": _figures,
    "cheap": _numbers,
    "excess": _excess,
    "bad": _excess,
    "seconds": _number,
    SAME: _whole,
    "trial": _whole,
    "within": _boolean,
    "metric": _metric,
}


def _worker(value: Any) -> Json | None:
    """Who has a trial; None where that does not tell a process."""
    if not isinstance(value, Mapping):
        return None
    host, pid, started = (value.get(key) for key in ("host", "pid", "started"))
    if not isinstance(host, str) or type(pid) is not int or not 0 < pid < 2**31:
        return None
    if not (started is None or isinstance(started, str)):
        return None
    return {"host": host, "pid": pid, "started": started}
