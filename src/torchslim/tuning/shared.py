"""Read and check what other workers have written into a study.

A storage is shared: any worker, and anyone else who can write to it, may put anything there. A search uses only what is
checked here: numbers within the ranges of their parameters, choices as indices into the recipe that this worker was
started with, and results with known keys and types. No name, path or object ever comes from a storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchslim.core.budget import UNITS, Budget
from torchslim.core.schema import MIB, Limits, parse_json
from torchslim.core.terminal import printable
from torchslim.errors import StorageError
from torchslim.tuning.pareto import WHOLE, near
from torchslim.tuning.space import Parameter

SAME = "same_as"  # key in the result of a trial whose recipe was tried before: such a trial does not count
Json = dict[str, Any]
NUMBERS = frozenset({*UNITS, "metric"})
STATES = ("failed", "stopped", "candidate", "measured")
STAGES = ("cheap", "short", WHOLE)
TEXT = 2_000  # characters of a reason that are kept
LARGEST = 1e18
LIMITS = Limits(size_bytes=MIB // 4, values=5_000, depth=6)


class Unusable(Exception):
    """A stored trial does not fit the search; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A checked trial of a study.

    Attributes:
        number: index in the study.
        running: a worker runs the trial, or died while running it.
        values: by parameter, as Optuna stores them: choices as indices; None if some are missing.
        queued: values that the trial was enqueued with, in the same form.
        objectives: values of the objectives, if there are any.
        result: the result; None until there is one.
        about: number of the trial that this one was claimed for.
        worker: the worker that has the trial: host, pid, started.
        beat: a count that changes while the worker lives.
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
    """A checked `Row` of a trial of Optuna.

    Args:
        trial: of the study.
        parameters: of the space.
        objectives: number of objectives.
        budget: of the search; what it implies for a trial's figures is computed here, not read from the storage.

    Raises:
        Unusable: the trial has values or a result that no worker of this search writes.
    """
    import optuna

    attributes = _table(trial.user_attrs, "attributes")
    system_attributes = _table(trial.system_attrs, "attributes")
    finished = trial.state.is_finished()
    result = attributes.get("result") if finished else None  # not used while the trial runs
    params = _table(trial.params, "parameters")
    complete = all(parameter.name in params for parameter in parameters)
    if finished and result is not None and not complete:
        raise Unusable("its parameters are not those of the recipe")
    queued = system_attributes.get("fixed_params")
    numbers = trial.values if finished and result is not None else None
    if numbers is not None and (not isinstance(numbers, (list, tuple)) or len(numbers) != objectives):
        raise Unusable(f"it does not have {objectives} objective values")
    return Row(
        number=_whole(trial.number, "number"),
        running=trial.state == optuna.trial.TrialState.RUNNING,
        values=stored_values(params, parameters) if complete else None,
        queued=stored_values(_table(queued, "parameters"), parameters) if queued else None,
        objectives=None if numbers is None else tuple(_number(number, "figure") for number in numbers),
        result=None if result is None else _judged(read_result(result), budget),
        about=None if "about" not in attributes else _whole(_table(attributes["about"], "about").get("trial"), "about"),
        worker=_worker(attributes.get("worker")),
        beat=beat if type(beat := attributes.get("beat")) is int and 0 <= beat < 2**63 else None,
    )


def stored_values(given: Mapping[str, Any], parameters: Sequence[Parameter]) -> Json | None:
    """Values in Optuna's form, each checked against its range; None if some are missing.

    Raises:
        Unusable: a value is beyond the range of its parameter; names the parameter.
    """
    if not all(parameter.name in given for parameter in parameters):
        return None
    return {parameter.name: _stored(given[parameter.name], parameter) for parameter in parameters}


