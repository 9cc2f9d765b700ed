"""Records of removed channels and blocks, kept with the module: rounds of surgery, and the base that they start from.

A record rebuilds the shrunk module from a fresh instance of its base, so nothing of a class is ever saved.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torchslim.core.arguments import checks_arguments
from torchslim.core.files import digest
from torchslim.core.isolation import copy_model
from torchslim.core.schema import Schema
from torchslim.core.usable import usable
from torchslim.errors import PruneError
from torchslim.prune.structured.surgery import Surgery, perform

ATTRIBUTE = "_torchslim_surgery"
VERSION = 1

Shapes = Mapping[str, Sequence[int]]


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shape of every tensor in the model's state dict; buffers outside of it may grow as the model runs."""
    return {name: list(getattr(value, "shape", ())) for name, value in model.state_dict().items()}


def difference(own: Shapes, wanted: Shapes) -> str:
    """Names that `wanted` lacks, names that `own` lacks, and shapes that differ, as text; empty if there are none."""
    missing, unknown = sorted(set(own) - set(wanted)), sorted(set(wanted) - set(own))
    mismatched = [
        f"{name} {tuple(shape)} instead of {tuple(wanted[name])}"
        for name, shape in own.items()
        if name in wanted and list(shape) != list(wanted[name])
    ]
    if not (missing or unknown or mismatched):
        return ""
    return (
        f"missing: {', '.join(missing[:5]) or 'none'}; unknown: {', '.join(unknown[:5]) or 'none'}; "
        f"other shapes: {', '.join(mismatched[:5]) or 'none'}"
    )


@checks_arguments(PruneError)
def surgery(model: nn.Module) -> dict[str, Any] | None:
    """The record of what pruning removed from `model`, as plain JSON values; None if there is none.

    `base` identifies the model before pruning: its class, and a digest of the shapes of its weights. `rounds` holds,
    for each pruning in turn, `cuts` (which indices of which dimension of a weight stay), `patches` (attributes that
    carry sizes), `drops` (modules of removed blocks, and what is returned in their place), and `about`: the target and
    the result, and why other channels or blocks stayed. The prunings of single parts are rounds too.
    """
    own = vars(model).get(ATTRIBUTE)
    # a part's record is newer than that of the model around it: a new round takes over the records of all parts
    parts = [(path, vars(part)[ATTRIBUTE]) for path, part in model.named_modules() if path and ATTRIBUTE in vars(part)]
    parts.sort(key=lambda part: part[0].count("."))
    rounds = [_inside(path, round_) for path, record in parts for round_ in record["rounds"]]
    if own is not None:
        return {**copy.deepcopy(own), "rounds": [*copy.deepcopy(own["rounds"]), *rounds]}
    return _record(model, undone(shapes(model), rounds, _tied(model)), rounds) if rounds else None


def _record(model: nn.Module, before: Shapes, rounds: list[Any]) -> dict[str, Any]:
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    return {"version": VERSION, "base": {"class": name, "shapes": digest(before)}, "rounds": rounds}


def _inside(path: str, round_: Mapping[str, Any]) -> dict[str, Any]:
    """A round of a part, with the paths of the whole model."""
    return {
        **Surgery.from_dict(round_).under(path).to_dict(),
        "about": {**copy.deepcopy(round_["about"]), "part": path},
    }


def _tied(model: nn.Module) -> dict[str, str]:
    """First name of every tensor, by each of its names."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in model.state_dict(keep_vars=True).items()}


def undone(after: Shapes, rounds: Sequence[Mapping[str, Any]], tied: Mapping[str, str]) -> dict[str, list[int]]:
    """The shapes before `rounds`: those after them, with every drop and cut undone."""
    before = {name: list(shape) for name, shape in after.items()}
    tied = dict(tied)
    for round_ in reversed(rounds):
        for drop in round_.get("drops", ()):
            before |= {name: list(shape) for name, shape in drop["tensors"].items()}
            tied |= drop["ties"]
        for cut in round_["cuts"]:
            for name, shape in before.items():
                if tied.get(name, name) == cut["weight"]:
                    shape[cut["dim"]] = cut["size"]
    return before


def attach(shrunk: nn.Module, base: nn.Module, done: Surgery, about: Mapping[str, Any]) -> None:
    """Give the shrunk module the record of its base, with one more round."""
    record = surgery(base) or _record(base, shapes(base), [])
    record["rounds"].append({**done.to_dict(), "about": dict(about)})
    _set(shrunk, json.loads(json.dumps(record)))  # as it is when loaded from a file


def _set(model: nn.Module, record: dict[str, Any]) -> None:
    for module in model.modules():
        vars(module).pop(ATTRIBUTE, None)
    vars(model)[ATTRIBUTE] = record


def replay(base: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The shrunk module, rebuilt from a fresh instance of its base, or from one after the first rounds of the record.

    Raises:
        PruneError: the record is damaged, of a newer version, or of another model.
    """
    _check(record)
    current, rounds = surgery(base), record["rounds"]
    if digest(shapes(base)) == record["base"]["shapes"]:
        finished = 0
    elif current is not None and _continues(record, current):
        finished = len(current["rounds"])
    else:
        raise PruneError(
            f"the surgery was made on a {record['base']['class']} with other weights than this {type(base).__name__}; "
            "give the factory of the model that was pruned"
        )
    for round_ in rounds[finished:]:
        try:
            base = perform(base, Surgery.from_dict(round_))
        except (AttributeError, IndexError, TypeError) as error:
            raise PruneError(
                f"the surgery does not fit this {type(base).__name__}: {error}; give the factory of the model that "
                "was pruned"
            ) from error
    _set(base, copy.deepcopy(dict(record)))
    return base


