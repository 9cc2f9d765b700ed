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
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from torchslim.distill import LOSSES, Distill
from torchslim.distill.losses import KINDS as LOSS_KINDS
from torchslim.errors import RecipeError, TorchslimError
from torchslim.finetune import Finetune
from torchslim.prune import Prune
from torchslim.quantize import Quantize
from torchslim.runtimes import find_runtime
from torchslim.steps import Engine, Step, Target, check_order, resolve
from torchslim.task import Task

STEPS: Mapping[str, type] = {"prune": Prune, "finetune": Finetune, "distill": Distill, "quantize": Quantize}
KINDS: Mapping[str, type] = {**STEPS, **LOSSES}  # whatever a table with `do` may be
KEYS = ("model", "task", "teacher", "runtime", "threads", "seed", "engine", "sensitivity", "step")
NAMED = ("model", "task", "teacher", "seed", "sensitivity")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A parsed recipe; `model`, `task` and `teacher` are still names."""

    model: str
    task: str
    steps: tuple[Step, ...]
    teacher: str | None = None
    target: Target = field(default_factory=Target)
    seed: int = 0
    engine: Engine = field(default_factory=Engine)
    sensitivity: str | None = None  # the file of a `ts.sensitivity`

    def load(self) -> tuple[nn.Module, Task, nn.Module | None]:
        """Call what the recipe names: the model, the task and the teacher.

        Raises:
            RecipeError: a name that cannot be imported, or gives something else.
        """
        return made({"model": self.model, "task": self.task, "teacher": self.teacher})


def made(document: Mapping[str, Any]) -> tuple[nn.Module, Task, nn.Module | None]:
    """The model, the task and the teacher that a document names.

    Raises:
        RecipeError: a name that is missing, cannot be imported, or gives something else.
    """
    for key in ("model", "task"):
        if not isinstance(document.get(key), str):
            raise RecipeError(f"the recipe must name its {key} as 'package.module:name', got {document.get(key)!r}")
    teacher = document.get("teacher")
    return (
        _made(document["model"], "model", nn.Module),
        _made(document["task"], "task", Task),
        None if teacher is None else _made(teacher, "teacher", nn.Module),
    )


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe file.

    Raises:
        RecipeError: naming the file, the step, the key, and the nearest valid key.
    """
    return parse_document(load_document(path), str(path))


def load_document(path: str | Path) -> dict[str, Any]:
    """What stands in a recipe file, not yet validated.

    Raises:
        RecipeError: it cannot be read, or is no TOML.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}; name a recipe file") from error
    return parse_toml(text, str(path))


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """A recipe from TOML; `name` stands for the file in messages."""
    return parse_document(parse_toml(text, name), name)


def parse_toml(text: str, name: str = "recipe") -> dict[str, Any]:
    """The document that a text holds."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name} is not valid TOML: {error}") from error


def parse_document(document: Mapping[str, Any], name: str = "recipe", *, may_be_empty: bool = False) -> Recipe:
    """A recipe from a document as `tomllib` gives it; `may_be_empty`: of steps, where a search skips them all."""
    if "budget" in document:
        raise RecipeError(f"{name} has a [budget]: it is for `torchslim search`; `torchslim run` takes one recipe")
    _known(document, KEYS, name)
    for key in ("model", "task", "step"):
        if key not in document:
            raise RecipeError(f"{name}: the key {key!r} is missing; a recipe has a model, a task and [[step]] tables")
    tables = document["step"]
    if not isinstance(tables, list) or not (tables or may_be_empty):
        raise RecipeError(f"{name}: steps are written as [[step]] tables, at least one")
    try:
        steps = tuple(_make(table, f"{name}: step {number}") for number, table in enumerate(tables, 1))
        for number, step in enumerate(steps, 1):
            if type(step) in LOSSES.values():
                raise RecipeError(f"{name}: step {number} is a loss, not a step; use do = {_or(STEPS)}")
        check_order(steps)
        target = Target(**_checked(Target, _only(document, "runtime", "threads"), name))
        find_runtime(target.runtime)
        engine = Engine(**_checked(Engine, document.get("engine", {}), f"{name}: engine"))
        rest = _checked(Recipe, _only(document, *NAMED), name)
    except RecipeError as error:
        raise error if str(error).startswith(name) else RecipeError(f"{name}: {error}") from error
    return Recipe(steps=steps, target=target, engine=engine, **rest)