def _stored(value: Any, parameter: Parameter) -> Any:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if parameter.kind == "choice":
        fits = type(value) is int and 0 <= value < len(parameter.choices)
    elif parameter.kind == "int":
        fits = numeric and parameter.low <= value <= parameter.high and value == int(value)
    else:
        fits = numeric and parameter.low <= value <= parameter.high  # NaN is not
    if not fits:
        raise Unusable(f"its parameter {parameter.name} is beyond its range")
    return value if parameter.kind == "choice" else int(value) if parameter.kind == "int" else float(value)


def read_result(text: Any) -> Json:
    """Result of a trial or of a full training, with its known keys only.

    Raises:
        Unusable: a key has a value of another type, or beyond its limits.
    """
    if not isinstance(text, str):
        raise Unusable("its result is no text")
    try:
        stored = _table(parse_json(text, "its result", StorageError, limits=LIMITS), "result")
    except StorageError as error:
        raise Unusable(str(error)) from error
    result: Json = {}
    for key, value in stored.items():
        if key in _KEYS:
            result[key] = _KEYS[key](value, key)
    return result


def _judged(result: Json, budget: Budget | None) -> Json:
    """The result with its excess over the bounds; raises Unusable if figures that the budget needs are missing."""
    if budget is None or SAME in result:
        return result
    defaults: Json = {"state": "failed", "stage": "cheap", "reason": ""}
    result = defaults | result
    needs = set(budget.figures)
    if not needs <= set(result.get("cheap", {})):
        result.pop("cheap", None)
    if result["state"] == "failed":
        result.pop("figures", None)
        return result
    figures = result.get("figures", {})
    measured = result["state"] == "measured"
    if not needs <= set(figures) or measured != all(isinstance(figure, Mapping) for figure in figures.values()):
        raise Unusable("it lacks figures that the budget needs")
    values = {name: entry["value"] if measured else entry for name, entry in figures.items()}
    excess = budget.excess(values)
    if measured:
        if "trial" not in result or "metric" not in result:
            raise Unusable("it does not say what was measured")
        return result | {"within": max(excess.values(), default=0.0) <= 0}
    return result | {"excess": excess, "bad": excess if result["stage"] == WHOLE else near(values, budget)}


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
        raise Unusable(f"its {what} have keys that no budget has")
    return {key: _number(number, f"{what}.{key}") for key, number in table.items()}


def _excess(value: Any, what: str) -> Json:
    return {_text(key, what)[:60]: _number(number, what) for key, number in list(_table(value, what).items())[:20]}


def _entry(value: Any, what: str) -> Json:
    """A number with its unit, in the form that `evidence.number` writes."""
    table = _table(value, what)
    if "not_measured" in table:
        return {"not_measured": _text(table["not_measured"], what)}
    entry: Json = {"value": _number(table.get("value"), what), "unit": _text(table.get("unit"), what)[:30]}
    for key in ("repeats", "low", "high"):
        if key in table:
            entry[key] = _number(table[key], f"{what}.{key}")
    for key in ("machine", "verdict"):
        if key in table:
            entry[key] = _text(table[key], f"{what}.{key}")[:60]
    return entry


def _figures(value: Any, what: str) -> Json:
    """Figures of a trial as numbers, or those of a full training as entries with units."""
    table = _table(value, what)
    if table and all(isinstance(entry, Mapping) for entry in table.values()):
        if not set(table) <= NUMBERS or any("not_measured" in entry for entry in table.values()):
            raise Unusable(f"its {what} have keys that no budget has")
        return {key: _entry(entry, f"{what}.{key}") for key, entry in table.items()}
    return _numbers(table, what)


def _metric(value: Any, what: str) -> Json:
    table = _table(value, what)
    return {key: _entry(entry, f"{what}.{key}") for key, entry in table.items() if key in ("train", "val", "test")}


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
    """The worker that has a trial; None if `value` does not identify a process."""
    if not isinstance(value, Mapping):
        return None
    host, pid, started = (value.get(key) for key in ("host", "pid", "started"))
    if not isinstance(host, str) or type(pid) is not int or not 0 < pid < 2**31:
        return None
    if not (started is None or isinstance(started, str)):
        return None
    return {"host": host, "pid": pid, "started": started}
