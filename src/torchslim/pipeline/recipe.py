"""recipe.toml: the steps of a run, validated before any data is loaded.

model = "examples.fashion_mnist:resnet"     # package.module:callable, imported only because it is named here
task = "examples.fashion_mnist:task"
runtime = "onnxruntime"

[[step]]
do = "prune"                                # list order is run order; keys are the fields of the step
sparsity = 0.5

[[step]]
do = "distill"
epochs = 3
response = { do = "kd", temperature = 4.0 }
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from torchslim.analysis.result import Sensitivity
from torchslim.core.checks import Misfit, Seed, fitting, shown, types_of
from torchslim.core.imports import foreign, resolve
from torchslim.core.step import Engine, Step, Target, check_order
from torchslim.core.task import Task
from torchslim.distill import LOSSES, Distill
from torchslim.distill.losses.registry import KINDS as LOSS_KINDS
from torchslim.errors import ExportError, RecipeError, TorchslimError
from torchslim.graph.dynamic_sizes import lists_dimensions, normalized
from torchslim.pipeline.document import load_document, parse_toml, sound
from torchslim.prune import Prune
from torchslim.quantize import Quantize
from torchslim.runtimes import find_runtime
from torchslim.training.finetune import Finetune

STEPS: Mapping[str, type] = {"prune": Prune, "finetune": Finetune, "distill": Distill, "quantize": Quantize}
KINDS: Mapping[str, type] = {**STEPS, **LOSSES}  # classes that `do` may name
NAMED = ("model", "task", "teacher", "seed", "sensitivity", "dynamic_shapes", "part", "rehearse")
KEYS = (*NAMED, "runtime", "threads", "engine", "step")
MADE: Mapping[str, type] = {"model": nn.Module, "task": Task, "teacher": nn.Module}
RANGE = ("search", "log", "step")  # the keys of a range
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A parsed recipe, in which `model`, `task` and `teacher` are names that are not yet imported."""

    model: str
    task: str
    steps: tuple[Step, ...]
    teacher: str | None = None
    target: Target = field(default_factory=Target)
    seed: Seed = 0
    engine: Engine = field(default_factory=Engine)
    sensitivity: str | None = None  # path of a saved `ts.sensitivity` analysis
    dynamic_shapes: Any = "auto"  # "auto", "batch", "fixed", or lists of dimensions by input
    part: str | tuple[str, ...] | None = None  # names or globs of submodules
    rehearse: bool = True  # begin with every step at least effort

    def __post_init__(self) -> None:
        try:
            read = normalized(self.dynamic_shapes)
            if read is not None and not isinstance(read, str) and not lists_dimensions(read):
                raise RecipeError(
                    "dynamic_shapes must be 'auto', 'batch', 'fixed', lists of dimensions such as "
                    "{ input_ids = [0, 1] }, or lists of sizes such as { images = { 2 = [320, 480] } }, got "
                    f"{shown(self.dynamic_shapes)}"
                )
        except ExportError as error:
            raise RecipeError(str(error)) from error

    def load(self) -> tuple[nn.Module, Task, nn.Module | None]:
        """Make the model, the task and the teacher that the recipe names.

        Raises:
            RecipeError: a name that cannot be imported, or gives an object of another type.
        """
        return made({"model": self.model, "task": self.task, "teacher": self.teacher})

    def known_sensitivity(self) -> Sensitivity | None:
        """Read the sensitivity analysis that the recipe names; None where it names none."""
        return None if self.sensitivity is None else Sensitivity.load(self.sensitivity)


def made(document: Mapping[str, Any]) -> tuple[nn.Module, Task, nn.Module | None]:
    """Import a document's model, task and teacher, and call those that are not yet objects of the right type.

    Raises:
        RecipeError: a name that is missing, cannot be imported, fails, or gives an object of another type.
    """
    objects: Any = tuple(
        None if target is None else _called(target, spec, key) for key, spec, target in _named(document)
    )
    return objects  # type: ignore[no-any-return]  # in the order of MADE


def check_names(document: Mapping[str, Any]) -> None:
    """Import the names of a document's model, task and teacher, without calling them.

    Raises:
        RecipeError: a name that is missing, cannot be imported, or is neither of the right type nor callable.
    """
    for _ in _named(document):
        pass