def parse_table(kind: type[T], given: Any, where: str) -> T:
    """A dataclass from its table."""
    try:
        return kind(**_checked(kind, given, where))
    except RecipeError as error:
        raise error if str(error).startswith(where) else RecipeError(f"{where}: {error}") from error


def _make(table: Any, where: str, known: Mapping[str, type] = STEPS) -> Any:
    """A step or a loss from its table, nested ones first."""
    if not isinstance(table, Mapping) or not isinstance(table.get("do"), str):
        raise RecipeError(f"{where} needs a key 'do' with the name of a step: {_or(STEPS)}, or 'package.module:name'")
    do = table["do"]
    where = f"{where} ({do!r})"
    kind = KINDS.get(do)
    if kind is None:
        if ":" not in do:
            raise RecipeError(
                f"{where} is not known{_near(do, known)}; known: {', '.join(known)}, or 'package.module:name'"
            )
        kind = resolve(do, where)
    given = {key: value for key, value in table.items() if key != "do"}
    try:
        return kind(**_checked(kind, given, where)) if isinstance(kind, type) else kind(**given)
    except TorchslimError as error:
        raise error if str(error).startswith(where) else RecipeError(f"{where}: {error}") from error
    except TypeError as error:
        raise RecipeError(f"{where} cannot be made: {error}") from error


def _checked(kind: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The given fields of a dataclass, converted, each of the type that the dataclass declares."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if not isinstance(given, Mapping):
        raise RecipeError(f"{where} must be a table of keys and values, got {given!r}")
    if not dataclasses.is_dataclass(kind):
        return dict(given)
    _known(given, [each.name for each in dataclasses.fields(kind) if each.init], where)
    hints = typing.get_type_hints(kind)
    checked: dict[str, Any] = {}
    for key, value in given.items():
        value = _converted(value, f"{where}, key {key!r}", LOSS_KINDS.get(key, STEPS))
        adapter: TypeAdapter[Any] = TypeAdapter(
            hints[key], config=ConfigDict(arbitrary_types_allowed=True, strict=True)
        )
        try:
            checked[key] = adapter.validate_python(value)
        except ValidationError as error:
            wanted = "; ".join(dict.fromkeys(each["msg"] for each in error.errors()))
            raise RecipeError(f"{where}, key {key!r}: got {value!r}: {wanted}") from error
    return checked


def _converted(value: Any, where: str, known: Mapping[str, type]) -> Any:
    if isinstance(value, Mapping):
        if "search" in value:
            raise RecipeError(f"{where} is a range to search over: take `torchslim search`, or write one value")
        if "do" in value:
            return _make(value, where, known)
        return {key: _converted(each, where, known) for key, each in value.items()}
    return tuple(_converted(each, where, known) for each in value) if isinstance(value, list) else value


def _known(given: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{_near(key, known)}; known: {', '.join(known)}")


def _near(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _only(document: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: document[key] for key in keys if key in document}


def _or(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _made(spec: str, what: str, kind: type) -> Any:
    found = resolve(spec, what)
    if not isinstance(found, kind):
        if not callable(found):
            raise RecipeError(f"{what} {spec!r} must be a {kind.__name__} or give one, got {type(found).__name__}")
        found = found()
    if not isinstance(found, kind):
        raise RecipeError(f"{what} {spec!r} must give a {kind.__name__}, got {type(found).__name__}")
    return found