@checks_arguments(PruneError)
def apply_surgery(model: nn.Module, record: Mapping[str, Any] | str | Path) -> nn.Module:
    """A copy of `model` without what `record` names: the architecture of the model that was pruned.

    Load a checkpoint of the pruned model into the copy, whichever library wrote it. If `model` has the weights that
    were pruned, the copy has their slices.

    Args:
        model: the model as it was before pruning, such as a fresh instance; it is not modified.
        record: a result of `ts.surgery`, or a JSON file of it.

    Raises:
        PruneError: the record is damaged, of a newer version, or of another model.
    """
    read = (
        _record_schema().read(Path(record)) if isinstance(record, (str, Path)) else _record_schema().check(dict(record))
    )
    copied, _ = copy_model(usable(model, PruneError))
    return replay(copied, read)


@functools.cache
def _record_schema() -> Schema[Any]:
    from torchslim.prune.structured.record_schema import SurgeryJson  # loads pydantic

    return Schema[Any](SurgeryJson, "the surgery", PruneError, mend="copy or save it again")


def _continues(record: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    count = len(current["rounds"])
    return bool(current["base"]["shapes"] == record["base"]["shapes"] and current["rounds"] == record["rounds"][:count])


def rebuild(model: nn.Module, record: Mapping[str, Any], wanted: Shapes, tied: Mapping[str, str]) -> nn.Module:
    """The result of `replay`, or the model with the record attached if it has the shrunk architecture already.

    Args:
        model: may be changed in place.
        record: a result of `surgery`.
        wanted: the shapes after the surgery.
        tied: the first name of every tensor, by each of its names.

    Raises:
        PruneError: the record is damaged, of a newer version, or of another model; the message names the difference.
    """
    _check(record)
    if not difference(shapes(model), wanted):
        _set(model, copy.deepcopy(dict(record)))
        return model
    current = surgery(model)
    differs = difference(shapes(model), undone(wanted, record["rounds"], tied))
    if differs and not (current is not None and _continues(record, current)):
        raise PruneError(
            f"this {type(model).__name__} is not the model that was pruned, a {record['base']['class']}; {differs}; "
            "give the factory of the model before pruning, or of the pruned architecture"
        )
    return replay(model, record)


def _check(record: Mapping[str, Any]) -> None:
    try:
        version = int(record["version"])
        if version <= VERSION:
            str(record["base"]["class"] + record["base"]["shapes"])
            sound = all(_sound(Surgery.from_dict(round_)) for round_ in record["rounds"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PruneError(f"the surgery is damaged: {type(error).__name__}: {error}; copy or save it again") from error
    if version > VERSION:
        raise PruneError(f"the surgery has format version {version}, this torchslim reads {VERSION}; upgrade it")
    if not sound:
        raise PruneError("the surgery is damaged: it keeps indices that do not exist; copy or save it again")


def _sound(round_: Surgery) -> bool:
    """Whether kept indices are valid and rising, and patches set only public attributes, to whole numbers."""
    return all(
        list(cut.kept) == sorted({int(index) for index in cut.kept if 0 <= index < cut.size}) and cut.dim >= 0
        for cut in round_.cuts
    ) and all(
        not patch.name.startswith("_") and all(type(number) is int for number in (patch.old, patch.new, *patch.place))
        for patch in round_.patches
    )