def _named(document: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the key, the name and the imported object of model, task and teacher; None where there is no teacher."""
    for key, kind in MADE.items():
        spec = document.get(key)
        if spec is None and key == "teacher":
            yield key, spec, None
            continue
        if not isinstance(spec, str):
            raise RecipeError(f"the recipe must name its {key} as 'package.module:name', got {shown(spec)}")
        target = resolve(spec, key)
        if not isinstance(target, kind) and not callable(target):
            raise RecipeError(f"{key} {spec!r} must be a {kind.__name__} or give one, got {type(target).__name__}")
        yield key, spec, target


def _called(target: Any, spec: str, key: str) -> Any:
    kind = MADE[key]
    if not isinstance(target, kind):
        with foreign(f"{key} {spec!r} cannot be made", RecipeError):
            target = target()
    if not isinstance(target, kind):
        raise RecipeError(f"{key} {spec!r} must give a {kind.__name__}, got {type(target).__name__}")
    return target


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe file.

    Raises:
        RecipeError: naming the file, the step, the key, and the nearest valid key.
    """
    return parse_document(load_document(path), str(path))


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """Parse a recipe from TOML; messages call the file `name`."""
    return parse_document(parse_toml(text, name), name)


def parse_document(
    document: Mapping[str, Any],
    name: str = "recipe",
    *,
    may_be_empty: bool = False,
    known: dict[str, Any] | None = None,
) -> Recipe:
    """Make a recipe from a document as `tomllib` returns it.

    Args:
        document: tables, lists, texts, numbers and booleans.
        name: name of the file in messages.
        may_be_empty: allow a recipe without steps, for a search that skips them all.
        known: steps that were made before, by their tables; new ones are added.
    """
    if known is None:  # a search has checked its document before
        document = sound(document, name)
        if "budget" in document:
            raise RecipeError(f"{name} has a [budget]: it is for `torchslim search`; `torchslim run` takes one recipe")
        check_keys(document, name)
        known = {}
    tables = document["step"]
    if not (tables or may_be_empty):
        raise RecipeError(f"{name}: steps are written as [[step]] tables, at least one")
    steps = tuple(parse_step(table, f"{name}: step {number}", known) for number, table in enumerate(tables, 1))
    try:
        check_order(steps)
        target = Target(**_checked(Target, _only(document, "runtime", "threads"), name))
        find_runtime(target.runtime)
        engine = Engine(**_checked(Engine, document.get("engine", {}), f"{name}: engine"))
        rest = _checked(Recipe, _only(document, *NAMED), name)
    except RecipeError as error:
        raise error if str(error).startswith(name) else RecipeError(f"{name}: {error}") from error
    return Recipe(steps=steps, target=target, engine=engine, **rest)


def parse_step(table: Mapping[str, Any], where: str, known: dict[str, Any]) -> Step:
    """Make a step from its table, or take it from `known`, the steps that were made before."""
    key = json.dumps(table, sort_keys=True)
    if key not in known:
        new = _make(table, where)
        if type(new) in LOSSES.values():
            raise RecipeError(f"{where} is a loss, not a step; use do = {_or(STEPS)}")
        if len(known) >= 10_000:
            known.clear()
        known[key] = new
    step: Step = known[key]
    return step


def check_keys(document: Mapping[str, Any], name: str, *, ranges: bool = False) -> None:
    """Check the keys of all tables, before any value: a misspelled key should be reported first.

    Args:
        document: a document that `sound` has checked.
        name: name of the file in messages.
        ranges: allow what a search has: a budget, and `{ search = [...] }` in place of values.

    Raises:
        RecipeError: naming the unknown or missing key, and the nearest known key.
    """
    known = (*KEYS, "budget") if ranges else KEYS
    _known(document, known, name)
    for key in ("model", "task", "step"):
        if key not in document:
            raise RecipeError(f"{name}: the key {key!r} is missing; a recipe has a model, a task and [[step]] tables")
    if not isinstance(document["step"], list):
        raise RecipeError(f"{name}: steps are written as [[step]] tables, at least one")
    engine = document.get("engine", {})
    if isinstance(engine, Mapping) and not (ranges and "search" in engine):
        _known(engine, names_of(Engine), f"{name}: engine")
    for number, table in enumerate(document["step"], 1):
        where = f"{name}: step {number}"
        if not isinstance(table, Mapping) or "do" not in table:
            raise RecipeError(
                f"{where} needs a key 'do' with the name of a step: {_or(STEPS)}, or 'package.module:name'"
            )
        _check_keys(table, where, STEPS, ranges=ranges, top=True)


def _check_keys(value: Any, where: str, among: Mapping[str, type], *, ranges: bool, top: bool = False) -> None:
    """Check the keys of a table with `do` and of the tables inside it; for a range, the keys of its choices."""
    if isinstance(value, list):
        for item in value:
            _check_keys(item, where, among, ranges=ranges)
    if not isinstance(value, Mapping):
        return
    if "search" in value:
        if not ranges:
            raise RecipeError(f"{where} is a range to search over: use `torchslim search`, or write one value")
        _known(value, RANGE, where, beside="'search'")
        _check_keys(value["search"], where, among, ranges=False if top else ranges)
        return
    if isinstance(do := value.get("do"), str):
        kind = find_kind(do, where, among, top=top)
        where = f"{where} ({do!r})"
        _known(value, ["do", *(["skip"] if ranges and top else []), *names_of(kind)], where)
    for key, item in value.items():
        if key == "do" and isinstance(item, str):
            continue
        inner = f"{where}, key {key!r}"
        if key == "do" and not (ranges and isinstance(item, Mapping) and "search" in item):
            raise RecipeError(f"{where} needs a key 'do' with a name, got {shown(item)}")
        _check_keys(item, inner, LOSS_KINDS.get(key, STEPS), ranges=ranges)


def find_kind(do: str, where: str, among: Mapping[str, type] = STEPS, *, top: bool = False) -> type:
    """Return the class that `do` names: one of torchslim's, or a frozen dataclass of the user, which is imported.

    Functions and other classes are refused: only dataclasses have fields that can be checked.

    Args:
        do: the value of the key.
        where: the place in messages.
        among: known names, for the hint about a misspelled one.
        top: the class is a step of the recipe, and must have the attributes of a step.
    """
    kind = KINDS.get(do)
    if kind is not None:
        return kind
    if ":" not in do:
        raise RecipeError(
            f"{where} ({shown(do)}) is not known{_near(do, among)}; known: {', '.join(among)}, or 'package.module:name'"
        )
    named: Any = resolve(do, f"{where}: do =")
    frozen = isinstance(named, type) and getattr(getattr(named, "__dataclass_params__", None), "frozen", False)
    missing = [name for name in ("accepts", "produces", "check") if top and not hasattr(named, name)]
    if not frozen or missing:
        lack = f", which has no {missing[0]!r}" if frozen else ""
        raise RecipeError(
            f"{where}: do = {do!r} names {shown(named)}{lack}; a step is a frozen dataclass with accepts, produces, "
            "check(ctx) and __call__(model, ctx), a loss is a frozen dataclass"
        )
    return named  # type: ignore[no-any-return]


def parse_table(kind: type[T], given: Any, where: str) -> T:
    """Make a dataclass from its table."""
    try:
        return kind(**_checked(kind, given, where))
    except RecipeError as error:
        raise error if str(error).startswith(where) else RecipeError(f"{where}: {error}") from error


def _make(table: Any, where: str, among: Mapping[str, type] = STEPS) -> Any:
    """Make a step or a loss from its table, nested tables first."""
    if not isinstance(table, Mapping) or not isinstance(table.get("do"), str):
        raise RecipeError(f"{where} needs a key 'do' with the name of a step: {_or(among)}, or 'package.module:name'")
    do = table["do"]
    kind = find_kind(do, where, among)
    where = f"{where} ({do!r})"
    field_values = {key: value for key, value in table.items() if key != "do"}
    try:
        with foreign(f"{where} cannot be made", RecipeError):
            return kind(**_checked(kind, field_values, where))
    except TorchslimError as error:
        raise error if str(error).startswith(where) else RecipeError(f"{where}: {error}") from error


def _checked(kind: type, table: Any, where: str) -> dict[str, Any]:
    """Return the given fields of a dataclass, made from nested tables and checked against the declared types."""
    if not isinstance(table, Mapping):
        raise RecipeError(f"{where} must be a table of keys and values, got {shown(table)}")
    _known(table, names_of(kind), where)
    hints = types_of(kind)
    return {key: checked_value(value, hints[key], f"{where}, key {key!r}", key) for key, value in table.items()}


def checked_value(value: Any, hint: Any, where: str, key: str) -> Any:
    """Convert a value of a recipe to the type of its field."""
    value = _converted(value, where, LOSS_KINDS.get(key, STEPS))
    try:
        return fitting(value, hint)
    except Misfit as misfit:
        raise RecipeError(f"{where}: got {shown(value)}: it {misfit}") from misfit


def _converted(value: Any, where: str, among: Mapping[str, type]) -> Any:
    if isinstance(value, Mapping):
        if "search" in value:
            raise RecipeError(f"{where} is a range to search over: use `torchslim search`, or write one value")
        if "do" in value:
            return _make(value, where, among)
        return {key: _converted(item, where, among) for key, item in value.items()}
    return tuple(_converted(item, where, among) for item in value) if isinstance(value, list) else value


def names_of(kind: type) -> list[str]:
    """Return the names of the fields that a table may set."""
    return [field_.name for field_ in dataclasses.fields(kind) if field_.init]


def _known(keys: Iterable[str], valid_keys: Iterable[str], where: str, *, beside: str = "") -> None:
    valid_keys = list(valid_keys)
    for key in keys:
        if key not in valid_keys:
            note = f" beside {beside}" if beside else ""
            hint = f"{note}{_near(key, valid_keys)}; known: {', '.join(valid_keys)}"
            raise RecipeError(f"{where}: unknown key {shown(key)}{hint}")


def _near(key: str, valid_keys: Iterable[str]) -> str:
    near = difflib.get_close_matches(key[:100], list(valid_keys), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _only(document: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: document[key] for key in keys if key in document}


def _or(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
