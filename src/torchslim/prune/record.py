"""What was removed, kept with the module: rounds of surgery, and the base that they start from.

A record makes the shrunk module again from a fresh instance of its base, so nothing of a class is ever saved.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from torchslim.errors import PruneError
from torchslim.files import digest
from torchslim.prune.shrink import Surgery, perform

ATTRIBUTE = "_torchslim_surgery"
VERSION = 1

Shapes = Mapping[str, Sequence[int]]


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """The shape of every tensor of the model's state; buffers that are not saved may grow as it runs."""
    return {name: list(getattr(value, "shape", ())) for name, value in model.state_dict().items()}


def difference(own: Shapes, wanted: Shapes) -> str:
    """How a model differs from what was saved: what it misses, does not know, shapes otherwise; or nothing."""
    missing, unknown = sorted(set(own) - set(wanted)), sorted(set(wanted) - set(own))
    other = [
        f"{name} {tuple(shape)} instead of {tuple(wanted[name])}"
        for name, shape in own.items()
        if name in wanted and list(shape) != list(wanted[name])
    ]
    if not (missing or unknown or other):
        return ""
    return (
        f"missing: {', '.join(missing[:5]) or 'none'}; unknown: {', '.join(unknown[:5]) or 'none'}; "
        f"other shapes: {', '.join(other[:5]) or 'none'}"
    )


def surgery(model: nn.Module) -> dict[str, Any] | None:
    """What channel pruning removed from this module, as plain JSON values; None where it never did.

    `base` says which model it starts from: its class, and a digest of the shapes of its weights. `rounds` holds, for
    each pruning in turn, `cuts` (which indices of which dimension of a weight stay), `patches` (attributes that carry
    sizes), and `about`: what was asked and reached, and why other channels stayed.
    """
    found = vars(model).get(ATTRIBUTE)
    return copy.deepcopy(found) if found is not None else None


def attach(shrunk: nn.Module, base: nn.Module, done: Surgery, about: Mapping[str, Any]) -> None:
    """Add a round to the record that the shrunk module carries on from its base."""
    known = surgery(base) or {
        "version": VERSION,
        "base": {"class": f"{type(base).__module__}.{type(base).__qualname__}", "shapes": digest(shapes(base))},
        "rounds": [],
    }
    known["rounds"].append({**done.to_json(), "about": dict(about)})
    vars(shrunk)[ATTRIBUTE] = json.loads(json.dumps(known))  # equal to itself after a way through a file


def replay(base: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The shrunk module, made again from a fresh instance of its base, or from one that has its first rounds behind it.

    Raises:
        PruneError: the record is damaged, of a newer version, or of another model.
    """
    _check(record)
    done = _done(base, record)
    if done is None:
        raise PruneError(
            f"the surgery was made on a {record['base']['class']} with other weights than this {type(base).__name__}; "
            "give the factory of the model that was pruned"
        )
    for each in record["rounds"][done:]:
        try:
            base = perform(base, Surgery.from_json(each))
        except (AttributeError, IndexError, TypeError) as error:
            raise PruneError(
                f"the surgery does not fit this {type(base).__name__}: {error}; give the factory of the model that "
                "was pruned"
            ) from error
    vars(base)[ATTRIBUTE] = copy.deepcopy(dict(record))
    return base


def document(model: nn.Module) -> dict[str, Any] | None:
    """All records of a model as one JSON value: its own, or by path those of the modules inside; None without any."""
    found = {path: surgery(module) for path, module in model.named_modules() if ATTRIBUTE in vars(module)}
    if set(found) <= {""}:
        return found.get("")
    return {"version": VERSION, "modules": found}


def rebuild(model: nn.Module, saved: Mapping[str, Any], wanted: Shapes, tied: Mapping[str, str]) -> nn.Module:
    """A fresh instance with the surgeries of a `document` done, or of the shrunk architecture with them attached.

    Args:
        model: taken over; it may be changed.
        saved: what `document` gave.
        wanted: the shapes after the surgery.
        tied: by name, the first name of a tensor that has several.

    Raises:
        PruneError: the document is damaged, of a newer version, or of another model; names the difference.
    """
    records: Mapping[str, Any] = saved.get("modules", {"": saved})
    for record in records.values():
        _check(record)
    if not difference(shapes(model), wanted):  # the factory knows the shrunk architecture
        for path, record in records.items():
            vars(_module(model, path))[ATTRIBUTE] = copy.deepcopy(dict(record))
        return model
    waiting = sorted(records, key=len, reverse=True)
    while waiting:
        # a part may have been pruned before or after what is around it: whichever fits now is next
        fitting = [path for path in waiting if _done(_module(model, path), records[path]) is not None]
        if not fitting:
            raise PruneError(_misfit(model, records, wanted, tied))
        waiting.remove(fitting[0])
        model = _with(model, fitting[0], replay(_module(model, fitting[0]), records[fitting[0]]))
    return model


def _done(model: nn.Module, record: Mapping[str, Any]) -> int | None:
    """How many rounds of a record this model has behind it; None where it is another model."""
    known = vars(model).get(ATTRIBUTE)
    rounds = record["rounds"]
    if known is not None and known["base"] == record["base"] and known["rounds"] == rounds[: len(known["rounds"])]:
        return len(known["rounds"])
    return 0 if digest(shapes(model)) == record["base"]["shapes"] else None


def _misfit(model: nn.Module, records: Mapping[str, Any], wanted: Shapes, tied: Mapping[str, str]) -> str:
    """How a model differs from the one that was pruned: the shapes after it with every cut undone."""
    before = {name: list(shape) for name, shape in wanted.items()}
    for path, record in records.items():
        for each in reversed(record["rounds"]):
            for cut in each["cuts"]:
                first = f"{path}.{cut['weight']}" if path else cut["weight"]
                for name in (first, *(other for other, owner in tied.items() if owner == first)):
                    if name in before:
                        before[name][cut["dim"]] = cut["size"]
    classes = ", ".join(record["base"]["class"] for record in records.values())
    return (
        f"this {type(model).__name__} is not the model that was pruned (a {classes}); "
        f"{difference(shapes(model), before) or 'its modules are others'}; give the factory of the model before "
        "pruning, or of the pruned architecture"
    )


def _check(record: Mapping[str, Any]) -> None:
    try:
        version = int(record["version"])
        if version <= VERSION:
            str(record["base"]["class"] + record["base"]["shapes"])
            sound = all(_sound(Surgery.from_json(each)) for each in record["rounds"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PruneError(f"the surgery is damaged: {type(error).__name__}: {error}; copy or save it again") from error
    if version > VERSION:
        raise PruneError(f"the surgery has format version {version}, this torchslim reads {VERSION}; upgrade it")
    if not sound:
        raise PruneError("the surgery is damaged: it keeps indices that do not exist; copy or save it again")


def _sound(done: Surgery) -> bool:
    """Indices rise inside their dimension, and only public attributes are set, to whole numbers."""
    return all(
        list(each.kept) == sorted({int(index) for index in each.kept if 0 <= index < each.size}) and each.dim >= 0
        for each in done.cuts
    ) and all(
        not each.name.startswith("_") and all(type(number) is int for number in (each.old, each.new, *each.place))
        for each in done.patches
    )


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise PruneError(
            f"the surgery was made on {path!r}, which this {type(model).__name__} lacks; give the factory of the model "
            "that was pruned"
        ) from error


def _with(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """The model with one module replaced everywhere that it stands."""
    old = _module(model, path)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    return new if path == "" else model
